"""The pictures of the report, as SVG that stands in the page itself: text and axes take the page's text colour, so they
suit light and dark. Drawn without pyplot, so nothing is global and no display is needed.
"""

import html
import io
import re
import warnings

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

LABELS = ("other (0)", "medical (1)")
COLORS = ("#3b82d0", "#d9731a", "#1b9a75", "#a35fd0", "#c8475f", "#8a8a2b")  # legible on white and on near-black
INK = "#010203"  # stands for the page's text colour
LOOK = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
} | {f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}


def draw(caption, width, height, paint, **labels):
    """A figure with its caption, as HTML with the picture inside (SVG). `paint(axes)` draws; sizes in inches."""
    with rc_context({**LOOK, "svg.hashsalt": caption}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in Chinese: it stays text, and the browser has the font
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.set(**labels)
        paint(axes)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :]).replace(INK, "currentColor")
    caption = html.escape(caption)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def draw_matrix(caption, shares, texts, rows, columns, size, **labels):
    """A matrix of cells, the darker the higher their share (0 … 1)."""

    def paint(axes):
        for i, j in np.ndindex(len(rows), len(columns)):
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=COLORS[0], alpha=0.04 + 0.56 * shares[i][j], linewidth=0))
            axes.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center")
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), aspect="equal")
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=0 if columns is LABELS else 30)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    return draw(caption, *size, paint, **labels)


def draw_confusion(name, labels, probs):
    counts = np.zeros((2, 2), dtype=int)
    np.add.at(counts, (labels, (probs >= 0.5).astype(int)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[f"{n:,}\n{share:.1%}" for n, share in zip(*row)] for row in zip(counts, shares)]
    return draw_matrix(name, shares, texts, LABELS, LABELS, (2.9, 2.4), xlabel="predicted", ylabel="true")


def draw_agreement(caption, probs):
    """`probs`: {model: float array [papers]}."""
    sides = np.array([values >= 0.5 for values in probs.values()])
    shares = (sides[:, None] == sides[None]).mean(axis=2)
    names, size = [name[:14] for name in probs], (1.6 + 0.75 * len(sides), 1.3 + 0.75 * len(sides))
    return draw_matrix(caption, shares**3, [[f"{v:.1%}" for v in row] for row in shares], names, names, size)


def draw_reliability(labels, probs, bins=10):
    """Share of label 1 among the papers of each tenth of the probability, against their mean probability."""

    def paint(axes):
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1, linestyle="--")
        for place, (name, values) in enumerate(probs.items()):
            part = np.minimum((values * bins).astype(int), bins - 1)
            used = np.unique(part)
            x, y = (np.array([what[part == i].mean() for i in used]) for what in (values, labels))
            size = 15 + 150 * np.array([np.mean(part == i) for i in used])
            color = INK if name == "blend" else COLORS[place % len(COLORS)]
            axes.plot(x, y, color=color, alpha=0.6, linewidth=1.2)
            axes.scatter(x, y, size, color=color, alpha=0.85, linewidth=0, label=name[:20])
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axes.grid(color=INK, alpha=0.12)
        for handle in axes.figure.legend(loc="outside upper left", ncols=3, handletextpad=0).legend_handles:
            handle.set_sizes([40])

    return draw(
        "Reliability diagram", 4.6, 4.4, paint, xlabel="mean P(label = 1)", ylabel="share of papers with label 1"
    )


def draw_curves(name, logs):
    """Learning curves of a model: figures of the loss and of the scores. `logs`: a frame of log.csv for each fold."""
    last = int(max(log["epoch"].max() for log in logs))

    def draw_lines(what, lines):
        def paint(axes):
            for (column, label), color, marker in zip(lines.items(), COLORS, "os^"):
                for i, log in enumerate(logs):
                    look = {"color": color, "marker": marker, "markersize": 4, "alpha": 0.85}
                    axes.plot(log["epoch"], log[column], label=None if i else label, **look)
            axes.set_xticks(range(1, last + 1, 1 + last // 12))
            axes.grid(color=INK, alpha=0.12)
            axes.legend()

        return draw(f"{name}: {what} by epoch", 4.4, 3, paint, xlabel="epoch", ylabel=what)

    scored = {"accuracy": "accuracy", "f1": "F1", "auc": "AUC"}
    return [
        draw_lines("loss", {"train_loss": "training", "log_loss": "held out"}),
        draw_lines("held-out score", scored),
    ]

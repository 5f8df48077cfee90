"""The pictures of the report, as SVG inside the page. Text and axes take the page's text colour, so they suit light and
dark. Drawn without pyplot: no display is needed and nothing is global.

The matrices are drawn cell by cell: sklearn's ConfusionMatrixDisplay would put a bitmap into the page.
"""

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.metrics import confusion_matrix

LABELS = ("other (0)", "medical (1)")
COLORS = ("#3b82d0", "#d9731a", "#1b9a75", "#a35fd0", "#c8475f", "#8a8a2b")  # legible on white and on near-black
INK = "#010203"  # replaced by the page's text colour
LOOK = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "kit",  # ids are the same in every run
    "text.parse_math": False,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
} | {f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}


@dataclass
class Picture:
    caption: str
    svg: str  # goes into the page as it is: matplotlib escapes the text in it


def new_axes(width, height, **labels):
    """Axes of a figure of their own; sizes in inches."""
    axes = Figure(figsize=(width, height), layout="constrained").subplots()
    axes.set(**labels)
    return axes


def to_picture(caption, axes):
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in Chinese: it stays text, and the browser has the font
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        axes.figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Picture(caption, re.sub(r' id="[\w.]+_\d+"', "", svg))  # these ids repeat from picture to picture


def draw_matrix(axes, shades, texts, rows, columns):
    """Cells with a text in each, the darker the higher their shade (0 to 1)."""
    for i, j in np.ndindex(len(rows), len(columns)):
        axes.add_patch(Rectangle((j, i), 1, 1, facecolor=COLORS[0], alpha=0.04 + 0.56 * shades[i][j], linewidth=0))
        axes.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center")
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), aspect="equal")
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


@rc_context(LOOK)
def draw_confusion(name, labels, probs):
    counts = confusion_matrix(labels, probs >= 0.5, labels=[0, 1])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[f"{counts[i, j]:,}\n{shares[i, j]:.1%}" for j in (0, 1)] for i in (0, 1)]
    axes = new_axes(2.9, 2.4, xlabel="predicted", ylabel="true")
    draw_matrix(axes, shares, texts, LABELS, LABELS)
    return to_picture(name, axes)


@rc_context(LOOK)
def draw_agreement(caption, probs):
    """On which share of the papers two models give the same label. `probs`: {model: float array [papers]}."""
    guesses = np.array(list(probs.values())) >= 0.5
    shares = (guesses[:, None] == guesses[None]).mean(axis=2)
    texts = [[f"{share:.1%}" for share in row] for row in shares]
    names = [name[:14] for name in probs]
    axes = new_axes(1.6 + 0.75 * len(names), 1.3 + 0.75 * len(names))
    draw_matrix(axes, shares**3, texts, names, names)
    axes.tick_params(axis="x", rotation=30)
    return to_picture(caption, axes)


@rc_context(LOOK)
def draw_reliability(labels, probs):
    """Share of label 1 among the papers of each tenth of the probability, against their mean probability."""
    axes = new_axes(4.6, 4.4, xlabel="mean P(label = 1)", ylabel="share of papers with label 1")
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1, linestyle="--")
    for place, (name, values) in enumerate(probs.items()):
        tenths = pd.DataFrame({"prob": values, "label": labels}).groupby(np.minimum(values * 10 // 1, 9))
        means, shares = tenths.mean(), tenths.size() / len(labels)
        color = INK if name == "blend" else COLORS[place % len(COLORS)]
        axes.plot(means["prob"], means["label"], color=color, alpha=0.6, linewidth=1.2)
        look = {"color": color, "alpha": 0.85, "linewidth": 0, "label": name[:20]}
        axes.scatter(means["prob"], means["label"], 15 + 150 * shares, **look)
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    axes.grid(color=INK, alpha=0.12)
    for handle in axes.figure.legend(loc="outside upper left", ncols=3, handletextpad=0).legend_handles:
        handle.set_sizes([40])
    return to_picture("Reliability diagram", axes)


@rc_context(LOOK)
def draw_curves(caption, logs, columns, ylabel):
    """Columns of log.csv by epoch. `logs`: a frame of each fold; `columns`: {column: its name in the legend}."""
    axes = new_axes(4.4, 3, xlabel="epoch", ylabel=ylabel)
    for (column, name), color, marker in zip(columns.items(), COLORS, "os^"):
        for fold, log in enumerate(logs):
            look = {"color": color, "marker": marker, "markersize": 4, "alpha": 0.85}
            axes.plot(log["epoch"], log[column], label=None if fold else name, **look)
    last = int(max(log["epoch"].max() for log in logs))
    axes.set_xticks(range(1, last + 1, 1 + last // 12))
    axes.grid(color=INK, alpha=0.12)
    axes.legend()
    return to_picture(caption, axes)

"""The picture of the report, as SVG inside the page. Text and axes take the page's text colour, so they suit light and
dark. Drawn without pyplot: no display is needed and nothing is global.
"""

import io
import warnings

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

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


def to_svg(figure):
    """The figure as an <svg> element. It goes into the page as it is: matplotlib escapes the text in it."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in Chinese: it stays text, and the browser has the font
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


@rc_context(LOOK)
def draw_reliability(labels, probs):
    """Share of label 1 among the papers of each tenth of the probability, against their mean probability. `probs`:
    {model: float array [papers]}. Returns the <svg>.
    """
    axes = Figure(figsize=(4.6, 4.4), layout="constrained").subplots()
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1, linestyle="--")
    handles = []
    for place, (name, values) in enumerate(probs.items()):
        tenths = pd.DataFrame({"prob": values, "label": labels}).groupby(np.minimum(values * 10 // 1, 9))
        means, shares = tenths.mean(), tenths.size() / len(labels)
        color = INK if name == "blend" else COLORS[place % len(COLORS)]
        axes.plot(means["prob"], means["label"], color=color, alpha=0.6, linewidth=1.2)
        look = {"color": color, "alpha": 0.85, "linewidth": 0}
        handles.append(axes.scatter(means["prob"], means["label"], 15 + 150 * shares, **look))
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    axes.set(xlabel="mean P(label = 1)", ylabel="share of papers with label 1")
    axes.grid(color=INK, alpha=0.12)
    names = [name[:20] for name in probs]  # given as a list, since a label that begins with "_" would be left out
    for handle in axes.figure.legend(handles, names, loc="outside upper left", ncols=3, handletextpad=0).legend_handles:
        handle.set_sizes([40])
    return to_svg(axes.figure)

"""The report that blend.py writes: outputs/report.html, one page that needs no other file and no network, and
report.md with the same tables. The same inputs give the same bytes. The template of the page is lib/report.html.
"""

import re
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from common import log
from lib import plots
from lib.plots import LABELS
from lib.results import METRICS, atomic_write

TITLE = "Medical or not: the report"


@dataclass
class Found:
    """What blend.py found."""

    submitted: str  # what goes into the submission, in a sentence
    trust: list  # sentences on how far to trust the scores; the page highlights them if the first begins with "warning"
    tiles: list  # the figures at the top: (value, what it is)
    tables: list  # of scores: (title, rows of lib.results.score_table)
    metrics: dict  # {model: its metrics.json, {} if it has none}
    keywords: dict  # metrics.json of extract_keywords.py, {} if it has not run on these test papers
    papers: pd.DataFrame  # the papers that every model held out
    probs: dict  # {model, and "blend" if it mixes several: P(label = 1) of these papers}
    test_probs: dict  # the same of the test papers


@dataclass
class Section:
    """A part of the report. The page shows pictures or bars in place of the table; report.md shows the table alone."""

    title: str
    text: str = ""  # a sentence under the title
    header: list = field(default_factory=list)  # of the table
    rows: list = field(default_factory=list)  # of the table: lists of str
    pictures: list = field(default_factory=list)  # plots.Picture
    bars: dict = field(default_factory=dict)  # {label: [(n-gram, weight), largest first]}
    papers: list = field(default_factory=list)  # one a row: a dict whose author and abstract the first cell can show

    def column_kinds(self):
        """How the page sets each column: "number", "wide" (long text) or "text"."""
        kinds = []
        for cells in zip(*self.rows):
            if all(re.fullmatch(r"[\d.,]+( ✗)?|–", cell) for cell in cells):
                kinds.append("number")
            else:
                kinds.append("wide" if max(map(len, cells)) > 30 else "text")
        return kinds


def number(value, digits=4):
    return "–" if value is None else f"{value:,.{digits}f}"


# ---- sections --------------------------------------------------------------------------------------------------------


def score_section(title, rows):
    """`rows`: (name, scores, note), as in lib.results.score_table."""
    header = ["model", "accuracy", "precision", "recall", "F1", "AUC", "log-loss", "papers, fields"]
    cells = [[name, *(number(values.get(key)) for key in METRICS), note] for name, values, note in rows]
    return Section(title, header=header, rows=cells)


def cost_section(metrics):
    header = ["model", "device", "epochs", "training, s", "training, papers/s", "predicting, papers/s", "memory, MiB"]
    rows = []
    for name, m in metrics.items():
        epochs = " + ".join(map(str, np.atleast_1d(m.get("epochs_run", "–"))))
        memory = max(m.get("peak_memory_mb") or 0, m.get("train_peak_memory_mb") or 0) or None
        speeds = [m.get(f"{key}_papers_per_second") for key in ("train", "predict")]
        seconds = [number(value, 1) for value in (m.get("train_seconds"), *speeds)]
        rows.append([name, m.get("trained_on") or m.get("device", "–"), epochs, *seconds, number(memory, 0)])
    text = "Seconds of the training steps alone, of all folds together; of the baseline, of the whole script."
    return Section("Time and memory", text, header, rows)


def settings_section(metrics):
    hidden = ("train", "held_out", "fields", "folders")  # fingerprints, and what is said elsewhere

    def to_text(values):
        shown = [name for name in values if name not in hidden and values[name] is not None]
        return ", ".join(f"{name} {values[name]}" for name in shown)

    rows = []
    for name, m in metrics.items():
        settings, versions = to_text(m.get("settings", {})), to_text(m.get("versions", {}))
        rows.append([name, " ".join(m.get("fields", [])), settings, versions])
    return Section("Settings", header=["model", "fields", "settings", "versions"], rows=rows)


def keyword_section(keywords):
    """`keywords`: metrics.json of extract_keywords.py."""
    header = [*(name.replace("_", " ") for name in keywords["scores"]), "papers/s"]
    cells = [*map(number, keywords["scores"].values()), number(keywords["papers_per_second"], 1)]
    papers, fields = keywords["papers"].get("held_out"), " ".join(keywords["fields"])
    text = f"Of extract_keywords.py, out of fold on {papers} papers, {fields}."
    return Section("Keywords", text, header, [cells])


def hardest(labels, probs, most=20):
    """The papers that the models get most wrong (mean distance from the label) or disagree on most (from the lowest to
    the highest probability), worst first. `probs`: float array [models, papers]. Returns int array of places.
    """
    trouble = np.maximum(np.abs(probs - labels).mean(axis=0), np.ptp(probs, axis=0))
    return np.argsort(-trouble, kind="stable")[:most]


def hardest_section(papers, probs, models):
    places = hardest(papers["label"].to_numpy(), np.array([probs[name] for name in models]))
    chosen, rows = papers.iloc[places].to_dict("records"), []
    for place, paper in zip(places, chosen):
        cells = []
        for values in probs.values():
            right = (values[place] >= 0.5) == paper["label"]
            cells.append(f"{values[place]:.3f}" + ("" if right else " ✗"))
        rows.append([paper["title"] or "(no title)", paper["uuid"], str(paper["label"]), *cells])
    text = (
        "Papers that the models get most wrong or disagree on most, with P(label = 1) of each model; ✗ marks the wrong "
        "side of 0.5. On the page, a title opens authors and abstract."
    )
    title, header = f"The {len(rows)} hardest of the held-out papers", ["title", "uuid", "label", *probs]
    return Section(title, text, header, rows, papers=chosen)


def strongest_section(title, hint, strongest):
    """What the baseline's words, or the characters of authors, weigh. `strongest`: {label: [[n-gram, weight]]}."""
    header, columns = [], []
    for label in ("1", "0"):
        header += [LABELS[int(label)], "weight"]
        columns += [[name for name, _ in strongest[label]], [f"{weight:.2f}" for _, weight in strongest[label]]]
    rows = [list(row) for row in zip_longest(*columns, fillvalue="")]
    bars = {LABELS[int(label)]: strongest[label] for label in ("1", "0")}
    return Section(title, f"The n-grams with the highest weight for each label; {hint}.", header, rows, bars=bars)


def strongest_sections(strongest):
    """`strongest`: {"words" and "author": {label: [[n-gram, weight]]}}, of the baseline."""
    if any(strongest.get("words", {}).values()):
        yield strongest_section("What words tell the baseline", "a punctuation mark is a word", strongest["words"])
    if any(strongest.get("author", {}).values()):
        blanks_shown = {}
        for label, ngrams in strongest["author"].items():
            blanks_shown[label] = [[name.replace(" ", "␣"), weight] for name, weight in ngrams]
        yield strongest_section("What the way authors are written tells the baseline", "␣ is a blank", blanks_shown)


def read_logs(folder, metrics):
    """The frames of log.csv of a model, one a fold; none where there is none."""
    logs, columns = [], ["epoch", "train_loss", "log_loss", "accuracy", "f1", "auc"]
    for subfolder in metrics.get("settings", {}).get("folders", ["."]):
        path = folder / subfolder / "log.csv"
        if path.is_file():
            try:
                logs.append(pd.read_csv(path)[columns].astype(float).dropna(subset="epoch"))
            except (ValueError, KeyError):
                log(f"warning: {path} is damaged, left out of the report")
    return [frame for frame in logs if len(frame)]


def curve_section(folder, metrics):
    """Learning curves of the models that have a log.csv."""
    losses = {"train_loss": "training", "log_loss": "held out"}
    scores = {"accuracy": "accuracy", "f1": "F1", "auc": "AUC"}
    pictures = []
    for name, m in metrics.items():
        if logs := read_logs(folder / name, m):
            pictures.append(plots.draw_curves(f"{name}: loss by epoch", logs, losses, "loss"))
            pictures.append(plots.draw_curves(f"{name}: held-out score by epoch", logs, scores, "held-out score"))
    return Section("Learning curves", "Where the held-out loss rises again, training has gone on too long.",
                   pictures=pictures)


def probability_sections(found):
    """Pictures of the predictions: confusion, reliability, agreement."""
    labels, held_out = found.papers["label"].to_numpy(), f"the {len(found.papers):,} papers that every model held out"
    pictures = [plots.draw_confusion(name, labels, values) for name, values in found.probs.items()]
    yield Section("Confusion matrices", f"On {held_out}; shares are of the true class.", pictures=pictures)
    text = f"On {held_out}: of the papers given a probability of 0.8, are 8 in 10 medical? Then its point lies on "
    text += "the dashed line; below it a model is too sure of label 1. The larger a point, the more papers."
    yield Section("Reliability", text, pictures=[plots.draw_reliability(labels, found.probs)])
    if len(found.metrics) > 1:
        pictures = []
        for side, probs in (("held-out", found.probs), ("test", found.test_probs)):
            pictures.append(plots.draw_agreement(f"{side} papers", {name: probs[name] for name in found.metrics}))
        text = "Share of papers on which two models give the same label. A model that always agrees adds nothing."
        yield Section("Agreement between models", text, pictures=pictures)


def make_sections(folder, found):
    """All parts of the report in their order; those without content are left out."""
    sections = [score_section(title, rows) for title, rows in found.tables]
    sections.append(cost_section(found.metrics))
    if found.keywords:
        sections.append(keyword_section(found.keywords))
    sections.append(curve_section(folder, found.metrics))
    sections += probability_sections(found)
    sections += strongest_sections(found.metrics.get("baseline", {}).get("strongest", {}))
    sections.append(hardest_section(found.papers, found.probs, list(found.metrics)))
    sections.append(settings_section(found.metrics))
    return [section for section in sections if section.rows or section.pictures]


# ---- the two files ---------------------------------------------------------------------------------------------------


def to_html(found, sections):
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html").render(title=TITLE, found=found, sections=sections)


def md_text(text):
    """Text in which Markdown finds no markup."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", text)


def md_table(header, rows):
    header, *rows = ([md_text(text) for text in row] for row in (header, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def to_markdown(found, sections):
    blocks = [f"# {TITLE}", f"**Submitted:** {md_text(found.submitted)}"]
    blocks.append("\n".join(f"- {md_text(meaning)}: {md_text(value)}" for value, meaning in found.tiles))
    blocks += ["## How far to trust the scores", *map(md_text, found.trust)]
    for section in sections:
        if section.rows:
            blocks += [f"## {section.title}", md_text(section.text), md_table(section.header, section.rows)]
    return "\n\n".join(filter(None, blocks))


def write(folder, found):
    """Write report.html and report.md into a folder."""
    sections = make_sections(folder, found)
    for name, content in (("report.md", to_markdown(found, sections)), ("report.html", to_html(found, sections))):
        with atomic_write(folder / name) as part:
            part.write_text(content + "\n", encoding="utf-8", newline="\n")
    log(f"wrote {folder / 'report.html'} and report.md")

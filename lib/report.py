"""The report that blend.py writes: outputs/report.html, one page that needs no other file and no network, and
report.md with the same tables. The same inputs give the same bytes. The template of the page is lib/report.html.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from scipy.stats import binomtest

from common import log
from lib import plots
from lib.plots import LABELS
from lib.results import atomic_write, scores

TITLE = "Medical or not: the report"
SCORES = {  # name in metrics.json -> name in the report
    "f1": "F1",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "auc": "AUC",
    "log_loss": "log-loss",
}


@dataclass
class Found:
    """What blend.py found."""

    submitted: str  # what goes into the submission and why, in a sentence
    chosen: str  # the name under which it is in probs and test_probs
    auc: float | None  # of a classifier that tells train from test
    one_class: str  # a warning if nearly all test papers get one class, else ""
    failed: list  # stages of run.sh that failed
    tables: list  # of scores: (title, rows of lib.results.score_table)
    metrics: dict  # {model: its metrics.json, {} if it has none}
    keywords: dict  # metrics.json of extract_keywords.py, {} if it has not run on these test papers
    keyword_recall: float | None  # case-sensitive, of the keywords to submit; None if not known
    papers: pd.DataFrame  # the papers that every model held out
    probs: dict  # {model, and "blend" if one was tried: P(label = 1) of these papers}
    test_probs: dict  # the same of the test papers
    test_labels: np.ndarray | None  # labels of the test papers, where known


@dataclass
class Section:
    """A part of the report. The page shows pictures or bars in place of the table; report.md shows the table alone."""

    title: str
    text: str = ""  # a sentence under the title
    rows: list = field(default_factory=list)  # of the table: {column: text}
    pictures: list = field(default_factory=list)  # plots.Picture
    bars: dict = field(default_factory=dict)  # {label: [(n-gram, weight), largest first]}
    papers: list = field(default_factory=list)  # one a row: its author and abstract, which the first cell can show

    def column_kinds(self):
        """{column: how the page sets it: "number", "wide" (long text) or "text"}."""
        kinds = {}
        for column in self.rows[0]:
            cells = [row[column] for row in self.rows]
            if all(re.fullmatch(r"[\d.,]+( ✗| s| min| ± \S+)?|–", cell) for cell in cells):
                kinds[column] = "number"
            else:
                kinds[column] = "wide" if max(map(len, cells)) > 30 else "text"
        return kinds


def number(value, digits=4):
    return "–" if pd.isna(value) else f"{value:,.{digits}f}"


# ---- the figures at the top ------------------------------------------------------------------------------------------


def f1_interval(labels, probs):
    """95 % interval of F1 as (low, high): Wilson's interval of the share of hits among the papers that have label 1 or
    are given it, carried over by F1 = 2 share / (1 + share).
    """
    guess = probs >= 0.5
    hits, either = int(np.sum(guess & (labels == 1))), int(np.sum(guess | (labels == 1)))
    if not either:
        return 0.0, 1.0
    low, high = binomtest(hits, either).proportion_ci(method="wilson")
    return 2 * low / (1 + low), 2 * high / (1 + high)


def submitted_scores(found):
    """What is submitted, on held-out papers and, with labels, on test papers: (which papers, F1, its 95 % interval)."""
    sides = [("held-out", found.papers["label"].to_numpy(), found.probs[found.chosen])]
    if found.test_labels is not None:
        sides.append(("test", found.test_labels, found.test_probs[found.chosen]))
    for side, labels, probs in sides:
        yield f"{len(labels):,} {side} papers", scores(labels, probs)["f1"], f1_interval(labels, probs)


def board_estimates(found):
    """What the board may show: (which papers F1 is of, F1, case-sensitive recall of keywords, estimate), one for the
    held-out papers and, with labels, one for the test papers. Empty if the recall is not known.
    """
    recall = found.keyword_recall
    if recall is None:
        return []
    return [(papers, f1, recall, 0.4 * f1 + 0.6 * recall) for papers, f1, _ in submitted_scores(found)]


def make_tiles(found):
    """(value, what it is) of each figure at the top."""
    tiles = []
    for papers, f1, (low, high) in submitted_scores(found):
        tiles.append((f"{f1:.3f}", f"F1 on {papers}, 95 % interval {low:.3f} to {high:.3f}"))
    for papers, f1, recall, estimate in board_estimates(found)[-1:]:
        meaning = f"board estimate (inferred): 0.4 × F1 {f1:.3f} on {papers} + 0.6 × keyword recall {recall:.3f}"
        tiles.append((f"{estimate:.3f}", meaning))
    guess = found.test_probs[found.chosen] >= 0.5
    tiles.append((f"{guess.mean():.1%}", f"of {len(guess):,} test papers are called medical"))
    tiles.append((number(found.auc, 2), "AUC of telling train from test, 0.5 = alike"))
    return tiles


def describe_auc(auc):
    """What the AUC of telling train from test means, in a sentence."""
    if auc is None:
        return "train and test were not compared: too few papers or no text"
    finding = f"A classifier that sees only the text tells train from test with AUC {auc:.2f} (0.5 = alike)"
    if auc < 0.6:
        return f"{finding}: held-out scores should carry over to the test papers."
    if auc < 0.7:
        return f"{finding}: they differ a little; held-out scores may be somewhat too good."
    return (
        f"warning: {finding}: the test papers are about other things than the training papers. Held-out scores say how "
        "well a model does on papers like those of train; expect less on test, most of all without the authors."
    )


def describe_trust(found):
    """How far to trust the scores, in sentences. If one begins with "warning", the page highlights them."""
    sentences, count = [describe_auc(found.auc), found.one_class], len(found.papers)
    if found.failed:
        sentences.append(f"warning: failed in the last run: {', '.join(found.failed)}. What these stages left before, "
                         "if anything, is used here.")
    held_out = f"{count:,} papers were held out by every model: one more or less right is {1 / count:.4f} of accuracy."
    if len(found.metrics) > 1:
        held_out += " What is submitted was chosen on these very papers, so its scores there are a little too good."
    sentences.append(held_out)
    table = found.metrics.get("baseline", {}).get("table", [])
    references = {name: values["accuracy"] for name, values, _ in table}
    rule = references.get("author rule", 0)
    if rule >= 0.9:
        authors = f"The way authors are written, and nothing else, tells the label of {rule:.2%} of the training "
        authors += "papers: a model that reads authors need not understand a paper."
        if free := [accuracy for name, accuracy in references.items() if name.endswith("no author")]:
            authors += f" Without authors the baseline is right on {max(free):.2%}."
        sentences.append(authors)
    return [sentence for sentence in sentences if sentence]


# ---- sections --------------------------------------------------------------------------------------------------------


def score_section(title, scored):
    """`scored`: (name, scores, note), as in lib.results.score_table."""
    rows = []
    for name, values, note in scored:
        cells = {SCORES[key]: number(values.get(key)) for key in SCORES}
        rows.append({"model": name, **cells, "papers, fields": note})
    return Section(title, rows=rows)


def board_section(estimates):
    """`estimates`: see board_estimates."""
    rows = []
    for papers, f1, recall, estimate in estimates:
        parts = {"F1 of task 1": number(f1), "keyword recall": number(recall)}
        rows.append({"papers of task 1": papers, **parts, "board estimate": number(estimate)})
    text = "0.4 × F1 of task 1 + 0.6 × case-sensitive recall of keywords (mean over papers). This is inferred from "
    text += "scores that teams have published; it is not official."
    return Section("Board estimate (inferred)", text, rows)


def seed_section(metrics):
    """The spread of the scores of models that were trained with several seeds."""
    rows = []
    for name, m in metrics.items():
        runs = m.get("seeds", [])
        cells = {}
        for key, label in SCORES.items():
            values = pd.Series([run.get(key) for run in runs], dtype=float)
            cells[label] = f"{number(values.mean())} ± {number(values.std())}"
        if runs:
            rows.append({"model": name, "seeds": str(len(runs)), **cells})
    return Section("Over seeds", "Mean ± standard deviation of the scores of each seed.", rows)


def time_taken(m):
    """How long a script took, from its metrics.json: all of it where it says so, else training and predicting."""
    seconds, speed = m.get("seconds"), m.get("predict_papers_per_second")
    if seconds is None and "train_seconds" in m:
        predicted = m["papers"]["held_out"] + m["papers"]["test"]
        seconds = m["train_seconds"] + (predicted / speed if speed else 0)
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def cost_section(stages):
    """`stages`: {model or "keywords": its metrics.json}."""
    rows = []
    for name, m in stages.items():
        epochs = np.atleast_1d(m.get("epochs_run", "–"))  # of each fold
        memory = max(m.get("peak_memory_mb") or 0, m.get("train_peak_memory_mb") or 0) or None
        rows.append({
            "stage": name,
            "device": m.get("trained_on") or m.get("device", "–"),
            "epochs": " + ".join(map(str, epochs)),
            "time": time_taken(m),
            "training, papers/s": number(m.get("train_papers_per_second"), 1),
            "predicting, papers/s": number(m.get("predict_papers_per_second"), 1),
            "memory, MiB": number(memory, 0),
        })
    return Section("Time and memory", "Time of training and predicting, or of the whole script.", rows)


def settings_section(metrics):
    hidden = ("train", "held_out", "fields", "folders")  # fingerprints, and what is said elsewhere

    def to_text(values):
        shown = [name for name in values if name not in hidden and values[name] is not None]
        return ", ".join(f"{name} {values[name]}" for name in shown)

    rows = []
    for name, m in metrics.items():
        row = {"model": name, "fields": " ".join(m.get("fields", []))}
        rows.append({**row, "settings": to_text(m.get("settings", {})), "versions": to_text(m.get("versions", {}))})
    return Section("Settings", rows=rows)


def keyword_section(keywords):
    """`keywords`: metrics.json of extract_keywords.py."""
    rows = []
    for name, value in keywords["scores"].items():
        if isinstance(value, (int, float)):
            rows.append({"score": name.replace("_", " "), "value": number(value)})
    papers, fields = keywords["papers"].get("held_out"), " ".join(keywords["fields"])
    return Section("Keywords", f"Of extract_keywords.py, out of fold on {papers} papers, {fields}.", rows)


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
        cells = {}
        for name, values in probs.items():
            right = (values[place] >= 0.5) == paper["label"]
            cells[f"P by {name}"] = f"{values[place]:.3f}" + ("" if right else " ✗")
        title = paper["title"] or "(no title)"
        rows.append({"title": title, "uuid": paper["uuid"], "label": str(paper["label"]), **cells})
    text = "Papers that the models get most wrong or disagree on most, with P(label = 1) by each model; ✗ marks the "
    text += "wrong side of 0.5. On the page, a title opens authors and abstract."
    return Section(f"The {len(rows)} hardest of the held-out papers", text, rows, papers=chosen)


def strongest_sections(strongest):
    """What n-grams tell the baseline. `strongest`: {"words" or "author": {label: [[n-gram, weight]]}}."""
    titles = {
        "words": ("What words tell the baseline", "a punctuation mark is a word"),
        "author": ("What the way authors are written tells the baseline", "␣ is a blank"),
    }
    for block, (title, hint) in titles.items():
        bars, rows = {}, []
        for label in ("1", "0"):
            ngrams = strongest.get(block, {}).get(label, [])
            if block == "author":
                ngrams = [(name.replace(" ", "␣"), weight) for name, weight in ngrams]
            bars[LABELS[int(label)]] = ngrams
            rows += [{"label": label, "n-gram": name, "weight": f"{weight:.2f}"} for name, weight in ngrams]
        yield Section(title, f"The n-grams with the highest weight for each label; {hint}.", rows, bars=bars)


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
    valued = {"accuracy": "accuracy", "f1": "F1", "auc": "AUC"}
    pictures = []
    for name, m in metrics.items():
        if logs := read_logs(folder / name, m):
            pictures.append(plots.draw_curves(f"{name}: loss by epoch", logs, losses, "loss"))
            pictures.append(plots.draw_curves(f"{name}: held-out score by epoch", logs, valued, "held-out score"))
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
    sections.append(board_section(board_estimates(found)))
    sections.append(seed_section(found.metrics))
    recorded = {name: m for name, m in found.metrics.items() if m}  # a user's own model may have no metrics.json
    keywords = {"keywords": found.keywords} if found.keywords else {}
    sections.append(cost_section(recorded | keywords))
    sections += [keyword_section(m) for m in keywords.values()]
    sections.append(curve_section(folder, found.metrics))
    sections += probability_sections(found)
    sections += strongest_sections(found.metrics.get("baseline", {}).get("strongest", {}))
    sections.append(hardest_section(found.papers, found.probs, list(found.metrics)))
    sections.append(settings_section(recorded))
    return [section for section in sections if section.rows or section.pictures]


# ---- the two files ---------------------------------------------------------------------------------------------------


def to_html(found, sections):
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    trust = describe_trust(found)
    warned = any(sentence.startswith("warning") for sentence in trust)
    template = environment.get_template("report.html")
    return template.render(title=TITLE, submitted=found.submitted, tiles=make_tiles(found), trust=trust, warned=warned,
                           sections=sections)


def md_text(text):
    """Text in which Markdown finds no markup."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", text)


def md_table(rows):
    """`rows`: {column: text}."""
    lines = [list(map(md_text, rows[0])), ["---"] * len(rows[0])]
    lines += [list(map(md_text, row.values())) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_markdown(found, sections):
    blocks = [f"# {TITLE}", f"**Submitted:** {md_text(found.submitted)}"]
    blocks.append("\n".join(f"- {md_text(meaning)}: {md_text(value)}" for value, meaning in make_tiles(found)))
    blocks += ["## How far to trust the scores", *map(md_text, describe_trust(found))]
    for section in sections:
        if section.rows:
            blocks += [f"## {section.title}", md_text(section.text), md_table(section.rows)]
    return "\n\n".join(filter(None, blocks))


def write(folder, found):
    """Write report.html and report.md into a folder."""
    sections = make_sections(folder, found)
    for name, content in (("report.md", to_markdown(found, sections)), ("report.html", to_html(found, sections))):
        with atomic_write(folder / name) as part:
            part.write_text(content + "\n", encoding="utf-8", newline="\n")
    log(f"wrote {folder / 'report.html'} and report.md")

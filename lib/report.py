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

from lib import plots
from lib.cli import log
from lib.plots import LABELS
from lib.results import atomic_write, board_estimate, scores

TITLE = "Medical or not: the report"
SCORES = ("F1", "accuracy", "precision", "recall", "AUC", "log-loss")
KEYS = [name.lower().replace("-", "_") for name in SCORES]  # in metrics.json


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

    def column_kind(self, column):
        """How the page sets a column: "number", "wide" (long text) or "text"."""
        cells = [row[column] for row in self.rows]
        if all(re.fullmatch(r"[\d.,]+( ✗| s| min| ± \S+)?|–", cell) for cell in cells):
            return "number"
        return "wide" if max(map(len, cells)) > 30 else "text"


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
    """What the board may show, with F1 of held-out papers and of test papers, where known: (estimate, its two parts).
    Empty if the recall of the keywords is not known.
    """
    recall = found.keyword_recall
    for papers, f1, _ in submitted_scores(found) if recall is not None else ():
        parts = f"0.4 × F1 {f1:.4f} on {papers} + 0.6 × case-sensitive keyword recall {recall:.4f}"
        yield board_estimate(f1, recall), parts


def make_tiles(found):
    """(value, what it is) of each figure at the top."""
    tiles = []
    for papers, f1, (low, high) in submitted_scores(found):
        tiles.append((f"{f1:.3f}", f"F1 on {papers}, 95 % interval {low:.3f} to {high:.3f}"))
    for estimate, parts in [*board_estimates(found)][-1:]:
        tiles.append((f"{estimate:.3f}", f"board estimate (inferred, not official): {parts}"))
    guess = found.test_probs[found.chosen] >= 0.5
    tiles.append((f"{guess.mean():.1%}", f"of {len(guess):,} test papers are called medical"))
    tiles.append((number(found.auc, 2), "AUC of telling train from test, 0.5 = alike"))
    return tiles


def describe_auc(auc):
    """What the AUC of telling train from test means, in a sentence."""
    if auc is None:
        return "train and test were not compared: too few papers or no text"
    finding = f"AUC {auc:.2f} of a classifier that tells train from test by text (0.5 = alike)"
    if auc < 0.4:
        return f"{finding}: worse than a guess, by chance or by near-copies; it shows no difference."
    if auc < 0.6:
        return f"{finding}: held-out scores should carry over to the test papers."
    if auc < 0.7:
        return f"{finding}: the two differ a little; held-out scores may be somewhat too good."
    return f"warning: {finding}: the two are about different things; expect lower scores on test."


def describe_trust(found):
    """How far to trust the scores, in sentences. If one begins with "warning", the page highlights them."""
    count = len(found.papers)
    sentences = [describe_auc(found.auc)]
    if found.one_class:
        sentences.append(found.one_class)
    if found.failed:
        sentences.append(f"warning: failed in the last run: {', '.join(found.failed)}. What these stages left before, "
                         "if anything, is used here.")
    sentences.append(f"{count:,} papers were held out by every model: one more or less right is {1 / count:.4f} of "
                     "accuracy.")
    if len(found.metrics) > 1:
        sentences.append("What is submitted was chosen on these very papers: its scores there are a little too good.")
    table = found.metrics.get("baseline", {}).get("table", [])
    accuracy = {name: values["accuracy"] for name, values, _ in table}
    if accuracy.get("author rule", 0) >= 0.9:
        free = [accuracy[name] for name in accuracy if name.endswith("no author")]
        sentences.append(f"The way authors are written, and nothing else, tells the label of "
                         f"{accuracy['author rule']:.2%} of the training papers: a model that reads authors need not "
                         f"understand a paper. Without authors the baseline is right on {max(free, default=0):.2%}.")
    return sentences


# ---- sections --------------------------------------------------------------------------------------------------------


def score_cells(values):
    """{name in the report: text} of scores."""
    return {name: number(values.get(key)) for name, key in zip(SCORES, KEYS)}


def score_section(title, scored):
    """`scored`: (name, scores, note), as in lib.results.score_table."""
    rows = [{"model": name, **score_cells(values), "papers, fields": note} for name, values, note in scored]
    return Section(title, rows=rows)


def seed_section(metrics):
    """The spread of the scores of models that were trained with several seeds."""
    rows = []
    for name, m in metrics.items():
        if "seeds" in m:
            runs = pd.DataFrame(m["seeds"], columns=KEYS, dtype=float)
            mean, spread = score_cells(runs.mean()), score_cells(runs.std())
            cells = {score: f"{mean[score]} ± {spread[score]}" for score in SCORES}
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


def strongest_section(title, by_label, hint, blank=" "):
    """What n-grams tell the baseline. `by_label`: {"0" or "1": [[n-gram, weight], ...]}; `blank`: how one is shown."""
    bars, rows = {}, []
    for label in ("1", "0"):
        ngrams = [(name.replace(" ", blank), weight) for name, weight in by_label.get(label, [])]
        bars[LABELS[int(label)]] = ngrams
        rows += [{"label": label, "n-gram": name, "weight": f"{weight:.2f}"} for name, weight in ngrams]
    return Section(title, f"The n-grams with the highest weight for each label; {hint}.", rows, bars=bars)


def read_logs(folder, metrics):
    """The frames of log.csv of a model, one a fold; none where there is none."""
    logs, columns = [], ["epoch", "train_loss", "log_loss", "accuracy", "f1", "auc"]
    for path in [folder / name / "log.csv" for name in metrics.get("settings", {}).get("folders", ["."])]:
        try:
            logs.append(pd.read_csv(path)[columns].astype(float).dropna(subset="epoch"))
        except FileNotFoundError:
            continue
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
    text = "Where the held-out loss rises again, training has gone on too long."
    return Section("Learning curves", text, pictures=pictures)


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
    stages = {name: m for name, m in found.metrics.items() if m}  # a user's own model may have no metrics.json
    if found.keywords:
        stages["keywords"] = found.keywords
    strongest = found.metrics.get("baseline", {}).get("strongest", {})
    sections = [score_section(title, rows) for title, rows in found.tables]
    sections += [seed_section(found.metrics), cost_section(stages)]
    if found.keywords:
        sections.append(keyword_section(found.keywords))
    sections += [curve_section(folder, found.metrics), *probability_sections(found)]
    sections.append(strongest_section("What words tell the baseline", strongest.get("words", {}),
                                      "a punctuation mark is a word"))
    sections.append(strongest_section("What the way authors are written tells the baseline",
                                      strongest.get("author", {}), "␣ is a blank", "␣"))
    sections.append(hardest_section(found.papers, found.probs, list(found.metrics)))
    return [section for section in sections if section.rows or section.pictures]


# ---- the two files ---------------------------------------------------------------------------------------------------


def to_html(found, sections):
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    template = environment.get_template("report.html")
    tiles, trust = make_tiles(found), describe_trust(found)
    return template.render(title=TITLE, submitted=found.submitted, tiles=tiles, trust=trust, sections=sections)


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

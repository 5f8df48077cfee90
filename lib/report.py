"""The report that blend.py writes: outputs/report.html, one page that needs no other file and no network. The same
inputs give the same bytes. lib/report.html is its template.
"""

from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from scipy.stats import binomtest

from lib import files, plots, results
from lib.cli import few, log


@dataclass
class Found:
    """What blend.py found."""

    submitted: str  # what goes into the submission and why, in a sentence
    chosen: str  # the name under which it is in probs and test_probs
    auc: float | None  # of a classifier that tells train from test
    one_class: str  # a warning if nearly all test papers get one class, else ""
    tables: list  # of scores: (title, rows of results.score_table)
    metrics: dict  # {model: its metrics.json, {} if it has none}
    keywords: dict  # metrics.json of extract_keywords.py, {} if it has not run on these test papers
    keyword_recall: float | None  # case-sensitive, of the keywords to submit; None if not known
    papers: pd.DataFrame  # those that the models are compared on
    probs: dict  # {compared model, and "blend" if one was tried: P(label = 1) of these papers}
    test_probs: dict  # the same of the test papers
    test_labels: np.ndarray | None  # labels of the test papers, where known


def number(value, digits=4):
    """1234.5 -> '1,234.5000'; None or NaN -> '–'."""
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
        yield f"{len(labels):,} {side} papers", results.scores(labels, probs)["f1"], f1_interval(labels, probs)


def board_estimates(found):
    """What the board may show, with F1 of held-out papers and of test papers, where known: (estimate, its two parts).
    Empty if the recall of the keywords is not known.
    """
    recall = found.keyword_recall
    for papers, f1, _ in submitted_scores(found) if recall is not None else ():
        parts = f"0.4 × F1 {f1:.4f} on {papers} + 0.6 × case-sensitive keyword recall {recall:.4f}"
        yield results.board_estimate(f1, recall), parts


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
    sentences.append(f"{count:,} papers were held out by all models that are compared: one more or less right is "
                     f"{1 / count:.4f} of accuracy.")
    left_out = [name for name in found.metrics if name not in found.probs]
    if left_out:
        sentences.append(f"Not compared, since they share too few held-out papers with the others: {few(left_out)}.")
    if len(found.probs) > 1:
        sentences.append("What is submitted was chosen on these very papers: its scores there are a little too good.")
    table = found.metrics.get("baseline", {}).get("table", [])
    accuracy = {name: values["accuracy"] for name, values, _ in table}
    if accuracy.get("author rule", 0) >= 0.9:
        free = [accuracy[name] for name in accuracy if name.endswith("no author")]
        sentences.append(f"The way authors are written, and nothing else, tells the label of "
                         f"{accuracy['author rule']:.2%} of the training papers: a model that reads authors need not "
                         f"understand a paper. Without authors the baseline is right on {max(free, default=0):.2%}.")
    return sentences


# ---- tables: rows of {column: text} ----------------------------------------------------------------------------------


def score_rows(scored):
    """`scored`: (model, scores, note), as in results.score_table."""
    rows = []
    for name, values, note in scored:
        cells = {metric: number(values.get(metric)) for metric in results.METRICS}
        rows.append({"model": name, **cells, "papers, fields": note})
    return rows


def format_time(seconds):
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def cost_rows(stages):
    """`stages`: {model or "keywords": its metrics.json}."""
    rows = []
    for name, m in stages.items():
        epochs = np.atleast_1d(m.get("epochs_run", "–"))  # of each fold
        memory = max(m.get("peak_memory_mb") or 0, m.get("train_peak_memory_mb") or 0) or None
        rows.append({
            "stage": name,
            "device": m.get("trained_on") or m.get("device", "–"),
            "epochs": " + ".join(map(str, epochs)),
            "time": format_time(m.get("seconds")),
            "training, papers/s": number(m.get("train_papers_per_second"), 1),
            "predicting, papers/s": number(m.get("predict_papers_per_second"), 1),
            "memory, MiB": number(memory, 0),
        })
    return rows


def keyword_rows(scores):
    return [{"score": name.replace("_", " "), "value": number(value)} for name, value in scores.items()]


def hardest(labels, probs, most=20):
    """The papers that the models get most wrong (mean distance from the label) or disagree on most (from the lowest to
    the highest probability), worst first. `probs`: float array [models, papers]. Returns int array of places.
    """
    trouble = np.maximum(np.abs(probs - labels).mean(axis=0), np.ptp(probs, axis=0))
    return np.argsort(-trouble, kind="stable")[:most]


def hardest_rows(papers, probs):
    """Returns the table's rows, and the author and abstract of each row's paper."""
    models = [values for name, values in probs.items() if name != "blend"]
    rows, details = [], []
    for place in hardest(papers["label"].to_numpy(), np.array(models)):
        paper, cells = papers.iloc[place], {}
        for name, values in probs.items():
            right = (values[place] >= 0.5) == paper["label"]
            cells[f"P by {name}"] = f"{values[place]:.3f}" + ("" if right else " ✗")
        title = paper["title"] or "(no title)"
        rows.append({"title": title, "uuid": paper["uuid"], "label": str(paper["label"]), **cells})
        details.append([paper.get("author") or "(no author)", paper["abstract"]])
    return rows, details


# ---- learning curves -------------------------------------------------------------------------------------------------


def read_logs(folder, metrics):
    """The frames of log.csv of a model, one a fold; none where there is none."""
    logs, columns = [], ["epoch", "train_loss", "log_loss", "accuracy", "f1", "auc"]
    for path in [folder / name / "log.csv" for name in metrics.get("settings", {}).get("folders", ["."])]:
        try:
            logs.append(pd.read_csv(path)[columns].astype(float).dropna(subset="epoch"))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError):  # an own model's log has the columns it likes
            log(f"warning: {path} has other columns than the kit's, left out of the report")
    return [frame for frame in logs if len(frame)]


def draw_all_curves(folder, metrics):
    """{caption: SVG} of the models that have a log.csv."""
    losses = {"train_loss": "training", "log_loss": "held out"}
    valued = {"accuracy": "accuracy", "f1": "F1", "auc": "AUC"}
    pictures = {}
    for name, m in metrics.items():
        logs = read_logs(folder / name, m)
        if logs:
            pictures[f"{name}: loss by epoch"] = plots.draw_curves(logs, losses, "loss")
            pictures[f"{name}: held-out score by epoch"] = plots.draw_curves(logs, valued, "held-out score")
    return pictures


# ---- the page --------------------------------------------------------------------------------------------------------


def write(folder, found):
    """Write report.html into a folder, which holds the models' folders."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    stages = {name: m for name, m in {**found.metrics, "keywords": found.keywords}.items() if m}
    rows, details = hardest_rows(found.papers, found.probs)
    page = environment.get_template("report.html").render(
        submitted=found.submitted,
        tiles=make_tiles(found),
        trust=describe_trust(found),
        tables={title: score_rows(scored) for title, scored in found.tables},
        costs=cost_rows(stages),
        keywords=found.keywords,
        keyword_rows=keyword_rows(found.keywords.get("scores", {})),
        curves=draw_all_curves(folder, found.metrics),
        reliability=plots.draw_reliability(found.papers["label"].to_numpy(), found.probs),
        strongest=found.metrics.get("baseline", {}).get("strongest", {}),
        hardest=rows,
        details=details,
    )
    path = folder / "report.html"
    with files.atomic_write(path) as part:
        part.write_text(page + "\n", encoding="utf-8", newline="\n")
    log(f"wrote {path}")

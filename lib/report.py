"""The report that blend.py writes: outputs/report.html, one page that needs no other file and no network. The same
inputs give the same bytes. lib/report.html is its template.
"""

from pathlib import Path

from lib import files, plots, pu, results
from lib.cli import few, log

import jinja2
import numpy as np
import pandas as pd
from scipy.stats import binomtest


def number(value, digits=4):
    """1234.5 -> '1,234.5000'; None or NaN -> '–'."""
    return "–" if pd.isna(value) else f"{value:,.{digits}f}"


def f1_interval(labels, guess):
    """95 % interval of F1 as (low, high): Wilson's interval of the share of hits among the papers that have label 1 or
    are given it, carried over by F1 = 2 share / (1 + share).
    """
    hits, either = int(np.sum(guess & (labels == 1))), int(np.sum(guess | (labels == 1)))
    if not either:
        return 0.0, 1.0
    low, high = binomtest(hits, either).proportion_ci(method="wilson")
    return 2 * low / (1 + low), 2 * high / (1 + high)


def describe_scores(side, labels, probs, recalls):
    """Print the board estimate. Returns this and F1 of what is submitted as the report's figures: (value, what it is).
    `side`: "held-out" or "test"; `recalls`: of the keywords, the lowest and the highest that the board may count, [] if
    not known.
    """
    papers, f1 = f"{len(labels):,} {side} papers", results.scores(labels, probs)["f1"]
    low, high = f1_interval(labels, probs >= 0.5)
    figures = [(f"{f1:.3f}", f"F1 on {papers}, 95 % interval {low:.3f} to {high:.3f}")]
    if recalls:
        name = "board estimate (inferred, not official)"
        estimate = " to ".join(f"{results.board_estimate(f1, recall):.3f}" for recall in recalls)
        recall = " to ".join(f"{recall:.3f}" for recall in recalls)
        parts = (f"0.4 × F1 {f1:.3f} on {papers} + 0.6 × case-sensitive keyword recall {recall}, with and without the "
                 "period that ends a list: docs/keywords.md")
        print(f"{name}: {estimate} = {parts}")
        figures.append((estimate, f"{name}: {parts}"))
    return figures


def describe_trust(findings, metrics, papers, probs):
    """How far to trust the scores, in sentences. If one begins with "warning", the page highlights them."""
    sentences = [finding for finding in findings if finding]
    sentences.append(f"{len(papers):,} papers were held out by all models that are compared: one more or less right is "
                     f"{1 / len(papers):.4f} of accuracy.")
    left_out = [name for name, m in metrics.items() if name not in probs and "learned_from_test" not in m]
    if left_out:
        sentences.append(f"Not compared, since they share too few held-out papers with the others: {few(left_out)}.")
    if len(probs) > 1:
        sentences.append("The best model was chosen on these very papers: its scores there are a little too good.")
    table = metrics.get("baseline", {}).get("table", [])
    accuracy = {name: values["accuracy"] for name, values, _ in table}
    if accuracy.get("author rule", 0) >= 0.9:
        free = [accuracy[name] for name in accuracy if name.endswith("no author")]
        sentences.append(f"The way authors are written, and nothing else, tells the label of "
                         f"{accuracy['author rule']:.2%} of the training papers: a model that reads authors need not "
                         f"understand a paper. Without authors the baseline is right on {max(free, default=0):.2%}.")
    return sentences


# ---- tables ----------------------------------------------------------------------------------------------------------


def score_models(labels, probs, papers, fields):
    """Rows of results.score_table. `papers`: which they are; `fields`: {model: what it reads}."""
    rows = []
    for name, values in probs.items():
        rows.append((name, results.scores(labels, values), f"{len(labels)} {papers}, {fields[name]}"))
    return rows


def make_tables(models, labels, probs, test_labels, test_probs, mixture):
    """The tables of scores, {title: rows}. `models`: all of them; `labels`: of the papers that the comparable ones held
    out; `probs`: {comparable model or "blend": P(label = 1)} of these; the same of the test papers, whose labels may be
    None; `mixture`: what the blend consists of.
    """
    fields = {model.name: " ".join(model.metrics.get("fields", ["own model"])) for model in models}
    notes = {model.name: f"{fields[model.name]}, {pu.NOT_COMPARABLE}" for model in models if model.learned_from_test}
    notes = {**fields, "blend": "weights chosen on the other half", **notes}
    tables = {"Held-out papers": score_models(labels, probs, "held out", notes)}
    if test_labels is not None:
        tables["Test papers"] = score_models(test_labels, test_probs, "test papers", {**fields, "blend": mixture})
    more = []
    for model in models:
        valid = model.valid
        if model.name not in probs or len(valid) > len(labels):
            more += score_models(valid["label"], {model.name: valid["prob"]}, "held out", notes)
        more += model.metrics.get("table", [])  # what the baseline compares itself with
    if more:
        tables["For comparison, each model on all papers it held out"] = more
    return tables


def score_cells(scored):
    """`scored`: (model, scores, note), as in results.score_table."""
    rows = []
    for name, values, note in scored:
        cells = {metric: number(values.get(metric)) for metric in results.METRICS}
        rows.append({"model": name, **cells, "papers, fields": note})
    return rows


def cost_rows(stages):
    """`stages`: {model or "keywords": its metrics.json}."""
    rows = []
    for name, m in stages.items():
        memory = max(m.get("peak_memory_mb") or 0, m.get("train_peak_memory_mb") or 0) or None
        rows.append({
            "stage": name,
            "device": m.get("trained_on") or m.get("device", "–"),
            "epochs": " + ".join(map(str, m.get("epochs_run", "–"))),  # of each fold
            "seconds": number(m.get("seconds"), 0),
            "training, papers/s": number(m.get("train_papers_per_second"), 1),
            "predicting, papers/s": number(m.get("predict_papers_per_second"), 1),
            "memory, MiB": number(memory, 0),
        })
    return rows


def hardest_papers(papers, probs):
    """The papers that the models get most wrong (mean distance from the label) or disagree on most (from the lowest to
    the highest probability), the worst first, at most 20. Returns the table's rows, and author and abstract of each.
    """
    labels = papers["label"].to_numpy()
    models = np.array([values for name, values in probs.items() if name != "blend"])
    trouble = np.maximum(np.abs(models - labels).mean(axis=0), np.ptp(models, axis=0))
    rows, details = [], []
    for place in np.argsort(-trouble, kind="stable")[:20]:
        paper, cells = papers.iloc[place], {}
        for name, values in probs.items():
            right = (values[place] >= 0.5) == paper["label"]
            cells[f"P by {name}"] = f"{values[place]:.3f}" + ("" if right else " ✗")
        title = paper["title"] or "(no title)"
        rows.append({"title": title, "uuid": paper["uuid"], "label": str(paper["label"]), **cells})
        details.append([paper.get("author") or "(no author)", paper["abstract"]])
    return rows, details


# ---- the page --------------------------------------------------------------------------------------------------------


def write(folder, submitted, figures, findings, tables, metrics, keywords, papers, probs):
    """Write report.html into a folder.

    submitted: what goes into the submission and why, in a sentence. figures: (value, what it is), for the top.
    findings: sentences on how far to trust the scores. tables: {title: rows of results.score_table}. metrics: {model:
    its metrics.json, {} if it has none}. keywords: metrics.json of extract_keywords.py, {} if there is none. papers:
    frame of those that the models are compared on. probs: {model or "blend": P(label = 1) of these papers}.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    stages = {name: m for name, m in {**metrics, "keywords": keywords}.items() if m}
    rows, details = hardest_papers(papers, probs)
    found = keywords.get("scores", {})
    page = environment.get_template("report.html").render(
        submitted=submitted,
        figures=figures,
        trust=describe_trust(findings, metrics, papers, probs),
        tables={title: score_cells(scored) for title, scored in tables.items()},
        costs=cost_rows(stages),
        keywords=keywords,
        keyword_rows=[{"score": name.replace("_", " "), "value": number(value)} for name, value in found.items()],
        reliability=plots.draw_reliability(papers["label"].to_numpy(), probs),
        strongest=metrics.get("baseline", {}).get("strongest", {}),
        hardest=rows,
        details=details,
    )
    path = folder / "report.html"
    with files.atomic_write(path) as part:
        part.write_text(page + "\n", encoding="utf-8", newline="\n")
    log(f"wrote {path}")

"""The report that blend.py writes: outputs/report.html, one page that needs no other file and no network, and
report.md with the same tables. The same inputs give the same bytes.
"""

import html
import re
from collections import namedtuple
from itertools import zip_longest

import numpy as np
import pandas as pd
import plots
from plots import LABELS

import common

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #d9dee3; --page: #f5f6f8; --card: #fff;
  --accent: #2f6fb5; --wrong: #b3261e; --warn: #fff3dc; --warn-line: #d9932a }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb7; --line: #363d45; --page: #14171a;
  --card: #1d2125; --accent: #7fb2ea; --wrong: #ff8f85; --warn: #33291a; --warn-line: #b07a24 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 75rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 0 0 .3rem; font-size: 1.15rem } h3 { margin: 0; font-size: .95rem }
p { margin: .3rem 0 } section > p { max-width: 48rem; color: var(--soft) }
section { margin-top: 1rem; padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem }
.warn { background: var(--warn); border-color: var(--warn-line) } .trust p { color: inherit }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0 0; padding: 0; list-style: none }
.tiles li { flex: 1 1 8.5rem; padding: .6rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; color: var(--soft); font-size: .85rem; line-height: 1.3 }
.tiles b { display: block; color: var(--ink); font-size: 1.5rem; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto; margin-top: .5rem } .scroll:focus-visible { outline: 2px solid var(--accent) }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--soft); font-weight: 600; white-space: nowrap } tbody tr:last-child > * { border-bottom: 0 }
td:first-child { min-width: 9rem } td { overflow-wrap: anywhere; min-width: 4.5rem } td.wide { min-width: 16rem }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.wrong { color: var(--wrong); font-weight: 600 } summary { cursor: pointer; color: var(--accent) }
details p { margin: .4rem 0; max-width: 46rem }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin-top: .6rem } figure { margin: 0; max-width: 100% }
figure svg { display: block; max-width: 100%; height: auto }
figcaption { margin-bottom: .3rem; font-size: .9rem; font-weight: 600 }
.bars { flex: 1 1 16rem; min-width: 0 } .bars ol { margin: .3rem 0 0; padding: 0; list-style: none; font-size: .9rem }
.bars li { display: grid; grid-template-columns: 7.5rem 1fr 3.2rem; gap: .6rem; align-items: center }
.bars span { overflow-wrap: anywhere } .bars i { height: .65rem; border-radius: .2rem; background: var(--accent) }
"""

# A part of the report. `html` is what the page shows in place of the table, if anything.
Section = namedtuple("Section", "title text header rows html", defaults=("", [], [], ""))


def number(value, digits=4):
    return "–" if value is None else f"{value:,.{digits}f}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def html_table(title, header, rows, cell=None):
    """A table in a box that scrolls by itself. `cell(row, column)` gives the HTML of a cell, or None: escaped text."""
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(title)}"><table><thead><tr>']
    kinds = []
    for place, name in enumerate(header):
        texts = [row[place] for row in rows]
        numeric = all(re.fullmatch(r"[\d.,]+( ✗)?|–", text) for text in texts)
        kinds.append("number" if numeric else "wide" if max(map(len, texts), default=0) > 30 else "text")
        lines.append(f'<th scope="col" class="{kinds[-1]}">{html.escape(name)}</th>')
    lines.append("</tr></thead><tbody>")
    for i, row in enumerate(rows):
        lines.append("<tr>")
        for j, text in enumerate(row):
            kind = kinds[j] + (" wrong" if text.endswith("✗") else "")
            lines.append(f'<td class="{kind}">{(cell and cell(i, j)) or html.escape(text)}</td>')
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def md_text(text):
    """Text in which Markdown finds no markup."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", text)


def md_table(header, rows):
    header, *rows = ([md_text(text) for text in row] for row in (header, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def score_section(title, rows):
    """`rows`: (name, scores, note), as in common.score_table."""
    names = ("accuracy", "precision", "recall", "f1", "auc", "log_loss")
    header = ["model", "accuracy", "precision", "recall", "F1", "AUC", "log-loss", "papers, fields"]
    return Section(title, "", header, [[name, *(number(v.get(n)) for n in names), note] for name, v, note in rows])


def cost_section(metrics):
    header = ["model", "device", "epochs", "training, s", "training, papers/s", "predicting, papers/s", "memory, MiB"]
    keys = {"train_seconds": 1, "train_papers_per_second": 1, "predict_papers_per_second": 1, "peak_memory_mb": 0}
    rows = []
    for name, m in metrics.items():
        m = m | {"peak_memory_mb": max(m.get(key) or 0 for key in ("peak_memory_mb", "train_peak_memory_mb")) or None}
        epochs = " + ".join(map(str, np.atleast_1d(m.get("epochs_run", "–"))))
        device = m.get("trained_on") or m.get("device", "–")
        rows.append([name, device, epochs, *(number(m.get(key), digits) for key, digits in keys.items())])
    text = "Seconds of the training steps alone, of all folds together; of the baseline, of the whole script."
    return Section("Time and memory", text, header, rows)


def settings_section(metrics):
    hidden = ("train", "held_out", "fields", "folders")  # fingerprints, and what is said elsewhere

    def told(values):
        return ", ".join(f"{name} {v}" for name, v in values.items() if name not in hidden and v is not None)

    rows = [
        [name, " ".join(m.get("fields", [])), told(m.get("settings", {})), told(m.get("versions", {}))]
        for name, m in metrics.items()
    ]
    return Section("Settings", "", ["model", "fields", "settings", "versions"], rows)


def keyword_sections(folder, metrics):
    """Scores of extract_keywords.py, if it has run on these test papers."""
    types = {"scores": dict, "papers_per_second": (int, float), "fields": list}
    found, first = common.read_metrics(folder / "keywords", **types), next(iter(metrics.values()))
    papers = found.get("papers", {})
    if found and papers.get("test_fingerprint") == first["papers"]["test_fingerprint"]:
        header = [*(name.replace("_", " ") for name in found["scores"]), "papers/s"]
        cells = [*map(number, found["scores"].values()), number(found["papers_per_second"], 1)]
        text = f"Of extract_keywords.py, out of fold on {papers.get('held_out')} papers, {' '.join(found['fields'])}."
        yield Section("Keywords", text, header, [cells])


def hardest(labels, probs, most=20):
    """The papers that the models get most wrong (mean distance from the label) or disagree on most (from the lowest to
    the highest probability), worst first. `probs`: float array [models, papers]. Returns int array of places.
    """
    trouble = np.maximum(np.abs(probs - labels).mean(axis=0), np.ptp(probs, axis=0))
    return np.argsort(-trouble, kind="stable")[:most]


def hardest_section(papers, probs, models):
    labels = papers["label"].to_numpy()
    chosen = papers.iloc[hardest(labels, np.array([probs[name] for name in models]))]
    places = papers.index.get_indexer(chosen.index)

    def told(prob, label):
        return f"{prob:.3f}" + (" ✗" if (prob >= 0.5) != label else "")

    rows = []
    for place, paper in zip(places, chosen.to_dict("records")):
        values = [told(each[place], paper["label"]) for each in probs.values()]
        rows.append([paper["title"] or "(no title)", paper["uuid"], str(paper["label"]), *values])

    def cell(i, j):
        if j:
            return None
        paper = {name: html.escape(str(value)) for name, value in chosen.iloc[i].items()}
        more = "".join(f"<p>{paper[name]}</p>" for name in ("author", "abstract") if paper.get(name))
        return f"<details><summary>{html.escape(rows[i][0])}</summary>{more or 'no more is known'}</details>"

    header, title = ["title", "uuid", "label", *probs], f"The {len(rows)} hardest of the held-out papers"
    text = (
        "Papers that the models get most wrong or disagree on most, with P(label = 1) of each model; ✗ marks the wrong "
        "side of 0.5. On the page, a title opens authors and abstract."
    )
    return Section(title, text, header, rows, html_table(title, header, rows, cell))


def strongest_sections(metrics):
    """What the baseline's words, and characters of authors, weigh: bars on the page, a table in Markdown."""
    told = {
        "words": ("What words tell the baseline", "a punctuation mark is a word"),
        "author": ("What the way authors are written tells the baseline", "␣ is a blank"),
    }
    for block, found in metrics.get("baseline", {}).get("strongest", {}).items():
        header, columns, bars = [], [], ""
        for label in ("1", "0"):
            names = [name.replace(" ", "␣") if block == "author" else name for name, _ in found[label]]
            weights = [weight for _, weight in found[label]]
            header += [LABELS[int(label)], "weight"]
            columns += [names, [f"{weight:.2f}" for weight in weights]]
            items = "".join(
                f'<li><span>{html.escape(name)}</span><i style="width:{weight / max(weights):.0%}"></i>'
                f'<span class="number">{weight:.2f}</span></li>'
                for name, weight in zip(names, weights)
            )
            bars += f'<div class="bars"><h3>{LABELS[int(label)]}</h3><ol>{items}</ol></div>'
        if rows := [list(row) for row in zip_longest(*columns, fillvalue="")]:
            title, hint = told[block]
            text = f"The n-grams with the highest weight for each label; {hint}."
            yield Section(title, text, header, rows, f'<div class="row">{bars}</div>')


def read_logs(folder, metrics):
    """The frames of log.csv of a model, one a fold; none where there is none."""
    logs, columns = [], ["epoch", "train_loss", "log_loss", "accuracy", "f1", "auc"]
    for part in metrics.get("settings", {}).get("folders", ["."]):
        if (path := folder / part / "log.csv").is_file():
            try:
                logs.append(pd.read_csv(path)[columns].astype(float).dropna(subset="epoch"))
            except (ValueError, KeyError):
                common.log(f"warning: {path} is damaged, left out of the report")
    return [log for log in logs if len(log)]


# ---- the page --------------------------------------------------------------------------------------------------------


def make_sections(folder, tables, metrics, papers, probs, tested):
    """All parts of the report in their order; see write."""
    labels, models = papers["label"].to_numpy(), list(metrics)
    held = f"the {len(papers):,} papers that every model held out"

    def pictures(title, text, figures):
        return Section(title, text, html=f'<div class="row">{"".join(figures)}</div>')

    yield from (score_section(title, rows) for title, rows in tables)
    yield cost_section(metrics)
    yield from keyword_sections(folder, metrics)
    logs = {name: read_logs(folder / name, m) for name, m in metrics.items()}
    if curves := [figure for name, found in logs.items() if found for figure in plots.draw_curves(name, found)]:
        yield pictures("Learning curves", "Where the held-out loss rises again, training has gone on too long.", curves)
    figures = [plots.draw_confusion(name, labels, values) for name, values in probs.items()]
    yield pictures("Confusion matrices", f"On {held}; shares are of the true class.", figures)
    text = f"On {held}: of the papers given a probability of 0.8, are 8 in 10 medical? Then its point lies on "
    text += "the dashed line; below it a model is too sure of label 1. The larger a point, the more papers."
    yield pictures("Reliability", text, [plots.draw_reliability(labels, probs)])
    if len(models) > 1:
        sides = {"held-out": probs, "test": tested}
        figures = [plots.draw_agreement(f"{side} papers", {m: p[m] for m in models}) for side, p in sides.items()]
        text = "Share of papers on which two models give the same label. A model that always agrees adds nothing."
        yield pictures("Agreement between models", text, figures)
    yield from strongest_sections(metrics)
    yield hardest_section(papers, probs, models)
    yield settings_section(metrics)


def write(folder, submitted, trust, tiles, tables, **found):
    """Write folder/report.html and report.md. `submitted`: a sentence; `trust`: sentences, a first one that begins with
    "warning" is shown as such; `tiles`: (value, what it is), the figures at the top; `tables`: (title, rows of
    common.score_table). `found`: metrics, {model: its metrics.json}; papers, frame of the papers that all models held
    out; probs, {model, and "blend" where it mixes: P(label = 1) of these}; tested, the same of the test papers.
    """
    escape, title = html.escape, "Medical or not: the report"
    page = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<style>{STYLE}</style></head><body><header><h1>{title}</h1>",
        f'<p><b>Submitted:</b> {escape(submitted)}</p><ul class="tiles">',
        *(f"<li><b>{escape(value)}</b> {escape(what)}</li>" for value, what in tiles),
        f'</ul></header><main><section class="trust{" warn" if trust[0].startswith("warning") else ""}">',
        "<h2>How far to trust the scores</h2>",
        *(f"<p>{escape(said[:1].upper() + said[1:])}</p>" for said in trust),
        "</section>",
    ]
    text = [f"# {title}", f"**Submitted:** {md_text(submitted)}"]
    text += ["\n".join(f"- {md_text(what)}: {md_text(value)}" for value, what in tiles)]
    text += ["## How far to trust the scores", *map(md_text, trust)]
    for section in make_sections(folder, tables, **found):
        shown = section.html or html_table(section.title, section.header, section.rows)
        said = section.text and f"<p>{escape(section.text)}</p>"
        page.append(f"<section><h2>{escape(section.title)}</h2>{said}{shown}</section>")
        if section.rows:
            text += [f"## {section.title}", *filter(None, [md_text(section.text)])]
            text.append(md_table(section.header, section.rows))
    contents = {"report.md": "\n\n".join(text), "report.html": "\n".join([*page, "</main></body></html>"])}
    for name, content in contents.items():
        with common.replacing(folder / name) as part:
            part.write_text(content + "\n", encoding="utf-8", newline="\n")
    common.log(f"wrote {folder / 'report.html'} and report.md")

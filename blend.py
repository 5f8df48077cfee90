"""Every model's predictions -> one submission, and a report of what each is worth.

    python blend.py                            writes submit_task1.csv here, outputs/report.html and report.md
    python blend.py --submit my.csv
    python blend.py --report-only              the report alone

In: outputs/*/valid.csv, test.csv and metrics.json of every model that has run, train.csv, test.csv and, if it is there,
test_labels.csv. Out: the submission and the report, from these files alone: nothing is trained.

The weights are chosen on the papers that all models held out. A blend is taken only if its F1 is above that of the best
single model; of models with the same F1 the plainest wins.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from common import InputError, arg_parser, build_text, load_papers, run_script
from lib import report
from lib.results import paper_record, read_json, read_labels, read_predictions, score_table, scores, write_submission

PLAINEST = ("baseline", "bert", "lora")  # models of other names come after these


@dataclass
class Model:
    name: str  # of its folder under outputs/
    valid: pd.Series  # P(label = 1) of the papers it held out, by uuid
    test_probs: np.ndarray  # P(label = 1) of the test papers, in the order of the test file
    metrics: dict  # its metrics.json


def read_model(folder, train, test):
    """The model whose predictions lie in a folder. Raises InputError unless they are about these papers."""
    metrics = read_json(folder / "metrics.json", papers=dict)
    for side in ("train", "test"):
        fingerprint = f"{side}_fingerprint"
        if metrics.get("papers", {}).get(fingerprint) != paper_record(train, test, 0)[fingerprint]:
            raise InputError(
                f"{folder} holds predictions made with another {side} file (or another --limit): run its script "
                f"again, or move {folder} away"
            )
    valid = read_predictions(folder / "valid.csv").set_index("uuid")["prob"]
    probs = read_predictions(folder / "test.csv").set_index("uuid")["prob"]
    if not (probs.index.is_unique and valid.index.is_unique and set(probs.index) == set(test["uuid"])):
        raise InputError(f"{folder}: valid.csv or test.csv is damaged: run its script again")
    return Model(folder.name, valid, probs.loc[test["uuid"]].to_numpy(), metrics)


def read_models(out_dir, train, test):
    """All finished models under out_dir, the plainest first."""
    folders = [path.parent for path in out_dir.glob("*/valid.csv") if (path.parent / "test.csv").is_file()]
    if out_dir / "blend" in folders:
        raise InputError(f"{out_dir / 'blend'}: a model can't be called blend: give its folder another name")
    if not folders:
        raise InputError(f"no model's valid.csv and test.csv under {out_dir}: run baseline.py first, or set --out-dir")
    rank = {name: place for place, name in enumerate(PLAINEST)}
    folders.sort(key=lambda folder: (rank.get(folder.name, len(rank)), folder.name))
    return [read_model(folder, train, test) for folder in folders]


def find_weights(probs, labels):
    """Weights of the models, by greedy selection (Caruana et al. 2004, "Ensemble selection from libraries of models").
    `probs`: float array [models, papers], the plainest model first. Returns float array [models] that sums to 1; the F1
    of the blend is never below that of the best single model, and where it is not above it, that model is taken alone.
    """

    def value(taken):
        result = scores(labels, np.mean(probs[taken], axis=0))
        return result["f1"], -result["log_loss"]

    singles = [value([i])[0] for i in range(len(probs))]
    best = int(np.argmax(singles))  # the first, so the plainest, of equals
    taken = [best]
    for _ in range(20):
        candidate = max(([*taken, i] for i in range(len(probs))), key=value)
        if value(candidate) <= value(taken):
            break
        taken = candidate
    if value(taken)[0] <= singles[best]:
        taken = [best]
    return np.bincount(taken, minlength=len(probs)) / len(taken)


def train_test_auc(train, test, fields, seed, most=5000):
    """AUC, out of fold, of a classifier that tells training papers (0) from test papers (1) by their text: 0.5 if the
    two are alike, 1.0 if nothing is. At most `most` papers of each side are looked at. None where there are too few.
    """
    sides = [papers.sample(min(most, len(papers)), random_state=seed) for papers in (train, test)]
    texts = [build_text(side, fields) for side in sides]
    if min(map(len, texts)) < 5 or not any(map(any, texts)):
        return None
    labels = np.repeat([0, 1], [len(side) for side in sides])
    counts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit_transform(texts[0] + texts[1])
    model = LogisticRegression(C=10, solver="liblinear", class_weight="balanced", random_state=seed)
    return roc_auc_score(labels, cross_val_predict(model, counts, labels, cv=5, method="predict_proba")[:, 1])


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


def describe_submission(names, weights, count):
    """What goes into the submission, in a sentence."""
    parts = " + ".join(f"{weight:.0%} {name}" for weight, name in zip(weights, names) if weight)
    if len(names) == 1:
        return f"{parts}, the only model that has run"
    if weights.max() == 1:
        return f"{parts}: one model is all it takes, no mixture has a higher F1 on these {count} papers"
    return parts


def describe_trust(auc, count, metrics):
    """How far the scores on `count` papers can be trusted, in sentences. `metrics`: {model: its metrics.json}."""
    held_out = f"{count:,} papers were held out by every model: one more or less right is {1 / count:.4f} of accuracy."
    if len(metrics) > 1:
        held_out += " The blend was chosen on these very papers, so its scores there are a little too good."
    sentences = [describe_auc(auc), held_out]
    references = {name: values["accuracy"] for name, values, _ in metrics.get("baseline", {}).get("table", [])}
    rule = references.get("author rule", 0)
    if rule >= 0.9:
        authors = f"The way authors are written, and nothing else, tells the label of {rule:.2%} of the training "
        authors += "papers: a model that reads authors need not understand a paper."
        if free := [accuracy for name, accuracy in references.items() if name.endswith("no author")]:
            authors += f" Without authors the baseline is right on {max(free):.2%}."
        sentences.append(authors)
    return sentences


def make_tables(metrics, labels, probs, test_labels, test_probs):
    """The report's tables of scores, each a title and rows of score_table. `metrics`: {model: metrics.json}, `labels`:
    of the papers that all models held out, `probs`: {model or "blend": P(label = 1)} of these; the same of the test
    papers, whose labels may be None.
    """

    def rows(labels, probs, which):
        notes = {name: f"{len(labels)} {which}, {' '.join(m.get('fields', []))}" for name, m in metrics.items()}
        return [(name, scores(labels, p), notes.get(name, f"{len(labels)} {which}")) for name, p in probs.items()]

    tables = [("Held-out papers", rows(labels, probs, "held out"))]
    if test_labels is not None:
        tables.append(("Test papers", rows(test_labels, test_probs, "test papers")))
    more = []  # what the models say of further papers, and what the baseline compares itself with
    for name, m in metrics.items():
        if m.get("scores") and m["papers"]["held_out"] > len(labels):
            more.append((name, m["scores"], f"{m['papers']['held_out']} held out, {' '.join(m['fields'])}"))
        more += m.get("table", [])
    return [*tables, ("For comparison, each model on all papers it held out", more)] if more else tables


def read_keyword_metrics(folder, models):
    """metrics.json of extract_keywords.py; {} if it has not run on the test papers of these models."""
    keywords = read_json(folder / "metrics.json", scores=dict, papers_per_second=(int, float), fields=list, papers=dict)
    same = keywords and keywords["papers"].get("test_fingerprint") == models[0].metrics["papers"]["test_fingerprint"]
    return keywords if same else {}


def parse_args():
    parser = arg_parser(__doc__)
    parser.add_argument("--submit", default="submit_task1.csv", metavar="FILE", help="default %(default)s")
    parser.add_argument("--report-only", action="store_true", help="write no submission")
    return parser.parse_args()


def main():
    args = parse_args()
    train, test, fields = load_papers(args)
    models = read_models(args.out_dir, train, test)
    names, metrics = [model.name for model in models], {model.name: model.metrics for model in models}
    shared = set.intersection(*(set(model.valid.index) for model in models))
    papers = train[train["uuid"].isin(shared)]
    if papers["label"].nunique() < 2:
        raise InputError(f"{', '.join(names)} held out no common papers of both classes: run them with the same --seed")
    labels = papers["label"].to_numpy()
    probs = {model.name: model.valid.loc[papers["uuid"]].to_numpy() for model in models}
    test_probs = {model.name: model.test_probs for model in models}
    weights = find_weights(np.array(list(probs.values())), labels)
    for values in (probs, test_probs):
        values["blend"] = weights @ np.array(list(values.values()))

    auc = train_test_auc(train, test, fields, args.seed)
    submitted, trust = describe_submission(names, weights, len(labels)), describe_trust(auc, len(labels), metrics)
    tables = make_tables(metrics, labels, probs, read_labels(args.test, test), test_probs)
    print(trust[0])
    print(f"blend: {submitted}")
    guess = test_probs["blend"] >= 0.5
    if not args.report_only:
        write_submission(args.submit, test, guess, args.out_dir)
    for title, rows in tables:
        print(f"\n{title}\n{score_table(rows)}")

    tiles = [(f"{row[1]['f1']:.3f}", f"F1, {row[2]}") for _, rows in tables for row in rows if row[0] == "blend"]
    tiles += [(f"{guess.mean():.1%}", f"of {len(test):,} test papers are called medical")]
    tiles += [("–" if auc is None else f"{auc:.2f}", "AUC of telling train from test, 0.5 = alike")]
    if weights.max() == 1:  # the blend is one of the models
        del probs["blend"]
    keywords = read_keyword_metrics(args.out_dir / "keywords", models)
    found = report.Found(submitted, trust, tiles, tables, metrics, keywords, papers, probs, test_probs)
    report.write(args.out_dir, found)


if __name__ == "__main__":
    run_script(main)

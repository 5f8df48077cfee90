"""Every model's predictions -> one submission, and a report of what each is worth.

    python blend.py                            writes submit_task1.csv here, outputs/report.html and report.md
    python blend.py --submit my.csv
    python blend.py --report-only              the report alone

In: outputs/*/valid.csv, test.csv and metrics.json of every model that has run, train.csv, test.csv, and test_labels.csv
where it lies beside test.csv. Out: the submission and the report, from these files alone: nothing is trained.

The weights are found on the papers that all models held out. A blend is taken only where its F1 is above that of the
best single model; of models with the same F1 the plainest wins.
"""

import numpy as np
import report
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

import common
from common import InputError, run_script, scores

PLAINEST = ("baseline", "bert", "lora")  # a model of another name comes after these


def read_models(out_dir, train, test):
    """All finished models under out_dir, the plainest first: a list of (name, valid, test_probs, metrics), `valid` a
    Series of P(label = 1) by uuid, `test_probs` a float array [test papers] in the order of test. Raises InputError for
    predictions of other papers.
    """
    want = common.paper_record(train, test, 0)
    models = []
    folders = [path.parent for path in out_dir.glob("*/valid.csv") if (path.parent / "test.csv").is_file()]
    rank = {name: place for place, name in enumerate(PLAINEST)}
    for folder in sorted(folders, key=lambda f: (rank.get(f.name, len(rank)), f.name)):
        metrics = common.read_metrics(folder)
        if folder.name == "blend":
            raise InputError(f"{folder}: a model can't be called blend: give its folder another name")
        for side in ("train", "test"):
            if metrics.get("papers", {}).get(f"{side}_fingerprint") != want[f"{side}_fingerprint"]:
                raise InputError(
                    f"{folder} holds predictions made with another {side} file (or another --limit): run its script "
                    f"again, or move {folder} away"
                )
        valid = common.read_predictions(folder / "valid.csv").set_index("uuid")["prob"]
        probs = common.read_predictions(folder / "test.csv").set_index("uuid")["prob"]
        if not (probs.index.is_unique and valid.index.is_unique and set(probs.index) == set(test["uuid"])):
            raise InputError(f"{folder}: valid.csv or test.csv is damaged: run its script again")
        models.append((folder.name, valid, probs.loc[test["uuid"]].to_numpy(), metrics))
    if not models:
        raise InputError(f"no model's valid.csv and test.csv under {out_dir}: run baseline.py first, or set --out-dir")
    return models


def find_weights(probs, labels):
    """Weights of the models, by greedy selection (Caruana et al. 2004, "Ensemble selection from libraries of models").
    `probs`: float array [models, papers], the plainest model first. Returns float array [models] that sums to 1; the F1
    of the blend is never below that of the best single model, and where it is not above it, that model stands alone.
    """

    def value(taken):
        result = scores(labels, np.mean(probs[taken], axis=0))
        return result["f1"], -result["log_loss"]

    singles = [value([i])[0] for i in range(len(probs))]
    best = int(np.argmax(singles))  # the first, so the plainest, of equals
    taken, path = [best], []
    for _ in range(20):
        candidate = max(([*taken, i] for i in range(len(probs))), key=value)
        if value(candidate) <= value(taken):
            break
        taken = candidate
        path.append(taken)
    if not path or value(path[-1])[0] <= singles[best]:
        taken = [best]
    return np.bincount(taken, minlength=len(probs)) / len(taken)


def unlikeness(train, test, fields, seed, most=5000):
    """AUC, out of fold, of a classifier that tells training papers (0) from test papers (1) by their text: 0.5 when the
    two are alike, 1.0 when nothing is. At most `most` papers of each side are looked at. None where there are too few.
    """
    sides = [papers.sample(min(most, len(papers)), random_state=seed) for papers in (train, test)]
    labels = np.repeat([0, 1], [len(side) for side in sides])
    texts = [text for side in sides for text in common.build_text(side, fields)]
    if min(len(side) for side in sides) < 5 or not any(texts):
        return None
    counts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit_transform(texts)
    model = LogisticRegression(C=10, solver="liblinear", class_weight="balanced", random_state=seed)
    return roc_auc_score(labels, cross_val_predict(model, counts, labels, cv=5, method="predict_proba")[:, 1])


def advice(auc):
    """What the unlikeness of train and test means, in a sentence."""
    if auc is None:
        return "train and test were not compared: too few papers or no text"
    told = f"A classifier that sees only the text tells train from test with AUC {auc:.2f} (0.5 = alike)"
    if auc < 0.6:
        return f"{told}: held-out scores should carry over to the test papers."
    if auc < 0.7:
        return f"{told}: they differ a little; held-out scores may be somewhat too good."
    return (
        f"warning: {told}: the test papers are about other things than the training papers. Held-out scores say how "
        "well a model does on papers like those of train; expect less on test, most of all without the authors."
    )


def say_submitted(names, weights, count):
    """What goes into the submission, in a sentence."""
    parts = " + ".join(f"{weight:.0%} {name}" for weight, name in zip(weights, names) if weight)
    if len(names) == 1:
        return f"{parts}, the only model that has run"
    if weights.max() == 1:
        return f"{parts}: one model is all it takes, no mixture has a higher F1 on these {count} papers"
    return parts


def say_trust(auc, count, metrics):
    """How far the scores on `count` papers can be trusted, in sentences. `metrics`: {model: its metrics.json}."""
    held_out = f"{count:,} papers were held out by every model: one more or less right is {1 / count:.4f} of accuracy."
    if len(metrics) > 1:
        held_out += " The blend was chosen on these very papers, so its scores there are a little too good."
    said = [advice(auc), held_out]
    references = {name: values for name, values, _ in metrics.get("baseline", {}).get("table", [])}
    rule = references.get("author rule", {}).get("accuracy", 0)
    if rule >= 0.9:
        free = [values["accuracy"] for name, values in references.items() if name.endswith("no author")]
        told = f"The way authors are written, and nothing else, tells the label of {rule:.2%} of the training papers: "
        told += "a model that reads authors need not understand a paper."
        said.append(told + (f" Without authors the baseline is right on {max(free):.2%}." if free else ""))
    return said


def make_tables(metrics, labels, probs, answers, tested):
    """The report's tables of scores, each a title and rows of common.score_table. `metrics`: {model: metrics.json},
    `labels`: of the papers that all models held out, `probs`: {model or "blend": P(label = 1)} of these, `answers`: the
    test papers' labels or None, `tested`: as `probs`, of the test papers.
    """

    def rows(labels, probs, which):
        notes = {name: f"{len(labels)} {which}, {' '.join(m.get('fields', []))}" for name, m in metrics.items()}
        return [(name, scores(labels, p), notes.get(name, f"{len(labels)} {which}")) for name, p in probs.items()]

    tables = [("Held-out papers", rows(labels, probs, "held out"))]
    if answers is not None:
        tables.append(("Test papers", rows(answers, tested, "test papers")))
    more = []  # what the models say of further papers, and what the baseline compares itself with
    for name, m in metrics.items():
        if m.get("scores") and m["papers"]["held_out"] > len(labels):
            more.append((name, m["scores"], f"{m['papers']['held_out']} held out, {' '.join(m['fields'])}"))
        more += m.get("table", [])
    return [*tables, ("For comparison, each model on all papers it held out", more)] if more else tables


def parse_args():
    parser = common.arg_parser(__doc__)
    parser.add_argument("--submit", default="submit_task1.csv", metavar="FILE", help="default %(default)s")
    parser.add_argument("--report-only", action="store_true", help="write no submission")
    return parser.parse_args()


def main():
    args = parse_args()
    train, test, fields = common.load_papers(args)
    models = read_models(args.out_dir, train, test)
    names, metrics = [name for name, *_ in models], {name: m for name, _, _, m in models}
    everyone = set.intersection(*(set(valid.index) for _, valid, _, _ in models))
    papers = train[train["uuid"].isin(everyone)]
    if papers["label"].nunique() < 2:
        raise InputError(f"{', '.join(names)} held out no common papers of both classes: run them with the same --seed")
    labels = papers["label"].to_numpy()
    probs = {name: valid.loc[papers["uuid"]].to_numpy() for name, valid, _, _ in models}
    tested = {name: test_probs for name, _, test_probs, _ in models}
    weights = find_weights(np.array(list(probs.values())), labels)
    probs["blend"], tested["blend"] = (weights @ np.array(list(values.values())) for values in (probs, tested))

    auc = unlikeness(train, test, fields, args.seed)
    submitted, trust = say_submitted(names, weights, len(labels)), say_trust(auc, len(labels), metrics)
    answers = common.read_test_labels(args.test.parent / "test_labels.csv", test)
    tables = make_tables(metrics, labels, probs, answers, tested)
    print(trust[0])
    print(f"blend: {submitted}")
    if not args.report_only:
        common.write_submission(args.submit, test, tested["blend"] >= 0.5, args.out_dir)
    for title, rows in tables:
        print(f"\n{title}\n{common.score_table(rows)}")

    tiles = [(f"{row[1]['f1']:.3f}", f"F1, {row[2]}") for _, rows in tables for row in rows if row[0] == "blend"]
    tiles += [(f"{(tested['blend'] >= 0.5).mean():.1%}", f"of {len(test):,} test papers are called medical")]
    tiles += [("–" if auc is None else f"{auc:.2f}", "AUC of telling train from test, 0.5 = alike")]
    if weights.max() == 1:  # the blend is one of the models
        del probs["blend"]
    found = {"metrics": metrics, "papers": papers, "probs": probs, "tested": tested}
    report.write(args.out_dir, submitted, trust, tiles, tables, **found)


if __name__ == "__main__":
    run_script(main)

"""Every model's predictions -> one submission, with a table of what each is worth.

    python blend.py                            writes submit_task1.csv here
    python blend.py --submit my.csv

In: outputs/*/valid.csv, test.csv and metrics.json of every model that has run, train.csv, test.csv, and test_labels.csv
where it lies beside test.csv. Out: the submission.

The weights are found on the papers that all models held out. A blend is taken only where its F1 is above that of the
best single model; of models with the same F1 the plainest wins.
"""

import numpy as np
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


def parse_args():
    parser = common.arg_parser(__doc__)
    parser.add_argument("--submit", default="submit_task1.csv", metavar="FILE", help="default %(default)s")
    return parser.parse_args()


def main():
    args = parse_args()
    train, test, fields = common.load_papers(args)
    models = read_models(args.out_dir, train, test)
    names = [name for name, *_ in models]
    everyone = set.intersection(*(set(valid.index) for _, valid, _, _ in models))
    common_papers = train[train["uuid"].isin(everyone)]
    if common_papers["label"].nunique() < 2:
        raise InputError(f"{', '.join(names)} held out no common papers of both classes: run them with the same --seed")
    labels = common_papers["label"].to_numpy()
    held = np.array([valid.loc[common_papers["uuid"]] for _, valid, _, _ in models])
    tested = np.array([probs for _, _, probs, _ in models])
    weights = find_weights(held, labels)

    def note(metrics):
        return f"{len(labels)} held out, {' '.join(metrics.get('fields', []))}"

    table = [(name, scores(labels, probs), note(m)) for (name, _, _, m), probs in zip(models, held)]
    table.append(("blend", scores(labels, weights @ held), f"{len(labels)} held out"))
    answers = common.read_test_labels(args.test.parent / "test_labels.csv", test)
    if answers is not None:
        table += [(f"{n}, test", scores(answers, p), f"{len(test)} test papers") for n, p in zip(names, tested)]
        table.append(("blend, test", scores(answers, weights @ tested), f"{len(test)} test papers"))

    print(advice(unlikeness(train, test, fields, args.seed)))
    parts = " + ".join(f"{weight:.0%} {name}" for weight, name in zip(weights, names) if weight)
    if len(models) == 1:
        parts += ", the only model that has run"
    elif weights.max() == 1:
        parts += f": one model is all it takes, no mixture has a higher F1 on these {len(labels)} papers"
    print(f"blend: {parts}")
    common.write_submission(args.submit, test, weights @ tested >= 0.5, args.out_dir)
    print(common.score_table(table))


if __name__ == "__main__":
    run_script(main)

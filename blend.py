"""Every model's predictions -> one submission, and a report of what each is worth.

    python blend.py                            writes submit_task1.csv here and outputs/report.html
    python blend.py --submit my.csv
    python blend.py --report-only              the report alone

In: train.csv, test.csv, test_labels.csv if it is there, and every folder outputs/NAME/ with two files: valid.csv (uuid,
label, prob of the papers that the model held out; prob is P(label = 1)) and test.csv (uuid, prob). A model of your own
needs no more. Out: the submission and the report, from these files alone: nothing is trained.

The models are compared on the papers that all of them held out; one that shares too few of them is left out of that,
and so is that of baseline.py --pu: it is submitted where train and test differ and no authors tell the label. Else the
plainest is submitted unless another, or a blend, has an F1 that is higher by more than the standard error of the
difference. A blend is judged on papers that its weights were not chosen on: they are chosen on one half and scored on
the other, both ways.
"""

from contextlib import suppress
from dataclasses import dataclass

import common
from lib import cli, files, pu, report, results
from lib.cli import InputError, few, log
from lib.results import scores

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import cross_val_predict

PLAINEST = ("baseline", "bert", "lora")  # models of other names come after these


# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    name: str  # of its folder under outputs/
    valid: pd.DataFrame  # label, and prob = P(label = 1), of the papers it held out, by uuid
    test_probs: np.ndarray  # P(label = 1) of the test papers, in the order of the test file
    metrics: dict  # its metrics.json; {} for a model of the user's own

    @property
    def learned_from_test(self):
        """Whether it is of baseline.py --pu: made for the topics of the test papers, not to be judged on train."""
        return "learned_from_test" in self.metrics


def refuse(path, uuids, fault):
    """Raise InputError if there are any uuids that have this fault."""
    if len(uuids):
        raise InputError(f"{path}: uuid {few(uuids)} {fault}: correct the file, or move {path.parent} away")


def read_side(path, papers, side):
    """A frame of prob (and label) by uuid, from a model's file. Raises InputError unless all are of `papers`, once."""
    found = results.read_predictions(path).set_index("uuid")
    refuse(path, found.index[found.index.duplicated()], "is there more than once")
    refuse(path, found.index.difference(papers["uuid"]), f"is not in the {side} file (or is beyond --limit)")
    return found


def read_model(folder, train, test, record):
    """The Model in a folder. `record`: paper_record of train and test. Raises InputError unless the predictions are
    about these papers.
    """
    metrics = files.read_json(folder / "metrics.json")
    if not isinstance(metrics, dict) or not isinstance(metrics.get("papers"), dict):
        metrics = {}  # there is none, or it is of the user's own kind
    for side in ("train", "test"):
        if metrics and metrics["papers"].get(f"{side}_fingerprint") != record[f"{side}_fingerprint"]:
            raise InputError(f"{folder} holds predictions made with another {side} file (or another --limit): run its "
                             f"script again, or move {folder} away")
    valid_path, test_path = folder / "valid.csv", folder / "test.csv"
    valid, predicted = read_side(valid_path, train, "train"), read_side(test_path, test, "test")
    if metrics and metrics["papers"].get("held_out") != len(valid):
        raise InputError(f"{valid_path} does not hold the papers that were held out: run its script again")
    refuse(test_path, pd.Index(test["uuid"]).difference(predicted.index), "is missing")
    if "label" not in valid:
        raise InputError(f"{valid_path} has no column label: write uuid, label and prob")
    labels = train.set_index("uuid")["label"].loc[valid.index]
    refuse(valid_path, valid.index[valid["label"] != labels], "has another label in the train file (another order?)")
    return Model(folder.name, valid, predicted["prob"].loc[test["uuid"]].to_numpy(), metrics)


def read_models(out_dir, train, test, record):
    """All models under out_dir, the plainest first; of the user's own, the one that held out most papers. A folder with
    one of the two files is left out; a line says so.
    """
    models = []
    for folder in sorted({path.parent for path in out_dir.glob("*/*.csv")}):
        missing = [name for name in ("valid.csv", "test.csv") if not (folder / name).is_file()]
        if folder.name == "keywords" or len(missing) == 2:
            continue
        if folder.name == "blend":
            raise InputError(f"{folder}: a model can't be called blend: give its folder another name")
        if missing:
            log(f"{folder} has no {missing[0]} and is left out")
        else:
            models.append(read_model(folder, train, test, record))
    if not models:
        raise InputError(f"no model's valid.csv and test.csv under {out_dir}: run baseline.py first, or set --out-dir")
    rank = {name: place for place, name in enumerate(PLAINEST)}
    return sorted(models, key=lambda model: (rank.get(model.name, len(rank)), -len(model.valid), model.name))


def comparable(train, models):
    """The models that can be compared, and the papers of train that every one of them held out.

    A model that shares few held-out papers with those before it is left out: it would leave too few to compare the
    others on. Few is less than half of a common split (a tenth of train), or of what they share if that is less.
    """
    advice = "hold out those of common.split_papers, with the same seed"
    kept, shared = [], train
    for model in models:
        papers = shared[shared["uuid"].isin(model.valid.index)]
        enough = min(len(shared), len(train) / 10) / 2
        if kept and (len(papers) < enough or papers["label"].nunique() < 2):
            log(f"warning: {model.name} shares {len(papers)} held-out papers with the others, too few to be compared "
                f"or submitted: {advice}")
        else:
            kept.append(model)
            shared = papers
    if shared["label"].nunique() < 2:
        raise InputError(f"{kept[0].name} held out papers of one class alone: {advice}")
    return kept, shared


# ---- choosing --------------------------------------------------------------------------------------------------------


def find_weights(probs, labels):
    """Weights of the models, by greedy selection (Caruana et al. 2004, "Ensemble selection from libraries of models"):
    begin with the best, add whichever makes the mean better by F1, then by log-loss. `probs`: float array [models,
    papers]. Returns float array [models] that sums to 1; its blend has no lower F1 than the best single model.
    """

    def value(taken):
        result = scores(labels, np.mean(probs[taken], axis=0))
        return result["f1"], -result["log_loss"]

    taken = max(([i] for i in range(len(probs))), key=value)
    for _ in range(20):
        candidate = max(([*taken, i] for i in range(len(probs))), key=value)
        if value(candidate) <= value(taken):
            break
        taken = candidate
    return np.bincount(taken, minlength=len(probs)) / len(taken)


def nested_blend(probs, labels, half):
    """P(label = 1) of a blend whose weights are chosen on one half of the papers and used on the other, both ways.
    `probs`: float array [models, papers], `half`: bool array [papers]. Returns float array [papers].
    """
    blended = np.empty(len(labels))
    for chosen_on in (half, ~half):
        blended[~chosen_on] = find_weights(probs[:, chosen_on], labels[chosen_on]) @ probs[:, ~chosen_on]
    return blended


def add_blend(papers, probs, test_probs, seed):
    """Add "blend" to the dicts {model: P(label = 1)} of held-out and test papers, unless one model is best alone or the
    held-out papers can't be halved. Returns what it consists of: '67% baseline + 33% bert'.
    """
    matrix, labels = np.array(list(probs.values())), papers["label"].to_numpy()
    weights = find_weights(matrix, labels)
    mixture = " + ".join(f"{weight:.0%} {name}" for weight, name in zip(weights, probs) if weight)
    if weights.max() < 1:
        with suppress(InputError):  # a class has a single paper, or copies of one
            probs["blend"] = nested_blend(matrix, labels, common.fold_numbers(papers, 2, seed) == 0)
            test_probs["blend"] = weights @ np.array(list(test_probs.values()))
    return mixture


def f1_gain(labels, probs, other):
    """By how much the F1 of `probs` exceeds that of `other` on the same papers, and the standard error of this.

    The error is found by the delta method: to first order F1 moves with the mean of the shares below, one a paper. So
    the error of the difference is the standard deviation of the paired differences of shares, divided by the root of n.
    A gain that hangs on one paper is not larger than its error.
    """
    values, shares = [], []
    for guess in (probs >= 0.5, other >= 0.5):
        f1 = f1_score(labels, guess, zero_division=0)
        values.append(f1)
        shares.append((2 * labels * guess - f1 * (labels + guess)) / np.mean(labels + guess))
    return values[0] - values[1], np.std(shares[0] - shares[1], ddof=1) / np.sqrt(len(labels))


def choose(labels, probs):
    """The plainest of several models (or blends) whose F1 none exceeds by more than a standard error. `probs`: {name:
    P(label = 1)}, the plainest first. Returns its name and how it compares with the best of the others, in a sentence.
    """
    f1 = {name: scores(labels, values)["f1"] for name, values in probs.items()}
    best = max(f1, key=f1.get)
    for name in probs:
        gain, error = f1_gain(labels, probs[best], probs[name])
        if gain <= error:
            break
    others = [other for other in probs if other != name]
    if not others:
        return name, "the only model to choose from"
    rival = max(others, key=f1.get)
    gain, error = f1_gain(labels, probs[name], probs[rival])
    tie = "" if gain > error else f": a tie, and {name} is plainer"
    return name, f"F1 {gain:+.4f} against {rival}, standard error {error:.4f}{tie}"


def choose_for_test(models, differ, test):
    """The model of baseline.py --pu, if it is to be submitted in place of the best by held-out scores: where train and
    test `differ` and no model reads authors that tell the label, for these tell it on other topics, too. Returns (its
    name or None, why: a sentence, "" if all is usual).
    """
    learned = [model for model in models if model.learned_from_test]
    others = [model.metrics for model in models if not model.learned_from_test]
    may_read = any("author" in metrics.get("fields", ["author"]) for metrics in others)  # one's own doesn't say
    table = next((metrics["table"] for metrics in others if "table" in metrics), [])  # the baseline's
    rule = next((values["accuracy"] for name, values, _ in table if name == "author rule"), 1)
    needed = differ and not (may_read and rule >= 0.9)
    if learned and needed and learned[0].metrics["learned_from_test"]["better"]:
        return learned[0].name, "train and test differ and no authors tell the label, so held-out scores say little"
    if learned:
        return None, (f"{learned[0].name} is submitted only where train and test differ, no authors tell the label, "
                      "and it should do better than the others.")
    if needed and len(test) >= pu.LEAST_TEST:
        return None, ("warning: no model reads authors that tell the label: run baseline.py --pu, which learns from "
                      "the test papers, then blend.py again.")
    return None, ""


# ---- the script ------------------------------------------------------------------------------------------------------


def compare_texts(train, test, fields, seed):
    """Whether scores on training papers hold for the test papers, in a sentence: by the AUC, out of fold, of a
    classifier that tells the two by their text. Of each at most 5,000 papers are looked at.
    """
    if min(len(train), len(test)) < 5:
        return "train and test were not compared: too few papers"
    sides = [papers.sample(min(5000, len(papers)), random_state=seed) for papers in (train, test)]
    labels = np.repeat([0, 1], [len(side) for side in sides])
    counts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
    texts = counts.fit_transform(common.build_text(pd.concat(sides), fields))
    model = LogisticRegression(C=10, solver="liblinear", class_weight="balanced", random_state=seed)
    auc = roc_auc_score(labels, cross_val_predict(model, texts, labels, cv=5, method="predict_proba")[:, 1])
    finding = f"AUC {auc:.2f} of a classifier that tells train from test by text (0.5 = alike)"
    if auc < 0.7:
        return f"{finding}: held-out scores should carry over to the test papers."
    return f"warning: {finding}: the two are about different things; expect lower scores on test."


def parse_args():
    parser = cli.arg_parser(__doc__, "train", "test", "fields", "seed", "limit")
    results.add_keywords_flag(parser)
    parser.add_argument("--submit", default="submit_task1.csv", metavar="FILE", help="default %(default)s")
    parser.add_argument("--report-only", action="store_true", help="write no submission")
    return parser.parse_args()


def main():
    args = parse_args()
    train, test, fields = common.load_papers(args)
    record = results.paper_record(train, test, held_out=0)
    models = read_models(args.out_dir, train, test, record)
    compared, papers = comparable(train, [model for model in models if not model.learned_from_test] or models)
    labels, test_labels = papers["label"].to_numpy(), results.read_labels(args.test, test)
    probs = {model.name: model.valid["prob"].loc[papers["uuid"]].to_numpy() for model in compared}
    test_probs = {model.name: model.test_probs for model in compared}
    mixture = add_blend(papers, probs, test_probs, args.seed)
    chosen, reason = choose(labels, probs)
    texts = compare_texts(train, test, fields, args.seed)
    test_probs |= {model.name: model.test_probs for model in models if model.learned_from_test}
    learned, advice = choose_for_test(models, texts.startswith("warning"), test)
    if learned:
        chosen, reason, advice = learned, advice, ""
    submitted = f"{mixture if chosen == 'blend' else f'100% {chosen}'}: {reason}"
    guess = test_probs[chosen] >= 0.5
    findings = [texts, advice, results.warn_one_class(guess, train["label"])]

    print("\n".join(filter(None, findings[:2])))
    print(f"blend: {submitted}")
    if not args.report_only:
        results.write_submission(args.submit, test, guess, args.out_dir, args.keywords)
    tables = report.make_tables(models, labels, probs, test_labels, test_probs, mixture)
    for title, rows in tables.items():
        print(f"\n{title}\n{results.score_table(rows)}")

    path = args.out_dir / "keywords" / "metrics.json"
    keywords = files.read_json(path, scores=dict, fields=list, papers=dict)
    if keywords and keywords["papers"].get("test_fingerprint") != record["test_fingerprint"]:
        keywords = {}  # of other test papers
    names = (f"{args.keywords}_recall_with_period", f"{args.keywords}_recall")
    found = {} if "Keywords" in test else keywords.get("scores", {})
    recalls = [found[name] for name in names if name in found]
    figures = report.describe_scores("held-out", labels, probs[chosen], recalls) if chosen in probs else []
    if test_labels is not None:
        figures += report.describe_scores("test", test_labels, test_probs[chosen], recalls)
    figures.append((f"{guess.mean():.1%}", f"of {len(guess):,} test papers are called medical"))
    metrics = {model.name: model.metrics for model in models}
    unused = [f"{name} ({m['unused_gpu']})" for name, m in metrics.items() if m.get("unused_gpu")]
    if unused:
        findings.append(f"warning: NO GPU WAS USED for {', '.join(unused)}: docs/gpu.md says why")
    report.write(args.out_dir, submitted, figures, findings, tables, metrics, keywords, papers, probs)
    if unused:
        log(findings[-1])  # once more, last of all: hours may have passed


if __name__ == "__main__":
    cli.run_script(main)

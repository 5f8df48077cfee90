"""Word counts and a linear or tree model: the plain baseline, in seconds and without torch.

    python baseline.py                            TF-IDF + logistic regression, out-of-fold scores, test predictions
    python baseline.py --model all                table: logistic regression, naive Bayes, random forest
    python baseline.py --fields title abstract    without the authors
    python baseline.py --fields title abstract --pu    the same, where test is about other things than train: lib/pu.py

In: train.csv, test.csv. Out, under outputs/baseline/: valid.csv (out-of-fold probabilities of every training paper),
test.csv, metrics.json, submit_task1.csv. With --pu under outputs/pu/.

It counts words and word pairs of all fields but the author's, and the characters of the author field as it is written
('Ann Lee,Bo Chen' or 'Lee, Ann; Chen, Bo'): how a database writes authors can give the label away. Where that doesn't
help, out of fold, the authors are left out.

On the competition's 2,004 training papers: F1 0.999 out of fold, 0.980 without the authors, in 3 seconds on two cores.
"""

import time
from dataclasses import dataclass
from itertools import product

import common
from lib import cli, files, pu, results
from lib.cli import InputError, bounded, positive_int
from lib.results import scores

import numpy as np
import pandas as pd
from scipy.sparse import hstack
from scipy.special import logit
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from tqdm import tqdm

MODELS = {"lr": "logistic regression", "nb": "naive Bayes", "rf": "random forest"}
WORD = r"\w+|[^\w\s]"  # a punctuation mark is a word: how abstracts are punctuated tells a little
STRENGTH = {"lr": 30, "nb": 0.01, "rf": 1}  # C of lr, alpha of nb, least papers in a leaf of rf
AUTHOR_WEIGHT = 2  # of the author's characters, where the words weigh 1
SMOOTHING = 0.1  # added to each class's use of an n-gram
STRONGEST = 15  # n-grams a label in metrics.json


# ---- count -----------------------------------------------------------------------------------------------------------


def block_texts(papers, fields):
    """What is counted, one str a paper: {"words": all fields but the author's, "author": that field as it is written}.
    A block without fields is left out.
    """
    words = [name for name in fields if name != "author"]
    author = [name for name in fields if name == "author"]
    blocks = {"words": words, "author": author}
    return {block: common.build_text(papers, names) for block, names in blocks.items() if names}


def count_ngrams(papers, fields, longest=2):
    """Count runs of up to `longest` words, and of 1 to 3 characters of the authors, that two papers or more have.
    Returns two dicts by block, as block_texts: the CountVectorizers and their counts, sparse float32 matrices
    [papers, n-grams].
    """
    shared = {"min_df": 2, "dtype": np.float32}
    counters = {
        "words": CountVectorizer(ngram_range=(1, longest), token_pattern=WORD, **shared),
        "author": CountVectorizer(ngram_range=(1, 3), analyzer="char", lowercase=False, **shared),
    }
    counts = {}
    for block, texts in block_texts(papers, fields).items():
        two_more = [".", "."]  # scikit-learn wants one n-gram at least that two texts have
        counts[block] = counters[block].fit_transform(texts + two_more)[: len(texts)]
        counts[block].sort_indices()  # else the order of sums, and their last digit, depend on the order of the papers
    return counters, counts


# ---- fit -------------------------------------------------------------------------------------------------------------


def class_ratio(values, labels):
    """How much more one class uses a column than the other: |log ratio| of its shares, float32 array [columns]. With
    values scaled by it, a linear model errs less (Wang and Manning 2012, "Baselines and bigrams").
    """
    use = [values.T @ (labels == label).astype(np.float32) + SMOOTHING for label in (0, 1)]
    return np.abs(np.log(use[1] / use[1].sum()) - np.log(use[0] / use[0].sum())).astype(np.float32)


class Columns:
    """The n-grams of a block that a model reads, and how it weighs their counts: chosen and learned from these training
    papers alone, so what only others have is left out. `model`: a key of MODELS; `weight`: of the block.
    """

    def __init__(self, counts, labels, model, weight):
        chosen = np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]) >= 2)
        if not len(chosen):  # next to no text: the model learns little more than the share of the classes
            chosen = np.array([0])
        self.chosen = chosen  # int [chosen]: columns of the counts, those that two papers or more have
        self.scale = np.full(len(chosen), weight, dtype=np.float32)  # factor of each TF-IDF value
        self.tfidf = TfidfTransformer(sublinear_tf=True).fit(counts[:, chosen])
        if model == "lr":
            self.scale *= class_ratio(self.tfidf.transform(counts[:, chosen]), labels)

    def weigh(self, counts):
        values = self.tfidf.transform(counts[:, self.chosen])
        values.data *= self.scale[values.indices]
        return values


def new_classifier(model, strength, seed):
    """An unfitted classifier. `model`: a key of MODELS."""
    if model == "lr":
        return LogisticRegression(C=strength, solver="liblinear", dual=True, max_iter=1000, random_state=seed)
    if model == "nb":
        return MultinomialNB(alpha=strength)
    return RandomForestClassifier(200, min_samples_leaf=strength, random_state=seed, n_jobs=-1)


class Model:
    """Columns by block, and a classifier that reads them. counts: of training papers, as of count_ngrams; settings: of
    new_classifier.
    """

    def __init__(self, counts, labels, settings):
        self.columns = {}
        for block, matrix in counts.items():
            weight = AUTHOR_WEIGHT if block == "author" and len(counts) > 1 else 1
            self.columns[block] = Columns(matrix, labels, settings["model"], weight)
        self.classifier = new_classifier(**settings).fit(self.features(counts), labels)

    def features(self, counts):
        return hstack([columns.weigh(counts[block]) for block, columns in self.columns.items()], format="csr")

    def predict(self, counts):
        """P(label = 1): float array [papers]."""
        return self.classifier.predict_proba(self.features(counts))[:, 1]


def strongest_ngrams(model, counters):
    """What speaks most for each label in a logistic regression: {block: {"0" or "1": [[n-gram, weight], ...]}}."""
    found, end = {}, 0
    for block, columns in model.columns.items():
        names = counters[block].get_feature_names_out()[columns.chosen]
        start, end = end, end + len(names)
        weights = model.classifier.coef_[0, start:end] * columns.scale
        found[block] = {}
        for label, towards in (("0", -weights), ("1", weights)):
            top = np.argsort(-towards, kind="stable")[:STRONGEST]
            found[block][label] = [[names[i], round(float(towards[i]), 4)] for i in top if towards[i] > 0]
    return found


# ---- compare, out of fold --------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A model scored out of fold."""

    name: str  # as in the table
    fields: list  # what it reads
    counts: dict  # of these fields, as of count_ngrams
    settings: dict  # of new_classifier
    probs: np.ndarray  # float [training papers]: P(label = 1), out of fold
    scores: dict


def out_of_fold(counts, labels, folds, settings):
    """P(label = 1) of every training paper, by a model that saw none of its fold. Returns float array [papers]."""
    probs = np.zeros(len(labels))
    for fold in range(folds.max() + 1):
        inside = folds != fold
        model = Model({block: matrix[inside] for block, matrix in counts.items()}, labels[inside], settings)
        probs[~inside] = model.predict({block: matrix[~inside] for block, matrix in counts.items()})
    return probs


def author_style(authors):
    """'Lee, Ann; Chen, Bo' -> ';', 'Ann Lee,Bo Chen' -> ',', 'Ann Lee' -> 'name', '' -> 'none'."""
    if ";" in authors or ", " in authors:
        return ";"
    if "," in authors:
        return ","
    return "name" if authors else "none"


def author_rule(authors, labels, folds):
    """The rule 'how the authors are written' alone: the share of label 1 among the papers of the other folds that write
    them the same way. Returns float array [papers].
    """
    styles = np.array([author_style(cell) for cell in authors])
    probs = np.zeros(len(labels))
    for style, fold in product(set(styles), range(folds.max() + 1)):
        seen = labels[(styles == style) & (folds != fold)]
        probs[(styles == style) & (folds == fold)] = (seen.sum() + 2 * labels.mean()) / (len(seen) + 2)
    return probs


def compare_models(counts, labels, folds, fields, args):
    """Score each model out of fold, with and without the authors where there are both. Returns a list of Candidates."""
    names = list(MODELS) if args.model == "all" else [args.model]
    versions = [("", fields, counts)]
    if len(counts) > 1:
        words = [name for name in fields if name != "author"]
        versions.append((", no author", words, {"words": counts["words"]}))
    found = []
    for name in tqdm(names, desc="models", disable=len(names) == 1):
        settings = {"model": name, "strength": STRENGTH[name], "seed": args.seed}
        for note, read, part in versions:
            probs = out_of_fold(part, labels, folds, settings)
            found.append(Candidate(MODELS[name] + note, read, part, settings, probs, scores(labels, probs)))
    return found


def make_table(candidates, train, labels, folds, fields):
    """Rows of the table: a constant guess, the author rule where there are authors, the candidates. ± is the standard
    deviation of the accuracy over the folds.
    """
    seen = f"{len(labels)} out of fold"
    guess = np.array([labels[folds != fold].mean() for fold in folds])
    table = [("constant guess", scores(labels, guess), seen)]
    if "author" in fields:
        rule = author_rule(train["author"], labels, folds)
        table.append(("author rule", scores(labels, rule), f"{seen}, the way authors are written"))
    for one in candidates:
        right = (one.probs >= 0.5) == labels
        spread = np.std([right[folds == fold].mean() for fold in range(folds.max() + 1)], ddof=1)
        table.append((one.name, one.scores, f"{seen}, {' '.join(one.fields)}, accuracy ± {spread:.4f}"))
    return table


# ---- main ------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = cli.arg_parser(__doc__, "train", "test", "fields", "seed", "limit")
    results.add_keywords_flag(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=(*MODELS, "all"), default="lr", help="default %(default)s: " + str(MODELS))
    add("--ngrams", type=positive_int, default=2, metavar="N", help="runs of up to N words, default 2")
    add("--folds", type=bounded(int, 2, 1000), default=5, metavar="K", help="default %(default)s")
    add("--pu", action="store_true", help="learn from the test papers what one class of train is not")
    args = parser.parse_args()
    if args.pu and args.model != "lr":
        raise InputError("--pu is a logistic regression of its own: leave --model out")
    return args


def compare_and_predict(args, folder):
    """Score the models out of fold, fit the best on all training papers, and write the folder's files."""
    started = time.perf_counter()
    train, test, fields = common.load_papers(args)
    labels = train["label"].to_numpy()
    folds = common.fold_numbers(train, args.folds, args.seed)
    counters, counts = count_ngrams(train, fields, args.ngrams)
    candidates = compare_models(counts, labels, folds, fields, args)
    best = max(candidates, key=lambda one: (one.scores["f1"], -one.scores["log_loss"]))
    model = Model(best.counts, labels, best.settings)
    texts = block_texts(test, best.fields)
    test_probs = model.predict({block: counters[block].transform(texts[block]) for block in texts})
    table = make_table(candidates, train, labels, folds, fields)
    metrics = {
        "scores": best.scores,
        "fields": best.fields,
        "settings": {**best.settings, "ngrams": args.ngrams, "folds": args.folds},
        "seconds": round(time.perf_counter() - started, 2),
        **results.environment(),
        "table": table,
        "strongest": strongest_ngrams(model, counters) if best.settings["model"] == "lr" else {},
    }
    results.finish(folder, args, metrics, train, test, test_probs, train, best.probs, table)
    if len(candidates) > 1:
        print(f"the predictions written are those of: {best.name} (by F1, of equals by log-loss)")


def learn_from_test(args, folder):
    """--pu: rate all papers as lib/pu.py does, and write the folder's files."""
    started = time.perf_counter()
    train, test, fields = common.load_papers(args)
    different = len(set(common.find_copies(test)))
    if different < pu.LEAST_TEST:
        raise InputError(f"--pu learns from the test papers: it needs {pu.LEAST_TEST} of them, there are {different}")
    papers = pd.concat([train, test], ignore_index=True)
    _, counts = count_ngrams(papers, fields, args.ngrams)
    settings = {"model": "lr", "seed": args.seed}

    def rate(rows, labels, others, strength):
        chosen = {block: matrix[rows] for block, matrix in counts.items()}
        model = Model(chosen, labels, {**settings, "strength": strength})
        return logit(model.predict({block: matrix[others] for block, matrix in counts.items()}))

    probs, found = pu.label_papers(papers, len(train), rate, args.folds, args.seed)
    held_out, test_probs = probs[: len(train)], probs[len(train) :]
    right = scores(train["label"], held_out)
    metrics = {
        "scores": right,
        "fields": fields,
        "settings": {**settings, "strength": pu.STRENGTHS, "ngrams": args.ngrams, "folds": args.folds},
        "learned_from_test": found,  # by this blend.py knows that it can't be compared with others
        "seconds": round(time.perf_counter() - started, 2),
        **results.environment(),
    }
    table = [("pu", right, f"{len(train)} out of fold, {' '.join(fields)}, {pu.NOT_COMPARABLE}")]
    results.finish(folder, args, metrics, train, test, test_probs, train, held_out, table)


def main():
    args = parse_args()
    folder = args.out_dir / ("pu" if args.pu else "baseline")
    with files.locked(folder):
        (learn_from_test if args.pu else compare_and_predict)(args, folder)


if __name__ == "__main__":
    cli.run_script(main)

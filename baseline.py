"""Word counts and a linear or tree model: the plain baseline, in seconds and without torch.

    python baseline.py                            TF-IDF + logistic regression, out-of-fold scores, test predictions
    python baseline.py --model all                table: logistic regression, naive Bayes, linear SVM, random forest
    python baseline.py --tune                     grid search before that
    python baseline.py --fields title abstract    without the authors

In: train.csv, test.csv. Out, under outputs/baseline/: valid.csv (out-of-fold probabilities of every training paper),
test.csv, metrics.json, submit_task1.csv.

It counts words and word pairs of all fields but the author's, and the characters of the author field as it is written
('Ann Lee,Bo Chen' or 'Lee, Ann; Chen, Bo'): how a database writes authors can give the label away. Where that doesn't
help, out of fold, the authors are left out.

On the competition's 2,004 training papers: F1 0.999 out of fold, 0.980 without the authors, in 2 seconds on two cores.
"""

import time
from collections import Counter
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.sparse import hstack
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.svm import LinearSVC
from tqdm import tqdm

import common
from lib import cli, results
from lib.cli import InputError, bounded, few, log, positive_int
from lib.results import scores

MODELS = {"lr": "logistic regression", "nb": "naive Bayes", "svm": "linear SVM", "rf": "random forest"}
WORD = r"\w+|[^\w\s]"  # a punctuation mark is a word: how abstracts are punctuated tells a little
STRENGTH = {"lr": 30, "nb": 0.01, "svm": 1, "rf": 1}  # C of lr and svm, alpha of nb, least papers in a leaf of rf
AUTHOR_WEIGHT = 2  # of the author's characters, where the words weigh 1
# What --tune tries.
STRENGTHS = {"lr": (3, 10, 30, 100), "nb": (0.003, 0.01, 0.03, 0.1), "svm": (0.1, 0.3, 1, 3), "rf": (1, 2, 4)}
AUTHOR_WEIGHTS = (0.5, 1, 2, 4)
SMOOTHING = 0.1  # added to each class's use of an n-gram
BLOCK = 5_000  # test papers scored at a time, so that memory doesn't grow with their number
STRONGEST = 15  # n-grams a label in metrics.json
NAMING_PAPERS = 9  # papers that are read to name a column


# ---- count -----------------------------------------------------------------------------------------------------------


def block_texts(papers, fields):
    """What is counted, one str a paper: {"words": all fields but the author's, "author": that field as it is written}.
    A block without fields is left out.
    """
    texts = {}
    words = [name for name in fields if name != "author"]
    if words:
        texts["words"] = common.build_text(papers, words)
    if "author" in fields:
        texts["author"] = papers["author"].tolist()
    return texts


def new_counter(block, longest):
    """Counts runs of up to `longest` words, or of 1 to 3 characters of the authors, in hashed columns: no vocabulary is
    learned, so a paper's counts depend on no other paper, and memory doesn't grow with the vocabulary.
    """
    options = {"alternate_sign": False, "norm": None, "dtype": np.float32}
    if block == "words":
        return HashingVectorizer(n_features=2**20, ngram_range=(1, longest), token_pattern=WORD, **options)
    return HashingVectorizer(n_features=2**18, ngram_range=(1, 3), analyzer="char", lowercase=False, **options)


def count_ngrams(papers, fields, longest=2):
    """Returns a dict of sparse float32 matrices [papers, columns] by block, as block_texts."""
    return {block: new_counter(block, longest).transform(texts) for block, texts in block_texts(papers, fields).items()}


def name_columns(block, longest, texts, counts, columns):
    """What the columns count, a list of str. Hashing forgets it, so a few papers with each column are read again; where
    n-grams share a column, the one in most of these papers names it.
    """
    counter = new_counter(block, longest)
    analyze = counter.build_analyzer()
    hasher = FeatureHasher(counter.n_features, input_type="string")
    papers_with = counts[:, columns].tocsc()
    names = []
    for place, column in enumerate(columns):
        start, end = papers_with.indptr[place : place + 2]
        seen = Counter()
        for paper in papers_with.indices[start:end][:NAMING_PAPERS]:
            ngrams = sorted(set(analyze(texts[paper])))
            hashed = hasher.transform([ngram] for ngram in ngrams).indices
            seen.update(ngrams[i] for i in np.flatnonzero(hashed == column))
        names.append(seen.most_common(1)[0][0])
    return names


def pick_rows(counts, rows):
    return {block: matrix[rows] for block, matrix in counts.items()}


# ---- fit -------------------------------------------------------------------------------------------------------------


@dataclass
class Columns:
    """The columns of a block that a model reads, and how it weighs their counts."""

    chosen: np.ndarray  # int [chosen]: columns of the counts
    tfidf: TfidfTransformer  # of these columns
    scale: np.ndarray  # float32 [chosen]: factor of each TF-IDF value

    def weigh(self, counts):
        values = self.tfidf.transform(counts[:, self.chosen])
        values.data *= self.scale[values.indices]
        return values


@dataclass
class Fitted:
    blocks: dict  # {block: Columns}
    model: object  # a classifier of scikit-learn

    def features(self, counts):
        return hstack([columns.weigh(counts[block]) for block, columns in self.blocks.items()], format="csr")

    def predict(self, counts):
        """P(label = 1): float array [papers]."""
        return self.model.predict_proba(self.features(counts))[:, 1]

    def column_weights(self):
        """What each column adds to label 1: {block: float array [chosen]}; zeros for a forest, which has no weights."""
        model = self.model
        if isinstance(model, CalibratedClassifierCV):
            model = model.calibrated_classifiers_[0].estimator
        if isinstance(model, MultinomialNB):
            weights = model.feature_log_prob_[1] - model.feature_log_prob_[0]
        else:
            weights = model.coef_[0] if hasattr(model, "coef_") else np.zeros(model.n_features_in_)
        ends = np.cumsum([len(columns.chosen) for columns in self.blocks.values()])
        parts = zip(self.blocks.items(), np.split(weights, ends))
        return {block: part * columns.scale for (block, columns), part in parts}


def class_ratio(values, labels):
    """How much more one class uses a column than the other: |log ratio| of its shares, float32 array [columns]. With
    values scaled by it, a linear model errs less (Wang and Manning 2012, "Baselines and bigrams").
    """
    use = [values.T @ (labels == label).astype(np.float32) + SMOOTHING for label in (0, 1)]
    return np.abs(np.log(use[1] / use[1].sum()) - np.log(use[0] / use[0].sum())).astype(np.float32)


def choose_columns(counts, labels, settings):
    """Choose n-grams and weigh them, by these training papers alone. Returns Columns."""
    papers_with = np.bincount(counts.indices, minlength=counts.shape[1])
    chosen = np.flatnonzero(papers_with >= min(2, papers_with.max(initial=0)))
    if settings["max_features"] and len(chosen) > settings["max_features"]:
        chosen = np.sort(chosen[np.argsort(-papers_with[chosen], kind="stable")[: settings["max_features"]]])
    if not papers_with.any():  # no text at all: one column of zeros, the model then learns the share of the classes
        chosen = np.array([0])
    counts = counts[:, chosen]
    is_tfidf = settings["features"] == "tfidf"
    tfidf = TfidfTransformer(sublinear_tf=is_tfidf, use_idf=is_tfidf).fit(counts)
    scale = np.ones(len(chosen), dtype=np.float32)
    if settings["model"] in ("lr", "svm"):
        scale = class_ratio(tfidf.transform(counts), labels)
    return Columns(chosen, tfidf, scale)


def new_model(settings, labels):
    """An unfitted classifier for training papers with these labels. Raises InputError if an SVM has too few of them."""
    name, strength, seed = settings["model"], settings["strength"], settings["seed"]
    if name == "lr":
        return LogisticRegression(C=strength, solver="liblinear", dual=True, max_iter=1000, random_state=seed)
    if name == "nb":
        return MultinomialNB(alpha=strength)
    if name == "rf":
        return RandomForestClassifier(200, min_samples_leaf=strength, random_state=seed, n_jobs=-1)
    least = np.bincount(labels, minlength=2).min()
    if least < 2:  # the SVM's probabilities come from folds of its training papers
        raise InputError(f"--model svm or all needs 2 papers of each class beside every fold, there is {least}: give "
                         "another --model, more --folds or more papers")
    return CalibratedClassifierCV(LinearSVC(C=strength, random_state=seed), cv=min(5, least), ensemble=False)


def fit(counts, labels, settings):
    """Fit on training counts, a dict of count_ngrams. Returns a Fitted."""
    blocks = {}
    for block, matrix in counts.items():
        weight = settings["author_weight"] if block == "author" and len(counts) > 1 else 1
        if weight:
            blocks[block] = choose_columns(matrix, labels, settings)
            blocks[block].scale *= weight
    fitted = Fitted(blocks, new_model(settings, labels))
    fitted.model.fit(fitted.features(counts), labels)
    return fitted


def strongest_ngrams(fitted, texts, counts, longest):
    """The n-grams that speak most for each label: {block: {"0" or "1": [[n-gram, weight], ...]}}. `texts`, `counts`: of
    the training papers.
    """
    found = {}
    for block, weights in fitted.column_weights().items():
        found[block] = {}
        for label, towards in (("0", -weights), ("1", weights)):
            top = np.argsort(-towards, kind="stable")[:STRONGEST]
            top = top[towards[top] > 0]
            names = name_columns(block, longest, texts[block], counts[block], fitted.blocks[block].chosen[top])
            found[block][label] = [[name, round(float(weight), 4)] for name, weight in zip(names, towards[top])]
    return found


# ---- compare, out of fold --------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A model scored out of fold."""

    name: str  # as in the table
    fields: list  # what it reads
    settings: dict
    probs: np.ndarray  # float [training papers]: P(label = 1), out of fold
    scores: dict

    def rank(self):
        return self.scores["f1"], -self.scores["log_loss"]


def out_of_fold(counts, labels, folds, settings):
    """P(label = 1) of every training paper, by a model that saw none of its fold. Returns float array [papers]."""
    probs = np.zeros(len(labels))
    for fold in range(folds.max() + 1):
        inside = folds != fold
        fitted = fit(pick_rows(counts, inside), labels[inside], settings)
        probs[~inside] = fitted.predict(pick_rows(counts, ~inside))
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


def reference_rows(train, labels, folds, fields):
    """Rows of the table that need no model: a constant guess, and the author rule where there are authors."""
    seen = f"{len(labels)} out of fold"
    guess = np.array([labels[folds != fold].mean() for fold in folds])
    table = [("constant guess", scores(labels, guess), seen)]
    if "author" in fields:
        rule = author_rule(train["author"], labels, folds)
        table.append(("author rule", scores(labels, rule), f"{seen}, the way authors are written"))
    return table


def tune(counts, labels, folds, settings):
    """Grid search by out-of-fold log-loss. Returns settings with the best values."""
    best, lowest = None, np.inf
    weights = AUTHOR_WEIGHTS if len(counts) > 1 else [AUTHOR_WEIGHT]
    for strength, weight in tqdm(list(product(STRENGTHS[settings["model"]], weights)), desc="tune"):
        trial = {**settings, "strength": strength, "author_weight": weight}
        loss = scores(labels, out_of_fold(counts, labels, folds, trial))["log_loss"]
        if loss < lowest:
            best, lowest = trial, loss
    log(f"--tune: strength {best['strength']}, author weight {best['author_weight']}")
    return best


def compare_models(counts, labels, folds, fields, args):
    """Score each model out of fold, with and without the authors where there are both. Returns a list of Candidates."""
    names = list(MODELS) if args.model == "all" else [args.model]
    words = [name for name in fields if name != "author"]
    found = []
    for name in tqdm(names, desc="models", disable=len(names) == 1):
        settings = {
            "features": args.features,
            "model": name,
            "strength": STRENGTH[name],
            "author_weight": AUTHOR_WEIGHT,
            "max_features": args.max_features,
            "seed": args.seed,
        }
        if args.tune:
            settings = tune(counts, labels, folds, settings)
        trials = [(MODELS[name], fields, settings)]
        if len(counts) > 1:
            trials.append((f"{MODELS[name]}, no author", words, {**settings, "author_weight": 0}))
        for title, read, trial in trials:
            probs = out_of_fold(counts, labels, folds, trial)
            found.append(Candidate(title, read, trial, probs, scores(labels, probs)))
    return found


def candidate_row(candidate, labels, folds):
    """A row of the table; ± is the standard deviation of the accuracy over the folds."""
    right = (candidate.probs >= 0.5) == labels
    spread = np.std([right[folds == fold].mean() for fold in range(folds.max() + 1)], ddof=1)
    note = f"{len(labels)} out of fold, {' '.join(candidate.fields)}, accuracy ± {spread:.4f}"
    return candidate.name, candidate.scores, note


def describe_choice(best, candidates):
    """Which predictions are written, and why: a shared F1 is not called the highest."""
    same = [other.name for other in candidates if other.scores["f1"] == best.scores["f1"]]
    if len(same) == 1:
        return f"the predictions written are those of: {best.name} (the highest F1)"
    return f"the predictions written are those of: {best.name} (the lowest log-loss of {few(same, 8)}, equal in F1)"


# ---- main ------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = cli.arg_parser(__doc__, "train", "test", "fields", "seed", "limit")
    results.add_keywords_flag(parser)
    add = parser.add_argument_group("model").add_argument
    add("--features", choices=("tfidf", "bow"), default="tfidf", help="default %(default)s")
    add("--model", choices=(*MODELS, "all"), default="lr", help="default %(default)s: " + str(MODELS))
    add("--ngrams", type=positive_int, default=2, metavar="N", help="runs of up to N words, default 2")
    add("--max-features", type=positive_int, metavar="N", help="only the N n-grams in most papers, default all")
    add("--folds", type=bounded(int, 2, 1000), default=5, metavar="K", help="default %(default)s")
    add("--tune", action="store_true", help="grid search over regularisation and author weight")
    return parser.parse_args()


def predict_test(fitted, test, fields, longest):
    """P(label = 1) of the test papers, a block at a time: float array [papers]."""
    parts = [test[start : start + BLOCK] for start in range(0, len(test), BLOCK)]
    return np.concatenate([fitted.predict(count_ngrams(part, fields, longest)) for part in parts])


def compare_and_predict(args, folder):
    """Score the models out of fold, fit the best on all training papers, and write the folder's files."""
    started = time.perf_counter()
    train, test, fields = common.load_papers(args)
    labels = train["label"].to_numpy()
    folds = common.fold_numbers(train, args.folds, args.seed)
    counts = count_ngrams(train, fields, args.ngrams)

    candidates = compare_models(counts, labels, folds, fields, args)
    author_free = [one for one in candidates if "author" not in one.fields]
    best = max(candidates, key=Candidate.rank)
    table = reference_rows(train, labels, folds, fields)
    table += [candidate_row(one, labels, folds) for one in candidates]

    fit_started = time.perf_counter()
    fitted = fit(counts, labels, best.settings)
    test_started = time.perf_counter()
    test_probs = predict_test(fitted, test, fields, args.ngrams)
    ended = time.perf_counter()

    metrics = {
        "scores": best.scores,
        "author_free_scores": max(author_free, key=Candidate.rank).scores if author_free else None,
        "papers": results.paper_record(train, test, len(train)),
        "fields": best.fields,
        "settings": {**best.settings, "ngrams": args.ngrams, "folds": args.folds},
        "train_seconds": round(ended - started, 2),
        "train_papers_per_second": round(len(train) / (test_started - fit_started), 1),
        "predict_papers_per_second": round(len(test) / (ended - test_started), 1),
        **results.environment(),
        "table": table,
        "strongest": strongest_ngrams(fitted, block_texts(train, fields), counts, args.ngrams),
    }
    results.save_results(folder, metrics, test, test_probs, train, best.probs)
    print(results.score_table(table))
    if len(candidates) > 1:
        print(describe_choice(best, candidates))
    results.warn_one_class(test_probs >= 0.5, labels)
    results.write_submission(folder / "submit_task1.csv", test, test_probs >= 0.5, args.out_dir, args.keywords)


def main():
    args = parse_args()
    folder = args.out_dir / "baseline"
    with results.locked(folder):
        compare_and_predict(args, folder)


if __name__ == "__main__":
    cli.run_script(main)

"""Word counts and a linear or tree model: the plain baseline, in seconds and without torch.

    python baseline.py                            TF-IDF + logistic regression, out-of-fold scores, test predictions
    python baseline.py --model all                table: logistic regression, naive Bayes, linear SVM, random forest
    python baseline.py --tune                     grid search before that
    python baseline.py --fields title abstract    without the authors

In: train.csv, test.csv. Out, under outputs/baseline/: valid.csv (out-of-fold probabilities of every training paper),
test.csv, metrics.json, submit_task1.csv.

Counted are the words and word pairs of all fields but the author's, and the characters of the author field as it is
written ('Ann Lee,Bo Chen' or 'Lee, Ann; Chen, Bo'): how a database writes authors can tell the label. Where that
doesn't help, out of fold, the authors are left out.
"""

import time
from collections import Counter
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
from common import log, run_script, scores, whole

MODELS = {"lr": "logistic regression", "nb": "naive Bayes", "svm": "linear SVM", "rf": "random forest"}
WORD = r"\w+|[^\w\s]"  # a punctuation mark is a word: how abstracts are punctuated tells a little
STRENGTH = {"lr": 30, "nb": 0.01, "svm": 1, "rf": 1}
BLOCK = 10_000  # test papers scored at a time, for the memory
AUTHOR_WEIGHT = 2  # of the author's characters, where the words weigh 1
GRID = {"lr": (3, 10, 30, 100), "nb": (0.003, 0.01, 0.03, 0.1), "svm": (0.1, 0.3, 1, 3), "rf": (1, 2, 4)}


def block_texts(papers, fields):
    """What is counted, as a dict of lists of str, one a paper: "words", of all fields but author, and "author", that
    field as it is written; each where there are such fields.
    """
    words = [name for name in fields if name != "author"]
    texts = {"words": common.build_text(papers, words)} if words else {}
    return texts | ({"author": papers["author"].tolist()} if "author" in fields else {})


def new_counter(block, ngrams):
    """Counts words, or the characters of authors, into hashed columns: no vocabulary is learned, so a paper's counts
    depend on no other paper, and memory doesn't grow with the vocabulary.
    """
    shape = {"alternate_sign": False, "norm": None, "dtype": np.float32}
    if block == "words":
        return HashingVectorizer(n_features=2**20, ngram_range=ngrams, token_pattern=WORD, **shape)
    return HashingVectorizer(n_features=2**18, analyzer="char", ngram_range=(1, 3), lowercase=False, **shape)


def count_ngrams(papers, fields, ngrams=(1, 2)):
    """Count once, before any split. Returns a dict of sparse float32 matrices [papers, columns], as block_texts."""
    return {block: new_counter(block, ngrams).transform(texts) for block, texts in block_texts(papers, fields).items()}


def choose_columns(train, settings):
    """Select n-grams and weigh them, by the training rows alone. Returns (columns, transformer of counts of these)."""
    papers_with = np.bincount(train.indices, minlength=train.shape[1])
    keep = np.flatnonzero(papers_with >= min(2, papers_with.max(initial=0)))
    if settings["max_features"] and len(keep) > settings["max_features"]:
        keep = np.sort(keep[np.argsort(-papers_with[keep], kind="stable")[: settings["max_features"]]])
    if not len(keep):  # no text at all: one column of zeros, the model then learns the share of the classes
        keep = np.array([0])
    tfidf = settings["features"] == "tfidf"
    return keep, TfidfTransformer(sublinear_tf=tfidf, use_idf=tfidf).fit(train[:, keep])


def new_model(name, strength, seed, papers):
    """An unfitted classifier. `strength`: C of lr and svm, alpha of nb, least papers in a leaf of rf."""
    if name == "lr":
        return LogisticRegression(C=strength, solver="liblinear", dual=True, max_iter=1000, random_state=seed)
    if name == "nb":
        return MultinomialNB(alpha=strength)
    if name == "svm":
        inner = min(5, papers)
        return CalibratedClassifierCV(LinearSVC(C=strength, random_state=seed), cv=inner, ensemble=False)
    return RandomForestClassifier(200, min_samples_leaf=strength, random_state=seed, n_jobs=-1)


def column_weights(model, columns):
    """What each column adds to label 1: float array [columns], zeros for a forest, which has no such weights."""
    if isinstance(model, MultinomialNB):
        return model.feature_log_prob_[1] - model.feature_log_prob_[0]
    if isinstance(model, CalibratedClassifierCV):
        model = model.calibrated_classifiers_[0].estimator
    return model.coef_[0] if hasattr(model, "coef_") else np.zeros(columns)


def fit(train, labels, settings):
    """Fit on training counts (a dict of count_ngrams). Returns (predict, weights): predict(counts) gives P(label = 1)
    of other papers, float array [papers]; weights: {block: (the columns in use, their weights)}.
    """
    parts = {}
    for name in train:
        weight = settings["author_weight"] if name == "author" and len(train) > 1 else 1  # author alone: any will do
        if weight:
            parts[name] = (*choose_columns(train[name], settings), weight)

    def matrix(counts):
        blocks = [weigh.transform(counts[name][:, columns]) * by for name, (columns, weigh, by) in parts.items()]
        return hstack(blocks, format="csr")

    model = new_model(settings["model"], settings["strength"], settings["seed"], np.bincount(labels).min())
    model.fit(matrix(train), labels)
    sizes = [len(columns) for columns, _, _ in parts.values()]
    weights = np.split(column_weights(model, sum(sizes)), np.cumsum(sizes))
    used = {name: (part[0], values) for (name, part), values in zip(parts.items(), weights)}
    return lambda counts: model.predict_proba(matrix(counts))[:, 1], used


def read_ngrams(block, ngrams, texts, counts, columns):
    """What the columns count, a list of str: hashing forgets it, so it is read again from papers that have it."""
    counter = new_counter(block, ngrams)
    analyze, hasher = counter.build_analyzer(), FeatureHasher(counter.n_features, input_type="string")
    having, found = counts[:, columns].tocsc(), []
    for place, column in enumerate(columns):
        papers = having.indices[having.indptr[place] : having.indptr[place + 1]][:20]
        seen = Counter(ngram for paper in papers for ngram in dict.fromkeys(analyze(texts[paper])))
        hashed = hasher.transform([ngram] for ngram in seen).indices
        found.append(max((ngram for ngram, h in zip(seen, hashed) if h == column), key=seen.get))
    return found


def strongest_ngrams(papers, fields, ngrams, counts, weights, most=15):
    """The n-grams that speak most for each label: {block: {"0" or "1": [[n-gram, weight], ...]}}. `counts`: of these
    papers, from count_ngrams; `weights`: from fit.
    """
    texts, found = block_texts(papers, fields), {}
    for block, (columns, values) in weights.items():
        found[block] = {}
        for label, strength in (("0", -values), ("1", values)):
            top = np.argsort(-strength, kind="stable")[:most]
            top = top[strength[top] > 0]
            names = read_ngrams(block, ngrams, texts[block], counts[block], columns[top])
            found[block][label] = [[name, round(float(strength[i]), 4)] for name, i in zip(names, top)]
    return found


def rows(blocks, mask):
    return {name: block[mask] for name, block in blocks.items()}


def out_of_fold(blocks, labels, folds, settings):
    """P(label = 1) of every training paper, by a model that saw none of its fold. Returns float array [papers]."""
    probs = np.zeros(len(labels))
    for fold in range(folds.max() + 1):
        inside = folds != fold
        predict, _ = fit(rows(blocks, inside), labels[inside], settings)
        probs[~inside] = predict(rows(blocks, ~inside))
    return probs


def author_rule(authors, labels, folds):
    """The rule 'how the authors are written' alone: the share of label 1 among the papers of the other folds that write
    them the same way: 'Lee, Ann; Chen, Bo', 'Ann Lee,Bo Chen', one plain name, or none. Returns float array [papers].
    """
    ways = [";" if ";" in cell or ", " in cell else "," if "," in cell else cell and "name" for cell in authors]
    ways = np.array(ways)
    probs = np.zeros(len(labels))
    for way, fold in product(set(ways), range(folds.max() + 1)):
        seen = labels[(ways == way) & (folds != fold)]
        probs[(ways == way) & (folds == fold)] = (seen.sum() + 2 * labels.mean()) / (len(seen) + 2)
    return probs


def spread(labels, probs, folds):
    """Standard deviation of the accuracy over the folds."""
    right = (probs >= 0.5) == labels
    return np.std([right[folds == fold].mean() for fold in range(folds.max() + 1)], ddof=1)


def tune(blocks, labels, folds, settings):
    """Grid search by out-of-fold log-loss. Returns settings with the best values."""
    weights = (0.5, 1, 2, 4) if len(blocks) > 1 else (settings["author_weight"],)
    tried = []
    for strength, weight in tqdm(list(product(GRID[settings["model"]], weights)), desc="tune"):
        trial = {**settings, "strength": strength, "author_weight": weight}
        tried.append((scores(labels, out_of_fold(blocks, labels, folds, trial))["log_loss"], len(tried), trial))
    log(f"--tune: strength {(best := min(tried)[2])['strength']}, author weight {best['author_weight']}")
    return best


def parse_args():
    parser = common.arg_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--features", choices=("tfidf", "bow"), default="tfidf", help="default %(default)s")
    group.add_argument("--model", choices=(*MODELS, "all"), default="lr", help="default %(default)s: " + str(MODELS))
    group.add_argument("--ngrams", type=whole, default=2, metavar="N", help="runs of up to N words, default 2")
    group.add_argument("--max-features", type=whole, metavar="N", help="the N n-grams in most papers only, default all")
    group.add_argument("--author-weight", type=float, metavar="W", help="default 2, or 0 if that does better")
    group.add_argument("--strength", type=float, help="C of lr and svm, alpha of nb, least leaf of rf")
    group.add_argument("--folds", type=whole, default=5, metavar="K", help="default %(default)s")
    group.add_argument("--tune", action="store_true", help="grid search over strength and author weight")
    args = parser.parse_args()
    if args.folds < 2:
        parser.error("--folds must be at least 2")
    if (args.author_weight or 0) < 0 or (args.strength is not None and args.strength <= 0):
        parser.error("--author-weight can't be below 0, --strength must be above 0")
    if args.strength is not None and (args.model == "all" or args.tune):
        parser.error("--strength goes with one --model and without --tune")
    return args


def compare_and_predict(args, folder):
    """Score the models out of fold, fit the best on all training papers, and write the folder's files."""
    started = time.perf_counter()
    train, test, fields = common.load_papers(args)
    labels = train["label"].to_numpy()
    folds = common.fold_numbers(train, args.folds, args.seed)
    ngrams = (1, args.ngrams)
    blocks = count_ngrams(train, fields, ngrams)

    names = list(MODELS) if args.model == "all" else [args.model]
    seen = f"{len(train)} out of fold"
    guess = np.array([labels[folds != fold].mean() for fold in folds])
    table = [("constant guess", scores(labels, guess), seen)]
    if "author" in fields:
        rule = author_rule(train["author"], labels, folds)
        table.append(("author rule", scores(labels, rule), f"{seen}, the way authors are written"))
    author_free, results = None, []
    for name in tqdm(names, desc="models", disable=len(names) == 1):
        settings = {"features": args.features, "model": name, "strength": args.strength or STRENGTH[name]}
        settings |= {"author_weight": AUTHOR_WEIGHT if args.author_weight is None else args.author_weight}
        settings |= {"max_features": args.max_features, "seed": args.seed}
        if args.tune:
            settings = tune(blocks, labels, folds, settings)
        trials = [(MODELS[name], fields, settings)]
        if len(blocks) > 1:
            words = [field for field in fields if field != "author"]
            trials.append((f"{MODELS[name]}, no author", words, {**settings, "author_weight": 0}))
        for title, read, trial in trials:
            probs = out_of_fold(blocks, labels, folds, trial)
            values = scores(labels, probs)
            table.append((title, values, f"{seen}, {' '.join(read)}, accuracy ± {spread(labels, probs, folds):.4f}"))
            if "author" not in read and (author_free is None or values["f1"] > author_free["f1"]):
                author_free = values
            if args.author_weight in (None, trial["author_weight"]):
                results.append((values, title, read, trial, probs))
    values, title, read, settings, probs = max(results, key=lambda r: (r[0]["f1"], -r[0]["log_loss"]))

    fit_started = time.perf_counter()
    predict, weights = fit(blocks, labels, settings)
    test_started = time.perf_counter()
    parts = [test[start : start + BLOCK] for start in range(0, len(test), BLOCK)]
    test_probs = np.concatenate([predict(count_ngrams(part, fields, ngrams)) for part in parts])
    ended = time.perf_counter()
    metrics = {
        "scores": values,
        "author_free_scores": author_free,
        "papers": common.paper_record(train, test, len(train)),
        "fields": read,
        "settings": {**settings, "ngrams": args.ngrams, "folds": args.folds},
        "train_seconds": round(time.perf_counter() - started, 2),
        "train_papers_per_second": round(len(train) / (test_started - fit_started), 1),
        "predict_papers_per_second": round(len(test) / (ended - test_started), 1),
        "peak_memory_mb": common.peak_memory_mb(),
        "versions": common.package_versions(),
        "device": "cpu",
        "table": table,
        "strongest": strongest_ngrams(train, fields, ngrams, blocks, weights),
    }
    common.write_submission(folder / "submit_task1.csv", test, test_probs >= 0.5, args.out_dir)
    common.save_results(folder, test, test_probs, metrics, train, probs)
    print(common.score_table(table))
    if len(results) > 1:
        print(f"the predictions written are those of: {title} (the highest F1)")


def main():
    args = parse_args()
    folder = args.out_dir / "baseline"
    with common.locked(folder):
        compare_and_predict(args, folder)


if __name__ == "__main__":
    run_script(main)

"""How likely a candidate is to be one of its paper's keywords: what the keywords of other papers teach, and boosted
trees. For extract_keywords.py.

Candidates are the phrases that stand in a paper and the keywords of training papers like it.

What is learned from keywords is cross-fitted over folds: a paper's features are drawn, and the trees that rate it are
fitted, from the keywords of the other folds. The features of those other papers do count its own fold's keywords,
though; by measurement scores out of fold and of papers never seen at all agree nevertheless. All of it is repeated over
several partitions into folds and averaged, since one set of trees varies much more than the mean of a few.
"""

import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import common
from lib.phrases import STOP, find_candidates, mean_over, number, split_keywords, stem, stem_word

NEIGHBOURS, PROPOSED = 40, 30  # labelled papers asked for keywords, and how many of those keywords become candidates
TREES = {"max_iter": 100, "learning_rate": 0.1, "max_leaf_nodes": 31, "max_features": 0.2}
NEGATIVES = 0.25  # share of the wrong candidates that a fold's trees learn from


# ---- what keywords teach ---------------------------------------------------------------------------------------------


def build_corpus(train, test):
    """Everything about all papers that doesn't depend on the fold. Papers of train come first. Returns a namespace:
    found (find_candidates), keywords and stem_keywords (sparse 0/1 [papers, phrases] and [papers, stems]; test papers
    have none), phrases (candidates' and keywords'), numbers (their places in that), stems (their stems' numbers),
    seen_first (when a keyword first comes up), casing (how train writes it), paper_words (a
    set of stemmed words a paper), ends (numbers of the words' last 3 and 4 letters), tfidf ([papers, words]).
    """
    papers = {name: [*train[name], *test[name]] for name in ("title", "abstract")}
    found, count = find_candidates(papers, len(train)), len(train) + len(test)
    numbers = {phrase: i for i, phrase in enumerate(found.phrases)}
    casing, rows, columns = defaultdict(Counter), [], []
    for paper, cell in enumerate(train["Keywords"]):
        for keyword, written in split_keywords(cell).items():
            casing[keyword][written] += 1
            rows.append(paper)
            columns.append(numbers.setdefault(keyword, len(numbers)))
    phrases = list(numbers)
    stems, different = number(found.stems + [stem(phrase) for phrase in phrases[len(found.phrases) :]])
    stems = np.append(found.stem, stems[len(found.stems) :])
    corpus = SimpleNamespace(found=found, phrases=phrases, numbers=numbers, stems=stems, casing=casing, count=count)
    rows, columns, ones = np.array(rows, int), np.array(columns, int), np.ones(len(rows), np.float32)
    corpus.keywords = sparse.csr_matrix((ones, (rows, columns)), shape=(count, len(phrases)))
    corpus.stem_keywords = sparse.csr_matrix((ones, (rows, stems[columns])), shape=(count, len(different)))
    corpus.seen_first = np.zeros(len(phrases), dtype=np.int64)
    corpus.seen_first[columns[::-1]] = np.arange(len(columns))[::-1]

    text = found.text
    corpus.ends = [number([w[-n:] for w in text.words])[0] for n in (3, 4)]
    stemmed = [stem_word(w).split(" ") for w in text.words]
    corpus.paper_words = [set() for _ in range(count)]
    for paper, word in zip(text.pair_paper, text.pair_word):
        corpus.paper_words[paper].update(stemmed[word])
    texts = common.build_text(papers, ["title", "abstract"])
    weights = TfidfVectorizer(stop_words=list(STOP), sublinear_tf=True, token_pattern=r"\w\w+", dtype=np.float32)
    try:
        known = weights.fit_transform(texts[: len(train)])
        asked = weights.transform(texts[len(train) :]) if len(test) else known[:0]
        corpus.tfidf = sparse.vstack([known, asked], format="csr")
    except ValueError:  # no words at all
        corpus.tfidf = sparse.csr_matrix((count, 1), dtype=np.float32)
    return corpus


def rates(keys, hits, folds, strength):
    """How often `hits` holds where a key stands, among the fitted papers of other folds. keys: int array; hits: 0/1;
    folds: the paper's fold, -1 for a paper not fitted. `strength` weighs, in rows, the rate of all keys.
    """
    fitted, size, count = folds >= 0, keys.max(initial=0) + 1, folds.max(initial=0) + 1
    own = np.where(fitted, folds * size + keys, 0)
    counts = []
    for values in (np.ones(len(keys)), hits):
        by_fold = np.bincount(own[fitted], values[fitted], count * size).reshape(count, size)
        of_key = by_fold.sum(axis=0)[keys] - fitted * by_fold.ravel()[own]
        counts.append((of_key, np.append(by_fold.sum() - by_fold.sum(axis=1), by_fold.sum())[folds]))
    (rows, all_rows), (right, all_right) = counts
    return (right + strength * all_right / np.maximum(all_rows, 1)) / (rows + strength)


def entries(matrix, rows, columns):
    """The entries of a sparse matrix at these places; scipy itself takes no empty index."""
    return np.asarray(matrix[rows, columns]).ravel() if len(rows) else np.zeros(0)


def others(matrix, folds):
    """Column sums of a sparse 0/1 [papers, columns] over the fitted papers of the other folds. Returns a dense float32
    array [folds + 1, columns]; row -1 is the sum for the papers that aren't fitted.
    """
    count = folds.max() + 1
    sums = [np.asarray(matrix[(folds >= 0) & (folds != fold)].sum(axis=0)).ravel() for fold in range(count)]
    return np.array([*sums, np.asarray(matrix[folds >= 0].sum(axis=0)).ravel()], dtype=np.float32)


def ask_neighbours(corpus, folds):
    """What the fitted papers of other folds most like each paper carry. Returns two sparse matrices [papers, phrases]
    and [papers, stems]: the shares of the neighbours, weighted by their similarity squared, that have the keyword.
    """
    fitted = np.flatnonzero(folds >= 0)
    rows, columns, weights = [], [], []
    for paper in range(0, corpus.count, 1000):  # a block of papers at a time, for the memory
        block = (corpus.tfidf[paper : paper + 1000] @ corpus.tfidf[fitted].T).toarray()
        block[folds[paper : paper + 1000, None] == folds[None, fitted]] = 0
        nearest = np.argsort(-block, axis=1, kind="stable")[:, :NEIGHBOURS]
        weight = np.take_along_axis(block, nearest, axis=1) ** 2
        rows.append(np.repeat(np.arange(len(block)) + paper, nearest.shape[1]))
        columns.append(fitted[nearest.ravel()])
        weights.append((weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-9)).ravel())
    shape = (corpus.count, corpus.count)
    share = sparse.csr_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
    return (share @ corpus.keywords).tocsr(), (share @ corpus.stem_keywords).tocsr()


def propose(corpus, folds, shares, known):
    """Keywords of a paper's neighbours that are no candidates yet: the PROPOSED likeliest, of those that two or more
    papers carry. Returns (paper, phrase), int arrays.
    """
    found, size, papers, proposed = corpus.found, len(corpus.phrases), [], []
    for paper in range(corpus.count):
        some = slice(shares.indptr[paper], shares.indptr[paper + 1])
        phrase, share = shares.indices[some], shares.data[some]
        likely = (known[folds[paper], phrase] >= 2) & (share > 0)
        phrase, share = phrase[likely], share[likely]
        proposed.append(phrase[np.lexsort((corpus.seen_first[phrase], -share))][:PROPOSED])
        papers.append(np.full(len(proposed[-1]), paper))
    papers, proposed = np.concatenate(papers), np.concatenate(proposed).astype(np.int64)
    new = ~np.isin(papers * size + proposed, found.paper * size + found.phrase)
    return papers[new], proposed[new]


def add_learned(corpus, folds):
    """The candidates with what is learned from keywords. folds: int array [papers], the fold of a paper to learn from,
    -1 for any other. Returns (features {name: array}, paper, phrase, hit (bool: it is a keyword of that paper)).
    """
    found, text = corpus.found, corpus.found.text
    known, known_stems = others(corpus.keywords, folds), others(corpus.stem_keywords, folds)
    shares, stem_shares = ask_neighbours(corpus, folds)
    more_paper, more_phrase = propose(corpus, folds, shares, known)
    paper, phrase = np.append(found.paper, more_paper), np.append(found.phrase, more_phrase)
    stems = corpus.stems[phrase]

    hit = entries(corpus.keywords, paper, phrase) > 0
    fold, fitted = folds[paper], (folds >= 0).sum()
    papers = (fitted - np.append(np.bincount(folds[folds >= 0]), 0))[fold]
    papers = np.maximum(papers, 1)
    f = {"known": known[fold, phrase] / papers, "known_stem": known_stems[fold, stems] / papers}
    f["known_form"] = (known[fold, phrase] + 0.5) / (known_stems[fold, stems] + 1)
    f["near"], f["near_stem"] = entries(shares, paper, phrase), entries(stem_shares, paper, stems)
    f["near_lift"] = f["near"] / (f["known"] + 1 / papers)
    stemmed = {i: stem(corpus.phrases[i]).split(" ") for i in np.unique(more_phrase)}
    present = [
        sum(word in corpus.paper_words[p] for word in stemmed[i]) / len(stemmed[i])
        for p, i in zip(more_paper, more_phrase)
    ]
    f["words_present"] = np.append(np.full(len(found.paper), 2.0), present)

    # From here on the candidates of the text alone.
    inner, hits, count, learned = folds[found.paper], hit[: len(found.paper)].astype(float), len(text.words), {}
    head, tail, titled = text.word[found.first], text.word[found.last], found.titled
    missing = text.sides - 1
    left, right = text.left[found.first], text.right[found.last]
    sides = {"left": left, "right": right}
    sides["title_left"] = np.where(titled >= 0, text.left[titled], missing)
    sides["title_right"] = np.where(titled >= 0, text.right[titled + found.n - 1], missing)
    for name, keys, strength in (
        ("phrase", corpus.stems[found.phrase], 3),
        ("head", head, 10),
        ("tail", tail, 10),
        ("head_end", corpus.ends[1][head], 20),
        ("tail_end", corpus.ends[1][tail], 20),
        ("tail_end3", corpus.ends[0][tail], 20),
        *((name, keys, 10) for name, keys in sides.items()),
    ):
        learned[f"rate_{name}"] = rates(keys, hits, inner, strength)
    for name, keys in (("left", text.left[found.begin]), ("right", text.right[found.end])):
        rate = rates(keys, hits[found.of], inner[found.of], 10)
        learned[f"rates_{name}"] = np.bincount(found.of, rate) / np.bincount(found.of)
    # How often papers have a word in one of their keywords, of the papers that have it in their text.
    marks = np.bincount(found.first, hits, len(text.word) + 1) - np.bincount(found.last + 1, hits, len(text.word) + 1)
    covered = np.bincount(text.pair, np.cumsum(marks)[:-1] > 0) > 0
    word_rate = rates(text.pair_word, covered.astype(float), folds[text.pair_paper], 5)[text.pair]
    learned["word"] = mean_over(word_rate, found)
    learned["word_least"] = np.minimum(word_rate[found.first], word_rate[found.last])
    learned["word_left"] = np.where(left < count, word_rate[found.first - 1], -1)
    gap = np.full(len(more_paper), -1.0)  # what doesn't apply is -1: the trees stumble over columns of nothing but NaN
    f |= {name: np.append(values, gap) for name, values in {**found.features, **learned}.items()}
    f["n"][len(found.paper) :] = [len(corpus.phrases[i].split()) for i in more_phrase]
    for name in ("tf_idf", "rate_head", "rate_phrase", "word", "near", "alone_count"):
        f[f"rank_{name}"] = rank(paper, f[name])
    return f, paper, phrase, hit


# ---- ranking ---------------------------------------------------------------------------------------------------------


def rank(paper, values):
    """Each candidate's place (0 = first) in its paper by falling value; ties keep their order."""
    order = np.lexsort((-values, paper))
    starts = np.flatnonzero(np.diff(paper[order], prepend=-1))
    places = np.empty(len(values), dtype=np.int64)
    places[order] = np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))
    return places


def fit_trees(x, hit, seed):
    """Boosted trees from all right candidates and a share of the wrong ones. Returns a function: features [candidates,
    features] → P(keyword), corrected for that share."""
    negatives = NEGATIVES if len(hit) > 5000 else 1  # of few, all
    chosen = hit | (np.random.default_rng(seed).random(len(hit)) < negatives)
    trees = HistGradientBoostingClassifier(
        **TREES, min_samples_leaf=40, l2_regularization=5, early_stopping=False, random_state=seed
    ).fit(x[chosen], hit[chosen])

    def predict(asked):
        odds = trees.predict_proba(asked)[:, 1] if len(asked) else np.zeros(0)
        return odds / (odds + (1 - odds) / negatives)

    return predict


def rate_once(corpus, folds, asked, seed):
    """learn_and_rate over one partition; the fold's number is added to the seed of its trees."""
    f, paper, phrase, hit = add_learned(corpus, folds)
    wanted = ((folds >= 0) | asked)[paper]
    x = np.column_stack([values[wanted] for values in f.values()]).astype(np.float32)
    paper, phrase, hit = paper[wanted], phrase[wanted], hit[wanted]
    fold, prob, count = folds[paper], np.zeros(len(paper)), folds.max() + 1

    def rate(own):
        """Of the fold and of the asked papers."""
        learn, rated = (fold >= 0) & (fold != own), (fold == own) | (fold < 0)
        if not 0 < hit[learn].sum() < learn.sum():  # nothing to learn from: by TF-IDF
            weight = (f["tf_idf"] * np.maximum(f["alone"], 0))[wanted][rated]
            return rated, 1 / (2 + rank(paper[rated], weight))
        with threadpool_limits(1, user_api="openmp"):  # a fold a core: threads within so small a fit mostly wait
            return rated, fit_trees(x[learn], hit[learn], seed + own)(x[rated])

    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        for rated, by_fold in pool.map(rate, range(count)):
            prob[rated] += by_fold / np.where(fold[rated] < 0, count, 1)
    return paper, phrase, prob


def learn_and_rate(corpus, partitions, asked):
    """Rate the candidates of each paper, by trees that learned from the papers of the other folds, and average that
    over partitions. partitions: int array [partitions, papers], the fold of a paper to learn from, -1 for any other;
    asked: bool array [papers], those of them to rate, too, by the mean of all folds' trees. Returns (paper, phrase,
    P(keyword)), arrays [candidates]; a keyword that one partition doesn't propose counts as 0 there.
    """
    rated = [
        rate_once(corpus, folds, asked, i * (folds.max() + 1))
        for i, folds in enumerate(tqdm(partitions, desc="partitions"))
    ]
    paper, phrase, prob = map(np.concatenate, zip(*rated))
    key, same = np.unique(paper * len(corpus.phrases) + phrase, return_inverse=True)
    return *np.divmod(key, len(corpus.phrases)), np.bincount(same, prob) / len(partitions)

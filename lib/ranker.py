"""How likely a candidate is to be a keyword of its paper: what the keywords of other papers teach, and boosted trees.

Candidates are the phrases of a paper (candidates.py) and the keywords of training papers like it. What is learned from
keywords is cross-fitted over folds: a paper's features and the trees that rate it come from the keywords of the other
folds. The features of those other papers do count the keywords of its fold, but by measurement scores out of fold and
of papers never seen agree. All of it is averaged over several partitions into folds: one set of trees varies much more.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lib.candidates import STOP, Candidates, find_candidates, stem

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits
from tqdm import tqdm

NEIGHBOURS, PROPOSED = 40, 30  # labelled papers asked for keywords, and how many of those keywords become candidates
TREES = {"max_iter": 100, "learning_rate": 0.1, "max_leaf_nodes": 31, "max_features": 0.2, "min_samples_leaf": 40,
         "l2_regularization": 5}  # fmt: skip
NEGATIVES = 0.25  # share of the wrong candidates that a fold's trees learn from
RANKED = ("tf_idf", "rate_head", "rate_phrase", "near", "alone_count")  # features that a paper's own rank joins


# ---- all papers ------------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """What does not depend on the folds. The papers of train come first, then those of test, which have no keywords."""

    titles: list  # of all papers
    found: Candidates  # the phrases of the texts
    train: int  # how many papers are of train: no other paper may count for a test paper
    written: list  # for each paper: {keyword: as written}
    stems: np.ndarray  # number of the stem of each of found.phrases
    keywords: sparse.csr_matrix  # 0/1 [papers, phrases]
    tfidf: sparse.csr_matrix  # [papers, words]


def build_corpus(train, test, written):
    """The Corpus of two frames. written: for each paper of train {keyword: as written}, from split_keywords."""
    titles, abstracts = ([*train[name], *test[name]] for name in ("title", "abstract"))
    owner = np.repeat(np.arange(len(train)), [len(keywords) for keywords in written])
    known = [keyword for keywords in written for keyword in keywords]
    found = find_candidates(titles, abstracts, known)
    numbers = {phrase: i for i, phrase in enumerate(found.phrases)}
    places = (owner, [numbers[keyword] for keyword in known])
    return Corpus(
        titles=titles,
        found=found,
        train=len(train),
        written=[*written, *({} for _ in range(len(test)))],
        stems=ids_of([stem(phrase) for phrase in numbers]),
        keywords=sparse.csr_matrix((np.ones(len(known)), places), shape=(len(titles), len(numbers))),
        tfidf=weigh_words([f"{title}\n{abstract}" for title, abstract in zip(titles, abstracts)], len(train)),
    )


def ids_of(items):
    """["b", "a", "b"] -> array [0, 1, 0]: each item's number by first appearance."""
    return pd.factorize(np.array(items, dtype=object))[0]


def weigh_words(texts, train):
    """TF-IDF of the words of texts, as the first `train` of them weigh words: sparse float32 [texts, words]."""
    weights = TfidfVectorizer(stop_words=list(STOP), sublinear_tf=True, token_pattern=r"\w\w+", dtype=np.float32)
    return weights.fit([*texts[:train], "word"]).transform(texts)  # scikit-learn wants one word at least


# ---- what keywords of other folds teach ------------------------------------------------------------------------------


def lookup(matrix, rows, columns):
    """The entries of a sparse matrix at these places; scipy itself takes no empty index."""
    return np.asarray(matrix[rows, columns]).ravel() if len(rows) else np.zeros(0)


def sums_without_own_fold(keys, size, values, folds):
    """Sums of values by key (0 to size - 1) over the rows of other folds: array [folds + 1, keys]. Rows of no fold (-1)
    count for none; the last line, which index -1 finds, is of all folds.
    """
    lines = folds.max(initial=-1) + 2
    values = np.broadcast_to(values, keys.shape)
    sums = np.bincount(folds % lines * size + keys, values, lines * size).reshape(lines, size)
    sums[-1] = 0
    return sums.sum(axis=0) - sums


def rates(keys, hits, folds, strength):
    """How often a row with this key is a hit, among the rows of other folds. keys: int array [rows]; hits: 0/1; folds:
    int, -1: learn nothing from this row. `strength` weighs, in rows, the rate of all keys.
    """
    right, rows = (sums_without_own_fold(keys, keys.max(initial=0) + 1, values, folds) for values in (hits, 1))
    usual = (right.sum(axis=1) / np.maximum(rows.sum(axis=1), 1))[folds]
    return (right[folds, keys] + strength * usual) / (rows[folds, keys] + strength)


def weigh_neighbours(tfidf, folds):
    """The fitted papers of other folds most like each paper: sparse [papers, papers], each row a share that grows with
    the square of the similarity.
    """
    fitted, count = np.flatnonzero(folds >= 0), len(folds)
    neighbours, shares = [], []
    for start in range(0, count, 1000):  # a block of papers at a time, for the memory
        block = (tfidf[start : start + 1000] @ tfidf[fitted].T).toarray()
        block[folds[start : start + 1000, None] == folds[fitted]] = 0
        nearest = np.argsort(-block, axis=1, kind="stable")[:, :NEIGHBOURS]
        weight = np.take_along_axis(block, nearest, axis=1) ** 2
        neighbours.append(fitted[nearest])
        shares.append(weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-9))
    columns, values = np.concatenate(neighbours), np.concatenate(shares)
    rows = np.repeat(np.arange(count), columns.shape[1])
    return sparse.csr_matrix((values.ravel(), (rows, columns.ravel())), shape=(count, count))


@dataclass
class View:
    """The candidates with what the keywords of other folds say: those of the texts, in the order of corpus.found, then
    the keywords proposed by similar papers.
    """

    corpus: Corpus
    folds: np.ndarray  # [papers]: the fold of a paper to learn from, -1 for any other
    paper: np.ndarray  # [candidates]
    phrase: np.ndarray  # [candidates]: index into corpus.found.phrases
    hit: np.ndarray  # bool [candidates]: it is a keyword of that paper
    known: np.ndarray  # [candidates]: how many fitted papers of other folds have the keyword
    near: np.ndarray  # [candidates]: the weighted share of similar papers, of other folds, that have it


def make_view(corpus, folds):
    """The View of the candidates by these folds."""
    found, (owner, keyword) = corpus.found, corpus.keywords.nonzero()
    known = sums_without_own_fold(keyword, len(found.phrases), 1, folds[owner])
    near = (weigh_neighbours(corpus.tfidf, folds) @ corpus.keywords).tocsr()
    more_paper, more_phrase = propose(found, folds, near.tocoo(), known)
    paper, phrase = np.append(found.paper, more_paper), np.append(found.phrase, more_phrase)
    hit = lookup(corpus.keywords, paper, phrase) > 0
    return View(corpus, folds, paper, phrase, hit, known[folds[paper], phrase], lookup(near, paper, phrase))


def propose(found, folds, near, known):
    """Keywords of the similar papers that are not candidates yet: the PROPOSED likeliest of each paper, of those that
    two or more papers have. Returns (paper, phrase), int arrays.
    """
    paper, phrase, share = near.row.astype(np.int64), near.col, near.data
    size = near.shape[1]
    new = ~np.isin(paper * size + phrase, found.paper * size + found.phrase)
    chosen = new & (known[folds[paper], phrase] >= 2) & (share > 0)
    paper, phrase, share = paper[chosen], phrase[chosen], share[chosen]
    likely = rank(paper, share) < PROPOSED
    return paper[likely], phrase[likely]


# ---- features that keywords teach ------------------------------------------------------------------------------------


def known_keywords(view):
    """How many papers, and how many of the similar ones, have the candidate as a keyword."""
    return {"known": view.known, "near": view.near, "near_lift": view.near / (view.known + 1)}


def phrase_rates(view):
    """How often a phrase in a text is a keyword, and any phrase with such words at its ends or beside it."""
    found = view.corpus.found
    folds, hits = view.folds[found.paper], view.hit[: len(found.paper)].astype(float)
    endings = ids_of([word[-4:] for word in found.words])
    features = {}
    for name, keys, strength in (
        ("phrase", view.corpus.stems[found.phrase], 3),
        ("head", found.head, 10),
        ("tail", found.tail, 10),
        ("head_end", endings[found.head], 20),
        ("tail_end", endings[found.tail], 20),
    ):
        features[f"rate_{name}"] = rates(keys, hits, folds, strength)
    tf = np.bincount(found.of)
    for name, keys in (("left", found.left), ("right", found.right)):  # the mean over all places
        there = rates(keys, hits[found.of], folds[found.of], 10)
        features[f"rate_{name}"] = np.bincount(found.of, there) / tf
    return features


def word_rates(view):
    """How often the first and the last word are part of a keyword of the papers that hold them."""
    found, features = view.corpus.found, {}
    own = [set(" ".join(keywords).split()) for keywords in view.corpus.written]
    for name, ends in (("head", found.head), ("tail", found.tail)):
        used = np.array([found.words[word] in own[paper] for word, paper in zip(ends, found.paper)], dtype=float)
        features[f"word_{name}"] = rates(ends, used, view.folds[found.paper], 10)
    return features


def frequency(view):
    """How often a phrase occurs in its paper, and in how few other papers of train."""
    found, train = view.corpus.found, view.corpus.train
    in_train = found.paper < train
    others = np.bincount(found.phrase[in_train], minlength=len(found.phrases))[found.phrase] - in_train
    return {"tf_idf": np.bincount(found.of) * np.log((train + 1) / (others + 1))}


FEATURES = (known_keywords, phrase_rates, word_rates, frequency)  # each: View -> {name: array [candidates]}


def make_features(view):
    """All features {name: array [candidates]}. What a proposed keyword lacks, since it is in no text, is -1."""
    features = dict(view.corpus.found.features)
    for function in FEATURES:
        features |= function(view)
    for name, values in features.items():
        features[name] = np.append(values, np.full(len(view.paper) - len(values), -1.0)).astype(np.float32)
    for name in RANKED:
        if name in features:
            features[f"rank_{name}"] = rank(view.paper, features[name]).astype(np.float32)
    return features


# ---- ranking ---------------------------------------------------------------------------------------------------------


def rank(paper, values):
    """Each candidate's place (0 = first) in its paper by falling value; ties keep their order."""
    return pd.Series(-values).groupby(paper).rank(method="first").to_numpy().astype(np.int64) - 1


def cross_fit(fold, rate):
    """Rate each row by what the other folds teach; rows of no fold (-1) get the mean of all folds' ratings. Returns a
    float array [rows]. rate(number, learn, asked): ratings of the rows `asked`, learned from the rows `learn`.
    """
    ratings, count = np.zeros(len(fold)), fold.max(initial=0) + 1

    def rate_fold(number):
        asked = np.flatnonzero((fold == number) | (fold < 0))
        with threadpool_limits(1, user_api="openmp"):  # a fold a core: threads within so small a fit mostly wait
            return asked, rate(number, (fold >= 0) & (fold != number), asked)

    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        for asked, values in pool.map(rate_fold, range(count)):
            ratings[asked] += values / np.where(fold[asked] < 0, count, 1)
    return ratings


def rate_once(corpus, folds, seed):
    """learn_and_rate over one partition; the fold's number is added to the seed of its trees."""
    view = make_view(corpus, folds)
    features = make_features(view)
    x = np.column_stack([*features.values()])

    def rate(number, learn, asked):
        learn = np.flatnonzero(learn)
        if not 0 < view.hit[learn].sum() < len(learn):  # nothing to learn from
            return 1 / (2 + rank(view.paper[asked], features["tf_idf"][asked]))
        drawn = NEGATIVES if len(learn) > 5000 else 1  # of few, all
        learn = learn[view.hit[learn] | (np.random.default_rng(seed + number).random(len(learn)) < drawn)]
        trees = HistGradientBoostingClassifier(**TREES, early_stopping=False, random_state=seed + number)
        prob = trees.fit(x[learn], view.hit[learn]).predict_proba(x[asked])[:, 1]
        return prob / (prob + (1 - prob) / drawn)  # weights for the drawn ones would do, too, but take thrice the time

    return view.paper, view.phrase, cross_fit(folds[view.paper], rate)


def learn_and_rate(corpus, partitions, most):
    """Rate the candidates of each paper by trees that learned from the papers of the other folds, and average that over
    partitions. partitions: int array [partitions, papers], the fold of a paper to learn from, -1 for any other, which
    gets the mean of all folds' trees. A keyword that one partition does not propose counts as 0 there. Returns (paper,
    phrase, P(keyword)), arrays, of the `most` likeliest candidates of each paper, by paper and falling P.
    """
    rated = []
    for i, folds in enumerate(tqdm(partitions, desc="partitions")):
        rated.append(rate_once(corpus, folds, i * (folds.max() + 1)))
    paper, phrase, prob = (np.concatenate(arrays) for arrays in zip(*rated))
    size = len(corpus.found.phrases)
    key, same = np.unique(paper * size + phrase, return_inverse=True)
    paper, phrase = np.divmod(key, size)
    prob = np.bincount(same, prob) / len(partitions)
    chosen = np.lexsort((-prob, paper))  # ties keep their order
    chosen = chosen[rank(paper[chosen], prob[chosen]) < most]
    return paper[chosen], phrase[chosen], prob[chosen]

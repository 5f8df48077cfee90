"""How likely a candidate is to be one of its paper's keywords: what the keywords of other papers teach, and two stages
of boosted trees. For extract_keywords.py.

Candidates are the phrases that stand in a paper and the keywords of training papers like it.

What is learned from keywords is cross-fitted: a paper's features never see the keywords of its own fold, so they mean
the same on unseen papers. The second stage knows how the first rated all candidates of the paper.
"""

from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer

import common
from phrases import STOP, find_candidates, mean_over, number, split_keywords, stem, stem_word

INNER = 6  # folds within the fitted papers, by which rates and neighbours are cross-fitted
NEIGHBOURS, PROPOSED = 40, 30  # labelled papers asked for keywords, and how many of those keywords become candidates
STAGES = (
    {"max_iter": 60, "learning_rate": 0.12, "max_leaf_nodes": 31, "max_features": 0.5},
    {"max_iter": 250, "learning_rate": 0.05, "max_leaf_nodes": 15, "max_features": 0.8},
)
KEPT = 60  # candidates a paper that reach the second stage
NEGATIVES = (0.15, 0.5)  # share of the wrong candidates that each stage learns from


# ---- what keywords teach ---------------------------------------------------------------------------------------------


def build_corpus(train, test):
    """Everything about all papers that doesn't depend on the fold. Papers of train come first. Returns a namespace:
    found (find_candidates), keywords and stem_keywords (sparse 0/1 [papers, phrases] and [papers, stems]; test papers
    have none), phrases (candidates' and keywords'), numbers (their places in that), stems (their stems' numbers),
    seen_first (when a keyword first comes up), casing (how train writes it), paper_words (a
    set of stemmed words a paper), ends (numbers of the words' last 3 and 4 letters), tfidf ([papers, words]).
    """
    papers = {name: [*train[name], *test[name]] for name in ("title", "abstract")}
    found = find_candidates(papers, len(train))
    numbers = {phrase: i for i, phrase in enumerate(found.phrases)}
    casing, rows, columns = defaultdict(Counter), [], []
    for paper, cell in enumerate(train["Keywords"]):
        for keyword, written in split_keywords(cell).items():
            casing[keyword][written] += 1
            rows.append(paper)
            columns.append(numbers.setdefault(keyword, len(numbers)))
    phrases = list(numbers)
    later = [found.stems.setdefault(stem(phrase), len(found.stems)) for phrase in phrases[found.count :]]
    stems = np.append(found.stem, np.array(later, dtype=np.int64))
    corpus = SimpleNamespace(found=found, phrases=phrases, stems=stems, casing=casing, count=len(papers["title"]))
    rows, columns, ones = np.array(rows, int), np.array(columns, int), np.ones(len(rows), np.float32)
    corpus.keywords = sparse.csr_matrix((ones, (rows, columns)), shape=(corpus.count, len(phrases)))
    corpus.stem_keywords = sparse.csr_matrix((ones, (rows, stems[columns])), shape=(corpus.count, len(found.stems)))
    corpus.numbers, corpus.seen_first = numbers, np.zeros(len(phrases), dtype=np.int64)
    corpus.seen_first[columns[::-1]] = np.arange(len(columns))[::-1]
    corpus.paper_words = [set() for _ in range(corpus.count)]
    for paper, word in zip(found.text.paper, map(stem_word, map(str.lower, found.text.written))):
        corpus.paper_words[paper].update(word.split(" "))
    corpus.ends = [number(w[-n:] for w in found.text.words)[0] for n in (3, 4)]
    texts = common.build_text(papers, ["title", "abstract"])
    weights = TfidfVectorizer(stop_words=list(STOP), sublinear_tf=True, token_pattern=r"\w\w+", dtype=np.float32)
    try:
        weights.fit(texts[: len(train)])
        corpus.tfidf = weights.transform(texts)
    except ValueError:  # no words at all
        corpus.tfidf = sparse.csr_matrix((corpus.count, 1), dtype=np.float32)
    return corpus


def rates(keys, hits, folds, strength):
    """How often `hits` holds where a key stands, among the fitted papers of other folds. keys: int array; hits: 0/1;
    folds: the paper's inner fold, -1 for a paper not fitted. `strength` weighs, in rows, the rate of all keys.
    """
    fitted, size = folds >= 0, keys.max(initial=0) + 1
    own = np.where(fitted, folds * size + keys, 0)
    counts = []
    for values in (np.ones(len(keys)), hits):
        by_fold = np.bincount(own[fitted], values[fitted], INNER * size).reshape(INNER, size)
        of_key = by_fold.sum(axis=0)[keys] - fitted * by_fold.ravel()[own]
        counts.append((of_key, np.append(by_fold.sum() - by_fold.sum(axis=1), by_fold.sum())[folds]))
    (rows, all_rows), (right, all_right) = counts
    return (right + strength * all_right / np.maximum(all_rows, 1)) / (rows + strength)


def entries(matrix, rows, columns):
    """The entries of a sparse matrix at these places; scipy itself takes no empty index."""
    return np.asarray(matrix[rows, columns]).ravel() if len(rows) else np.zeros(0)


def others(matrix, folds):
    """Column sums of a sparse 0/1 [papers, columns] over the fitted papers of the other folds. Returns a dense float32
    array [INNER + 1, columns]; row -1 is the sum for the papers that aren't fitted.
    """
    sums = [np.asarray(matrix[(folds >= 0) & (folds != fold)].sum(axis=0)).ravel() for fold in range(INNER)]
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
    """The candidates with what is learned from keywords. folds: int array [papers], the inner fold of a fitted paper,
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
    papers = (fitted - np.append(np.bincount(folds[folds >= 0], minlength=INNER), 0))[fold]
    papers = np.maximum(papers, 1)
    f = {"known": known[fold, phrase] / papers, "known_stem": known_stems[fold, stems] / papers}
    f["known_form"] = (known[fold, phrase] + 0.5) / (known_stems[fold, stems] + 1)
    f["near"], f["near_stem"] = entries(shares, paper, phrase), entries(stem_shares, paper, stems)
    f["near_lift"] = f["near"] / (f["known"] + 1 / papers)
    present = [
        np.mean([word in corpus.paper_words[p] for word in stem(corpus.phrases[i]).split(" ")])
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
    pair, same = np.unique(text.paper * count + text.word, return_inverse=True)
    covered = np.bincount(same, np.cumsum(marks)[:-1] > 0) > 0
    word_rate = rates(pair % count, covered.astype(float), folds[pair // count], 5)[same]
    learned["word"] = mean_over(word_rate, found)
    learned["word_least"] = np.minimum(word_rate[found.first], word_rate[found.last])
    learned["word_left"] = np.where(left < count, word_rate[found.first - 1], -1)
    learned["word_right"] = np.where(right < count, np.append(word_rate, 0)[found.last + 1], -1)
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


def fit_trees(x, hit, negatives, settings, seed):
    """Boosted trees from all right candidates and a share of the wrong ones. Returns a function: features [candidates,
    features] → P(keyword), corrected for that share."""
    negatives = negatives if len(hit) > 5000 else 1  # of few, all
    chosen = hit | (np.random.default_rng(seed).random(len(hit)) < negatives)
    trees = HistGradientBoostingClassifier(
        **settings, min_samples_leaf=40, l2_regularization=5, early_stopping=False, random_state=seed
    ).fit(x[chosen], hit[chosen])

    def predict(asked):
        odds = trees.predict_proba(asked)[:, 1] if len(asked) else np.zeros(0)
        return odds / (odds + (1 - odds) / negatives)

    return predict


def fit_predict(corpus, fitted, asked, seed):
    """Learn from the papers `fitted` and rate the candidates of the papers `asked` (bool arrays [papers]).
    Returns (paper, phrase, P(keyword)), arrays [candidates that reached the second stage]."""
    folds = np.full(corpus.count, -1)
    folds[fitted] = np.random.default_rng(seed).permutation(fitted.sum()) % INNER
    f, paper, phrase, hit = add_learned(corpus, folds)
    use = (fitted | asked)[paper]
    x = np.column_stack([values[use] for values in f.values()]).astype(np.float32)
    paper, phrase, hit = paper[use], phrase[use], hit[use]
    learn, third = fitted[paper], folds[paper] % 3
    parts = [learn & (third == part) for part in range(3)]
    if not all(0 < hit[rows].sum() < rows.sum() for rows in parts):  # nothing to learn from: by TF-IDF
        prob = 1 / (2 + rank(paper, (f["tf_idf"] * np.maximum(f["alone"], 0))[use]))
        return paper[~learn], phrase[~learn], prob[~learn]
    prob = np.zeros(len(x))
    for rows in parts:
        predict = fit_trees(x[learn & ~rows], hit[learn & ~rows], NEGATIVES[0], STAGES[0], seed)
        prob[rows] = predict(x[rows])
        prob[~learn] += predict(x[~learn]) / 3
    place = rank(paper, prob)
    kept = place < KEPT
    x, paper, phrase, hit, prob, place, learn = (a[kept] for a in (x, paper, phrase, hit, prob, place, learn))
    total, best = np.bincount(paper, prob), np.zeros(corpus.count)
    np.maximum.at(best, paper, prob)
    x = np.column_stack([x, prob, place, total[paper], prob / best[paper]]).astype(np.float32)
    predict = fit_trees(x[learn], hit[learn], NEGATIVES[1], STAGES[1], seed)
    return paper[~learn], phrase[~learn], predict(x[~learn])

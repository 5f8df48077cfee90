"""How a keyword is written: "Deep learning", "deep learning", "Deep Learning" or both, for a board that counts casing.

    entries = list_entries(corpus, rated, folds)   # for each paper {as written: keyword}, the likeliest first

An entry is a pair of phrase and casing. Boosted trees learn from the training papers' own keywords which casing
P(casing | phrase, paper) a keyword has; P(entry) = P(keyword) x P(casing). All of it is cross-fitted over the folds of
papers: how a paper writes its own keywords changes no feature of its entries.
"""

from array import array
from collections import Counter, defaultdict

from lib.candidates import STOP
from lib.ranker import cross_fit, lookup, weigh_neighbours

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

TREES = {"max_iter": 80, "learning_rate": 0.08, "max_leaf_nodes": 15, "min_samples_leaf": 30}


def has_capital(phrase):
    """'DNA of E. coli' -> True, 'pH' -> False."""
    return phrase[:1] != phrase[:1].lower()


def capitalise(phrase):
    """'deep learning of pH' -> 'Deep learning of pH'."""
    return phrase[:1].upper() + phrase[1:]


def title_case(phrase):
    """'quality of life' -> 'Quality of Life'."""
    return " ".join([word if word in STOP else capitalise(word) for word in phrase.split(" ")])


def capital_share(words):
    """The share of words that begin with a capital, 0 if there are none."""
    return sum(map(has_capital, words)) / max(len(words), 1)


def most_common(counter):
    """The keys of a Counter, the most frequent first; ties by alphabet, for the order in the file must not matter."""
    return sorted(counter, key=lambda key: (-counter[key], key))


def casings(phrase, in_text, elsewhere):
    """The ways in which a phrase may be written, without repetition. in_text: as the paper writes it, or None;
    elsewhere: Counter of how other papers write this keyword.
    """
    likely = in_text or phrase
    ways = [likely, capitalise(likely), phrase, capitalise(phrase), title_case(phrase)]
    return list(dict.fromkeys([*ways, *most_common(elsewhere)[:3]]))


def describe(written, phrase, in_text, elsewhere):
    """The features of one casing, a tuple of numbers."""
    total, rest = elsewhere.total(), written.split(" ")[1:]
    usual = in_text or (most_common(elsewhere)[0] if total else phrase)
    capitals = sum(count for other, count in elsewhere.items() if has_capital(other))
    return (
        has_capital(written),
        written[1:] == phrase[1:],  # all in lower case but for the first letter
        capital_share(rest),
        len(rest),
        written == title_case(phrase),
        written == in_text if in_text else -1,
        written[1:] == usual[1:],
        has_capital(usual),
        elsewhere[written] / total if total else -1,
        (capitals + 1) / (total + 3),
        len(phrase.split(" ")[0]),
    )


def count_writings(corpus, folds):
    """How the fitted papers write keywords: {(fold, keyword): Counter of writings}; fold None is of all folds."""
    counts = defaultdict(Counter)
    for paper in np.flatnonzero(folds >= 0):
        for keyword, written in corpus.written[paper].items():
            counts[folds[paper], keyword][written] += 1
            counts[None, keyword][written] += 1
    return counts


def describe_entries(corpus, rated, folds):
    """All entries of rated candidates: their candidate (index into rated), how they are written (list of str), features
    (float32 [entries, features]), whether the paper has exactly that keyword (bool). Arguments as for list_entries.
    """
    counts, nowhere, found = count_writings(corpus, folds), Counter(), corpus.found
    in_texts = dict(zip(zip(found.paper.tolist(), found.phrase.tolist()), found.written))
    title_capitals = [capital_share([w for w in title.split()[1:] if w.lower() not in STOP]) for title in corpus.titles]
    capitals = np.array([capital_share(keywords.values()) for keywords in corpus.written])
    neighbours_capitals = weigh_neighbours(corpus.tfidf, folds) @ capitals
    candidates, written, features, correct = [], [], array("f"), []
    for i, (paper, phrase) in enumerate(zip(*rated[:2])):
        keyword, in_text = found.phrases[phrase], in_texts.get((paper, phrase))
        elsewhere = counts.get((None, keyword), nowhere) - counts.get((folds[paper], keyword), nowhere)
        for casing in casings(keyword, in_text, elsewhere):
            candidates.append(i)
            written.append(casing)
            features.extend(describe(casing, keyword, in_text, elsewhere))
            features.extend((title_capitals[paper], neighbours_capitals[paper]))
            correct.append(corpus.written[paper].get(keyword) == casing)
    features = np.array(features, np.float32).reshape(len(candidates), -1)
    return np.array(candidates), written, features, np.array(correct)


def list_entries(corpus, rated, folds):
    """The entries of each paper, the likeliest first: list [papers] of {as written: keyword}. rated: from
    learn_and_rate; folds: int array [papers], the fold of a paper to learn from, -1 for any other.
    """
    candidate, written, x, correct = describe_entries(corpus, rated, folds)
    paper, phrase, prob = (values[candidate] for values in rated)
    is_keyword = lookup(corpus.keywords, paper, phrase) > 0

    def rate(number, learn, asked):  # P(casing | keyword), learned from entries that are keywords
        learn = learn & is_keyword
        if not 0 < correct[learn].sum() < learn.sum():
            return np.ones(len(asked))  # nothing to learn from: the first one of casings()
        trees = HistGradientBoostingClassifier(**TREES, early_stopping=False, random_state=number)
        return trees.fit(x[learn], correct[learn]).predict_proba(x[asked])[:, 1]

    prob = prob * cross_fit(folds[paper], rate)
    entries = [{} for _ in corpus.titles]
    for i in np.lexsort((-prob, paper)):  # ties keep the order of rated
        entries[paper[i]].setdefault(written[i], corpus.found.phrases[phrase[i]])
    return entries

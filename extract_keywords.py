"""Task 2: keywords for papers that come without any, learned from the training papers' own. Seconds, no torch.

    python extract_keywords.py                    out-of-fold scores, keywords of every test paper
    python extract_keywords.py --top 5            always five keywords a paper

In: train.csv with Keywords, test.csv. Out: outputs/keywords/test.csv (uuid, Keywords joined by "; "),
outputs/keywords/metrics.json, and submit_task2.csv (uuid, Keywords) in the current directory.

Candidates are the phrases of a paper's title and abstract, and the keywords of training papers like it. Boosted trees
rank them in two stages: the second knows how the first rated the paper's overlapping candidates. What is learned from
keywords is cross-fitted: a paper's features never see the keywords of its own fold, so they mean the same on unseen
papers. Scores are out of fold; a test paper gets the mean rating of all folds' models.
"""

import os
import re
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import common
from common import InputError, log, run_script, whole

MOST = 30  # keywords a paper, the challenge's limit
LONGEST = 5  # words a phrase
INNER = 6  # folds within the fitted papers, by which rates and neighbours are cross-fitted
NEIGHBOURS, PROPOSED = 40, 30  # labelled papers asked for keywords, and how many of those keywords become candidates
STAGES = (
    {"max_iter": 60, "learning_rate": 0.12, "max_leaf_nodes": 31},
    {"max_iter": 250, "learning_rate": 0.05, "max_leaf_nodes": 15},
)
BAGS = 2  # models of the second stage, averaged
KEPT = 60  # candidates a paper that reach the second stage
NEGATIVES = (0.15, 0.5)  # share of the wrong candidates that each stage learns from
WORD = re.compile(r"[A-Z]\.(?= [a-z])|\w+(?:[-‐‑–'’.+_]\w+)*\+*")  # one word: "E." of "E. coli", "IL-6", "PM2.5"
PUNCTUATION = ".,;:()[]-–—/'\"%=<>"
TERMS = (
    "system fire mine mill bill cry thick thin interest amount half part side back front top bottom full name con de co"
)
STOP = (ENGLISH_STOP_WORDS - set(TERMS.split())) | {"e.g", "i.e", "using", "based", "used", "use"}


# ---- keywords --------------------------------------------------------------------------------------------------------


def normalise(keyword):
    """The form in which keywords are compared: lower case, single blanks, no trailing period."""
    return " ".join(keyword.lower().split()).rstrip(". ")


def split_keywords(cell):
    """A Keywords cell as {normalised: as written}, in the cell's order. Commas part keywords where no ';' does."""
    parts = cell.split(";") if ";" in cell else cell.split(", ")
    written = {}
    for part in parts:
        if keyword := normalise(part):
            written.setdefault(keyword, part.strip().rstrip(". "))
    return written


@cache
def stem_word(word):
    """Singular of a plural, roughly, the parts of a compound apart: 'studies' → 'study', 'T-cells' → 'T cell'."""
    if "-" in word.strip("-"):
        return " ".join(map(stem_word, filter(None, word.split("-"))))
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "sui" else word


def stem(phrase):
    """What singular and plural, hyphen and blank, 'A (B)' and 'A' have in common."""
    if phrase.endswith(")"):
        phrase = re.sub(r"\s*\([^()]*\)$", "", phrase) or phrase
    return " ".join(map(stem_word, phrase.split(" ")))


# ---- candidates ------------------------------------------------------------------------------------------------------


def number(items):
    """int array: each item's number, by first appearance; and how many different ones there are."""
    seen = {}
    return np.array([seen.setdefault(item, len(seen)) for item in items], dtype=np.int64), len(seen)


def read_words(papers):
    """The words of title and abstract, paper after paper. Returns a namespace: words (list of the different ones,
    lower case) and arrays [words in all papers]: word (index into words), written (as written), paper, title (bool),
    gap (before it: 0 a new sentence, 1 a blank, else a punctuation mark), bracket (bool: just behind an opening one),
    case (0 lower, 1 Capitalised, 2 other), starts (bool: first of a sentence).
    """
    columns = defaultdict(list)
    for paper, (title, abstract) in enumerate(zip(papers["title"], papers["abstract"])):
        text, end = f"{title}\n{abstract}", 0
        for match in WORD.finditer(text):
            word, gap = match.group(), text[end : match.start()]
            mark = gap.strip()[-1:]
            starts = end == 0 or "\n" in gap or any(sign in gap for sign in (". ", "? ", "! "))
            kind = (0 if starts else 1) if gap.isspace() or not gap else PUNCTUATION.find(mark) + 3
            case = 0 if word == word.lower() else 1 if word[1:].islower() else 2
            row = (word.lower(), word, paper, match.start() < len(title), kind, mark in ("(", "["), case, starts)
            for name, value in zip(("word", "written", "paper", "title", "gap", "bracket", "case", "starts"), row):
                columns[name].append(value)
            end = match.end()
    text = SimpleNamespace(words=list(dict.fromkeys(columns["word"])))
    kinds = {"title": bool, "bracket": bool, "starts": bool, "written": object}
    columns["word"] = number(columns["word"])[0]
    for name in ("word", "written", "paper", "title", "gap", "bracket", "case", "starts"):
        setattr(text, name, np.array(columns[name], dtype=kinds.get(name, np.int64)))
    return text


def mean_over(values, found):
    """Mean of a value per word over the words of each candidate."""
    total = np.concatenate([[0], np.cumsum(values)])
    return (total[found.last + 1] - total[found.first]) / found.n


def find_candidates(papers, train_papers):
    """The candidate phrases of all papers, and the features of them that need no keywords. Document frequencies are
    those of the first `train_papers` papers, less the paper itself. A phrase crosses no punctuation and neither begins
    nor ends with a stop word; three words and more that stand only once, inside a longer phrase, are left out.

    Returns a namespace: text (of read_words, with left and right, what stands beside each word), phrases (list of str);
    arrays [candidates]: paper, phrase (index into phrases), n (words), first, last (place in text where it first begins
    and ends), final (where it last begins), titled (where it first begins in the title, -1 not there); features {name:
    array [candidates]}; arrays [occurrences]: of (candidate), begin, end (place in text); stems {stem: number}; stem,
    array [phrases].
    """
    text = read_words(papers)
    size, words, length = len(text.word), text.words, np.bincount(text.paper, minlength=len(papers))
    place = np.arange(size) - np.repeat(np.cumsum(length) - length, length)
    digits = np.array([w.replace(".", "").isdigit() for w in words], dtype=bool)[text.word]
    stop = np.array([w in STOP for w in words], dtype=bool)[text.word]
    parted = np.append((text.gap != 1) | (place == 0), True)  # from the word before; past the last word, too
    open_left = parted[:-1] | np.append(True, stop[:-1])
    open_right = parted[1:] | np.append(stop[1:], True)
    text.left = np.where(parted[:-1], len(words) + text.gap, np.append(0, text.word[:-1])[:size])
    text.right = np.where(parted[1:], len(words) + np.append(text.gap, 0)[1:], np.append(text.word, 0)[1:])
    text.sides = len(words) + len(PUNCTUATION) + 4  # words, gaps, and one for "not in the title"

    phrases, ids, at, parts = list(words), text.word.copy(), np.arange(size), []
    for n in range(1, LONGEST + 1):
        if n > 1:
            at = at[at + n - 1 < size]
            at = at[~parted[at + n - 1]]
            pairs = ids[at] * max(1, len(words)) + text.word[at + n - 1]
            _, first, same = np.unique(pairs, return_index=True, return_inverse=True)
            longer = [f"{phrases[ids[i]]} {words[text.word[i + n - 1]]}" for i in at[first]]
            ids[at] = same + len(phrases)
            phrases += longer
        begin = at[~(stop | digits)[at] & ~stop[at + n - 1]]
        parts.append((begin, begin + n - 1, ids[begin]))
    begin, end, phrase = (np.concatenate(arrays) for arrays in zip(*parts))
    _, first, of = np.unique(text.paper[begin] * len(phrases) + phrase, return_index=True, return_inverse=True)
    # Candidates are numbered by place in the text: no tie is ever decided by what other papers hold.
    of = np.argsort(np.lexsort(((end - begin)[first], begin[first])))[of]
    order = np.lexsort((begin, of))
    begin, end, phrase, of = begin[order], end[order], phrase[order], of[order]
    first = np.unique(of, return_index=True)[1]
    tf = np.bincount(of)

    def share(flags):
        """In how many of its occurrences something holds of a candidate."""
        return np.bincount(of, flags, len(tf)) / tf

    in_title = text.title[begin]
    titled = np.full(len(tf), -1)
    titled[of[in_title][::-1]] = begin[in_title][::-1]
    found = SimpleNamespace(text=text, phrases=phrases, count=len(phrases), phrase=phrase[first], titled=titled)
    found.paper, found.first, found.last = text.paper[begin[first]], begin[first], end[first]
    found.n = found.last - found.first + 1
    found.final = final = begin[np.append(first[1:], len(begin))[: len(first)] - 1]
    total = np.maximum(length[found.paper], 1)
    f = {"n": found.n, "tf": tf, "tf_share": tf / total, "paper_words": total}

    f["first"], f["first_share"], f["last_share"] = place[found.first], place[found.first] / total, place[final] / total
    f["spread"] = (final - found.first) / total
    sentence = np.cumsum(text.starts)
    f["sentence"] = sentence[found.first] - sentence[found.first - place[found.first]]
    title_words = np.bincount(text.paper, text.title, len(papers))[found.paper]
    there = titled >= 0
    f["title"] = share(in_title) * tf
    f["title_begin"] = np.where(there, place[titled] / np.maximum(title_words, 1), -1)
    f["title_end"] = np.where(there, title_words - place[titled] - found.n, -1)
    f["title_share"] = np.where(there, found.n / np.maximum(title_words, 1), 0)
    paper_word = np.unique(text.paper * len(words) + text.word, return_inverse=True)[1]
    f["words_in_title"] = mean_over((np.bincount(paper_word, text.title) > 0)[paper_word], found)

    f["alone_left"], f["alone_right"] = share(open_left[begin]), share(open_right[end])
    alone = open_left[begin] & open_right[end]
    f["alone"], f["alone_count"] = share(alone), share(alone) * tf
    f["parted_left"], f["parted_right"] = share(parted[begin]), share(parted[end + 1])
    f["bracketed"] = share(text.bracket[begin] & parted[end + 1])
    f["before_bracket"] = share(np.append(text.bracket, False)[end + 1])
    table = np.full((LONGEST + 1, size + 1), -1)  # which candidate begins here with n words
    table[end - begin + 1, begin] = of
    longest, inside = np.zeros(len(tf)), np.zeros(len(tf))
    for n in range(2, LONGEST + 1):
        start = np.flatnonzero(table[n] >= 0)
        for inner in range(1, n):
            for shift in range(n - inner + 1):
                part = table[inner, start + shift]
                np.maximum.at(longest, part[part >= 0], tf[table[n, start[part >= 0]]])
                inside += np.bincount(part[part >= 0], minlength=len(tf))
    f["inside"], f["longer_tf"], f["longer_tf_share"] = inside / tf, longest, longest / tf

    case, later = text.case[begin], ~text.starts[begin]
    f["capital"] = np.bincount(of, (case == 1) & later, len(tf)) / np.maximum(np.bincount(of, later, len(tf)), 1)
    f["upper"], f["upper_last"] = share(case == 2), share(text.case[end] == 2)
    letters = np.array([len(w) for w in words], dtype=np.int64)[text.word]
    f["letters"] = mean_over(letters, found) * found.n
    f["letters_first"], f["letters_last"] = letters[found.first], letters[found.last]
    f["hyphens"] = mean_over(np.array(["-" in w for w in words], dtype=bool)[text.word], found)
    f["digits"] = mean_over(np.array([any(c.isdigit() for c in w) for w in words], dtype=bool)[text.word], found)
    f["stop_words"] = mean_over(stop, found)

    own = found.paper < train_papers  # what the paper itself adds to the counts
    counted = np.bincount(found.phrase[own], minlength=len(phrases))[found.phrase] - own
    f["papers"], f["tf_idf"] = counted, f["tf_share"] * np.log((train_papers + 1) / (counted + 1))
    whole_tf, whole_alone = (
        np.bincount(found.phrase[own], values[own], len(phrases))[found.phrase] - own * values
        for values in (tf, f["alone_count"])
    )
    f["alone_elsewhere"] = (whole_alone + 0.5) / (whole_tf + 1)
    word_tf = np.bincount(paper_word)[paper_word]
    known = text.paper < train_papers
    seen = np.unique(text.paper[known] * len(words) + text.word[known]) % max(1, len(words))
    idf = np.log((train_papers + 1) / (np.bincount(seen, minlength=len(words))[text.word] - known + 1))
    f["idf"], f["idf_first"], f["idf_last"] = mean_over(idf, found), idf[found.first], idf[found.last]
    f["word_tf"] = mean_over(word_tf, found)
    f["cohesion"] = tf / np.minimum(word_tf[found.first], word_tf[found.last])
    found.stems = {}  # stemmed phrase: its number
    found.stem = np.array([found.stems.setdefault(stem(p), len(found.stems)) for p in phrases], dtype=np.int64)
    _, alike = np.unique(found.paper * len(phrases) + found.stem[found.phrase], return_inverse=True)
    for name in ("tf", "title", "alone_count"):
        f[f"stem_{name}"] = np.bincount(alike, f[name])[alike]

    keep = (tf > 1) | there | (f["alone"] > 0) | (found.n < 3)
    occurs = keep[of]
    found.of, found.begin, found.end = (np.cumsum(keep) - 1)[of[occurs]], begin[occurs], end[occurs]
    for name in ("paper", "phrase", "n", "first", "last", "titled", "final"):
        setattr(found, name, getattr(found, name)[keep])
    found.features = {name: values[keep].astype(np.float32) for name, values in f.items()}
    return found


# ---- what keywords teach ---------------------------------------------------------------------------------------------


def build_corpus(train, test):
    """Everything about all papers that doesn't depend on the fold. Papers of train come first. Returns a namespace:
    found (find_candidates), keywords and stem_keywords (sparse 0/1 [papers, phrases] and [papers, stems]; test papers
    have none), phrases (candidates' and keywords'), numbers (their places in that), stems (their stems' numbers),
    stem_words (the stems), seen_first (when a keyword first comes up), casing (how train writes it), paper_words (a
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
    corpus.stem_words = list(found.stems)
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
        **settings, min_samples_leaf=40, l2_regularization=5, max_features=0.5, early_stopping=False, random_state=seed
    ).fit(x[chosen], hit[chosen])

    def predict(asked):
        odds = trees.predict_proba(asked)[:, 1] if len(asked) else np.zeros(0)
        return odds / (odds + (1 - odds) / negatives)

    return predict


def overlaps(corpus, paper, phrase, prob):
    """How a paper's other candidates that share words with a candidate were rated. Returns float array [candidates, 6]:
    the best of them all, of the longer that hold it, of the shorter in it, of those with the very same words; how many
    of them are better; their sum."""
    words = [dict.fromkeys(corpus.stem_words[i].split(" ")) for i in corpus.stems[phrase]]
    lengths = np.array([len(w) for w in words], dtype=np.int64)
    rows = np.repeat(np.arange(len(words)), lengths)
    columns, different = number(zip(paper[rows], (word for some in words for word in some)))
    holds = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(words), different))
    pairs = (holds @ holds.T).sorted_indices().tocoo()
    this, other, shared = (array[pairs.row != pairs.col] for array in (pairs.row, pairs.col, pairs.data))
    all_in, holds_all = shared >= lengths[this], shared >= lengths[other]
    best = np.zeros((len(words), 4))
    for column, chosen in enumerate((shared > 0, all_in & ~holds_all, holds_all & ~all_in, all_in & holds_all)):
        np.maximum.at(best[:, column], this[chosen], prob[other[chosen]])
    better = np.bincount(this, prob[other] > prob[this], len(words))
    return np.column_stack([best, better, np.bincount(this, prob[other], len(words))])


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
    beside = overlaps(corpus, paper, phrase, prob)
    total, best = np.bincount(paper, prob), np.zeros(corpus.count)
    np.maximum.at(best, paper, prob)
    more = (prob, place, prob / (beside[:, 0] + 1e-4), total[paper], prob / best[paper])
    x = np.column_stack([x, beside, *more]).astype(np.float32)
    bags = [fit_trees(x[learn], hit[learn], NEGATIVES[1], STAGES[1], seed + i)(x[~learn]) for i in range(BAGS)]
    return paper[~learn], phrase[~learn], np.mean(bags, axis=0)


def pick(corpus, rated, threshold, top=None):
    """The keywords of each paper: those rated `threshold` or more, at least one and at most MOST, or the first `top`;
    of singular and plural, 'A (B)' and 'A' the likelier alone. Returns {paper: normalised keywords, best first}.
    """
    picked, stems = defaultdict(list), defaultdict(set)
    paper, phrase, prob = rated
    names = np.array([corpus.phrases[i] for i in phrase], dtype=str)
    for i in np.lexsort((names, -prob, paper)):
        own, key = picked[paper[i]], corpus.stems[phrase[i]]
        wanted = len(own) < (top or MOST) and (top or prob[i] >= threshold or not own)
        if wanted and key not in stems[paper[i]]:
            stems[paper[i]].add(key)
            own.append(corpus.phrases[phrase[i]])
    return picked


# ---- scores ----------------------------------------------------------------------------------------------------------


def prf(hits, picked, true):
    """Precision, recall and F1 from counts, 0 where a count is 0."""
    precision, recall = hits / max(picked, 1), hits / max(true, 1)
    return precision, recall, 2 * hits / max(picked + true, 1)


def score_keywords(picked, true):
    """Scores of keyword lists against the papers' own: lists of lists of normalised keywords, one a paper. Returns
    micro precision, recall and F1, macro F1, micro F1 of the first 5 and 10, and stemmed micro F1."""

    def micro(lists, other):
        counts = [(len(set(a) & set(b)), len(set(a)), len(set(b))) for a, b in zip(lists, other)]
        return prf(*np.sum(counts, axis=0)), np.mean([prf(*c)[2] for c in counts])

    (precision, recall, f1), macro = micro(picked, true)
    values = {"precision": precision, "recall": recall, "f1": f1, "macro_f1": macro}
    for most in (5, 10):
        values[f"f1_at_{most}"] = micro([words[:most] for words in picked], true)[0][2]
    stemmed = ([[stem(word) for word in words] for words in lists] for lists in (picked, true))
    values["stemmed_f1"] = micro(*stemmed)[0][2]
    return {name: round(float(value), 6) for name, value in values.items()}


def best_threshold(rated, total):
    """The threshold that gives the best micro F1 on rated candidates. rated: (paper, hit, prob) arrays; total: how many
    keywords the papers have."""
    paper, hit, prob = rated
    place, tried = rank(paper, prob), []
    for threshold in np.arange(0.04, 0.5, 0.01):
        chosen = (place < MOST) & ((prob >= threshold) | (place == 0))
        tried.append((prf(hit[chosen].sum(), chosen.sum(), total)[2], -threshold))
    return round(-max(tried)[1], 2)


# ---- the whole -------------------------------------------------------------------------------------------------------


def mean_rating(ratings):
    """The mean of several models' ratings of (paper, phrase); a model that didn't rate one says 0."""
    keys, same = np.unique(np.concatenate([r[0] * 2**32 + r[1] for r in ratings]), return_inverse=True)
    return keys >> 32, keys % 2**32, np.bincount(same, np.concatenate([r[2] for r in ratings])) / len(ratings)


def learn_and_rate(corpus, folds, test):
    """Fit one model a fold. folds: int array [papers], the fold that holds a labelled paper out, -1 elsewhere; test:
    bool array [papers]. Returns the out-of-fold ratings, a tuple (paper, phrase, prob) a fold, and the ratings of the
    test papers, the mean of all models."""

    def one(fold):
        with threadpool_limits(1, user_api="openmp"):  # a fold a core: threads within so small a fit mostly wait
            return fit_predict(corpus, (folds >= 0) & (folds != fold), (folds == fold) | test, fold)

    count = folds.max() + 1
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # each takes half a GB with 3,000 papers
        rated = list(tqdm(pool.map(one, range(count)), total=count, desc="folds"))
    unseen = [[array[test[arrays[0]]] for array in arrays] for arrays in rated]
    return [[array[~test[arrays[0]]] for array in arrays] for arrays in rated], mean_rating(unseen)


def pick_out_of_fold(corpus, rated, counts, top=None):
    """Keywords of the held-out papers, each fold's threshold set by the other folds. counts: int array [papers], how
    many keywords a paper has. Returns ({paper: keywords}, the threshold that all folds together set)."""
    hits = [entries(corpus.keywords, *arrays[:2]) > 0 for arrays in rated]

    def threshold(used):
        if not used:
            return 0.1
        parts = [(rated[i][0], hits[i], rated[i][2]) for i in used]
        papers = np.concatenate([np.unique(part[0]) for part in parts])
        return best_threshold([np.concatenate(arrays) for arrays in zip(*parts)], counts[papers].sum())

    picked = {}
    for fold, own in enumerate(rated):
        picked |= pick(corpus, own, threshold([i for i in range(len(rated)) if i != fold]), top)
    return picked, threshold(range(len(rated)))


def write_out(corpus, paper, keywords):
    """The Keywords cell: each keyword as most training papers write it, else as the paper does at last."""
    found, cells = corpus.found, []
    for keyword in keywords:
        if keyword in corpus.casing:
            cells.append(corpus.casing[keyword].most_common(1)[0][0])
        else:
            i = np.flatnonzero((found.paper == paper) & (found.phrase == corpus.numbers[keyword]))[0]
            cells.append(" ".join(found.text.written[found.final[i] : found.final[i] + found.n[i]]))
    return "; ".join(cells)


def read_both(args):
    """Read the two files. Returns (train, test). Raises InputError where train has no keywords to learn from."""
    train, test = common.read_papers(args.train), common.read_papers(args.test)
    if "Keywords" not in train:
        raise InputError(f"{args.train}: no column Keywords to learn from; give a file that has it with --train")
    if args.limit:
        log(f"--limit {args.limit}: only the first papers of each file")
        train, test = train.head(args.limit), test.head(args.limit)
    counts = np.array([len(split_keywords(cell)) for cell in train["Keywords"]])
    if not counts.any():
        raise InputError(f"{args.train}: column Keywords is empty in all {len(train)} rows; give papers with keywords")
    log(f"{len(train)} papers in {args.train}, {(counts > 0).sum()} with keywords; {len(test)} in {args.test}")
    return train, test, counts


def parse_args():
    parser = common.arg_parser(__doc__)
    group = parser.add_argument_group("keywords")
    group.add_argument("--method", choices=("rank",), default="rank", help="default %(default)s")
    group.add_argument("--top", type=whole, metavar="K", help=f"K keywords a paper, at most {MOST}; default: as rated")
    group.add_argument("--folds", type=whole, default=5, metavar="K", help="default %(default)s")
    group.add_argument(
        "--submit", type=Path, default=Path("submit_task2.csv"), metavar="FILE", help="default %(default)s"
    )
    args = parser.parse_args()
    if args.folds < 2:
        parser.error("--folds must be at least 2")
    if (args.top or 0) > MOST:
        parser.error(f"--top can't be above {MOST}, the challenge's limit")
    return args


def main():
    args = parse_args()
    started = time.perf_counter()
    train, test, counts = read_both(args)
    labelled = np.flatnonzero(counts)
    corpus = build_corpus(train, test)
    folds = np.full(corpus.count, -1)
    folds[labelled] = np.random.default_rng(args.seed).permutation(len(labelled)) % args.folds
    is_test = np.arange(corpus.count) >= len(train)
    held_out, unseen = learn_and_rate(corpus, folds, is_test)
    picked, threshold = pick_out_of_fold(corpus, held_out, counts, args.top)
    true = [list(split_keywords(cell)) for cell in train["Keywords"].iloc[labelled]]
    values = score_keywords([picked.get(paper, []) for paper in labelled], true)

    chosen = pick(corpus, unseen, threshold, args.top)
    common_one = max(corpus.casing, key=lambda keyword: sum(corpus.casing[keyword].values()))
    cells = [
        write_out(corpus, paper, chosen[paper]) or title.replace(";", ",") or common_one
        for paper, title in enumerate(test["title"], len(train))
    ]
    seconds = time.perf_counter() - started
    folder = args.out_dir / "keywords"
    columns = {"uuid": test["uuid"].tolist(), "Keywords": cells}
    metrics = {
        "scores": values,
        "papers": common.paper_record(train, test, len(labelled)),
        "fields": ["title", "abstract"],
        "settings": {
            "method": args.method,
            "threshold": threshold,
            "top": args.top,
            "folds": args.folds,
            "seed": args.seed,
        },
        "seconds": round(seconds, 2),
        "papers_per_second": round((len(train) + len(test)) / seconds, 1),
        "peak_memory_mb": common.peak_memory_mb(),
        "versions": common.package_versions(),
        "device": "cpu",
    }
    common.write_csv(folder / "test.csv", columns)
    common.write_json(folder / "metrics.json", metrics)
    common.write_csv(args.submit, columns)
    log(f"wrote {args.submit}: {len(test)} papers, {sum(c.count(';') + 1 for c in cells)} keywords")
    print("  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"{len(labelled)} papers out of fold, {' '.join(metrics['fields'])}; threshold {threshold}, {seconds:.1f} s")


if __name__ == "__main__":
    run_script(main)

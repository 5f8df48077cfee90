"""The words of papers, the phrases of them that could be keywords, and what can be told of a phrase without knowing any
keyword: for ranker.py and extract_keywords.py.

Candidates are phrases of 1 to 5 words of title and abstract that cross no punctuation and neither begin nor end with a
stop word.
"""

import re
from functools import cache
from types import SimpleNamespace

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

LONGEST = 5  # words a phrase
WORD = re.compile(r"([A-Z]\.(?= [a-z])|\w+(?:[-‐‑–'’.+_]\w+)*\+*)")  # one word: "E." of "E. coli", "IL-6", "PM2.5"
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
    """(int array: each item's number, by first appearance; list of the different ones)."""
    seen = {}
    return np.array([seen.setdefault(item, len(seen)) for item in items], dtype=np.int64), list(seen)


def read_words(papers):
    """The words of title and abstract, paper after paper. Returns a namespace: words (list of the different ones,
    lower case) and arrays [words in all papers]: word (index into words), written (as written), paper, place (in the
    paper, from 0), title (bool), gap (before it: 0 a line's start, 1 a blank, else a punctuation mark), bracket (bool:
    just behind an opening one), case (0 lower, 1 Capitalised, 2 other), pair (index into the next two); arrays [each
    different word of each paper]: pair_paper, pair_word.
    """
    gaps, written, lengths, title_lengths = [], [], [], []
    for title, abstract in zip(papers["title"], papers["abstract"]):
        head, tail = WORD.split(f"\n{title}"), WORD.split(f"\n{abstract}")  # gap, word, gap, …, word, gap
        parts = [*head[:-1], head[-1] + tail[0], *tail[1:]]
        gaps += parts[0:-1:2]
        written += parts[1::2]
        lengths.append(len(parts) // 2)
        title_lengths.append(len(head) // 2)
    # What can be told of a word or a gap is told once for all that are alike.
    form, forms = number(written)
    word, words = number([w.lower() for w in forms])
    text = SimpleNamespace(words=words, word=word[form], written=np.array(forms, dtype=object)[form])
    case = [0 if w == w.lower() else 1 if w[1:].islower() else 2 for w in forms]
    text.case = np.array(case, dtype=np.int64)[form]
    alike, different = number(gaps)
    text.paper = np.repeat(np.arange(len(lengths)), lengths)
    text.place = np.arange(len(form)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    marks = [gap.strip()[-1:] for gap in different]
    text.bracket = np.array([mark in ("(", "[") for mark in marks], dtype=bool)[alike]
    kinds = [PUNCTUATION.find(mark) + 3 if mark else "\n" not in gap for mark, gap in zip(marks, different)]
    text.gap = np.array(kinds, dtype=np.int64)[alike]
    text.title = text.place < np.repeat(np.array(title_lengths, dtype=np.int64), lengths)
    pairs, text.pair = np.unique(text.paper * max(1, len(words)) + text.word, return_inverse=True)
    text.pair_paper, text.pair_word = np.divmod(pairs, max(1, len(words)))
    return text


def mean_over(values, found):
    """Mean of a value per word over the words of each candidate. No sum runs over other papers, whose rounding would
    then decide ties."""
    total = np.zeros(len(found.first))
    for i in range(LONGEST):
        rows = np.flatnonzero(found.n > i)
        total[rows] += values[found.first[rows] + i]
    return total / found.n


def find_candidates(papers, train_papers):
    """The candidate phrases of all papers, and the features of them that need no keywords. Document frequencies are
    those of the first `train_papers` papers, less the paper itself. A phrase crosses no punctuation and neither begins
    nor ends with a stop word. What hardly ever is a keyword is left out: of what stands once and not in the title,
    phrases of four words and more, and those of one and three inside a longer one.

    Returns a namespace: text (of read_words, with left and right, what stands beside each word), phrases (list of str);
    arrays [candidates]: paper, phrase (index into phrases), n (words), first, last (place in text where it first begins
    and ends), final (where it last begins), titled (where it first begins in the title, -1 not there); features {name:
    array [candidates]}; arrays [occurrences]: of (candidate), begin, end (place in text); stems (list of the different
    ones) and stem (index into stems), array [phrases].
    """
    text = read_words(papers)
    size, words, place, length = len(text.word), text.words, text.place, np.bincount(text.paper)
    digits = np.array([w.replace(".", "").isdigit() for w in words], dtype=bool)[text.word]
    stop = np.array([w in STOP for w in words], dtype=bool)[text.word]
    parted = np.append((text.gap != 1) | (place == 0), True)  # from the word before; past the last word, too
    open_left = parted[:-1] | np.append(True, stop[:-1])
    open_right = parted[1:] | np.append(stop[1:], True)
    text.left = np.where(parted[:-1], len(words) + text.gap, np.append(0, text.word[:-1])[:size])
    text.right = np.where(parted[1:], len(words) + np.append(text.gap, 0)[1:], np.append(text.word, 0)[1:])
    text.sides = len(words) + len(PUNCTUATION) + 4  # words, gaps, and one for "not in the title"

    ids, count, at, parts = text.word.copy(), len(words), np.arange(size), []  # ids: of the phrase that begins there
    for n in range(1, LONGEST + 1):
        if n > 1:
            at = at[at + n - 1 < size]
            at = at[~parted[at + n - 1]]
            pairs, same = np.unique(ids[at] * max(1, len(words)) + text.word[at + n - 1], return_inverse=True)
            ids[at] = same + count
            count += len(pairs)
        begin = at[~(stop | digits)[at] & ~stop[at + n - 1]]
        parts.append((begin, begin + n - 1, ids[begin]))
    begin, end, phrase = (np.concatenate(arrays) for arrays in zip(*parts))
    _, first, of = np.unique(text.paper[begin] * count + phrase, return_index=True, return_inverse=True)
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
    found = SimpleNamespace(text=text, phrase=phrase[first], titled=titled)
    found.paper, found.first, found.last = text.paper[begin[first]], begin[first], end[first]
    found.n = found.last - found.first + 1
    found.final = final = begin[np.append(first[1:], len(begin))[: len(first)] - 1]
    total = np.maximum(length[found.paper], 1)
    f = {"n": found.n, "tf": tf, "tf_share": tf / total}

    f["first"], f["last_share"] = place[found.first], place[final] / total
    f["spread"] = (final - found.first) / total
    title_words = np.bincount(text.paper, text.title)[found.paper]
    there = titled >= 0
    f["title_share"] = np.where(there, found.n / np.maximum(title_words, 1), 0)
    # Journals that capitalise titles also add index terms to the authors' keywords.
    telling = text.title & ~stop & (place > 0)
    capital = np.bincount(text.paper, telling & (text.case > 0)) / np.maximum(np.bincount(text.paper, telling), 1)
    f["title_case"] = capital[found.paper]
    f["words_in_title"] = mean_over((np.bincount(text.pair, text.title) > 0)[text.pair], found)

    f["alone_left"], f["alone_right"] = share(open_left[begin]), share(open_right[end])
    alone = open_left[begin] & open_right[end]
    f["alone"], f["alone_count"] = share(alone), share(alone) * tf
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
    f["inside"], f["longer_tf_share"] = inside / tf, longest / tf

    f["upper"] = share(text.case[begin] == 2)
    letters = np.array([len(w) for w in words], dtype=np.int64)[text.word]
    f["letters"] = mean_over(letters, found) * found.n
    f["letters_first"], f["letters_last"] = letters[found.first], letters[found.last]
    f["hyphens"] = mean_over(np.array(["-" in w for w in words], dtype=bool)[text.word], found)
    f["digits"] = mean_over(np.array([any(c.isdigit() for c in w) for w in words], dtype=bool)[text.word], found)
    f["stop_words"] = mean_over(stop, found)

    own = found.paper < train_papers  # what the paper itself adds to the counts
    counted = np.bincount(found.phrase[own], minlength=count)[found.phrase] - own
    f["papers"], f["tf_idf"] = counted, f["tf_share"] * np.log((train_papers + 1) / (counted + 1))
    whole_tf, whole_alone = (
        np.bincount(found.phrase[own], values[own], count)[found.phrase] - own * values
        for values in (tf, f["alone_count"])
    )
    f["alone_elsewhere"] = (whole_alone + 0.5) / (whole_tf + 1)
    word_tf = np.bincount(text.pair)[text.pair]
    known = text.paper < train_papers
    counted = np.bincount(text.pair_word[text.pair_paper < train_papers], minlength=len(words))[text.word] - known
    idf = np.log((train_papers + 1) / (counted + 1))
    f["idf"], f["idf_first"] = mean_over(idf, found), idf[found.first]
    f["word_tf"] = mean_over(word_tf, found)
    f["cohesion"] = tf / np.minimum(word_tf[found.first], word_tf[found.last])

    keep = (tf > 1) | there | (found.n == 2) | ((f["alone"] > 0) & (found.n < 4))
    occurs = keep[of]
    found.of, found.begin, found.end = (np.cumsum(keep) - 1)[of[occurs]], begin[occurs], end[occurs]
    for name in ("paper", "phrase", "n", "first", "last", "titled", "final"):
        setattr(found, name, getattr(found, name)[keep])
    found.features = {name: values[keep].astype(np.float32) for name, values in f.items()}

    _, first, found.phrase = np.unique(found.phrase, return_index=True, return_inverse=True)
    stemmed, found.phrases, stems = [stem_word(w) for w in words], [], []
    for begin, end in zip(found.first[first], found.last[first] + 1):
        number_of = text.word[begin:end].tolist()
        found.phrases.append(" ".join([words[i] for i in number_of]))
        stems.append(" ".join([stemmed[i] for i in number_of]))
    found.stem, found.stems = number(stems)
    _, alike = np.unique(found.paper * len(stems) + found.stem[found.phrase], return_inverse=True)
    for name in ("tf", "alone_count"):
        found.features[f"stem_{name}"] = np.bincount(alike, found.features[name])[alike].astype(np.float32)
    return found

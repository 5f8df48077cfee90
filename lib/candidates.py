"""The Keywords column, the phrases of a paper that could be keywords, and their features that need no keywords.

    separator = find_separator(cells)                  # ";", found once for the whole column
    split_keywords("Deep learning; CNN.", separator)   # {"deep learning": "Deep learning", "cnn": "CNN"}
    found = find_candidates(titles, abstracts, train)  # Candidates: phrases of 1 to 5 words

To add a feature, add a line to one of the functions in FEATURES below, or a function of your own:
found -> {name: array [candidates]}. benchmarks/keyword_features.py says what it is worth.
"""

import ast
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

LONGEST = 5  # words a phrase
WORD = re.compile(r"([A-Z]\.(?= [a-z])|\w+(?:[-‐‑–'’.+_]\w+)*\+*)")  # one word: "E." of "E. coli", "IL-6", "PM2.5"
CHINESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")  # written without blanks, so a "word" is a whole clause
PUNCTUATION = ".,;:()[]-–—/'\"%=<>"
START, BLANK, MARK = 0, 1, 2  # what may stand before a word; MARK + 1 + i: the i-th of PUNCTUATION, MARK: another one
TERMS = (  # words that scikit-learn takes for stop words, but that occur at the ends of keywords
    "system fire mine mill bill cry thick thin interest amount half part side back front top bottom full name con de co"
)
STOP = (ENGLISH_STOP_WORDS - set(TERMS.split())) | {"e.g", "i.e", "using", "based", "used", "use"}
SEPARATORS = {  # by name, the likeliest first; no comma between digits parts keywords ("1,2-dichloroethane")
    ";": "[;；]", "line break": "\n", ", ": "[,，] ", ",": r"[,，](?!\d)|(?<!\d)[,，]", "、": "、", "|": r"\|",
    " / ": " / ", "/": "/", "·": "·",
}  # fmt: skip


# ---- keywords --------------------------------------------------------------------------------------------------------


def normalise(keyword):
    """The form in which keywords are compared: lower case, single blanks, no period at the end."""
    return " ".join(keyword.lower().split()).rstrip(". ")


def split_cell(cell, separator=";"):
    """The keywords of a cell as written: "Deep learning; CNN." -> ["Deep learning", "CNN"]. A cell may also be a Python
    or JSON list. Where the separator does not occur, a comma and a blank separate keywords.
    """
    parts = None
    if cell.startswith("[") and cell.endswith("]"):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            parts = [str(part) for part in ast.literal_eval(cell)]
    if parts is None:
        pattern = SEPARATORS[separator]
        parts = re.split(pattern if re.search(pattern, cell) else ", ", cell)
    return [part.strip().rstrip(". ") for part in parts if normalise(part)]


def split_keywords(cell, separator=";"):
    """The different keywords of a cell, in its order: {normalised: as written}."""
    written = {}
    for keyword in split_cell(cell, separator):
        written.setdefault(normalise(keyword), keyword)
    return written


def find_separator(cells):
    """What separates the keywords of a column: the one that cuts most cells into phrases of 1 to 5 words. Returns a key
    of SEPARATORS, None if none of them cuts one cell in ten.
    """
    cells = [cell for cell in cells if cell]
    fitting = dict.fromkeys(SEPARATORS, 0)
    for name in SEPARATORS:
        for cell in cells:
            parts = split_cell(cell, name) if re.search(SEPARATORS[name], cell) or cell.startswith("[") else [cell]
            words = sum(len(part.split()) for part in parts)
            fitting[name] += len(parts) > 1 and words <= LONGEST * len(parts)
    best = max(SEPARATORS, key=fitting.get)
    return best if fitting[best] > 0.1 * len(cells) else None


@cache
def stem_word(word):
    """Singular of a plural, roughly; parts of a compound become words: 'studies' -> 'study', 'T-cells' -> 'T cell'."""
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


# ---- words -----------------------------------------------------------------------------------------------------------


def enumerate_items(items):
    """["b", "a", "b"] -> (array [0, 1, 0], ["b", "a"]): each item's number by first appearance, the different items."""
    seen = {}
    return np.array([seen.setdefault(item, len(seen)) for item in items], dtype=np.int64), list(seen)


@dataclass
class Text:
    """The words of titles and abstracts, paper after paper. The arrays have one value a word, unless said otherwise."""

    words: list  # the different words, in lower case; in the next line, an index into it
    word: np.ndarray
    written: np.ndarray  # str, as the paper writes it
    paper: np.ndarray  # its paper
    title: np.ndarray  # bool: in the title
    gap: np.ndarray  # what stands before it: START (of title or abstract), BLANK, MARK or above

    def per_word(self, value):
        """value(word) of each different word, as an array [words in all papers]."""
        return np.array([value(word) for word in self.words], dtype=float)[self.word]

    def left(self):
        """What stands before each word: the number of a word, or above all of these the kind of gap."""
        return np.where(self.gap != BLANK, len(self.words) + self.gap, np.append(0, self.word[:-1])[: len(self.gap)])

    def right(self):
        """What stands behind each word, like left()."""
        gap, word = np.append(self.gap, START)[1:], np.append(self.word, 0)[1:]
        return np.where(gap != BLANK, len(self.words) + gap, word)


def read_words(titles, abstracts):
    """The words of papers, given as two lists of str, as a Text."""
    gaps, written, lengths, title_lengths = [], [], [], []
    for title, abstract in zip(titles, abstracts):
        of_title, of_abstract = WORD.split(f"\n{title}"), WORD.split(f"\n{abstract}")  # gap, word, gap, …, word, gap
        for parts in (of_title, of_abstract):
            gaps += parts[:-1:2]
            written += parts[1::2]
        title_lengths.append(len(of_title) // 2)
        lengths.append(len(of_title) // 2 + len(of_abstract) // 2)
    form, forms = enumerate_items(written)
    word, words = enumerate_items([w.lower() for w in forms])
    word = word[form]
    kind, kinds = enumerate_items(gaps)
    marks = [gap.strip()[-1:] for gap in kinds]
    kinds = [MARK + 1 + PUNCTUATION.find(mark) if mark else START if "\n" in gap else BLANK
             for mark, gap in zip(marks, kinds)]  # fmt: skip
    paper = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(form)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    gap = np.array(kinds, dtype=np.int64)[kind]
    gap[place == 0] = START
    title = place < np.repeat(np.array(title_lengths, dtype=np.int64), lengths)
    return Text(words, word, np.array(forms, dtype=object)[form], paper, title, gap)


# ---- candidates ------------------------------------------------------------------------------------------------------


@dataclass
class Candidates:
    """The candidate phrases of all papers, by paper and place. `first` and so on are indices of words in `text`."""

    text: Text
    train: int  # how many papers, the first ones, are of train: no other paper may count for a test paper
    phrases: list  # the different phrases, words joined by a blank
    # Arrays [candidates]
    paper: np.ndarray
    phrase: np.ndarray  # index into phrases
    n: np.ndarray  # how many words
    first: np.ndarray  # its first word where it first occurs
    last: np.ndarray  # its last word there
    tf: np.ndarray  # how often it occurs in its paper
    # Arrays [occurrences]
    of: np.ndarray  # whose: index of the candidate
    begin: np.ndarray  # first word
    end: np.ndarray  # last word

    def share(self, flags):
        """Of a flag for each occurrence, the mean of each candidate."""
        return np.bincount(self.of, flags, len(self.tf)) / self.tf

    def mean(self, values):
        """Of a value for each word of all texts, the mean over the words of each candidate."""
        total = np.zeros(len(self.n))  # no running sum: its rounding would let other papers decide ties
        for i in range(LONGEST):
            longer = np.flatnonzero(self.n > i)
            total[longer] += values[self.first[longer] + i]
        return total / self.n


def find_occurrences(text):
    """Phrases of up to LONGEST words that cross no punctuation, neither begin nor end with a stop word and do not begin
    with a number. Returns (begin, end, phrase), arrays [occurrences]: first word, last word, the phrase's number.
    """
    size, different = len(text.word), max(1, len(text.words))
    stop = text.per_word(lambda word: word in STOP or bool(CHINESE.search(word))) > 0
    barred = stop | (text.per_word(lambda word: word.replace(".", "").isdigit()) > 0)
    phrase, count = text.word.copy(), len(text.words)  # phrase: number of the phrase of n words that begins there
    begin, parts = np.arange(size), []
    for n in range(1, LONGEST + 1):
        if n > 1:
            begin = begin[begin + n - 1 < size]
            begin = begin[text.gap[begin + n - 1] == BLANK]
            pairs, number = np.unique(phrase[begin] * different + text.word[begin + n - 1], return_inverse=True)
            phrase[begin] = count + number
            count += len(pairs)
        allowed = begin[~barred[begin] & ~stop[begin + n - 1]]
        parts.append((allowed, allowed + n - 1, phrase[allowed]))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts))


def find_candidates(titles, abstracts, train):
    """The phrases of papers (two lists of str) that could be keywords, as Candidates. The first `train` papers are of
    train. What hardly ever is a keyword is left out: of what occurs once and not in the title, phrases of four words
    and more, and those of one and three that are part of a longer one.
    """
    text = read_words(titles, abstracts)
    begin, end, phrase = find_occurrences(text)
    key = text.paper[begin] * (phrase.max(initial=0) + 1) + phrase
    _, first, of = np.unique(key, return_index=True, return_inverse=True)
    # Candidates are numbered by place in the text, so that no tie is decided by what other papers hold.
    by_place = np.lexsort(((end - begin)[first], begin[first]))
    of, n = np.argsort(by_place)[of], (end - begin + 1)[first[by_place]]
    left, right = open_sides(text, begin, end)
    alone, in_title = np.bincount(of, left & right) > 0, np.bincount(of, text.title[begin]) > 0
    keep = (np.bincount(of) > 1) | in_title | (n == 2) | (alone & (n < 4))
    order = np.lexsort((begin, of))
    order = order[keep[of[order]]]
    begin, end, phrase, of = begin[order], end[order], phrase[order], (np.cumsum(keep) - 1)[of[order]]

    tf = np.bincount(of)
    first = np.cumsum(tf) - tf  # occurrences are sorted by candidate and place: the first one of each
    _, example, phrase = np.unique(phrase[first], return_index=True, return_inverse=True)
    places = zip(begin[first][example], end[first][example] + 1)
    phrases = [" ".join([text.words[word] for word in text.word[a:b]]) for a, b in places]
    paper, first, last = text.paper[begin[first]], begin[first], end[first]
    return Candidates(text, train, phrases, paper, phrase, last - first + 1, first, last, tf, of, begin, end)


def open_sides(text, begin, end):
    """Whether punctuation or a stop word stands before and behind each occurrence: two bool arrays."""
    stop = text.per_word(STOP.__contains__) > 0
    left = (text.gap != BLANK) | np.append(True, stop[:-1])[: len(stop)]
    right = np.append(text.gap != BLANK, True)[1:] | np.append(stop, True)[1:]
    return left[begin], right[end]


# ---- features that need no keywords ----------------------------------------------------------------------------------


def shape(found):
    """How long a phrase is and how it is written."""
    text = found.text
    letters = text.per_word(len)
    upper = np.array([word[1:] != word[1:].lower() for word in text.written], dtype=bool)
    return {
        "words": found.n,
        "letters": found.mean(letters) * found.n,
        "letters_first": letters[found.first],
        "letters_last": letters[found.last],
        "upper": found.share(upper[found.begin]),
        "hyphens": found.mean(text.per_word(lambda word: "-" in word)),
        "digits": found.mean(text.per_word(lambda word: any(map(str.isdigit, word)))),
        "stop_words": found.mean(text.per_word(STOP.__contains__)),
    }


def frequency(found):
    """How often a phrase occurs in its paper, and in how few other papers of train."""
    length = np.bincount(found.text.paper)[found.paper]
    train = found.paper < found.train
    others = np.bincount(found.phrase[train], minlength=len(found.phrases))[found.phrase] - train
    return {"tf": found.tf, "tf_idf": found.tf / length * np.log((found.train + 1) / (others + 1))}


def boundaries(found):
    """Whether a phrase stands alone: between punctuation marks, stop words, the ends of a sentence."""
    left, right = open_sides(found.text, found.begin, found.end)
    alone = found.share(left & right)
    return {"alone": alone, "alone_count": alone * found.tf}


FEATURES = (shape, frequency, boundaries)

"""The Keywords column, the phrases of a paper that could be keywords, and their features that need no keywords.

    separator = find_separator(cells)                  # ";", found once for the whole column
    split_keywords("Deep learning; CNN.", separator)   # {"deep learning": "Deep learning", "cnn": "CNN"}
    found = find_candidates(titles, abstracts, train)  # Candidates: phrases of 1 to 5 words
"""

import re
import unicodedata
from array import array
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

LONGEST = 5  # words a phrase
MARKS = "".join(filter(lambda c: unicodedata.category(c)[0] == "M", map(chr, range(0x300, 0x1100))))  # vowel signs
LETTER = rf"[\w{MARKS}]"
# One word: "E." of "E. coli", "IL-6", "PM2.5".
WORD = re.compile(rf"([A-Z]\.(?= [a-z])|{LETTER}+(?:[-‐‑–'’.+_]{LETTER}+)*\+*)")
MACRO = re.compile(r"\\[A-Za-z]+")  # of LaTeX
CHINESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")  # written without blanks, so a "word" is a whole clause
TERMS = (  # words that scikit-learn takes for stop words, but that occur at the ends of keywords
    "system fire mine mill bill cry thick thin interest amount half part side back front top bottom full name con de co"
)
STOP = (ENGLISH_STOP_WORDS - set(TERMS.split())) | {"e.g", "i.e", "using", "based", "used", "use"}
# By name, the likeliest first; no comma between digits separates keywords ("1,2-dichloroethane").
SEPARATORS = {";": "[;；\n]", ", ": "[,，] ", ",": r"[,，](?!\d)|(?<!\d)[,，]", "|": r"\|", "、": "、"}


# ---- keywords --------------------------------------------------------------------------------------------------------


def normalise(keyword):
    """The form in which keywords are compared: lower case, single blanks, no period at the end."""
    return " ".join(keyword.lower().split()).rstrip(". ")


def split_cell(cell, separator=";"):
    """The keywords of a cell as written: "Deep learning; CNN." -> ["Deep learning", "CNN"]. In a cell without the
    separator a comma and a blank separate keywords.
    """
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
    """What separates the keywords of a column: the first key of SEPARATORS that cuts most cells; None if none cuts one
    cell in ten.
    """
    cells = [cell.strip(";；,，|、. \n") for cell in cells if cell]
    cuts = {}
    for name, pattern in SEPARATORS.items():
        cuts[name] = sum(bool(re.search(pattern, cell)) for cell in cells)
    best = max(cuts, key=cuts.get)
    return best if cuts[best] > 0.1 * len(cells) else None


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


# ---- candidates ------------------------------------------------------------------------------------------------------


class Word(NamedTuple):
    written: str  # as the paper writes it
    lower: str
    gap: str  # what stands before it: "" at the start of title or abstract, " ", or the last punctuation mark
    title: bool  # it is in the title


class Place(NamedTuple):
    """One occurrence of a phrase."""

    words: list  # of Word
    left: str  # the word before it or, where that is not a blank, the gap
    right: str  # the word or gap behind it


END = Word("", "", "", False)


@dataclass
class Candidates:
    """The candidate phrases of all papers, by paper and place."""

    phrases: list  # the different phrases: all keywords, then the candidates that are not one
    words: list  # the different words and gaps
    paper: np.ndarray  # [candidates]
    phrase: np.ndarray  # [candidates]: index into phrases
    head: np.ndarray  # [candidates]: first word, index into words
    tail: np.ndarray  # [candidates]: last word
    written: list  # [candidates]: as the paper writes it where it last occurs, inside a sentence if it does
    features: dict  # {name: array [candidates]}
    of: np.ndarray  # [places]: whose, index of the candidate
    left: np.ndarray  # [places]: left of Place, index into words
    right: np.ndarray  # [places]


def read_words(text, title):
    """The words of a title or an abstract, a list of Word."""
    text = MACRO.sub(" ", text)
    if text.isupper():  # all in capitals: how the words are usually written is not known
        text = text.lower()
    parts, words = WORD.split(text), []  # gap, word, gap, …, word, gap
    for gap, written in zip(parts[::2], parts[1::2]):
        mark = gap.strip()[-1:] or (" " if words else "")
        words.append(Word(written, written.lower(), mark, title))
    return words


def find_phrases(words):
    """Phrases of up to LONGEST words that cross no punctuation, neither begin nor end with a stop word and do not begin
    with a number: {phrase: list of Place}. words: END is the last one.
    """
    phrases = {}
    lower, gaps = [word.lower for word in words], [word.gap for word in words]
    stop = [word in STOP or bool(CHINESE.search(word)) for word in lower]
    for first in range(len(words) - 1):
        if stop[first] or lower[first].replace(".", "").isdigit():
            continue
        left = lower[first - 1] if gaps[first] == " " else gaps[first]
        for end in range(first + 1, min(first + LONGEST + 1, len(words))):
            if not stop[end - 1]:
                right = lower[end] if gaps[end] == " " else gaps[end]
                phrases.setdefault(" ".join(lower[first:end]), []).append(Place(words[first:end], left, right))
            if gaps[end] != " ":
                break
    return phrases


@cache
def is_open(side):
    """Whether what comes before or after a phrase is a stop word, punctuation or nothing."""
    return side in STOP or not re.search(r"\w", side)


def is_likely(places):
    """False for what hardly ever is a keyword: of what occurs once and not in the title, phrases of four words and
    more, and those of one and three that are part of a longer one.
    """
    words, left, right = places[0]
    alone = is_open(left) and is_open(right)
    return len(places) > 1 or words[0].title or len(words) == 2 or (alone and len(words) < 4)


def find_candidates(titles, abstracts, keywords):
    """The phrases of papers (two lists of str) that could be keywords, as Candidates. keywords: all known ones; their
    numbers must not depend on the texts, for they decide ties.
    """
    numbers, different = {keyword: number for number, keyword in enumerate(dict.fromkeys(keywords))}, {}
    rows, around, written, features = [], [], [], defaultdict(lambda: array("f"))

    def number_of(word):
        return different.setdefault(word, len(different))

    for paper, (title, abstract) in enumerate(zip(titles, abstracts)):
        words = [*read_words(title, True), *read_words(abstract, False), END]
        for phrase, places in find_phrases(words).items():
            if not is_likely(places):
                continue
            for place in places:
                around.append((len(rows), number_of(place.left), number_of(place.right)))
            split = phrase.split(" ")
            ends = number_of(split[0]), number_of(split[-1])
            rows.append((paper, numbers.setdefault(phrase, len(numbers)), *ends))
            inside = [place for place in places if place.words[0].gap not in ("", ".")]
            written.append(" ".join([word.written for word in (inside or places)[-1].words]))
            for name, value in describe(phrase, places).items():
                features[name].append(value)
    features = {name: np.array(values, dtype=np.float32) for name, values in features.items()}
    rows, around = np.array(rows, dtype=np.int64).reshape(-1, 4), np.array(around, dtype=np.int64).reshape(-1, 3)
    return Candidates([*numbers], [*different], *rows.T, written, features, *around.T)


def describe(phrase, places):
    """The features of a phrase that need no keywords: {name: number}. places: list of Place."""
    words, tf = phrase.split(" "), len(places)
    starts = [place.words[0] for place in places]
    left, right = [place.left for place in places], [place.right for place in places]
    open_left, open_right = list(map(is_open, left)), list(map(is_open, right))
    alone = sum(a and b for a, b in zip(open_left, open_right))
    return {
        "words": len(words),
        "letters": len(phrase),
        "letters_first": len(words[0]),
        "letters_last": len(words[-1]),
        "upper": sum(word.written[1:] != word.lower[1:] for word in starts) / tf,
        "hyphens": phrase.count("-"),
        "digits": sum(map(str.isdigit, phrase)),
        "stop_words": sum(word in STOP for word in words),
        "tf": tf,
        "title": sum(word.title for word in starts),
        "open_left": sum(open_left) / tf,
        "open_right": sum(open_right) / tf,
        "alone": alone / tf,
        "alone_count": alone,
        "different_left": len(set(left)) / tf,
        "different_right": len(set(right)) / tf,
        "before_bracket": right.count("(") / tf,
    }

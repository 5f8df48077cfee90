"""Papers: read the CSV files, check them, build text, split. No torch, no model.

    papers = read_papers("data/sample/train.csv", labelled=True)   # DataFrame: uuid, title, author, abstract, ...
    texts = build_text(papers, ["title", "abstract"])              # list of str, one per paper
    held_out = split_papers(papers, valid_ratio=0.1, seed=42)      # bool array, one per paper
"""

import hashlib
import html
import re
import unicodedata
from contextlib import suppress
from pathlib import Path

from lib.cli import FIELDS, KIT, InputError, few, log
from lib.tables import read_columns, refuse

import numpy as np
import pandas as pd

SAMPLE = KIT / "data" / "sample"
REQUIRED = ("uuid", "title", "abstract")
LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
PLACEHOLDERS = {"", "nan", "none", "null", "nil", "n/a", "#n/a", "-", "--", "?", "tmp", "todo", "na", "无", "暂无"}
INVISIBLE = dict.fromkeys([0xAD, 0x61C, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)])
# Tags of JATS and HTML as abstracts have them; those within a word are removed, others are like a blank.
ATTRIBUTES = r"""(?:\s+[\w:.-]+\s*=\s*(?:"[^"]*"|'[^']*'))*\s*/?>"""
WITHIN = r"sub|sup|i|b|u|em|strong|italic|bold|sc|tt|span|font|a|underline|monospace|ext-link|xref|styled-content"
BETWEEN = r"p|br|div|title|sec|abstract|label|list|list-item|ul|ol|li|h[1-6]|table|tr|td|th|tbody|inline-formula|math"
HEADING = re.compile(r"^(key ?-?words?( and phrases)?|index terms|关键词|关键字)\s*[:：—–-]\s*", re.IGNORECASE)
TAG_WITHIN = re.compile(rf"</?(?:jats:)?(?:{WITHIN}){ATTRIBUTES}", re.IGNORECASE)
TAG_BETWEEN = re.compile(rf"</?(?:jats:[\w-]+|mml:[\w-]+|{BETWEEN}){ATTRIBUTES}", re.IGNORECASE)


# ---- papers ----------------------------------------------------------------------------------------------------------


def clean(text):
    """Resolve HTML entities, remove tags and invisible characters, normalise to Unicode NFKC, make every run of white
    space one blank: 'CO<sub>2</sub>&nbsp;emis\xadsion' -> 'CO2 emission'.
    """
    if "&" in text:
        with suppress(ValueError):  # a character reference of thousands of digits
            text = html.unescape(text)
    if "<" in text:
        text = TAG_BETWEEN.sub(" ", TAG_WITHIN.sub("", text))
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(INVISIBLE))
    return " ".join(text.split())


def read_label(cell):
    """A label as people and programs write it, as 0 or 1: '1', '1.0', 'TRUE'; else None."""
    return LABELS.get(clean(cell).casefold())


def label_column(path, cells, numbers):
    """Labels, list of 0 and 1. Raises InputError that names the rows of cells that are neither."""
    labels = list(map(read_label, cells))
    wrong = [number for number, label in zip(numbers, labels) if label is None]
    refuse(path, "column label is neither 0 nor 1", wrong, "fix or remove the rows")
    return labels


def read_papers(path, labelled=False):
    """A papers file as a DataFrame, in the file's row order: uuid (str, as written), title, abstract and, where
    present, author (str, cleaned) and Keywords (str, as written); with `labelled` also label (int, 0 or 1); then all
    other columns as they are. Raises InputError that names the file, column and rows of what cannot be used.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; data/README.md says where the competition's files go")
    columns, numbers = read_columns(path, [*REQUIRED, "label"] if labelled else REQUIRED)
    check_uuids(path, columns["uuid"], numbers, labelled)
    clean_columns(path, columns)
    label = columns.pop("label", None)  # in a test file it means nothing, whatever it holds
    first = {name: columns[name] for name in ("uuid", *FIELDS) if name in columns}
    if labelled:
        first["label"] = np.array(label_column(path, label, numbers), dtype=np.int64)
        check_classes(first["label"], 1, path)
    return pd.DataFrame(first | columns)


def check_uuids(path, uuids, numbers, labelled):
    """Raise InputError unless every paper has a uuid of its own. `numbers`: the row of each."""
    first = dict(zip(reversed(uuids), reversed(numbers)))  # the first row of each uuid
    rows = list(zip(uuids, numbers))
    empty = [number for uuid, number in rows if not uuid.strip() or len(uuid.splitlines()) > 1]
    header = [number for uuid, number in rows if uuid.strip().casefold() == "uuid"]
    rounded = [number for uuid, number in rows if re.fullmatch(r"\s*\d(\.\d+)?[eE]\+\d+\s*", uuid)]
    repeated = [f"{number} ({uuid})" for uuid, number in rows if first[uuid] != number]
    refuse(path, "column uuid is empty or has a line break", empty, "is a quote missing?")
    refuse(path, "the header comes again", header, "files that were put together keep theirs: remove the row")
    refuse(path, "Excel has rounded the uuid", rounded, "download the file again, or export the column as text")
    remedy = "remove the copies" if labelled else "every test paper counts, so download the file again"
    refuse(path, "column uuid repeats an earlier one", repeated, remedy)


def clean_keywords(cell):
    """A cell of Keywords to read; a line break separates keywords, too: 'Keywords: CO₂\\ncapture' -> 'CO2; capture'."""
    return HEADING.sub("", clean("; ".join(cell.splitlines())))


def clean_columns(path, columns):
    """Clean title, author and abstract in a dict {name: cells}, and drop author or Keywords if all cells say the same.
    Keywords stay as they are, for the board compares them exactly.
    """
    for name in ("title", "author", "abstract"):
        if name in columns:
            columns[name] = list(map(clean, columns[name]))
    for name in ("author", "Keywords"):
        if name in columns:
            columns[name] = ["" if cell.strip().casefold() in PLACEHOLDERS else cell for cell in columns[name]]
            different = set(columns[name])
            if different == {""} or (len(different) == 1 and len(columns[name]) >= 10):
                log(f"warning: column {name} of {path} is left out: all its cells are {few(different) or 'empty'}")
                del columns[name]


def check_classes(labels, least, where):
    """Raise InputError unless each of the labels 0 and 1 occurs `least` times in `labels`."""
    for label, count in enumerate(np.bincount(labels, minlength=2)):
        if count < least:
            raise InputError(f"{where}: column label is {label} in {count} rows, want {least} or more; add papers")


def load_papers(args):
    """Read args.train and args.test and check them together. Returns (train, test, the fields that both have)."""
    train, test = read_papers(args.train, labelled=True), read_papers(args.test)
    if [path.resolve().parent == SAMPLE for path in (args.train, args.test)] == [True, False]:
        log(f"warning: {args.train} is the sample, invented papers: give your own with --train, or set DATA_DIR")
    columns = ["uuid", "title", "abstract"]
    if set(train[columns].itertuples(index=False)) == set(test[columns].itertuples(index=False)):
        raise InputError(f"{args.test} holds the same papers as {args.train}: give the test file with --test")
    limit = f" (--limit {args.limit})" if args.limit else ""
    train, test = train.head(args.limit or len(train)), test.head(args.limit or len(test))
    check_classes(train["label"], 1, f"{args.train}{limit}")
    log(f"{len(train)} papers in {args.train}, {len(test)} in {args.test}{limit}")
    fields = shared_fields(train, test, args.fields)
    warn_of_copies(args, train, test)
    for path, side in ((args.train, train), (args.test, test)):
        empty = build_text(side, fields).count("")
        if empty:
            log(f"warning: {empty} papers of {path} have no text in {' '.join(fields)}; they are kept")
    return train, test, fields


def load_test(args, fields):
    """Read args.test alone, for a model that was trained on `fields`. Raises InputError if it lacks one of them."""
    test = read_papers(args.test)
    lacking = [name for name in fields if name not in test]
    if lacking:
        raise InputError(f"{args.test} has no column {few(lacking)}, which the model reads: train with other --fields")
    log(f"{len(test)} papers in {args.test}{f', the first {args.limit} are read' if args.limit else ''}")
    return test.head(args.limit or len(test))


def shared_fields(train, test, wanted=None):
    """The fields of `wanted` (default: all) that both frames have. A line on stderr says what is left out or odd."""
    kept, sides = [], {"train": train, "test": test}
    for name in wanted or FIELDS:
        lacking = [side for side, papers in sides.items() if name not in papers or not (papers[name] != "").any()]
        if lacking:
            log(f"field {name} is left out: no such column, or an empty one, in {' and '.join(lacking)}")
            continue
        kept.append(name)
        shares = [(papers[name] == "").mean() for papers in sides.values()]
        if abs(shares[0] - shares[1]) > 0.3:
            log(f"warning: {name} is empty in {shares[0]:.0%} of the training papers and in {shares[1]:.0%} of the "
                "test papers: models may learn from what the test papers lack; see --fields")  # fmt: skip
    if not kept:
        raise InputError(f"--fields {' '.join(wanted or FIELDS)}: none of these columns has text in both files")
    return kept


def warn_of_copies(args, train, test):
    """Say on stderr how many papers have the same text as another one."""
    first, labels = find_copies(train), train["label"].to_numpy()
    copies, differ = np.sum(first != np.arange(len(train))), np.sum(labels != labels[first])
    if copies:
        log(f"warning: {copies} papers of {args.train} have the text of another one; they are held out together"
            + (f"; {differ} of them have another label than the first: check them" if differ else ""))  # fmt: skip
    known = set(zip(train["title"], train["abstract"])) - {("", "")}
    again = [text in known for text in zip(test["title"], test["abstract"])]
    if any(again):
        log(f"warning: {sum(again)} test papers are in {args.train}, too: uuid {few(test['uuid'][again])}")


# ---- text and split --------------------------------------------------------------------------------------------------


def build_text(papers, fields, names=False):
    """One text per paper, empty fields left out; the only place where text is made, for train and test alike. The
    abstract comes last, so truncation cuts it first. With `names`, 'title: …' precedes each field.
    """
    order = [name for name in ("title", "author", "Keywords", "abstract") if name in fields]
    if "Keywords" in fields:
        papers = papers.assign(Keywords=papers["Keywords"].map(clean_keywords))
    texts = []
    for cells in zip(*(papers[name] for name in order)):
        if names:
            cells = [cell and f"{name.lower()}: {cell}" for name, cell in zip(order, cells)]
        texts.append("\n".join(filter(None, cells)))
    return texts


def draw_ranks(papers, seed):
    """Each paper's place in a random order of its class: int array [papers]. Drawn from seed and uuid alone, so it
    depends neither on the order of the rows nor on a library's version.
    """
    keys = [hashlib.sha256(f"{seed} {uuid}".encode()).hexdigest() for uuid in papers["uuid"]]
    order = pd.DataFrame({"label": papers["label"].to_numpy(), "key": keys}).sort_values("key")
    return order.groupby("label").cumcount().sort_index().to_numpy()


def find_copies(papers):
    """For each paper the row (from 0) of the first one with the same title and abstract, whatever the case of the
    letters: int array [papers]. First by uuid, so the order of the rows does not matter. A paper without text is not a
    copy.
    """
    texts = [f"{title}\n{abstract}".casefold() for title, abstract in zip(papers["title"], papers["abstract"])]
    keys = pd.Series([text if text.strip() else uuid for text, uuid in zip(texts, papers["uuid"])])
    order = np.argsort(papers["uuid"].to_numpy(dtype=str), kind="stable")
    first = {}
    for row in order:
        first.setdefault(keys[row], row)
    return keys.map(first).to_numpy(dtype=int)


def split_papers(papers, valid_ratio=0.1, seed=42):
    """The common split: bool array [papers], True = held out. Of each class `valid_ratio`, at least one paper. Copies
    of a paper go where it goes.
    """
    first = find_copies(papers)
    own = papers.iloc[np.unique(first)]
    check_classes(own["label"], 2, "train, to hold some out")
    counts = own["label"].map(own["label"].value_counts()).to_numpy()
    held_out = draw_ranks(own, seed) < np.clip(np.round(counts * valid_ratio), 1, counts - 1)
    return np.isin(first, np.unique(first)[held_out])


def fold_numbers(papers, folds=5, seed=42):
    """Stratified folds: int array [papers], the fold (0 … folds - 1) in which a paper is held out. Copies of a paper go
    where it goes.
    """
    first = find_copies(papers)
    rows, group = np.unique(first, return_inverse=True)
    own = papers.iloc[rows]
    check_classes(own["label"], folds, f"train, for --folds {folds}")
    ranks = draw_ranks(own, seed) % folds
    return np.where(own["label"] == 1, folds - 1 - ranks, ranks)[group]  # so that no fold gets both surpluses

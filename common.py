"""Papers: read, check, build text, split. Everything the scripts share that needs no torch.

    from common import read_papers, build_text
    papers = read_papers("data/sample/train.csv", labelled=True)   # DataFrame: uuid, title, author, abstract, ...
    texts = build_text(papers, ["title", "abstract"])              # list of str, one per paper
"""

import csv
import gzip
import hashlib
import html
import io
import re
import unicodedata
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from lib.cli import FIELDS, InputError, few, log

REQUIRED = ("uuid", "title", "abstract")
PLACEHOLDERS = {"", "nan", "none", "null", "nil", "n/a", "#n/a", "-", "--", "?", "tmp", "todo", "na", "无", "暂无"}
INVISIBLE = dict.fromkeys([0xAD, 0x61C, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)])
# Tags of JATS and HTML as abstracts have them; those within a word are removed, others are like a blank.
ATTRIBUTES = r"""(?:\s+[\w:.-]+\s*=\s*(?:"[^"]*"|'[^']*'))*\s*/?>"""
WITHIN = r"sub|sup|i|b|u|em|strong|italic|bold|sc|tt|span|font|a|underline|monospace|ext-link|xref|styled-content"
BETWEEN = r"p|br|div|title|sec|abstract|label|list|list-item|ul|ol|li|h[1-6]|table|tr|td|th|tbody|inline-formula|math"
TAG_WITHIN = re.compile(rf"</?(?:jats:)?(?:{WITHIN}){ATTRIBUTES}", re.IGNORECASE)
TAG_BETWEEN = re.compile(rf"</?(?:jats:[\w-]+|mml:[\w-]+|{BETWEEN}){ATTRIBUTES}", re.IGNORECASE)


# ---- reading ---------------------------------------------------------------------------------------------------------


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
    text = clean(cell).casefold()
    try:
        value = {"false": 0, "true": 1}[text] if text.isalpha() else float(text)
    except (KeyError, ValueError):
        return None
    return int(value) if value in (0, 1) else None


def read_bytes(path):
    """The bytes of a CSV file, unpacked if it was packed with zip or gzip. Raises InputError if it is not one."""
    data = Path(path).read_bytes()
    is_zip = data.startswith(b"PK\x03\x04")
    if data.startswith(b"\xd0\xcf\x11\xe0") or (is_zip and b"xl/workbook.xml" in data):
        raise InputError(f"{path} is an Excel workbook, not a CSV file: in Excel, save it as 'CSV UTF-8'")
    if data.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from")
    try:
        if is_zip:
            return unzip(path, data)
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path} is a damaged {'zip' if is_zip else 'gzip'} file: copy it again") from None


def unzip(path, data):
    """The bytes of the one CSV file in a zip file, or of the one that is called as the zip file is."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inside = [name for name in archive.namelist() if name.lower().endswith(".csv")]
        own = [name for name in inside if Path(name).stem == Path(path).name.split(".")[0]] or inside
        if len(own) != 1:
            raise InputError(f"{path} is a zip file with {len(inside)} CSV files: unpack it and give one of them")
        return archive.read(own[0])


def decode(path, data):
    """The text of a CSV file in UTF-8, UTF-16 or GB18030, without byte-order marks. Raises InputError for others."""
    start = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise InputError(f"{path} is a web page, not a CSV file: download it again (a log-in page is often the cause)")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    fault = "it contains NUL bytes"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        fault = f"byte 0x{data[error.start]:02x} is not valid {encoding.upper()}"
        text = data.decode("gb18030") if is_gb18030(data) else "\0"
    if "\0" in text:
        raise InputError(f"{path} is damaged or in an unknown encoding ({fault}): copy it again, or save it as "
                         "'CSV UTF-8'")
    return text.lstrip("\ufeff")


def is_gb18030(data):
    """Whether bytes that are not UTF-8 are GB18030, rather than UTF-8 with a few damaged bytes, or Windows-1252."""
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return False
    # GB18030 read as UTF-8 is nearly all replacement characters; damaged UTF-8 has few of them.
    as_utf8 = [c for c in data.decode("utf-8", "replace") if not c.isascii()]
    if as_utf8.count("\ufffd") <= 0.2 * len(as_utf8):
        return False
    # "é" or "’" of Windows and the letter after it look like one Chinese character, but one that is rare in Chinese.
    # Rows 0xA8 and 0xA9 hold signs such as the dash, which are not rare.
    encoded = [c.encode("gb18030") for c in text if not c.isascii()]
    pairs = [pair for pair in encoded if len(pair) == 2 and pair[0] not in (0xA8, 0xA9)]
    return sum(pair[1] < 0x80 for pair in pairs) <= 0.2 * len(pairs)


def parse_rows(path, text, **dialect):
    """The rows of a CSV file's text, header first, and their numbers: the header is row 1, as in a spreadsheet. Blank
    rows are skipped. Raises InputError that names the row.
    """
    file = io.StringIO(text, newline="")
    first = file.readline()
    excel = re.fullmatch(r"sep=(.)", first.strip())  # a line that only Excel reads
    delimiter = excel[1] if excel else max(",;\t|", key=first.count)  # a European Excel writes ';'
    if not excel:
        file.seek(0)
    spaced = f'"{delimiter} "' in text[:100_000]  # "a", "b": the blank belongs to no cell
    rows, numbers = [], []
    number = skipped = 1 if excel else 0
    try:
        reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=spaced, **dialect)
        for number, row in enumerate(reader, skipped + 1):
            if not any(map(str.strip, row)):
                continue
            if not rows:  # bare delimiters at the end of the header are not columns
                width = max(place for place, name in enumerate(row, 1) if name.strip())
            if len(row) < width or any(row[width:]):
                raise InputError(f"{path}: row {number} has {len(row)} cells, the header has {width}: the file was "
                                 "cut off or a quote is missing; fix the row or copy the file again")
            rows.append(row[:width])
            numbers.append(number)
    except csv.Error as error:
        fault = str(error).replace("\t", "tab")
        raise InputError(f"{path}: row {number + 1}: {fault}; fix the row or copy the file again") from None
    if not rows:
        raise InputError(f"{path} is empty: copy the file again")
    return rows, numbers


def read_columns(path, required):
    """The columns of a CSV file, {name: cells}, and the row number of each cell. The names that the kit knows may be
    written in any case. Raises InputError unless each of `required` is there.
    """
    csv.field_size_limit(2**31 - 1)  # the default is shorter than an abstract that lost its closing quote
    text = decode(path, read_bytes(path))
    try:
        rows, numbers = parse_rows(path, text)
    except InputError as error:
        try:  # some programs write \" for a quote within a cell
            rows, numbers = parse_rows(path, text, doublequote=False, escapechar="\\")
        except InputError:
            raise error from None
    known = {name.casefold(): name for name in ("uuid", *FIELDS, "label", "prob")}
    header = [name.replace("\ufeff", "").strip() for name in rows[0]]  # also a byte-order mark within the quotes
    header = [known.get(name.casefold(), name) for name in header]
    if missing := [name for name in required if name not in header]:
        raise InputError(f"{path}: no column {few(missing)}; the header has {few(header, 8)}")
    if repeated := [name for name in known.values() if header.count(name) > 1]:
        raise InputError(f"{path}: column {few(repeated)} appears more than once in the header; remove one")
    if len(rows) == 1:
        raise InputError(f"{path} has a header but no rows: copy the file again")
    return dict(zip(header, zip(*rows[1:]))), numbers[1:]


def label_column(path, cells, numbers):
    """Labels, list of 0 and 1. Raises InputError that names the rows of cells that are neither."""
    labels = [read_label(cell) for cell in cells]
    if wrong := [number for number, label in zip(numbers, labels) if label is None]:
        raise InputError(f"{path}: column label is neither 0 nor 1 in row {few(wrong)}; fix or remove the rows")
    return labels


def read_papers(path, labelled=False):
    """A papers file as a DataFrame, in the file's row order: uuid (str, as written), title, abstract and, where
    present, author and Keywords (str, cleaned); with `labelled` also label (int, 0 or 1); then all other columns as
    they are. Raises InputError that names the file, column and rows of what cannot be used.
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


def clean_columns(path, columns):
    """Clean the text columns of a dict {name: cells}, and drop author or Keywords if all their cells say the same."""
    if "Keywords" in columns:  # a line break separates keywords, too
        columns["Keywords"] = ["; ".join(cell.splitlines()) for cell in columns["Keywords"]]
    for name in FIELDS:
        if name in columns:
            columns[name] = [clean(cell) for cell in columns[name]]
    for name in ("author", "Keywords"):
        if name in columns:
            cells = ["" if cell.casefold() in PLACEHOLDERS else cell for cell in columns[name]]
            columns[name], different = cells, set(cells)
            if different == {""} or (len(different) == 1 and len(cells) >= 10):
                log(f"warning: column {name} of {path} is left out: all its cells are {few(different) or 'empty'}")
                del columns[name]


def check_uuids(path, uuids, numbers, labelled):
    """Raise InputError unless every paper has a uuid of its own. `numbers`: the row of each."""
    by_excel = re.compile(r"\s*\d(\.\d+)?[eE]\+\d+\s*")
    rows = dict(zip(reversed(uuids), reversed(numbers)))  # the first row of each uuid
    empty, rounded, repeated = [], [], []
    for uuid, number in zip(uuids, numbers):
        if not uuid.strip() or "\n" in uuid or "\r" in uuid:
            empty.append(number)
        elif by_excel.fullmatch(uuid):
            rounded.append(number)
        elif rows[uuid] != number:
            repeated.append(f"{uuid} (row {number})")
    if empty:
        raise InputError(f"{path}: column uuid is empty or has a line break in row {few(empty)}; is a quote missing?")
    if rounded:
        raise InputError(f"{path}: Excel has rounded the uuids in row {few(rounded)}: download the file again, or "
                         "export it with the column as text")
    if repeated:
        remedy = "remove the copies" if labelled else "every test paper counts, so download the file again"
        raise InputError(f"{path}: column uuid repeats {few(repeated)}; {remedy}")


def check_classes(labels, least, where):
    """Raise InputError unless each of the labels 0 and 1 occurs `least` times in `labels`."""
    labels = list(labels)
    for label in (0, 1):
        if (count := labels.count(label)) < least:
            raise InputError(f"{where}: column label is {label} in {count} rows, want {least} or more; add papers")


def fingerprint(papers):
    """16 hex digits that identify a set of papers (uuid, text, label), whatever their order."""
    columns = [name for name in ("uuid", *FIELDS, "label") if name in papers]
    rows = zip(*(papers[name].astype(str) for name in columns))
    hashes = sorted(hashlib.sha256("\x1f".join(row).encode()).digest() for row in rows)
    return hashlib.sha256(" ".join(columns).encode() + b"".join(hashes)).hexdigest()[:16]


def is_missing(papers, name):
    return name not in papers or set(papers[name].str.casefold()) <= PLACEHOLDERS


def shared_fields(train, test, wanted=None):
    """The fields of `wanted` (default: all) that both frames have. A line on stderr says what is left out or odd."""
    kept, sides = [], {"train": train, "test": test}
    for name in wanted or FIELDS:
        lacking = [side for side, papers in sides.items() if is_missing(papers, name)]
        if lacking:
            log(f"field {name} is left out: no such column, or an empty one, in {' and '.join(lacking)}")
            continue
        kept.append(name)
        shares = [(papers[name] == "").mean() for papers in sides.values()]
        if abs(shares[0] - shares[1]) > 0.3:
            log(f"warning: {name} is empty in {shares[0]:.0%} of the training papers and in {shares[1]:.0%} of the "
                "test papers: models may learn from what the test papers lack; see --fields")
    if not kept:
        raise InputError(f"--fields {' '.join(wanted or FIELDS)}: train and test share none of these columns, filled")
    return kept


def load_papers(args):
    """Read args.train and args.test and check them together. Returns (train, test, the fields that both have)."""
    train, test = read_papers(args.train, labelled=True), read_papers(args.test)
    papers = [set(zip(side["uuid"], side["title"], side["abstract"])) for side in (train, test)]
    if papers[0] == papers[1]:
        raise InputError(f"{args.test} holds the same papers as {args.train}: give the test file with --test")
    if args.limit:
        train, test = train.head(args.limit), test.head(args.limit)
        check_classes(train["label"], 1, f"{args.train} with --limit {args.limit}")
    limit = f" (--limit {args.limit})" if args.limit else ""
    log(f"{len(train)} papers in {args.train}, {len(test)} in {args.test}{limit}")
    fields = shared_fields(train, test, args.fields)
    warn_of_copies(args, train, test)
    for path, papers in ((args.train, train), (args.test, test)):
        if empty := build_text(papers, fields).count(""):
            log(f"warning: {empty} papers of {path} have no text in {' '.join(fields)}; they are kept")
    return train, test, fields


def warn_of_copies(args, train, test):
    """Say on stderr how many papers have the same text as another one."""
    first = find_copies(train)
    copies = first != np.arange(len(train))
    if copies.any():
        labels = train["label"].to_numpy()
        log(f"warning: {copies.sum()} papers of {args.train} have the text of another one; they are held out together")
        if differ := (labels != labels[first]).sum():
            log(f"warning: {differ} of these copies have another label than the first: check them")
    known = set(zip(train["title"], train["abstract"])) - {("", "")}
    again = [text in known for text in zip(test["title"], test["abstract"])]
    if any(again):
        log(f"warning: {sum(again)} test papers are in {args.train}, too: uuid {few(test['uuid'][again])}")


def load_test(args, fields):
    """Read args.test alone, for a model that was trained on `fields`. Raises InputError if it lacks one of them."""
    test = read_papers(args.test)
    if lacking := [name for name in fields if name not in test]:
        raise InputError(f"{args.test} has no column {few(lacking)}, which the model reads: train with other --fields")
    test = test.head(args.limit or len(test))
    log(f"{len(test)} papers in {args.test}{f' (--limit {args.limit})' if args.limit else ''}")
    return test


# ---- text and split --------------------------------------------------------------------------------------------------


def build_text(papers, fields, names=False):
    """One text per paper, empty fields left out; the only place where text is made, for train and test alike. The
    abstract comes last, so truncation cuts it first. With `names`, 'title: …' precedes each field.
    """
    order = [name for name in ("title", "author", "Keywords", "abstract") if name in fields]
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

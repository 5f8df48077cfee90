"""Papers: read, check, build text, split. Everything the scripts share that needs no torch.

    from common import read_papers, build_text
    papers = read_papers("data/sample/train.csv", labelled=True)   # DataFrame: uuid, title, author, abstract, ...
    texts = build_text(papers, ["title", "abstract"])              # list of str, one per paper
"""

import argparse
import csv
import hashlib
import html
import io
import logging
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
FIELDS = ("title", "author", "abstract", "Keywords")
REQUIRED = ("uuid", "title", "abstract")
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
MAX_COLUMNS = 1000
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # silent about where its cache goes if the home is read-only


class InputError(Exception):
    """Wrong input or flags: shown as one line on stderr, exit code 2."""


def log(message):
    """Print a line to stderr, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def open_streams():
    """Make every print() safe: what goes to a closed stream is dropped, what the terminal can't show becomes '?'."""
    for name in ("stdin", "stdout", "stderr"):  # in this order, so that each gets its own number, 0 to 2, again
        if getattr(sys, name) is None:  # closed; print() to a closed stderr would go to stdout
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # it is another thing in a notebook
        sys.stdout.reconfigure(errors="replace")


def run_script(main):
    """Run main(). A fault the user can fix becomes one line on stderr and an exit code, not a traceback."""
    open_streams()
    try:
        main()
        return sys.stdout.flush()
    except InputError as error:
        message, code = " ".join(str(error).split()), 2
    except OSError as error:  # disk full, no permission, closed pipe
        message, code = f"{error.filename or 'input/output'}: {error.strerror or error}", 2
    except KeyboardInterrupt as error:  # its text may say how to go on
        message, code = f"interrupted{'; ' if str(error) else ''}{error}", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def few(values, most=5):
    """The first few of many values as printable text: [3, 7, 9, 12, 15, 20] -> '3, 7, 9, 12, 15 … (6 in all)'."""
    values = list(values)
    shown = ["".join(c if c.isprintable() else "\ufffd" for c in str(value)[:40]) for value in values[:most]]
    return ", ".join(shown) + (f" … ({len(values)} in all)" if len(values) > most else "")


# ---- reading ---------------------------------------------------------------------------------------------------------


def clean(text):
    """Resolve HTML entities, normalise to Unicode NFKC, make every run of white space one blank."""
    if "&" in text:
        try:
            text = html.unescape(text)
        except ValueError:  # a character reference of thousands of digits
            pass
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def find_encoding(path, data):
    """The encoding of a CSV file's bytes: 'utf-8-sig', 'utf-16' or 'gb18030'. Raises InputError if it is no text."""
    start = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"pk\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise InputError(f"{path} is an Excel workbook, not a CSV file: in Excel, save it as 'CSV UTF-8'")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise InputError(f"{path} is a web page, not a CSV file: download it again (a log-in page is often the cause)")
    likely = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        if "\0" not in data.decode(likely):
            return likely
        fault = "it contains NUL bytes"
    except UnicodeDecodeError as error:
        fault = f"byte 0x{data[error.start]:02x} is not valid {likely.removesuffix('-sig').upper()}"
    if is_gb18030(data):
        return "gb18030"
    raise InputError(f"{path} is damaged or in an unknown encoding ({fault}): copy it again, or save it as 'CSV UTF-8'")


def is_gb18030(data):
    """Whether bytes that are not UTF-8 are GB18030, rather than UTF-8 with a few damaged bytes, or Latin-1."""
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return False
    # GB18030 read as UTF-8 is nearly all replacement characters; damaged UTF-8 has few of them.
    as_utf8 = [c for c in data.decode("utf-8", "replace") if not c.isascii()]
    if "\0" in text or as_utf8.count("\ufffd") <= 0.2 * len(as_utf8):
        return False
    # Latin-1 "é" and the letter after it look like one Chinese character, but one that is rare in Chinese.
    pairs = [c.encode("gb18030") for c in text if not c.isascii()]
    return sum(pair[0] >= 0xC0 and pair[1] < 0x80 for pair in pairs) < 0.5 * len(pairs)


def read_rows(path):
    """Header, rows and row numbers of a CSV file. The header is row 1, as in a spreadsheet; blank rows are skipped."""
    csv.field_size_limit(2**31 - 1)  # the default is shorter than an abstract that lost its closing quote
    data = Path(path).read_bytes()
    file = io.TextIOWrapper(io.BytesIO(data), encoding=find_encoding(path, data), newline="")
    delimiter = max(",;\t|", key=file.readline().count)  # a European Excel writes ';'
    file.seek(0)
    rows, numbers, number, width = [], [], 0, 0
    try:
        for number, row in enumerate(csv.reader(file, delimiter=delimiter, strict=True), 1):
            if not any(map(str.strip, row)):
                continue
            if not rows:  # bare delimiters at the end of the header are not columns
                width = max(place for place, name in enumerate(row, 1) if name.strip())
                if width > MAX_COLUMNS:
                    raise InputError(f"{path}: the header has {width} columns: this is not a papers file")
            if len(row) < width or any(row[width:]):
                raise InputError(f"{path}: row {number} has {len(row)} cells, the header has {width}: the file was cut "
                                 "off or a quote is missing; fix the row or copy the file again")
            rows.append(row[:width])
            numbers.append(number)
    except csv.Error as error:
        fault = str(error).replace("\t", "tab")
        raise InputError(f"{path}: row {number + 1}: {fault}; fix the row or copy the file again") from None
    if not rows:
        raise InputError(f"{path} is empty: copy the file again")
    return rows[0], rows[1:], numbers[1:]


def read_papers(path, labelled=False):
    """A papers file as a DataFrame, in the file's row order: uuid (str, as written), title, abstract and, where
    present, author and Keywords (str, cleaned); with `labelled` also label (int, 0 or 1); then all other columns as
    they are. Raises InputError that names the file, column and rows of what cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; data/README.md says where the competition's files go")
    header, rows, numbers = read_rows(path)
    required = [*REQUIRED, "label"] if labelled else [*REQUIRED]
    known = {name.casefold(): name for name in (*FIELDS, *required)}
    header = [name.replace("\ufeff", "").strip() for name in header]  # two programs may have put a BOM in front
    header = [known.get(name.casefold(), name) for name in header]
    if missing := [name for name in required if name not in header]:
        raise InputError(f"{path}: no column {' and no column '.join(missing)}; the header has {few(header, 8)}")
    if repeated := [name for name in known.values() if header.count(name) > 1]:
        raise InputError(f"{path}: column {few(repeated)} appears more than once in the header; remove one")
    if not rows:
        raise InputError(f"{path} has a header but no rows: copy the file again")
    columns = dict(zip(header, zip(*rows)))
    del rows
    check_uuids(path, columns["uuid"], numbers)
    for name in FIELDS:
        if name in columns:
            columns[name] = [clean(cell) for cell in columns[name]]
    if labelled:
        columns["label"] = [LABELS.get(cell.strip()) for cell in columns["label"]]
        if wrong := [number for number, label in zip(numbers, columns["label"]) if label is None]:
            raise InputError(f"{path}: column label is neither 0 nor 1 in row {few(wrong)}; fix or remove the rows")
        check_classes(columns["label"], 1, path)
    first = [name for name in ("uuid", *FIELDS, "label") if name in columns]
    papers = pd.DataFrame({name: columns[name] for name in dict.fromkeys([*first, *columns])})
    return papers.astype({"label": np.int64}) if labelled else papers


def check_uuids(path, uuids, numbers):
    """Raise InputError unless every paper has a uuid of its own. `numbers`: the row of each."""
    rows = dict(zip(reversed(uuids), reversed(numbers)))  # the first row of each uuid
    empty = [number for uuid, number in zip(uuids, numbers) if not uuid.strip()]
    broken = [number for uuid, number in zip(uuids, numbers) if "\n" in uuid or "\r" in uuid]
    repeated = [f"{uuid} (row {number})" for uuid, number in zip(uuids, numbers) if rows[uuid] != number]
    if empty:
        raise InputError(f"{path}: column uuid is empty in row {few(empty)}; every paper needs one")
    if broken:
        raise InputError(f"{path}: column uuid has a line break in row {few(broken)}; is a quote missing there?")
    if repeated:
        raise InputError(f"{path}: column uuid repeats {few(repeated)}; remove the copies")


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


def shared_fields(train, test, wanted=None):
    """The fields of `wanted` (default: all) that both frames have. A line on stderr names those that are left out."""
    kept = [name for name in wanted or FIELDS if name in train and name in test]
    if not kept:
        raise InputError(f"--fields {' '.join(wanted or FIELDS)}: train and test share none of these columns")
    for name in wanted or FIELDS:
        if name not in kept:
            lacking = [side for side, papers in (("train", train), ("test", test)) if name not in papers]
            log(f"field {name} is left out: the {' and the '.join(lacking)} file has no such column")
    return kept


def load_papers(args):
    """Read args.train and args.test and check them together. Returns (train, test, the fields that both have)."""
    train, test = read_papers(args.train, labelled=True), read_papers(args.test)
    texts = [set(zip(papers["title"], papers["abstract"])) - {("", "")} for papers in (train, test)]
    same = texts[0] and texts[0] == texts[1] and set(train["uuid"]) == set(test["uuid"])
    if same or os.path.samefile(args.train, args.test):
        raise InputError(f"{args.test} holds the same papers as {args.train}: give the test file with --test")
    if args.limit:
        train, test = train.head(args.limit), test.head(args.limit)
        check_classes(train["label"], 1, f"{args.train} with --limit {args.limit}")
    limit = f" (--limit {args.limit})" if args.limit else ""
    log(f"{len(train)} papers in {args.train}, {len(test)} in {args.test}{limit}")
    fields = shared_fields(train, test, args.fields)
    again = [text in texts[0] for text in zip(test["title"], test["abstract"])]
    if any(again):
        log(f"warning: {sum(again)} test papers are in {args.train}, too: uuid {few(test['uuid'][again])}")
    for path, papers in ((args.train, train), (args.test, test)):
        if empty := build_text(papers, fields).count(""):
            log(f"warning: {empty} papers of {path} have no text in {' '.join(fields)}; they are kept")
    return train, test, fields


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


def split_papers(papers, valid_ratio=0.1, seed=42):
    """The common split: bool array [papers], True = held out. Of each class `valid_ratio`, at least one paper."""
    check_classes(papers["label"], 2, "train, to hold some out")
    counts = papers["label"].map(papers["label"].value_counts()).to_numpy()
    return draw_ranks(papers, seed) < np.clip(np.round(counts * valid_ratio), 1, counts - 1)


def fold_numbers(papers, folds=5, seed=42):
    """Stratified folds: int array [papers], the fold (0 … folds - 1) in which a paper is held out."""
    check_classes(papers["label"], folds, f"train, for --folds {folds}")
    ranks = draw_ranks(papers, seed) % folds
    return np.where(papers["label"] == 1, folds - 1 - ranks, ranks)  # so that no fold gets both surpluses


# ---- flags -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def number(kind, low, high):
    """A type for add_argument: `kind` is int or float; low <= value <= high."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number "
                                             f"from {low} to {high}")
        return value

    return read


positive_int = number(int, 1, 10**9)
fraction = number(float, 1e-6, 1 - 1e-6)


def data_dir():
    """$DATA_DIR, else data/ if it holds train.csv, else data/sample."""
    own = HERE / "data"
    return Path(os.environ.get("DATA_DIR") or (own if (own / "train.csv").is_file() else own / "sample"))


def arg_parser(doc, split=True, recorded=""):
    """A parser with the flags that every script shares; --fields and --valid-ratio only with `split`. `recorded`: the
    script whose record says what these and --seed are, unless they are given; see take_recorded.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("papers and output").add_argument
    out_dir = Path(os.environ.get("OUT_DIR") or HERE / "outputs")
    add("--train", type=Path, default=data_dir() / "train.csv", metavar="FILE", help="default: %(default)s")
    add("--test", type=Path, default=data_dir() / "test.csv", metavar="FILE", help="default: %(default)s")
    add("--out-dir", type=Path, default=out_dir, metavar="DIR", help="default: %(default)s")
    if split:
        before = f", default: as {recorded} was run" if recorded else ""
        add("--fields", nargs="+", choices=FIELDS, metavar="F",
            help="columns to read" + (before or f", default: {' '.join(FIELDS)}, where both files have it"))
        add("--valid-ratio", type=fraction, default=None if recorded else 0.1, metavar="R",
            help="held-out share of train" + (before or ", default 0.1"))
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N", help="default %(default)s")
    add("--limit", type=positive_int, metavar="N", help="only the first N papers of each file, for a quick look")
    return parser


def take_recorded(args, record, where):
    """Set --fields and --valid-ratio from the record of an earlier script. Raises InputError if they were given, too,
    and differ.
    """
    for name in ("fields", "valid_ratio"):
        given, known = getattr(args, name), record[name]
        if given is not None and (set(given) != set(known) if name == "fields" else given != known):
            shown = " ".join(known) if name == "fields" else known
            raise InputError(f"{where} was made with --{name.replace('_', '-')} {shown}: give that or leave it out, or "
                             "make it again")
        setattr(args, name, known)

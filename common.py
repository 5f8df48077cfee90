"""What the scripts share for papers: read, check, build text, split, score, save, submit. No torch here.

from common import read_papers, build_text
papers = read_papers("data/sample/train.csv", labelled=True)    # DataFrame: uuid, title, author, abstract, ...
texts = build_text(papers, ["title", "abstract"])               # list of str, one a paper
"""

import argparse
import codecs
import csv
import hashlib
import html
import itertools
import json
import os
import re
import shutil
import sys
import time
import unicodedata
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HERE = Path(__file__).resolve().parent
FIELDS = ("title", "author", "abstract", "Keywords")
REQUIRED = ("uuid", "title", "abstract")
NUMBERS = itertools.count()
MAX_COLUMNS = 1000
MAX_CELL = 2**31 - 1  # the csv module's own limit, 128 KiB, is less than an abstract that lost its closing quote


class InputError(Exception):
    """Wrong input or flags: shown as one line on stderr, exit code 2."""


def log(message):
    """A line on stderr; of several processes only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def run_script(main):
    """Run `main()` and turn the faults that a user can mend into one line on stderr and an exit code."""
    try:
        result = main()
        with naming("stdout"):
            print(end="", flush=True)
        return result
    except InputError as error:
        message, code = " ".join(str(error).split()), 2
    except BrokenPipeError:  # who reads stdout or stderr has gone, as in `| head -1`
        message, code = None, 141
    except OSError as error:  # disk full, no permission, ...
        message, code = f"{error.filename or 'input/output'}: {error.strerror or error}", 2
    except KeyboardInterrupt as error:  # it may say how to go on
        message, code = f"interrupted{'; ' if str(error) else ''}{error}", 130
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # what stops all processes is said by the first, and the launcher then ends this one
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    try:
        print(end="", flush=True)
    except OSError:  # what stdout didn't take Python would offer it again at the end, with a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


# ---- reading ---------------------------------------------------------------------------------------------------------


def clean(text):
    """Resolve HTML entities, compose characters (Unicode NFKC), make every run of white space one blank."""
    if "&" in text:
        with suppress(ValueError):  # a number of thousands of digits is no character
            text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def some(values, most=5):
    """'3, 7, 9' or, of many, the first few and how many there are; what can't be printed shows as U+FFFD."""
    values = list(values)
    shown = ["".join(c if c.isprintable() else "\ufffd" for c in str(v)[:40]) for v in values[:most]]
    return ", ".join(shown) + (f" … ({len(values)} in all)" if len(values) > most else "")


def detect_encoding(path):
    """The encoding of a text file: 'utf-8-sig', 'gb18030' or 'utf-16'. Raises InputError where it is no CSV text."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise InputError(f"{path} is an Excel workbook, whatever its name: in Excel, save it as 'CSV UTF-8'")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise InputError(f"{path} is a web page, no CSV: the download went wrong (often a log-in page), fetch it again")

    def fault(encoding):
        """What keeps the file from being text in this encoding, None where nothing does."""
        try:
            with open(path, encoding=encoding, newline="") as file:
                while chunk := file.read(1 << 20):
                    if "\0" in chunk:
                        return "it holds NUL bytes"
        except UnicodeDecodeError as error:
            return f"byte 0x{error.object[error.start]:02x} is no {encoding.removesuffix('-sig').upper()}"

    def foreign(encoding):
        """The characters beyond ASCII at the beginning of the file."""
        with open(path, encoding=encoding, errors="replace", newline="") as file:
            return [c for c in file.read(1 << 24) if not c.isascii()]

    likely = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if not (why := fault(likely)):
        return likely
    # Both encodings accept some bytes of the other. Beyond ASCII, GB18030 read as UTF-8 is nearly all replacement
    # characters; UTF-8 with a few damaged bytes has few, and must not be taken for GB18030.
    read = foreign("utf-8")
    if read.count("\ufffd") > 0.2 * len(read) and not fault("gb18030"):
        # Latin-1 is valid GB18030 where each accented letter stands before a plain one, as if they were a pair. Of
        # Chinese only rare characters are such pairs.
        read = [c.encode("gb18030") for c in foreign("gb18030")]
        if sum(pair[0] >= 0xC0 and pair[1] < 0x80 for pair in read) < 0.5 * len(read):
            return "gb18030"
    raise InputError(f"{path} is damaged or in an unknown encoding ({why}): copy it again, or save it as 'CSV UTF-8'")


def read_cells(path):
    """The cells of a CSV file: (header, rows, row numbers as a spreadsheet shows them, where the header is row 1)."""
    csv.field_size_limit(MAX_CELL)
    with open(path, encoding=detect_encoding(path), newline="") as file:
        first = file.readline()
        delimiter = max(",;\t|", key=first.count)  # a European Excel writes ';', its 'Unicode text' tabs
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)  # an open quote at the end is an error
        number, header, rows, numbers = 0, None, [], []
        try:
            for number, cells in enumerate(reader, 1):
                if not any(map(str.strip, cells)):  # a blank line; spreadsheets leave bare commas at the end
                    continue
                if header is None:
                    header = cells
                    while not header[-1].strip():
                        header.pop()
                    if len(header) > MAX_COLUMNS:
                        raise InputError(f"{path}: the header (row {number}) has {len(header)} columns: no papers file")
                    continue
                if len(cells) != len(header):
                    if len(cells) < len(header) or any(cells[len(header) :]):
                        raise InputError(
                            f"{path}: row {number} has {len(cells)} cells, the header has {len(header)}: the file was "
                            "cut off or a quote is missing there; mend the row or copy the file again"
                        )
                    cells = cells[: len(header)]
                rows.append(cells)
                numbers.append(number)
        except csv.Error as error:
            what = str(error).replace("\t", "tab")
            raise InputError(f"{path}: row {number + 1}: {what}; mend the row or copy the file again") from None
    if header is None:
        raise InputError(f"{path} is empty: copy the file again")
    return header, rows, numbers


def read_papers(path, labelled=False):
    """Read a papers file. Returns a DataFrame in the file's row order: uuid (str, exactly as written), title, abstract
    and, where the file has them, author and Keywords (str, cleaned), with `labelled` label (int, 0 or 1), then every
    further column as it is. Raises InputError, naming file, column and rows, for what can't be used.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; see data/README.md for where the competition's files go")
    header, rows, numbers = read_cells(path)
    known = {name.casefold(): name for name in ("uuid", *FIELDS, *(["label"] if labelled else []))}
    names = [name.replace("\ufeff", "").strip() for name in header]  # two programs may have put a BOM in front
    names = [known.get(name.casefold(), name) for name in names]
    required = [*REQUIRED, *(["label"] if labelled else [])]
    if missing := [name for name in required if name not in names]:
        found = some(names, 8)
        raise InputError(f"{path}: no column {' and no column '.join(missing)}; the header (row 1) has: {found}")
    if repeated := [name for name in dict.fromkeys(names) if name in known.values() and names.count(name) > 1]:
        raise InputError(f"{path}: column {some(repeated)} stands in the header more than once; remove one")
    if not rows:
        raise InputError(f"{path} has a header but no rows: copy the file again")

    columns = dict(zip(names, zip(*rows)))
    del rows
    seen, repeated, empty, broken = set(), [], [], []
    for number, uuid in zip(numbers, columns["uuid"]):
        if not uuid.strip():
            empty.append(number)
        if "\n" in uuid or "\r" in uuid:
            broken.append(number)
        if uuid in seen:
            repeated.append(f"{uuid} (row {number})")
        seen.add(uuid)
    if empty:
        raise InputError(f"{path}: column uuid is empty in row {some(empty)}; every paper needs one")
    if broken:
        raise InputError(f"{path}: column uuid holds a line break in row {some(broken)}; is a quote missing there?")
    if repeated:
        raise InputError(f"{path}: column uuid repeats {some(repeated)}; remove the copies")
    for name in FIELDS:
        if name in columns:
            columns[name] = [clean(cell) for cell in columns[name]]
    if labelled:
        value = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
        columns["label"] = [value.get(cell.strip()) for cell in columns["label"]]
        if wrong := [n for n, label in zip(numbers, columns["label"]) if label is None]:
            raise InputError(f"{path}: column label is neither 0 nor 1 in row {some(wrong)}; mend or remove the rows")
        check_classes(columns["label"], 1, path)
    first = [name for name in ("uuid", *FIELDS, "label") if name in columns]
    papers = pd.DataFrame({name: columns[name] for name in [*first, *(n for n in columns if n not in first)]})
    return papers.astype({"label": np.int64}) if labelled else papers


def check_classes(labels, least, where):
    """Raise InputError unless each of the labels 0 and 1 stands `least` times in `labels`."""
    labels = list(labels)
    for label in (0, 1):
        if (count := labels.count(label)) < least:
            raise InputError(f"{where}: column label is {label} in {count} rows, want {least} or more; add papers")


def fingerprint(papers):
    """16 hex digits that tell whether two frames hold the same papers (uuid, text, label), in whatever order."""
    columns = [name for name in ("uuid", *FIELDS, "label") if name in papers]
    rows = zip(*(papers[name].astype(str) for name in columns))
    rows = sorted(hashlib.sha256("\x1f".join(row).encode()).digest() for row in rows)
    return hashlib.sha256(" ".join(columns).encode() + b"".join(rows)).hexdigest()[:16]


def split_record(args, train, fields):
    """What the instruction data depends on: papers, fields and the common split."""
    return {"fields": fields, "seed": args.seed, "valid_ratio": args.valid_ratio, "train": fingerprint(train)}


def digest(value):
    """16 hex digits that tell whether two JSON values are the same."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def shared_fields(train, test, fields=FIELDS):
    """The fields that both frames have; a line says what was left out. Raises InputError where none is left."""
    kept = [name for name in fields if name in train and name in test]
    if not kept:
        raise InputError(f"--fields {' '.join(fields)}: train and test share none of these columns")
    for name in fields:
        if name not in kept:
            lacking = [side for side, papers in (("train", train), ("test", test)) if name not in papers]
            log(f"field {name} left out of train and test: the {' and the '.join(lacking)} file has no such column")
    return kept


def load_papers(args):
    """Read and check args.train and args.test together. Returns (train, test, fields); says on stderr what is odd."""
    train, test = read_papers(args.train, labelled=True), read_papers(args.test)
    found = f"{len(train)} papers in {args.train}, {len(test)} in {args.test}"
    texts = [set(zip(papers["title"], papers["abstract"])) - {("", "")} for papers in (train, test)]
    if os.path.samefile(args.train, args.test) or (
        texts[0] and texts[0] == texts[1] and set(train["uuid"]) == set(test["uuid"])
    ):
        raise InputError(f"{args.test} holds the same papers as {args.train}: give the test file with --test")
    if args.limit:
        train, test = train.head(args.limit), test.head(args.limit)
        check_classes(train["label"], 1, f"{args.train} with --limit {args.limit}")
        found += f"; --limit {args.limit}: only the first {len(train)} and {len(test)} of them"
    log(found)
    fields = shared_fields(train, test, args.fields or FIELDS)
    if both := texts[0] & texts[1]:
        uuids = [u for u, *text in zip(test["uuid"], test["title"], test["abstract"]) if tuple(text) in both]
        log(f"warning: {len(uuids)} test papers stand in {args.train} too, uuid {some(uuids)} in {args.test}")
    for path, papers in ((args.train, train), (args.test, test)):
        if empty := sum(not text for text in build_text(papers, fields)):
            log(f"warning: {empty} papers of {path} have no text in {' '.join(fields)}; they are kept")
    return train, test, fields


def load_test(args, fields):
    """Read args.test alone, for a model that was trained on `fields`. Raises InputError where it lacks one of them."""
    test = read_papers(args.test)
    log(f"{len(test)} papers in {args.test}")
    if lacking := [name for name in fields if name not in test]:
        raise InputError(f"{args.test} has no column {some(lacking)}, which the model reads: train with other --fields")
    if args.limit:
        log(f"--limit {args.limit}: only the first {len(test.head(args.limit))} of them")
    return test.head(args.limit or len(test))


# ---- text and split --------------------------------------------------------------------------------------------------


def build_text(papers, fields, names=False):
    """One text a paper from the given fields, empty ones left out; the one place where text is made, for train and test
    alike. The abstract comes last, so that whoever cuts the end of a long text cuts the abstract. With `names`, each
    field is preceded by its name ('title: …'), for models that read.
    """
    order = [name for name in ("title", "author", "Keywords", "abstract") if name in fields]
    rows = zip(*(papers[name] for name in order))
    if names:
        return ["\n".join(f"{name.lower()}: {cell}" for name, cell in zip(order, row) if cell) for row in rows]
    return ["\n".join(cell for cell in row if cell) for row in rows]


def build_items(papers, fields):
    """Each paper as a dict of the alpaca form: instruction, input (its text, with the names of the fields) and output
    ("1", "0", or "" where there is no label); the one place where what an LLM is asked is written down.
    """
    names = {"title": "title", "author": "authors", "Keywords": "keywords", "abstract": "abstract"}
    given = [names[name] for name in names if name in fields]
    listed = " and ".join([", ".join(given[:-1]), given[-1]] if len(given) > 1 else given)
    instruction = f"Please judge whether it is a medical field paper, from its {listed}. Output 1 if it is, else 0."
    labels = papers["label"].astype(str) if "label" in papers else [""] * len(papers)
    texts = build_text(papers, fields, names=True)
    return [{"instruction": instruction, "input": text, "output": label} for text, label in zip(texts, labels)]


def draw_ranks(papers, seed):
    """For each paper its place in a random order of its own class. The order is drawn from seed and uuid alone, so it
    depends neither on the order of the rows nor on the library's version. Returns int array [papers].
    """
    keys = [hashlib.sha256(f"{seed} {uuid}".encode()).digest() for uuid in papers["uuid"]]
    ranks, taken = np.zeros(len(papers), dtype=int), {0: 0, 1: 0}
    labels = papers["label"].to_numpy()
    for i in sorted(range(len(papers)), key=keys.__getitem__):
        ranks[i] = taken[labels[i]]
        taken[labels[i]] += 1
    return ranks


def split_papers(papers, valid_ratio=0.1, seed=42):
    """The common split. Returns bool array [papers], True = held out: of each class `valid_ratio`, at least one."""
    check_classes(papers["label"], 2, "train, to hold some out")
    counts = papers["label"].map(papers["label"].value_counts()).to_numpy()
    return draw_ranks(papers, seed) < np.clip(np.round(counts * valid_ratio), 1, counts - 1)


def fold_numbers(papers, folds=5, seed=42):
    """Stratified folds. Returns int array [papers], the fold (0 … folds - 1) in which a paper is held out."""
    check_classes(papers["label"], folds, f"train, for --folds {folds}")
    # Class 1 counts backwards: where no class divides evenly, the surplus doesn't pile up in the first folds.
    ranks = draw_ranks(papers, seed) % folds
    return np.where(papers["label"] == 1, folds - 1 - ranks, ranks)


# ---- scores and files ------------------------------------------------------------------------------------------------


def scores(labels, probs):
    """accuracy, precision, recall, f1 (class 1, threshold 0.5), auc and log_loss (nats) of P(label = 1)."""
    from sklearn import metrics  # a second to import: scripts that only show --help do without

    labels, probs = np.asarray(labels), np.asarray(probs, dtype=float)
    guess = (probs >= 0.5).astype(int)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(labels, guess, average="binary", zero_division=0)
    both = 0 < labels.sum() < len(labels)
    values = {
        "accuracy": np.mean(guess == labels),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auc": metrics.roc_auc_score(labels, probs) if both else np.nan,
        "log_loss": metrics.log_loss(labels, np.clip(probs, 1e-7, 1 - 1e-7), labels=[0, 1]),
    }
    return {name: None if np.isnan(value) else round(float(value), 6) for name, value in values.items()}


def score_table(rows):
    """Text of a table: `rows` is a list of (name, scores, note)."""
    names = ("accuracy", "precision", "recall", "f1", "auc", "log_loss")
    width = max(len("model"), *(len(name) for name, _, _ in rows))
    lines = [f"{'model':<{width}}  " + "  ".join(f"{name:>9}" for name in names) + "  papers, fields"]
    for name, values, note in rows:
        cells = "  ".join("        –" if values[n] is None else f"{values[n]:9.4f}" for n in names)
        lines.append(f"{name:<{width}}  {cells}  {note}")
    return "\n".join(lines)


@contextmanager
def naming(path):
    """Put `path` into an OSError that names no file, as a full disk raises it, and make one of the errors that the
    libraries written in Rust (safetensors, tokenizers) raise then.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextmanager
def replacing(path):
    """Yield a path beside `path` to write a file or a folder to. When the block ends well it takes the place of `path`;
    when it doesn't, it is removed and whatever stood at `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{next(NUMBERS)}.part")  # one may be written within another
    try:
        with naming(path):
            yield beside
            if beside.is_dir() and path.is_dir():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                path.rename(old)
                beside.rename(path)
                shutil.rmtree(old)
            else:
                if beside.is_file():
                    with open(beside, "rb") as file:
                        os.fsync(file.fileno())
                os.replace(beside, path)
    except OSError as error:
        if str(error.filename).startswith(str(beside)):
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(beside) if beside.is_dir() else beside.unlink(missing_ok=True)


@contextmanager
def locked(folder, wanted=True):
    """Keep a second run out of a model's folder. The system drops the lock with the process, however that ends."""
    if not wanted or fcntl is None:
        yield
        return
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{folder} is in use by process {file.read().strip()}: wait for it, or give another --out-dir"
            ) from None
        try:
            with naming(file.name):
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), f"{os.getpid()}\n".encode())
            for left in [*folder.rglob(".*.old")]:  # by a run that was killed between the two renames of replacing()
                if not (home := left.with_name(left.name[1:].rsplit(".", 2)[0])).exists():
                    left.rename(home)
            for left in [*folder.rglob(".*.part"), *folder.rglob(".*.old")]:  # by a run that was killed while writing
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
        finally:
            if os.listdir(folder) == [".lock"]:  # refused before anything was written
                os.unlink(file.name)
                with suppress(OSError):  # others have written there meanwhile
                    for place in new:
                        place.rmdir()


def write_csv(path, columns):
    """Write a dict of columns as CSV (UTF-8, LF)."""
    with replacing(path) as part:
        pd.DataFrame(columns).to_csv(part, index=False, encoding="utf-8", lineterminator="\n")


def write_json(path, value):
    with replacing(path) as part:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save_predictions(path, uuids, probs, labels=None):
    """Write uuid, (label,) prob. Raises ValueError where the probabilities are not one number in [0, 1] a paper."""
    probs = np.asarray(probs, dtype=float)
    if probs.shape != (len(uuids),) or not np.all((probs >= 0) & (probs <= 1)):
        raise ValueError(f"{path}: want {len(uuids)} probabilities in [0, 1], got shape {probs.shape}")
    columns = {"uuid": list(uuids), **({} if labels is None else {"label": list(labels)}), "prob": probs}
    write_csv(path, columns)


def save_results(folder, test, test_probs, metrics, held_out=None, valid_probs=None):
    """Write test.csv, metrics.json and, with the frame of the held-out papers, valid.csv: all of them or none."""
    folder = Path(folder)
    with ExitStack() as stack:  # left in reverse order: metrics.json is renamed last
        metrics_part = stack.enter_context(replacing(folder / "metrics.json"))
        if held_out is not None:
            valid_part = stack.enter_context(replacing(folder / "valid.csv"))
            save_predictions(valid_part, held_out["uuid"], valid_probs, held_out["label"])
        save_predictions(stack.enter_context(replacing(folder / "test.csv")), test["uuid"], test_probs)
        write_json(metrics_part, metrics)
        # Killed between two renames, blend.py takes the folder for that of another test file; its model stays known.
        papers = {name: value for name, value in metrics["papers"].items() if name != "test_fingerprint"}
        write_json(half := folder / ".metrics.json.half.part", metrics | {"papers": papers})
        os.replace(half, folder / "metrics.json")


def read_test_labels(path, test):
    """Labels of the test papers (int array in the order of test), None where the file is not there."""
    if not path.is_file():
        return None
    header, rows, _ = read_cells(path)
    names = [name.strip().casefold() for name in header]
    if "uuid" not in names or "label" not in names:
        raise InputError(f"{path}: no column uuid or label; mend it or move it away")
    labels = {row[names.index("uuid")]: row[names.index("label")].strip() for row in rows}
    if any(labels.get(uuid) not in ("0", "1") for uuid in test["uuid"]):
        log(f"{path} doesn't label all test papers, no test scores")
        return None
    return np.array([int(labels[uuid]) for uuid in test["uuid"]])


def differences(old, new):
    """What differs between two dicts of settings, in words."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in sorted(names))


def read_predictions(path):
    """Read what save_predictions wrote. Returns a DataFrame with uuid (str), (label: int,) prob (float)."""
    try:
        frame = pd.read_csv(path, dtype={"uuid": str, "prob": float}, keep_default_na=False)
        frame = frame[["uuid", *(["label"] if "label" in frame else []), "prob"]]
        if not frame["prob"].between(0, 1).all():
            raise ValueError("a probability is not in [0, 1]")
        return frame
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): run the script that writes it again") from None


def pick_keywords(test, out_dir):
    """(source, keywords): a list of str, one a test paper, from the test file, else from extract_keywords.py's
    outputs/keywords/ where that is of these very papers, else the titles. Single empty cells take the title.
    """
    source, keywords = "the titles", test["title"]
    extracted = Path(out_dir) / "keywords" / "test.csv"
    if "Keywords" in test:
        source, keywords = "the test file", test["Keywords"]
    elif extracted.is_file():
        if read_metrics(extracted.parent).get("papers", {}).get("test_fingerprint") == fingerprint(test):
            try:
                frame = pd.read_csv(extracted, dtype=str, keep_default_na=False).fillna("").set_index("uuid")
                source, keywords = str(extracted), frame["Keywords"].loc[test["uuid"]]
            except (ValueError, KeyError):
                raise InputError(f"{extracted} is damaged: run extract_keywords.py again") from None
            if len(keywords) != len(test):
                raise InputError(f"{extracted} repeats a uuid: run extract_keywords.py again")
        else:
            log(f"warning: {extracted} is of other test papers, not used: run extract_keywords.py again")
    return source, [cell or title for cell, title in zip(keywords, test["title"])]


def write_submission(path, test, labels, out_dir):
    """Write uuid, Keywords, label in the order of the test file. `labels`: 0/1, one a paper."""
    source, keywords = pick_keywords(test, out_dir)
    labels = np.asarray(labels).astype(int)
    if labels.shape != (len(test),) or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{path}: want {len(test)} labels of 0 or 1")
    write_csv(path, {"uuid": test["uuid"].tolist(), "Keywords": keywords, "label": labels})
    log(f"wrote {path}: {len(test)} papers, {labels.sum()} with label 1, Keywords from {source}")


def read_json(path, **types):
    """The content of a JSON file, {} where there is none. Raises InputError for a damaged one and, with `types`, unless
    it is an object with these names and types.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): run the script that writes it again") from None
    if types and not isinstance(value, dict):
        raise InputError(f"{path} is damaged (no object): run the script that writes it again")
    if wrong := [name for name, kind in types.items() if not isinstance(value.get(name), kind)]:
        raise InputError(f"{path} is damaged ({some(wrong)}): run the script that writes it again")
    return value


def read_metrics(folder, **types):
    """The content of folder/metrics.json, {} where there is none; `types` as in read_json."""
    return read_json(Path(folder) / "metrics.json", papers=dict, **types)


def test_record(test):
    """What metrics.json says of the test papers: their number, and a fingerprint by which blend.py knows them again."""
    return {"test": len(test), "test_fingerprint": fingerprint(test)}


def paper_record(train, test, held_out):
    """What metrics.json says of all papers."""
    counts = {"train": len(train), "held_out": int(held_out), "train_fingerprint": fingerprint(train)}
    return counts | test_record(test)


def package_versions():
    """Versions of Python and of those of the kit's packages that are in use."""
    names = {"numpy": "numpy", "pandas": "pandas", "sklearn": "scikit-learn", "torch": "torch"}
    names |= {name: name for name in ("transformers", "peft", "accelerate")}
    used = {package: version(package) for module, package in names.items() if module in sys.modules}
    return {"python": sys.version.split()[0], **used}


def peak_memory_mb():
    """The most main memory this process has held, in MiB; None where the system doesn't tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


# ---- flags -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        log(f"{self.prog}: {message} (see --help)")
        sys.exit(2)


def whole(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def share(text):
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value


def data_dir():
    """$DATA_DIR, else the kit's data/ when it holds train.csv, else data/sample."""
    if os.environ.get("DATA_DIR"):
        return Path(os.environ["DATA_DIR"])
    return HERE / "data" if (HERE / "data" / "train.csv").is_file() else HERE / "data" / "sample"


def arg_parser(doc, split=True):
    """An ArgumentParser with the flags that every script shares; --fields and --valid-ratio only with `split`."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("papers and output")
    add = group.add_argument
    add("--train", type=Path, default=data_dir() / "train.csv", metavar="FILE", help="default: %(default)s")
    add("--test", type=Path, default=data_dir() / "test.csv", metavar="FILE", help="default: %(default)s")
    out_dir = Path(os.environ.get("OUT_DIR") or HERE / "outputs")
    add("--out-dir", type=Path, default=out_dir, metavar="DIR", help="default: %(default)s")
    fields = "what the models read, less what either file lacks; default: " + " ".join(FIELDS)
    if split:
        add("--fields", nargs="+", choices=FIELDS, metavar="F", help=fields)
        add("--valid-ratio", type=share, default=0.1, metavar="R", help="held-out share of train, default %(default)s")
    add("--seed", type=int, default=42, help="default %(default)s")
    add("--limit", type=whole, metavar="N", help="only the first N papers of train and of test, for a quick look")
    return parser

"""What a model leaves under outputs/NAME/: scores, predictions, submission. Every file is written whole or not at all.

    with locked(folder):                                              # no second run in this folder
        save_results(folder, metrics, test, test_probs, held_out, valid_probs)
        write_submission("submit_task1.csv", test, test_probs >= 0.5, out_dir)
"""

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from common import clean, fingerprint, label_column, read_columns, read_label
from lib.cli import InputError, few, log

METRICS = ("accuracy", "precision", "recall", "f1", "auc", "log_loss")
RERUN = "run the script that writes it again"


def scores(labels, probs):
    """accuracy, precision, recall, f1 (class 1, threshold 0.5), auc and log_loss (nats) of P(label = 1). auc is None if
    only one label occurs.
    """
    from sklearn import metrics  # takes a second to import, and --help needs none of it

    labels, probs = np.asarray(labels), np.asarray(probs, dtype=float)
    guess = (probs >= 0.5).astype(int)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(labels, guess, average="binary", zero_division=0)
    auc = metrics.roc_auc_score(labels, probs) if 0 < labels.sum() < len(labels) else None
    log_loss = metrics.log_loss(labels, np.clip(probs, 1e-7, 1 - 1e-7), labels=[0, 1])
    values = dict(zip(METRICS, (np.mean(guess == labels), precision, recall, f1, auc, log_loss)))
    return {name: None if value is None else round(float(value), 6) for name, value in values.items()}


def score_table(rows):
    """A table as text. `rows`: a list of (model, scores, note)."""
    frame = pd.DataFrame([{"model": name, **values, "papers, fields": note} for name, values, note in rows])
    frame = frame.astype(dict.fromkeys(METRICS, float))
    for name in ("model", "papers, fields"):  # to_string would push text to the right
        padded = pd.Series([name, *frame[name]])
        padded = padded.str.ljust(padded.str.len().max()).tolist()
        frame[name] = padded[1:]
        frame = frame.rename(columns={name: padded[0]})
    table = frame.to_string(index=False, float_format="{:.4f}".format, na_rep="–")
    return "\n".join(line.rstrip() for line in table.splitlines())


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def blame(path, part):
    """Let an error about the disk name `path`. Python names `part`, or nothing where the disk is full; safetensors and
    tokenizers, written in Rust, say '… (os error 28)'.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError):
            if error.filename is None or str(error.filename).startswith(str(part)):
                error.filename = str(path)
        elif number:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write a file or a folder to. If the block succeeds, it replaces `path`; if not, it is
    removed and `path` stays as it was. Of a link the target is replaced; a device or a pipe is written to.
    """
    path = Path(path)
    special = path.exists() and not path.is_file() and not path.is_dir() or Path("/dev") in path.parents
    target = Path(tempfile.gettempdir()) / path.name if special else Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        with blame(path, part):
            yield part
            if special:
                path.write_bytes(part.read_bytes())
            elif part.is_dir() and target.is_dir():
                target.rename(old)
                part.rename(target)
                shutil.rmtree(old)
            else:
                if part.is_file():
                    with open(part, "r+b") as file:  # Windows syncs only what is open for writing
                        os.fsync(file.fileno())
                part.replace(target)
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def write_csv(path, columns):
    """Write a dict of columns as CSV (UTF-8, LF)."""
    with atomic_write(path) as part:
        pd.DataFrame(columns).to_csv(part, index=False, encoding="utf-8", lineterminator="\n")


def write_json(path, value):
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_json(path, remedy=RERUN, **types):
    """The content of a JSON file, {} if there is no file. Raises InputError if it is damaged or, with `types`, unless
    it is an object with these names and types: read_json(path, model=str, fields=list).
    """
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from None
    content = value if isinstance(value, dict) else {}
    if wrong := [name for name, kind in types.items() if not isinstance(content.get(name), kind)]:
        raise InputError(f"{path} is damaged (no {few(wrong)} of the right kind): {remedy}")
    return value


@contextmanager
def locked(folder, wanted=True):
    """Keep a second run out of a folder, and tidy up what a killed run left there. The system drops the lock with the
    process, however that ends. Without `wanted` (all processes of a run but the first) nothing happens.
    """
    if not wanted:
        yield
        return
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder} is in use by another run: wait for it, or give another --out-dir") from None
    except OSError as error:  # some network file systems
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise
        log(f"warning: no file locks in {folder} ({error.strerror}): don't start a second run there")
    try:
        tidy(folder)
        yield
    finally:
        if os.listdir(folder) == [".lock"]:  # refused before anything was written
            (folder / ".lock").unlink()
            with suppress(OSError):  # others have written there meanwhile
                for place in new:
                    place.rmdir()
        lock.release()


def tidy(folder):
    """Put back or remove what an atomic_write that was killed left in a folder."""
    for old in [*folder.rglob(".*.old")]:  # killed between the two renames
        home = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if not home.exists():
            old.rename(home)
    for left in [*folder.rglob(".*.part"), *folder.rglob(".*.old")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


# ---- a model's folder ------------------------------------------------------------------------------------------------


def describe_changes(old, new):
    """What differs between two dicts of settings: {"lr": 1}, {"lr": 2} -> 'lr was 1 and is 2'."""
    names = [name for name in sorted({**old, **new}) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in names)


def record_of_test(test):
    """What metrics.json says about the test papers: their number and a fingerprint, by which blend.py knows them."""
    return {"test": len(test), "test_fingerprint": fingerprint(test)}


def paper_record(train, test, held_out):
    """What metrics.json says about all papers. `held_out`: how many of train were held out."""
    counts = {"train": len(train), "held_out": int(held_out), "train_fingerprint": fingerprint(train)}
    return counts | record_of_test(test)


def peak_memory_mb():
    """The most main memory this process has held, in MiB; None on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def environment(device="cpu", peak_memory=None):
    """What metrics.json says about where a model ran: memory in MiB, versions of the packages in use, device."""
    packages = ("numpy", "pandas", "scikit-learn", "torch", "transformers", "peft", "accelerate")
    used = {name: version(name) for name in packages if name.replace("scikit-learn", "sklearn") in sys.modules}
    return {
        "peak_memory_mb": peak_memory_mb() if peak_memory is None else peak_memory,
        "versions": {"python": sys.version.split()[0], **used},
        "device": device,
    }


def write_probs(path, papers, probs, labelled=False):
    """Write uuid, (label,) prob. Raises ValueError unless `probs` is one number in [0, 1] per paper."""
    probs = np.asarray(probs, dtype=float)
    if probs.shape != (len(papers),) or not np.all((probs >= 0) & (probs <= 1)):
        raise ValueError(f"{path}: want {len(papers)} probabilities in [0, 1], got shape {probs.shape}")
    label = {"label": papers["label"].tolist()} if labelled else {}
    write_csv(path, {"uuid": papers["uuid"].tolist(), **label, "prob": probs})


def save_results(folder, metrics, test, test_probs, held_out=None, valid_probs=None):
    """Write test.csv, metrics.json and, with the frame of the held-out papers, valid.csv: all of them or none. A run
    that is killed here leaves the old results, the new ones, or a folder without test.csv: not a finished model.
    """
    folder = Path(folder)
    with ExitStack() as stack:  # left in reverse order: test.csv is put in place last
        test_part, metrics_part = (stack.enter_context(atomic_write(folder / n)) for n in ("test.csv", "metrics.json"))
        if held_out is not None:
            write_probs(stack.enter_context(atomic_write(folder / "valid.csv")), held_out, valid_probs, labelled=True)
        write_probs(test_part, test, test_probs)
        write_json(metrics_part, metrics)
        (folder / "test.csv").unlink(missing_ok=True)


def read_predictions(path):
    """A model's predictions: a frame of uuid (str), label (int, where the file has it) and prob (float). Columns may
    come in any order, and others are ignored. Raises InputError that names the rows.
    """
    cells, numbers = read_columns(path, ["uuid", "prob"])
    columns = {"uuid": [clean(cell) for cell in cells["uuid"]]}
    if "label" in cells:
        columns["label"] = label_column(path, cells["label"], numbers)
    columns["prob"] = pd.to_numeric(pd.Series(cells["prob"], dtype=str), errors="coerce").astype(float)
    wrong = ~columns["prob"].between(0, 1)
    if wrong.any():
        rows = few(np.array(numbers)[wrong])
        raise InputError(f"{path}: column prob is not a number from 0 to 1 in row {rows}: fix it, or {RERUN}")
    return pd.DataFrame(columns)


def read_labels(test_path, test):
    """The labels of the test papers, int array in the order of `test`, from FILE_labels.csv beside FILE.csv; None if
    there is no such file. The labels of one test file say nothing about another: both may number their papers from 0.
    """
    path = Path(test_path).with_name(f"{Path(test_path).stem}_labels.csv")
    if not path.is_file():
        return None
    cells, _ = read_columns(path, ["uuid", "label"])
    labels = {clean(uuid): read_label(label) for uuid, label in zip(cells["uuid"], cells["label"])}
    found = [labels.get(clean(uuid)) for uuid in test["uuid"]]
    if None in found:
        log(f"{path} does not label all test papers: no test scores")
        return None
    return np.array(found)


# ---- submission ------------------------------------------------------------------------------------------------------

KEYWORD_LISTS = {"board": "board.csv", "reader": "test.csv"}  # in the folder of extract_keywords.py


def board_estimate(f1, recall):
    """The score that the board would give: 0.4 x F1 of task 1 + 0.6 x case-sensitive recall of the keywords, mean over
    papers. Inferred from published scores, not official: docs/keywords.md.

    >>> round(board_estimate(0.99, 0.4), 3)
    0.636
    """
    return 0.4 * f1 + 0.6 * recall


def add_keywords_flag(parser):
    parser.add_argument("--keywords", choices=tuple(KEYWORD_LISTS), default="board", help="which list of "
        "extract_keywords.py goes into the submission: the one that scores, or the one that reads well; default board")  # fmt: skip  # noqa: E501


def read_keywords(folder, test, wanted="board"):
    """The cells of a list (a key of KEYWORD_LISTS) in the order of `test`, from extract_keywords.py's
    folder; None if it is not there or about other papers.
    """
    path = Path(folder) / KEYWORD_LISTS[wanted]
    if not path.is_file():
        return None
    record = read_json(path.with_name("metrics.json"), papers=dict) or {"papers": {}}
    if record["papers"].get("test_fingerprint") != fingerprint(test):
        log(f"warning: {path} is about other test papers and not used: run extract_keywords.py again")
        return None
    try:
        lists = pd.read_csv(path, dtype=str, keep_default_na=False)
        by_uuid = dict(zip(lists["uuid"], lists["Keywords"]))
        return [by_uuid[uuid] for uuid in test["uuid"]]
    except (ValueError, KeyError):
        raise InputError(f"{path} is damaged: run extract_keywords.py again") from None


def choose_keywords(test, out_dir, wanted="board"):
    """The Keywords of a submission. Returns (cells, where they are from and why)."""
    if "Keywords" in test:
        return test["Keywords"], "the test file, which has them"
    found = read_keywords(Path(out_dir) / "keywords", test, wanted)
    if found is None:
        return test["title"], "the titles, since extract_keywords.py has not run on these papers"
    why = {"board": "the list that scores (see --keywords)", "reader": "the list that reads well, as --keywords asks"}
    return found, f"keywords/{KEYWORD_LISTS[wanted]}, {why[wanted]}"


def write_submission(path, test, labels, out_dir, wanted="board"):
    """Write uuid, Keywords, label in the order of the test file. Keywords: the test file's own, else the wanted list
    that extract_keywords.py made for these very papers, else the titles; an empty cell takes the title. `labels`: 0/1.
    """
    labels = np.asarray(labels).astype(int)
    if labels.shape != (len(test),) or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{path}: want {len(test)} labels of 0 or 1")
    keywords, source = choose_keywords(test, out_dir, wanted)
    cells = [cell or title for cell, title in zip(keywords, test["title"])]
    write_csv(path, {"uuid": test["uuid"].tolist(), "Keywords": cells, "label": labels})
    log(f"wrote {path}: {len(test)} papers, {labels.sum()} with label 1, Keywords from {source}")


def warn_one_class(labels, train_labels):
    """Log a warning if at least 99 % of the test papers get one class although train has 10 % or more of each. Returns
    the warning, "" if there is none. Both: sequences of 0/1. Fewer than ten test papers may happen to be of one class.
    """
    share, usual = np.mean(labels), np.mean(train_labels)
    if len(labels) < 10 or 0.01 < share < 0.99 or not 0.1 <= usual <= 0.9:
        return ""
    label = int(share > 0.5)
    count, usual = np.sum(np.asarray(labels) == label), usual if label else 1 - usual
    warning = f"warning: {count:,} of {len(labels):,} test papers get label {label}, in train {usual:.0%} have it: "
    warning += "are the fields of the test file filled?"
    log(warning)
    return warning

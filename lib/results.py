"""What a model leaves under outputs/NAME/: scores, predictions, a submission.

    with files.locked(folder):
        results.finish(folder, args, metrics, train, test, test_probs, held_out, valid_probs, table)
"""

import hashlib
import sys
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

from common import label_column, read_label
from lib.cli import FIELDS, InputError, few, log
from lib.files import RERUN, atomic_write, read_json, write_csv, write_json
from lib.tables import read_columns

import numpy as np
import pandas as pd

METRICS = ("accuracy", "precision", "recall", "f1", "auc", "log_loss")


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
    names, values, notes = zip(*rows)
    frame = pd.DataFrame(values, index=[name.ljust(5) for name in names], columns=METRICS, dtype=float)
    lines = frame.to_string(float_format="{:.4f}".format, na_rep="–").splitlines()
    lines = ["model" + lines[0][5:], *lines[1:]]
    return "\n".join([f"{line}  {note}" for line, note in zip(lines, ["papers, fields", *notes])])


# ---- a model's folder ------------------------------------------------------------------------------------------------


def describe_changes(old, new):
    """What differs between two dicts of settings: {"lr": 1}, {"lr": 2} -> 'lr was 1 and is 2'."""
    names = [name for name in sorted({**old, **new}) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in names)


def fingerprint(papers):
    """16 hex digits that identify a set of papers (uuid, text, label), whatever their order."""
    columns = [name for name in ("uuid", *FIELDS, "label") if name in papers]
    rows = zip(*(papers[name].astype(str) for name in columns))
    hashes = sorted(hashlib.sha256("\x1f".join(row).encode()).digest() for row in rows)
    return hashlib.sha256(" ".join(columns).encode() + b"".join(hashes)).hexdigest()[:16]


def record_of_test(test):
    """What metrics.json says about the test papers: their number and a fingerprint, by which blend.py knows them."""
    return {"test": len(test), "test_fingerprint": fingerprint(test)}


def paper_record(train, test, held_out):
    """What metrics.json says about all papers. `held_out`: how many of train were held out."""
    counts = {"train": len(train), "held_out": int(held_out), "train_fingerprint": fingerprint(train)}
    return counts | record_of_test(test)


def peak_memory_mb():
    """The most main memory this process has held, in MiB; None on Windows, which does not say."""
    with suppress(ImportError):
        import resource

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


def finish(folder, args, metrics, train, test, test_probs, held_out, valid_probs, table):
    """The end of every model: write its folder and submit_task1.csv there, warn, print its scores.

    metrics: what metrics.json says besides the papers. train: None where only test papers were scored; then `metrics`
    holds the record of an earlier run. held_out: frame of the papers with valid_probs, or None. table: rows of
    score_table.
    """
    if train is None:
        metrics["papers"] |= record_of_test(test)
    else:
        metrics["papers"] = paper_record(train, test, len(held_out))
    guess = np.asarray(test_probs) >= 0.5
    save_results(folder, metrics, test, test_probs, held_out, valid_probs)
    if table:
        print(score_table(table))
    warn_one_class(guess, [0, 1] if train is None else train["label"])
    write_submission(folder / "submit_task1.csv", test, guess, args.out_dir, args.keywords)


def read_predictions(path):
    """A model's predictions: a frame of uuid (str, as written), label (int, where the file has it) and prob (float).
    Columns may come in any order, and others are ignored. Raises InputError that names the rows.
    """
    cells, numbers = read_columns(path, ["uuid", "prob"])
    columns = {"uuid": cells["uuid"]}
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
    path = Path(test_path).with_name(f"{Path(test_path).name.split('.')[0]}_labels.csv")
    if not path.is_file():
        return None
    cells, _ = read_columns(path, ["uuid", "label"])
    labels = dict(zip(cells["uuid"], map(read_label, cells["label"])))
    found = [labels.get(uuid) for uuid in test["uuid"]]
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
        "extract_keywords.py to submit: board, made for recall, or reader, few and likely; default board")  # fmt: skip


def read_keywords(folder, test, wanted="board"):
    """The cells of a list (a key of KEYWORD_LISTS) in the order of `test`, from extract_keywords.py's folder; None if
    it is not there or about other papers.
    """
    path = Path(folder) / KEYWORD_LISTS[wanted]
    if not path.is_file():
        return None
    record = read_json(path.with_name("metrics.json"), papers=dict) or {"papers": {}}
    if record["papers"].get("test_fingerprint") != fingerprint(test):
        log(f"warning: {path} is about other test papers and not used: run extract_keywords.py again")
        return None
    cells, _ = read_columns(path, ["uuid", "Keywords"])
    by_uuid = dict(zip(cells["uuid"], cells["Keywords"]))
    if not by_uuid.keys() >= set(test["uuid"]):
        raise InputError(f"{path} is damaged: run extract_keywords.py again")
    return [by_uuid[uuid] for uuid in test["uuid"]]


def choose_keywords(test, out_dir, wanted="board"):
    """The Keywords of a submission: the test file's own, else the wanted list that extract_keywords.py made for these
    very papers, else the titles. Returns (cells, where they are from).
    """
    if "Keywords" in test:
        return test["Keywords"], "the test file, which has them"
    found = read_keywords(Path(out_dir) / "keywords", test, wanted)
    if found is None:
        return test["title"], "the titles, since extract_keywords.py has not run on these papers"
    return found, f"keywords/{KEYWORD_LISTS[wanted]} (--keywords {wanted})"


def write_submission(path, test, labels, out_dir, wanted="board"):
    """Write uuid, Keywords, label in the order of the test file; an empty cell of Keywords takes the title. `labels`:
    0 or 1 of each paper.
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

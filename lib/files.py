"""Files that are written whole or not at all, and a lock on a folder.

    with locked(folder):                                   # no second run in this folder
        with atomic_write(folder / "test.csv") as part:    # a kill leaves the old file or the new one
            part.write_text("uuid,prob\\n")
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from lib.cli import InputError, few, is_first, log

import pandas as pd
from filelock import FileLock, Timeout

RERUN = "run the script that writes it again"


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write a file or a folder to. If the block succeeds, it replaces `path`; if not, it is
    removed and `path` stays as it was. Of a link the target is replaced; a device or a pipe is written to. An OSError,
    since the disk is full, say, names `path`.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if part.is_file():
            with open(part, "r+b") as file:  # Windows syncs only what is open for writing
                os.fsync(file.fileno())
        if part.is_dir() and path.is_dir():  # a file never takes the place of a folder
            path.rename(old)
        part.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if isinstance(error, OSError) or "(os error" in str(error):  # safetensors and tokenizers have errors of Rust
            raise OSError(0, getattr(error, "strerror", None) or str(error), str(path)) from error
        raise
    finally:
        remove(part)


def remove(path):
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_csv(path, columns):
    """Write a dict of columns, or a list of dicts, as CSV (UTF-8, LF)."""
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
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # an editor may put a byte-order mark in front
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from None
    content = value if isinstance(value, dict) else {}
    wrong = [name for name, kind in types.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise InputError(f"{path} is damaged (no {few(wrong)} of the right kind): {remedy}")
    return value


@contextmanager
def locked(folder):
    """Keep a second run out of a folder, and tidy up what a killed run left there. The system drops the lock with the
    process, however that ends. Of several processes of a run the first has the lock for all.
    """
    if not is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder} is in use by another run: wait for it, or give another --out-dir") from None
    except OSError as error:  # some network file systems
        log(f"warning: no file locks in {folder} ({error.strerror}): don't start a second run there")
    try:
        tidy(folder)
        yield
    finally:
        lock.release()


def tidy(folder):
    """Put back or remove what an atomic_write that was killed left in a folder."""
    for old in [*folder.rglob(".*.old")]:  # killed between the two renames
        home = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if not home.exists():
            old.rename(home)
    for left in [*folder.rglob(".*.part"), *folder.rglob(".*.old")]:
        remove(left)

"""What every script shares with its user: flags, log lines, errors in one line. No torch here.

    def main():
        args = cli.arg_parser(__doc__).parse_args()

    if __name__ == "__main__":
        cli.run_script(main)
"""

import argparse
import io
import os
import sys
import time
from pathlib import Path

# What libraries read when they are loaded, so the kit's modules are imported before them. What the user has set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # a thread that waits sleeps: others may want its core
os.environ["MPLBACKEND"] = "svg"  # a notebook sets one that .venv doesn't have
if os.environ.get("HF_ENDPOINT"):  # a mirror passes on to the Xet server, which is as blocked as the hub
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

KIT = Path(__file__).resolve().parent.parent
FIELDS = ("title", "author", "abstract", "Keywords")  # the columns that a model may read, see --fields


class InputError(Exception):
    """Wrong input or flags: shown as one line on stderr, exit code 2."""


def is_first():
    """Whether this is the first of the processes that accelerate launch has started, or the only one."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def log(message):
    """Print a line to stderr, from the first process only."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def few(values, most=5):
    """The first few of many values as printable text.

    >>> few([3, 7, 9, 12, 15, 20])
    '3, 7, 9, 12, 15 … (6 in all)'
    """
    values = list(values)
    shown = ["".join(c if c.isprintable() else "\ufffd" for c in str(value)[:40]) for value in values[:most]]
    return ", ".join(shown) + (f" … ({len(values)} in all)" if len(values) > most else "")


def open_streams():
    """Make every print() safe: what goes to a closed stream is dropped, what the terminal can't show becomes '?'."""
    for name in ("stdin", "stdout", "stderr"):  # in fd order: open() takes the lowest free number
        if getattr(sys, name) is None:  # closed; print() to a closed stderr would go to stdout
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has another kind
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
    try:
        sys.stdout.flush()
    except OSError:  # else Python fails once more when it flushes stdout at exit
        sys.stdout = open(os.devnull, "w")
    if not is_first():
        time.sleep(3)  # let the first say it: the launcher ends all as soon as one has ended
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


# ---- flags -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def bounded(kind, low, high):
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


positive_int = bounded(int, 1, 10**9)
fraction = bounded(float, 1e-6, 1 - 1e-6)


def path(text):
    """A path as a flag or a variable names it; '~' is the home, though no shell has looked at it."""
    return Path(text).expanduser()


def data_dir():
    """$DATA_DIR, else data/ if it holds train.csv, zipped or not, else data/sample."""
    own = KIT / "data"
    found = (own / "train.csv").is_file() or (own / "train.csv.zip").is_file()
    return path(os.environ.get("DATA_DIR") or (own if found else own / "sample"))


def data_file(name):
    """The path of a CSV file in data_dir(), as it is or as train.csv.zip."""
    plain, zipped = data_dir() / name, data_dir() / f"{name}.zip"
    return zipped if zipped.is_file() and not plain.is_file() else plain


def arg_parser(doc, *names):
    """A parser with --out-dir and those of the shared flags that are named: a script has a flag, or it does not.

    names: "train", "test", "fields", "valid_ratio", "split_seed", "seed", "limit".
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    seed = {"type": bounded(int, 0, 2**32 - 1), "default": 42, "metavar": "N"}
    flags = {
        "train": {"type": path, "default": data_file("train.csv"), "metavar": "FILE", "help": "default: %(default)s"},
        "test": {"type": path, "default": data_file("test.csv"), "metavar": "FILE", "help": "default: %(default)s"},
        "fields": {"nargs": "+", "choices": FIELDS, "metavar": "F",
                   "help": f"columns to read, default: {' '.join(FIELDS)}, where both files have it"},
        "valid_ratio": {"type": fraction, "default": 0.1, "metavar": "R", "help": "of train, to hold out; default 0.1"},
        "split_seed": {**seed, "help": "of the choice of held-out papers, the same for all models; default 42"},
        "seed": {**seed, "help": "default %(default)s"},
        "limit": {"type": positive_int, "metavar": "N", "help": "only the first N papers of each file"},
    }  # fmt: skip
    add = parser.add_argument_group("papers and output").add_argument
    for name in names:
        add(f"--{name.replace('_', '-')}", **flags[name])
    out_dir = path(os.environ.get("OUT_DIR") or KIT / "outputs")
    add("--out-dir", type=path, default=out_dir, metavar="DIR", help="default: %(default)s")
    return parser

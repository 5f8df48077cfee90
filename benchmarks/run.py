"""The kit beside what one would otherwise run: scores, speed and memory, measured in one go -> docs/benchmarks.md.

    python benchmarks/run.py --data ~/papers                           every group, three rounds
    python benchmarks/run.py --data ~/papers --only words keywords     these groups; the tables of the others stay
    python benchmarks/run.py --quick                                   minutes: does it all run? Tables are only shown

The peers are installed by benchmarks/requirements.txt; of one that isn't, a line says so. Each row runs as a user runs
it, in processes of its own on the CPU. Rows take turns within a round, so that a slow minute hits all of them. Another
round has another seed: of the papers that are held out, of new weights, of the order.

In each round a fifth of train.csv is held out. Rows learn from the rest and are asked for the test papers (labels:
test_labels.csv, where there is one) and the held-out ones.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import timeit
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
KIT = HERE.parent
sys.path.insert(0, str(KIT))

import common  # noqa: E402
from lib import cli, files, results  # noqa: E402
from lib.cli import InputError, log, positive_int  # noqa: E402
from peers import GOAL  # noqa: E402

PACKAGES = ("scikit-learn", "torch", "transformers", "peft", "fasttext-numpy2", "keybert", "yake")
COLUMNS = {  # of a table: its head, and how a value is shown
    "test_accuracy": ("test accuracy", "{:.3f}"),
    "held_out_accuracy": ("held-out accuracy", "{:.3f}"),
    "held_out_f1": ("held-out F1", "{:.3f}"),
    "keyword_f1": ("keyword F1", "{:.3f}"),
    "keyword_recall": ("recall, case-sensitive", "{:.3f}"),
    "minutes_to_goal": (f"minutes of training to {GOAL} on the test papers", "{:.1f}"),
    "train_speed": ("training, papers/s", "{:.2f}"),
    "train_ratio": ("training, kit ÷ this", "{:.2f}"),
    "predict_speed": ("predicting, papers/s", "{:.2f}"),
    "predict_ratio": ("predicting, kit ÷ this", "{:.2f}"),
    "seconds": ("seconds in all", "{:.1f}"),
    "memory": ("peak memory, GB", "{:.2f}"),
}
QUICK = 16  # papers to learn from, test papers and held-out papers of --quick, each
LOW = ("seconds", "memory")  # columns where less is better
UNRANKED = ("minutes_to_goal", "train_ratio", "predict_ratio")  # columns where nothing is bold
SCORES = ("test_accuracy", "held_out_accuracy", "held_out_f1", "seconds", "memory")
LEARNING = ("test_accuracy", "held_out_accuracy", "minutes_to_goal", "train_speed", "predict_speed", "memory")
SPEED = ("train_speed", "train_ratio", "predict_speed", "predict_ratio", "memory")


# ---- what is compared ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    name: str  # in the table
    commands: str  # scripts with their flags, joined by &&; the last one leaves the predictions


@dataclass
class Group:
    title: str
    about: str  # how to read the table
    columns: tuple  # of its table
    rows: list
    learn: int | None = None  # papers to learn from, None: all
    ask: int | None = None  # test papers and held-out papers, each, None: all
    goal: bool = False  # measure the time to GOAL
    keywords: bool = False  # scored by keywords, on held-out papers alone
    busy: bool = False  # measured beside a process that keeps a core busy


BERT = "bert_finetune.py --model embedded --precision fp32"
LORA = "--model embedded --precision fp32 --epochs 1 --max-length 512 --batch-size 8 --no-short-copies"
GROUPS = {
    "words": Group(
        "Words",
        "The kit's time includes five folds, each with and without the authors. fastText sees the authors as words; "
        "the kit counts their characters.",
        SCORES,
        rows=[
            Row("**baseline.py**", "baseline.py"),
            Row("the tutorial's recipe: (1,10)-grams, logistic regression", "peers.py tutorial_words"),
            Row("fastText, supervised", "peers.py fasttext"),
        ],
    ),
    "bert": Group(
        "BERT: time to learn",
        "MiniLM, 192 tokens, the kit's default. The others are looked at four times an epoch, which is not counted.",
        LEARNING, learn=1100, ask=100, goal=True,
        rows=[
            Row("**bert_finetune.py**", BERT),
            Row("the tutorial's loop, learning rate 3e-5", "peers.py tutorial_bert --max-length 192"),
            Row("transformers' Trainer, the kit's 3e-4", "peers.py trainer_bert --max-length 192 --lr 3e-4"),
        ],
    ),
    "bert-speed": Group(
        "BERT: speed, like for like",
        "MiniLM, 512 tokens, batch 16, one epoch, each paper once. Loading and tokenizing aren't counted.",
        SPEED, learn=48, ask=96,
        rows=[
            Row("**bert_finetune.py**", f"{BERT} --epochs 1 --max-length 512 --no-short-copies"),
            Row("the tutorial's loop", "peers.py tutorial_bert"),
            Row("transformers' Trainer", "peers.py trainer_bert"),
        ],
    ),
    "lora-speed": Group(
        "LLM: speed, like for like",
        "SmolLM2-135M, 512 tokens, one epoch of few papers, too few to learn from; trained in batches of 8.",
        SPEED, learn=24, ask=12,
        rows=[
            Row("**lora_finetune.py, lora_predict.py**",
                f"make_llm_data.py && lora_finetune.py {LORA} && lora_predict.py --precision fp32"),
            Row("peft + transformers' Trainer, then a chat about one paper at a time", "peers.py chat_lora"),
        ],
    ),
    "keywords": Group(
        "Keywords",
        "The kit's row is the reader's list; KeyBERT, YAKE and TF-IDF give ten keywords a paper. The kit's time "
        "includes learning from all other papers. F1 is micro, exact match in any case; recall is the mean over "
        "papers, case-sensitive.",
        ("keyword_f1", "keyword_recall", "seconds", "memory"), ask=100, keywords=True,
        rows=[
            Row("**extract_keywords.py**", "extract_keywords.py --submit k.csv"),
            Row("KeyBERT on MiniLM", "peers.py keybert"),
            Row("YAKE", "peers.py yake"),
            Row("TF-IDF of (1,3)-grams", "peers.py tfidf"),
            Row("the title", "peers.py title"),
        ],
    ),
}  # fmt: skip
for name in ("bert", "lora-speed"):
    like = GROUPS[name]
    GROUPS[f"{name}-busy"] = replace(like, title=f"{like.title}, beside a process that keeps a core busy", busy=True)
# The folder under outputs/ to which a script writes; a peer's has its name.
OUTPUTS = {"baseline.py": "baseline", "bert_finetune.py": "bert", "lora_predict.py": "lora"}
OUTPUTS["extract_keywords.py"] = "keywords"
LACKS = {"make_llm_data.py": "--seed", "lora_finetune.py": "--test", "lora_predict.py": "--seed"}  # of what all get


# ---- papers of a round -----------------------------------------------------------------------------------------------


def draw_papers(args, group, seed):
    """The papers of a round, the same for all rows. Returns (papers to learn from, papers asked for, their fields). The
    asked are test papers, then held-out ones, with columns label (-1: unknown) and is_test.
    """
    train = common.read_papers(args.data / "train.csv", labelled=True)
    test = common.read_papers(args.data / "test.csv")
    labels = results.read_labels(args.data / "test.csv", test)
    test["label"] = -1 if labels is None else labels
    fields = [name for name in common.FIELDS if name in train and name in test]
    if group.keywords:
        train, test = train[train["Keywords"] != ""], test.head(0).assign(Keywords="")
        fields = ["title", "abstract"]
    held_out = common.split_papers(train, 0.2, seed)
    parts = [test.assign(is_test=True), train[held_out].assign(is_test=False)]
    few = QUICK if args.quick else None
    asked = pd.concat([part.head(few or group.ask or len(part)) for part in parts], ignore_index=True)
    asked["uuid"] = [f"asked {number}" for number in range(len(asked))]  # both files may number from 0
    return train[~held_out].head(few or group.learn or len(train)), asked, fields


def write_papers(folder, group, learn, asked, fields):
    """Write train.csv, test.csv and, for the time to the goal, labels.csv. What the test file lacks stays in train.csv:
    the tutorial's recipe learns from it.
    """
    learn.to_csv(folder / "train.csv", index=False)
    asked[["uuid", *fields]].to_csv(folder / "test.csv", index=False)
    if group.goal:
        asked[asked["is_test"]][["uuid", "label"]].to_csv(folder / "labels.csv", index=False)


# ---- one row, once ---------------------------------------------------------------------------------------------------


def run_row(row, folder, seed):
    """Run the commands of a row. Returns (the folder with the predictions, seconds in all). Raises InputError with the
    last line of one that failed.
    """
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    for command in row.commands.split(" && "):
        script, *flags = command.split()
        if script == "peers.py":
            given = [HERE / script, flags[0], folder, *flags[1:], "--seed", seed]
        else:
            shared = {"--train": folder / "train.csv", "--test": folder / "test.csv", "--seed": seed}
            shared.pop(LACKS.get(script), None)
            given = [KIT / script, "--out-dir", folder / "outputs", *chain(*shared.items()), *flags]
        done = subprocess.run([sys.executable, *map(str, given)], env=env, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise InputError(lines[-1] if lines else f"{script}: exit code {done.returncode}")
    return folder / "outputs" / (OUTPUTS.get(script) or flags[0]), time.perf_counter() - started


def measure(row, group, folder, asked, seed):
    """Run a row and read what it left. Returns {column: value}."""
    output, seconds = run_row(row, folder, seed)
    metrics = files.read_json(output / "metrics.json")
    peaks = [metrics[name] for name in ("peak_memory_mb", "train_peak_memory_mb") if metrics.get(name)]
    found = {"seconds": seconds, "memory": max(peaks) / 1024}
    if group.keywords:
        return found | score_keywords(output / "test.csv", asked)
    for name in ("train", "predict"):
        if f"{name}_papers_per_second" in metrics:
            found[f"{name}_speed"] = metrics[f"{name}_papers_per_second"]
    probs = results.read_predictions(output / "test.csv").set_index("uuid")["prob"].loc[asked["uuid"]].to_numpy()
    found |= score_labels(probs, asked)
    if group.goal:
        reached = metrics.get("seconds_to_goal", metrics["train_seconds"] if found["test_accuracy"] >= GOAL else None)
        found["minutes_to_goal"] = None if reached is None else reached / 60
        found["epochs"] = max(metrics["epochs_run"])
    return found


def score_labels(probs, asked):
    """Accuracy on the test papers, where their labels are known, and accuracy and F1 on the held-out ones."""
    found = {}
    for name, rows in (("test", asked["is_test"]), ("held_out", ~asked["is_test"])):
        labels = asked["label"][rows].to_numpy()
        if len(labels) and (labels >= 0).all():
            values = results.scores(labels, probs[rows])
            found |= {f"{name}_accuracy": values["accuracy"], f"{name}_f1": values["f1"]}
    return found


def score_keywords(path, asked):
    """Micro F1 in any case, and mean case-sensitive recall, of a file: uuid, Keywords joined by ';'."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("uuid")["Keywords"]
    right, given, wanted, recalls = 0, 0, 0, []
    for uuid, cell in zip(asked["uuid"], asked["Keywords"]):
        picked, true = split_keywords(frame[uuid]), split_keywords(cell)
        recalls.append(len(picked & true) / len(true))
        picked, true = ({word.casefold() for word in words} for words in (picked, true))
        right, given, wanted = right + len(picked & true), given + len(picked), wanted + len(true)
    return {"keyword_f1": 2 * right / max(given + wanted, 1), "keyword_recall": float(np.mean(recalls))}


def split_keywords(cell):
    """'a; B ;a' -> {'a', 'B'}"""
    return {word.strip() for word in cell.split(";")} - {""}


# ---- all rounds ------------------------------------------------------------------------------------------------------


@contextmanager
def busy_core(wanted):
    """If `wanted`, keep one core busy meanwhile."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass" if wanted else ""])
    try:
        yield
    finally:
        other.kill()


def measure_group(group, args):
    """All rounds of a group. Returns ({row name: [what was measured, a dict a round]}, faults: list of str, which
    papers there were: str).
    """
    found, faults = {row.name: [] for row in group.rows}, []
    for seed in range(1, args.rounds + 1):
        learn, asked, fields = draw_papers(args, group, seed)
        done = {}
        for row in group.rows:
            log(f"{time.strftime('%H:%M:%S')} round {seed} of {args.rounds}: {row.name}")
            with tempfile.TemporaryDirectory() as folder, busy_core(group.busy):
                write_papers(Path(folder), group, learn, asked, fields)
                try:
                    done[row.name] = measure(row, group, Path(folder), asked, seed)
                except InputError as error:
                    faults.append(f"{row.name}: {error}")
                    log(f"    failed: {error}")
        for name, values in add_ratios(done, group.rows[0].name).items():
            found[name].append(values)
    tests = int(asked["is_test"].sum())
    counts = {"papers to learn from": len(learn), "test papers": tests, "held out": len(asked) - tests}
    papers = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) + "; "
    return found, faults, papers + " + ".join(fields)


def add_ratios(done, first):
    """Add to the rows of a round how much faster the first row was: {"a": {"train_speed": 6}, "b": {"train_speed": 2}},
    "a" -> b gets train_ratio 3.
    """
    for name, values in done.items():
        for kind in ("train", "predict"):
            speeds = [row.get(f"{kind}_speed") for row in (done.get(first, {}), values)]
            if name != first and all(speeds):
                values[f"{kind}_ratio"] = speeds[0] / speeds[1]
    return done


# ---- tables ----------------------------------------------------------------------------------------------------------


def cell(column, rounds):
    """Mean and standard deviation of a column over the rounds: '0.990 ± 0.003'."""
    values = [values[column] for values in rounds if column in values]
    shown = COLUMNS[column][1]
    if not values:
        return "–"
    if None in values:
        epochs = max(row["epochs"] for row in rounds)
        return f"not in {epochs} epoch{'s' * (epochs > 1)} ({values.count(None)} of {len(values)} times)"
    spread = f" ± {shown.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return shown.format(np.mean(values)) + spread


def best_row(column, found):
    """The row that is better than every other by more than both standard deviations together; None if no row is."""
    stats = []
    for name, rounds in found.items():
        values = [values[column] for values in rounds if column in values]
        if len(values) < 2 or column in UNRANKED:
            return None
        stats.append((np.mean(values) * (-1 if column in LOW else 1), np.std(values, ddof=1), name))
    (best, spread, name), *others = sorted(stats, reverse=True)
    return name if all(best - mean > spread + other for mean, other, _ in others) else None


def make_table(columns, found):
    """A Markdown table of the rows; the best of a column is bold, if it is the best beyond the spread."""
    found = {name: rounds for name, rounds in found.items() if rounds}
    lines = [["", *(COLUMNS[column][0] for column in columns)], ["---"] * (len(columns) + 1)]
    best = {column: best_row(column, found) for column in columns}
    for name, rounds in found.items():
        cells = [cell(column, rounds) for column in columns]
        cells = [f"**{text}**" if best[column] == name else text for column, text in zip(columns, cells)]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_machine():
    """Processor, cores, speed of a product of two fp32 matrices (the best of 5), and versions, in a line."""
    a = np.ones((2048, 2048), dtype=np.float32)
    best = min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = re.findall(r"model name\s*: (.*)", info) or ["unknown processor"]
    versions = [f"Python {sys.version.split()[0]}"]
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return f"{names[0]}, {os.cpu_count()} cores, {2 * 2048**3 / best / 1e9:.0f} GFLOP/s; {', '.join(versions)}"


def describe_group(name, group, found, faults, papers, args):
    """The section of docs/benchmarks.md about a group."""
    flags = "--quick" if args.quick else f"--only {name} --rounds {args.rounds} --data DIR"
    parts = [
        f"## {group.title}",
        group.about,
        make_table(group.columns, found),
        f"{papers}; n = {args.rounds}, mean ± standard deviation; bold: the best beyond the spread. "
        f"{describe_machine()}. `python benchmarks/run.py {flags}`",
        f"Not run: {'; '.join(dict.fromkeys(faults))}." if faults else "",
    ]
    return "\n\n".join(part for part in parts if part)


HEAD = """# Benchmarks

The kit beside what one would otherwise run, written by `benchmarks/run.py`: a section a group, each measured in one go
on one machine. Rows of one table compare with each other; tables of different machines don't.
`python benchmarks/run.py --quick` shows in about five minutes that it all runs, on a few papers of the sample.
"""


def write_section(path, name, text):
    """Put a group's section into the file, in place of its old one, and leave the other groups' as they are."""
    page = path.read_text(encoding="utf-8") if path.is_file() else HEAD
    old = dict(re.findall(r"<!-- (\S+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    old[name] = text
    sections = [f"<!-- {group} -->\n{old[group]}\n<!-- end -->\n" for group in GROUPS if group in old]
    with files.atomic_write(path) as part:
        part.write_text("\n".join([HEAD, *sections]), encoding="utf-8")


# ---- main ------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=cli.data_dir(), metavar="DIR", help="train.csv, test.csv and test_labels.csv; "
        "default: %(default)s")  # fmt: skip
    add("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    add("--rounds", type=positive_int, default=3, metavar="N", help="default %(default)s")
    add("--quick", action="store_true", help=f"one round with {QUICK} papers, idle; docs/benchmarks.md stays as it is")
    add("--doc", type=Path, default=KIT / "docs" / "benchmarks.md", metavar="FILE", help="default: %(default)s")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
        args.only = [name for name in args.only if not GROUPS[name].busy]
    return args


def main():
    args = parse_args()
    failed = 0
    for name in args.only:
        group = GROUPS[name]
        found, faults, papers = measure_group(group, args)
        text = describe_group(name, group, found, faults, papers, args)
        if not args.quick:
            write_section(args.doc, name, text)
        print(text, flush=True)
        failed += any("No module named" not in fault for fault in faults)
    if failed:
        sys.exit(f"run.py: rows of {failed} groups failed, see above")


if __name__ == "__main__":
    cli.run_script(main)

"""The kit beside what one would otherwise run: scores, speed and memory, as the tables of docs/benchmarks.md.

    python benchmarks/run.py --data ~/papers                           every group, three rounds
    python benchmarks/run.py --data ~/papers --only words keywords     these groups
    python benchmarks/run.py --data ~/papers --only words --limit 100  quick, with few papers

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
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd

KIT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(KIT))

import common  # noqa: E402
import extract_keywords  # noqa: E402
from lib import candidates, cli, files, results  # noqa: E402
from lib.cli import InputError, log, positive_int  # noqa: E402

PACKAGES = ("scikit-learn", "torch", "transformers", "peft", "fasttext-numpy2", "keybert", "yake")
COLUMNS = {  # of the tables: the head, and how many decimals
    "test_accuracy": ("test accuracy", 3),
    "held_out_accuracy": ("held-out accuracy", 3),
    "held_out_f1": ("held-out F1", 3),
    "keyword_f1": ("keyword F1", 3),
    "keyword_recall": ("recall, case-sensitive", 3),
    "train_seconds": ("training, seconds", 1),
    "train_papers_per_second": ("training, papers/s", 2),
    "predict_papers_per_second": ("predicting, papers/s", 2),
    "seconds": ("seconds in all", 1),
    "memory": ("peak memory, GB", 2),
}
TIMES = ("train_seconds", "train_papers_per_second", "predict_papers_per_second")  # as in metrics.json
SCORES = ("test_accuracy", "held_out_accuracy", "held_out_f1", "seconds", "memory")
LEARNING = ("test_accuracy", "held_out_accuracy", *TIMES, "memory")
SPEED = (*TIMES[1:], "memory")
KEYWORDS = ("keyword_f1", "keyword_recall", "seconds", "memory")


# ---- what is compared ------------------------------------------------------------------------------------------------


@dataclass
class Group:
    title: str
    about: str  # how to read the table
    columns: tuple  # of its table
    rows: dict  # name in the table -> scripts with their flags, joined by &&
    learn: int | None = None  # papers to learn from, None: all
    ask: int | None = None  # test papers and held-out papers, each, None: all


BERT = "bert_finetune.py --model embedded --precision fp32"
LORA = "--model embedded --precision fp32 --epochs 1 --max-length 512 --batch-size 8 --no-short-copies"
PEER = "benchmarks/peers.py"
FREE = "baseline.py --fields title abstract"
GROUPS = {
    "words": Group(
        "Words",
        "The kit's time includes five folds, each with and without the authors. fastText sees the authors as words; "
        "the kit counts their characters.",
        SCORES,
        {
            "**baseline.py**": "baseline.py",
            "the tutorial's recipe: (1,10)-grams, logistic regression": f"{PEER} tutorial_words",
            "fastText, supervised": f"{PEER} fasttext",
        },
    ),
    "bert": Group(
        "BERT: time to learn",
        "MiniLM, 192 tokens, the kit's default. The kit stops early; the others train for one epoch.",
        LEARNING,
        {
            "**bert_finetune.py**": BERT,
            "the tutorial's loop, learning rate 3e-5": f"{PEER} tutorial_bert --max-length 192",
            "transformers' Trainer, its 5e-5": f"{PEER} trainer_bert --max-length 192",
            "transformers' Trainer, the kit's 3e-4": f"{PEER} trainer_bert --max-length 192 --lr 3e-4",
        },
        ask=300,
    ),
    "bert-speed": Group(
        "BERT: speed, like for like",
        "MiniLM, 512 tokens, batch 16, one epoch, each paper once. Loading and tokenizing aren't counted.",
        SPEED,
        {
            "**bert_finetune.py**": f"{BERT} --epochs 1 --max-length 512 --no-short-copies",
            "the tutorial's loop": f"{PEER} tutorial_bert",
            "transformers' Trainer": f"{PEER} trainer_bert",
        },
        learn=48,
        ask=96,
    ),
    "lora": Group(
        "LLM: speed, like for like",
        "SmolLM2-135M, 512 tokens, one epoch of few papers, too few to learn from; trained in batches of 8.",
        SPEED,
        {
            "**lora_finetune.py, lora_predict.py**":
                f"make_llm_data.py && lora_finetune.py {LORA} && lora_predict.py --precision fp32",
            "peft + transformers' Trainer, then a chat about one paper at a time": f"{PEER} chat_lora",
        },
        learn=24,
        ask=12,
    ),
    "keywords": Group(
        "Keywords",
        "The kit's row is the reader's list; KeyBERT, YAKE and TF-IDF give ten keywords a paper. The kit's time "
        "includes learning from all other papers. F1 is micro, in any case; recall is the mean over papers, "
        "case-sensitive.",
        KEYWORDS,
        {
            "**extract_keywords.py**": "extract_keywords.py",
            "KeyBERT on MiniLM": f"{PEER} keybert",
            "YAKE": f"{PEER} yake",
            "TF-IDF of (1,3)-grams": f"{PEER} tfidf",
            "the title": f"{PEER} title",
        },
        ask=100,
    ),
    "ablation": Group(
        "What the parts of baseline.py are worth",
        "One change at a time. The author field gives the label away. Words know topics, and the test papers are "
        "about other ones: the models that are worst on the held-out papers, naive Bayes and random forest, are best "
        "there. Pairs of words add little.",
        SCORES,
        {
            "as it is": "baseline.py",
            "author alone": "baseline.py --fields author",
            "title + abstract": FREE,
            "… counts in place of TF-IDF": f"{FREE} --features bow",
            "… single words": f"{FREE} --ngrams 1",
            "… naive Bayes": f"{FREE} --model nb",
            "… linear SVM": f"{FREE} --model svm",
            "… random forest": f"{FREE} --model rf",
        },
    ),
}  # fmt: skip
SEEDLESS = ("make_llm_data.py", "lora_predict.py")  # scripts without --seed


def draw_papers(group, data, seed, limit=None):
    """The papers of a round, the same for all rows. Returns (papers to learn from, papers asked for, their fields). The
    asked are test papers, then held-out ones, with columns label (-1: unknown) and is_test.
    """
    train = common.read_papers(data / "train.csv", labelled=True)
    test = common.read_papers(data / "test.csv")
    labels = results.read_labels(data / "test.csv", test)
    test["label"] = -1 if labels is None else labels
    fields = [name for name in common.FIELDS if name in train and name in test]
    if group.columns == KEYWORDS:
        train, test = train[train["Keywords"] != ""], test.head(0).assign(Keywords="")
        fields = ["title", "abstract"]
    held_out = common.split_papers(train, 0.2, seed)
    parts = [test.assign(is_test=True), train[held_out].assign(is_test=False)]
    asked = pd.concat([part.head(limit or group.ask or len(part)) for part in parts], ignore_index=True)
    asked["uuid"] = [f"asked {number}" for number in range(len(asked))]  # both files may number from 0
    return train[~held_out].head(limit or group.learn or len(train)), asked, fields


# ---- one row, once ---------------------------------------------------------------------------------------------------


def run_row(commands, folder, seed):
    """Run the commands of a row on the papers in a folder. Returns (the model's folder, seconds in all). Raises
    InputError with the last line of one that failed.
    """
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"DATA_DIR": str(folder), "OUT_DIR": str(folder / "outputs")}
    started = time.perf_counter()
    for command in commands.split(" && "):
        script, *flags = command.split()
        seeded = [] if script in SEEDLESS else ["--seed", str(seed)]
        given = [sys.executable, str(KIT / script), *flags, *seeded]
        done = subprocess.run(given, env=env, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise InputError(lines[-1] if lines else f"{script}: exit code {done.returncode}")
    seconds = time.perf_counter() - started
    [metrics] = (folder / "outputs").glob("*/metrics.json")
    return metrics.parent, seconds


def measure(commands, folder, asked, seed):
    """Run a row and read what it left. Returns {column: value}; None: not measured."""
    output, seconds = run_row(commands, folder, seed)
    metrics = files.read_json(output / "metrics.json")
    peak = max(metrics["peak_memory_mb"], metrics.get("train_peak_memory_mb", 0))
    found = {"seconds": seconds, "memory": peak / 1024, **{name: metrics.get(name) for name in TIMES}}
    frame = pd.read_csv(output / "test.csv", dtype={"uuid": str}, keep_default_na=False).set_index("uuid")
    frame = frame.loc[asked["uuid"]]
    if "Keywords" in frame:
        return found | score_keywords(frame["Keywords"], asked["Keywords"])
    return found | score_labels(frame["prob"].to_numpy(), asked)


def score_labels(probs, asked):
    """Accuracy and F1 on the test papers, where their labels are known, and on the held-out ones."""
    found = {}
    for name, rows in (("test", asked["is_test"]), ("held_out", ~asked["is_test"])):
        labels = asked["label"][rows].to_numpy()
        if len(labels) and (labels >= 0).all():
            values = results.scores(labels, probs[rows])
            found |= {f"{name}_accuracy": values["accuracy"], f"{name}_f1": values["f1"]}
    return found


def score_keywords(picked, true):
    """Micro F1 in any case, and mean case-sensitive recall. Both: cells of keywords with ; between them."""
    listed, wanted = ([candidates.split_keywords(cell) for cell in cells] for cells in (picked, true))
    f1 = extract_keywords.score_keywords([[*words] for words in listed], [[*words] for words in wanted])["f1"]
    recall = extract_keywords.cased_recall([words.values() for words in listed], [words.values() for words in wanted])
    return {"keyword_f1": f1, "keyword_recall": recall}


# ---- all rounds ------------------------------------------------------------------------------------------------------


def measure_group(group, args):
    """All rounds of a group. Returns ({row name: [what was measured, a dict a round]}, faults: list of str, which
    papers there were: str).
    """
    found, faults = {name: [] for name in group.rows}, []
    for seed in range(1, args.rounds + 1):
        learn, asked, fields = draw_papers(group, args.data, seed, args.limit)
        for name, commands in group.rows.items():
            log(f"{time.strftime('%H:%M:%S')} round {seed} of {args.rounds}: {name}")
            with tempfile.TemporaryDirectory() as folder:
                # What the test file lacks stays in train.csv: the tutorial's recipe learns from it.
                learn.to_csv(Path(folder, "train.csv"), index=False)
                asked[["uuid", *fields]].to_csv(Path(folder, "test.csv"), index=False)
                try:
                    found[name].append(measure(commands, Path(folder), asked, seed))
                except InputError as error:
                    faults.append(f"{name}: {error}")
                    log(f"    failed: {error}")
    tests = asked["is_test"].sum()
    papers = f"{len(learn):,} papers to learn from, {tests:,} test papers, {len(asked) - tests:,} held out"
    return found, faults, f"{papers}; {' + '.join(fields)}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def show(values, decimals):
    """Mean and standard deviation: [0.987, 0.993], 3 -> '0.990 ± 0.004'."""
    if len(values) == 0:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{decimals}f}{spread}"


def make_table(columns, found):
    """A Markdown table of the rows that ran."""
    lines = [["", *(COLUMNS[column][0] for column in columns)], ["---"] * (len(columns) + 1)]
    for name, rounds in found.items():
        if rounds:
            frame = pd.DataFrame(rounds, columns=columns)
            lines.append([name, *(show(frame[column].dropna(), COLUMNS[column][1]) for column in columns)])
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


def describe_group(name, args):
    """Measure a group. Returns its section of docs/benchmarks.md."""
    group = GROUPS[name]
    found, faults, papers = measure_group(group, args)
    flags = f"--only {name} --rounds {args.rounds} --data DIR" + (f" --limit {args.limit}" if args.limit else "")
    parts = [
        f"## {group.title}",
        group.about,
        make_table(group.columns, found),
        f"{papers}; n = {args.rounds}, mean ± standard deviation. {describe_machine()}. "
        f"`python benchmarks/run.py {flags}`",
    ]
    if faults:
        parts.append(f"Not run: {'; '.join(dict.fromkeys(faults))}.")
    return "\n\n".join(parts) + "\n"


def parse_args():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=cli.data_dir(), metavar="DIR", help="train.csv, test.csv and test_labels.csv; "
        "default: %(default)s")  # fmt: skip
    add("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    add("--rounds", type=positive_int, default=3, metavar="N", help="default %(default)s")
    add("--limit", type=positive_int, metavar="N", help="papers to learn from, and test and held-out papers, each")
    return parser.parse_args()


def main():
    args = parse_args()
    for name in args.only:
        print(describe_group(name, args), flush=True)


if __name__ == "__main__":
    cli.run_script(main)

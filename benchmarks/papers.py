"""What the cases share: the papers learned from and asked for, the scores, a script of the kit, and the Trainer."""

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

import common


def draw(args, learn=None, ask=None):
    """The papers of a round, the same for all of its peers: a fifth of the training file is held out by a split drawn
    from args.round, and the test file's papers are asked for along with those. `learn`, `ask`: at most so many papers
    to learn from, and of each kind to ask for.

    Returns a namespace: learn (labelled frame), asked (frame, test papers first, with the columns that both files
    have), labels (int array [asked], -1 unknown), is_test (bool array [asked]), fields (list).
    """
    train, test = common.read_papers(args.train, labelled=True), common.read_papers(args.test)
    held_out = common.split_papers(train, 0.2, args.round)
    answers = common.read_test_labels(args.test.parent / "test_labels.csv", test)
    answers = np.full(len(test), -1) if answers is None else answers
    columns = [name for name in ("uuid", *common.FIELDS) if name in train and name in test]
    parts = [test.assign(label=answers).head(ask or len(test)), train[held_out].head(ask or len(train))]
    asked = pd.concat([part[[*columns, "label"]] for part in parts], ignore_index=True)
    is_test = np.arange(len(asked)) < len(parts[0])
    asked["uuid"] = [f"{'test' if mine else 'held-out'} {uuid}" for mine, uuid in zip(is_test, asked["uuid"])]
    return SimpleNamespace(
        learn=train[~held_out].head(learn or len(train)),
        asked=asked[columns],
        labels=asked["label"].to_numpy(),
        is_test=is_test,
        fields=[name for name in columns if name != "uuid"],
    )


def judge(drawn, probs):
    """Which papers there were, and accuracy and F1 on the test papers, where their labels are known, and on the
    held-out ones. probs: float array [asked], P(label = 1).
    """
    asked = [int(drawn.is_test.sum()), int((~drawn.is_test).sum())]
    found = {"learn": len(drawn.learn), "asked": asked, "fields": drawn.fields}
    for prefix, rows in (("", drawn.is_test), ("held_out_", ~drawn.is_test)):
        if (drawn.labels[rows] >= 0).all():
            values = common.scores(drawn.labels[rows], np.asarray(probs)[rows])
            found |= {prefix + name: values[name] for name in ("accuracy", "f1")}
    return found


def first_papers(args):
    """The first args.learn papers of the training file and their fields, where speed alone is measured."""
    frame = common.read_papers(args.train, labelled=True).head(args.learn)
    return frame, [name for name in ("title", "author", "abstract") if name in frame]


def arguments(script, *flags):
    """A script's args, as from its command line."""
    sys.argv = [script.__name__, *flags]
    return script.parse_args()


def run_kit(script, folder, *flags):
    """Run a script of the kit in `folder`, as from its command line, its outputs under `folder`/outputs."""
    os.chdir(folder)
    sys.argv = [f"{script}.py", "--out-dir", "outputs", *map(str, flags)]
    importlib.import_module(script).main()


def classify_with_kit(script, folder, drawn, *flags):
    """Train a classifier of the kit on the drawn papers. Returns (its metrics.json, P(label = 1) of the asked)."""
    drawn.learn.to_csv(Path(folder) / "train.csv", index=False)
    drawn.asked.to_csv(Path(folder) / "test.csv", index=False)
    run_kit(script, folder, "--train", "train.csv", "--test", "test.csv", *flags)
    outputs = Path(folder) / "outputs" / script.removesuffix("_finetune")
    return common.read_metrics(outputs), common.read_predictions(outputs / "test.csv")["prob"].to_numpy()


def train_with_trainer(model, data, batch, lr, seed, tokenizer=None):
    """An epoch of transformers' Trainer with its defaults. Returns seconds."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        setup = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=lr, seed=seed,
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, setup, train_dataset=data, processing_class=tokenizer)
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started

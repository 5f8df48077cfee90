"""bert_finetune.py against the tutorial's loop and transformers' Trainer, and what its parts are worth.

Each function runs one peer in this process, MiniLM on the CPU in fp32, and returns a dict of what was measured:
"seconds", "papers" (how many were seen in that time), and scores. Loading and tokenising are not timed.
"""

import tempfile
import time
from pathlib import Path

import papers
import torch

import common

BATCH = 16
LR = {"kit": 3e-4, "original": 3e-5}  # the kit's for MiniLM, given to the Trainer too, and the tutorial's


def load_bert(max_length, seed):
    """(model as published, its own dropout; tokenizer), of the embedded MiniLM."""
    from transformers import AutoModelForSequenceClassification

    import bert_finetune

    name = bert_finetune.find_model("embedded")
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    return model, bert_finetune.load_tokenizer(name, max_length)


def pad_all(tokenizer, texts, max_length):
    """Every paper padded to the maximal length, as the tutorial does. Returns int tensors (ids, mask)."""
    found = tokenizer(texts, truncation=True, padding="max_length", max_length=max_length, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def train_original(model, tokenizer, texts, labels, max_length):
    """An epoch of the tutorial's loop. Returns seconds."""
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(*pad_all(tokenizer, texts, max_length), torch.tensor(labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR["original"])
    model.train()
    started = time.perf_counter()
    for ids, mask, label in DataLoader(data, batch_size=BATCH, shuffle=True):
        model(input_ids=ids, attention_mask=mask, labels=label).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def predict_original(model, tokenizer, texts, max_length):
    """The tutorial's way of predicting. Returns (seconds, P(label = 1): float array [texts])."""
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(*pad_all(tokenizer, texts, max_length))
    model.eval()
    started = time.perf_counter()
    with torch.no_grad():
        found = [
            model(input_ids=ids, attention_mask=mask).logits.softmax(-1)[:, 1]
            for ids, mask in DataLoader(data, batch_size=BATCH)
        ]
    return time.perf_counter() - started, torch.cat(found).numpy()


def train_peer(peer, frame, fields, max_length, seed):
    """Train MiniLM for an epoch as a peer does. Returns (seconds, model, tokenizer)."""
    model, tokenizer = load_bert(max_length, seed)
    texts, labels = common.build_text(frame, fields), frame["label"].tolist()
    if peer == "original":
        return train_original(model, tokenizer, texts, labels, max_length), model, tokenizer
    cut = (tokenizer(text, truncation=True, max_length=max_length) for text in texts)
    data = [{**encoded, "labels": label} for encoded, label in zip(cut, labels)]
    return papers.train_with_trainer(model, data, BATCH, LR["kit"], seed, tokenizer), model, tokenizer


def bert_train(peer):
    """Speed of training alone, of 512 tokens a paper."""

    def measure(args):
        frame, fields = papers.first_papers(args)
        return {"seconds": train_peer(peer, frame, fields, 512, args.round)[0], "papers": len(frame)}

    return measure


def load_kit_bert(args):
    """(model, tokenizer, encoded papers), as bert_finetune.py makes them."""
    import bert_finetune

    frame, fields = papers.first_papers(args)
    name = bert_finetune.find_model("embedded")
    tokenizer = bert_finetune.load_tokenizer(name, 512)
    return (
        bert_finetune.load_model(name, 0.0, args.round),
        tokenizer,
        bert_finetune.encode(tokenizer, frame, fields, 512),
    )


def bert_train_kit(args):
    import training

    import bert_finetune

    accelerator = training.make_accelerator("fp32")
    model, tokenizer, items = load_kit_bert(args)
    flags = papers.arguments(bert_finetune, "--epochs", "1", "--lr", str(LR["kit"]))
    losses, probs = bert_finetune.make_functions(tokenizer, accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        done = training.fit(
            accelerator, model, items, items[:2], losses, probs, lambda model: None, Path(folder), flags, {}
        )
    return {"seconds": done["seconds"], "papers": done["papers"]}


def bert_predict_kit(args):
    import training

    import bert_finetune

    accelerator = training.make_accelerator("fp32")
    model, tokenizer, items = load_kit_bert(args)
    _, probs = bert_finetune.make_functions(tokenizer, accelerator.device)
    started = time.perf_counter()
    training.predict(accelerator, model, items, probs, BATCH)
    return {"seconds": time.perf_counter() - started, "papers": len(items)}


def bert_predict_original(args):
    frame, fields = papers.first_papers(args)
    model, tokenizer = load_bert(512, args.round)
    seconds, _ = predict_original(model, tokenizer, common.build_text(frame, fields), 512)
    return {"seconds": seconds, "papers": len(frame)}


def bert_score_kit(args, *flags, length=128):
    """bert_finetune.py from its command line; what it holds out to choose the best epoch it doesn't learn from."""
    drawn = papers.draw(args, args.learn, args.ask)
    with tempfile.TemporaryDirectory() as folder:
        metrics, probs = papers.classify_with_kit(
            "bert_finetune", folder, drawn, "--model", "embedded", "--precision", "fp32", "--epochs", 1,
            "--max-length", length, "--seed", args.round, *flags,
        )  # fmt: skip
    seconds = metrics["train_seconds"]
    return {"seconds": seconds, "papers": seconds * metrics["train_papers_per_second"], **papers.judge(drawn, probs)}


def bert_score(peer):
    def measure(args):
        drawn = papers.draw(args, args.learn, args.ask)
        seconds, model, tokenizer = train_peer(peer, drawn.learn, drawn.fields, 128, args.round)
        probs = predict_original(model, tokenizer, common.build_text(drawn.asked, drawn.fields), 128)[1]
        return {"seconds": seconds, "papers": len(drawn.learn), **papers.judge(drawn, probs)}

    return measure


# ---- BERT, one switch at a time --------------------------------------------------------------------------------------


def attention_dropout(args):
    """The published dropout of the attention, 0.1, which the kit sets to 0."""
    import bert_finetune

    load = bert_finetune.load_model

    def load_with_dropout(*given, **named):
        model = load(*given, **named)
        changed = [part.self for name, part in model.named_modules() if name.endswith("attention")]
        for part in changed:
            part.dropout.p = 0.1
        assert changed, "no attention layer found"
        return model

    bert_finetune.load_model = load_with_dropout
    return bert_score_kit(args, length=512)


def no_bucketing(args):
    """Training batches in random order, of whatever lengths, padded to their longest paper."""
    import numpy as np
    import training

    sorted_batches = training.length_batches

    def random_batches(lengths, size, seed=None):
        if seed is None:  # predicting
            return sorted_batches(lengths, size)
        order = np.random.default_rng(seed).permutation(len(lengths))
        return [order[i : i + size] for i in range(0, len(order), size)]

    training.length_batches = random_batches
    return bert_score_kit(args, length=512)


CASES = {
    "bert-train": {"kit": bert_train_kit, "original": bert_train("original"), "trainer": bert_train("trainer")},
    "bert-predict": {"kit": bert_predict_kit, "original": bert_predict_original},
    "bert-score": {"kit": bert_score_kit, "original": bert_score("original"), "trainer": bert_score("trainer")},
    "ablation-bert": {
        "kit": lambda args: bert_score_kit(args, length=512),
        "no-author": lambda args: bert_score_kit(args, "--fields", "title", "abstract", length=512),
        "no-heads": lambda args: bert_score_kit(args, "--no-heads", length=512),
        "128-tokens": bert_score_kit,
        "attention-dropout": attention_dropout,
        "no-bucketing": no_bucketing,
    },
}

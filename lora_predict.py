"""Label probabilities from a large language model and the adapter that lora_finetune.py trained.

    python lora_predict.py                                  outputs/lora/: held-out and test papers
    python lora_predict.py --predict-only --test testB.csv  score another test file
    python lora_predict.py --adapter none --model embedded  the untrained model, to see the gain

In: train.csv, test.csv, outputs/lora/best/. Out, under outputs/lora/, or outputs/untrained/: valid.csv, test.csv,
metrics.json, submit_task1.csv. An untrained model favours one answer whatever the paper, so its P(answer) is divided by
the mean over all papers. The adapter of a training that isn't finished is used only if --adapter names it.
"""

import hashlib
import time
from pathlib import Path

import common
from lib import cli, files, hub, items, llm, results, training
from lib.cli import InputError, log

import numpy as np
import pandas as pd
from peft import PeftModel


def read_kit(folder):
    """What lora_finetune.py wrote beside the adapter. Raises InputError if there is no adapter."""
    for name in ("kit.json", "adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: run lora_finetune.py first, or give --adapter, --name or none")
    hub.check_folder(folder)
    return files.read_json(folder / "kit.json")


def find_adapters(args, folder):
    """The adapters of a finished training, or the one that --adapter names: list of Path."""
    if args.adapter:
        return [Path(args.adapter)]
    done = files.read_json(folder / "training.json", trained_on=str, folders=list)
    if not done and (folder / "best").is_dir():
        raise InputError(f"{folder} has a training that isn't finished: run lora_finetune.py --resume, or, to take it "
                         f"as it is, give --adapter {folder / 'best'}")  # fmt: skip
    return [folder / name / "best" for name in done.get("folders", ["."])]


def untrained_kit(args, accelerator):
    """A record, like an adapter's, of the model without one."""
    fields = common.shared_fields(common.read_papers(args.train), common.read_papers(args.test), args.fields)
    model = llm.find_model(args.model or "auto", accelerator)
    length = llm.default_length(model)
    split = {"seed": 42, "valid_ratio": 0.1, "folds": None, "seeds": None, "limit": args.limit, "train": None}
    return {"model": model, "fields": fields, "instruction": None, "plan": ".", "max_length": length, "split": split}


def read_train(path, split):
    """The papers that the adapter was trained with. Raises InputError if they have changed since."""
    train = common.read_papers(path, labelled=True)
    train = train.head(split["limit"] or len(train))
    if split["train"] not in (None, results.fingerprint(train)):
        raise InputError(f"the adapter was trained on other papers than {path}: retrain it, or --predict-only")
    return train


def load_adapter(name, model, tokenizer, folder, kit):
    """The model called `name` with the adapter of `folder`. Raises InputError if that can't be loaded, or has learned
    another prompt.
    """
    form = llm.describe_prompt(tokenizer)
    changed = results.describe_changes({key: kit[key] for key in form}, form)
    if changed:
        raise InputError(f"{folder}: the prompt is not the one the adapter was trained with: {changed}; train it again")
    if not np.allclose(llm.weights_sample(model), kit["weights"], rtol=0.02, atol=1e-3):
        raise InputError(f"{folder} was trained with other weights than those of {name}: give the right "
                         "--model, or train it again")  # fmt: skip
    try:
        return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))  # not each on card 0
    except Exception as error:
        raise InputError(f"{folder} can't be loaded ({hub.first_line(error)}): run lora_finetune.py again") from None


def predict_one(accelerator, args, adapter, kit, papers):
    """(P(label = 1) of each paper by the model with the adapter in the folder `adapter`, or None; seconds)."""
    four_bit = kit.get("load_in_4bit", False)
    model, tokenizer = llm.load_llm(args.model, accelerator, four_bit)
    if adapter:
        model = load_adapter(args.model, model, tokenizer, adapter, kit)
    scorer = llm.Scorer(model, tokenizer).to(accelerator.device)
    length = llm.fit_length(model, args.max_length, scorer.virtual)
    papers = llm.encode_items(tokenizer, items.build_items(papers, kit["fields"], kit["instruction"]), length)
    if adapter:
        llm.check_adapter(scorer, papers)
        if not scorer.virtual and not four_bit:  # a prefix can't be merged, 4 bits would round what is merged
            llm.merge_adapter(scorer, papers)
    log(f"{len(papers)} papers to score; {args.model}, {training.describe(accelerator)}")
    started = time.perf_counter()
    probs = training.predict(accelerator, scorer, papers, llm.Task(papers), args.batch_size)
    return probs if adapter else calibrate(probs), time.perf_counter() - started


def calibrate(probs):
    """Divide each answer's probability by its mean over the papers: [0.9, 0.8] -> [0.61, 0.41]."""
    one, zero = probs / probs.mean(), (1 - probs) / (1 - probs).mean()
    return one / (one + zero)


def predict(accelerator, args, folder, adapters, kits):
    """Score the papers with each adapter, average, and write the folder's files."""
    test = common.load_test(args, kits[0]["fields"])
    train, plans, held_out, found = None, [], [test.head(0)] * len(kits), []
    if not args.predict_only:  # each adapter with the papers that its own training held out
        train = read_train(args.train, kits[0]["split"])
        plans = {plan.name: plan for plan in training.make_plans(train, kits[0]["split"], kits[0].get("seed", 42))}
        plans = [plans[kit["plan"]] for kit in kits]
        held_out = [train[plan.held_out] for plan in plans]
    for adapter, kit, valid in zip(adapters, kits, held_out):
        papers = pd.concat([part[kit["fields"]] for part in (valid, test)])
        probs, seconds = predict_one(accelerator, args, adapter, kit, papers)
        found.append((probs[: len(valid)], probs[len(valid) :], seconds))
    if accelerator.is_main_process:
        write_results(accelerator, args, folder, adapters, kits, plans, train, test, found)


def earlier_metrics(folder, settings):
    """What metrics.json says of training and held-out papers. If that is of other adapters, valid.csv goes, too."""
    metrics = files.read_json(folder / "metrics.json", papers=dict)
    if metrics.get("settings") == settings:
        return metrics
    (folder / "valid.csv").unlink(missing_ok=True)
    return {"papers": {}}


def write_results(accelerator, args, folder, adapters, kits, plans, train, test, found):
    """Write valid.csv, test.csv, metrics.json and the submission, and print the scores. `plans`: none without train.
    `found`: for each adapter (P of the held-out papers, of the test papers, seconds).
    """
    valid_probs, test_probs, seconds = zip(*found)
    count = sum(map(len, valid_probs + test_probs))
    test_probs, seconds = np.mean(test_probs, axis=0), sum(seconds)
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in adapters if path]
    settings = kits[0] | {"adapter": [hashlib.sha256(data).hexdigest()[:16] for data in weights]}
    held_out, probs, table, fields = None, None, [], kits[0]["fields"]
    if plans:
        held_out, probs, scored, table = training.score_held_out(folder.name, train, plans, valid_probs, fields)
        done = {} if args.adapter else files.read_json(folder / "training.json")
        metrics = done | scored | {"seconds": round(done.get("train_seconds", 0) + seconds, 2)}
    else:
        metrics = earlier_metrics(folder, settings)
    metrics |= {"fields": fields, "settings": settings, **training.environment(accelerator)}
    metrics["predict_papers_per_second"] = round(count / seconds, 3)
    answers = results.read_labels(args.test, test)
    if answers is not None:
        note = f"{len(test)} test papers, {' '.join(fields)}"
        table.append((f"{folder.name}, test", results.scores(answers, test_probs), note))
    results.finish(folder, args, metrics, train, test, test_probs, held_out, probs, table)


def parse_args():
    parser = cli.arg_parser(__doc__, "train", "test", "limit")
    results.add_keywords_flag(parser)
    add = parser.add_argument_group("model").add_argument
    add("--adapter", metavar="DIR", help="default: best/ of the --name folder; 'none': the untrained model")
    add("--model", metavar="M", help="where the adapter's model is now; with --adapter none as in lora_finetune.py")
    add("--fields", nargs="+", choices=cli.FIELDS, metavar="F", help="with --adapter none, columns to read")
    add("--name", help="folder under --out-dir, default lora, or untrained with --adapter none")
    add("--max-length", type=cli.positive_int, metavar="N", help="tokens a paper, default the adapter's")
    add("--batch-size", type=cli.positive_int, metavar="N", help=f"papers at once, default {training.CPU_BATCH}, with "
        f"CUDA {training.GPU_BATCH}, or what its memory allows")  # fmt: skip
    add("--predict-only", action="store_true", help="score --test alone; an adapter needs no train.csv for it")
    training.add_precision_flag(add)
    return parser.parse_args()


def main():
    args = parse_args()
    accelerator = training.make_accelerator(args.precision)
    untrained = args.adapter == "none"
    folder = args.out_dir / (args.name or ("untrained" if untrained else "lora"))
    if untrained:
        adapters, kits = [None], [untrained_kit(args, accelerator)]
    else:
        adapters = find_adapters(args, folder)
        kits = [read_kit(adapter) for adapter in adapters]
        if args.fields not in (None, kits[0]["fields"]):
            raise InputError(f"--fields: the adapter was trained with {kits[0]['fields']}: leave --fields out")
    if untrained or args.model in (None, "auto"):
        args.model = kits[0]["model"]  # else it has been moved
    args.max_length = args.max_length or kits[0]["max_length"]
    with files.locked(folder), training.explain("the same command starts again"):
        predict(accelerator, args, folder, adapters, kits)
    accelerator.end_training()


if __name__ == "__main__":
    cli.run_script(main)

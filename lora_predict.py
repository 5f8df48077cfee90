"""Label probabilities from a large language model and the adapter that lora_finetune.py trained.

    python lora_predict.py                                  outputs/lora/: held-out and test papers
    python lora_predict.py --predict-only --test testB.csv  score another test file
    python lora_predict.py --adapter none --model embedded  the untrained model, to see the gain

In: train.csv, test.csv, outputs/lora/best/. Out, under outputs/lora/: valid.csv, test.csv, metrics.json,
submit_task1.csv; of an untrained model under outputs/untrained/, without valid.csv, so that blend.py leaves it out.
An untrained model favours one answer whatever the paper: each answer's mean probability is divided out. The adapter of
a training that isn't finished is used only if --adapter names it.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
from peft import PeftModel

from common import fingerprint, load_papers, load_test, read_papers
from lib import hub, llm, results, training
from lib.cli import FIELDS, InputError, arg_parser, log, positive_int, run_script
from lib.items import build_items
from lib.results import read_json, scores


def read_kit(folder):
    """What lora_finetune.py wrote beside the adapter. Raises InputError if there is no adapter."""
    for name in ("kit.json", "adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: run lora_finetune.py first, or give --adapter, --name or none")
    hub.check_folder(folder)
    types = {"model": str, "prompt": str, "instruction": str, "fields": list, "answers": list, "split": dict}
    return read_json(folder / "kit.json", settings=dict, **types)


def find_adapters(args, folder):
    """The adapters of a finished training, or the one that --adapter names: list of Path."""
    if args.adapter:
        return [Path(args.adapter)]
    done = read_json(folder / "training.json", trained_on=str, folders=list)
    if not done and (folder / "best").is_dir():
        raise InputError(f"{folder} has a training that isn't finished: run lora_finetune.py --resume, or, to take it "
                         f"as it is, give --adapter {folder / 'best'}")  # fmt: skip
    return [folder / name / "best" for name in done.get("folders", ["."])]


def load_scorer(args, folder, kit, accelerator, papers_of):
    """(scorer, tokenizer): the base model with the adapter of `folder` (None: without one), on its device. Raises
    InputError if model or prompt are not those that the adapter was trained with. `papers_of(tokenizer)`: encoded
    papers to try it on.
    """
    if args.model not in (None, "auto", kit["model"]):
        raise InputError(f"--model {args.model}: the adapter was trained with {kit['model']}: leave --model out")
    four_bit = kit["settings"].get("load_in_4bit", False)
    model, tokenizer = llm.load_llm(kit["model"], accelerator, four_bit)
    if not folder:
        return llm.Scorer(model, tokenizer).to(accelerator.device), tokenizer
    form = {"prompt": llm.prompt_form(tokenizer), "answers": llm.encode_answers(tokenizer)}
    if changed := results.describe_changes({key: kit[key] for key in form}, form):
        raise InputError(f"{folder}: the prompt is not the one the adapter was trained with: {changed}; train it again")
    try:
        model = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:
        raise InputError(f"{folder} can't be loaded ({hub.first_line(error)}): run lora_finetune.py again") from None
    scorer, papers = llm.Scorer(model.to(accelerator.device), tokenizer), papers_of(tokenizer)
    llm.check_adapter(scorer, papers)
    if not scorer.virtual and not four_bit:  # a prefix can't be merged, and 4 bits would round what is merged
        llm.merge_adapter(scorer, papers)
    return scorer, tokenizer


def choose_papers(args, kit):
    """(train or None, test). Raises InputError if train is not what the adapter was trained on. `kit`: its record; of
    an untrained model without fields and split.
    """
    if args.predict_only:
        args.fields = args.fields or list(FIELDS[::2])
        return None, load_test(args, args.fields)
    if "split" not in kit:
        train, test, args.fields = load_papers(args)
        return train, test
    train = read_papers(args.train, labelled=True)
    train = train.head(kit["split"]["limit"] or len(train))
    if fingerprint(train) != kit["split"]["train"]:
        raise InputError(f"the adapter was trained on other papers than {args.train}: retrain it, or --predict-only")
    return train, load_test(args, args.fields)


def predict_one(accelerator, args, adapter, kit, held_out, test):
    """(P(label = 1) of the held-out papers, of the test papers, papers a second). held_out may have no papers."""
    instruction = kit.get("instruction")
    items = [item for part in (held_out, test) for item in build_items(part, args.fields, instruction)]
    scorer, tokenizer = load_scorer(
        args, adapter, kit, accelerator, lambda tokenizer: llm.encode_items(tokenizer, items[:4], args.max_length)
    )
    virtual = scorer.virtual
    args.max_length = llm.fit_length(scorer.model, args.max_length, virtual)
    papers = llm.encode_items(tokenizer, items, args.max_length)
    log(f"{len(papers)} papers to score; {kit['model']}, {training.describe(accelerator)}")
    started = time.perf_counter()
    probs = training.predict(accelerator, scorer, papers, llm.Task(papers), args.batch_size)
    speed = len(papers) / (time.perf_counter() - started)
    if not adapter:
        probs = calibrate(probs)
    return *np.split(probs, [len(held_out)]), speed


def calibrate(probs):
    """Divide each answer's probability by its mean over the papers: [0.9, 0.8] -> [0.61, 0.41]."""
    one, zero = probs / probs.mean(), (1 - probs) / (1 - probs).mean()
    return one / (one + zero)


@training.resumable("the same command starts again")
def predict(accelerator, args, folder, adapters, kits, train, test):
    """Score the papers with each adapter, average, and write the folder's files."""
    plans, found = [], []
    if train is not None:
        common_split = {"seed": 42, "valid_ratio": 0.1, "folds": None, "seeds": None}
        split = kits[0].get("split", common_split)
        plans = training.make_plans(train, split, kits[0].get("seed", 42))
        if args.adapter:  # a single one: the plan of its own folder's name, or the only one
            plans = [plan for plan in plans if plan.name == Path(args.adapter).resolve().parent.name] or plans[:1]
    for place, (adapter, kit) in enumerate(zip(adapters, kits)):
        held_out = train[plans[place].held_out] if plans else test.head(0)
        found.append(predict_one(accelerator, args, adapter, kit, held_out, test))
    if accelerator.is_main_process:
        write_results(accelerator, args, folder, adapters, kits[0], plans, train, test, found)


def write_results(accelerator, args, folder, adapters, kit, plans, train, test, found):
    """Write valid.csv, test.csv, metrics.json and the submission, and print the scores. `found`: of predict_one."""
    valid_probs, test_probs, speeds = zip(*found)
    test_probs, trained = np.mean(test_probs, axis=0), adapters != [None]
    files = [path / "adapter_model.safetensors" for path in adapters if path]
    weights = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    settings = kit["settings"] | {"model": kit["model"], "adapter": " ".join(weights) or None}
    done = read_json(folder / "training.json") if trained and not args.adapter else {}
    settings["folders"] = done.get("folders", ["."])
    metrics = read_json(folder / "metrics.json", papers=dict)
    held_out, probs, table = None, None, []
    fields = " ".join(args.fields)
    if plans:
        chosen, probs = training.average(plans, valid_probs)
        held_out = train[chosen]
        metrics = done | {"papers": results.paper_record(train, test, len(held_out))}
        metrics["scores"] = scores(held_out["label"], probs)
        table.append((folder.name, metrics["scores"], f"{len(held_out)} held out, {fields}"))
        if kit.get("split", {}).get("seeds"):
            metrics["seeds"] = [scores(held_out["label"], each) for each in valid_probs]
            table += training.spread_rows(folder.name, metrics["seeds"])
    elif metrics.get("settings") == settings:  # what it says of training and held-out papers is still true
        metrics["papers"] |= results.record_of_test(test)
    else:
        metrics = {"papers": results.record_of_test(test)}
    metrics |= {"fields": args.fields, "settings": settings, "predict_papers_per_second": round(np.mean(speeds), 3)}
    metrics |= training.environment(accelerator)
    answers = results.read_labels(args.test, test)
    if answers is not None:
        table.append((f"{folder.name}, test", scores(answers, test_probs), f"{len(test)} test papers, {fields}"))
    if "scores" not in metrics or not trained:  # its held-out papers were scored by another model
        (folder / "valid.csv").unlink(missing_ok=True)
        held_out = None
    results.save_results(folder, metrics, test, test_probs, held_out, probs)
    results.write_submission(folder / "submit_task1.csv", test, test_probs >= 0.5, args.out_dir, args.keywords)
    results.warn_one_class(test_probs >= 0.5, [0, 1] if train is None else train["label"])
    if table:
        print(results.score_table(table))


def parse_args():
    parser = arg_parser(__doc__, "train", "test", "fields", "limit")
    results.add_keywords_flag(parser)
    add = parser.add_argument_group("model").add_argument
    add("--adapter", metavar="DIR", help="default: best/ of the --name folder; 'none': the untrained model")
    add("--model", metavar="M", help="default: the adapter's; with --adapter none as in lora_finetune.py")
    add("--name", help="folder under --out-dir, default lora, or untrained with --adapter none")
    add("--max-length", type=positive_int, metavar="N", help="tokens a paper, default the adapter's")
    add("--batch-size", type=positive_int, metavar="N", help=f"papers at once, default {training.ON_CPU}, with CUDA "
        f"{training.ON_GPU}, or what its memory allows")  # fmt: skip
    add("--predict-only", action="store_true", help="score --test alone, without train.csv")
    training.add_precision_flag(add)
    return parser.parse_args()


def main():
    args = parse_args()
    accelerator = training.make_accelerator(args.precision)
    untrained = args.adapter == "none"
    folder = args.out_dir / (args.name or ("untrained" if untrained else "lora"))
    if untrained:
        args.adapter, adapters = None, [None]
        kits = [{"model": llm.find_model(args.model or "auto", accelerator), "settings": {}}]
    else:
        adapters = find_adapters(args, folder)
        kits = [read_kit(adapter) for adapter in adapters]
        if args.fields not in (None, kits[0]["fields"]):
            raise InputError(f"--fields: the adapter was trained on {' '.join(kits[0]['fields'])}: leave --fields out")
        args.fields = kits[0]["fields"]
    args.max_length = args.max_length or kits[0]["settings"].get("max_length") or llm.default_length(kits[0]["model"])
    train, test = choose_papers(args, kits[0])
    with results.locked(folder, accelerator.is_main_process), training.model_advice():
        predict(accelerator, args, folder, adapters, kits, train, test)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)

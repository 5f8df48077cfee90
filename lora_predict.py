"""Label probabilities from a large language model and the adapter that lora_finetune.py trained.

    python lora_predict.py                                  outputs/lora/: held-out and test papers
    python lora_predict.py --predict-only --test testB.csv  score another test file
    python lora_predict.py --adapter none --model embedded  the untrained model, to see the gain

In: train.csv, test.csv, outputs/lora/best/. Out, under outputs/lora/: valid.csv, test.csv, metrics.json,
submit_task1.csv; of an untrained model under outputs/untrained/, without valid.csv, so that blend.py leaves it out.
Probabilities are kept as they come: a killed run goes on where it stopped when the same command is given again. The
adapter of a training that isn't finished is used only where --adapter names it.
"""

import hashlib
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from peft import PeftModel

import common
import llm
import models
import training
from common import InputError, log, run_script, scores, whole


def read_kit(folder):
    """What lora_finetune.py wrote beside the adapter. Raises InputError where there is no adapter."""
    for name in ("kit.json", "adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}: run lora_finetune.py first, or give --adapter, --name or none")
    models.check_folder(folder)
    types = {"model": str, "prompt": str, "instruction": str, "fields": list, "answers": list, "train": str}
    return common.read_json(folder / "kit.json", settings=dict, **types)


def load_scorer(args, folder, kit, accelerator):
    """(scorer, tokenizer): the base model with the adapter merged into it, on its device. Raises InputError where model
    or prompt are not those that the adapter was trained with.
    """
    name = llm.find_model(args.model) if args.model else kit["model"]
    if name != kit["model"]:
        raise InputError(f"--model {name}: the adapter in {folder} was trained with {kit['model']}: leave --model out")
    model, tokenizer = llm.load_llm(name, accelerator)
    form = {"prompt": llm.prompt_form(tokenizer), "answers": llm.encode_answers(tokenizer)}
    if folder and (changed := common.differences({key: kit[key] for key in form}, form)):
        raise InputError(f"{folder}: the prompt is not the one the adapter was trained with: {changed}; train it anew")
    if not folder:
        return llm.Scorer(model, tokenizer).to(accelerator.device), tokenizer
    try:
        model = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:
        raise InputError(
            f"{folder} can't be loaded ({str(error).splitlines()[0]}): run lora_finetune.py again"
        ) from None
    scorer = llm.Scorer(model.to(accelerator.device), tokenizer)
    item = {"instruction": kit["instruction"], "input": "", "output": ""}
    llm.check_adapter(scorer, llm.encode_items(tokenizer, [item], args.max_length))
    if not scorer.virtual:  # a prefix can't be merged
        scorer = llm.Scorer(model.merge_and_unload(), tokenizer)
    return scorer, tokenizer


class Partial:
    """Probabilities on disk as they come, one file a process; the first line says what they are of."""

    def __init__(self, folder, key, rank):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.done = folder, {}
        for path in sorted(folder.glob("partial-*.txt")):
            first, *lines = path.read_text().split("\n")
            if first == key:  # what follows the last line's end was cut off
                with suppress(ValueError):  # a damaged line: what it and the next ones say is scored again
                    self.done.update((int(place), float(prob)) for place, prob in map(str.split, lines[:-1]))
        self.key, self.path = key, folder / f"partial-{rank}.txt"
        self.file = None

    def keep(self, batch, probs):
        if self.file is None:  # begin with what is known, without the line that was cut off
            with common.replacing(self.path) as part:
                part.write_text("\n".join([self.key, *(f"{i} {prob!r}" for i, prob in self.done.items()), ""]))
            self.file = open(self.path, "a")
        with common.naming(self.path):
            self.file.writelines(f"{place} {prob!r}\n" for place, prob in zip(batch, probs))
            self.file.flush()

    def remove(self):
        for path in self.folder.glob("partial-*.txt"):
            path.unlink()


def parse_args():
    parser = common.arg_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--adapter", metavar="DIR", help="default: best/ of the --name folder; 'none': the untrained model")
    add("--model", metavar="M", help="default: the adapter's; with --adapter none as in lora_finetune.py")
    add("--name", help="folder under --out-dir, default lora, or untrained with --adapter none")
    add("--max-length", type=whole, metavar="N", help="tokens a paper, default the adapter's")
    add("--batch-size", type=whole, default=16, metavar="N", help="papers at once, default %(default)s")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 or fp16 with CUDA")
    add("--predict-only", action="store_true", help="score --test alone, without train.csv")
    return parser.parse_args()


def choose_papers(args, kit, adapter):
    """(train or None, held-out papers or None, test papers, fields). Raises InputError where they are not those that
    the adapter was trained with. `kit`: of an adapter what lora_finetune.py wrote, of an untrained model no fields.
    """
    if args.predict_only:
        fields = kit.get("fields") or args.fields or list(common.REQUIRED[1:])
        train, test, asked = None, common.load_test(args, fields), args.fields or fields
    else:
        train, test, fields = common.load_papers(args)
        asked = fields
    if adapter and set(asked) != set(kit["fields"]):
        want = " ".join(kit["fields"])
        raise InputError(f"--fields {' '.join(asked)}: {adapter} was trained on {want}: give --fields {want}")
    if train is None:
        return None, None, test, fields
    if adapter and kit["train"] != common.fingerprint(train):
        raise InputError(f"{adapter} was trained on other papers than {args.train}: train it anew, or --predict-only")
    split = kit["settings"] if adapter else {"valid_ratio": args.valid_ratio, "seed": args.seed}
    return train, train[common.split_papers(train, split["valid_ratio"], split["seed"])], test, fields


@training.resumable("the same command goes on")
def predict(args, accelerator, folder, adapter, kit, train, held_out, test, fields):
    """Score the papers, write the folder's files and print the table."""
    args.max_length = args.max_length or kit["settings"].get("max_length") or llm.default_length(kit["model"])

    scorer, tokenizer = load_scorer(args, adapter, kit, accelerator)
    asked = [part for part in (held_out, test) if part is not None]
    items = [item for part in asked for item in common.build_items(part, fields)]
    papers = llm.encode_items(tokenizer, items, args.max_length)
    weights = adapter and hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    key = [kit, weights, items, args.max_length, args.batch_size, training.describe(accelerator)]
    partial = Partial(folder, common.digest(key), accelerator.process_index)
    accelerator.wait_for_everyone()  # all have read what is there before one of them adds to it
    log(f"{len(papers)} papers to score; {kit['model']}, {training.describe(accelerator)}")
    if partial.done:
        log(f"{len(partial.done)} of {len(papers)} papers were scored by a run that stopped; going on")

    probs_of = llm.make_probs(papers)
    started = time.perf_counter()
    probs = training.predict(accelerator, scorer, papers, probs_of, args.batch_size, partial.done, partial.keep)
    speed = (len(papers) - len(partial.done)) / (time.perf_counter() - started)
    if not accelerator.is_main_process:
        return
    valid_probs, test_probs = np.split(probs, [len(papers) - len(test)])
    settings = kit["settings"] | {"model": kit["model"], "adapter": weights}
    metrics = common.read_metrics(folder)
    if train is not None:
        metrics = common.read_json(adapter.parent / "training.json", trained_on=str) if adapter else {}
        metrics["papers"] = common.paper_record(train, test, len(valid_probs))
    elif metrics.get("settings") == settings:  # what is said of training and held-out papers stays
        metrics["papers"] |= common.test_record(test)
    else:
        metrics = {"papers": common.test_record(test)}
    metrics |= {
        "fields": fields,
        "settings": settings,
        "predict_papers_per_second": round(speed, 3),
        "peak_memory_mb": training.peak_memory_mb(accelerator),
        "versions": common.package_versions(),
        "device": training.describe(accelerator),
    }
    table = []
    if train is not None:
        metrics["scores"] = scores(held_out["label"], valid_probs)
        table.append((folder.name, metrics["scores"], f"{len(held_out)} held out, {' '.join(fields)}"))
    answers = common.read_test_labels(args.test.parent / "test_labels.csv", test)
    if answers is not None:
        note = f"{len(test)} test papers, {' '.join(fields)}"
        table.append((f"{folder.name}, test", scores(answers, test_probs), note))
    if "scores" not in metrics or not adapter:  # held-out papers scored by another model
        (folder / "valid.csv").unlink(missing_ok=True)
    common.write_submission(folder / "submit_task1.csv", test, test_probs >= 0.5, args.out_dir)
    common.save_results(folder, test, test_probs, metrics, held_out if adapter else None, valid_probs)
    partial.remove()
    if table:
        print(common.score_table(table))


def main():
    args = parse_args()
    accelerator = training.make_accelerator(args.precision)
    untrained = args.adapter == "none"
    folder = args.out_dir / (args.name or ("untrained" if untrained else "lora"))
    adapter = None if untrained else Path(args.adapter or folder / "best")
    kit = {"model": llm.find_model(args.model or "auto"), "settings": {}} if untrained else read_kit(adapter)
    if not (args.adapter or (folder / "training.json").is_file()):
        raise InputError(
            f"{folder} holds a training that isn't finished: run lora_finetune.py --resume, or, to take it as it is, "
            f"give --adapter {adapter}"
        )
    train, held_out, test, fields = choose_papers(args, kit, adapter)
    with common.locked(folder, accelerator.is_main_process), training.model_advice():
        predict(args, accelerator, folder, adapter, kit, train, held_out, test, fields)


if __name__ == "__main__":
    run_script(main)

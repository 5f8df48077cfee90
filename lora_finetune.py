"""Train a LoRA or P-tuning v2 adapter of a large language model on the instruction data of make_llm_data.py.

    python make_llm_data.py && python lora_finetune.py         the default model and LoRA on every linear layer
    python lora_finetune.py --model Qwen/Qwen3-1.7B --rank 16  another model
    python lora_finetune.py --method p-tuning-v2               trained prefixes instead
    python lora_finetune.py --resume                           go on after a kill
    accelerate launch lora_finetune.py                         on every GPU of the machine

In: outputs/paper_label.json, paper_label_valid.json, paper_label_source.json, train.csv. Out, under outputs/lora/
(--name): best/ (the adapter in peft's form, with kit.json: base model, prompt, instruction, fields, split, flags),
log.csv, training.json (how long it took), last.safetensors (to resume from). With --folds or --seeds: fold1/ ...,
seed42/ ... lora_predict.py makes the predictions.
"""

import argparse
import hashlib
import json
from pathlib import Path

import common
from lib import cli, files, items, llm, results, training
from lib.cli import InputError, bounded, few, log, positive_int

import numpy as np
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model

SHAPING = ("method", "rank", "alpha", "dropout", "target_modules", "virtual_tokens", "max_length", "load_in_4bit")
SHAPING += ("short_copies", *training.SHAPING)


# ---- instruction data ------------------------------------------------------------------------------------------------


def read_data(args):
    """(papers of train.csv, their items in the same order, the record of make_llm_data.py). Raises InputError if its
    files are missing, are not what it writes, or are about other papers.
    """
    source = args.out_dir / "paper_label_source.json"
    record = files.read_json(source, fields=list, seed=int, valid_ratio=float, train=str)
    if not record:
        raise InputError(f"{source}: no such file; run make_llm_data.py first")
    train = common.read_papers(args.train, labelled=True)
    train = train.head(record.get("limit") or len(train))
    if results.fingerprint(train) != record["train"]:
        raise InputError(f"{source} is about other papers than {args.train}: run make_llm_data.py again")
    held_out = common.split_papers(train, record["valid_ratio"], record["seed"])
    asked = np.empty(len(train), dtype=object)
    for name, place in (("paper_label.json", ~held_out), ("paper_label_valid.json", held_out)):
        asked[place] = read_items(args.out_dir / name, place.sum())
    instructions = {item["instruction"] for item in asked}
    if len(instructions) > 1:
        raise InputError(f"paper_label.json and paper_label_valid.json in {args.out_dir} have {len(instructions)} "
                         f"different instructions ({few(instructions, 2)}): use one")  # fmt: skip
    return train, list(asked), record


def is_item(value):
    known = isinstance(value, dict) and {"instruction", "input"} <= value.keys()
    return known and str(value.get("output")) in ("0", "1")  # some editors write 1 for "1"


def read_items(path, count):
    """The items in a file of make_llm_data.py, a list of dicts. Raises InputError unless it has `count` of them."""
    found = files.read_json(path)
    if not isinstance(found, list) or not all(map(is_item, found)):
        raise InputError(f"{path} is missing or not a list of instruction, input and output (0 or 1): run "
                         "make_llm_data.py again")  # fmt: skip
    if len(found) != count:
        raise InputError(f"{path} has {len(found)} items for {count} papers: run make_llm_data.py again; change texts "
                         "there, but not their number")  # fmt: skip
    return [{**item, "output": str(item["output"])} for item in found]


# ---- adapter ---------------------------------------------------------------------------------------------------------


def add_adapter(model, args, seed):
    """The model with a new adapter around it, trainable weights in fp32, drawn from the seed."""
    torch.manual_seed(seed)
    if args.method == "lora":
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=args.rank, lora_alpha=args.alpha or 2 * args.rank,
            lora_dropout=args.dropout, target_modules=args.target_modules or "all-linear",
        )  # fmt: skip
    else:
        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=args.virtual_tokens)
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        named = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
        kinds = sorted({name.rpartition(".")[2] for name in named})
        raise InputError(f"--target-modules: {str(error).splitlines()[0]} linear layers: {few(kinds, 20)}") from None
    if args.method != "lora":  # prefixes come as a cache, which checkpointing would throw away
        args.gradient_checkpointing = None
    elif args.gradient_checkpointing is None:
        args.gradient_checkpointing = needs_checkpointing(model, args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def needs_checkpointing(model, args):
    """Whether a training step without gradient checkpointing may take more memory than the loaded model leaves on its
    GPU. In 16 bits it keeps some 70 bytes for each token, layer and hidden value; 48 to 65 were counted.
    """
    if model.device.type != "cuda":
        return False
    config = model.config.get_text_config()
    papers = -(-args.batch_size // training.count_pieces(args, model.device))
    values = papers * args.max_length * config.num_hidden_layers * config.hidden_size
    free = torch.cuda.mem_get_info()[0] / 2**30
    needed = (140 if model.dtype == torch.float32 else 70) * values / 2**30 > 0.9 * free
    log(f"{free:.1f} GiB of GPU memory are left: {'with' if needed else 'without'} gradient checkpointing")
    return needed


def default_lr(method, model):
    """The highest learning rate that suits method and size."""
    small = model.config.get_text_config().hidden_size < 1024
    return {"lora": 1e-3 if small else 2e-4, "p-tuning-v2": 7.5e-2 if small else 5e-3}[method]


class Task(llm.Task):
    def __init__(self, prompts, kit):
        super().__init__(prompts)
        self.kit = kit

    def save(self, scorer, folder):
        llm.check_adapter(scorer, self.prompts)
        scorer.model.save_pretrained(folder, save_embedding_layers=False)  # True would ask the hub each time
        files.write_json(folder / "kit.json", self.kit)


# ---- main ------------------------------------------------------------------------------------------------------------


def train_adapters(accelerator, args, folder):
    """Train on paper_label.json, and leave adapters and records in folder."""
    train, asked, record = read_data(args)
    split = {"seed": record["seed"], "valid_ratio": record["valid_ratio"], "folds": args.folds, "seeds": args.seeds}
    plans = training.make_plans(train, split, args.seed)

    args.model = find_model(accelerator, args, folder / plans[0].name)
    model, tokenizer = llm.load_llm(args.model, accelerator, args.load_in_4bit)
    args.lr = args.lr or default_lr(args.method, model)
    virtual = args.virtual_tokens if args.method == "p-tuning-v2" else 0
    args.max_length = llm.fit_length(model, args.max_length or llm.default_length(args.model), virtual)
    kit = {
        "model": args.model,
        "fields": record["fields"],
        "instruction": asked[0]["instruction"],
        **llm.describe_prompt(tokenizer),
        "weights": llm.weights_sample(model),
        "split": split | {"limit": record.get("limit"), "train": record["train"]},
        "items": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        **{name: getattr(args, name) for name in SHAPING},
        "precision": accelerator.mixed_precision,
    }
    papers = np.array(llm.encode_items(tokenizer, asked, args.max_length))
    model = add_adapter(model, args, plans[0].seed)  # what can't be trained is refused before anything is cleared
    runs = []
    for plan, own_args in training.each_plan(accelerator, plans, folder, args):
        if model is None:
            model = add_adapter(llm.load_llm(args.model, accelerator, args.load_in_4bit)[0], args, plan.seed)
        runs.append(train_one(accelerator, own_args, plan, folder, kit, model, tokenizer, train, papers))
        model = None
        accelerator.free_memory()
    if accelerator.is_main_process:
        write_summary(accelerator, folder, plans, runs)


def find_model(accelerator, args, folder):
    """--model, 'auto' resolved; with --resume 'auto' is what it was, however much memory is free today."""
    if Path(args.model).is_dir():
        return str(Path(args.model).resolve())  # lora_predict.py may run in another directory
    state = training.read_state(folder / training.LAST) if args.resume and args.model == "auto" else None
    return state["settings"]["model"] if state else llm.find_model(args.model, accelerator, args.load_in_4bit)


def train_one(accelerator, args, plan, folder, kit, model, tokenizer, train, papers):
    """Train the adapter of a peft model and leave it in the plan's folder. `papers`: those of `train`, encoded. Returns
    what training.fit returns.
    """
    learned, copies, held_out = list(papers[~plan.held_out]), [], list(papers[plan.held_out])
    if args.short_copies:
        for short in items.short_copies(train[~plan.held_out], kit["fields"]):
            asked = items.build_items(short, kit["fields"], kit["instruction"])
            copies += llm.encode_items(tokenizer, asked, args.max_length)
    kit = kit | {"seed": plan.seed, "plan": plan.name}
    scorer, task = llm.Scorer(model, tokenizer), Task(held_out, kit)
    sides = learned, copies, held_out
    return training.fit(accelerator, scorer, task, *sides, folder / plan.name, args, kit, shape="cosine")


def write_summary(accelerator, folder, plans, runs):
    """Write training.json, which says that the training is finished."""
    seconds, where = sum(run["seconds"] for run in runs), training.environment(accelerator)
    summary = {
        "train_seconds": round(seconds, 2),
        "train_papers_per_second": round(sum(run["papers"] for run in runs) / seconds, 3),
        "train_peak_memory_mb": where["peak_memory_mb"],
        "epochs_run": [len(run["history"]) for run in runs],
        "trained_on": where["device"],
        "folders": [plan.name for plan in plans],
    }
    files.write_json(folder / "training.json", summary)
    log(f"wrote {', '.join(str(folder / plan.name / 'best') for plan in plans)}; next: lora_predict.py")


def parse_args():
    parser = cli.arg_parser(__doc__, "train", "seed")
    add = parser.add_argument_group("model and adapter").add_argument
    add("--model", default="auto", metavar="M", help=f"hub name, directory, 'embedded' (SmolLM2-135M), or 'auto': "
        f"with CUDA {llm.AUTO}, or a smaller Qwen3 that fits; embedded without")  # fmt: skip
    add("--name", default="lora", help="folder under --out-dir, default %(default)s")
    add("--method", choices=("lora", "p-tuning-v2"), default="lora", help="default %(default)s")
    add("--rank", type=positive_int, default=8, metavar="R", help="of LoRA, default %(default)s")
    add("--alpha", type=positive_int, metavar="A", help="of LoRA, default twice the rank")
    add("--dropout", type=bounded(float, 0, 0.9), default=0.0, metavar="R", help="before LoRA's A, default %(default)s")
    add("--target-modules", nargs="+", metavar="NAME", help="layers that get LoRA, default every linear one")
    add("--virtual-tokens", type=positive_int, default=32, metavar="N", help="of P-tuning v2, default %(default)s")
    add("--max-length", type=positive_int, metavar="N", help="tokens a paper, default 512; of the embedded model 160")
    add("--short-copies", action=argparse.BooleanOptionalAction, default=True,
        help="also train on each paper without its abstract, and on its authors alone")  # fmt: skip
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        help="a third slower, a fraction of the memory; default: where the GPU's memory asks for it")  # fmt: skip
    add("--load-in-4bit", action="store_true", help="keep the model's weights in 4 bits: a third of the memory; needs "
        "requirements-4bit.txt")  # fmt: skip
    training.add_training_flags(parser, epochs=2, batch_size=4, patience=2, cpu_piece=2)
    return parser.parse_args()


def main():
    args = parse_args()
    accelerator = training.make_accelerator(args.precision)
    folder = args.out_dir / args.name
    with files.locked(folder), training.explain("the same command with --resume goes on"):
        train_adapters(accelerator, args, folder)
    accelerator.end_training()


if __name__ == "__main__":
    cli.run_script(main)

"""Train a LoRA or P-tuning v2 adapter of a large language model on the instruction data of make_llm_data.py.

    python make_llm_data.py && python lora_finetune.py         the default model and LoRA on every linear layer
    python lora_finetune.py --model Qwen/Qwen3-1.7B --rank 16  another model
    python lora_finetune.py --method p-tuning-v2               trained prefixes instead
    python lora_finetune.py --resume                           go on after a kill
    accelerate launch lora_finetune.py                         on every GPU of the machine

In: outputs/paper_label.json, paper_label_valid.json, train.csv, test.csv. Out, under outputs/lora/ (--name): best/ (the
adapter in peft's form, with kit.json: base model, prompt, fields, answers, settings), log.csv, training.json (how long
it took), last.safetensors (to resume from). lora_predict.py makes the predictions.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from safetensors import safe_open

import common
import llm
import training
from common import InputError, log, replacing, run_script, whole, write_json


def read_items(path, source):
    """(training items, held-out items) from paper_label.json and its kin. Raises InputError where there are none, or
    where they were made from other papers or settings than `source` says.
    """
    files = [path, path.with_name(f"{path.stem}_valid.json"), path.with_name(f"{path.stem}_source.json")]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such file; run make_llm_data.py first, with the same flags")
    train, held_out, made_of = *map(common.read_json, files[:2]), common.read_json(files[2], fields=list)
    if changed := common.differences(made_of, source):
        raise InputError(f"{path} is not of these papers and flags ({changed}): run make_llm_data.py again")
    for file, items in zip(files, (train, held_out)):
        good = isinstance(items, list) and items and all(isinstance(item, dict) for item in items)
        if not good or any({"instruction", "input", "output"} - item.keys() or not item["output"] for item in items):
            raise InputError(f"{file}: want a list of instruction, input and output: run make_llm_data.py again")
    return train, held_out


def add_adapter(model, args):
    """The model with a new adapter around it, trainable weights in fp32, drawn from the seed."""
    torch.manual_seed(args.seed)
    if args.method == "lora":
        targets = args.target_modules or "all-linear"
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=args.rank, lora_alpha=args.alpha or 2 * args.rank,
            lora_dropout=args.dropout, target_modules=targets,
        )  # fmt: skip
    else:
        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=args.virtual_tokens)
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        named = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        kinds = sorted({name.rpartition(".")[2] for name in named})
        raise InputError(
            f"--target-modules: {str(error).splitlines()[0]} linear layers: {common.some(kinds, 20)}"
        ) from None
    if args.gradient_checkpointing and args.method == "lora":  # prefixes come as a cache, which it would throw away
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def default_lr(args, model):
    """The highest learning rate that suits method and size."""
    lr = {"lora": 2e-4, "p-tuning-v2": 5e-3}[args.method]
    return lr * 15 if model.config.hidden_size < 1024 else lr


def check_saved(folder):
    """Raise InputError where the saved adapter holds no or only empty B matrices."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = [file.get_tensor(name) for name in file.keys() if "lora_B" in name or "prompt_embeddings" in name]
    if not any(weight.any() for weight in found):
        raise InputError(f"{folder}: the saved adapter changes nothing: train it with more --epochs or a higher --lr")


def parse_args():
    parser = common.arg_parser(__doc__)
    add = parser.add_argument_group("model and adapter").add_argument
    add("--model", default="auto", metavar="M", help=f"hub name, directory, 'embedded' (SmolLM2-135M), or 'auto': "
        f"{llm.AUTO} with CUDA, embedded without")  # fmt: skip
    add("--data", metavar="FILE", help="default: paper_label.json under --out-dir")
    add("--name", default="lora", help="folder under --out-dir, default %(default)s")
    add("--method", choices=("lora", "p-tuning-v2"), default="lora", help="default %(default)s")
    add("--rank", type=whole, default=8, metavar="R", help="of LoRA, default %(default)s")
    add("--alpha", type=whole, metavar="A", help="of LoRA, default twice the rank")
    add("--dropout", type=float, default=0.0, metavar="R", help="before LoRA's A, default %(default)s")
    add("--target-modules", nargs="+", metavar="NAME", help="layers that get LoRA, default every linear one")
    add("--virtual-tokens", type=whole, default=32, metavar="N", help="of P-tuning v2, default %(default)s")
    add("--max-length", type=whole, metavar="N", help="tokens a paper, default 512; of the embedded model 160")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="a third slower, a fraction of the memory; default: with CUDA")  # fmt: skip
    training.add_training_flags(parser, epochs=2, batch_size=4, patience=2, at_once=2)
    return parser.parse_args()


@training.resumable()
def train_adapter(accelerator, args, folder):
    """Train on paper_label.json, and leave adapter and record in folder."""
    train, _, fields = common.load_papers(args)
    source = common.split_record(args, train, fields)
    path = Path(args.data or args.out_dir / "paper_label.json")
    items, valid_items = read_items(path, source)

    name = llm.find_model(args.model)
    model, tokenizer = llm.load_llm(name, accelerator)
    args.lr = args.lr or default_lr(args, model)
    args.max_length = args.max_length or llm.default_length(name)
    papers, held_out = (llm.encode_items(tokenizer, part, args.max_length) for part in (items, valid_items))
    scorer = llm.Scorer(add_adapter(model, args), tokenizer)
    shaping = ("method", "rank", "alpha", "dropout", "target_modules", "virtual_tokens", "max_length", "epochs")
    shaping += ("batch_size", "lr", "warmup", "weight_decay", "patience", "seed", "valid_ratio")
    settings = {key: getattr(args, key) for key in shaping} | {"precision": accelerator.mixed_precision}
    kit = {
        "model": name,
        "prompt": llm.prompt_form(tokenizer),
        "instruction": items[0]["instruction"],
        "fields": fields,
        "answers": llm.encode_answers(tokenizer),
        "settings": settings,
        "train": source["train"],
    }

    def save_best(scorer):
        with replacing(folder / "best") as part:
            scorer.model.save_pretrained(part)
            write_json(part / "kit.json", kit)
            check_saved(part)

    def losses(scorer, papers):
        return scorer(papers)

    record = settings | {"model": name, "fields": fields, "items": common.digest([items, valid_items])}
    probs = llm.make_probs(held_out)
    done = training.fit(
        accelerator, scorer, papers, held_out, losses, probs, save_best, folder, args, record, shape="cosine"
    )
    llm.check_adapter(scorer.to(accelerator.device), held_out)
    if accelerator.is_main_process:
        summary = {
            "train_seconds": round(done["seconds"], 2),
            "train_papers_per_second": round(done["papers"] / done["seconds"], 3),
            "train_peak_memory_mb": training.peak_memory_mb(accelerator),
            "epochs_run": len(done["history"]),
            "trained_on": training.describe(accelerator),
        }
        write_json(folder / "training.json", summary)
        log(f"wrote {folder / 'best'}; next: lora_predict.py")


def main():
    args = parse_args()
    accelerator = training.make_accelerator(args.precision)
    folder = args.out_dir / args.name
    with common.locked(folder, accelerator.is_main_process), training.model_advice():
        train_adapter(accelerator, args, folder)


if __name__ == "__main__":
    run_script(main)

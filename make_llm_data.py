"""Instruction data from train.csv, in the alpaca form that most trainers of LLMs read as it is.

    python make_llm_data.py                            outputs/paper_label.json and the files beside it
    python make_llm_data.py --fields title abstract    without the authors

In: train.csv, test.csv. Out, under outputs/: paper_label.json (the training part of the common split),
paper_label_valid.json (the held-out part), paper_label_test.json (output empty), each a list of {"instruction",
"input", "output"}; dataset_info.json, by which LLaMA-Factory finds them; paper_label_source.json, which tells
lora_finetune.py the papers, fields and split. The instruction may be edited in the files: it is trained and asked so.
"""

import json

from common import load_papers, split_papers
from lib.cli import arg_parser, log, run_script
from lib.files import atomic_write, write_json
from lib.items import build_items
from lib.results import fingerprint


def dataset_info(names):
    """What LLaMA-Factory's dataset_info.json says about files in the alpaca form."""
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    return {name: {"file_name": f"{name}.json", "formatting": "alpaca", "columns": columns} for name in names}


def write_items(path, papers, fields):
    """Write papers as a JSON list of items, one a line."""
    lines = [json.dumps(item, ensure_ascii=False) for item in build_items(papers, fields)]
    with atomic_write(path) as part:
        part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main():
    args = arg_parser(__doc__, "train", "test", "fields", "valid_ratio", "split_seed", "limit").parse_args()
    train, test, fields = load_papers(args)
    held_out = split_papers(train, args.valid_ratio, args.split_seed)
    parts = {"paper_label": train[~held_out], "paper_label_valid": train[held_out], "paper_label_test": test}
    source = args.out_dir / "paper_label_source.json"
    source.unlink(missing_ok=True)  # if this run is killed, lora_finetune.py does not take its files for a whole set
    for name, papers in parts.items():
        write_items(args.out_dir / f"{name}.json", papers, fields)
    write_json(args.out_dir / "dataset_info.json", dataset_info(parts))
    split = {"fields": fields, "seed": args.split_seed, "valid_ratio": args.valid_ratio, "limit": args.limit}
    write_json(source, split | {"train": fingerprint(train)})
    counts = ", ".join(f"{len(papers)} in {name}.json" for name, papers in parts.items())
    log(f"wrote to {args.out_dir}: {counts}, with {' '.join(fields)}")


if __name__ == "__main__":
    run_script(main)

"""This kit against what one would otherwise run: papers a second and peak memory, side by side in one go.

    python benchmarks/run.py --train papers.csv              every case, 3 rounds in turn -> benchmarks/results.json
    python benchmarks/run.py --train papers.csv --only bert-train lora-predict

Each case of a group works on the same papers with the same weights, each in a process of its own; loading is not timed.
"original" is the loop of the published tutorial; "trainer" is transformers' Trainer with its default collator, of
sequences cut at 512 tokens (and peft, for LoRA).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(KIT))

PAPERS = {"bert-train": 48, "bert-predict": 96, "lora-train": 16, "lora-predict": 16}
CASES = {
    "bert-train": ("kit", "original", "trainer"),
    "bert-predict": ("kit", "original"),
    "lora-train": ("kit", "trainer"),
    "lora-predict": ("kit", "original"),
}
BATCH = {"bert": 16, "lora": 8}


def arguments(script, *flags):
    """A script's args, as from its command line."""
    sys.argv = [script.__name__, *flags]
    return script.parse_args()


def bert_case(case, peer, papers, fields):
    """Returns (seconds, papers seen, tokens of each paper after truncation)."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    import bert_finetune
    import common
    import training

    args = arguments(bert_finetune, "--epochs", "1", "--lr", "1e-4")
    name = bert_finetune.find_model("embedded")
    tokenizer = bert_finetune.load_tokenizer(name, 512)
    items = bert_finetune.encode(tokenizer, papers, fields, 512)
    lengths = [len(item["input_ids"]) for item in items]
    texts, labels = common.build_text(papers, fields), papers["label"].tolist()
    if peer == "kit":
        accelerator = training.make_accelerator("fp32")
        model = bert_finetune.load_model(name, 0.0, 1)
        losses, probs = bert_finetune.make_functions(tokenizer, accelerator.device)
        if case == "bert-predict":
            started = time.perf_counter()
            training.predict(accelerator, model, items, probs, BATCH["bert"])
            return time.perf_counter() - started, len(items), lengths
        with tempfile.TemporaryDirectory() as folder:
            done = training.fit(
                accelerator, model, items, items[:2], losses, probs, lambda model: None, Path(folder), args, {}
            )
        return done["seconds"], done["papers"], lengths
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    if peer == "trainer":
        data = [
            {**tokenizer(text, truncation=True, max_length=512), "labels": label} for text, label in zip(texts, labels)
        ]
        with tempfile.TemporaryDirectory() as folder:
            setup = TrainingArguments(
                folder, num_train_epochs=1, per_device_train_batch_size=BATCH["bert"], save_strategy="no", report_to=[],
                use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            )  # fmt: skip
            started = time.perf_counter()
            Trainer(model, setup, train_dataset=data, processing_class=tokenizer).train()
        return time.perf_counter() - started, len(data), lengths
    # The tutorial: every paper padded to the maximal length, the dropout of the checkpoint.
    encoded = tokenizer(texts, truncation=True, padding="max_length", max_length=512, return_tensors="pt")
    data = list(zip(encoded["input_ids"], encoded["attention_mask"], torch.tensor(labels)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    model.train(case == "bert-train")
    started = time.perf_counter()
    for ids, mask, label in DataLoader(data, batch_size=BATCH["bert"], shuffle=True):
        if case == "bert-predict":
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
            continue
        model(input_ids=ids, attention_mask=mask, labels=label).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started, len(data), lengths


def lora_case(case, peer, papers, fields):
    """Returns (seconds, papers seen, tokens of each prompt)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    import common
    import llm
    import lora_finetune
    import training

    flags = ["--epochs", "1", "--batch-size", str(BATCH["lora"]), "--lr", "1e-3", "--no-gradient-checkpointing"]
    args = arguments(lora_finetune, *flags)
    accelerator = training.make_accelerator("fp32")
    model, tokenizer = llm.load_llm("embedded", accelerator)
    items = common.build_items(papers, fields)
    prompts = llm.encode_items(tokenizer, items, 512)
    lengths = [len(prompt["input_ids"]) for prompt in prompts]
    if case == "lora-train":
        if peer == "kit":
            scorer = llm.Scorer(lora_finetune.add_adapter(model, args), tokenizer)
            with tempfile.TemporaryDirectory() as folder:
                done = training.fit(
                    accelerator, scorer, prompts, prompts[:2], lambda s, p: s(p), lambda s, p: s.probs(p),
                    lambda model: None, Path(folder), args, {},
                )  # fmt: skip
            return done["seconds"], done["papers"], lengths
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        )
        end = [tokenizer.eos_token_id]
        data = []
        for prompt in prompts:
            ids = prompt["input_ids"] + llm.encode_answers(tokenizer)[prompt["label"]] + end
            fill = [tokenizer.pad_token_id] * (512 - len(ids))
            mask = [1] * len(ids) + [0] * len(fill)
            data.append({"input_ids": ids + fill, "attention_mask": mask, "labels": ids + [-100] * len(fill)})
        with tempfile.TemporaryDirectory() as folder:
            setup = TrainingArguments(
                folder, num_train_epochs=1, per_device_train_batch_size=BATCH["lora"], save_strategy="no", report_to=[],
                use_cpu=not torch.cuda.is_available(), disable_tqdm=True, learning_rate=1e-3,
            )  # fmt: skip
            started = time.perf_counter()
            Trainer(model, setup, train_dataset=data).train()
        return time.perf_counter() - started, len(data), lengths
    torch.manual_seed(1)
    model = lora_finetune.add_adapter(model, args)
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.01)
    if peer == "kit":
        scorer = llm.Scorer(model.merge_and_unload(), tokenizer).eval()

        def probs(scorer, papers):
            if scorer.cache is None:
                scorer.share_prefix(prompts)
            return scorer.probs(papers)

        started = time.perf_counter()
        training.predict(accelerator, scorer, prompts, probs, BATCH["lora"])
        return time.perf_counter() - started, len(prompts), lengths
    model.eval()
    started = time.perf_counter()
    for prompt in prompts:  # one paper at a time, up to 4 tokens of chat
        ids = torch.tensor([prompt["input_ids"]])
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return time.perf_counter() - started, len(prompts), lengths


def run_case(case, peer, train):
    """One case in this process: {"papers_per_second", "peak_memory_mb", "tokens"}."""
    import common

    papers = common.read_papers(train, labelled=True).head(PAPERS[case])
    fields = [name for name in ("title", "author", "abstract") if name in papers]
    seconds, count, lengths = (bert_case if case.startswith("bert") else lora_case)(case, peer, papers, fields)
    return {
        "papers_per_second": count / seconds,
        "peak_memory_mb": common.peak_memory_mb(),
        "tokens": sum(lengths) / len(lengths),
    }


def matmul_peak():
    """FLOP/s of a product of two fp32 matrices of 2048 x 2048, the best of 5."""
    import torch

    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        times.append(time.perf_counter() - started)
    return 5 * 2 * 2048**3 / min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=KIT / "data/sample/train.csv", help="default: the sample")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=KIT / "benchmarks/results.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_case(*args.one, args.train)))
        return
    found = json.loads(args.results.read_text()) if args.results.is_file() else {}
    found["machine"] = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    for case in args.only:
        runs = {peer: [] for peer in CASES[case]}
        peak = matmul_peak()
        for _ in range(args.rounds):
            for peer in runs:  # in turn, so that a slow minute hits all of them
                command = [sys.executable, __file__, "--train", str(args.train), "--one", case, peer]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                runs[peer].append(json.loads(done.stdout.splitlines()[-1]))
        found[case] = {"papers": PAPERS[case], "matmul_gflops": peak / 1e9}
        for peer, results in runs.items():
            speeds = [result["papers_per_second"] for result in results]
            ratios = [ours["papers_per_second"] / speed for ours, speed in zip(runs["kit"], speeds)]
            found[case][peer] = {
                "papers_per_second": statistics.median(speeds),
                "spread": [min(speeds), max(speeds)],
                "peak_memory_mb": statistics.median(result["peak_memory_mb"] for result in results),
                "tokens": results[0]["tokens"],
                "kit_is_times_as_fast": [statistics.median(ratios), min(ratios), max(ratios)],
            }
        for peer in runs:
            row = found[case][peer]
            print(f"{case:13} {peer:9} {row['papers_per_second']:7.2f} papers/s, {row['peak_memory_mb']:6.0f} MiB; "
                  f"the kit is {row['kit_is_times_as_fast'][0]:.2f} times as fast", flush=True)  # fmt: skip
        args.results.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""lora_finetune.py and lora_predict.py against peft with transformers' Trainer, and against chat, a paper at a time.

Each function runs one peer in this process, SmolLM2-135M on the CPU in fp32, and returns a dict of what was measured:
"seconds" and "papers" (how many were seen in that time). Loading and tokenising are not timed.
"""

import tempfile
import time
from pathlib import Path

import papers
import torch

import common

BATCH = 8


def load_lora(args):
    """(accelerator, base model, tokenizer, prompts, flags of lora_finetune.py), of the embedded SmolLM2, 512 tokens."""
    import llm
    import training

    import lora_finetune

    given = ["--epochs", "1", "--batch-size", str(BATCH), "--lr", "1e-3", "--no-gradient-checkpointing"]
    flags = papers.arguments(lora_finetune, *given, "--seed", str(args.round))
    accelerator = training.make_accelerator("fp32")
    model, tokenizer = llm.load_llm("embedded", accelerator)
    frame, fields = papers.first_papers(args)
    return accelerator, model, tokenizer, llm.encode_items(tokenizer, common.build_items(frame, fields), 512), flags


def lora_train_kit(args):
    import llm
    import training

    import lora_finetune

    accelerator, model, tokenizer, prompts, flags = load_lora(args)
    scorer = llm.Scorer(lora_finetune.add_adapter(model, flags), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        done = training.fit(
            accelerator, scorer, prompts, prompts[:2], lambda s, p: s(p), lambda s, p: s.probs(p),
            lambda model: None, Path(folder), flags, {},
        )  # fmt: skip
    return {"seconds": done["seconds"], "papers": done["papers"]}


def lora_train_trainer(args):
    """peft and the Trainer's default collator: all padded to 512, every token a label."""
    import llm
    from peft import LoraConfig, get_peft_model

    _, model, tokenizer, prompts, _ = load_lora(args)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    answers, data = llm.encode_answers(tokenizer), []
    for prompt in prompts:
        ids = prompt["input_ids"] + answers[prompt["label"]] + [tokenizer.eos_token_id]
        fill = 512 - len(ids)
        padded = ids + [tokenizer.pad_token_id] * fill
        data.append({"input_ids": padded, "attention_mask": [1] * len(ids) + [0] * fill, "labels": ids + [-100] * fill})
    return {"seconds": papers.train_with_trainer(model, data, BATCH, 1e-3, args.round), "papers": len(data)}


def load_adapted(args):
    """load_lora with an adapter around the model whose B matrices are not zero."""
    import lora_finetune

    accelerator, model, tokenizer, prompts, flags = load_lora(args)
    model = lora_finetune.add_adapter(model, flags)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    return accelerator, model, tokenizer, prompts


def lora_predict_kit(args):
    import llm
    import training

    accelerator, model, tokenizer, prompts = load_adapted(args)
    scorer = llm.Scorer(model.merge_and_unload(), tokenizer).eval()
    started = time.perf_counter()
    training.predict(accelerator, scorer, prompts, llm.make_probs(prompts), BATCH)
    return {"seconds": time.perf_counter() - started, "papers": len(prompts)}


def lora_predict_original(args):
    """One paper at a time, a chat of up to 4 tokens, the adapter not merged."""
    _, model, _, prompts = load_adapted(args)
    model.eval()
    started = time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt["input_ids"]])
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return {"seconds": time.perf_counter() - started, "papers": len(prompts)}


CASES = {
    "lora-train": {"kit": lora_train_kit, "trainer": lora_train_trainer},
    "lora-predict": {"kit": lora_predict_kit, "original": lora_predict_original},
}

"""The sections of gpu.py: each says rows, a line of JSON each. Imported by a process that runs one of them."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import bert_finetune
import lora_finetune
from lib import cli, gpu, llm, training

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"
LONGEST = 512 if CARD else 64  # tokens of an LLM's papers
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # all others compute in float32
LIMITS = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 2e-2, "fp16": 1e-2}  # of an error; TF32 keeps as many bits as fp16
SCALE = 16  # of losses, as fp16 has no small numbers
SHAPES = {  # layers, width, heads, those of keys and values, their width, width of the middle, tokens known, GiB
    "Qwen3-4B": (36, 2560, 32, 8, 128, 9728, 151936, 7.6),
    "Qwen3-1.7B": (28, 2048, 16, 8, 128, 6144, 151936, 3.3),
    "tiny": (2, 256, 2, 1, 128, 512, 30522, 0) if CARD else (2, 32, 4, 2, 8, 64, 30522, 0),
}

# ---- rows, memory and time -------------------------------------------------------------------------------------------


def say(what, value, ok=None):
    """A row, at once. ok: whether it is right, None where there is nothing to prove."""
    print(json.dumps({"what": what, "value": str(value), "ok": ok}), flush=True)


def fits(what, needed):
    """Whether a card has the `needed` GiB for a row; if not, a row that says so."""
    if not CARD:
        return True
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 2**30
    if free < needed:
        say(what, f"skipped: needs {needed:.1f} GiB, {free:.1f} are free")
    return free >= needed


def peak():
    """Words for the most memory since `fits`."""
    most = [used() / 2**30 for used in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
    return f", {most[0]:.1f} GiB allocated, {most[1]:.1f} reserved" if CARD else ""


def seconds(function, times=1):
    """How long a call takes until the card has done all."""
    wait = torch.cuda.synchronize if CARD else int
    wait()
    started = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - started) / times


def product_speed(precision):
    """Operations a second of a large product."""
    side = 8192 if CARD else 512
    one = torch.randn(side, side, device=DEVICE, dtype=TYPES.get(precision))
    seconds(lambda: one @ one, 3)
    return 2 * side**3 / seconds(lambda: one @ one, 10)


# ---- models, papers and steps ----------------------------------------------------------------------------------------


@cache
def make_tokenizer():
    tokenizer = bert_finetune.load_tokenizer(bert_finetune.find_model("embedded")[1])
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def make_decoder(kind, shape, device, precision="fp32"):
    """A causal LM with random weights, made on the device."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = dict(zip((*names, "intermediate_size", "vocab_size"), SHAPES[shape]))
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.AutoConfig.for_model(kind, **sizes, tie_word_embeddings=True, pad_token_id=0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=TYPES.get(precision, torch.float32)).eval()


def make_bert(tiny):
    """bert-base with random weights, without dropout, as bert_finetune.load_model gives it."""
    width = 128 if CARD else 32
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": width, "intermediate_size": width}
    off = {"num_labels": 2, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    torch.manual_seed(0)
    config = transformers.BertConfig(**off, **(sizes if tiny else {}))
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.classifier.register_forward_hook(training.in_float32)
    return model


def make_papers(count, longest=512):
    """Papers that begin alike; a third of 90 to 110 tokens, a third of 130 to 170, a third of 340 to 512."""
    random, ends = np.random.default_rng(0), ((0.18, 0.21), (0.254, 0.332), (0.664, 1))
    lengths = random.permutation(np.concatenate([np.linspace(*each, -(-count // 3)) for each in ends]))[:count]
    alike = longest // 13  # the prompt: at most what the shortest has
    rows = [[*range(alike), *random.integers(9, 600, int(n * longest) - alike).tolist()] for n in lengths]
    return [{"input_ids": row, "label": i % 2} for i, row in enumerate(rows)]


def flags(script, **changes):
    """A script's flags: its defaults, but for the changes."""
    sys.argv = [script.__name__]
    args = script.parse_args()
    vars(args).update({"lr": 3e-4, "accumulate": 1, "gradient_checkpointing": False} | changes)
    return args


def make_run(accelerator, model, task, papers, args):
    """A training under way, as training.fit makes it."""
    accelerator.free_memory()  # an earlier run's
    optimizer = accelerator.prepare(training.make_optimizer(model.to(accelerator.device).train(), args))
    state, weights = training.start_state(model, optimizer, None, args, {}), np.ones(len(papers))
    sides = papers, len(papers), []
    return training.Run(accelerator, model, task, *sides, None, args, "linear", optimizer, weights, state, 1)


def measure_steps(what, needed, run, flops=0):
    """A row: six steps, after two. `flops`: what a token costs as a share of what is computed in a second."""
    if not fits(what, needed):
        return
    batches = run.batches(1)[:8]
    seconds(lambda: [training.train_step(run, batch, 20, 100) for batch in batches[:2]])
    spent = seconds(lambda: [training.train_step(run, batch, 20, 100) for batch in batches[2:]])
    papers = np.concatenate(batches[2:])
    tokens = sum(len(run.train[i]["input_ids"]) for i in papers) / spent
    share = f", MFU {tokens * flops:.0%}" if flops else ""
    say(what, f"{len(papers) / spent:.1f} papers/s, {tokens:.0f} tokens/s{share}{peak()}")


# ---- sections --------------------------------------------------------------------------------------------------------


def check_machine():
    cards = gpu.find_cards()
    precision, size = gpu.choose_precision("auto", cards), 2**28 if CARD else 2**22
    say("torch", f"{torch.__version__}, built for {' '.join(torch.cuda.get_arch_list()) or 'CPUs'}")
    if CARD and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        say("cards, driver", subprocess.run(asked, capture_output=True, text=True).stdout.strip().replace("\n", "; "))
    if CARD:
        gpu.set_up()
        say("capability, precision", f"{cards}, {precision}")
        say("allocator", torch.cuda.memory._snapshot()["allocator_settings"])
    if fits("copy, product", 2.5):
        one, other = torch.zeros(2, size, device=DEVICE)
        say("copy", f"{8 * size / seconds(lambda: other.copy_(one), 10) / 1e9:.0f} GB/s")
        say("product", f"{product_speed(precision) / 1e12:.2f} TFLOP/s in {precision}")


def make_tiny(kind, precision):
    """A tiny encoder, or decoder with an adapter, in training on the CPU. Its weights are larger than new ones, so that
    what is read matters; frozen ones are numbers of the precision.
    """
    model = make_bert(True) if kind == "bert" else make_decoder(kind, "tiny", "cpu")
    for weight in model.parameters():
        weight.data *= 22 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 1
    if kind != "bert":
        model = lora_finetune.add_adapter(model, flags(lora_finetune), 1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
            elif not weight.requires_grad:
                weight.data = weight.data.to(TYPES.get(precision)).float()
        model = llm.Scorer(model, make_tokenizer())
    return model.train()


def learn(model, task, papers, precision, device=DEVICE):
    """(losses, gradients) in float32 on the CPU. All labels are 1: the gradients of both would cancel, but not what was
    rounded.
    """
    papers = [paper | {"label": 1} for paper in papers]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.autocast(device, TYPES.get(precision), enabled=precision in TYPES):
        losses = task.losses(model, papers)
    found = torch.autograd.grad(SCALE * losses.mean(), weights, allow_unused=True)
    found = torch.cat([gradient.flatten().float() for gradient in found if gradient is not None])
    return losses.detach().float().cpu(), found.cpu() / SCALE


def ask(model, task, papers, precision, size):
    """P(label = 1) of the papers, `size` at a time."""
    with torch.no_grad(), torch.autocast(DEVICE, TYPES.get(precision), enabled=precision in TYPES):
        return torch.cat([task.probs(model, papers[i : i + size]).float() for i in range(0, len(papers), size)])


def error(found, want):
    """Relative, by norm, the largest of some pairs of tensors; nan if one is."""
    errors = [((one - other).norm() / other.norm()).item() for one, other in zip(found, want)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def compare(kind, precision):
    """What a tiny model learns and answers on the device, in ways that must agree: {what: error}, nan if it can't."""
    model, papers, llms = make_tiny(kind, precision), make_papers(6, 80), kind != "bert"
    tasks = [llm.Task(papers) if llms else bert_finetune.Task(make_tokenizer(), place, {}) for place in ("cpu", DEVICE)]
    torch.set_float32_matmul_precision("highest")
    want = learn(model, tasks[0], papers, "fp32", "cpu")
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    for weight in model.parameters():
        weight.data = weight.data.to(None if weight.requires_grad else TYPES.get(precision))
    step = partial(learn, model.to(DEVICE), tasks[1], papers, precision)
    found = step()
    errors = {"losses as on a CPU": error(found[:1], want[:1]), "gradients as on a CPU": error(found[1:], want[1:])}
    if llms:
        model.packs = True
        errors["packed = padded"] = error(step(), found)
        with model.model.disable_adapter():  # it has learned to be called under autocast alone
            errors["packed = padded"] *= 1 if llm.keeps_apart(model.model) else math.nan
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.packs = False
        errors["with = without checkpointing"] = error(step(), found)
    answers = partial(ask, model.eval(), tasks[1], papers, precision)
    model.prefix = []
    together = answers(6)
    errors["alone = in a batch"] = (answers(1) - together).abs().max().item()
    if llms:
        model.prefix = None
        errors["with = without the shared prefix"] = (answers(6) - together).abs().max().item()
        errors["with = without the shared prefix"] *= 1 if model.cache is not None else math.nan
    return errors


def check_correctness():
    cards, precisions = gpu.find_cards(), ["fp32"]
    if CARD:
        gpu.set_up()
        precisions += ["tf32", "fp16"]
    precisions += ["bf16"] * (not CARD or min(cards) >= (8, 0))
    for kind in ("bert", "qwen3", "glm", "llama"):
        found = {precision: compare(kind, precision) for precision in precisions}
        for what in found["fp32"]:
            errors = {precision: found[precision][what] for precision in precisions}
            right = all(value < LIMITS[precision] for precision, value in errors.items())
            say(f"{kind}: {what}", ", ".join(f"{name} {value:.0e}" for name, value in errors.items()), right)


def run_script(what, folder, script, *more, until=None):
    """A row: whether a script of the kit succeeds; with `until`, whether it is killed once that file is there. Returns
    what it said.
    """
    command, started = [sys.executable, cli.KIT / script, "--out-dir", folder, *more], time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        environment = os.environ | {"DATA_DIR": str(cli.KIT / "data" / "sample")}
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, env=environment)
        while until and process.poll() is None and not until.is_file():
            time.sleep(0.01)
        if until:
            process.kill()
        code = process.wait()
        said.seek(0)
        text = said.read().strip()
    right = code == (-signal.SIGKILL if until else 0)
    say(what, f"{time.perf_counter() - started:.0f} s" if right else text.rpartition("\n")[2], right)
    return text


def check_scripts():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, model in (("b", make_bert(True).bert), ("l", make_decoder("llama", "tiny", "cpu"))):
            model.save_pretrained(folder / path)
            make_tokenizer().save_pretrained(folder / path)
        few, quick = ("--limit", 60), ("--max-length", 96, "--batch-size", 4, "--epochs", 1, "--lr", 3e-4)
        bert = ("bert_finetune.py", "--model", folder / "b", *few, *quick)
        lora = ("lora_finetune.py", "--model", folder / "l", *quick)
        for command in (bert, ("make_llm_data.py", *few), lora, ("lora_predict.py",)):
            run_script(command[0], folder, *command)
        for whole, command in (("bert", bert), ("lora", lora)):
            cut, command = folder / f"cut-{whole}" / training.LAST, (*command, "--name", f"cut-{whole}")
            run_script(f"{command[0]} is killed", folder, *command, "--save-minutes", 0, until=cut)
            said = run_script(f"{command[0]} --resume", folder, *command, "--resume")
            one, other = (load_file(path) for path in (folder / whole / training.LAST, cut))
            difference = max((one[key] - other[key]).abs().max().item() for key in one)
            right = "resumed after" in said and difference < 1e-3
            say(f"{command[0]}: weights of resumed = uninterrupted", f"{difference:.0e}", right)
        run_script("lora_finetune.py --folds 3", folder, *lora, "--folds", 3, "--name", "folds")


def check_scaler():
    accelerator = training.make_accelerator("fp16" if CARD else "bf16")
    if not CARD:  # what fp16 is with CUDA
        accelerator.state._mixed_precision, accelerator.scaler = "fp16", torch.amp.GradScaler("cpu")
    task = bert_finetune.Task(make_tokenizer(), DEVICE, {})
    run = make_run(accelerator, make_bert(True), task, make_papers(16, 60), flags(bert_finetune))
    weights, scales = [torch.nn.utils.parameters_to_vector(run.trained)], [accelerator.scaler.get_scale()]
    for factor in (1e9, 1, 1, 1, 1):
        run.weights[:] = factor
        training.train_step(run, np.arange(16), 20, 100)
        weights.append(torch.nn.utils.parameters_to_vector(run.trained))
        scales.append(accelerator.scaler.get_scale())
    say("the scale falls where gradients overflow", f"{scales[0]:.0f}, then {scales[1]:.0f}", scales[1] < scales[0])
    changed = (weights[0] != weights[1]).sum().item()
    say("that step is skipped", f"{changed} weights change", changed == 0)
    moved = (weights[-1] - weights[1]).abs().max().item()
    say("training goes on", f"weights change by {moved:.0e}", math.isfinite(moved) and moved > 0)


def measure_llm(accelerator, scorer, name, size, checkpointing, packs, flops):
    """A row: training in batches of `size`. What it needs is docs/gpu.md's count of bytes for each token, layer and
    value; without checkpointing an old card keeps more.
    """
    model, papers, scorer.packs = scorer.model, make_papers(8 * size, LONGEST), packs
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    run = make_run(accelerator, scorer, llm.Task(papers), papers, flags(lora_finetune, batch_size=size))
    rows = [[len(papers[i]["input_ids"]) for i in batch] for batch in run.batches(1)]
    tokens = max(sum(row) if packs else len(row) * max(row) for row in rows)
    layers, width, *_, weights = SHAPES[name]
    kept = 6 if checkpointing else 70 if CARD and torch.cuda.get_device_capability() >= (8, 0) else 105
    words = f"{name}: train {size}, {'packed' if packs else 'padded'}{', checkpointing' if checkpointing else ''}"
    measure_steps(words, weights + 0.5 + kept * tokens * layers * width / 2**30, run, flops)


def operations(model, precision):
    """What a token costs in training as a share of what is computed in a second. Frozen layers have no gradients of
    their own: twice a forward pass, not three times. Attention and the few logits aren't counted.
    """
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    return 4 * sum(layer.in_features * layer.out_features for layer in layers) / product_speed(precision)


def check_llm():
    accelerator, name = training.make_accelerator(), "Qwen3-4B" if CARD else "tiny"
    if CARD and torch.cuda.mem_get_info()[0] / 2**30 < 10:
        name = "Qwen3-1.7B"
    if not fits(name, SHAPES[name][-1] + 1):
        return
    precision, papers = accelerator.mixed_precision, make_papers(64, LONGEST)
    model = make_decoder("qwen3", name, DEVICE, precision)
    scorer = llm.Scorer(lora_finetune.add_adapter(model, flags(lora_finetune), 1), make_tokenizer())
    flops = operations(model, precision)
    for words, prompts in (("with", papers), ("without", [{"input_ids": []}])):
        what = f"{name}: predict {len(papers)} papers {words} the shared prefix"
        if fits(what, SHAPES[name][-1] + 2):  # with fewer at a time where memory is short
            spent = seconds(partial(training.predict, accelerator, scorer, papers, llm.Task(prompts)))
            say(what, f"{len(papers) / spent:.1f} papers/s{peak()}")
    for size, checkpointing, packs in product((4, 8, 16), (True, False), (True, False)):
        measure_llm(accelerator, scorer, name, size, checkpointing, packs, flops)


def check_bert():
    accelerator, task = training.make_accelerator(), bert_finetune.Task(make_tokenizer(), DEVICE, {})
    model, papers = make_bert(tiny=not CARD), make_papers(256 if CARD else 16)
    for length, pieces, pool in product((192, 512), (1, 2, 4), (8, 1)):
        training.POOL = pool
        run = make_run(accelerator, model, task, make_papers(128, length), flags(bert_finetune, accumulate=pieces))
        words = f"{length} tokens: train 16 in pieces of {16 // pieces}, pool {pool}"
        measure_steps(words, 2 + 2.4 * length / 512 / pieces, run)
    for size in (64, 256):
        if fits(f"predict {size}", 2.5 + 0.015 * size):
            spent = seconds(partial(training.predict, accelerator, model, papers, task, size))
            say(f"512 tokens: predict {size} at once", f"{len(papers) / spent:.1f} papers/s{peak()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / training.LAST
        spent = seconds(lambda: training.save_state(path, model, run.optimizer, run.state))
        say(training.LAST, f"{spent:.1f} s, {path.stat().st_size / 2**20:.0f} MiB")


def check_4bit():
    name = "Qwen3-1.7B"
    missing = "a card" if not CARD else "bitsandbytes" if not find_spec("bitsandbytes") else None
    if missing or shutil.disk_usage(tempfile.gettempdir()).free < 5e9:
        return say(name, f"skipped: needs {missing or '5 GB of disk'}")
    if not fits(name, SHAPES[name][-1] + 1):
        return
    accelerator = training.make_accelerator()
    precision = accelerator.mixed_precision
    with tempfile.TemporaryDirectory() as folder:
        make_decoder("qwen3", name, DEVICE, precision).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        torch.cuda.empty_cache()
        model, tokenizer = llm.load_llm(folder, accelerator, four_bit=True)
    say(f"{name} after loading", f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB allocated")
    scorer = llm.Scorer(lora_finetune.add_adapter(model, flags(lora_finetune), 1), tokenizer)
    measure_llm(accelerator, scorer, name, 4, False, scorer.packs, operations(model, precision))

"""GPUs that aren't there: what the kit decides about cards, and 4-bit weights, which a CPU computes, too."""

import gc
import json
import sys
from argparse import Namespace
from importlib.util import find_spec

import bert_finetune
import lora_finetune
import test_training as loop
from lib import build, gpu, launch, llm, training
from lib.cli import InputError
from lib.items import build_items

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, PreTrainedModel

needs_bitsandbytes = pytest.mark.skipif(
    not find_spec("bitsandbytes"), reason="needs requirements-4bit.txt, which .ci/run installs"
)


@pytest.mark.parametrize(
    ("wanted", "cards", "precision", "warned"),
    [
        ("auto", [(7, 5)], "fp16", False),
        ("auto", [(8, 0)], "bf16", False),
        ("auto", [(8, 6), (7, 5)], "fp16", False),  # all processes must agree
        ("auto", [], "fp32", False),
        ("bf16", [(7, 5)], "bf16", True),
        ("bf16", [(9, 0)], "bf16", False),
    ],
)
def test_precision(capsys, wanted, cards, precision, warned):
    assert gpu.choose_precision(wanted, cards) == precision
    assert ("emulates" in capsys.readouterr().err) == warned
    with pytest.raises(InputError, match="needs CUDA"):
        gpu.choose_precision("fp16", [])


FAILED = "Failed to initialize NVML: Unknown Error"
T4 = "GPU 0: Tesla T4 (UUID: GPU-5a8f)\nGPU 1: Tesla T4 (UUID: GPU-77b1)"


@pytest.mark.parametrize(
    ("visible", "listed", "loud"),
    [
        ("0", T4, "Tesla T4"),
        ("0", FAILED, FAILED),
        ("", T4, None),
        ("-1", T4, None),
        ("0", "No devices were found", None),
    ],
)
def test_a_card_that_torch_does_not_find(tmp_path, monkeypatch, capsys, visible, listed, loud):
    """With an nvidia-smi in the PATH, and without a card for torch. What is said goes into metrics.json, too."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{listed}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.unused_card.cache_clear()
    assert gpu.find_cards() == []
    said = capsys.readouterr().err
    assert ("NO GPU IS USED: torch" in said and f"nvidia-smi lists ({loud})" in said) if loud else not said
    assert training.environment(training.make_accelerator()).get("unused_gpu") == loud
    gpu.unused_card.cache_clear()


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ("525.60.13, 8.6", "cu126"),  # RTX 3090
        ("550.54.15, 8.6", "cu126"),
        ("570.148, 8.6", "cu126"),
        ("580.82.07, 8.6", ""),
        ("575.57.08, 12.0", "cu129"),  # RTX 5090
        ("580.82.07, 12.0", ""),
        ("580.82.07, 7.5", ""),  # T4
        ("535.104.05, 7.0", "cu126"),  # V100
        ("580.82.07, 7.0", "cu126"),
        ("580.82.07, 6.0", "cu126"),  # P100
        ("550.54.15, 8.6\n550.54.15, 6.1", "cu126"),
        ("580.82.07, 12.0\n580.82.07, 6.1", ""),  # no build has both
        ("470.1, 8.6", ""),
        ("", ""),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", ""),
    ],
)
def test_the_build_of_torch_that_a_driver_can_run(listed, name):
    assert build.choose_build(listed) == name


@pytest.mark.parametrize(("release", "segments"), [("6.6.87-microsoft-standard-WSL2", False), ("6.8.0-1", True)])
def test_no_expandable_segments_under_wsl(monkeypatch, release, segments):
    asked = []
    monkeypatch.setattr(gpu.platform, "release", lambda: release)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    before = torch.get_float32_matmul_precision()
    gpu.set_up()
    torch.set_float32_matmul_precision(before)
    assert asked == ["expandable_segments:True"] * segments


def test_cards_that_torch_can_not_use_start_no_processes(monkeypatch):
    """NVML lists two, the driver is too old."""
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch.os, "execv", lambda *command: started.append(command[1][1:]) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["launch.py", "x.py", "--seed", "1"])
    with pytest.raises(SystemExit):
        launch.main()
    assert started == [["x.py", "--seed", "1"]]


@pytest.mark.parametrize(
    ("free", "four_bit", "name"),
    [
        (2, False, "embedded"),
        (3.6, False, "0.6B"),  # cards of 4, 6, 8, 12 and 16 GB: what is free of it
        (5.4, False, "0.6B"),
        (7.2, False, "1.7B"),
        (11.0, False, "4B"),
        (14.6, False, "4B"),
        (3.6, True, "1.7B"),
        (7.2, True, "4B"),
    ],
)
def test_auto_takes_what_fits(free, four_bit, name):
    assert name in llm.choose_model(free, four_bit)


@pytest.mark.parametrize(
    ("free", "papers", "layers", "width", "needed"),
    [
        (15.2, 4, 36, 2560, False),  # Qwen3-4B on 24 GB
        (3.4, 4, 36, 2560, True),  # on 12 GB
        (15.2, 16, 36, 2560, True),
        (11.0, 4, 28, 2048, False),  # Qwen3-1.7B on 16 GB
        (3.8, 4, 28, 2048, True),  # on 8 GB
    ],
)
def test_checkpointing_where_it_is_needed(monkeypatch, free, papers, layers, width, needed):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, None))
    config = LlamaConfig(num_hidden_layers=layers, hidden_size=width)
    args = Namespace(batch_size=2 * papers, accumulate=2, cpu_piece=2, max_length=512)
    model = Namespace(device=torch.device("cuda"), config=config, dtype=torch.bfloat16)
    assert lora_finetune.needs_checkpointing(model, args) == needed
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * free * 2**30, None))
    model.dtype = torch.float32
    assert lora_finetune.needs_checkpointing(model, args) == needed, "of twice the bytes"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", [llm, bert_finetune])
def test_a_fold_frees_its_model(kit, monkeypatch, tiny_llm, tiny_bert, place, precision):
    """When the next one is loaded, nothing of it is left, also without Python's own search for garbage."""
    command, name = ["lora_finetune.py", "--model", tiny_llm, "--max-length", 200], "load_llm"
    if place is bert_finetune:
        command, name = ["bert_finetune.py", "--model", tiny_bert, "--max-length", 60, "--limit", 24], "load_model"
    alive, load = [], getattr(place, name)

    def counting(*arguments, **more):
        alive.append(sum(isinstance(each, PreTrainedModel) for each in gc.get_objects()))
        return load(*arguments, **more)

    monkeypatch.setattr(place, name, counting)
    kit("make_llm_data.py", "--fields", "title", "--limit", 24)
    gc.disable()
    done = kit(*command, "--folds", 2, "--epochs", 1, "--precision", precision)
    gc.enable()
    assert done.returncode == 0, done.stderr
    assert len(alive) >= 2 and not any(alive)


# ---- bf16, and fp16 with scaled gradients, on a CPU ------------------------------------------------------------------


@pytest.fixture(params=["fp16"])
def half(request, monkeypatch):
    """On a CPU training.make_accelerator gives bf16, or what fp16 is with CUDA: autocast and gradients scaled so much
    that they overflow at first.
    """
    make = training.make_accelerator

    def make_half(precision):
        AcceleratorState._reset_state()
        accelerator = make("bf16")
        if request.param == "fp16":
            accelerator.state._mixed_precision = "fp16"
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**27)
        return accelerator

    monkeypatch.setattr(training, "make_accelerator", make_half)
    yield request.param
    AcceleratorState._reset_state()


@pytest.mark.parametrize("half", ["bf16", "fp16"], indirect=True)
def test_resumed_is_uninterrupted(tmp_path, half):
    _, whole, _ = loop.fit(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        loop.fit(tmp_path / "cut", loop.make_task(losses=loop.dying([], 14)), save_minutes=0)
    state = training.read_state(tmp_path / "cut" / training.LAST)
    assert state["epoch"] == 1 and (half == "bf16" or state["scaler"]["scale"] < 2**27)
    _, resumed, _ = loop.fit(tmp_path / "cut", save_minutes=0, resume=True)
    assert loop.equal(whole, resumed, atol=0)


def test_the_next_fold_starts_with_a_fresh_scale(tmp_path, half, monkeypatch):
    accelerator = training.make_accelerator("fp16")
    monkeypatch.setattr(training, "make_accelerator", lambda precision: accelerator)
    loop.fit(tmp_path)
    assert accelerator.scaler.get_scale() == 2**27


def try_each_epoch(monkeypatch):
    """Let the loop try the largest piece before each epoch, as it does with CUDA before the first."""
    train_epoch = training.train_epoch
    monkeypatch.setattr(training, "train_epoch", lambda run: (training.try_largest(run), train_epoch(run)))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_trying_the_largest_piece_changes_nothing(tmp_path, monkeypatch, accumulate):
    sizes = []

    def losses(model, papers):
        sizes.append(len(papers) * max(len(paper["input_ids"]) for paper in papers))
        return loop.losses(model, papers)

    _, plain, _ = loop.fit(tmp_path / "plain", accumulate=accumulate)
    try_each_epoch(monkeypatch)
    _, tried, _ = loop.fit(tmp_path / "tried", loop.make_task(losses=losses), accumulate=accumulate)
    assert loop.equal(plain, tried, atol=0) and sizes[0] >= max(sizes)


def test_what_does_not_fit_is_said_before_the_first_step(tmp_path, monkeypatch):
    try_each_epoch(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        loop.fit(tmp_path, loop.make_task(losses=loop.limited(loop.losses, 4)), accumulate=1)
    assert not (tmp_path / "log.csv").exists()


def test_what_overflows_in_fp16_is_said_before_the_first_step(tmp_path, half, monkeypatch):
    try_each_epoch(monkeypatch)
    steps = []

    def losses(model, papers):
        steps.append(1)
        return loop.losses(model, papers) * float("inf")

    with pytest.raises(InputError, match="became inf in epoch 1: numbers overflow in fp16: try --precision fp32"):
        loop.fit(tmp_path, loop.make_task(losses=losses))
    assert len(steps) == 1


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def test_4bit_without_bitsandbytes_is_a_line(kit, tmp_path, tiny_llm):
    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    kit("make_llm_data.py")
    done = kit("lora_finetune.py", "--model", tiny_llm, "--load-in-4bit")
    assert done.returncode == 2 and "pip install -r requirements-4bit.txt" in done.stderr


@needs_bitsandbytes
def test_4bit_gradients_are_those_of_the_weights_it_keeps(tiny_llm, papers):
    """Also after a prediction, for which bitsandbytes packs the weights in another way on some CPUs."""
    accelerator, found = training.make_accelerator("fp32"), []
    args = Namespace(method="lora", target_modules=None, rank=4, alpha=8, dropout=0.0, gradient_checkpointing=False)
    for rounded in (False, True):
        model, tokenizer = llm.load_llm(tiny_llm, accelerator, four_bit=True)
        model = model.dequantize() if rounded else model
        scorer = llm.Scorer(lora_finetune.add_adapter(model, args, 1), tokenizer)
        items = llm.encode_items(tokenizer, build_items(papers[0].head(3), ["title"]), 200)
        with torch.no_grad():
            scorer.eval().probs(items)
        scorer.train()(items).sum().backward()
        found.append([weight.grad for weight in scorer.parameters() if weight.requires_grad])
    assert sum(grad.abs().sum() > 0 for grad in found[0]) == len(found[0]) / 2, "those of every B matrix"
    assert all(torch.allclose(packed, plain, rtol=1e-3, atol=1e-6) for packed, plain in zip(*found))


@needs_bitsandbytes
def test_4bit_is_remembered_and_never_merged(kit, tmp_path, monkeypatch, tiny_llm):
    """Merging would round to 4 bits again. What SmolLM2 learns in 4 bits, .ci/run looks at."""
    monkeypatch.setattr(llm, "merge_adapter", None)
    train = ["lora_finetune.py", "--model", tiny_llm, "--max-length", 200, "--load-in-4bit", "--epochs", 1]
    for command in (["make_llm_data.py", "--fields", "title"], train, ["lora_predict.py"]):
        done = kit(*command)
        assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "outputs/lora/metrics.json").read_text())
    assert metrics["settings"]["load_in_4bit"] is True

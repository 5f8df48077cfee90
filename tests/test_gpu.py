"""GPUs that aren't there: what the kit decides about cards, and 4-bit weights, which a CPU computes, too."""

import pytest
import test_training as loop
import torch
from accelerate.state import AcceleratorState

from common import InputError
from lib import gpu, training

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("smi", "cuda", "words"),
    [
        ("Tesla T4, 535.104.05\n", "13.0", ["Tesla T4", "535", "580", "update the driver", "whl/cu126", "+cu126"]),
        ("Tesla T4, 535.104.05\nTesla T4, 535.104.05\n", None, ["built for CPUs", "whl/cu126"]),
        ("NVIDIA GeForce RTX 4090, 581.15", None, ["RTX 4090", "built for CPUs", "whl/cu130"]),
        ("Quadro, P, 470.1", "13.0", ["Quadro, P", "470", "too old", "580"]),
        ("NVIDIA A10, 580.65.06", "13.0", ["A10", "torch.cuda.init()"]),
        ("Failed to initialize NVML: Driver/library version mismatch\n", "13.0", ["restart"]),
        ("", "13.0", None),
        ("", None, None),
        ("No devices were found\n", "13.0", None),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n\n", "13.0", None),
    ],
)
def test_a_card_that_torch_does_not_find(smi, cuda, words):
    fault = gpu.driver_fault(smi, cuda)
    if words is None:
        assert fault is None
    else:
        assert "\n" not in fault and not [word for word in words if word not in fault]


@pytest.mark.parametrize(
    ("card", "archs", "remedy"),
    [
        ((6, 0), CUDA_13, "cu126"),  # P100
        ((6, 1), CUDA_13, "cu126"),  # GTX 1080
        ((7, 0), CUDA_13, "cu126"),  # V100
        ((12, 0), CUDA_12, "cu130"),  # RTX 5090
        ((6, 1), CUDA_12, None),
        ((7, 5), CUDA_13, None),  # T4
        ((8, 9), CUDA_13, None),  # RTX 4090: by the code for 8.6
        ((12, 1), CUDA_13, None),
        ((13, 0), CUDA_13, None),  # one to come: by compute_120
        ((9, 0), ["sm_90a"], None),
        ((9, 0), ["gfx90a"], None),  # AMD's
        ((8, 0), [], None),
    ],
)
def test_a_card_that_torch_has_no_code_for(card, archs, remedy):
    fault = gpu.code_fault(card, archs)
    assert (fault is None) if remedy is None else (f"capability {card[0]}.{card[1]}" in fault and remedy in fault)


@pytest.mark.parametrize(
    ("wanted", "cards", "precision", "warned"),
    [
        ("auto", [(7, 5)], "fp16", False),
        ("auto", [(8, 0)], "bf16", False),
        ("auto", [(8, 6), (7, 5)], "fp16", False),  # all processes must agree
        ("auto", [], "fp32", False),
        ("bf16", [(7, 5)], "bf16", True),
        ("bf16", [(9, 0)], "bf16", False),
        ("bf16", [], "bf16", False),
        ("fp32", [(7, 5)], "fp32", False),
    ],
)
def test_precision(capsys, wanted, cards, precision, warned):
    assert gpu.choose_precision(wanted, cards) == precision
    assert ("emulates" in capsys.readouterr().err) == warned


def test_fp16_is_for_cards():
    with pytest.raises(InputError, match="needs CUDA"):
        gpu.choose_precision("fp16", [])


@pytest.mark.parametrize(("visible", "loud"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_the_script_says_it_unless_the_card_is_hidden(tmp_path, monkeypatch, capsys, visible, loud):
    """With an nvidia-smi in the PATH that lists a card, on a machine without one."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Tesla T4, 535.104.05'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    assert gpu.find_cards() == []
    assert ("NO GPU IS USED" in capsys.readouterr().err) == loud


# ---- fp16, with scaled gradients on a CPU ----------------------------------------------------------------------------


@pytest.fixture
def fp16(monkeypatch):
    """training.make_accelerator gives what fp16 has with CUDA, autocast and a scaler of gradients, on a CPU."""
    make = training.make_accelerator

    def make_fp16(precision):
        AcceleratorState._reset_state()
        accelerator = make("bf16")
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        return accelerator

    monkeypatch.setattr(training, "make_accelerator", make_fp16)
    yield
    AcceleratorState._reset_state()


def trying(monkeypatch):
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
    trying(monkeypatch)
    _, tried, _ = loop.fit(tmp_path / "tried", loop.make_task(losses=losses), accumulate=accumulate)
    assert all(torch.equal(plain[name], tried[name]) for name in plain)
    assert sizes[0] == max(sizes)


def test_what_does_not_fit_is_said_before_the_first_step(tmp_path, monkeypatch):
    trying(monkeypatch)
    with pytest.raises(InputError, match="out of memory with 8 papers at a time: try --accumulate 2"):
        loop.fit(tmp_path, loop.make_task(losses=loop.limited(loop.losses, 4)), accumulate=1)
    assert not (tmp_path / "log.csv").exists()


def test_fp16_resumed_is_uninterrupted(tmp_path, fp16):
    """Gradients overflow at first: the scaler's state is kept, too."""
    calls = []

    def large(model, papers):
        return loop.losses(model, papers) * 2000

    def dying(model, papers):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return large(model, papers)

    _, whole, _ = loop.fit(tmp_path / "whole", loop.make_task(losses=large))
    with pytest.raises(KeyboardInterrupt):
        loop.fit(tmp_path / "cut", loop.make_task(losses=dying), save_minutes=0)
    state = training.read_state(tmp_path / "cut" / training.LAST)
    assert state["scaler"]["scale"] < 2**16 and state["epoch"] == 1
    _, resumed, _ = loop.fit(tmp_path / "cut", loop.make_task(losses=large), save_minutes=0, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(("factor", "told"), [(1, False), (1e9, True)])
def test_fp16_counts_skipped_steps(tmp_path, fp16, capsys, factor, told):
    loop.fit(tmp_path, loop.make_task(losses=lambda *data: loop.losses(*data) * factor), epochs=1)
    assert ("steps had no effect, since gradients overflow" in capsys.readouterr().err) == told


def test_fp16_is_tried_before_the_first_step(tmp_path, fp16, monkeypatch):
    task = loop.make_task(losses=lambda *data: loop.losses(*data) * float("inf"))
    with pytest.raises(InputError, match="became (inf|NaN) in epoch 1: numbers overflow in fp16: try --precision fp32"):
        loop.fit(tmp_path, task)
    trying(monkeypatch)
    with pytest.raises(InputError, match="loss is inf before the first step: .* --precision fp32"):
        loop.fit(tmp_path, task)


def test_weights_without_use_are_a_line_with_several_gpus():
    with pytest.raises(InputError, match="use one, CUDA_VISIBLE_DEVICES=0"), training.resumable():
        raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")

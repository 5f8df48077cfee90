"""GPUs that aren't there: what the kit decides about cards, and 4-bit weights, which a CPU computes, too."""

import pytest

from common import InputError
from lib import gpu

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
    if gpu.torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    assert gpu.find_cards() == []
    assert ("NO GPU IS USED" in capsys.readouterr().err) == loud

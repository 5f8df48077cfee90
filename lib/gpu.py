"""The GPU: which cards torch can use, and in which precision.

    cards = gpu.find_cards()                       # [(8, 9)]: compute capabilities; [] without a card
    gpu.choose_precision("auto", cards)            # 'bf16'
"""

import os
import platform
import re
import subprocess
import sys
from functools import cache

from lib.cli import InputError, log

import torch


def find_cards():
    """The compute capabilities of the cards that torch can use: [(8, 0), (8, 0)], [] for a CPU. A card that torch can't
    use is named in a loud line.
    """
    if torch.cuda.is_available():
        return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if unused_card():
        log(f"NO GPU IS USED: torch {torch.__version__} can't use what nvidia-smi lists ({unused_card()}): docs/gpu.md "
            "says which driver and which build of torch it needs")  # fmt: skip
    return []


@cache
def unused_card():
    """The first card that nvidia-smi lists and torch can't use, 'Tesla T4', or what is wrong with nvidia-smi. None
    without a card, and where CUDA_VISIBLE_DEVICES hides it.
    """
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # nvidia-smi is missing, or it hangs
        return None
    said = (done.stdout + done.stderr).strip().partition("\n")[0]
    found = re.match(r"GPU \d+: (.+) \(UUID", said)
    if found:
        return found[1]
    return None if said.startswith("No devices") else said or None


def choose_precision(wanted, cards):
    """--precision resolved: bf16 where all cards compute it, else fp16; without a card fp32. Older cards only emulate
    bf16, which is several times slower. Raises InputError for fp16 on a CPU.
    """
    if not cards:
        if wanted == "fp16":
            raise InputError("--precision fp16 needs CUDA: use fp32 or bf16")
        return "fp32" if wanted == "auto" else wanted
    computes = min(cards) >= (8, 0)
    if wanted == "bf16" and not computes:
        log("--precision bf16: this GPU only emulates it, which is several times slower than fp16")
    if wanted == "auto":
        return "bf16" if computes else "fp16"
    return wanted


def set_up():
    """Settings of torch for cards."""
    # cuDNN's attention, which newer cards would take, has known faults with masks in torch 2.13.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")  # TF32, which holds all of a bf16 or fp16 number
    wsl = "microsoft" in platform.release().lower()  # its older drivers fail with it: "CUDA driver error"
    own = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if sys.platform == "linux" and not wsl and not own:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # each batch has another length


def to_device(tensor, device):
    """A tensor on a device; on a card without waiting for what that computes."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

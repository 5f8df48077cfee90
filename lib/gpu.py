"""The GPU: can torch use it, in which precision, and what fits into its memory. What is decided, pure functions decide.

    cards = gpu.find_cards()                       # [(8, 9)]: compute capabilities; [] without a card
    gpu.choose_precision("auto", cards)            # 'bf16'
"""

import os
import re
import shutil
import subprocess
import sys

import torch

from lib.cli import InputError, log

DRIVERS = {"13": 580, "12": 525}  # CUDA's major version: the oldest NVIDIA driver it works with


def find_cards():
    """The compute capabilities of the cards to use, [] for a CPU: [(8, 0), (8, 0)]. A card that torch can't use is said
    in a line, or refused where torch would fail later.
    """
    cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count() * torch.cuda.is_available())]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if not cards and not hidden:
        fault = driver_fault(run_nvidia_smi(), torch.version.cuda)
        if fault:
            log(f"NO GPU IS USED: {fault}")
    for card in cards:
        fault = code_fault(card, torch.cuda.get_arch_list())
        if fault:
            raise InputError(fault)
    return cards


def run_nvidia_smi():
    """What nvidia-smi prints: a line "name, driver version" for each card. '' if there is none to ask."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def install(build):
    """The command that installs this version of torch in another build: 'cu126', 'cu130'."""
    version = torch.__version__.partition("+")[0]
    index = f"https://download.pytorch.org/whl/{build}"
    return f"{sys.executable} -m pip install torch=={version}+{build} --index-url {index}"


def driver_fault(smi, cuda):
    """Why torch finds no card where nvidia-smi lists one, and the remedy: one line. None if it lists none.

    smi: what run_nvidia_smi returns. cuda: the version of CUDA that torch was built with ('13.0'), None for a CPU.
    """
    if "version mismatch" in smi:
        return "the NVIDIA driver was updated since this machine was started: restart it"
    found = re.match(r"(.+), (\d+)[\d.]*$", smi.strip().splitlines()[0]) if smi.strip() else None
    if not found:
        return None
    name, driver = found[1], int(found[2])
    build = "cu130" if driver >= DRIVERS["13"] else "cu126"
    if driver < DRIVERS["12"]:
        return f"the NVIDIA driver {driver} of the {name} is too old for torch: update it to {DRIVERS['13']} or newer"
    if cuda is None:
        return f"there is a {name}, but this torch was built for CPUs: {install(build)}"
    needed = DRIVERS.get(cuda.partition(".")[0], 0)
    if driver < needed:
        return (f"this torch (CUDA {cuda}) needs NVIDIA driver {needed} or newer, and that of the {name} is {driver}: "
                f"update the driver, or take torch for older ones: {install(build)}")  # fmt: skip
    return f"there is a {name}, but torch can't use it: {sys.executable} -c 'import torch; torch.cuda.init()' says why"


def code_fault(card, archs):
    """Why torch can't compute on a card, and the remedy: one line. None if it can.

    card: its compute capability, (7, 0). archs: what torch was built for: ['sm_75', 'sm_80', 'compute_120']. Code for
    8.0 runs on every 8.x, and what is called compute on everything newer. Other names are those of AMD's cards.
    """
    codes = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch) for arch in archs]
    codes = [(code[1], (int(code[2]), int(code[3]))) for code in codes if code]
    for kind, code in codes:
        if code <= card and (kind == "compute" or code[0] == card[0]):
            return None
    if not codes:
        return None
    build = "cu126" if card < (7, 5) else "cu130"
    return (f"this torch has no code for a GPU of compute capability {card[0]}.{card[1]}: {install(build)}; or train "
            "on the CPU: CUDA_VISIBLE_DEVICES= before the command")  # fmt: skip


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
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # each batch has another length


def to_device(tensor, device):
    """A tensor on a device; on a card without waiting for what that computes."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

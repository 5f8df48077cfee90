"""The one training loop of both fine-tunes: batches of papers of like length, warm-up and decay, the best and the last
checkpoint, early stop, resume, prediction in batches, and advice when memory runs out.

A script gives the loop a task, any object with three functions:

    task.losses(model, papers)    float tensor [papers], to train on
    task.probs(model, papers)     float tensor [papers], P(label = 1)
    task.save(model, folder)      write the best checkpoint into an empty folder

A paper is a dict with "input_ids" (list of int) and, to train on, "label" (0 or 1).

A step's batch is split over accumulation pieces and processes, and its loss is the mean over the whole batch, so
neither number changes what is learned. The random numbers of a step (dropout) depend on seed, step and process alone,
so a resumed run draws the same ones: its weights are those of an uninterrupted run, on a GPU up to rounding.
"""

import json
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common import fold_numbers, split_papers
from lib import gpu, hub, results
from lib.cli import InputError, Process, bounded, log, positive_int

warnings.filterwarnings("ignore", category=FutureWarning)
transformers.logging.set_verbosity_error()  # the kit says in a line what matters of it
transformers.logging.disable_progress_bar()

LAST = "last.safetensors"
SHAPING = ("epochs", "batch_size", "lr", "warmup", "weight_decay", "patience", "class_weight")  # shape a model
ON_CPU = 4  # papers that a CPU scores at a time: what its caches hold
ON_GPU = 64  # the same of a GPU, halved until they fit
ENOUGH = 100  # held-out papers, without which nothing is called learned


def add_training_flags(parser, epochs, batch_size, patience, at_once):
    """Add the loop's flags. `at_once`: papers that a CPU trains on at a time, which is what its caches hold."""
    parser.set_defaults(at_once=at_once)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int, default=epochs, metavar="N", help="default %(default)s")
    add("--batch-size", type=positive_int, default=batch_size, metavar="N", help="papers a step, default %(default)s")
    add("--accumulate", type=positive_int, metavar="N", help="pieces a batch is split into, to save memory: same "
        f"result; default: pieces of {at_once}, which a CPU computes fastest, of {4 * at_once} with CUDA")  # fmt: skip
    add("--lr", type=bounded(float, 1e-9, 10), metavar="X", help="highest learning rate, default by model")
    add("--warmup", type=bounded(float, 0, 1), default=0.1, metavar="R", help="share of the steps, default %(default)s")
    add("--weight-decay", type=bounded(float, 0, 10), default=0.01, metavar="X", help="default %(default)s")
    add("--patience", type=positive_int, default=patience, metavar="N", help="stop after N epochs without a better one")
    add("--class-weight", choices=("balanced",), help="let both classes count the same, whatever their numbers")
    add("--folds", type=bounded(int, 2, 1000), metavar="K", help="train K models, each with another K-th of the papers "
        "held out: out-of-fold scores, averaged predictions")  # fmt: skip
    add("--seeds", type=bounded(int, 2, 1000), metavar="N", help="train N models with other seeds: mean and standard "
        "deviation of their scores, averaged predictions")  # fmt: skip
    add("--save-minutes", type=bounded(float, 0, 1e6), default=10, metavar="M", help="between checkpoints, default 10")
    add("--resume", action="store_true", help="go on where a killed run stopped")
    add_precision_flag(add)


def add_precision_flag(add):
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 or fp16 with CUDA")


def make_accelerator(precision="auto"):
    """An Accelerator in the precision that suits the cards: fp16 is with scaled gradients; fp32 without CUDA."""
    cards = gpu.find_cards()
    if cards:
        gpu.set_up()
    precision = gpu.choose_precision(precision, cards)
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if several and "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by accelerate launch or torchrun
        log(f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment is ignored: for several processes use "
            "accelerate launch")  # fmt: skip
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        several = False
    precision = "no" if precision == "fp32" else precision
    wait = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # for a process that has more to do
    # Without cpu=True accelerate takes each of several processes on a CPU for the only one.
    accelerator = Accelerator(mixed_precision=precision, cpu=several and not cards, kwargs_handlers=[wait])
    Process.first = accelerator.is_main_process
    return accelerator


def describe(accelerator):
    """Device and precision in words: 'cpu, fp32'."""
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else str(accelerator.device)
    several = f" × {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"{device}{several}, {accelerator.mixed_precision.replace('no', 'fp32')}"


def environment(accelerator):
    """results.environment for this device: on a GPU, the most of its memory that torch has held, in MiB."""
    cuda = accelerator.device.type == "cuda"
    peak = round(torch.cuda.max_memory_reserved() / 2**20, 1) if cuda else None
    return results.environment(describe(accelerator), peak)


def in_float32(layer, inputs, output):
    """Forward hook of a linear layer: its output in float32, where bf16 or fp16 would round it (bf16 to steps of 0.125
    between 16 and 32). Computed for a slice of the rows at a time: a float32 copy of a vocabulary takes gigabytes.
    """
    if output.dtype == torch.float32:
        return output
    with torch.autocast(output.device.type, enabled=False):
        values = [torch.nn.functional.linear(inputs[0].float(), rows.float()) for rows in layer.weight.split(16384)]
        values = torch.cat(values, dim=-1)
        return values if layer.bias is None else values + layer.bias.float()


def draw_batches(lengths, size, seed):
    """Split papers at random into batches of `size`, in each the shortest first: pieces of it need little padding. A
    list of int arrays, drawn from the seed alone.
    """
    order, lengths = np.random.default_rng(seed).permutation(len(lengths)), np.asarray(lengths)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [batch[np.argsort(lengths[batch], kind="stable")] for batch in batches]


def length_batches(lengths, size):
    """Split papers into batches of like length, the longest first, for what needs most memory must come first. A list
    of int arrays.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def rate(step, steps, warmup, shape):
    """The learning rate of a step (from 0) as a share of the highest: linear warm-up over `warmup` of the steps, then
    to 0 along a line ("linear") or half a cosine ("cosine").
    """
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))


# ---- advice ----------------------------------------------------------------------------------------------------------


@contextmanager
def memory_advice(advice):
    """Turn running out of memory into one line: "out of memory", then `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not hub.is_out_of_memory(error):
            raise
        raise InputError(f"out of memory {advice}") from None


def count_pieces(args, device):
    """How many pieces a batch is split into: --accumulate, by default as many as the device computes fastest."""
    at_once = 4 * args.at_once if device.type == "cuda" else args.at_once
    return args.accumulate or -(-args.batch_size // at_once)


def model_advice():
    """memory_advice for all that is neither a step nor a prediction: the model itself is too large."""
    return memory_advice("for the model itself: end what else holds memory (nvidia-smi), or give a smaller --model")


def step_advice(args, processes=1):
    """memory_advice for a training step: the flag and the next value to try."""
    at_once = args.batch_size // (args.accumulate * processes)
    if getattr(args, "gradient_checkpointing", None) is False:
        advice = "--gradient-checkpointing (same result, a third slower)"
    elif at_once > 1:
        advice = f"--accumulate {args.accumulate * 2} (same result) or --batch-size {args.batch_size // 2}"
    else:
        advice = f"--max-length {args.max_length // 2}, or a smaller --model"
    return memory_advice(f"with {max(1, at_once)} papers at a time: try {advice}")


@contextmanager
def resumable(how="the same command with --resume goes on"):
    """Say how to go on after Ctrl-C and after the death of another process; and what several processes can't train."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how) from None
    except RuntimeError as error:
        if "by peer" in str(error):  # connection closed or reset by peer
            raise InputError(f"another process of this run died; {how}") from None
        if "Expected to have finished reduction" in str(error):
            raise InputError("--model has weights that its output doesn't depend on, so several GPUs can't train it: "
                             "use one, CUDA_VISIBLE_DEVICES=0, or another --model") from None  # fmt: skip
        raise


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_state(path, model, optimizer, state):
    """Write trained weights and optimizer moments, with `state` (JSON) in the header: one file, so one rename."""
    tensors = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            tensors[f"weight/{name}"] = weight.detach().contiguous().cpu()
            for key, value in optimizer.state.get(weight, {}).items():
                tensors[f"{key}/{name}"] = value.detach().contiguous().cpu()
    with results.atomic_write(path) as part:
        save_file(tensors, part, metadata={"state": json.dumps(state)})


def read_state(path):
    """The state that save_state wrote, None if there is no file. Raises InputError if it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["state"])
    except Exception as error:  # safetensors' own errors have no common base
        raise InputError(f"{path} is damaged ({error}): run without --resume") from None


def load_state(path, model, optimizer):
    """Put what save_state wrote back into model and optimizer."""
    with safe_open(path, "pt") as file:
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                with torch.no_grad():
                    weight.copy_(file.get_tensor(f"weight/{name}"))
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}/{name}" in file.keys():
                        optimizer.state[weight][key] = file.get_tensor(f"{key}/{name}").to(weight.device)


def begin(folder, runs, resume):
    """Clear what an earlier run left in `folder`, unless this one goes on with it. `runs`: the folders of its single
    trainings, which may be `folder` itself. The states go first: if it is killed here, nothing left passes for a run.
    """
    if resume and (runs[0] / LAST).is_file():
        return
    several = [*folder.glob("fold[0-9]*"), *folder.glob("seed[0-9]*")]
    for place in (folder, *several):
        (place / LAST).unlink(missing_ok=True)
    for name in ("test.csv", "metrics.json", "training.json", "valid.csv", "submit_task1.csv", "log.csv"):
        (folder / name).unlink(missing_ok=True)
    for place in (folder / "best", *several):
        shutil.rmtree(place, ignore_errors=True)


@dataclass
class Plan:
    """One model to train."""

    name: str  # of its folder below the script's: "." for a single model, else fold1, seed42, ...
    seed: int  # of its weights and batches
    held_out: np.ndarray  # bool [papers]


def make_plans(train, split, seed):
    """The models to train: one on the common split, or with folds one per fold, or with seeds one per seed. `split`: a
    dict of seed and valid_ratio (of the split), folds and seeds (how many, or None). `seed`: of the first model.
    """
    if split["folds"]:
        numbers = fold_numbers(train, split["folds"], split["seed"])
        return [Plan(f"fold{k + 1}", seed, numbers == k) for k in range(split["folds"])]
    held_out = split_papers(train, split["valid_ratio"], split["seed"])
    if split["seeds"]:
        return [Plan(f"seed{seed + k}", seed + k, held_out) for k in range(split["seeds"])]
    return [Plan(".", seed, held_out)]


def average(plans, valid_probs):
    """The held-out predictions of all models: (bool [papers], held out by any; float array [held out], the mean P)."""
    total, times = (np.zeros(len(plans[0].held_out)) for _ in range(2))
    for plan, probs in zip(plans, valid_probs):
        total[plan.held_out] += probs
        times[plan.held_out] += 1
    return times > 0, total[times > 0] / times[times > 0]


def spread_rows(name, seeds):
    """Rows of a score table: mean and standard deviation over models that differ in their seed."""
    frame = pd.DataFrame(seeds)
    note = f"over {len(seeds)} seeds"
    return [(f"{name}, mean", frame.mean().to_dict(), note), (f"{name}, deviation", frame.std().to_dict(), note)]


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training under way."""

    accelerator: Accelerator
    model: torch.nn.Module  # as the script made it: it predicts and is saved
    task: object  # losses, probs, save
    train: list  # papers to learn from
    held_out: list  # papers to choose the best epoch by
    folder: object  # Path; best/, last.safetensors and log.csv go there
    args: object  # the training flags
    shape: str  # of the learning rate, see rate()
    optimizer: torch.optim.Optimizer
    weights: np.ndarray  # float [papers to learn from], what each one's loss counts
    state: dict  # JSON, what a checkpoint says, see start_state
    parallel: torch.nn.Module = None  # model and optimizer as accelerate wraps them
    stepper: object = None
    saved: float = field(default_factory=time.perf_counter)  # when the last checkpoint was written
    timed: bool = False  # whether the log says how long it will take
    skipped: object = 0  # int or tensor, steps since the last meeting whose gradients overflowed in fp16

    def batches(self, epoch):
        lengths = [len(paper["input_ids"]) for paper in self.train]
        return draw_batches(lengths, self.args.batch_size, (self.args.seed, epoch))

    def cooling(self):
        """What the learning rate is multiplied with: 1, and from the step on at which all is learned down to 0."""
        cool, stop = self.state["cool"], self.state["stop"]
        return 1 if stop is None else (stop - self.state["batch"]) / (stop - cool)

    def save_last(self):
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        save_state(self.folder / LAST, self.model, self.optimizer, self.state | {"scaler": scaler})


def fit(accelerator, model, task, train, held_out, folder, args, settings, shape="linear"):
    """Train, keep the best epoch by F1 on the held-out papers (then by log-loss), and stop early: after `patience`
    epochs without a better one, or within an epoch as soon as the task is learned, see check_learned.

    train, held_out: lists of papers. folder: where best/, last.safetensors and log.csv go. settings: dict (JSON) of all
    that shapes the result, which a resumed run must share. shape: of the learning rate, see rate().
    Returns a dict with history (a dict an epoch), seconds and papers (both of the training steps alone).
    """
    args.accumulate = count_pieces(args, accelerator.device)
    model.to(accelerator.device)
    optimizer = make_optimizer(model, args)
    state = start_state(model, optimizer, folder, args, json.loads(json.dumps(settings)))
    weights = loss_weights([paper["label"] for paper in train], args.class_weight)
    run = Run(accelerator, model, task, train, held_out, folder, args, shape, optimizer, weights, state)
    run.parallel, run.stepper = accelerator.prepare(model, optimizer)
    if state["scaler"] and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    steps = args.epochs * len(run.batches(1))
    log(f"{len(train)} texts to train on, {len(held_out)} held out; {args.epochs} epochs, {steps} steps of "
        f"{args.batch_size}; {trained:,} weights; {describe(accelerator)}")  # fmt: skip
    if len(held_out) < ENOUGH:
        log(f"{len(held_out)} held-out papers are too few to tell epochs apart: one of them is {1 / len(held_out):.1%} "
            "of the accuracy; --folds 5 holds out every paper once")  # fmt: skip
    if state["epoch"] or state["batch"]:
        log(f"resumed after {state['epoch']} epochs and {state['batch']} steps")
    if accelerator.device.type == "cuda" and not state["finished"]:
        try_largest(run)
    while not state["finished"]:
        train_epoch(run)
        score_epoch(run)
    accelerator.wait_for_everyone()
    return {key: state[key] for key in ("history", "seconds", "papers")}


def make_optimizer(model, args):
    """AdamW; biases and norms without weight decay."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=args.lr, fused=True)


def loss_weights(labels, class_weight):
    """What each paper's loss counts: 1, or with "balanced" so that both classes count the same: [0, 0, 1] -> [.75, .75,
    1.5].
    """
    if class_weight is None:
        return np.ones(len(labels))
    counts = np.bincount(labels, minlength=2)
    return (len(labels) / 2 / np.maximum(counts, 1))[labels]


def start_state(model, optimizer, folder, args, settings):
    """The state to start from: with --resume the checkpoint's, put into model and optimizer, if there is one. Raises
    InputError if that is of another run.
    """
    state = read_state(folder / LAST) if args.resume else None
    if state is None:
        counts = {"epoch": 0, "batch": 0, "loss": 0.0, "skipped": 0, "seconds": 0.0, "papers": 0}
        learned = {"checked": [0, 0.0], "passed": 0, "cool": None, "stop": None}  # see check_learned
        return {"settings": settings, **counts, **learned, "history": [], "scaler": None, "finished": False}
    if state["settings"] != settings:
        changed = results.describe_changes(state["settings"], settings)
        raise InputError(f"--resume: {folder} holds a run with other settings or papers: {changed}; give the old ones, "
                         "or leave --resume out")  # fmt: skip
    load_state(folder / LAST, model, optimizer)
    return state


def largest_piece(run):
    """The piece of a batch that needs most memory in any epoch: int array of papers."""
    lengths, pieces = np.array([len(paper["input_ids"]) for paper in run.train]), []
    for epoch in range(1, run.args.epochs + 1):
        for batch in run.batches(epoch):
            pieces += np.array_split(batch, run.args.accumulate * run.accelerator.num_processes)
    return max(pieces, key=lambda piece: len(piece) * lengths[piece].max(initial=0))


def try_largest(run):
    """Compute the largest piece, forward and backward, and drop its gradients: what doesn't fit into the memory, or
    overflows in fp16, is said before the first step and not after an hour. Changes nothing that a checkpoint holds.
    """
    accelerator, piece = run.accelerator, largest_piece(run)
    run.model.train()
    torch.manual_seed(run.args.seed)
    with step_advice(run.args, accelerator.num_processes):
        loss = run.task.losses(run.parallel, [run.train[i] for i in piece]).sum()
        accelerator.backward(loss)
    run.stepper.zero_grad()
    if not math.isfinite(loss.item()):
        raise InputError(f"the loss is {loss.item()} before the first step: {overflow_advice(run)}")


def overflow_advice(run):
    """What to try when the loss isn't a number. With fp16 the forward pass overflows: no learning rate cures that."""
    if run.accelerator.scaler:
        return "numbers overflow in fp16: try --precision fp32, or bf16 on a newer GPU, or another --model"
    return f"try --lr {run.args.lr / 3:.1e}"


def train_epoch(run):
    """Train on what is left of the epoch under way."""
    accelerator, args, state = run.accelerator, run.args, run.state
    epoch = state["epoch"] + 1
    batches = run.batches(epoch)
    seen = sum(len(batch) for batch in batches[: state["batch"]])
    bar = progress(accelerator, len(run.train), f"epoch {epoch}", seen)
    total, started = torch.zeros((), device=accelerator.device), time.perf_counter()
    run.model.train()
    while state["batch"] < (state["stop"] or len(batches)):
        place = state["batch"]
        with step_advice(args, accelerator.num_processes):
            total += train_step(run, batches[place], (epoch - 1) * len(batches) + place, args.epochs * len(batches))
        bar.update(len(batches[place]))
        seen += len(batches[place])
        state["batch"], state["papers"] = place + 1, state["papers"] + len(batches[place])
        last = place + 1 == (state["stop"] or len(batches))
        if place % 10 == 9 or last:
            state["seconds"] += time.perf_counter() - started
            overdue = meet(run, total)
            bar.set_postfix(loss=f"{state['loss'] / seen:.4f}", refresh=False)
            if not last:
                say_duration(run)
                check_learned(run, len(batches))
            if overdue and not last:
                save_now(run)
            started = time.perf_counter()
    bar.close()


def say_duration(run):
    """After the first steps of a run, say how long all of it will take."""
    state, papers = run.state, run.args.epochs * len(run.train)
    if not run.timed:
        run.timed = True
        minutes = (papers - state["papers"]) * state["seconds"] / state["papers"] / 60
        if minutes >= 1:
            log(f"about {minutes:.0f} minutes for what is left of {run.args.epochs} epochs, less if it learns before")


def check_learned(run, steps):
    """Now and then, if the training loss is low, score held-out papers within an epoch: a hundred of them and, when all
    of these are right, the next time all. If all are right twice running, the learning rate falls to 0 over a tenth as
    many steps again, which ends the epoch, and training if all are right then, too. With fewer than a hundred held-out
    papers, or where a model never gets all right, nothing changes: the epochs decide. The end of an epoch counts as the
    second time, too. `steps`: of an epoch.
    """
    state, every = run.state, max(10, steps // 80 * 10)
    if len(run.held_out) < ENOUGH or state["stop"] or state["batch"] % every:
        return
    (before, loss_before), now = state["checked"], (state["papers"], state["loss"])
    state["checked"] = list(now)
    if before == 0 or (now[1] - loss_before) > 0.1 * (now[0] - before):
        return
    papers = run.held_out if state["passed"] else run.held_out[:ENOUGH]
    guess = predict(run.accelerator, run.model, papers, run.task)
    run.model.train()
    wrong = int(((guess >= 0.5) != [paper["label"] for paper in papers]).sum())
    state["passed"] = 0 if wrong else state["passed"] + 1
    done = state["batch"] / steps
    log(f"epoch {state['epoch'] + 1}, {done:.0%}: {wrong} of {len(papers)} held-out papers are wrong")
    if state["passed"] == 2:
        state["cool"] = state["batch"]
        state["stop"] = min(steps, state["cool"] + max(10, (state["epoch"] * steps + state["batch"]) // 10))
        log("learned: the learning rate falls to 0 now, and training ends")


def train_step(run, batch, step, steps):
    """One optimizer step on the papers `batch` (int array). Returns this process's part of their summed loss."""
    accelerator, args, processes = run.accelerator, run.args, run.accelerator.num_processes
    rank, pieces = accelerator.process_index, args.accumulate * processes
    torch.manual_seed(args.seed + 1_000_003 * step + 7919 * rank)
    for group in run.optimizer.param_groups:
        group["lr"] = args.lr * rate(step, steps, args.warmup, run.shape) * run.cooling()
    total, parts = 0, np.array_split(batch, pieces)
    for i in range(rank, pieces, processes):
        # Every process must take part in each backward pass: without a paper of its own, with one that counts nothing.
        piece, counts = (parts[i], 1) if len(parts[i]) else (batch[:1], 0)
        weights = gpu.to_device(torch.tensor(counts * run.weights[piece], dtype=torch.float32), accelerator.device)
        with nullcontext() if i + processes >= pieces else accelerator.no_sync(run.parallel):
            loss = (run.task.losses(run.parallel, [run.train[j] for j in piece]) * weights).sum()
            accelerator.backward(loss * processes / len(batch))  # gradients are averaged over processes
        total += loss.detach()
    norm = accelerator.clip_grad_norm_([w for group in run.optimizer.param_groups for w in group["params"]], 1.0)
    run.skipped = run.skipped + ~torch.isfinite(norm)  # with fp16 the scaler skips such a step
    run.stepper.step()
    run.stepper.zero_grad()
    return total


def meet(run, total):
    """Every tenth step the processes meet: the loss is summed (and `total` set to 0), and the first one's clock says
    whether a checkpoint is due, which is returned.
    """
    overdue = run.accelerator.is_main_process and time.perf_counter() - run.saved >= 60 * run.args.save_minutes
    told = torch.stack([total, total.new_tensor(float(overdue)), torch.as_tensor(run.skipped).to(total)])
    loss, overdue, skipped = run.accelerator.reduce(told).tolist()
    total.zero_()
    run.skipped = 0
    run.state["loss"] += loss
    run.state["skipped"] += round(skipped / run.accelerator.num_processes)
    if not math.isfinite(loss):
        raise InputError(f"the loss became NaN in epoch {run.state['epoch'] + 1}: {overflow_advice(run)}")
    return overdue > 0


def save_now(run):
    if run.accelerator.is_main_process:
        run.save_last()
    run.saved = time.perf_counter()


def rank_of(epoch):
    """What makes an epoch the best: F1, then log-loss."""
    return epoch["f1"], -epoch["log_loss"]


def tell_skipped(run):
    """Say it if many steps of an epoch had no effect: with fp16 one whose gradients overflow is skipped."""
    skipped, steps = run.state["skipped"], run.state["batch"]
    if run.accelerator.scaler and skipped > 0.1 * steps:
        log(f"{skipped} of {steps} steps had no effect, since gradients overflow in fp16: --precision fp32, or bf16 on "
            "a newer GPU, learns from all")  # fmt: skip


def score_epoch(run):
    """Score the held-out papers after an epoch, write the checkpoints, and decide whether training is over."""
    state, args = run.state, run.args
    epoch, train_loss = state["epoch"] + 1, state["loss"] / min(len(run.train), state["batch"] * args.batch_size)
    guess = predict(run.accelerator, run.model, run.held_out, run.task)
    values = results.scores([paper["label"] for paper in run.held_out], guess)
    history = state["history"]
    better = rank_of(values) > max(map(rank_of, history), default=(-1, 0))
    history.append({"epoch": epoch, "train_loss": round(train_loss, 6), **values})
    best = max(range(len(history)), key=lambda i: rank_of(history[i]))
    tell_skipped(run)
    learned, cooled = values["accuracy"] == 1 and state["passed"] > 0, state["stop"] is not None  # see check_learned
    state |= {"epoch": epoch, "batch": 0, "loss": 0.0, "skipped": 0, "checked": [0, 0.0], "passed": 0}
    state |= {"cool": None, "stop": None}
    state["finished"] = epoch == args.epochs or len(history) - 1 - best >= args.patience or learned
    left = (args.epochs - epoch) * len(run.train) * state["seconds"] / state["papers"] / 60
    log(f"epoch {epoch}: train loss {train_loss:.4f}; {len(run.held_out)} held out: accuracy {values['accuracy']:.4f}, "
        f"f1 {values['f1']:.4f}, log-loss {values['log_loss']:.4f}{' (best so far)' if better else ''}"
        + (f"; about {left:.0f} min left" if left >= 1 and not state["finished"] else ""))  # fmt: skip
    if cooled and not state["finished"]:
        log("some held-out papers are wrong again, so training goes on")
    if run.accelerator.is_main_process:
        if better:
            with results.atomic_write(run.folder / "best") as part:
                run.task.save(run.model, part)
        results.write_csv(run.folder / "log.csv", {key: [row[key] for row in history] for key in history[0]})
        run.save_last()


# ---- predicting ------------------------------------------------------------------------------------------------------


def progress(accelerator, total, words, done=0):
    """A progress bar in papers, on the main process; in a log file a line every half minute."""
    quiet = not accelerator.is_main_process
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, desc=words, unit="paper", mininterval=every, leave=False, disable=quiet)


def predict(accelerator, model, papers, task, batch_size=None):
    """P(label = 1) of every paper, in their order: float array [papers]. Each paper is scored once, by one process.
    If memory runs out the batch is halved. Raises InputError if not even one paper fits, or a probability is NaN.
    """
    batch_size = batch_size or (ON_GPU if accelerator.device.type == "cuda" else ON_CPU)
    model.eval()
    found = torch.zeros(2, len(papers), device=accelerator.device)  # probabilities, and how often each was scored
    batches = length_batches([len(paper["input_ids"]) for paper in papers], batch_size)
    todo = batches[accelerator.process_index :: accelerator.num_processes]
    bar = progress(accelerator, sum(map(len, todo)), "predict")
    while todo:
        batch = todo[0]
        probs = score_batch(model, [papers[i] for i in batch], task)
        if probs is None:  # what the error held is free now
            torch.cuda.empty_cache()
            half = (len(batch) + 1) // 2
            log(f"out of memory with {len(batch)} papers at a time, going on with {half}")
            todo = [rest[i : i + half] for rest in todo for i in range(0, len(rest), half)]
            continue
        found[0, batch] = probs
        found[1, batch] += 1
        bar.update(len(batch))
        todo.pop(0)
    bar.close()
    probs, times = accelerator.reduce(found).cpu().numpy()
    if not (times == 1).all():
        raise RuntimeError(f"{(times != 1).sum()} papers were not scored exactly once")
    if not np.isfinite(probs).all():
        raise InputError(f"P(label) is NaN for {(~np.isfinite(probs)).sum()} of {len(papers)} papers: the numbers "
                         "overflow in this precision, give --precision fp32 or bf16, or another --model")  # fmt: skip
    return np.clip(probs.astype(float), 0, 1)


def score_batch(model, papers, task):
    """task.probs in float32, None if memory ran out. Raises InputError if it ran out with a single paper."""
    try:
        with torch.no_grad():
            return task.probs(model, papers).float()
    except RuntimeError as error:
        if not hub.is_out_of_memory(error):
            raise
        if len(papers) == 1:
            tokens = len(papers[0]["input_ids"])
            advice = f"try --max-length {tokens // 2}, or a smaller --model"
            raise InputError(f"out of memory with 1 paper of {tokens} tokens: {advice}") from None
        return None

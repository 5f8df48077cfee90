"""The one training loop of both fine-tunes: batches, warm-up and decay, the best and the last checkpoint, early stop,
resume, prediction in batches.

A script gives the loop a task, any object with three functions:

    task.losses(model, papers)    float tensor [papers], to train on
    task.probs(model, papers)     float tensor [papers], P(label = 1)
    task.save(model, folder)      write the best checkpoint into an empty folder

A paper is a dict with "input_ids" (list of int) and, to train on, "label" (0 or 1).

A step's batch is split over pieces and processes; neither number changes what is learned. On a CPU, pieces are computed
side by side. The random numbers of a step (dropout) depend on seed, step and process alone, so a resumed run ends with
the weights of an uninterrupted one, on a GPU up to rounding.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import common
from lib import files, gpu, hub, results
from lib.cli import InputError, bounded, log, positive_int

import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

warnings.filterwarnings("ignore", category=FutureWarning)
transformers.logging.set_verbosity_error()  # the kit says in a line what matters of it
transformers.logging.disable_progress_bar()

LAST = "last.safetensors"
SHAPING = ("epochs", "batch_size", "lr", "warmup", "weight_decay", "patience", "class_weight")  # shape a model
CPU_BATCH = 4  # papers scored at a time on a CPU: what its caches hold
GPU_BATCH = 64  # the same on a GPU, halved until they fit
POOL = 8  # batches that are drawn together on a GPU, see draw_batches
MIN_HELD_OUT = 100  # with fewer held-out papers training has no early end


def add_training_flags(parser, epochs, batch_size, patience, cpu_piece):
    """Add the loop's flags. `cpu_piece`: papers that a CPU trains on at a time, which is what its caches hold."""
    parser.set_defaults(cpu_piece=cpu_piece)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int, default=epochs, metavar="N", help="default %(default)s")
    add("--batch-size", type=positive_int, default=batch_size, metavar="N", help="papers a step, default %(default)s")
    add("--accumulate", type=positive_int, metavar="N", help="pieces a batch is split into, to save memory: same "
        f"result; default: pieces of {cpu_piece} papers, fastest on a CPU, of {4 * cpu_piece} with CUDA")  # fmt: skip
    add("--lr", type=bounded(float, 1e-9, 10), metavar="X", help="highest learning rate, default by model")
    add("--warmup", type=bounded(int, 0, 10**6), default=20, metavar="N", help="steps, default %(default)s; "
        "at most a tenth of all")  # fmt: skip
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
    """An Accelerator in the precision that suits the cards. Without CUDA it computes on the CPU, also on a Mac."""
    cards = gpu.find_cards()
    if cards:
        gpu.set_up()
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by accelerate launch or torchrun
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # left by a cluster: accelerate would wait for other processes
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):  # accelerate asks for them on some cards
            os.environ.setdefault(name, "1")
    precision = gpu.choose_precision(precision, cards).replace("fp32", "no")
    wait = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # for a process that has more to do
    return Accelerator(mixed_precision=precision, cpu=not cards, kwargs_handlers=[wait])


def describe(accelerator):
    """Device and precision in words: 'cpu, fp32'."""
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else str(accelerator.device)
    several = f" × {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"{device}{several}, {accelerator.mixed_precision.replace('no', 'fp32')}"


def environment(accelerator):
    """results.environment for this device: on a GPU, the most of its memory that torch has held, in MiB."""
    cuda = accelerator.device.type == "cuda"
    peak = round(torch.cuda.max_memory_reserved() / 2**20, 1) if cuda else None
    unused = {"unused_gpu": gpu.unused_card()} if gpu.unused_card() else {}
    return results.environment(describe(accelerator), peak) | unused


@contextmanager
def explain(go_on):
    """Turn into one line what the user can fix: Ctrl-C, memory that runs out. `go_on`: how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(go_on) from None
    except (RuntimeError, MemoryError) as error:
        if hub.is_out_of_memory(error):
            raise InputError("out of memory: try a higher --accumulate (in training; same result), of an LLM "
                             "--gradient-checkpointing, a smaller --max-length or --model") from None  # fmt: skip
        raise


# ---- batches and rate ------------------------------------------------------------------------------------------------


def text_length(paper):
    return len(paper["input_ids"])


def draw_batches(lengths, size, seed, pool=1):
    """Split papers at random into batches of `size`, in each the shortest first: pieces of it need little padding. With
    `pool` above 1 so many batches are drawn at once and share their papers by length. A list of int arrays, drawn from
    the seed alone.
    """
    random, lengths, batches = np.random.default_rng(seed), np.asarray(lengths), []
    order = random.permutation(len(lengths))
    for start in range(0, len(order), pool * size):
        drawn = order[start : start + pool * size]
        drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        batches += [drawn[i : i + size] for i in range(0, len(drawn), size)]
    if pool > 1:
        random.shuffle(batches)
    return batches


def length_batches(lengths, size):
    """Split papers into batches of like length, those that need most memory first. A list of int arrays."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def count_pieces(args, device):
    """How many pieces a batch is split into: --accumulate, by default as many as the device computes fastest."""
    size = 4 * args.cpu_piece if device.type == "cuda" else args.cpu_piece
    return args.accumulate or -(-args.batch_size // size)


def count_threads(args, model, device):
    """How many pieces of a batch are computed side by side, see side_by_side: so many that they are a default batch.
    One at a time on a GPU, and with dropout, whose random numbers come in the order of the pieces.
    """
    drops = any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in model.modules())
    return 1 if drops or device.type != "cpu" else min(torch.get_num_threads(), -(-args.batch_size // args.cpu_piece))


def side_by_side(function, pieces, threads):
    """function(piece) of each piece, in their order, as map() gives it. `threads` pieces are computed at the same time,
    each by its share of the cores: cores that meet once a step, not in each small operation, are faster, most of all on
    a computer that does something else, too.
    """
    if threads == 1:
        yield from map(function, pieces)
        return
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,)) as pool:
            yield from pool.map(function, pieces)
    finally:
        torch.set_num_threads(cores)  # of MKL, which all threads share


def rate(step, steps, warmup, shape):
    """The learning rate of a step (from 0) as a share of the highest: up along a line over `warmup` steps, at most a
    tenth of all, then to 0 along a line ("linear") or half a cosine ("cosine").
    """
    rise = min(warmup, steps // 10)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def loss_weights(labels, class_weight):
    """What each paper's loss counts: 1, or with "balanced" so that both classes count the same.

    >>> loss_weights([0, 0, 1], "balanced").tolist()
    [0.75, 0.75, 1.5]
    """
    if class_weight is None:
        return np.ones(len(labels))
    counts = np.bincount(labels, minlength=2)
    return (len(labels) / 2 / np.maximum(counts, 1))[labels]


# ---- several models: folds, seeds ------------------------------------------------------------------------------------


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
        numbers = common.fold_numbers(train, split["folds"], split["seed"])
        return [Plan(f"fold{k + 1}", seed, numbers == k) for k in range(split["folds"])]
    held_out = common.split_papers(train, split["valid_ratio"], split["seed"])
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


def score_held_out(name, train, plans, valid_probs, fields):
    """Score what all models say of the papers that they held out. Returns (frame of these papers, float array of their
    mean P, what metrics.json says of it, rows of a score table: of several seeds also mean and standard deviation).
    """
    chosen, probs = average(plans, valid_probs)
    held_out = train[chosen]
    metrics = {"scores": results.scores(held_out["label"], probs)}
    table = [(name, metrics["scores"], f"{len(held_out)} held out, {' '.join(fields)}")]
    if plans[0].name.startswith("seed"):
        metrics["seeds"] = [results.scores(held_out["label"], each) for each in valid_probs]
        frame, note = pd.DataFrame(metrics["seeds"]), f"over {len(plans)} seeds"
        table.append((f"{name}, mean", frame.mean().to_dict(), note))
        table.append((f"{name}, deviation", frame.std().to_dict(), note))
    return held_out, probs, metrics, table


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_state(path, model, optimizer, state):
    """Write the trained weights, until the run is finished the optimizer's moments, and `state` (JSON): in one file."""
    tensors = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            moments = {} if state["finished"] else optimizer.state.get(weight, {})
            for key, value in {"weight": weight, **moments}.items():
                tensors[f"{key}/{name}"] = value.detach().contiguous().cpu()
    with files.atomic_write(path) as part:
        save_file(tensors, part, metadata={"state": json.dumps(state)})


def read_state(path):
    """The state that save_state wrote, None if there is no file."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])


def load_state(path, model, optimizer):
    """Put what save_state wrote back into model and optimizer."""
    weights = dict(model.named_parameters())
    with safe_open(path, "pt") as file:
        for place in file.keys():
            key, name = place.split("/", 1)
            weight, value = weights[name], file.get_tensor(place)
            if key == "weight":
                weight.data.copy_(value)
            else:
                optimizer.state[weight][key] = value.to(weight.device)


def start_state(model, optimizer, folder, args, settings):
    """The state to start from: with --resume the checkpoint's, put into model and optimizer, if there is one. Raises
    InputError if that is of another run.
    """
    state = read_state(folder / LAST) if args.resume else None
    if state is None:
        counts = {"epoch": 0, "batch": 0, "loss": 0.0, "seconds": 0.0, "papers": 0, "cool": None, "stop": None}
        return {"settings": settings, **counts, "history": [], "scaler": None, "finished": False}
    if state["settings"] != settings:
        changed = results.describe_changes(state["settings"], settings)
        raise InputError(f"--resume: {folder} holds a run with other settings or papers: {changed}; give the old ones, "
                         "or leave --resume out")  # fmt: skip
    load_state(folder / LAST, model, optimizer)
    return state


def begin(folder, runs, resume):
    """Clear what an earlier run left in `folder`, unless this one goes on with it. `runs`: the folders of its single
    trainings, which may be `folder` itself. The states go first: if it is killed here, nothing left passes for a run.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in str(folder)):
        raise InputError(f"{folder}: this name is not UTF-8, and models can't be saved there: give another --out-dir")
    if resume and any((run / LAST).is_file() for run in runs):
        return
    several = [*folder.glob("fold[0-9]*"), *folder.glob("seed[0-9]*")]
    for place in (folder, *several):
        (place / LAST).unlink(missing_ok=True)
    for name in ("test.csv", "metrics.json", "training.json", "valid.csv", "submit_task1.csv", "log.csv"):
        (folder / name).unlink(missing_ok=True)
    for place in (folder / "best", *several):
        shutil.rmtree(place, ignore_errors=True)


def each_plan(accelerator, plans, folder, args):
    """Clear the folder, then give each plan in turn, with the flags for its own training."""
    if accelerator.is_main_process:
        begin(folder, [folder / plan.name for plan in plans], args.resume)
    accelerator.wait_for_everyone()
    for number, plan in enumerate(plans, 1):
        if len(plans) > 1:
            log(f"model {number} of {len(plans)}: {plan.name}")
        yield plan, argparse.Namespace(**vars(args) | {"seed": plan.seed})


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training under way."""

    accelerator: Accelerator
    model: torch.nn.Module  # as the script made it: it predicts and is saved
    task: object  # losses, probs, save
    train: list  # texts to learn from: papers, then short copies of them
    whole: int  # how many of these are papers
    held_out: list  # papers to choose the best epoch by
    folder: object  # Path; best/, last.safetensors and log.csv go there
    args: object  # the training flags
    shape: str  # of the learning rate, see rate()
    optimizer: torch.optim.Optimizer  # as accelerate wraps it, which scales fp16's gradients
    weights: np.ndarray  # float [papers to learn from], what each one's loss counts
    state: dict  # JSON, what a checkpoint says, see start_state
    threads: int  # pieces computed at a time, see count_threads
    saved: float = field(default_factory=time.perf_counter)  # when the last checkpoint was written

    def batches(self, epoch):
        lengths = list(map(text_length, self.train))
        # On a GPU a batch is one piece. What is packed has no padding.
        pool = POOL if self.accelerator.device.type == "cuda" and not getattr(self.model, "packs", False) else 1
        return draw_batches(lengths, self.args.batch_size, (self.args.seed, epoch), pool)

    @property
    def trained(self):
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    @property
    def seen(self):
        """How many papers of the epoch under way were trained on."""
        return min(len(self.train), self.state["batch"] * self.args.batch_size)

    def cooldown_factor(self):
        """What the learning rate is multiplied with: 1, and once all is learned down to 0 between "cool" and "stop"."""
        cool, stop = self.state["cool"], self.state["stop"]
        return 1 if stop is None else (stop - self.state["batch"]) / (stop - cool)

    def save_last(self):
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            save_state(self.folder / LAST, self.model, self.optimizer, self.state | {"scaler": scaler})
        self.saved = time.perf_counter()


def fit(accelerator, model, task, train, copies, held_out, folder, args, settings, shape="linear"):
    """Train, keep the best epoch by F1 on the held-out papers (then by log-loss), and stop early: after `patience`
    epochs without a better one, or within an epoch as soon as the task is learned, see check_learned.

    train, copies, held_out: lists of papers; copies: short ones of train, to learn from, too. folder: where best/,
    last.safetensors and log.csv go. settings: dict (JSON) of all that shapes the result, which a resumed run must
    share. shape: of the learning rate, see rate().
    Returns a dict with history (a dict an epoch), seconds and papers (both of the training steps alone; a paper and its
    copies count as one).
    """
    optimizer = accelerator.prepare(make_optimizer(model.to(accelerator.device), args))
    state = start_state(model, optimizer, folder, args, json.loads(json.dumps(settings)))
    texts = [*train, *copies]
    weights = loss_weights([paper["label"] for paper in texts], args.class_weight)
    sides, threads = (texts, len(train), held_out), count_threads(args, model, accelerator.device)
    run = Run(accelerator, model, task, *sides, folder, args, shape, optimizer, weights, state, threads)
    fresh = accelerator.scaler.state_dict() if accelerator.scaler else None
    if fresh and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    numbers = sum(weight.numel() for weight in run.trained)
    steps = args.epochs * len(run.batches(1))
    log(f"{len(texts)} texts to train on, {len(held_out)} held out; {args.epochs} epochs, {steps} steps of "
        f"{args.batch_size}; {numbers:,} weights; {describe(accelerator)}")  # fmt: skip
    if len(held_out) < MIN_HELD_OUT:
        log(f"{len(held_out)} held-out papers are too few to tell epochs apart: one of them is {1 / len(held_out):.1%} "
            "of the accuracy; --folds 5 holds out every paper once")  # fmt: skip
    if state["epoch"] or state["batch"]:
        log(f"resumed after {state['epoch']} epochs and {state['batch']} steps")
    if accelerator.device.type == "cuda" and not state["finished"]:
        try_largest(run)
    while not state["finished"]:
        train_epoch(run)
        score_epoch(run)
    if fresh:
        accelerator.scaler.load_state_dict(fresh)  # another fold or seed may follow
    accelerator.wait_for_everyone()
    papers = state["papers"] * len(train) / len(texts)
    return {"history": state["history"], "seconds": state["seconds"], "papers": papers}


def make_optimizer(model, args):
    """AdamW; biases and norms without weight decay."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=args.lr, fused=True)


def try_largest(run):
    """Compute a piece of the longest papers, forward and backward, and drop its gradients: what doesn't fit into the
    memory, or overflows in fp16, is said before the first step and not after an hour.
    """
    size = -(-run.args.batch_size // (count_pieces(run.args, run.accelerator.device) * run.accelerator.num_processes))
    longest = length_batches(list(map(text_length, run.train)), size)[0]
    run.model.train()
    torch.manual_seed(run.args.seed)
    loss, _ = gradients(run, longest, 1)
    check_finite(run, loss.item())


def check_finite(run, loss):
    """Raise InputError if a loss isn't a number. With fp16 the forward pass overflows: no learning rate cures that."""
    if not math.isfinite(loss):
        half = "numbers overflow in fp16: try --precision fp32, or bf16 on a newer GPU, or another --model"
        advice = half if run.accelerator.scaler else f"try --lr {run.args.lr / 3:.1e}"
        raise InputError(f"the loss became {loss} in epoch {run.state['epoch'] + 1}: {advice}")


def train_epoch(run):
    """Train on what is left of the epoch under way."""
    accelerator, args, state = run.accelerator, run.args, run.state
    epoch = state["epoch"] + 1
    batches = run.batches(epoch)
    bar = progress(accelerator, len(run.train), f"epoch {epoch}", run.seen)
    total, started = torch.zeros((), device=accelerator.device), time.perf_counter()
    run.model.train()
    while state["batch"] < (state["stop"] or len(batches)):
        batch = batches[state["batch"]]
        total += train_step(run, batch, (epoch - 1) * len(batches) + state["batch"], args.epochs * len(batches))
        bar.update(len(batch))
        state["batch"] += 1
        state["papers"] += len(batch)
        last = state["batch"] == (state["stop"] or len(batches))
        if state["batch"] % 10 == 0 or last:  # reading the loss waits for the GPU
            state["seconds"] += time.perf_counter() - started
            overdue = sync_loss(run, total)
            bar.set_postfix(loss=f"{state['loss'] / run.seen:.4f}", refresh=False)
            if epoch == 1 and state["batch"] == 10:
                say_duration(run)
            check_learned(run, batches)
            if overdue and not last:
                run.save_last()
            started = time.perf_counter()
    bar.close()


def say_duration(run):
    """Say how long all of the training will take, by its first steps."""
    minutes = run.state["seconds"] / run.state["papers"] * run.args.epochs * len(run.train) / 60
    if minutes >= 1:
        early = ", and a fraction of that if it learns fast" if len(run.held_out) >= MIN_HELD_OUT else ""
        log(f"about {minutes:.0f} minutes for {run.args.epochs} epochs{early}")


def check_learned(run, batches):
    """End the training early, in three steps:

    1. At every twentieth of an epoch score the held-out papers, a few at a time, until one is wrong.
    2. If all are right, as many steps again follow, over which the learning rate falls to 0.
    3. Then score five times as many papers that the epoch has not come to yet, again until one is wrong: they show what
       is rare (of 201 held-out papers three have a single author in the form of label 1). If all are right the epoch
       ends here, and with it the training if the held-out papers still are, see score_epoch; else it goes on.

    `batches`: of the epoch. With fewer than MIN_HELD_OUT held-out papers the epochs decide.
    """
    state, steps = run.state, len(batches)
    if len(run.held_out) < MIN_HELD_OUT or state["batch"] == steps:
        return
    where = f"epoch {state['epoch'] + 1}, {state['batch'] / steps:.0%}"
    if state["batch"] == state["stop"]:
        coming = [run.train[i] for batch in batches[state["batch"] :] for i in batch if i < run.whole]
        wrong, seen = count_wrong(run, coming[: 5 * len(run.held_out)], 100)
        log(f"{where}: {wrong} of {seen} papers not learned from yet are wrong{', so training goes on' * bool(wrong)}")
        if wrong:
            state["cool"] = state["stop"] = None
    elif state["stop"] is None and state["batch"] % max(10, round(steps / 20, -1)) == 0:
        wrong, seen = count_wrong(run, run.held_out, 20)
        log(f"{where}: {wrong} of {seen} held-out papers are wrong")
        if not wrong:
            log("learned: the learning rate falls to 0 now")
            state["cool"] = state["batch"]
            state["stop"] = min(steps, 2 * state["batch"] + state["epoch"] * steps)


def count_wrong(run, papers, block):
    """Score papers, about `block` at a time, until one is wrong. Returns (how many are wrong, how many were scored)."""
    wrong, scored, parts = 0, 0, max(1, len(papers) // block)
    for part in range(parts):
        some = papers[part::parts]
        guess = predict(run.accelerator, run.model, some, run.task) >= 0.5
        wrong, scored = np.sum(guess != [paper["label"] for paper in some]), scored + len(some)
        if wrong:
            break
    run.model.train()
    return wrong, scored


def train_step(run, batch, step, steps):
    """One optimizer step on the papers `batch` (int array). Returns this process's part of their summed loss."""
    accelerator, args, processes = run.accelerator, run.args, run.accelerator.num_processes
    rank, pieces = accelerator.process_index, count_pieces(args, accelerator.device) * processes
    torch.manual_seed(args.seed + 1_000_003 * step + 7919 * rank)
    for group in run.optimizer.param_groups:
        group["lr"] = args.lr * rate(step, steps, args.warmup, run.shape) * run.cooldown_factor()
    total, parts = 0, [part for part in np.array_split(batch, pieces)[rank::processes] if len(part)]
    for loss, found in side_by_side(lambda piece: gradients(run, piece, len(batch)), parts, run.threads):
        total += loss
        for weight, gradient in zip(run.trained, found):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
    if processes > 1:
        for weight in run.trained:
            weight.grad = accelerator.reduce(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    accelerator.clip_grad_norm_(run.trained, 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total


def gradients(run, piece, size):
    """The summed loss of a piece (int array of papers) of a batch of `size` papers, and the gradients of the trained
    weights for their mean: a tensor each, None for a weight that isn't used.
    """
    weights = gpu.to_device(torch.tensor(run.weights[piece], dtype=torch.float32), run.accelerator.device)
    with run.accelerator.autocast():
        loss = (run.task.losses(run.model, [run.train[i] for i in piece]) * weights).sum()
    scaled = run.accelerator.scaler.scale(loss) if run.accelerator.scaler else loss
    return loss.detach(), torch.autograd.grad(scaled / size, run.trained, allow_unused=True)


def sync_loss(run, total):
    """Add the `total` of all processes to the state and set it to 0. Returns whether a checkpoint is due."""
    overdue = run.accelerator.is_main_process and time.perf_counter() - run.saved >= 60 * run.args.save_minutes
    loss, overdue = run.accelerator.reduce(torch.stack([total, total.new_tensor(float(overdue))])).tolist()
    total.zero_()
    check_finite(run, loss)
    run.state["loss"] += loss
    return overdue > 0


def score_epoch(run):
    """Score the held-out papers after an epoch, write the checkpoints, and decide whether training is over."""
    state, args = run.state, run.args
    epoch, train_loss = state["epoch"] + 1, state["loss"] / run.seen
    guess = predict(run.accelerator, run.model, run.held_out, run.task)
    values = results.scores([paper["label"] for paper in run.held_out], guess)
    history, cooled = state["history"], state["stop"] is not None
    history.append({"epoch": epoch, "train_loss": round(train_loss, 6), **values})
    best = max(history, key=lambda row: (row["f1"], -row["log_loss"]))["epoch"]  # the first, if several are as good
    learned = cooled and values["accuracy"] == 1
    state |= {"epoch": epoch, "batch": 0, "loss": 0.0, "cool": None, "stop": None}
    state["finished"] = epoch == args.epochs or epoch - best >= args.patience or learned
    note = " (best so far)" if best == epoch else ""
    log(f"epoch {epoch}: train loss {train_loss:.4f}; {len(run.held_out)} held out: accuracy {values['accuracy']:.4f}, "
        f"f1 {values['f1']:.4f}, log-loss {values['log_loss']:.4f}{note}")  # fmt: skip
    if cooled and not state["finished"]:
        log("some held-out papers are wrong again, so training goes on")
    if run.accelerator.is_main_process:
        if best == epoch:
            with files.atomic_write(run.folder / "best") as part:
                run.task.save(run.model, part)
        files.write_csv(run.folder / "log.csv", history)
    run.save_last()


# ---- predicting ------------------------------------------------------------------------------------------------------


def progress(accelerator, total, words, done=0):
    """A progress bar in papers, on the main process; in a log file a line every half minute."""
    quiet = not accelerator.is_main_process
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, desc=words, unit="paper", mininterval=every, leave=False, disable=quiet)


def predict(accelerator, model, papers, task, batch_size=None):
    """P(label = 1) of every paper, in their order: float array [papers]. Each paper is scored once, by one process.
    If memory runs out the batch is halved. Raises InputError if a probability is NaN.
    """
    size = batch_size or getattr(task, "fits", GPU_BATCH if accelerator.device.type == "cuda" else CPU_BATCH)
    lengths = list(map(text_length, papers))
    while True:
        try:
            found = score_batches(accelerator, model, papers, task, length_batches(lengths, size))
            break
        except RuntimeError as error:  # with the first batch, which is of the longest papers
            if size == 1 or not hub.is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # out here, where what the error held is free
        log(f"out of memory with {size} papers at a time, going on with {(size + 1) // 2}")
        task.fits = size = (size + 1) // 2  # also at the next look
    probs = accelerator.reduce(found).cpu().numpy()
    if not np.isfinite(probs).all():
        raise InputError(f"P(label) is NaN for {(~np.isfinite(probs)).sum()} of {len(papers)} papers: the numbers "
                         "overflow in this precision, give --precision fp32 or bf16, or another --model")  # fmt: skip
    return np.clip(probs.astype(float), 0, 1)


def score_batches(accelerator, model, papers, task, batches):
    """P(label = 1) of the papers of this process's batches, 0 of all others: float tensor [papers]."""
    model.eval()
    found = torch.zeros(len(papers), device=accelerator.device)
    own = batches[accelerator.process_index :: accelerator.num_processes]
    bar = progress(accelerator, sum(map(len, own)), "predict")

    def score(batch):
        with torch.no_grad(), accelerator.autocast():
            return task.probs(model, [papers[i] for i in batch]).float()

    threads = torch.get_num_threads() if accelerator.device.type == "cpu" else 1
    for batch, probs in zip(own, side_by_side(score, own, threads)):
        found[batch] = probs
        bar.update(len(batch))
    bar.close()
    return found


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

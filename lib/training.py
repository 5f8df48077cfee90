"""The one training loop of both fine-tunes: batches of papers of like length, warm-up and decay, the best and the last
checkpoint, early stop, resume, prediction in batches, and advice when memory runs out.

What to train is given by two functions of a script: `losses(model, papers)` and `probs(model, papers)`, each a float
tensor [papers]. A paper is a dict with "input_ids" (list of int) and, to train on, "label" (0 or 1).

A step's batch is split over accumulation pieces and processes, and its loss is the mean over the whole batch, so
neither number changes what is learned. The random numbers of a step (dropout) depend on seed, step and process alone,
so a resumed run draws the same ones.
"""

import json
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import common
import models
from common import InputError, log, replacing, whole

warnings.filterwarnings("ignore", category=FutureWarning)
transformers.logging.set_verbosity_error()  # what matters of it is said by the kit, in a line
transformers.logging.disable_progress_bar()

LAST = "last.safetensors"
POOL = 50  # batches that are sorted by length together: enough for like lengths, few enough to keep the order random


def add_training_flags(parser, epochs, batch_size, patience, at_once):
    """Add the loop's flags. `at_once`: papers that a CPU takes best at a time, which is what its caches hold."""
    parser.set_defaults(at_once=at_once)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole, default=epochs, metavar="N", help="default %(default)s")
    add("--batch-size", type=whole, default=batch_size, metavar="N", help="papers a step, default %(default)s")
    add("--accumulate", type=whole, metavar="N", help="pieces a batch is split into, to save memory: same result; "
        f"default 1 with CUDA, else pieces of {at_once}, which a CPU computes faster")  # fmt: skip
    add("--lr", type=float, metavar="X", help="highest learning rate, default by model")
    add("--warmup", type=float, default=0.1, metavar="R", help="share of the steps, default %(default)s")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="default %(default)s")
    add("--patience", type=whole, default=patience, metavar="N", help="stop after N epochs without a better one")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 or fp16 with CUDA")
    add("--save-minutes", type=float, default=10, metavar="M", help="between checkpoints, default %(default)s")
    add("--resume", action="store_true", help="go on where a killed run stopped")


def make_accelerator(precision="auto"):
    """An Accelerator: bf16 where the GPU has it, else fp16 with scaled gradients, fp32 without CUDA."""
    if precision == "auto":
        cuda = torch.cuda.is_available()
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if cuda else "fp32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs CUDA: use fp32 or bf16")
    # Without being told so, accelerate takes each of several processes on a CPU for the only one.
    cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)


def describe(accelerator):
    """Device and precision in words."""
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else str(accelerator.device)
    several = f" × {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"{device}{several}, {accelerator.mixed_precision.replace('no', 'fp32')}"


def peak_memory_mb(accelerator):
    """The most GPU memory this process has held, in MiB; main memory where there is no GPU."""
    if accelerator.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return common.peak_memory_mb()


def length_batches(lengths, size, seed=None):
    """Split papers into batches of at most `size` of like length. With a seed they are shuffled, by it alone; without
    one they go from the longest down, so that what needs most memory comes first. Returns a list of int arrays.
    """
    lengths = np.asarray(lengths)
    if seed is None:
        order = np.argsort(-lengths, kind="stable")
        return [order[i : i + size] for i in range(0, len(order), size)]
    random = np.random.default_rng(seed)
    order, batches = random.permutation(len(lengths)), []
    for start in range(0, len(order), size * POOL):
        pool = order[start : start + size * POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [batches[i] for i in random.permutation(len(batches))]


def rate(step, steps, warmup, shape):
    """The learning rate of a step (from 0) as a share of the highest: linear warm-up over `warmup` of the steps, then
    to 0 along a line ("linear") or half a cosine ("cosine").
    """
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def memory_advice(advice):
    """Turn running out of memory into one line. `advice`: what to say after "out of memory"."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not models.is_out_of_memory(error):
            raise
        raise InputError(f"out of memory {advice}") from None


def model_advice():
    """memory_advice for all that is neither a step nor a prediction: the model itself is too large."""
    return memory_advice("for the model itself: end what else holds memory (nvidia-smi), or give a smaller --model")


def step_advice(args, processes=1):
    """memory_advice for a training step: the flag and the next value to try."""
    at_once = args.batch_size // (args.accumulate * processes)
    if at_once > 1:
        advice = f"--accumulate {args.accumulate * 2} (same result) or --batch-size {args.batch_size // 2}"
    else:
        advice = f"--max-length {args.max_length // 2}, or a smaller --model"
    return memory_advice(f"with {max(1, at_once)} papers at a time: try {advice}")


@contextmanager
def resumable(how="the same command with --resume goes on"):
    """Say how to go on after Ctrl-C, and after the death of another process of the run."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how) from None
    except RuntimeError as error:
        if "by peer" not in str(error):  # connection closed or reset by peer
            raise
        raise InputError(f"another process of this run died; {how}") from None


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_state(path, model, optimizer, state):
    """Write trained weights and optimizer moments, with `state` (JSON) in the header: one file, so one rename."""
    tensors = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            tensors[f"weight/{name}"] = weight.detach().contiguous().cpu()
            for key, value in optimizer.state.get(weight, {}).items():
                tensors[f"{key}/{name}"] = value.detach().contiguous().cpu()
    with replacing(path) as part:
        save_file(tensors, part, metadata={"state": json.dumps(state)})


def read_state(path):
    """The state that save_state wrote, None where there is no file. Raises InputError for a damaged one."""
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


def clear(folder):
    """Remove what an earlier run left in a folder, the state and the records of a finished run first: killed in
    between, what is left is not taken for a run.
    """
    for name in (LAST, "metrics.json", "training.json", "valid.csv", "test.csv", "submit_task1.csv", "log.csv"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "best", ignore_errors=True)


def progress(accelerator, total, words, done=0):
    """A progress bar in papers, on the main process; in a log file a line every half minute."""
    quiet = not accelerator.is_main_process
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, desc=words, unit="paper", mininterval=every, leave=False, disable=quiet)


# ---- training --------------------------------------------------------------------------------------------------------


def fit(
    accelerator, model, train, held_out, losses, probs, save_best, folder, args, settings, shape="linear", others=()
):
    """Train, keep the best epoch by F1 on the held-out papers (then by log-loss), and stop early.

    train, held_out: lists of papers. save_best(model) writes the best checkpoint. folder: where last.safetensors and
    log.csv go. settings: dict (JSON) of all that shapes the result, which a resumed run must share. shape: see rate().
    others: folders that are cleared with `folder` when the run begins anew.
    Returns a dict with history (a dict an epoch), seconds and papers (both of the training steps alone).
    """
    if not args.accumulate:
        args.accumulate = 1 if accelerator.device.type == "cuda" else -(-args.batch_size // args.at_once)
    device, processes, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    lengths = [len(paper["input_ids"]) for paper in train]
    epoch_steps = len(length_batches(lengths, args.batch_size, 0))
    steps, pieces = epoch_steps * args.epochs, args.accumulate * processes
    model.to(device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},  # biases and norms
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=args.lr, fused=True)

    last, settings = folder / LAST, json.loads(json.dumps(settings))
    state = read_state(last) if args.resume else None
    if state is None:
        if accelerator.is_main_process:  # what an earlier run left must not be taken for this one's
            last.unlink(missing_ok=True)  # before all else: --resume then begins anew, too, and clears the rest
            for place in (*others, folder):
                clear(place)
        state = {"settings": settings, "epoch": 0, "batch": 0, "loss": 0.0, "seconds": 0.0, "papers": 0, "history": []}
        state |= {"scaler": None, "finished": False}
    elif state["settings"] != settings:
        changed = common.differences(state["settings"], settings)
        raise InputError(
            f"--resume: {folder} holds a run with other settings or papers: {changed}; give the old ones, "
            "or leave --resume out"
        )
    else:
        load_state(last, model, optimizer)
    parallel, stepper = accelerator.prepare(model, optimizer)  # `model` itself stays in use to predict and to save
    if state["scaler"] and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    log(
        f"{len(train)} texts to train on, {len(held_out)} held out; {args.epochs} epochs, {steps} steps of "
        f"{args.batch_size}; {sum(w.numel() for w in weights):,} weights; {describe(accelerator)}"
    )
    if state["epoch"] or state["batch"]:
        log(f"resumed after {state['epoch']} epochs and {state['batch']} steps")

    def rank_of(epoch):
        return epoch["f1"], -epoch["log_loss"]

    def save_last():
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        save_state(last, model, optimizer, state | {"scaler": scaler})

    def over():
        best = max(range(len(state["history"])), key=lambda i: rank_of(state["history"][i]), default=0)
        return state["epoch"] == args.epochs or len(state["history"]) - 1 - best >= args.patience

    while not state["finished"]:
        epoch = state["epoch"] + 1
        batches = length_batches(lengths, args.batch_size, (args.seed, epoch))
        seen = sum(len(batch) for batch in batches[: state["batch"]])
        bar = progress(accelerator, len(train), f"epoch {epoch}", seen)
        total, started, saved = torch.zeros((), device=device), time.perf_counter(), time.perf_counter()
        model.train()
        for place in range(state["batch"], epoch_steps):
            step, batch = (epoch - 1) * epoch_steps + place, batches[place]
            torch.manual_seed(args.seed + 1_000_003 * step + 7919 * rank)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step, steps, args.warmup, shape)
            with step_advice(args, processes):
                for i in range(rank, pieces, processes):
                    # Every process must take part in each backward pass: without a paper of its own, with one that
                    # counts nothing.
                    piece, counts = (batch[i::pieces], 1) if i < len(batch) else (batch[:1], 0)
                    with nullcontext() if i + processes >= pieces else accelerator.no_sync(parallel):
                        loss = counts * losses(parallel, [train[j] for j in piece]).sum()
                        accelerator.backward(loss * processes / len(batch))  # gradients are averaged over processes
                    total += loss.detach()
                accelerator.clip_grad_norm_(weights, 1.0)
                stepper.step()
                stepper.zero_grad()
            bar.update(len(batch))
            seen += len(batch)
            state["batch"], state["papers"] = place + 1, state["papers"] + len(batch)
            if place % 10 < 9 and place + 1 < epoch_steps:
                continue
            # Every tenth step the processes meet: the loss is summed, and the first one's clock says when to save.
            overdue = time.perf_counter() - saved >= 60 * args.save_minutes and accelerator.is_main_process
            new_loss, overdue = accelerator.reduce(torch.stack([total, total.new_tensor(overdue)])).tolist()
            state["loss"] += new_loss
            total.zero_()
            if not math.isfinite(new_loss):
                raise InputError(f"the loss is no number any more in epoch {epoch}: try --lr {args.lr / 3:.1e}")
            bar.set_postfix(loss=f"{state['loss'] / seen:.4f}", refresh=False)
            state["seconds"] += time.perf_counter() - started
            if overdue and place + 1 < epoch_steps:
                if accelerator.is_main_process:
                    save_last()
                saved = time.perf_counter()
            started = time.perf_counter()
        bar.close()
        train_loss = state["loss"] / len(train)
        guess = predict(accelerator, model, held_out, probs, args.batch_size)
        values = common.scores([paper["label"] for paper in held_out], guess)
        better = rank_of(values) > max(map(rank_of, state["history"]), default=(-1, 0))
        state["history"].append({"epoch": epoch, "train_loss": round(train_loss, 6), **values})
        state |= {"epoch": epoch, "batch": 0, "loss": 0.0}
        state["finished"] = over()
        log(
            f"epoch {epoch}: train loss {train_loss:.4f}; {len(held_out)} held out: accuracy {values['accuracy']:.4f}, "
            f"f1 {values['f1']:.4f}, log-loss {values['log_loss']:.4f}{' (best so far)' if better else ''}"
        )
        if accelerator.is_main_process:
            if better:
                save_best(model)
            history = state["history"]
            common.write_csv(folder / "log.csv", {key: [row[key] for row in history] for key in history[0]})
            save_last()
    accelerator.wait_for_everyone()
    return {key: state[key] for key in ("history", "seconds", "papers")}


def predict(accelerator, model, papers, probs, batch_size, done=None, keep=None):
    """P(label = 1) of every paper, in their order: float array [papers]. Each paper is scored once, by one process.
    Where memory runs out the batch is halved. `done`: {place of a paper: probability} of an earlier run, not scored
    again; `keep(batch, probabilities)` is called after each batch. Raises InputError where not even one paper fits.
    """
    if accelerator.device.type != "cuda":
        batch_size = min(batch_size, 4)  # what the caches of a CPU hold
    model.eval()
    found = torch.zeros(2, len(papers), device=accelerator.device)  # probabilities, and how often each was scored
    done = done or {}
    batches = length_batches([len(paper["input_ids"]) for paper in papers], batch_size)
    todo = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in todo:
        if known := [i for i in batch if i in done]:
            found[0, known], found[1, known] = found.new_tensor([done[i] for i in known]), 1.0
    todo = [rest for batch in todo if len(rest := batch[[i not in done for i in batch]])]
    bar = progress(accelerator, sum(map(len, todo)), "predict")
    while todo:
        batch, failed = todo[0], False
        try:
            with torch.no_grad():
                found[0, batch] = probs(model, [papers[i] for i in batch]).float()
        except RuntimeError as error:
            if not models.is_out_of_memory(error):
                raise
            if len(batch) == 1:
                tokens = len(papers[batch[0]]["input_ids"])
                advice = f"try --max-length {tokens // 2}, or a smaller --model"
                raise InputError(f"out of memory with 1 paper of {tokens} tokens: {advice}") from None
            failed = True  # what the error holds is freed only after this block
        if failed:
            torch.cuda.empty_cache()
            half = (len(batch) + 1) // 2
            log(f"out of memory with {len(batch)} papers at a time, going on with {half}")
            todo = [rest[i : i + half] for rest in todo for i in range(0, len(rest), half)]
        else:
            found[1, batch] += 1
            if keep:
                keep(batch, found[0, batch].tolist())
            bar.update(len(batch))
            todo.pop(0)
    bar.close()
    found = accelerator.reduce(found).cpu().numpy()
    if not (found[1] == 1).all():
        raise RuntimeError(f"{(found[1] != 1).sum()} papers were not scored exactly once")
    return np.clip(found[0].astype(float), 0, 1)

"""Peak GPU memory of the kit's own training step and predicting batch, computed without a GPU and without weights.

    python benchmarks/memory.py                    every model: a Markdown table, in GiB
    python benchmarks/memory.py Qwen3-4B           these models only

The kit's code runs on tensors that have a shape and a type but no values (FakeTensorMode), and every storage that is
alive is counted: papers of 512 tokens, bf16, LoRA of rank 8. Attention takes the memory of the kernel that all cards
have; layers in 4 bits are modelled on bitsandbytes'. The tensors are said to be on a CPU, since torch without CUDA
can't compute gradients of others; what differs on a card is put right below. Not counted: what CUDA itself holds (0.3
to 0.6 GiB) and what the allocator loses between pieces (some 5 %). Never compared with a real card.
"""

import argparse
import multiprocessing
import sys
import warnings
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GlmConfig,
    Qwen3Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bert_finetune
import lora_finetune
from lib import llm, training

GIB, LENGTH = 2**30, 512


def qwen3(width, middle, layers, heads, tied):
    return Qwen3Config(
        vocab_size=151936, hidden_size=width, intermediate_size=middle, num_hidden_layers=layers, head_dim=128,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=40960, tie_word_embeddings=tied,
    )  # fmt: skip


def bert(width, layers):
    return BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width,
        num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


LLMS = {
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, True),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, True),
    "ChatGLM2-6B": GlmConfig(
        vocab_size=65024, hidden_size=4096, intermediate_size=13696, num_hidden_layers=28, num_attention_heads=32,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, tie_word_embeddings=False, pad_token_id=0,
    ),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, False),
}  # fmt: skip
ENCODERS = {"bert-base": bert(768, 12), "bert-large": bert(1024, 24)}
MODELS = [*LLMS, *ENCODERS]


# ---- counting --------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, their peak, and the calls that compute something."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak, self.calls = weakref.WeakSet(), 0, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        found = function(*arguments, **(more or {}))
        self.calls += not function.is_view
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return found

    def add(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size):
        self.now -= size


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **_):
    """Attention with the memory-efficient kernel, which a CPU build of torch doesn't choose by itself."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    if attention_mask is not None:
        attention_mask = attention_mask.expand(*query.shape[:3], key.shape[2])
    causal = attention_mask is None and getattr(module, "is_causal", True) and query.shape[2] > 1
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    found = kernel(query, key, value, attention_mask, torch.is_grad_enabled(), dropout, causal, scale=scaling)
    return found[0].transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", attend)


# ---- the kit's code --------------------------------------------------------------------------------------------------


class Tokens:
    """As much of a tokenizer as the tasks ask for: answers of one token and an end token."""

    chat_template, eos_token_id, pad_token_id = "chat", 2, 0

    def __call__(self, text, **_):
        return {"input_ids": [int(text)]}

    def pad(self, batch, return_tensors):
        ids = torch.tensor(batch["input_ids"])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Unpack(torch.autograd.Function):
    """A product with a matrix that is unpacked for it, forward and backward."""

    @staticmethod
    def forward(context, values, packed, shape):
        context.packed, context.shape = packed, shape
        return torch.nn.functional.linear(values, values.new_empty(shape))

    @staticmethod
    def backward(context, gradients):
        return gradients @ gradients.new_empty(context.shape), None, None


class FourBit(torch.nn.Module):
    """A linear layer as bitsandbytes keeps it: 4 bits a weight, 8 more for each 64 weights, 32 for each 16,384."""

    def __init__(self, layer):
        super().__init__()
        self.shape, bits = layer.weight.shape, 4 + 8 / 64 + 32 / 16384
        packed = torch.empty(round(layer.weight.numel() * bits / 8), dtype=torch.uint8, device="meta")
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, values):
        return Unpack.apply(values.to(torch.bfloat16), self.weight, self.shape).clone()  # as peft does


def papers(count):
    """Prompts that begin with the same 64 tokens, as an instruction takes them."""
    return [{"input_ids": [1] * 64 + [i + 2] * (LENGTH - 66), "label": i % 2} for i in range(count)]


def arguments(**changes):
    parser = argparse.ArgumentParser()
    training.add_training_flags(parser, epochs=1, batch_size=4, patience=1, at_once=2)
    defaults = vars(parser.parse_args([])) | {"lr": 1e-4, "seed": 1, "max_length": LENGTH, "accumulate": 1}
    defaults |= {"method": "lora", "target_modules": None, "rank": 8, "alpha": None, "dropout": 0.0}
    return argparse.Namespace(**defaults | changes)


def make(name, checkpointing, four_bit):
    """(model, task) without weights."""
    with torch.device("meta"):
        if name in LLMS:
            model = AutoModelForCausalLM.from_config(LLMS[name], dtype=torch.bfloat16, attn_implementation="counted")
            model = lora_finetune.add_adapter(model, arguments(gradient_checkpointing=checkpointing), 1)
            for layer in model.modules():
                if four_bit and hasattr(layer, "base_layer"):
                    layer.base_layer = FourBit(layer.base_layer)
            return llm.Scorer(model, Tokens()), llm.Task(papers(2))
        model = AutoModelForSequenceClassification.from_config(ENCODERS[name], attn_implementation="counted")
    for layer in model.modules():
        if isinstance(layer, torch.nn.LayerNorm):  # autocast on a card computes them in float32
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].float(),))
    return autocast(model), bert_finetune.Task(Tokens(), "cpu", {})


def autocast(model):
    """As accelerate prepares a model: under autocast."""
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def empty(model):
    """Give a model storages of its weights' sizes; two layers that share their weights share them again."""
    model.to_empty(device="cpu")
    for layer in model.modules():
        if hasattr(layer, "tie_weights"):
            layer.tie_weights()
    return model


def train(name, size, checkpointing, four_bit=False):
    """(peak of two training steps of `size` papers in GiB, kernels that the second starts). From the second on there is
    the optimizer's state.
    """
    model, task = make(name, checkpointing, four_bit)
    with FakeTensorMode(allow_non_fake_inputs=True), Count() as count:
        empty(model)
        args = arguments(batch_size=size)
        run = training.Run(
            make_accelerator(), model.train(), task, papers(size), [], None, args, "linear",
            training.make_optimizer(model, args), np.ones(size), {"cool": None, "stop": None, "batch": 0},
        )  # fmt: skip
        run.parallel, run.stepper = model, run.optimizer
        training.train_step(run, np.arange(size), 0, 10)
        before = count.calls
        training.train_step(run, np.arange(size), 1, 10)
    return count.peak / GIB, count.calls - before


def predict(name, size, four_bit=False):
    """Peak of scoring `size` papers in GiB. An LLM's adapter is merged before, but not into 4 bits."""
    model, task = make(name, False, four_bit)
    with FakeTensorMode(allow_non_fake_inputs=True), Count() as count, torch.no_grad():
        empty(model).eval()
        if name in LLMS and not four_bit:
            model.model.merge_adapter()
        task.probs(model, papers(size))
    return count.peak / GIB


def alone(function, *arguments):
    """A function's result, computed in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def make_accelerator():
    """What train_step asks of an Accelerator."""
    return SimpleNamespace(
        num_processes=1, process_index=0, device=torch.device("cpu"), scaler=None, backward=torch.Tensor.backward,
        clip_grad_norm_=partial(torch.nn.utils.clip_grad_norm_, foreach=True),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    chosen = parser.parse_args().models
    if not set(chosen) <= set(MODELS):
        parser.error(f"MODEL is one of {', '.join(MODELS)}")
    warnings.filterwarnings("ignore")
    columns = ["model", "train 4", "train 8", "train 16", "train 4, no checkpointing", "predict 16", "predict 64"]
    columns += ["4 bits: train 4", "4 bits: predict 16", "kernels of a step of 4"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name in chosen or MODELS:
        trained = [alone(train, name, size, name in LLMS) for size in (4, 8, 16)] + [alone(train, name, 4, False)]
        peaks = [peak for peak, _ in trained] + [alone(predict, name, 16), alone(predict, name, 64)]
        if name in LLMS:
            peaks += [alone(train, name, 4, True, True)[0], alone(predict, name, 16, True)]
        cells = [f"{peak:.1f}" for peak in peaks] + [""] * (8 - len(peaks)) + [f"{trained[0][1]:,}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

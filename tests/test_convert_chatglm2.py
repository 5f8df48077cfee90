"""The conversion against the published maths, written out here in plain torch, and against sentencepiece itself, on
tiny ChatGLM2-layout checkpoints with random weights that are made here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert_chatglm2

KIT = Path(__file__).resolve().parent.parent
SHARED = KIT.parent / "shared" / "chatglm2-tiny"
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
CONFIG = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 48,
    "hidden_size": 32,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 512,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SENTENCES = """The philosophers of geopolitics met people who sold isopropyl alcohol in a shop near the old sea port.
Is a [Round 1] of talks over?  Nobody told us; the answer was 42, or 3.14 at most.
def main():    return [x for x in range(10)]
你好，世界。问：这篇论文属于医学领域吗？答：是。
Soap operas develop people's patience, the philosophy of sops and sopranos.""".splitlines()


# ---- tiny checkpoints ------------------------------------------------------------------------------------------------


def random_tensors(config, seed=0, dtype=torch.float16):
    """The tensors of a checkpoint, norms and biases random too, under their published names."""
    torch.manual_seed(seed)
    hidden, ffn, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    heads, groups, width = (config[k] for k in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    rows = (heads + 2 * groups) * width
    shapes = {"embedding.word_embeddings.weight": (vocab, hidden), "rotary_pos_emb.inv_freq": (width // 4,)}
    for layer in range(config["num_layers"]):
        shapes |= {
            f"encoder.layers.{layer}.input_layernorm.weight": (hidden,),
            f"encoder.layers.{layer}.self_attention.query_key_value.weight": (rows, hidden),
            f"encoder.layers.{layer}.self_attention.query_key_value.bias": (rows,),
            f"encoder.layers.{layer}.self_attention.dense.weight": (hidden, heads * width),
            f"encoder.layers.{layer}.post_attention_layernorm.weight": (hidden,),
            f"encoder.layers.{layer}.mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            f"encoder.layers.{layer}.mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
    shapes |= {"encoder.final_layernorm.weight": (hidden,), "output_layer.weight": (vocab, hidden)}
    if not config["add_qkv_bias"]:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}
    return {f"transformer.{name}": (torch.randn(shape) * 0.3).to(dtype) for name, shape in shapes.items()}


def write_weights(folder, tensors, shards=2, kind="bin"):
    """Save `tensors` in as many files, with an index unless it is one. Returns the files."""
    stem, suffix = {"bin": ("pytorch_model", "bin"), "safetensors": ("model", "safetensors")}[kind]
    names, files, weight_map = list(tensors), [], {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = folder / (f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}")
        (torch.save if kind == "bin" else save_file)({name: tensors[name] for name in part}, file)
        files.append(file)
        weight_map |= dict.fromkeys(part, file.name)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return files


def train_tokenizer(folder, sentences=SENTENCES * 3, **changes):
    """Write tokenizer.model, a sentencepiece model of the published kind but for `changes`."""
    options = {
        "model_type": "bpe",
        "vocab_size": 480,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(folder / "tokenizer"), **(options | changes)
    )
    (folder / "tokenizer.vocab").unlink()


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory):
    """Bytes of a small sentencepiece model."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_tokenizer(folder)
    return (folder / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def make_dir(tmp_path_factory, sp_model):
    """Write a directory as published, with the given changes of the config. Returns (folder, config, tensors)."""

    def make(shards=2, kind="bin", drop=(), folder=None, **changes):
        folder = folder or tmp_path_factory.mktemp("chatglm2")
        config = {k: v for k, v in (CONFIG | changes).items() if k not in drop}
        tensors = random_tensors(config)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.model").write_bytes(sp_model)
        write_weights(folder, tensors, shards, kind)
        return folder, config, tensors

    return make


def convert(source, out_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_chatglm2.py", str(source), str(out_dir)])
        convert_chatglm2.main()
    return out_dir


@pytest.fixture(scope="module")
def plain(make_dir, tmp_path_factory):
    """A directory as published and what became of it: (source, out_dir, config, tensors)."""
    source, config, tensors = make_dir()
    (source / "MODEL_LICENSE").write_text("its terms")
    return source, convert(source, tmp_path_factory.mktemp("plain") / "out"), config, tensors


@pytest.fixture(scope="module")
def tok(plain):
    return AutoTokenizer.from_pretrained(plain[1])


@pytest.fixture(scope="module")
def sp(sp_model):
    return sentencepiece.SentencePieceProcessor(model_proto=sp_model)


def load_model(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


# ---- what was published ----------------------------------------------------------------------------------------------


def published_logits(tensors, config, ids, mask):
    """The published ChatGLM2 forward pass in float32, positions counted from the first real token. `ids`, `mask`: int
    [batch, length]. Returns [batch, length, vocab].
    """
    weights = {name.removeprefix("transformer."): tensor.float() for name, tensor in tensors.items()}
    batch, length = ids.shape
    heads, groups, width = (config[k] for k in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    half = width // 2
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    angles = positions[..., None] / 10000 ** (torch.arange(0, half, 2) / half)  # [batch, length, half / 2]
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    seen = torch.ones(length, length).tril().bool() & mask[:, None].bool() | torch.eye(length).bool()

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"]) * weights[name]

    def rotate(x):  # pairs of neighbours in the first half of each head; the other half is left as it is
        even, odd = x[..., :half:2], x[..., 1:half:2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
        return torch.cat((turned, x[..., half:]), -1)

    x = weights["embedding.word_embeddings.weight"][ids]
    for layer in range(config["num_layers"]):
        p = f"encoder.layers.{layer}."
        qkv = norm(x, p + "input_layernorm.weight") @ weights[p + "self_attention.query_key_value.weight"].T
        qkv = qkv + weights.get(p + "self_attention.query_key_value.bias", 0)
        q, k, v = qkv.split([heads * width, groups * width, groups * width], -1)
        q, k, v = (t.view(batch, length, -1, width) for t in (q, k, v))
        k, v = (t.repeat_interleave(heads // groups, 2) for t in (rotate(k), v))
        scores = torch.einsum("bihd,bjhd->bhij", rotate(q), k) / width**0.5
        probs = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2)
        x = x + mixed @ weights[p + "self_attention.dense.weight"].T
        up = norm(x, p + "post_attention_layernorm.weight") @ weights[p + "mlp.dense_h_to_4h.weight"].T
        gate, up = up.chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[p + "mlp.dense_4h_to_h.weight"].T
    return norm(x, "encoder.final_layernorm.weight") @ weights["output_layer.weight"].T


def published_ids(sp, text):
    """sentencepiece's pieces; one spelled as a special name gets that one's id."""
    special = {name: sp.vocab_size() + i for i, name in enumerate(SPECIAL)}
    return [special.get(piece, sp.piece_to_id(piece)) for piece in sp.encode(text, out_type=str)]


def published_prompt(query, history=()):
    rounds = [f"[Round {i}]\n\n问：{old}\n\n答：{answer}\n\n" for i, (old, answer) in enumerate(history, 1)]
    return "".join(rounds) + f"[Round {len(rounds) + 1}]\n\n问：{query}\n\n答："


def messages(query, history=()):
    turns = [turn for pair in history for turn in zip(("user", "assistant"), pair)]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", query)]]


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, changes",
    [
        ({"shards": 2}, {}),
        ({"shards": 1}, {"num_attention_heads": 6, "multi_query_group_num": 3, "kv_channels": 12, "rope_ratio": 1}),
        ({"shards": 5, "kind": "safetensors"}, {"num_layers": 3, "multi_query_group_num": 1, "layernorm_epsilon": 0.3}),
        (
            {"shards": 1, "kind": "safetensors"},
            {"num_attention_heads": 2, "kv_channels": 20, "add_qkv_bias": False, "ffn_hidden_size": 20},
        ),
    ],
    ids=["two .bin", "one .bin, wide heads", "five safetensors, other epsilon", "one safetensors, no bias"],
)
def test_logits_are_those_of_the_published_maths(make_dir, tmp_path, form, changes):
    source, config, tensors = make_dir(**form, **changes)
    model = load_model(convert(source, tmp_path / "out"))
    torch.manual_seed(1)
    ids = torch.randint(512, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :18] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        unplaced = model(input_ids=ids, attention_mask=mask).logits
    theirs = published_logits(tensors, config, ids, mask)
    assert theirs.std() > 0.3
    for logits in (ours, unplaced):
        assert (logits - theirs).abs()[mask.bool()].max() < 1e-3
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=[])
    for _ in range(3):
        best = published_logits(tensors, config, ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat((ids, best), 1), torch.cat((mask, torch.ones_like(best)), 1)
    assert generated.tolist() == ids.tolist()


def test_every_number_of_the_source_stands_once_in_the_output(plain):
    source, out_dir, _, tensors = plain
    weight_map = json.loads((out_dir / "model.safetensors.index.json").read_text())["weight_map"]
    converted = {}
    for file in sorted(set(weight_map.values())):
        shard = load_file(out_dir / file)
        assert not converted.keys() & shard.keys() and all(weight_map[name] == file for name in shard)
        converted |= shard
    assert converted.keys() == weight_map.keys()
    kept = [tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")]
    values = [torch.cat([t.flatten() for t in group]).sort().values for group in (kept, list(converted.values()))]
    assert torch.equal(*values)
    assert json.loads((out_dir / "config.json").read_text())["dtype"] == "float16"
    assert (out_dir / "MODEL_LICENSE").read_text() == "its terms"
    assert not list(out_dir.glob("*.py")) and "auto_map" not in (out_dir / "config.json").read_text()


def test_buffer_and_prefix_may_be_absent(make_dir, tmp_path):
    source, _, tensors = make_dir()
    first = convert(source, tmp_path / "with")
    tensors.pop("transformer.rotary_pos_emb.inv_freq")
    write_weights(source, {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [load_model(out)(ids).logits for out in (first, convert(source, tmp_path / "without"))]
    assert torch.equal(*logits)


def test_old_format_without_zip_is_read(make_dir, tmp_path):
    source, _, tensors = make_dir(shards=1)
    first = convert(source, tmp_path / "zip")
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    second = convert(source, tmp_path / "old")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_lora_trains_saves_reloads_and_merges(plain, tok, tmp_path):
    model = load_model(plain[1])
    batch = tok(["问：geopolitics?\n\n答：1", "问：isopropyl alcohol?\n\n答：0"], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(tuned(**batch, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    tuned.eval().save_pretrained(tmp_path / "adapter")
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(load_model(plain[1]), tmp_path / "adapter")
    with torch.no_grad():
        base, want, got = (m(**batch).logits for m in (load_model(plain[1]), tuned, again))
        merged = again.merge_and_unload()(**batch).logits
    assert torch.equal(want, got) and (merged - want).abs().max() < 1e-4 and (base - want).abs().max() > 0.1


# ---- tokenizer -------------------------------------------------------------------------------------------------------

WORDS = ["sop", "eop", "isopropyl", "philosophy", "geopolitics", "soap", "people", "</s>", "<s>", "<unk>", "<0x0A>"]
WORDS += [*SPECIAL, "[gMASK]sop", "[Round 1]", *"\n\t\r\0▁🙂é", "\n\n", "  ", "问：", "答：", "你好", "naïve"]
PARTS = st.sampled_from(WORDS) | st.sampled_from("aeopslt 01▁.") | st.text(max_size=6)
TEXTS = st.lists(PARTS, max_size=12).map("".join)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(TEXTS.filter(lambda text: not text.startswith("[gMASK]sop[Round 1]")))
@example("")
@example("sop")
@example("[gMASK]")
@example("[gMASK]sop")
@example("geopolitics of isopropyl philosophy eop")
def test_ids_are_those_of_sentencepiece(tok, sp, text):
    ids = published_ids(sp, text)
    prefix = [sp.vocab_size() + 1, sp.vocab_size() + 3]
    assert tok(text)["input_ids"] == prefix + ids
    assert tok(text, split_special_tokens=True)["input_ids"] == prefix + ids
    assert tok(text, add_special_tokens=False)["input_ids"] == ids


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(TEXTS, st.lists(st.tuples(TEXTS, TEXTS), max_size=3))
@example("[gMASK]sop[Round 1]", [])
@example("", [("", "")])
def test_chat_ids_are_those_of_the_published_prompt(tok, sp, query, history):
    ids = tok.apply_chat_template(messages(query, history), add_generation_prompt=True)["input_ids"]
    prefix = [sp.vocab_size() + 1, sp.vocab_size() + 3]
    assert ids == prefix + published_ids(sp, published_prompt(query, history))


def test_a_piece_spelled_as_a_special_name_gets_its_id_as_published(tmp_path):
    train_tokenizer(tmp_path, [f"{a}sop{b}" for a in "abcdefghi" for b in "jklmnqrtu"], vocab_size=290)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tok = convert_chatglm2.build_tokenizer(tmp_path / "tokenizer.model")
    assert "sop" in sp.encode("philosophy", out_type=str)
    for text in ("philosophy", "sop", "sopsop", "[gMASK]sop", "Aesop eop"):
        assert tok(text, add_special_tokens=False)["input_ids"] == published_ids(sp, text)
    assert tok.convert_tokens_to_ids(SPECIAL) == [sp.vocab_size() + i for i in range(5)]
    assert len(tok) == sp.vocab_size() + 5 and tok.decode(sp.piece_to_id("sop")) == "sop"


def test_system_message_opens_the_first_question_and_roles_take_turns(tok):
    chat = [{"role": "system", "content": "S"}, *messages("Q")]
    assert tok.apply_chat_template(chat, tokenize=False) == "[gMASK]sop" + published_prompt("S\n\nQ")
    for roles in (["assistant"], ["user", "user"], ["user", "system"], ["tool"]):
        with pytest.raises(Exception, match="take turns"):
            tok.apply_chat_template([{"role": role, "content": "x"} for role in roles])
    with pytest.raises(Exception, match="must be a string"):
        tok.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "x"}]}])


def test_pair_ends_with_the_end_token(tok, sp):
    prefix = [sp.vocab_size() + 1, sp.vocab_size() + 3]
    assert tok("a", "b sop")["input_ids"] == [*prefix, *published_ids(sp, "a"), *published_ids(sp, "b sop"), 2]


def test_padding_is_on_the_left_and_saved(tok, sp, tmp_path):
    tok.save_pretrained(tmp_path)
    for again in (tok, AutoTokenizer.from_pretrained(tmp_path)):
        batch = again(["a", "a longer </s> text"], padding=True)
        assert set(batch) == {"input_ids", "attention_mask"}
        short, long = batch["input_ids"]
        n = len(long) - len(again("a")["input_ids"])
        assert n > 0 and short == [0] * n + again("a")["input_ids"]
        assert batch["attention_mask"] == [[0] * n + [1] * (len(long) - n), [1] * len(long)]
        assert long[2:] == published_ids(sp, "a longer </s> text")
        assert (again.eos_token_id, again.pad_token_id, again.bos_token_id) == (2, 0, 1)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(TEXTS)
def test_decoding_gives_the_text_back(tok, sp, text):
    ids = tok(text, add_special_tokens=False)["input_ids"]
    if not any(i >= sp.vocab_size() for i in ids):  # the special names are silent, as published
        assert tok.decode(ids) == text.replace("▁", " ") == sp.decode(ids)
    assert tok.decode(tok("a b")["input_ids"] + [2]) == "a b"


def test_broken_utf8_is_decoded_as_published(tok, sp):
    broken = [3 + 0xE4, 3 + 0x11, 3 + 0x41, *sp.encode("shop"), 3 + 0xE4, 3 + 0xBD]
    assert tok.decode(broken) == sp.decode(broken)


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, ["'llama'"]),
        ({"model_type": "glm"}, ["needs no conversion"]),
        ({"inner_hidden_size": 64, "position_encoding_2d": True}, ["ChatGLM-6B"]),
        ({"_name_or_path": "THUDM/chatglm3-6b"}, ["ChatGLM3"]),
        ({"_name_or_path": "THUDM/glm-4-9b-chat"}, ["GLM-4"]),
        ({"eos_token_id": [151329, 151336, 151338]}, ["GLM-4"]),
        ({"quantization_bit": 4}, ["int4", "quantization_bit"]),
        ({"quantization_bit": 8}, ["int8"]),
        ({"add_bias_linear": True}, ["add_bias_linear"]),
        ({"multi_query_attention": False}, ["multi_query_attention"]),
        ({"rmsnorm": False}, ["rmsnorm"]),
        ({"post_layer_norm": False}, ["post_layer_norm"]),
        ({"apply_residual_connection_post_layernorm": True}, ["apply_residual_connection_post_layernorm"]),
        ({"pre_seq_len": 128}, ["pre_seq_len"]),
        ({"rope_ratio": 50}, ["rope_ratio"]),
        ({"drop": ["multi_query_attention"]}, ["multi_query_attention"]),
        ({"drop": ["layernorm_epsilon"]}, ["layernorm_epsilon"]),
        ({"padded_vocab_size": 400}, ["padded_vocab_size"]),
    ],
)
def test_config_is_refused(make_dir, refused, tmp_path, changes, words):
    (tmp_path / "in").mkdir()
    make_dir(folder=tmp_path / "in", **changes)
    refused("convert_chatglm2.py", "in", "out", words=words)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1980385902\n"
SECOND, INDEX = "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"


class Payload:
    """Pickled code that would leave a folder behind."""

    def __reduce__(self):
        return os.mkdir, ("run",)


def change_tensors(folder, change):
    tensors = torch.load(folder / SECOND, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / SECOND)


LAST = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
FAULTS = {
    "no directory": (lambda d: [file.unlink() for file in d.iterdir()], ["config.json", "no such file"]),
    "config is no JSON": (lambda d: (d / "config.json").write_text("[1"), ["config.json"]),
    "missing shard": (lambda d: (d / SECOND).unlink(), ["lacks", SECOND]),
    "no weights": (lambda d: [file.unlink() for file in d.glob("*.bin*")], ["neither"]),
    "git-lfs weights": (lambda d: (d / SECOND).write_text(POINTER), [SECOND, "git lfs pull"]),
    "git-lfs tokenizer": (lambda d: (d / "tokenizer.model").write_text(POINTER), ["tokenizer.model", "git lfs pull"]),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), ["tokenizer.model", "no such file"]),
    "damaged tokenizer": (lambda d: (d / "tokenizer.model").write_text("x"), ["tokenizer.model"]),
    "ChatGLM3's tokenizer": (lambda d: (d / "tokenizer_config.json").write_text('"<|assistant|>"'), ["ChatGLM3"]),
    "path in index": (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../a.bin"}}'), [INDEX]),
    "cut-off shard": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-999]), [SECOND, "download"]),
    "pickled code": (lambda d: torch.save({"a": Payload()}, d / SECOND), [SECOND]),
    "no tensors": (lambda d: torch.save({"a": 1}, d / SECOND), [SECOND]),
    "missing tensor": (lambda d: change_tensors(d, lambda t: t.pop(LAST)), [LAST]),
    "foreign tensor": (
        lambda d: change_tensors(d, lambda t: t.update({"transformer.prefix_encoder.weight": torch.ones(1)})),
        ["transformer.prefix_encoder.weight", SECOND],
    ),
    "tensor twice": (
        lambda d: change_tensors(d, lambda t: t.update(torch.load(next(d.glob("*-00001-*")), weights_only=True))),
        ["transformer.embedding.word_embeddings.weight", "two shards"],
    ),
    "other shape": (lambda d: change_tensors(d, lambda t: t.update({LAST: t[LAST].T.contiguous()})), [LAST, "shape"]),
    "quantised tensor": (
        lambda d: change_tensors(d, lambda t: t.update({LAST: t[LAST].to(torch.int8)})),
        [LAST, "quantised"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_directory_is_refused(make_dir, refused, tmp_path, fault):
    (tmp_path / "in").mkdir()
    make_dir(folder=tmp_path / "in")
    spoil, words = FAULTS[fault]
    spoil(tmp_path / "in")
    refused("convert_chatglm2.py", "in", "out", words=words)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False, "vocab_size": 150},
        {"user_defined_symbols": ["<|user|>"]},
        {"model_type": "unigram", "vocab_size": 350},
    ],
)
def test_tokenizer_of_another_kind_is_refused(make_dir, refused, tmp_path, changes):
    (tmp_path / "in").mkdir()
    make_dir(folder=tmp_path / "in")
    train_tokenizer(tmp_path / "in", **changes)
    refused("convert_chatglm2.py", "in", "out", words=["tokenizer.model", "ChatGLM2"])


def test_complete_bin_is_taken_where_safetensors_are_pointers(make_dir, plain, tmp_path):
    source, _, _ = make_dir()
    (source / "model.safetensors").write_text(POINTER)
    out = convert(source, tmp_path / "out")
    assert (out / "model-00001-of-00002.safetensors").read_bytes() == next(plain[1].glob("*-00001-*")).read_bytes()


def test_existing_out_dir_is_left_as_it_is(plain, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    refused("convert_chatglm2.py", plain[0], "out", words=["out", "already"])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


# ---- size and interruption -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_dir(make_dir):
    """A directory with four shards of 40 MB."""
    folder, config, _ = make_dir(
        shards=4, hidden_size=1024, ffn_hidden_size=2048, num_layers=8, num_attention_heads=8, kv_channels=128
    )
    return folder


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_peak_memory_is_below_two_shards(large_dir, tmp_path, kind):
    source = large_dir
    if kind == "safetensors":
        source = tmp_path / "in"
        source.mkdir()
        shards = sorted(large_dir.glob("*.bin"))
        write_weights(source, {k: v for s in shards for k, v in torch.load(s, mmap=True).items()}, 4, kind)
        for name in ("config.json", "tokenizer.model"):
            shutil.copy(large_dir / name, source)
    shard = max(path.stat().st_size for path in source.iterdir())

    def memory(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    convert(source, tmp_path / "out")
    assert shard > 2.5e7 and memory("VmHWM") - before < 1.7 * shard


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on Windows")
def test_kill_in_the_middle_leaves_no_out_dir(large_dir, tmp_path):
    command = [sys.executable, KIT / "convert_chatglm2.py", large_dir, tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".out.*/model-00001*")):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    convert(large_dir, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


# ---- a checkpoint whose answers the published code computed ----------------------------------------------------------


@pytest.fixture(scope="module")
def expected():
    if not (SHARED / "expected.json").is_file():
        pytest.skip("no ../shared/chatglm2-tiny beside the repository")
    return json.loads((SHARED / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shared(expected, tmp_path_factory):
    """(model, tokenizer) converted from the shared checkpoint."""
    out_dir = convert(SHARED, tmp_path_factory.mktemp("shared") / "out")
    return load_model(out_dir), AutoTokenizer.from_pretrained(out_dir)


def close(logits, expected):
    return (logits - torch.tensor(expected)).abs().max() < 1e-3


def greedy(model, **batch):
    """The new ids of each row, up to and with the end token."""
    rows = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


def test_shared_texts_and_names(shared, expected):
    _, tok = shared
    for item in expected["plain"]:
        assert tok(item["text"], split_special_tokens=True)["input_ids"] == item["input_ids"]
        assert tok(item["text"])["input_ids"] == item["input_ids"]
        assert tok(item["text"], add_special_tokens=False)["input_ids"] == item["ids_without_prefix"]
    assert len(tok) == expected["ids"]["vocab_size"] and tok.eos_token_id == expected["ids"]["eos"]
    assert all(tok.convert_tokens_to_ids(name) == expected["ids"][name] for name in SPECIAL)


@torch.no_grad()
def test_shared_chats(shared, expected):
    model, tok = shared
    for item in expected["chat"]:
        batch = tok.apply_chat_template(messages(item["query"], item["history"]), return_tensors="pt")
        assert batch["input_ids"].tolist() == [item["input_ids"]]
        assert tok(item["prompt"])["input_ids"] == item["input_ids"]
        assert close(model(**batch).logits[0, -1], item["last_logits"])
        assert greedy(model, **batch) == [item["greedy"]]
        assert tok.decode(item["greedy"]) == item["greedy_text"]


@torch.no_grad()
def test_shared_losses(shared, expected):
    model, tok = shared
    for item in expected["pairs"]:
        answer = tok(item["answer"], add_special_tokens=False)["input_ids"]
        assert tok(item["prompt"])["input_ids"] + answer + [2] == item["input_ids"]
        ids = torch.tensor([item["input_ids"]])
        labels = ids.clone()
        labels[:, : item["prompt_length"]] = -100
        assert abs(model(input_ids=ids, labels=labels).loss.item() - item["loss"]) < 1e-3


@torch.no_grad()
def test_shared_batch_and_long(shared, expected):
    model, tok = shared
    item = expected["batch"]
    batch = tok(item["prompts"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == item["input_ids"]
    assert batch["attention_mask"].tolist() == item["attention_mask"]
    positions = torch.tensor(item["position_ids"])
    assert close(model(**batch).logits[:, -1], item["last_logits"])
    assert close(model(**batch, position_ids=positions).logits[:, -1], item["last_logits"])
    assert greedy(model, **batch) == item["greedy"]
    ids = torch.tensor([expected["long"]["input_ids"]])
    assert close(model(ids).logits[0, -1], expected["long"]["last_logits"])

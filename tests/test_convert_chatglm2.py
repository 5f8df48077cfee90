"""The conversion against the published maths, written out here in plain torch, and against sentencepiece itself, on
tiny ChatGLM2-layout checkpoints with random weights that are made here.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
import sentencepiece
import torch
from conftest import KIT
from hypothesis import example, given, settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert_chatglm2
from lib.cli import InputError

SHARED = KIT.parent / "shared" / "chatglm2-tiny"
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
CONFIG = {
    **{"_name_or_path": "THUDM/chatglm2-6b", "model_type": "chatglm", "torch_dtype": "float16"},
    **{"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}, "tie_word_embeddings": False},
    **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "padded_vocab_size": 512, "seq_length": 256},
    **{"num_attention_heads": 4, "kv_channels": 8, "multi_query_attention": True, "multi_query_group_num": 2},
    **{"add_bias_linear": False, "add_qkv_bias": True, "apply_residual_connection_post_layernorm": False},
    **{"post_layer_norm": True, "rmsnorm": True, "layernorm_epsilon": 1e-5, "original_rope": True},
    **{"eos_token_id": 2, "pad_token_id": 0},
}
SENTENCES = """The philosophers of geopolitics met people who sold isopropyl alcohol in a shop near the old sea port.
Is a [Round 1] of talks over?  Nobody told us; the answer was 42, or 3.14 at most.
def main():    return [x for x in range(10)]
你好，世界。问：这篇论文属于医学领域吗？答：是。
Soap operas develop people's patience, the philosophy of sops and sopranos.""".splitlines()


# ---- tiny checkpoints ------------------------------------------------------------------------------------------------


def random_tensors(config):
    """The tensors of a checkpoint in float16, norms and biases random too, under their published names."""
    torch.manual_seed(0)
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
    return {f"transformer.{name}": (torch.randn(shape) * 0.3).half() for name, shape in shapes.items()}


def write_weights(folder, tensors, shards=2, kind="bin"):
    """Save `tensors` in so many files, with an index unless it is one. `kind`: bin, old (without zip), safetensors."""
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    save = {"bin": torch.save, "old": partial(torch.save, _use_new_zipfile_serialization=False)}.get(kind, save_file)
    names, weight_map = list(tensors), {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def train_tokenizer(folder, sentences=SENTENCES * 3, **changes):
    """Write tokenizer.model, a sentencepiece model of the published kind but for `changes`."""
    options = {"model_type": "bpe", "vocab_size": 480, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True}
    train = sentencepiece.SentencePieceTrainer.train
    prefix = str(folder / "tokenizer")
    train(sentence_iterator=iter(sentences), model_prefix=prefix, minloglevel=2, **(options | changes))
    (folder / "tokenizer.vocab").unlink()


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory):
    """Bytes of a small sentencepiece model."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_tokenizer(folder)
    return (folder / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def make_dir(tmp_path_factory, sp_model):
    """Write a directory as published, with the given changes of the config; `bare`: tensors without prefix and buffer.
    Returns (folder, config, tensors).
    """

    def make(shards=2, kind="bin", drop=(), folder=None, bare=False, **changes):
        folder = folder or tmp_path_factory.mktemp("chatglm2")
        config = {name: value for name, value in (CONFIG | changes).items() if name not in drop}
        tensors = random_tensors(config)
        if bare:
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            tensors.pop("rotary_pos_emb.inv_freq")
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


WIDE = {"num_attention_heads": 6, "multi_query_group_num": 3, "kv_channels": 12, "rope_ratio": 1}
DEEP = {"num_layers": 3, "multi_query_group_num": 1, "layernorm_epsilon": 0.3}
NO_BIAS = {"num_attention_heads": 2, "kv_channels": 20, "add_qkv_bias": False, "ffn_hidden_size": 20}
FORMS = [
    {},
    {"shards": 1, **WIDE},
    {"shards": 1, "kind": "old"},
    {"shards": 5, "kind": "safetensors", **DEEP},
    {"shards": 1, "kind": "safetensors", "bare": True, **NO_BIAS},
]


@pytest.mark.parametrize("form", FORMS, ids=["as published", "wide heads", "old format", "deep", "no bias, bare names"])
def test_logits_are_those_of_the_published_maths(make_dir, tmp_path, form):
    source, config, tensors = make_dir(**form)
    model = load_model(convert(source, tmp_path / "out"))
    torch.manual_seed(1)
    ids = torch.randint(512, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :18] = 0
    theirs = published_logits(tensors, config, ids, mask)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
    assert theirs.std() > 0.3 and (ours - theirs).abs()[mask.bool()].max() < 1e-3


def test_what_lies_beside_the_weights(plain):
    source, out_dir, _, tensors = plain
    config = (out_dir / "config.json").read_text()
    assert json.loads(config)["dtype"] == "float16" and "auto_map" not in config and not list(out_dir.glob("*.py"))
    assert (out_dir / "MODEL_LICENSE").read_text() == "its terms"
    sizes = [sum(load_file(file)[name].numel() for name in load_file(file)) for file in out_dir.glob("*.safetensors")]
    assert sum(sizes) == sum(tensor.numel() for tensor in tensors.values()) - 2  # without the buffer


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_peak_memory_is_below_two_shards(make_dir, tmp_path, kind):
    sizes = {"hidden_size": 1024, "ffn_hidden_size": 2048, "num_attention_heads": 8, "kv_channels": 128}
    source, *_ = make_dir(shards=4, kind=kind, num_layers=8, **sizes)
    shard = max(path.stat().st_size for path in source.iterdir())

    def memory(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    convert(source, tmp_path / "out")
    assert shard > 2.5e7 and memory("VmHWM") - before < 1.7 * shard


# ---- tokenizer -------------------------------------------------------------------------------------------------------

WORDS = ["sop", "eop", "isopropyl", "philosophy", "geopolitics", "soap", "people", "</s>", "<s>", "<unk>", "<0x0A>"]
WORDS += [*SPECIAL, "[gMASK]sop", "[Round 1]", *"\n\t\r\0▁🙂é", "\n\n", "  ", "问：", "答：", "你好", "naïve"]
PARTS = st.sampled_from(WORDS) | st.sampled_from("aeopslt 01▁.") | st.text(max_size=6)
TEXTS = st.lists(PARTS, max_size=12).map("".join)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
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


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
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


def test_pairs_and_padding(tok, sp, tmp_path):
    prefix = [sp.vocab_size() + 1, sp.vocab_size() + 3]
    tok.save_pretrained(tmp_path)
    for again in (tok, AutoTokenizer.from_pretrained(tmp_path)):
        assert again("a", "b sop")["input_ids"] == [*prefix, *published_ids(sp, "a"), *published_ids(sp, "b sop"), 2]
        batch = again(["a", "a longer </s> text"], padding=True)
        assert set(batch) == {"input_ids", "attention_mask"}
        long = [*prefix, *published_ids(sp, "a longer </s> text")]
        short = [*prefix, *published_ids(sp, "a")]
        n = len(long) - len(short)
        assert n > 0 and batch["input_ids"] == [[0] * n + short, long]
        assert batch["attention_mask"] == [[0] * n + [1] * len(short), [1] * len(long)]
        assert (again.eos_token_id, again.pad_token_id, again.bos_token_id) == (2, 0, 1)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(TEXTS)
def test_decoding_gives_the_text_back(tok, sp, text):
    ids = tok(text, add_special_tokens=False)["input_ids"]
    if max(ids, default=0) < sp.vocab_size():  # the special names are silent, as published
        assert tok.decode(ids) == text.replace("▁", " ") == sp.decode(ids)


def test_odd_ids_are_decoded_as_published(tok, sp):
    broken = [3 + 0xE4, 3 + 0x11, 3 + 0x41, *sp.encode("shop"), 3 + 0xE4, 3 + 0xBD]  # bytes that are not UTF-8
    assert tok.decode(broken) == sp.decode(broken)
    assert tok.decode(tok("a b")["input_ids"] + [2]) == "a b"


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": "glm"}, "needs no conversion"),
        ({"inner_hidden_size": 64}, "ChatGLM-6B"),
        ({"_name_or_path": "THUDM/chatglm3-6b"}, "ChatGLM3"),
        ({"_name_or_path": "THUDM/glm-4-9b-chat"}, "GLM-4"),
        ({"eos_token_id": [151329, 151336]}, "GLM-4"),
        ({"quantization_bit": 4}, "int4"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"multi_query_attention": False}, "multi_query_attention"),
        ({"drop": ["multi_query_attention"]}, "multi_query_attention"),
        ({"rmsnorm": False}, "rmsnorm"),
        ({"post_layer_norm": False}, "post_layer_norm"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ({"pre_seq_len": 128}, "pre_seq_len"),
        ({"rope_ratio": 50}, "rope_ratio"),
        ({"drop": ["layernorm_epsilon"]}, "layernorm_epsilon"),
        ({"attention_dropout": "a"}, "attention_dropout"),
        ({"padded_vocab_size": 400}, "padded_vocab_size"),
    ],
)
def test_config_is_refused(make_dir, refused, tmp_path, changes, words):
    (tmp_path / "in").mkdir()
    make_dir(folder=tmp_path / "in", **changes)
    refused("convert_chatglm2.py", "in", "out", words=[words])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1980385902\n"
SECOND, INDEX = "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"
LAST = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
FIRST = "transformer.embedding.word_embeddings.weight"


class Payload:
    """Pickled code that would leave a folder behind."""

    def __reduce__(self):
        return os.mkdir, ("run",)


def change_shard(tensors):
    """A function that adds `tensors`, made from the second shard's, to the second shard; None removes one."""

    def change(folder):
        old = torch.load(folder / SECOND, weights_only=True)
        new = old | tensors(old)
        torch.save({name: tensor for name, tensor in new.items() if tensor is not None}, folder / SECOND)

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


FAULTS = {
    "no directory": (lambda d: [file.unlink() for file in d.iterdir()], ["config.json", "no such file"]),
    "config is not JSON": (write("config.json", "[1"), ["config.json"]),
    "missing shard": (lambda d: (d / SECOND).unlink(), ["lacks", SECOND]),
    "no weights": (lambda d: [file.unlink() for file in d.glob("*.bin*")], ["neither"]),
    "git-lfs weights": (write(SECOND, POINTER), [SECOND, "git lfs pull"]),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), ["tokenizer.model", "no such file"]),
    "damaged tokenizer": (write("tokenizer.model", "x"), ["tokenizer.model"]),
    "ChatGLM3's tokenizer": (write("tokenizer_config.json", '"<|assistant|>"'), ["ChatGLM3"]),
    "path in index": (write(INDEX, '{"weight_map": {"a": "../a.bin"}}'), [INDEX]),
    "cut-off shard": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-999]), [SECOND, "download"]),
    "pickled code": (lambda d: torch.save({"a": Payload()}, d / SECOND), [SECOND]),
    "no tensors": (lambda d: torch.save({"a": 1}, d / SECOND), [SECOND]),
    "missing tensor": (change_shard(lambda old: {LAST: None}), [LAST]),
    "foreign tensor": (change_shard(lambda old: {"prefix_encoder.weight": torch.ones(1)}), ["prefix_encoder", SECOND]),
    "tensor twice": (change_shard(lambda old: {FIRST: torch.ones(512, 32)}), [FIRST, "two shards"]),
    "other shape": (change_shard(lambda old: {LAST: old[LAST].T.contiguous()}), [LAST, "shape"]),
    "quantised tensor": (change_shard(lambda old: {LAST: old[LAST].to(torch.int8)}), [LAST, "quantised"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_directory_is_refused(make_dir, refused, tmp_path, fault):
    (tmp_path / "in").mkdir()
    make_dir(folder=tmp_path / "in")
    damage, words = FAULTS[fault]
    damage(tmp_path / "in")
    refused("convert_chatglm2.py", "in", "out", words=words)


OTHER_KINDS = [
    {"normalization_rule_name": "nmt_nfkc"},
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": True},
    {"byte_fallback": False, "vocab_size": 150},
    {"user_defined_symbols": ["<|user|>"]},
    {"model_type": "unigram", "vocab_size": 350},
]


@pytest.mark.parametrize("changes", OTHER_KINDS)
def test_tokenizer_of_another_kind_is_refused(tmp_path, changes):
    train_tokenizer(tmp_path, **changes)
    with pytest.raises(InputError, match="tokenizer.model.*ChatGLM2"):
        convert_chatglm2.build_tokenizer(tmp_path / "tokenizer.model")


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
        assert tok(item["text"])["input_ids"] == item["input_ids"]
        assert tok(item["text"], add_special_tokens=False)["input_ids"] == item["ids_without_prefix"]
    assert len(tok) == expected["ids"]["vocab_size"] and tok.eos_token_id == expected["ids"]["eos"]
    assert all(tok.convert_tokens_to_ids(name) == expected["ids"][name] for name in SPECIAL)


@torch.no_grad()
def test_shared_chats_and_losses(shared, expected):
    model, tok = shared
    for item in expected["chat"]:
        batch = tok.apply_chat_template(messages(item["query"], item["history"]), return_tensors="pt")
        assert batch["input_ids"].tolist() == [item["input_ids"]] == [tok(item["prompt"])["input_ids"]]
        assert close(model(**batch).logits[0, -1], item["last_logits"])
        assert greedy(model, **batch) == [item["greedy"]]
        assert tok.decode(item["greedy"]) == item["greedy_text"]
    for item in expected["pairs"]:
        answer = tok(item["answer"], add_special_tokens=False)["input_ids"]
        assert tok(item["prompt"])["input_ids"] + answer + [2] == item["input_ids"]
        ids = torch.tensor([item["input_ids"]])
        labels = ids.clone()
        labels[:, : item["prompt_length"]] = -100
        assert close(model(input_ids=ids, labels=labels).loss, item["loss"])


@torch.no_grad()
def test_shared_batch_and_long(shared, expected):
    model, tok = shared
    item = expected["batch"]
    batch = tok(item["prompts"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == item["input_ids"]
    assert batch["attention_mask"].tolist() == item["attention_mask"]
    positions = torch.tensor(item["position_ids"])
    for more in ({}, {"position_ids": positions}):
        assert close(model(**batch, **more).logits[:, -1], item["last_logits"])
    assert greedy(model, **batch) == item["greedy"]
    ids = torch.tensor([expected["long"]["input_ids"]])
    assert close(model(ids).logits[0, -1], expected["long"]["last_logits"])

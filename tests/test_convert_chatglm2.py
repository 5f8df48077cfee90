"""The conversion against the published maths, written out here in plain torch, and against sentencepiece itself, on
tiny ChatGLM2-layout checkpoints with random weights that are made here.
"""

import json
import random
from pathlib import Path

import convert_chatglm2
from conftest import call, edit_json
from lib.cli import InputError

import pytest
import sentencepiece
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_hub import Payload
from transformers import AutoModelForCausalLM, AutoTokenizer

SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
PREFIX = [481, 483]  # [gMASK] sop, after the 480 pieces of train_tokenizer
CONFIG = {
    **{"_name_or_path": "THUDM/chatglm2-6b", "model_type": "chatglm", "eos_token_id": 2, "pad_token_id": 0},
    **{"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}, "torch_dtype": "float16"},
    **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "padded_vocab_size": 512, "seq_length": 256},
    **{"num_attention_heads": 4, "kv_channels": 8, "multi_query_attention": True, "multi_query_group_num": 2},
    **{"add_bias_linear": False, "add_qkv_bias": True, "post_layer_norm": True, "rmsnorm": True},
    **{"layernorm_epsilon": 1e-5, "original_rope": True, "apply_residual_connection_post_layernorm": False},
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


def train_tokenizer(folder, sentences=SENTENCES * 3, **changes):
    """Write tokenizer.model, a sentencepiece model of the published kind but for `changes`; return it, loaded."""
    options = {"model_type": "bpe", "vocab_size": 480, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True}
    train = sentencepiece.SentencePieceTrainer.train
    prefix = str(folder / "tokenizer")
    train(sentence_iterator=iter(sentences), model_prefix=prefix, minloglevel=2, **(options | changes))
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def make_dir(folder, shards=2, safetensors=False, **changes):
    """Write a directory as published, with these changes of the config. Returns (config, tensors)."""
    config = CONFIG | changes
    tensors = random_tensors(config)
    folder.mkdir()
    train_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "MODEL_LICENSE").write_text("its terms")
    stem, suffix, save = ("model", "safetensors", save_file) if safetensors else ("pytorch_model", "bin", torch.save)
    names = list(tensors)
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        number = f"-{i + 1:05}-of-{shards:05}" if shards > 1 else ""
        save({name: tensors[name] for name in part}, folder / f"{stem}{number}.{suffix}")
    return config, tensors


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A converted directory."""
    folder = tmp_path_factory.mktemp("plain")
    make_dir(folder / "in")
    assert call(folder, "convert_chatglm2.py", "in", "out").returncode == 0
    return folder / "out"


@pytest.fixture(scope="module")
def tok(plain):
    return AutoTokenizer.from_pretrained(plain)


@pytest.fixture(scope="module")
def sp(plain):
    return sentencepiece.SentencePieceProcessor(model_file=str(plain.parent / "in" / "tokenizer.model"))


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


# ---- weights ---------------------------------------------------------------------------------------------------------

FORMS = {
    "as published": {},
    "wide heads": {"shards": 1, "num_attention_heads": 6, "multi_query_group_num": 3, "kv_channels": 12},
    "deep": {"shards": 5, "safetensors": True, "num_layers": 3, "multi_query_group_num": 1, "layernorm_epsilon": 0.3},
    "no bias": {"shards": 1, "safetensors": True, "add_qkv_bias": False, "kv_channels": 20, "ffn_hidden_size": 20},
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_published_maths(kit, tmp_path, form):
    config, tensors = make_dir(tmp_path / "in", **FORMS[form])
    done = kit("convert_chatglm2.py", "in", "out")
    assert done.returncode == 0, done.stderr
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    torch.manual_seed(1)
    ids = torch.randint(512, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :18] = 0
    theirs = published_logits(tensors, config, ids, mask)
    with_adapter = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()  # a new one changes nothing
    with torch.no_grad():
        ours = with_adapter(input_ids=ids, attention_mask=mask).logits
    assert theirs.std() > 0.3 and (ours - theirs).abs()[mask.bool()].max() < 1e-3


def test_what_lies_beside_the_weights(plain):
    config = (plain / "config.json").read_text()
    assert json.loads(config)["dtype"] == "float16" and "auto_map" not in config and not list(plain.glob("*.py"))
    assert json.loads((plain / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (plain / "MODEL_LICENSE").read_text() == "its terms"
    assert {tensor.dtype for tensor in load_file(plain / "model.safetensors").values()} == {torch.float16}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from Linux's /proc")
def test_weights_stay_in_their_files(tmp_path):
    def memory():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    sizes = {"hidden_size": 1024, "ffn_hidden_size": 2048, "num_attention_heads": 8, "kv_channels": 128}
    make_dir(tmp_path / "in", num_layers=8, **sizes)
    config = convert_chatglm2.convert_config(tmp_path / "in")
    before = memory()
    model = convert_chatglm2.build_model(tmp_path / "in", config)
    assert model.num_parameters() > 5e7 and memory() - before < 2e7


# ---- tokenizer -------------------------------------------------------------------------------------------------------

WORDS = ["sop", "eop", "isopropyl", "philosophy", "geopolitics", "soap", "people", "</s>", "<s>", "<unk>", "<0x0A>"]
WORDS += [*SPECIAL, "[gMASK]sop", "[Round 1]", *"\n\t\r\0▁🙂é", "\n\n", "  ", "问：", "答：", "你好", "naïve"]
WORDS += [*"aeopslt 01.", *map(chr, range(0x20, 0xD800, 997))]


def draw_texts(count=200):
    """Odd texts, and others of up to twelve words or characters drawn at random."""
    draw = random.Random(0)
    odd = ["", "[gMASK]sop", "[gMASK]sop[Round 1]", "geopolitics of isopropyl philosophy eop"]
    return odd + ["".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]


def test_ids_are_those_of_sentencepiece(tok, sp):
    for text in draw_texts():
        if text.startswith("[gMASK]sop[Round 1]"):  # the head of a chat, see below
            continue
        ids = published_ids(sp, text)
        assert tok(text)["input_ids"] == PREFIX + ids, text
        assert tok(text, add_special_tokens=False)["input_ids"] == ids
        if max(ids, default=0) < sp.vocab_size():  # sentencepiece does not know the special names
            assert tok.decode(ids) == text.replace("▁", " ") == sp.decode(ids)


def test_prompt_is_the_published_one(tok, sp):
    for query in draw_texts():
        prompt = f"[Round 1]\n\n问：{query}\n\n答："
        chat = [{"role": "user", "content": query}]
        ids = tok.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ids == PREFIX + published_ids(sp, prompt), query
        assert tok.apply_chat_template(chat, tokenize=False) == "[gMASK]sop" + prompt


def test_a_chat_of_another_form_is_refused(tok):
    user, system = {"role": "user", "content": "Q"}, {"role": "system", "content": "S"}
    parts = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
    for chat in ([system], [system, user], [user, user], [parts]):
        with pytest.raises(Exception, match="single user message"):
            tok.apply_chat_template(chat)


def test_a_piece_spelled_as_a_special_name_gets_its_id_as_published(tmp_path):
    sentences = [f"{a}sop{b}" for a in "abcdefghi" for b in "jklmnqrtu"]
    sp = train_tokenizer(tmp_path, sentences, vocab_size=290)
    tok = convert_chatglm2.build_tokenizer(tmp_path / "tokenizer.model")
    assert "sop" in sp.encode("philosophy", out_type=str)
    for text in ("philosophy", "sop", "sopsop", "[gMASK]sop", "Aesop eop"):
        assert tok(text, add_special_tokens=False)["input_ids"] == published_ids(sp, text)
    assert tok.convert_tokens_to_ids(SPECIAL) == [sp.vocab_size() + i for i in range(5)]
    assert len(tok) == sp.vocab_size() + 5


def test_padding_is_on_the_left(tok):
    short, long = (tok(text)["input_ids"] for text in ("a", "a longer </s> text"))
    batch = tok(["a", "a longer </s> text"], padding=True)
    n = len(long) - len(short)
    masks = [[0] * n + [1] * len(short), [1] * len(long)]
    assert batch == {"input_ids": [[0] * n + short, long], "attention_mask": masks}
    assert (tok.eos_token_id, tok.pad_token_id, tok.bos_token_id) == (2, 0, 1)


def test_bytes_that_are_not_utf8_are_decoded_as_published(tok, sp):
    broken = [3 + 0xE4, 3 + 0x11, 3 + 0x41, *sp.encode("shop"), 3 + 0xE4, 3 + 0xBD]
    assert tok.decode([*broken, 2], skip_special_tokens=True) == sp.decode(broken)


# ---- refused ---------------------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1980385902\n"
SECOND = "pytorch_model-00002-of-00002.bin"


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def third_shard(content):
    """Write one more file. Its tensors take the place of those of the same name in the first two."""
    return lambda folder: torch.save(content, folder / "pytorch_model-3.bin")


FAULTS = {
    "plain GLM": (edit_config(model_type="glm"), ["'glm'", "needs no conversion"]),
    "int4": (edit_config(quantization_bit=4), ["quantization_bit"]),
    "ChatGLM3": (edit_config(_name_or_path="THUDM/chatglm3-6b"), ["ChatGLM3"]),
    "other size": (edit_config(padded_vocab_size=400), ["size mismatch", "embed_tokens"]),
    "other folder": (lambda d: (d / "config.json").unlink(), ["config.json", "no such file"]),
    "no weights": (lambda d: [file.unlink() for file in d.glob("*.bin")], ["pytorch_model*.bin"]),
    "missing shard": (lambda d: (d / SECOND).unlink(), ["download", "Missing key", "model.layers.1.self_attn.q_proj"]),
    "cut-off shard": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-999]), [SECOND, "download"]),
    "git-lfs weights": (write(SECOND, POINTER), [SECOND, "git lfs pull"]),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), ["tokenizer.model", "missing"]),
    "GLM-4's tokenizer": (write("tokenizer.model", "IQ== 0\n"), ["tokenizer.model"]),
    "pickled code": (third_shard({"a": Payload("run")}), ["pytorch_model-3.bin"]),
    "foreign tensor": (third_shard({"b": torch.ones(1)}), ["Unexpected key", '"b"']),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_or_damaged_model_is_refused(refused, tmp_path, fault):
    make_dir(tmp_path / "in")
    damage, words = FAULTS[fault]
    damage(tmp_path / "in")
    refused("convert_chatglm2.py", "in", "out", words=words)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False, "vocab_size": 150},
        {"model_type": "unigram", "vocab_size": 350},
    ],
)
def test_tokenizer_of_another_kind_is_refused(tmp_path, changes):
    train_tokenizer(tmp_path, **changes)
    with pytest.raises(InputError, match="tokenizer.model.*ChatGLM2"):
        convert_chatglm2.build_tokenizer(tmp_path / "tokenizer.model")


def test_another_folder_is_not_overwritten(refused, tmp_path):
    make_dir(tmp_path / "in")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    refused("convert_chatglm2.py", "in", "thesis", words=["thesis", "already"])

"""Turn the published ChatGLM2-6B directory into one that transformers loads without remote code.

    python convert_chatglm2.py chatglm2-6b chatglm2-6b-plain
    python lora_finetune.py --model chatglm2-6b-plain

In:  CHATGLM2_DIR as published: config.json, tokenizer.model, pytorch_model*.bin or *.safetensors. Its Python isn't run.
Out: OUT_DIR with the same weights as GlmForCausalLM, in the same dtype (safetensors shards, config.json,
     generation_config.json) and a fast tokenizer with chat template (tokenizer.json, tokenizer_config.json,
     chat_template.jinja). AutoModelForCausalLM, AutoTokenizer and peft load it like any other model.

docs/chatglm2.md says what is converted, what is refused, and how far it is the published model.
"""

import argparse
import shutil
from pathlib import Path

from lib.cli import InputError, Parser, log, run_script
from lib.files import atomic_write, read_json
from lib.hub import check_pointer, first_line

import sentencepiece
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

DOWNLOAD = "download it again"
# Config keys that tell other models and other maths: the value that can be converted, and the published default.
FLAGS = {
    "model_type": ("chatglm", None),
    "quantization_bit": (0, 0),
    "eos_token_id": (2, 2),  # the first ChatGLM has another, GLM-4 a list
    "pre_seq_len": (None, None),  # of P-tuned checkpoints
    "rope_ratio": (1, 1),  # of chatglm2-6b-32k
}
# Parts of the published tensors' names, and what GlmForCausalLM calls them.
NAMES = {
    "transformer.": "",
    "embedding.word_embeddings": "model.embed_tokens",
    "encoder.layers": "model.layers",
    "encoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
    "self_attention": "self_attn",
    "dense_h_to_4h": "gate_up_proj",
    "dense_4h_to_h": "down_proj",
    "dense": "o_proj",
}
BUFFER = "rotary_pos_emb.inv_freq"  # GlmForCausalLM computes it itself
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]  # their ids follow those of the sentencepiece model
UNREACHABLE = "\U0010ffff"  # appended to a piece that no text may become
ODD_TEXT = "  ﬁ：\t\n b 🙂  "  # other sentencepiece models change ligatures, blanks, line ends or unknown characters
# The published build_prompt for one question, which is what the kit asks.
CHAT_TEMPLATE = """\
{%- if messages | length != 1 or messages[0].role != 'user' or messages[0].content is not string -%}
  {{- raise_exception('ChatGLM2 is asked one question: a single user message whose content is a string') -}}
{%- endif -%}
{{- '[gMASK]sop[Round 1]\\n\\n问：' ~ messages[0].content ~ '\\n\\n答：' -}}"""


# ---- config ----------------------------------------------------------------------------------------------------------


def convert_config(source):
    """GlmConfig for the ChatGLM2 directory `source`. Raises InputError for other models and for settings that
    GlmForCausalLM can't compute.
    """
    path = source / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; CHATGLM2_DIR is the folder that holds config.json")
    old = read_json(path, remedy=DOWNLOAD, model_type=str)
    remedy = "take THUDM/chatglm2-6b in full precision, or a model that needs no conversion"
    for name, (wanted, default) in FLAGS.items():
        value = old.get(name, default)
        if value != wanted and (value or wanted):  # None, False and 0 are the same
            raise InputError(f"{path}: {name} is {value!r}, and only {wanted!r} can be converted: {remedy}")
    if "chatglm3" in str(old.get("_name_or_path")).lower():  # the same tensors, but another prompt
        raise InputError(f"{path} is ChatGLM3's, which has another prompt: {remedy}")
    return GlmConfig(
        vocab_size=old["padded_vocab_size"],
        hidden_size=old["hidden_size"],
        intermediate_size=old["ffn_hidden_size"],
        num_hidden_layers=old["num_layers"],
        num_attention_heads=old["num_attention_heads"],
        num_key_value_heads=old["multi_query_group_num"],
        head_dim=old["kv_channels"],
        attention_bias=old["add_qkv_bias"],
        max_position_embeddings=old["seq_length"],
        rms_norm_eps=old["layernorm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        eos_token_id=2,
        pad_token_id=0,
    )


# ---- weights ---------------------------------------------------------------------------------------------------------


def read_weights(source):
    """{published name: tensor} of the safetensors files in `source`, or else of its .bin files. The tensors stay in the
    files until they are written (mmap), so that 12 GB need not fit into memory.
    """
    paths = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not paths:
        raise InputError(f"{source} has neither *.safetensors nor pytorch_model*.bin: {DOWNLOAD}")
    tensors = {}
    for path in paths:
        check_pointer(path)
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:
                tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a foreign or cut-off file may raise anything
            raise InputError(f"{path} can't be read as plain tensors ({first_line(error)}): {DOWNLOAD}") from None
    return tensors


def rename_tensors(tensors, config):
    """The same tensors with the names of GlmForCausalLM. The rows of query_key_value are cut into q, k and v."""
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(BUFFER):
            continue
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            for letter, part in zip("qkv", tensor.split([query, key, key])):
                renamed[name.replace("query_key_value", f"{letter}_proj")] = part
        else:
            renamed[name] = tensor
    return renamed


def build_model(source, config):
    """GlmForCausalLM with the weights of `source`. Raises InputError unless all tensors are there and fit."""
    tensors = read_weights(source)
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    try:
        model.load_state_dict(rename_tensors(tensors, config), assign=True)
    except RuntimeError as error:
        fault = " ".join(str(error).split())[:500]
        raise InputError(f"{source}: files are missing, or of another model: {DOWNLOAD} ({fault})") from None
    return model


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def make_merges(sp, pieces):
    """The merges of a BPE that cuts texts as sentencepiece does, the strongest first: list of (left, right).
    Sentencepiece joins the neighbours whose joint piece scores best, so every way to cut a piece in two is a merge.
    """
    kinds = (sp.is_byte, sp.is_control, sp.is_unknown, sp.is_unused)
    normal = [i for i in range(len(pieces)) if not any(kind(i) for kind in kinds)]
    scores = {pieces[i]: sp.get_score(i) for i in normal}
    return generate_merges(scores, scores)


def add_prefix_rules(tokenizer):
    """Put ▁ in front of a text and for its blanks. The special names are not added tokens, which would be cut out of
    words and of what people write: only at the head of a rendered chat [gMASK] and sop are split off and found whole.
    """
    replace = normalizers.Replace
    front = r"\A(?!\[gMASK\]sop\[Round 1\]|\z)|(?<=\A\[gMASK\]sop)(?=\[Round 1\])"
    tokenizer.normalizer = normalizers.Sequence([replace(Regex(front), "▁"), replace(" ", "▁")])
    head = r"\A\[gMASK\]|(?<=\A\[gMASK\])sop"  # any other text begins with ▁
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(head), "isolated")


def check_ids(path, tokenizer, sp, pieces, ids):
    """Compare with sentencepiece itself on every piece, alone and beside another one. `ids`: {piece or name: id}.
    Raises InputError where they differ.
    """
    pairs = [piece + pieces[i * 7919 % len(pieces)] for i, piece in enumerate(pieces)]
    texts = [ODD_TEXT, *pieces, *pairs]
    for text, ours in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False)):
        if ours.ids != [ids.get(piece) for piece in sp.encode(text, out_type=str)]:
            raise InputError(f"{path}: {text!r} gets other ids than sentencepiece gives: unlike ChatGLM2's")


def build_tokenizer(path):
    """The published ChatGLMTokenizer over the sentencepiece model `path`, as a fast tokenizer: the same ids for any
    text. Raises InputError where the model is of another kind.
    """
    check_pointer(path)
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise InputError(f"{path} is missing or not a sentencepiece model: {DOWNLOAD}") from None
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    special = {name: len(pieces) + i for i, name in enumerate(SPECIAL)}
    # A piece that is spelled like a special name gets that one's id, as published; no text gets the piece's own id.
    vocab = {piece + UNREACHABLE * (piece in special): i for i, piece in enumerate(pieces)} | special
    tokenizer = Tokenizer(models.BPE(vocab, make_merges(sp, pieces), byte_fallback=True, ignore_merges=True))
    add_prefix_rules(tokenizer)
    # ByteFallback makes U+FFFD of a whole run of bytes that isn't UTF-8, so ASCII bytes are decoded before it.
    steps = [decoders.Replace(f"<0x{i:02X}>", chr(i)) for i in range(128)]
    steps += [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("[gMASK] sop $A", special_tokens=list(special.items()))
    check_ids(path, tokenizer, sp, pieces, vocab)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=pieces[0],
        bos_token=pieces[1],
        eos_token=pieces[2],
        pad_token=pieces[0],
        padding_side="left",
        split_special_tokens=True,  # "</s>" in a paper is text, as in the published tokenizer
        chat_template=CHAT_TEMPLATE,
    )


# ---- main ------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="CHATGLM2_DIR", help="the published directory")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="written as a whole or not at all")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.out_dir.exists():
        raise InputError(f"{args.out_dir} exists already: remove it or give another OUT_DIR")
    model = build_model(args.source, convert_config(args.source))
    tokenizer = build_tokenizer(args.source / "tokenizer.model")
    with atomic_write(args.out_dir) as part:
        model.save_pretrained(part, max_shard_size="2GB")
        tokenizer.save_pretrained(part)
        for path in args.source.glob("*LICENSE*"):  # the terms belong to every copy
            shutil.copy(path, part)
    log(f"wrote {args.out_dir}: {model.config.num_hidden_layers} layers, {len(tokenizer)} tokens, {model.dtype}")


if __name__ == "__main__":
    run_script(main)

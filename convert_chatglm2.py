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
import re
import shutil
import zipfile
from itertools import chain
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import GenerationConfig, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from lib.cli import InputError, Parser, few, log, run_script
from lib.hub import check_links, check_pointer
from lib.results import atomic_write, read_json, write_json

# Config keys that change the maths: the value that GlmForCausalLM computes, and the published default.
FLAGS = {
    "add_bias_linear": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
    "fp32_residual_connection": (False, False),
    "multi_query_attention": (True, False),
    "original_rope": (True, True),
    "post_layer_norm": (True, True),
    "pre_seq_len": (None, None),
    "rmsnorm": (True, True),
    "rope_ratio": (1, 1),
}
# Tensors of a layer, and those that each becomes: its rows in this order.
LAYER = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "post_attention_layernorm.weight": ["post_attention_layernorm.weight"],
    "self_attention.query_key_value.weight": [f"self_attn.{letter}_proj.weight" for letter in "qkv"],
    "self_attention.query_key_value.bias": [f"self_attn.{letter}_proj.bias" for letter in "qkv"],
    "self_attention.dense.weight": ["self_attn.o_proj.weight"],
    "mlp.dense_h_to_4h.weight": ["mlp.gate_up_proj.weight"],
    "mlp.dense_4h_to_h.weight": ["mlp.down_proj.weight"],
}
BUFFER = "rotary_pos_emb.inv_freq"  # GlmForCausalLM computes it itself
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]  # their ids follow those of the sentencepiece model
UNREACHABLE = "\U0010ffff"  # appended to a piece that no text may become
DOWNLOAD = "download it again"
# The published build_prompt. ChatGLM2 knows no system message, so it opens the first question. The cue 答： ends every
# question, with and without add_generation_prompt; the end token is not part of it.
CHAT_TEMPLATE = """\
{%- set state = namespace(round=0, system='', next='user') -%}
[gMASK]sop
{%- for message in messages -%}
  {%- if message.content is not string -%}
    {{- raise_exception('ChatGLM2 reads text only: content must be a string') -}}
  {%- elif message.role == 'system' and loop.first -%}
    {%- set state.system = message.content ~ '\\n\\n' -%}
  {%- elif message.role != state.next -%}
    {{- raise_exception('after at most one system message, user and assistant must take turns') -}}
  {%- elif message.role == 'user' -%}
    {%- set state.round = state.round + 1 -%}
    {{- '\\n\\n' if state.round > 1 -}}
    {{- '[Round ' ~ state.round ~ ']\\n\\n问：' ~ state.system ~ message.content ~ '\\n\\n答：' -}}
    {%- set state.system = '' -%}
    {%- set state.next = 'assistant' -%}
  {%- else -%}
    {{- message.content -}}
    {%- set state.next = 'user' -%}
  {%- endif -%}
{%- endfor -%}"""


# ---- config ----------------------------------------------------------------------------------------------------------


def name_other_model(source, old):
    """Which other model the directory holds, by its config `old` and its tokenizer's files; None for ChatGLM2."""
    name = str(old.get("_name_or_path")).lower()
    files = [source / file for file in ("tokenizer_config.json", "special_tokens_map.json", "tokenization_chatglm.py")]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    tokenizer = "".join(texts).lower()
    if old.get("model_type") in ("glm", "glm4"):
        return f"a {old['model_type']} model, which needs no conversion: use it as it is"
    if old.get("model_type") != "chatglm":
        return f"a model of type {old.get('model_type')!r}"
    if "inner_hidden_size" in old or "position_encoding_2d" in old:
        return "ChatGLM-6B, the first: another architecture"
    if "glm-4" in name or "chatglm4" in tokenizer or isinstance(old.get("eos_token_id"), list):
        return "GLM-4: take its plain edition, whose name ends in -hf"
    if "chatglm3" in name + tokenizer or "<|user|>" in tokenizer or "<|assistant|>" in tokenizer:
        return "ChatGLM3: another prompt form and other special tokens"
    if old.get("quantization_bit"):
        return f"int{old['quantization_bit']} weights (quantization_bit): take the full chatglm2-6b"
    return None


def convert_config(source):
    """GlmConfig for the ChatGLM2 directory `source`. Raises InputError for other models and for settings that
    GlmForCausalLM can't compute.
    """
    path = source / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; CHATGLM2_DIR is the folder that holds config.json")
    old = read_json(path, remedy=DOWNLOAD, model_type=str)
    other = name_other_model(source, old)
    if other:
        raise InputError(f"{source} holds {other}. Only ChatGLM2 in full precision is converted")
    for name, (wanted, default) in FLAGS.items():
        value = old.get(name, default)
        if value != wanted and (value or wanted):  # None, False and 0 are the same
            raise InputError(f"{path}: {name} is {value!r}, and only {wanted!r} can be converted")
    try:
        config = GlmConfig(
            vocab_size=old["padded_vocab_size"],
            hidden_size=old["hidden_size"],
            intermediate_size=old["ffn_hidden_size"],
            num_hidden_layers=old["num_layers"],
            num_attention_heads=old["num_attention_heads"],
            num_key_value_heads=old["multi_query_group_num"],
            head_dim=old["kv_channels"],
            attention_bias=old.get("add_qkv_bias", False),
            attention_dropout=old.get("attention_dropout", 0.0),
            max_position_embeddings=old["seq_length"],
            rms_norm_eps=old["layernorm_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            eos_token_id=old.get("eos_token_id") or 2,
            pad_token_id=old.get("pad_token_id") or 0,
            architectures=["GlmForCausalLM"],
        )
    except KeyError as error:
        raise InputError(f"{path}: no {error}: {DOWNLOAD}") from None
    except Exception as error:  # GlmConfig checks types, with errors of huggingface_hub's own kind
        raise InputError(f"{path}: {error}") from None
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 4:
        raise InputError(f"{path}: num_attention_heads must be a multiple of multi_query_group_num, kv_channels of 4")
    return config


# ---- weights ---------------------------------------------------------------------------------------------------------


def check_files(paths):
    """Raise InputError where one of these files is missing or a git-lfs pointer."""
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{paths[0].parent} lacks {few(missing, 20)}: no such file, download what is missing")
    for path in paths:
        check_pointer(path)


def list_shards(source, single):
    """The weight files named by an index, or the file `single`; sorted paths, [] if there is neither."""
    index = source / f"{single}.index.json"
    if index.is_file():
        files = read_json(index, remedy=DOWNLOAD, weight_map=dict)["weight_map"].values()
        return sorted({source / str(file) for file in files})
    return [source / single] if (source / single).exists() else []


def find_shards(source):
    """The weight files of `source`, sorted: safetensors if all of them are there, else .bin. Raises InputError that
    names what is missing.
    """
    faults = []
    for single in ("model.safetensors", "pytorch_model.bin"):
        shards = list_shards(source, single)
        if shards:
            try:
                check_files(shards)
                return shards
            except InputError as error:
                faults.append(error)
    if faults:
        raise faults[0]
    raise InputError(f"{source} holds neither model.safetensors nor pytorch_model.bin, nor an index: {DOWNLOAD}")


def read_shard(path):
    """{name: tensor} of a weight file. Tensors stay in the file until they are used, where its format permits."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a foreign or cut-off file may raise anything
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path} can't be read as plain tensors ({reason}): {DOWNLOAD}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{path} holds other things than named tensors: {DOWNLOAD}")
    return tensors


def plan_tensors(config):
    """Returns (plan, shapes). plan: for each tensor of the source, without 'transformer.', the names of those that it
    becomes, in the order of its rows. shapes: the shape of each tensor of GlmForCausalLM.
    """
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in GlmForCausalLM(config).state_dict().items()}
    plan = {
        "embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
        "encoder.final_layernorm.weight": ["model.norm.weight"],
        "output_layer.weight": ["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for old, new in LAYER.items():
            if not old.endswith(".bias") or config.attention_bias:
                plan[f"encoder.layers.{layer}.{old}"] = [f"model.layers.{layer}.{name}" for name in new]
    unlike = set(chain.from_iterable(plan.values())) ^ set(shapes)
    if unlike:
        raise RuntimeError(f"the GlmForCausalLM of this transformers has other tensors: {sorted(unlike)}")
    return plan, shapes


def convert_shard(tensors, plan, shapes, where):
    """{name: tensor} for GlmForCausalLM, from the tensors of one shard. Removes from `plan` what it has converted."""
    converted, unknown = {}, []
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("transformer.")
        if name == BUFFER:
            continue
        if name.endswith("weight_scale") or not tensor.is_floating_point():
            raise InputError(f"{where}: {full_name} is quantised ({tensor.dtype}): take the full chatglm2-6b")
        if name not in plan:
            unknown.append(full_name)
            continue
        targets = plan.pop(name)
        rows = [shapes[target][0] for target in targets]
        wanted = [sum(rows), *shapes[targets[0]][1:]]
        if list(tensor.shape) != wanted:
            raise InputError(f"{where}: {full_name} has the shape {list(tensor.shape)}, config.json asks for {wanted}")
        for target, part in zip(targets, tensor.split(rows)):
            converted[target] = part.contiguous()
    if unknown:
        raise InputError(f"{where}: not tensors of this ChatGLM2, or in two shards: {', '.join(unknown[:20])}")
    return converted


def convert_weights(shards, config, out_dir):
    """Write the weights of `shards` to `out_dir`, one safetensors file a shard, one at a time; set config.dtype."""
    plan, shapes = plan_tensors(config)
    weight_map, total = {}, 0
    with tqdm(total=sum(path.stat().st_size for path in shards), unit="B", unit_scale=True, desc="weights") as bar:
        for number, path in enumerate(shards, 1):
            tensors = convert_shard(read_shard(path), plan, shapes, path)
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file(tensors, out_dir / file, metadata={"format": "pt"})
            if "model.embed_tokens.weight" in tensors:
                config.dtype = tensors["model.embed_tokens.weight"].dtype
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
            del tensors  # before the next shard is opened
            bar.update(path.stat().st_size)
    if plan:
        missing = ", ".join(f"transformer.{name}" for name in list(plan)[:20])
        raise InputError(f"{shards[0].parent}: {len(plan)} tensors are in none of the shards: {missing}")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out_dir / "model.safetensors.index.json", index)


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def read_sentencepiece(path):
    """The sentencepiece model `path`. Raises InputError if it is of another kind than ChatGLM2's."""
    check_files([path])
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise InputError(f"{path} is not a sentencepiece model: {DOWNLOAD}") from None
    has_bytes = sum(map(sp.is_byte, range(sp.vocab_size()))) == 256
    if not has_bytes or min(sp.bos_id(), sp.eos_id()) < 0 or sp.normalize("  ﬁ：\t\n b ") != "▁▁▁ﬁ：\t\n▁b▁":
        raise InputError(f"{path}: ChatGLM2's has byte pieces, <s>, </s>, keeps every character and puts ▁ in front")
    return sp


def make_merges(sp, pieces):
    """The merges of a BPE that cuts texts as sentencepiece does, the strongest first: list of (left, right).
    Sentencepiece joins the neighbours whose joint piece scores best, so every way to cut a piece in two is a merge.
    """
    kinds = (sp.is_byte, sp.is_control, sp.is_unknown, sp.is_unused)
    normal = [i for i in range(len(pieces)) if not any(kind(i) for kind in kinds)]
    ranked = [pieces[i] for i in sorted(normal, key=lambda i: -sp.get_score(i))]
    known = set(ranked)
    merges = []
    for piece in ranked:
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                merges.append((piece[:cut], piece[cut:]))
    return merges


def add_prefix_rules(tokenizer):
    """Put ▁ in front of a text and for its blanks. The special names are not added tokens, which would be cut out of
    words and of what people write: only at the head of a rendered chat [gMASK] and sop are split off and found whole.
    """
    replace = normalizers.Replace
    front = r"\A(?!\[gMASK\]sop\[Round 1\]|\z)|(?<=\A\[gMASK\]sop)(?=\[Round 1\])"
    tokenizer.normalizer = normalizers.Sequence([replace(Regex(front), "▁"), replace(" ", "▁")])
    head = r"\A\[gMASK\](?=sop▁\[Round▁1\])|(?<=\A\[gMASK\])sop(?=▁\[Round▁1\])"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(head), "isolated")


def make_decoder(silent):
    """ids -> text as published: the tokens `silent` give no text, broken UTF-8 becomes U+FFFD."""
    replace = decoders.Replace
    names = "|".join(map(re.escape, silent))
    steps = [replace(Regex(rf"\A(?:{names})\z"), "")]
    # ByteFallback turns a run of bytes that is broken anywhere into U+FFFD as a whole, so ASCII bytes come first.
    steps += [replace(f"<0x{i:02X}>", chr(i)) for i in range(128)]
    steps += [replace(UNREACHABLE, ""), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, replace(Regex(r"\A▁"), ""), replace("▁", " ")])


def check_ids(path, tokenizer, sp, pieces, ids):
    """Compare with sentencepiece itself on every piece, alone and beside another one. `ids`: {piece or name: id}.
    Raises InputError where they differ.
    """
    texts = pieces + [piece + pieces[i * 7919 % len(pieces)] for i, piece in enumerate(pieces)]
    for text, ours in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False)):
        if ours.ids != [ids[piece] for piece in sp.encode(text, out_type=str)]:
            raise InputError(f"{path}: {text!r} gets other ids than sentencepiece gives: unlike ChatGLM2's")


def build_tokenizer(path):
    """The published ChatGLMTokenizer over the sentencepiece model `path`, as a fast tokenizer: the same ids for any
    text. Raises InputError where the model is of another kind.
    """
    sp = read_sentencepiece(path)
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    unk, bos, eos = (pieces[i] for i in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
    special = {name: len(pieces) + i for i, name in enumerate(SPECIAL)}
    # A piece that is spelled like a special name gets that one's id, as published; no text gets the piece's own id.
    vocab = {piece + UNREACHABLE * (piece in special): i for i, piece in enumerate(pieces)} | special
    merges = make_merges(sp, pieces)
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, ignore_merges=True))
    add_prefix_rules(tokenizer)
    tokenizer.decoder = make_decoder([*special, unk, bos, eos])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] sop $A",
        pair=f"[gMASK] sop $A $B {eos}",
        special_tokens=[*special.items(), (eos, sp.eos_id())],
    )
    check_ids(path, tokenizer, sp, pieces, vocab)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=unk,
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
    if args.out_dir.is_file() or args.out_dir.is_dir() and any(args.out_dir.iterdir()):
        raise InputError(f"{args.out_dir} exists already: remove it or give another OUT_DIR")
    check_links(args.source)
    config = convert_config(args.source)
    shards = find_shards(args.source)
    tokenizer = build_tokenizer(args.source / "tokenizer.model")
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{args.source}: tokenizer.model has more tokens than config.json's padded_vocab_size")
    size = sum(path.stat().st_size for path in shards)
    args.out_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.out_dir.parent).free
    if free < size:
        raise InputError(f"{args.out_dir}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free there")
    with atomic_write(args.out_dir) as part:
        part.mkdir()
        convert_weights(shards, config, part)
        config.save_pretrained(part)
        GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(part)
        tokenizer.save_pretrained(part)
        for path in args.source.glob("*LICENSE*"):  # the terms belong to every copy
            shutil.copy(path, part)
    log(f"wrote {args.out_dir}: {config.num_hidden_layers} layers, {len(tokenizer)} tokens, {config.dtype}")


if __name__ == "__main__":
    run_script(main)

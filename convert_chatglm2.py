"""Turn the published ChatGLM2-6B directory into one that transformers loads without remote code.

    python convert_chatglm2.py chatglm2-6b chatglm2-6b-plain
    python lora_finetune.py --model chatglm2-6b-plain

In:  CHATGLM2_DIR as published: config.json, tokenizer.model, pytorch_model*.bin or *.safetensors. Its Python isn't run.
Out: OUT_DIR with the same weights as GlmForCausalLM, in the same dtype (safetensors shards, config.json,
     generation_config.json) and a fast tokenizer with chat template (tokenizer.json, tokenizer_config.json,
     chat_template.jinja). AutoModelForCausalLM, AutoTokenizer and peft take it as any other model.
"""

import argparse
import json
import re
import shutil
import zipfile
from pathlib import Path

import sentencepiece
import torch
from models import check_folder
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import GenerationConfig, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from common import InputError, Parser, log, replacing, run_script, some, write_json

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
LAYER = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "post_attention_layernorm.weight": ["post_attention_layernorm.weight"],
    "self_attention.query_key_value.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "self_attention.query_key_value.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "self_attention.dense.weight": ["self_attn.o_proj.weight"],
    "mlp.dense_h_to_4h.weight": ["mlp.gate_up_proj.weight"],
    "mlp.dense_4h_to_h.weight": ["mlp.down_proj.weight"],
}
BUFFER = "rotary_pos_emb.inv_freq"  # computed anew by GlmForCausalLM
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]  # the published tokenizer counts them on from its last piece
UNUSED = "\U0010ffff"  # marks a piece that no text leads to
# The published build_prompt. A system message, which the model doesn't know, opens the first question. The cue 答：
# ends every question, asked for or not; the end token is not part of it.
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


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; CHATGLM2_DIR is the folder that holds config.json") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} is no JSON object: download it again")
    return value


def name_other_model(source, old):
    """What the directory holds in place of ChatGLM2, by its config `old` and its tokenizer's files; else None."""
    name = str(old.get("_name_or_path")).lower()
    files = [source / file for file in ("tokenizer_config.json", "special_tokens_map.json", "tokenization_chatglm.py")]
    told = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()).lower()
    if old.get("model_type") in ("glm", "glm4"):
        return f"a {old['model_type']} model, which needs no conversion: use it as it is"
    if old.get("model_type") != "chatglm":
        return f"a model of type {old.get('model_type')!r}"
    if "inner_hidden_size" in old or "position_encoding_2d" in old:
        return "ChatGLM-6B, the first: another architecture"
    if "glm-4" in name or "chatglm4" in told or isinstance(old.get("eos_token_id"), list):
        return "GLM-4: take its plain edition, the one whose name ends in -hf"
    if "chatglm3" in name + told or "<|user|>" in told or "<|assistant|>" in told:
        return "ChatGLM3: another prompt form and other special tokens"
    if old.get("quantization_bit"):
        return f"int{old['quantization_bit']} weights (quantization_bit): take the full chatglm2-6b"
    return None


def convert_config(source):
    """GlmConfig for the ChatGLM2 directory `source`. Raises InputError for other models and for flags that
    GlmForCausalLM doesn't compute.
    """
    path = source / "config.json"
    old = read_json(path)
    if other := name_other_model(source, old):
        raise InputError(f"{source} holds {other}. Only ChatGLM2 in full precision is converted")
    for name, (wanted, default) in FLAGS.items():
        if (value := old.get(name, default)) != wanted and (value or wanted):
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
        raise InputError(f"{path}: no {error}: download it again") from None
    except Exception as error:  # GlmConfig checks types, its errors are of huggingface_hub's own kind
        raise InputError(f"{path}: {error}") from None
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 4:
        raise InputError(f"{path}: num_attention_heads must be a multiple of multi_query_group_num, kv_channels of 4")
    return config


# ---- weights ---------------------------------------------------------------------------------------------------------


def check_file(path):
    """Raise InputError where `path` is missing or a git-lfs pointer."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: download it")
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in {path.parent}")


def find_shards(source):
    """The weight files of `source`, sorted: safetensors where they are all there, else .bin. Raises InputError naming
    what is missing.
    """
    first_error = None
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{single}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            files = list(weight_map.values()) if isinstance(weight_map, dict) else []
            if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
                raise InputError(f"{index} has no weight_map to files beside it: download it again")
            shards = sorted({source / file for file in files})
        elif (source / single).exists():
            shards = [source / single]
        else:
            continue
        try:
            if missing := [path.name for path in shards if not path.is_file()]:
                raise InputError(f"{source} lacks {some(missing, 20)}: download what is missing")
            for path in shards:
                check_file(path)
            return shards
        except InputError as error:
            first_error = first_error or error
    raise first_error or InputError(f"{source} holds neither model.safetensors nor pytorch_model.bin, nor an index")


def read_shard(path):
    """{name: tensor} of a weight file, mapped from the file rather than read where the format permits."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a foreign or cut-off file raises is anyone's guess
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path} can't be read as plain tensors ({reason}): download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{path} holds other things than named tensors: download it again")
    return tensors


def plan_tensors(config):
    """(plan, shapes): for each tensor of the source, without 'transformer.', the names of those that it becomes, in the
    order of its rows; and the shape of each of GlmForCausalLM's tensors.
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
    if left := {name for names in plan.values() for name in names} ^ set(shapes):
        raise RuntimeError(f"the GlmForCausalLM of this transformers has other tensors: {sorted(left)}")
    return plan, shapes


def convert_shard(tensors, plan, shapes, where):
    """GlmForCausalLM's tensors from one shard's. Takes from `plan` what it uses, so that nothing is used twice."""
    out, unknown = {}, []
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
        if list(tensor.shape) != (wanted := [sum(rows), *shapes[targets[0]][1:]]):
            raise InputError(f"{where}: {full_name} has the shape {list(tensor.shape)}, by config.json it is {wanted}")
        out.update(zip(targets, (part.contiguous() for part in tensor.split(rows))))
    if unknown:
        raise InputError(f"{where}: no tensor of this ChatGLM2, or in two shards: {', '.join(unknown[:20])}")
    return out


def convert_weights(shards, config, out_dir):
    """Write the weights of `shards` to `out_dir`, one safetensors file a shard, and set config.dtype. No more than one
    shard is held at a time.
    """
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
        lacking = ", ".join(f"transformer.{name}" for name in list(plan)[:20])
        raise InputError(f"{shards[0].parent}: {len(plan)} tensors are in none of the shards: {lacking}")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out_dir / "model.safetensors.index.json", index)


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def build_tokenizer(path):
    """The published ChatGLMTokenizer over the sentencepiece model `path`, as a fast tokenizer: the same ids for any
    text. Raises InputError where the model is of another kind.
    """
    check_file(path)
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise InputError(f"{path} is no sentencepiece model: download it again") from None
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    like_ours = sum(map(sp.is_byte, range(len(pieces)))) == 256 and min(sp.bos_id(), sp.eos_id()) >= 0
    if not like_ours or sp.normalize("  ﬁ：\t\n b ") != "▁▁▁ﬁ：\t\n▁b▁":
        raise InputError(f"{path}: ChatGLM2's has byte pieces, <s>, </s>, keeps every character and puts ▁ in front")

    # A piece spelled as a special name gets that one's id, as published; its own id is met in no text.
    special = {name: len(pieces) + i for i, name in enumerate(SPECIAL)}
    vocab = {piece + UNUSED * (piece in special): i for i, piece in enumerate(pieces)} | special
    # Sentencepiece joins the neighbours whose joint piece scores best, so every way to cut a piece in two is a merge.
    kinds = (sp.is_byte, sp.is_control, sp.is_unknown, sp.is_unused)
    normal = [i for i in range(len(pieces)) if not any(kind(i) for kind in kinds)]
    ranked = [pieces[i] for i in sorted(normal, key=lambda i: -sp.get_score(i))]
    known = set(ranked)
    cuts = ((piece[:at], piece[at:]) for piece in ranked for at in range(1, len(piece)))
    merges = [(left, right) for left, right in cuts if left in known and right in known]
    # The special names are no added tokens, which would be cut out of words and of what people write. Only at the head
    # of a rendered chat are [gMASK] and sop split off, and looked up whole (ignore_merges).
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, ignore_merges=True))
    replace = normalizers.Replace
    front = r"\A(?!\[gMASK\]sop\[Round 1\]|\z)|(?<=\A\[gMASK\]sop)(?=\[Round 1\])"
    tokenizer.normalizer = normalizers.Sequence([replace(Regex(front), "▁"), replace(" ", "▁")])
    head = r"\A\[gMASK\](?=sop▁\[Round▁1\])|(?<=\A\[gMASK\])sop(?=▁\[Round▁1\])"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(head), "isolated")
    # ByteFallback turns a run of bytes that is broken anywhere into U+FFFD as a whole: ASCII bytes mustn't be in it.
    unk, bos, eos = (pieces[i] for i in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
    silent = "|".join(map(re.escape, (*special, unk, bos, eos)))
    replace = decoders.Replace
    decoder = [replace(Regex(rf"\A(?:{silent})\z"), ""), *(replace(f"<0x{i:02X}>", chr(i)) for i in range(128))]
    decoder += [replace(UNUSED, ""), decoders.ByteFallback(), decoders.Fuse(), replace(Regex(r"\A▁"), "")]
    tokenizer.decoder = decoders.Sequence([*decoder, replace("▁", " ")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] sop $A",
        pair=f"[gMASK] sop $A $B {eos}",
        special_tokens=[*special.items(), (eos, sp.eos_id())],
    )
    # A last look, with sentencepiece itself: every piece, alone and beside another one.
    texts = pieces + [piece + pieces[i * 7919 % len(pieces)] for i, piece in enumerate(pieces)]
    for text, ours in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False)):
        if ours.ids != [special.get(piece, vocab.get(piece)) for piece in sp.encode(text, out_type=str)]:
            raise InputError(f"{path}: {text!r} gets other ids than sentencepiece gives: unlike ChatGLM2's")
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
        raise InputError(f"{args.out_dir} is there already: remove it or give another OUT_DIR")
    check_folder(args.source)
    config = convert_config(args.source)
    shards = find_shards(args.source)
    tokenizer = build_tokenizer(args.source / "tokenizer.model")
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{args.source}: tokenizer.model has more tokens than config.json's padded_vocab_size")
    size = sum(path.stat().st_size for path in shards)
    args.out_dir.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(args.out_dir.parent).free) < size:
        raise InputError(f"{args.out_dir}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free there")
    with replacing(args.out_dir) as part:
        part.mkdir()
        convert_weights(shards, config, part)
        config.save_pretrained(part)
        GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(part)
        tokenizer.save_pretrained(part)
        for path in args.source.glob("*LICENSE*"):  # its terms go with every copy
            shutil.copy(path, part)
    log(f"wrote {args.out_dir}: {config.num_hidden_layers} layers, {len(tokenizer)} tokens, {config.dtype}")


if __name__ == "__main__":
    run_script(main)

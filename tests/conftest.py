import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import common

KIT = Path(__file__).resolve().parent.parent
SAMPLE = KIT / "data" / "sample"
# With --cpu accelerate would start one process alone, whatever the number.
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
TWO_PROCESSES += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def start(script, folder, *flags, launcher=()):
    """Start a script as a process of its own, with `folder` for its output. Returns the Popen; stderr is a pipe."""
    command = [sys.executable, *launcher, KIT / script, "--out-dir", folder, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DATA_DIR": str(SAMPLE)}
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)


@pytest.fixture
def kit(tmp_path, monkeypatch, capsys):
    """Run a script of the kit in tmp_path as a user does, but in this process, which saves the seconds of the imports.
    Returns an object with returncode, stdout and stderr, like subprocess.run."""

    def run(script, *flags, **env):
        monkeypatch.chdir(tmp_path)
        env = {"OUT_DIR": tmp_path / "outputs", "DATA_DIR": SAMPLE, **env}
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            common.run_script(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, out, err)

    return run


@pytest.fixture
def refused(kit, tmp_path):
    """Run a script that must refuse its input: exit code 2, one line that holds all of `words`, nothing written."""

    def run(*command, words, **env):
        before = sorted(tmp_path.rglob("*"))
        done = kit(*command, **env)
        assert done.returncode == 2, done.stderr
        faults = [line for line in done.stderr.splitlines() if line.startswith(f"{command[0]}: ")]
        assert len(faults) == 1 and all(word in faults[0] for word in words), done.stderr
        assert "Traceback" not in done.stderr and not done.stdout
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def write_csv(tmp_path):
    def write(name, rows, encoding="utf-8", newline="\n", **options):
        with open(tmp_path / name, "w", encoding=encoding, newline="") as file:
            csv.writer(file, lineterminator=newline, **options).writerows(rows)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def papers():
    """The sample: (training papers with labels, test papers)."""
    return common.read_papers(SAMPLE / "train.csv", labelled=True), common.read_papers(SAMPLE / "test.csv")


@pytest.fixture
def test_b(tmp_path):
    """Another test file, testB.csv in tmp_path: seven papers of the sample's in another order. Returns its frame."""
    papers = pd.read_csv(SAMPLE / "test.csv", dtype=str, keep_default_na=False).iloc[::-1].head(7)
    papers.to_csv(tmp_path / "testB.csv", index=False)
    return papers


# ---- tiny models with random weights; what makes them is imported inside, for most tests do without ------------------


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A tiny BERT with random weights and a vocabulary of the sample's words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-bert")
    papers = common.read_papers(SAMPLE / "train.csv")
    words = sorted(
        {word for text in common.build_text(papers, ["title"]) for word in text.lower().split() if word.isalpha()}
    )
    letters = [p + c for c in "abcdefghijklmnopqrstuvwxyz,.;:-()" for p in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(w for w in words if len(w) > 1)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


def make_llm(folder, chat=True):
    """A tiny random Llama with a byte-level BPE tokenizer of the sample's words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = common.build_text(common.read_papers(SAMPLE / "train.csv"), ["title", "abstract"])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("llm"))

"""What the tests share: a way to run a script, small papers, and tiny models with random weights. Nothing here imports
torch until a test asks for a model, so that the tests of common.py answer in seconds.
"""

import csv
import gc
import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import common
from lib import cli, results

import numpy as np
import pandas as pd
import pytest

KIT = Path(__file__).resolve().parent.parent
SAMPLE = KIT / "data" / "sample"
# With --cpu accelerate would start one process alone, whatever the number.
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
TWO_PROCESSES += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure(config):
    """Cards are hidden: what is tested is the same on any computer. pytest -m gpu is for those who have one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def start(script, folder, *flags, launcher=()):
    """Start a script as a process of its own, with `folder` for its output. Returns the Popen; stderr is a pipe."""
    command = [sys.executable, *launcher, KIT / script, "--out-dir", folder, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DATA_DIR": str(SAMPLE)}
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)


def call(folder, script, *flags, **env):
    """Run a script in `folder` as a user does, but in this process, which saves the seconds of the imports. Returns an
    object with returncode, stdout and stderr, like subprocess.run.
    """
    env = {"OUT_DIR": folder / "outputs", "DATA_DIR": SAMPLE, **env}
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    gc.freeze()  # accelerate collects garbage after each model: it need not go through what was imported
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        for name, value in env.items():
            patch.setenv(name, str(value))
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.setattr(os, "fsync", lambda file: None)  # it waits for the disk, and no test cuts the power
        try:
            cli.run_script(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as end:
            code = end.code
        if state := sys.modules.get("accelerate.state"):  # a new process may choose another precision
            state.AcceleratorState._reset_state()
    return subprocess.CompletedProcess(flags, code, *(each.buffer.getvalue().decode() for each in (out, err)))


@pytest.fixture
def kit(tmp_path):
    """Run a script in tmp_path: kit("baseline.py", "--folds", 3)."""
    return lambda script, *flags, **env: call(tmp_path, script, *flags, **env)


@pytest.fixture
def refused(kit, tmp_path):
    """Run a script that must refuse its input: exit code 2, one line that holds all of `words`, nothing written."""

    def run(*command, words, **env):
        before = contents(tmp_path)
        done = kit(*command, **env)
        assert done.returncode == 2, done.stderr
        faults = [line for line in done.stderr.splitlines() if line.startswith(f"{command[0]}: ")]
        assert len(faults) == 1 and all(word in faults[0] for word in words), done.stderr
        assert "Traceback" not in done.stderr and not done.stdout
        assert contents(tmp_path) == before

    return run


def contents(folder):
    """{path: bytes} of all files under a folder, but locks."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def edit_json(path, **changes):
    """Change some values of a JSON file; make it if there is none."""
    path.write_text(json.dumps(json.loads(path.read_text() if path.is_file() else "{}") | changes))


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


@pytest.fixture
def model(tmp_path, papers):
    """Write what a model leaves: made-up probabilities, worse as `noise` grows, and further metrics."""

    def write(name, noise, held_out=slice(None), papers=papers, test_probs=None, **metrics):
        train, test = papers
        random, held = np.random.default_rng(list(name.encode())), train.iloc[held_out]
        labels = [held["label"], pd.read_csv(SAMPLE / "test_labels.csv")["label"]]
        valid, guessed = (np.clip(y + noise * random.normal(size=len(y)), 0, 1) for y in labels)
        metrics = {"papers": results.paper_record(train, test, len(held)), "fields": ["title"], **metrics}
        folder = tmp_path / "outputs" / name
        results.save_results(folder, metrics, test, guessed if test_probs is None else test_probs, held, valid)

    return write


# ---- tiny models with random weights ---------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A tiny BERT and a vocabulary of the sample's words: a directory."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-bert")
    papers = common.read_papers(SAMPLE / "train.csv")
    words = " ".join(papers["title"]).lower().split()
    letters = [before + letter for letter in "abcdefghijklmnopqrstuvwxyz,.;:-()" for before in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += sorted({word for word in words if word.isalpha() and len(word) > 1})
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **SIZES)).save_pretrained(folder)
    return folder


def make_llm(folder, template=CHAT):
    """A tiny Llama with a byte-level BPE tokenizer of the sample's words, saved in a directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = common.build_text(common.read_papers(SAMPLE / "train.csv"), ["title", "abstract"])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|pad|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("llm"))

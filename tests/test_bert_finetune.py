import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KIT, SAMPLE
from transformers import BertConfig, BertModel, BertTokenizer, pipeline

import bert_finetune
import common

TINY = ["--epochs", "2", "--batch-size", "4", "--max-length", "48", "--lr", "0.003"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A tiny BERT with random weights and a vocabulary of the sample's words."""
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


def results(folder):
    return [(folder / name).read_bytes() for name in ("valid.csv", "test.csv", "best/model.safetensors", "log.csv")]


def test_whole_run(kit, tmp_path, tiny_bert):
    done = kit("bert_finetune.py", "--model", tiny_bert, *TINY)
    assert done.returncode == 0, done.stderr
    assert "324 texts to train on, 12 held out; 2 epochs, 162 steps of 4" in done.stderr and "cpu, fp32" in done.stderr
    folder = tmp_path / "outputs" / "bert"
    train, test = (common.read_papers(SAMPLE / f"{side}.csv", labelled=side == "train") for side in ("train", "test"))
    valid = common.read_predictions(folder / "valid.csv")
    assert valid["uuid"].tolist() == train["uuid"][common.split_papers(train)].tolist()
    probs = common.read_predictions(folder / "test.csv")
    assert probs["uuid"].tolist() == test["uuid"].tolist()
    metrics = json.loads((folder / "metrics.json").read_text())
    want = {"scores", "papers", "fields", "settings", "train_seconds", "train_papers_per_second"}
    assert metrics.keys() >= want | {"predict_papers_per_second", "peak_memory_mb", "versions", "device"}
    assert metrics["scores"] == common.scores(valid["label"], valid["prob"])
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "best", "last.safetensors", "log.csv", "metrics.json", "submit_task1.csv", "test.csv", "valid.csv"
    ]  # fmt: skip

    # best/ is a plain model directory: any tool gives the same answer.
    texts = common.build_text(test, metrics["fields"])
    classify = pipeline("text-classification", str(folder / "best"), top_k=None)
    for text, prob in zip(texts[:5], probs["prob"]):
        answer = {row["label"]: row["score"] for row in classify([text], truncation=True, max_length=48)[0]}
        assert answer.keys() == {"other", "medical"} and answer["medical"] == pytest.approx(prob, abs=1e-5)

    first = results(folder)
    again = kit("bert_finetune.py", "--model", tiny_bert, *TINY, "--resume")
    assert again.returncode == 0 and "epoch 1" not in again.stderr and results(folder) == first
    other = kit("bert_finetune.py", "--model", tiny_bert, *TINY, "--resume", "--dropout", "0.1")
    assert other.returncode == 2 and "dropout was 0.0 and is 0.1" in other.stderr and results(folder) == first

    kit("bert_finetune.py", "--model", tiny_bert, *TINY)
    assert results(folder) == first, "the same command must give the same result"


def test_predict_only(kit, tmp_path, tiny_bert, write_csv):
    refusal = kit("bert_finetune.py", "--predict-only")
    assert refusal.returncode == 2 and "no finished run" in refusal.stderr
    kit("bert_finetune.py", "--model", tiny_bert, *TINY)
    before = common.read_predictions(tmp_path / "outputs/bert/test.csv").set_index("uuid")["prob"]
    test = pd.read_csv(SAMPLE / "test.csv", dtype=str, keep_default_na=False).iloc[::-1].head(7)
    test.to_csv(tmp_path / "testB.csv", index=False)
    done = kit("bert_finetune.py", "--predict-only", "--test", "testB.csv")
    assert done.returncode == 0, done.stderr
    after = common.read_predictions(tmp_path / "outputs/bert/test.csv").set_index("uuid")["prob"]
    assert after.index.tolist() == test["uuid"].tolist()
    assert np.allclose(after, before[after.index], atol=1e-5)
    assert kit("blend.py", "--test", "testB.csv").returncode == 0
    test.drop(columns="author").to_csv(tmp_path / "testC.csv", index=False)
    lacking = kit("bert_finetune.py", "--predict-only", "--test", "testC.csv")
    assert lacking.returncode == 2 and "author" in lacking.stderr


def test_folds_hold_out_every_paper(kit, tmp_path, tiny_bert):
    done = kit("bert_finetune.py", "--model", tiny_bert, *TINY, "--epochs", "1", "--folds", "3")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "bert"
    assert len(common.read_predictions(folder / "valid.csv")) == 120
    assert all((folder / f"fold{k}" / "best" / "model.safetensors").is_file() for k in (1, 2, 3))
    before = common.read_predictions(folder / "test.csv")
    assert kit("bert_finetune.py", "--predict-only").returncode == 0
    assert np.allclose(common.read_predictions(folder / "test.csv")["prob"], before["prob"], atol=1e-6)


def test_a_long_paper_loses_its_abstract_not_its_authors(tiny_bert):
    tokenizer = bert_finetune.load_tokenizer(tiny_bert, 48)
    head = pd.DataFrame({"title": ["a title"], "author": ["Lee, Ann"], "abstract": [""]})
    long = head.assign(abstract="b c d " * 500)
    short, cut = (bert_finetune.encode(tokenizer, p, list(p), 48)[0]["input_ids"] for p in (head, long))
    assert len(cut) == 48 and cut[: len(short) - 1] == short[:-1] and cut[-1] == tokenizer.sep_token_id


def test_batch_equals_single(tiny_bert):
    papers = common.read_papers(SAMPLE / "test.csv")
    tokenizer, model = bert_finetune.load_tokenizer(tiny_bert, 48), bert_finetune.load_model(tiny_bert).eval()
    items = bert_finetune.encode(tokenizer, papers, ["title"], 48)
    _, probs = bert_finetune.make_functions(tokenizer, "cpu")
    with torch.no_grad():
        assert torch.allclose(probs(model, items), torch.cat([probs(model, [item]) for item in items]), atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "no/such-model"], ["--model no/such-model", "HF_ENDPOINT"]),
        (["--model", "."], ["--model ."]),
        (["--max-length", "9999", "--model", "TINY"], ["--max-length 9999", "64 tokens"]),
        (["--precision", "fp16", "--model", "TINY"], ["--precision fp16", "CUDA"]),
        (["--folds", "1"], ["--folds"]),
        (["--folds", "99", "--model", "TINY"], ["--folds 99"]),
    ],
)
def test_refuses(refused, tiny_bert, flags, words):
    refused("bert_finetune.py", *[tiny_bert if flag == "TINY" else flag for flag in flags], words=words)


def start(model, out_dir, *flags, launcher=()):
    command = [
        sys.executable,
        *launcher,
        KIT / "bert_finetune.py",
        "--model",
        model,
        *TINY,
        "--out-dir",
        out_dir,
        *flags,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DATA_DIR": str(SAMPLE)}
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment, cwd=out_dir)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_bert):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = start(tiny_bert, tmp_path / "whole")
    cut = start(tiny_bert, tmp_path / "cut", "--save-minutes", "0")
    while not (tmp_path / "cut/bert/last.safetensors").exists() and cut.poll() is None:
        time.sleep(0.002)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    assert cut.returncode == -signal.SIGKILL and not (tmp_path / "cut/bert/log.csv").exists(), "killed in mid-epoch"
    resumed = start(tiny_bert, tmp_path / "cut", "--resume")
    assert "resumed after 0 epochs and " in resumed.communicate()[1] and resumed.returncode == 0
    assert whole.communicate() and whole.returncode == 0
    assert results(tmp_path / "whole/bert") == results(tmp_path / "cut/bert")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, tiny_bert):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    # 37 test and 11 held-out papers divide by nothing.
    limit = ["--limit", "37"]
    two, one = start(tiny_bert, tmp_path / "two", *limit, launcher=launcher), start(tiny_bert, tmp_path / "one", *limit)
    assert two.communicate()[1].count("wrote ") == 1 and two.returncode == 0
    assert one.communicate() and one.returncode == 0
    for name in ("valid.csv", "test.csv"):
        first, second = (common.read_predictions(tmp_path / side / "bert" / name) for side in ("one", "two"))
        assert first["uuid"].tolist() == second["uuid"].tolist()
        assert np.allclose(first["prob"], second["prob"], atol=1e-4)


@pytest.mark.slow
def test_minilm_beats_the_constant_guess_by_far(kit, tmp_path):
    done = kit("bert_finetune.py", "--model", "embedded", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    probs = common.read_predictions(tmp_path / "outputs/bert/test.csv").set_index("uuid")["prob"]
    answers = pd.read_csv(SAMPLE / "test_labels.csv", dtype={"uuid": str}).set_index("uuid")["label"]
    assert ((probs >= 0.5) == answers[probs.index]).mean() >= 0.85

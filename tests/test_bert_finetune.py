import json
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import SAMPLE, TWO_PROCESSES, start
from transformers import pipeline

import bert_finetune
import common

TINY = ["--epochs", "2", "--batch-size", "4", "--max-length", "48", "--lr", "0.003"]


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


def test_predict_only(kit, tmp_path, tiny_bert, test_b):
    refusal = kit("bert_finetune.py", "--predict-only")
    assert refusal.returncode == 2 and "no finished run" in refusal.stderr
    kit("bert_finetune.py", "--model", tiny_bert, *TINY)
    before = common.read_predictions(tmp_path / "outputs/bert/test.csv").set_index("uuid")["prob"]
    done = kit("bert_finetune.py", "--predict-only", "--test", "testB.csv")
    assert done.returncode == 0, done.stderr
    after = common.read_predictions(tmp_path / "outputs/bert/test.csv").set_index("uuid")["prob"]
    assert after.index.tolist() == test_b["uuid"].tolist()
    assert np.allclose(after, before[after.index], atol=1e-5)
    assert kit("blend.py", "--test", "testB.csv").returncode == 0
    test_b.drop(columns="author").to_csv(tmp_path / "testC.csv", index=False)
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


@pytest.mark.slow
def test_two_processes_one_dies_and_resumed_they_equal_one(kit, tmp_path, tiny_bert):
    """37 test and 4 held-out papers divide by nothing."""
    (tmp_path / "two").mkdir()
    flags = ["--model", tiny_bert, *TINY, "--limit", "37", "--epochs", "8", "--patience", "8", "--save-minutes", "0"]
    two = start("bert_finetune.py", tmp_path / "two", *flags, launcher=TWO_PROCESSES)
    while not (tmp_path / "two/bert/last.safetensors").exists() and two.poll() is None:
        time.sleep(0.01)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(two.pid).children(recursive=True)}
    ranks["1"].kill()  # the first must end, too
    assert "Signal 9 (SIGKILL) received" in two.communicate(timeout=60)[1] and two.returncode not in (0, 2)
    assert not any(process.is_running() for process in ranks.values())

    two = start("bert_finetune.py", tmp_path / "two", *flags, "--resume", launcher=TWO_PROCESSES)
    stderr = two.communicate()[1]
    assert two.returncode == 0, stderr
    assert "× 2 processes" in stderr and "resumed after" in stderr and stderr.count("wrote ") == 1
    assert kit("bert_finetune.py", *flags).returncode == 0
    both = [common.read_predictions(tmp_path / side / "bert/test.csv") for side in ("two", "outputs")]
    assert both[0]["uuid"].tolist() == both[1]["uuid"].tolist()
    assert np.allclose(both[0]["prob"], both[1]["prob"], atol=1e-4)

    # The same weights: what two processes predict is what one predicts.
    only = ["--predict-only", "--limit", "37", "--out-dir", tmp_path / "two"]
    assert kit("bert_finetune.py", *only).returncode == 0
    assert np.allclose(common.read_predictions(tmp_path / "two/bert/test.csv")["prob"], both[0]["prob"], atol=1e-5)


@pytest.mark.slow
def test_minilm_beats_the_constant_guess_by_far(kit, tmp_path):
    done = kit("bert_finetune.py", "--model", "embedded", "--epochs", "2", "--max-length", "64")
    assert done.returncode == 0, done.stderr
    probs = common.read_predictions(tmp_path / "outputs/bert/test.csv").set_index("uuid")["prob"]
    answers = pd.read_csv(SAMPLE / "test_labels.csv", dtype={"uuid": str}).set_index("uuid")["label"]
    assert ((probs >= 0.5) == answers[probs.index]).mean() >= 0.85

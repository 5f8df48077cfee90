"""Damaged results of earlier runs and full disks: one line that helps, and nothing written is lost."""

import json
import re
from contextlib import contextmanager

from conftest import contents

import pytest

# ---- damaged results of earlier runs ---------------------------------------------------------------------------------


def check_refused(refused, path, *command, word=None):
    """A script that reads a damaged `path` says so in one line, and changes nothing."""
    whole = path.read_bytes()
    for data in (b"", b"\xff\xfe", whole[: len(whole) // 2]):
        path.write_bytes(data)
        refused(*command, words=[word or path.name])
    path.write_bytes(whole)


@pytest.mark.parametrize("name", ["baseline/metrics.json", "baseline/valid.csv", "baseline/test.csv"])
def test_blend_refuses_damaged_results(kit, refused, tmp_path, name):
    assert kit("baseline.py", "--fields", "title", "--folds", "2").returncode == 0
    (tmp_path / "submit_task1.csv").write_text("earlier")
    check_refused(refused, tmp_path / "outputs" / name, "blend.py", word="baseline")


@pytest.mark.slow
def test_fine_tunes_refuse_damaged_results(kit, refused, tmp_path, tiny_bert, tiny_llm):
    out, few = tmp_path / "outputs", ["--limit", "24", "--fields", "title"]
    train = ["--epochs", "1", "--lr", "0.01", "--max-length"]
    lora = ["lora_finetune.py", "--model", tiny_llm, *train, "200"]
    bert = ["bert_finetune.py", "--model", tiny_bert, *few, *train, "48"]
    predict_llm, predict_bert = ["lora_predict.py", "--limit", "24"], ["bert_finetune.py", "--predict-only"]
    for command in (["make_llm_data.py", *few], lora, predict_llm, bert):
        done = kit(*command)
        assert done.returncode == 0, done.stderr
    for name in ("best/kit.json", "best/adapter_config.json", "best/adapter_model.safetensors", "training.json"):
        check_refused(refused, out / "lora" / name, *predict_llm, word="lora")
    check_refused(refused, out / "bert" / "metrics.json", *predict_bert)
    for name in ("kit.json", "config.json", "model.safetensors", "tokenizer.json"):
        check_refused(refused, out / "bert" / "best" / name, *predict_bert, word="best")
    for name in ("paper_label.json", "paper_label_valid.json", "paper_label_source.json"):
        check_refused(refused, out / name, *lora, "--name", "new", word="paper_label")


# ---- full disks ------------------------------------------------------------------------------------------------------


@contextmanager
def file_limit(size):
    """No file can grow beyond `size` bytes in here: what is written then fails, at that byte."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 3000])
def test_a_run_that_does_not_fit_names_its_file_and_loses_nothing(kit, tmp_path, size):
    command = ["baseline.py", "--folds", "2"]
    assert kit(*command).returncode == 0
    before = contents(tmp_path)
    with file_limit(size):
        done = kit(*command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    named = re.search(r"^baseline.py: (\S+): File too large$", done.stderr, re.MULTILINE)
    assert named and (tmp_path / named[1]) in before, done.stderr
    after = contents(tmp_path)
    changed = [path.name for path in before if after[path] != before[path]]
    assert after.keys() == before.keys() and set(changed) <= {"metrics.json"}, "whole: of this run or of the one before"
    json.loads((tmp_path / "outputs/baseline/metrics.json").read_text())


@pytest.mark.parametrize("size", [0, 50_000])
def test_the_earlier_checkpoint_survives_a_full_disk(tmp_path, size):
    from lib import training

    import torch

    path, model = tmp_path / "last.safetensors", torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    training.save_state(path, model, optimizer, {"finished": False})
    before = contents(tmp_path)
    with file_limit(size), pytest.raises(OSError, match="File too large.*last.safetensors"):
        training.save_state(path, model, optimizer, {"finished": False, "step": 2})
    assert contents(tmp_path) == before

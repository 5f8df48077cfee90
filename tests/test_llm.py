import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SAMPLE, TWO_PROCESSES, make_llm, start
from peft import PeftModel
from safetensors.torch import load_file, save_file

import common
import llm
import lora_predict
import training

TINY = ["--epochs", "2", "--batch-size", "4", "--max-length", "200", "--lr", "0.01", "--fields", "title"]


@pytest.fixture(scope="session", params=["chat", "plain"])
def tiny(request, tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp(request.param), request.param == "chat")


def load(folder):
    return llm.load_llm(folder, training.make_accelerator("fp32"))


@pytest.fixture
def items():
    return common.build_items(common.read_papers(SAMPLE / "test.csv"), ["title", "author", "abstract"])


def test_the_same_prompt_to_train_and_to_predict(tiny, monkeypatch):
    """What the model sees in training is the prompt of predicting, then the answer, for every paper of the sample."""
    model, tokenizer = load(tiny)
    papers = common.read_papers(SAMPLE / "train.csv", labelled=True)
    labelled = common.build_items(papers, ["title", "author", "abstract"])
    plain = common.build_items(papers.drop(columns="label"), ["title", "author", "abstract"])
    seen = []
    scorer = llm.Scorer(model, tokenizer)
    read = scorer.read
    monkeypatch.setattr(scorer, "read", lambda rows, keep, **more: seen.extend(rows) or read(rows, keep, **more))
    train, test = (llm.encode_items(tokenizer, part, 512) for part in (labelled, plain))
    with torch.no_grad():
        for paper in train:
            scorer([paper])
    assert len(seen) == len(test) == 120
    for row, paper, label in zip(seen, test, papers["label"]):
        answer = scorer.answers[label]
        assert row == paper["input_ids"] + (answer + scorer.end)[:-1]
        text = tokenizer.decode(row)
        assert text.rstrip().endswith(str(label)) and labelled[0]["instruction"][:20] in text


def test_loss_and_probability_are_those_of_the_whole_sequence(tiny, items):
    """Against the plain computation: one paper, no padding, all logits."""
    model, tokenizer = load(tiny)
    papers = llm.encode_items(tokenizer, [dict(item, output=str(i % 2)) for i, item in enumerate(items[:6])], 400)
    scorer = llm.Scorer(model, tokenizer).eval()
    answers = llm.encode_answers(tokenizer)
    with torch.no_grad():
        losses, probs = scorer(papers), scorer.probs(papers)
        for paper, loss, prob in zip(papers, losses, probs):
            found = []
            for answer in answers:
                ids = torch.tensor([paper["input_ids"] + answer + scorer.end])
                logs = model(ids).logits.log_softmax(-1)[0, :-1]
                taken = logs.gather(1, ids[0, 1:, None])[len(paper["input_ids"]) - 1 :, 0]
                found.append((taken.sum(), taken[: len(answer)].sum()))
            assert loss == pytest.approx(-found[paper["label"]][0].item(), abs=1e-4)
            want = torch.stack([each[1] for each in found]).softmax(0)[1].item()
            assert prob.item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("answers", [([7, 8, 9], [7, 9, 8]), ([7], [7, 9]), ([5, 6], [7])])
def test_answers_of_several_tokens(tiny_llm, items, answers):
    model, tokenizer = load(tiny_llm)
    scorer = llm.Scorer(model, tokenizer).eval()
    papers = llm.encode_items(tokenizer, items[:4], 300)
    scorer.answers = list(map(list, answers))
    with torch.no_grad():
        for paper, prob in zip(papers, scorer.probs(papers)):
            logs = []
            for answer in scorer.answers:
                if answer == [7] and answers[1] == [7, 9]:  # the other goes on: the end token tells them apart
                    answer = answer + scorer.end
                ids = torch.tensor([paper["input_ids"] + answer])
                taken = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
                logs.append(taken[len(paper["input_ids"]) - 1 :].sum())
            assert prob.item() == pytest.approx(torch.stack(logs).softmax(0)[1].item(), abs=1e-5)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_same_answer_in_any_batch(tiny, items, prefix):
    model, tokenizer = load(tiny)
    scorer = llm.Scorer(model, tokenizer).eval()
    papers = llm.encode_items(tokenizer, items, 300)
    with torch.no_grad():
        single = torch.cat([scorer.probs([paper]) for paper in papers])
        if prefix:
            scorer.share_prefix(papers)
            assert len(scorer.prefix) > 10
        for size in (2, 7, 40):
            batches = [scorer.probs(papers[i : i + size]) for i in range(0, len(papers), size)]
            assert torch.allclose(torch.cat(batches), single, atol=1e-5)


def test_a_long_paper_loses_its_abstract_alone(tiny, items):
    _, tokenizer = load(tiny)
    item = dict(items[0], input=items[0]["input"] + " and more" * 2000, output="1")
    short = llm.encode_item(tokenizer, dict(item, input=""), 10**6)
    cue = tokenizer.decode(short[-3:])
    ids = llm.encode_items(tokenizer, [item], 300)[0]["input_ids"]
    assert 250 < len(ids) <= 298 and tokenizer.decode(ids).endswith(cue)
    assert items[0]["input"].split("\n")[0] in tokenizer.decode(ids)
    with pytest.raises(common.InputError, match="--max-length"):
        llm.encode_items(tokenizer, [item], 20)


def test_make_llm_data(kit, tmp_path):
    done = kit("make_llm_data.py", "--fields", "title", "abstract")
    assert done.returncode == 0, done.stderr
    parts = {name: json.loads((tmp_path / f"outputs/{name}.json").read_text()) for name in json.loads((tmp_path / "outputs/dataset_info.json").read_text())}  # fmt: skip  # noqa: E501
    assert [len(part) for part in parts.values()] == [108, 12, 40]
    train = common.read_papers(SAMPLE / "train.csv", labelled=True)
    held = common.split_papers(train)
    for items, papers in zip(parts.values(), (train[~held], train[held])):
        assert [item["output"] for item in items] == papers["label"].astype(str).tolist()
        assert all(title in item["input"] for item, title in zip(items, papers["title"]))
    for items in parts.values():
        assert all(item.keys() == {"instruction", "input", "output"} for item in items)
        assert len({item["instruction"] for item in items}) == 1 and "author" not in items[0]["instruction"]
    assert {item["output"] for item in parts["paper_label_test"]} == {""}


def train_and_predict(kit, model, *flags):
    assert kit("make_llm_data.py", "--fields", "title").returncode == 0
    done = kit("lora_finetune.py", "--model", model, *TINY, *flags)
    assert done.returncode == 0, done.stderr
    done = kit("lora_predict.py", "--fields", "title")
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("method", ["lora", "p-tuning-v2"])
def test_whole_run(kit, tmp_path, tiny_llm, method):
    done = train_and_predict(kit, tiny_llm, "--method", method)
    folder = tmp_path / "outputs/lora"
    log = pd.read_csv(folder / "log.csv")
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["fields"] == ["title"] and metrics["train_papers_per_second"] > 0
    assert "12 held out" in done.stdout and "40 test papers" in done.stdout

    # The adapter file holds adapter weights alone, and peft by itself gives the same answer.
    names = load_file(folder / "best/adapter_model.safetensors").keys()
    assert names and all("lora_" in name or "prompt" in name for name in names)
    model, tokenizer = load(tiny_llm)
    model = PeftModel.from_pretrained(model, str(folder / "best")).eval()
    kit_file = json.loads((folder / "best/kit.json").read_text())
    items = json.loads((tmp_path / "outputs/paper_label_test.json").read_text())[:5]
    probs = common.read_predictions(folder / "test.csv")["prob"]
    for paper, prob in zip(llm.encode_items(tokenizer, items, 200), probs):
        with torch.no_grad():
            last = model(torch.tensor([paper["input_ids"]])).logits[0, -1]
        zero, one = (answer[0] for answer in kit_file["answers"])
        assert prob == pytest.approx(last[[zero, one]].softmax(0)[1].item(), abs=1e-4)

    assert kit("blend.py", "--fields", "title").returncode == 0


def test_untrained_model_and_predict_only(kit, tmp_path, tiny_llm, test_b):
    done = kit("lora_predict.py", "--adapter", "none", "--model", tiny_llm, "--fields", "title")
    assert done.returncode == 0 and "untrained, test" in done.stdout
    assert not (tmp_path / "outputs/untrained/valid.csv").exists(), "blend must leave it out"
    train_and_predict(kit, tiny_llm)
    valid = (tmp_path / "outputs/lora/valid.csv").read_bytes()
    before = common.read_predictions(tmp_path / "outputs/lora/test.csv").set_index("uuid")["prob"]
    done = kit("lora_predict.py", "--predict-only", "--test", "testB.csv")
    assert done.returncode == 0, done.stderr
    after = common.read_predictions(tmp_path / "outputs/lora/test.csv").set_index("uuid")["prob"]
    assert after.index.tolist() == test_b["uuid"].tolist() and np.allclose(after, before[after.index], atol=1e-4)
    assert (tmp_path / "outputs/lora/valid.csv").read_bytes() == valid
    assert kit("blend.py", "--test", "testB.csv", "--fields", "title").returncode == 0


def test_predictions_are_kept_as_they_come(kit, tmp_path, tiny_llm, monkeypatch):
    train_and_predict(kit, tiny_llm)
    folder = tmp_path / "outputs/lora"
    whole = [(folder / name).read_bytes() for name in ("valid.csv", "test.csv")]
    probs, calls = llm.Scorer.probs, []

    def dying(self, papers):
        calls.append(len(papers))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return probs(self, papers)

    monkeypatch.setattr(llm.Scorer, "probs", dying)
    flags = ["--fields", "title", "--batch-size", "4"]
    assert kit("lora_predict.py", *flags).returncode == 130
    lines = (folder / "partial-0.txt").read_text()
    (folder / "partial-0.txt").write_text(lines + "51 0.12")  # cut off in the middle of a line
    monkeypatch.setattr(llm.Scorer, "probs", probs)
    done = kit("lora_predict.py", *flags)
    assert "8 of 52 papers were scored" in done.stderr and done.returncode == 0
    now = [common.read_predictions(folder / name) for name in ("valid.csv", "test.csv")]
    (tmp_path / "old.csv").write_bytes(whole[1])
    assert np.allclose(now[1]["prob"], common.read_predictions(tmp_path / "old.csv")["prob"], atol=1e-5)
    assert not list(folder.glob("partial-*"))


def test_predictions_survive_a_second_kill(tmp_path):
    first = lora_predict.Partial(tmp_path, "key", 0)
    first.keep([1, 2], [0.1, 0.2])
    first.file.close()
    with open(tmp_path / "partial-0.txt", "a") as file:
        file.write("3 0.1")  # killed in the middle of 0.12
    second = lora_predict.Partial(tmp_path, "key", 0)
    second.keep([4], [0.4])
    second.file.close()
    assert lora_predict.Partial(tmp_path, "key", 0).done == {1: 0.1, 2: 0.2, 4: 0.4}
    assert not lora_predict.Partial(tmp_path, "another", 0).done


def test_refusals(kit, tmp_path, tiny_llm):
    def refused(*command, words):
        done = kit(*command)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr

    refused("lora_finetune.py", "--model", tiny_llm, words=["make_llm_data.py"])
    refused("lora_predict.py", words=["lora_finetune.py"])
    train_and_predict(kit, tiny_llm)
    refused("lora_finetune.py", "--model", tiny_llm, words=["make_llm_data.py", "fields"])
    refused(
        "lora_finetune.py", "--model", tiny_llm, "--fields", "title", "--target-modules", "nothing", words=["q_proj"]
    )
    refused("lora_finetune.py", "--model", "no/such-model", "--fields", "title", words=["--model no/such-model"])
    refused("lora_predict.py", words=["--fields title"])
    refused("lora_predict.py", "--fields", "title", "--model", "embedded", words=["--model embedded", "trained with"])
    published = tmp_path / "chatglm2-6b"
    published.mkdir()
    (published / "config.json").write_text('{"model_type": "chatglm"}')
    refused("lora_finetune.py", "--model", published, "--fields", "title", words=["convert_chatglm2.py"])

    best = tmp_path / "outputs/lora/best"
    weights = load_file(best / "adapter_model.safetensors")
    save_file({n: w * 0 if "lora_B" in n else w for n, w in weights.items()}, best / "adapter_model.safetensors")
    refused("lora_predict.py", "--fields", "title", words=["changes nothing"])
    kit_file = json.loads((best / "kit.json").read_text())
    (best / "kit.json").write_text(json.dumps(kit_file | {"prompt": "another"}))
    refused("lora_predict.py", "--fields", "title", words=["prompt"])
    (tmp_path / "outputs/paper_label.json").write_text('[{"instruction": "x"}]')
    refused("lora_finetune.py", "--model", tiny_llm, "--fields", "title", words=["paper_label.json"])


def test_no_logits_but_the_answers(tiny_llm, items):
    model, tokenizer = load(tiny_llm)
    scorer, shapes = llm.Scorer(model, tokenizer), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    papers = llm.encode_items(tokenizer, [dict(item, output="1") for item in items[:3]], 300)
    scorer(papers).sum()
    scorer.probs(papers)
    assert shapes == [(3, 2, len(tokenizer)), (3, 1, len(tokenizer))]


@pytest.mark.slow
def test_two_processes_equal_one(kit, tmp_path, tiny_llm):
    """37 test and 4 held-out papers divide by nothing."""
    flags = ["--fields", "title", "--limit", "37"]
    train = ["--model", tiny_llm, *TINY, "--limit", "37"]
    (tmp_path / "two").mkdir()
    kit("make_llm_data.py", *flags, "--out-dir", tmp_path / "two")
    for script, more in (("lora_finetune.py", train), ("lora_predict.py", flags)):
        process = start(script, tmp_path / "two", *more, launcher=TWO_PROCESSES)
        stderr = process.communicate()[1]
        assert process.returncode == 0 and "× 2 processes" in stderr and stderr.count("wrote ") == 1, stderr
    kit("make_llm_data.py", *flags)
    assert kit("lora_finetune.py", *train).returncode == 0
    assert kit("lora_predict.py", *flags).returncode == 0
    again = ["lora_predict.py", *flags, "--adapter", tmp_path / "two/lora/best", "--name", "again"]
    assert kit(*again).returncode == 0
    for name in ("valid.csv", "test.csv"):
        folders = (tmp_path / place for place in ("two/lora", "outputs/lora", "outputs/again"))
        two, one, again = (common.read_predictions(folder / name) for folder in folders)
        assert two["uuid"].tolist() == one["uuid"].tolist() == again["uuid"].tolist()
        assert np.allclose(one["prob"], two["prob"], atol=1e-4)
        assert np.allclose(again["prob"], two["prob"], atol=1e-5), "the same adapter"


@pytest.mark.slow
def test_smollm2_adapter_beats_the_untrained_model(kit, tmp_path):
    """Of few papers and tokens it learns the order and, above all, how sure to be."""
    flags = ["--fields", "title", "--limit", "60"]
    answers = pd.read_csv(SAMPLE / "test_labels.csv", dtype={"uuid": str}).set_index("uuid")["label"]

    def values(name):
        probs = common.read_predictions(tmp_path / "outputs" / name / "test.csv").set_index("uuid")["prob"]
        return common.scores(answers[probs.index], probs)

    kit("make_llm_data.py", *flags)
    untrained = ["--adapter", "none", "--model", "embedded", "--max-length", "96"]
    assert kit("lora_predict.py", *untrained, *flags).returncode == 0
    done = kit("lora_finetune.py", "--model", "embedded", "--epochs", "1", "--max-length", "96", *flags)
    assert done.returncode == 0, done.stderr
    assert kit("lora_predict.py", *flags).returncode == 0
    before, after = values("untrained"), values("lora")
    assert after["log_loss"] < 0.7 * before["log_loss"] and after["auc"] > before["auc"] + 0.05

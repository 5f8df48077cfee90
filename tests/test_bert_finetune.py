import json
import re
import shutil
import time

import bert_finetune
import common
from conftest import SAMPLE, SIZES, TWO_PROCESSES, call, contents, start
from lib import training
from lib.items import short_copies
from lib.results import read_predictions, scores

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Tokenizer,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
    pipeline,
)

TINY = ["--epochs", "2", "--batch-size", "4", "--max-length", "48", "--lr", "0.003", "--limit", "40"]


@pytest.fixture(scope="module")
def command(tiny_bert):
    return ["bert_finetune.py", "--model", tiny_bert, *TINY]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command):
    """A folder in which a run has finished, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    done = call(folder, *command)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def bert(finished, tmp_path):
    """A copy of that run's outputs/bert in tmp_path."""
    return shutil.copytree(finished[0] / "outputs" / "bert", tmp_path / "outputs" / "bert")


def results(folder):
    """{path: bytes} of what the same command writes again: predictions, logs and models, without times."""
    files = {str(path.relative_to(folder)): data for path, data in contents(folder).items()}
    return {name: files[name] for name in files if name.endswith((".csv", "model.safetensors"))}


def probs_of(path):
    return read_predictions(path).set_index("uuid")["prob"]


def test_whole_run(finished, bert, papers):
    done = finished[1]
    assert "4 held out; 2 epochs" in done.stderr and "cpu, fp32" in done.stderr and "f1" in done.stdout
    train, test = (side.head(40) for side in papers)
    valid, probs = (read_predictions(bert / name) for name in ("valid.csv", "test.csv"))
    assert valid["uuid"].tolist() == train["uuid"][common.split_papers(train)].tolist()
    assert probs["uuid"].tolist() == test["uuid"].tolist()
    metrics = json.loads((bert / "metrics.json").read_text())
    want = {"papers", "settings", "train_seconds", "train_papers_per_second", "predict_papers_per_second"}
    assert metrics.keys() >= want | {"peak_memory_mb", "versions", "device"}
    assert metrics["scores"] == scores(valid["label"], valid["prob"])
    record = json.loads((bert / "best" / "kit.json").read_text())
    assert record["fields"] == metrics["fields"] and record["max_length"] == 48 and record["seed"] == 42

    # best/ is a plain model directory: any tool gives the same answer.
    classify = pipeline("text-classification", str(bert / "best"), top_k=None)
    for text, prob in zip(bert_finetune.make_texts(test, metrics["fields"])[:5], probs["prob"]):
        answer = {row["label"]: row["score"] for row in classify([text], truncation=True, max_length=48)[0]}
        assert answer.keys() == {"other", "medical"} and answer["medical"] == pytest.approx(prob, abs=1e-5)


def test_the_same_command_gives_the_same_result(kit, bert, command):
    first = results(bert)
    other = kit(*command, "--resume", "--dropout", "0.1")
    assert other.returncode == 2 and "dropout was 0.0 and is 0.1" in other.stderr and results(bert) == first
    again = kit(*command, "--resume")  # it is finished, so it only predicts
    assert again.returncode == 0 and "epoch 1" not in again.stderr and results(bert) == first
    assert kit(*command).returncode == 0 and results(bert) == first


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "names"), [("--folds", ("fold1", "fold2")), ("--seeds", ("seed42", "seed43"))])
def test_two_models_and_resumed_equals_uninterrupted(kit, tmp_path, command, monkeypatch, papers, flags, names):
    """A run of two models is killed in the eleventh step of the second one."""
    few = ["--epochs", "1", "--batch-size", "1", "--accumulate", "1", "--limit", "24", "--save-minutes", "0"]
    command = [*command, flags, "2", "--no-short-copies", *few]
    done = kit(*command, "--name", "whole")
    assert done.returncode == 0, done.stderr
    whole, losses, calls = tmp_path / "outputs" / "whole", bert_finetune.Task.losses, []
    steps = int(re.search(r"(\d+) steps of 1", done.stderr)[1])

    def dying(*arguments):
        calls.append(1)
        if len(calls) > steps + 10:
            raise KeyboardInterrupt
        return losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bert_finetune.Task, "losses", dying)
        cut = kit(*command, "--name", "cut")
    assert cut.returncode == 130 and cut.stderr.endswith("; the same command with --resume goes on\n")
    resumed = kit(*command, "--name", "cut", "--resume")
    assert resumed.returncode == 0 and "resumed after 0 epochs and 10 steps" in resumed.stderr, resumed.stderr
    assert results(tmp_path / "outputs" / "cut") == results(whole)

    metrics, test = json.loads((whole / "metrics.json").read_text()), papers[1].head(4)
    if flags == "--folds":
        assert metrics["papers"]["held_out"] == len(read_predictions(whole / "valid.csv")) == 24
    else:
        assert len(metrics["seeds"]) == 2 and "cut, mean" in resumed.stdout and "cut, deviation" in resumed.stdout
    found = []
    for name in names:
        tokenizer = bert_finetune.load_tokenizer(whole / name / "best")
        model = bert_finetune.load_model(whole / name / "best").eval()
        with torch.no_grad():
            items = bert_finetune.encode(tokenizer, test, metrics["fields"], 48)
            found.append(bert_finetune.Task(tokenizer, "cpu", {}).probs(model, items).numpy())
    assert np.allclose(np.mean(found, axis=0), probs_of(whole / "test.csv")[:4], atol=1e-5)
    assert not np.allclose(*found, atol=1e-5)
    before = probs_of(whole / "test.csv")
    assert kit("bert_finetune.py", "--predict-only", "--limit", "24", "--name", "whole").returncode == 0
    assert np.allclose(probs_of(whole / "test.csv"), before, atol=1e-6)


def test_a_held_out_paper_shapes_nothing(kit, tmp_path, command, papers):
    """Whatever one held-out paper says, the trained weights and the answers to all others are the same."""
    train = papers[0].head(40)
    changed = train.copy()
    place = np.flatnonzero(common.split_papers(train))[0]
    changed.loc[place, ["title", "author", "abstract"]] = ["zebra " * 9, "Q. Q.;" * 9, "zebra"]
    probs, learned = [], []
    for name, frame in (("a", train), ("b", changed)):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        done = kit(*command, "--epochs", "1", "--train", f"{name}.csv", "--name", name)
        assert done.returncode == 0, done.stderr
        probs.append(probs_of(tmp_path / "outputs" / name / "valid.csv"))
        learned.append(load_file(tmp_path / "outputs" / name / "last.safetensors"))
    assert all(torch.equal(tensor, learned[1][key]) for key, tensor in learned[0].items())
    same = probs[0] == probs[1]
    assert same.sum() == 3 and not same[train["uuid"][place]]


def test_predict_only(kit, tmp_path, bert, test_b):
    refusal = kit("bert_finetune.py", "--predict-only", "--name", "none")
    assert refusal.returncode == 2 and "no finished run" in refusal.stderr
    before = probs_of(bert / "test.csv")
    assert kit("bert_finetune.py", "--predict-only").returncode == 0  # without --limit: all 40 test papers
    assert np.allclose(probs_of(bert / "test.csv"), before, atol=1e-5)
    done = kit("bert_finetune.py", "--predict-only", "--test", "testB.csv")
    assert done.returncode == 0, done.stderr
    after = probs_of(bert / "test.csv")
    assert after.index.tolist() == test_b["uuid"].tolist() and np.allclose(after, before[after.index], atol=1e-5)
    assert kit("blend.py", "--test", "testB.csv", "--limit", "40").returncode == 0
    test_b.drop(columns="author").to_csv(tmp_path / "testC.csv", index=False)
    lacking = kit("bert_finetune.py", "--predict-only", "--test", "testC.csv")
    assert lacking.returncode == 2 and "author" in lacking.stderr


# ---- what the model reads --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encode(tiny_bert):
    tokenizer = bert_finetune.load_tokenizer(tiny_bert)
    return tokenizer, lambda frame, fields=("title", "author", "abstract"): [
        paper["input_ids"] for paper in bert_finetune.encode(tokenizer, frame, fields, 48)
    ]


def test_a_long_paper_loses_its_abstract_not_its_authors(encode):
    tokenizer, ids_of = encode
    head = pd.DataFrame({"title": ["a title"], "author": ["Lee, Ann"], "abstract": [""]})
    (short,), (cut,) = ids_of(head), ids_of(head.assign(abstract="b c d " * 500))
    assert len(cut) == 48 and cut[: len(short) - 1] == short[:-1] and cut[-1] == tokenizer.sep_token_id


def test_the_default_length_is_what_fields_need_and_the_model_reads(tiny_bert):
    small = bert_finetune.load_model(tiny_bert)
    large = BertModel(BertConfig(vocab_size=20, max_position_embeddings=600, **SIZES))
    for model, fields, length in (
        (large, ["title", "author", "abstract"], 192),
        (large, ["title", "abstract"], 512),
        (small, ["title", "abstract"], 64),
    ):
        assert bert_finetune.choose_length(model, None, fields) == length
        assert bert_finetune.choose_length(model, 48, fields) == 48


def test_control_tokens_in_a_paper_are_plain_text(encode):
    tokenizer, ids_of = encode
    frame = pd.DataFrame({"title": ["a [MASK] b [SEP] c [PAD] [CLS]"], "author": "", "abstract": ""})
    (ids,) = ids_of(frame)
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id}
    assert [i for i in ids if i in special] == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_short_copies_of_the_papers_to_learn_from():
    frame = pd.DataFrame({"title": ["t", "u"], "author": ["a", ""], "abstract": ["x", "y"], "label": [1, 0]})
    copies = [copy.to_numpy().tolist() for copy in short_copies(frame, ["title", "author", "abstract"])]
    assert copies == [[["t", "a", "", 1], ["u", "", "", 0]], [["", "a", "", 1]]]
    assert short_copies(frame, ["abstract"]) == [] and len(short_copies(frame, ["title", "abstract"])) == 1
    texts = [copy["author"].tolist() for copy in short_copies(frame, ["author", "abstract"])]
    assert texts == [["a"], ["a"]], "no paper without text"


def test_the_same_answer_in_any_batch(tiny_bert, encode, papers):
    tokenizer, ids_of = encode
    items = [{"input_ids": ids} for ids in ids_of(papers[1].assign(abstract=""))]
    model, task = bert_finetune.load_model(tiny_bert).eval(), bert_finetune.Task(tokenizer, "cpu", {})
    with torch.no_grad():
        alone = torch.cat([task.probs(model, [item]) for item in items])
        assert torch.allclose(task.probs(model, items), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "no/such-model"], ["--model no/such-model", "HF_ENDPOINT"]),
        (["--model", "../x/../y"], ["neither a directory nor a name"]),
        (["--model", "."], ["--model ."]),
        (["--max-length", "9999", "--model", "TINY"], ["--max-length 9999", "64 tokens"]),
        (["--precision", "fp16", "--model", "TINY"], ["--precision fp16", "CUDA"]),
        (["--folds", "1"], ["--folds"]),
        (["--predict-only", "--fields", "title"], ["--predict-only", "--fields"]),
        (["--predict-only", "--max-length", "9"], ["--predict-only", "--max-length"]),
        (["--folds", "99", "--model", "TINY"], ["--folds 99"]),
    ],
)
def test_refuses(refused, tiny_bert, flags, words):
    flags = [tiny_bert if flag == "TINY" else flag for flag in flags]
    refused("bert_finetune.py", *flags, words=words, HF_HUB_OFFLINE=1)


# ---- encoders of other kinds -----------------------------------------------------------------------------------------


def make_encoder(kind, folder):
    """A tiny encoder with random weights and a tokenizer as its kind has it, of the sample's words: a directory."""
    config, tokenizer, special = {
        "modernbert": (
            ModernBertConfig(pad_token_id=0, cls_token_id=2, sep_token_id=3, global_attn_every_n_layers=2, **SIZES),
            None,
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        ),
        "deberta-v2": (
            DebertaV2Config(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, **SIZES),
            DebertaV2Tokenizer,
            ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
        ),
        "xlm-roberta": (
            XLMRobertaConfig(pad_token_id=1, max_position_embeddings=66, **SIZES),
            XLMRobertaTokenizer,
            ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        ),
    }[kind]
    papers = common.read_papers(SAMPLE / "train.csv")
    texts = common.build_text(papers, ["title", "author"])
    if tokenizer is None:
        bpe = Tokenizer(models.BPE(unk_token="[UNK]"))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        bpe.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    else:
        letters = sorted(set("".join(texts)) - {" "})
        words = sorted({f"▁{word}" for text in texts for word in text.split() if len(word) > 2})
        pieces = [("▁", -3.0), *((letter, -6.0) for letter in letters), *((word, -8.0) for word in words)]
        tokenizer = tokenizer(vocab=[*((token, 0.0) for token in special), *pieces])
    tokenizer.save_pretrained(folder)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modernbert", "deberta-v2", "xlm-roberta"])
def test_encoders_people_choose_today(kit, tmp_path, kind, monkeypatch):
    """Trained, killed, resumed; the saved model predicts again what the run predicted."""
    few = ["--epochs", "1", "--batch-size", "4", "--max-length", "48", "--limit", "24", "--save-minutes", "0"]
    command = ["bert_finetune.py", "--model", make_encoder(kind, tmp_path / kind), *few]
    assert kit(*command, "--name", "whole").returncode == 0

    def dying(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "score_epoch", dying)
        assert kit(*command, "--name", "cut").returncode == 130
    resumed = kit(*command, "--name", "cut", "--resume")
    assert resumed.returncode == 0 and "resumed after" in resumed.stderr, resumed.stderr
    whole, cut = (tmp_path / "outputs" / name for name in ("whole", "cut"))
    assert results(cut) == results(whole)
    before = probs_of(whole / "test.csv")
    assert kit("bert_finetune.py", "--predict-only", "--name", "whole", "--limit", "24").returncode == 0
    assert np.allclose(probs_of(whole / "test.csv"), before, atol=1e-6) and before.std() > 0


# ---- slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_one_dies_and_resumed_they_equal_one(kit, tmp_path, command):
    """37 test and 4 held-out papers divide by nothing."""
    (tmp_path / "two").mkdir()
    flags = [*command[1:], "--limit", "37", "--epochs", "8", "--patience", "8", "--save-minutes", "0"]
    two = start("bert_finetune.py", tmp_path / "two", *flags, launcher=TWO_PROCESSES)
    while not (tmp_path / "two/bert/last.safetensors").exists() and two.poll() is None:
        time.sleep(0.01)
    ranks = {process.environ().get("RANK"): process for process in psutil.Process(two.pid).children(recursive=True)}
    ranks["1"].kill()  # the first must end, too
    assert "Signal 9 (SIGKILL) received" in two.communicate(timeout=60)[1] and two.returncode not in (0, 2)
    assert not any(process.is_running() for process in ranks.values())

    two = start("bert_finetune.py", tmp_path / "two", *flags, "--resume", launcher=TWO_PROCESSES)
    stderr = two.communicate()[1]
    assert two.returncode == 0, stderr
    assert "× 2 processes" in stderr and "resumed after" in stderr and stderr.count("wrote ") == 1
    assert kit("bert_finetune.py", *flags).returncode == 0
    both = [probs_of(tmp_path / side / "bert" / "test.csv") for side in ("two", "outputs")]
    assert both[0].index.equals(both[1].index) and np.allclose(*both, atol=1e-4)

    # The same weights: what two processes predict is what one predicts.
    only = ["--predict-only", "--limit", "37", "--out-dir", tmp_path / "two"]
    assert kit("bert_finetune.py", *only).returncode == 0
    assert np.allclose(probs_of(tmp_path / "two" / "bert" / "test.csv"), both[0], atol=1e-5)


@pytest.mark.slow
def test_minilm_beats_the_constant_guess_by_far(kit, tmp_path):
    done = kit("bert_finetune.py", "--model", "embedded", "--epochs", "2", "--max-length", "64")
    assert done.returncode == 0, done.stderr
    probs = probs_of(tmp_path / "outputs/bert/test.csv")
    answers = pd.read_csv(SAMPLE / "test_labels.csv", dtype={"uuid": str}).set_index("uuid")["label"]
    assert ((probs >= 0.5) == answers[probs.index]).mean() >= 0.85

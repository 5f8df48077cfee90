import json
import subprocess
import sys

import baseline
import common
from conftest import KIT, SAMPLE
from lib.results import read_predictions, scores

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

SETTINGS = {"model": "lr", "strength": 30, "seed": 0}


@pytest.fixture(scope="module")
def train():
    return common.read_papers(SAMPLE / "train.csv", labelled=True)


@pytest.mark.parametrize("text", ["all", "held out"])
@pytest.mark.parametrize("model", ["lr", "nb"])
def test_a_held_out_paper_shapes_nothing_in_its_fold(train, model, text):
    """Whatever one paper says, the other papers of its fold get the same probabilities; even if no other fold has
    text.
    """
    settings, labels = {**SETTINGS, "model": model}, train["label"].to_numpy()
    folds, fields = common.fold_numbers(train, 5, 1), ["title", "author", "abstract"]
    paper = int(np.flatnonzero(folds == 0)[0])
    other = train.copy()
    other.loc[paper, fields] = ["zebra " * 50, "Q. Q.;" * 9, train["abstract"][paper + 1] * 3]
    probs = []
    for papers in (train.copy(), other):
        if text == "held out":
            papers.loc[folds > 0, fields] = ""
        _, counts = baseline.count_ngrams(papers, fields)
        probs.append(baseline.out_of_fold(counts, labels, folds, settings))
    same = (folds == 0) & (np.arange(len(train)) != paper)
    assert np.array_equal(probs[0][same], probs[1][same])
    if text == "all":
        assert not np.array_equal(probs[0][folds == 1], probs[1][folds == 1])  # there it is a training paper


def test_author_characters_tell_what_words_cannot(train):
    """Where the way authors are written is the label, the author block finds it and so does the rule."""
    labels = train["label"].to_numpy()
    author = ["Lee, Ann; Chen, Bo" if label else "Ann Lee,Bo Chen" for label in labels]
    written, folds = train.assign(author=author), common.fold_numbers(train, 5, 1)
    assert scores(labels, baseline.author_rule(author, labels, folds))["accuracy"] == 1
    _, counts = baseline.count_ngrams(written, ["title", "author"])
    assert scores(labels, baseline.out_of_fold(counts, labels, folds, SETTINGS))["f1"] == 1


def test_author_styles():
    cells = ["Lee, Ann; Chen, Bo", "Lee, Ann", "Ann Lee;Bo Chen", "Ann Lee,Bo Chen", "Ann Lee", ""]
    assert [baseline.author_style(cell) for cell in cells] == [";", ";", ";", ",", "name", "none"]


@pytest.mark.parametrize("model", baseline.MODELS)
def test_papers_that_share_no_word_get_the_share_of_the_classes(model):
    papers = pd.DataFrame({"title": ["milk", "cell", "5G", "gene", "wall", "rice", "rain", "lung"], "abstract": ""})
    _, counts = baseline.count_ngrams(papers, ["title"])
    labels, folds = np.array([0, 1] * 4), np.arange(8) // 4
    probs = baseline.out_of_fold(counts, labels, folds, {**SETTINGS, "model": model})
    assert np.allclose(probs, 0.5, atol=0.1)


def test_what_one_class_uses_counts_more_than_what_both_use():
    values = csr_matrix([[1.0, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 1]])
    both, first, rare = baseline.class_ratio(values, np.array([0, 0, 1, 1]))
    assert first > rare > both and both < 0.6


def test_the_strongest_ngrams_are_those_of_the_model(train):
    """What is planted in every paper of a class leads its list, block by block."""
    labels = train["label"].to_numpy()
    titles = [f"{title} {'Zebra' if label else '斑马'}" for title, label in zip(train["title"], labels)]
    planted = train.assign(title=titles, author=["Ann Lee" if label else "Lee; Ann" for label in labels])
    counters, counts = baseline.count_ngrams(planted, ["title", "author", "abstract"], 1)
    found = baseline.strongest_ngrams(baseline.Model(counts, labels, SETTINGS), counters)
    assert found["words"]["1"][0][0] == "zebra" and found["words"]["0"][0][0] == "斑马"
    assert found["author"]["0"][0][0] in "Lee; A" and found["author"]["1"][0][0] in "Ann Lee"
    for ngrams in (*found["words"].values(), *found["author"].values()):
        weights = [weight for _, weight in ngrams]
        assert weights == sorted(weights, reverse=True) and weights[-1] > 0


def test_whole_run(kit, tmp_path):
    done = kit("baseline.py", "--model", "all", "--folds", 3)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "baseline"
    train, test = (pd.read_csv(SAMPLE / f"{name}.csv", dtype=str) for name in ("train", "test"))
    valid = read_predictions(folder / "valid.csv")
    assert valid["uuid"].tolist() == train["uuid"].tolist()
    assert valid["label"].astype(str).tolist() == train["label"].tolist()
    assert read_predictions(folder / "test.csv")["uuid"].tolist() == test["uuid"].tolist()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["scores"] == scores(valid["label"], valid["prob"])
    assert metrics["scores"]["f1"] > 0.75
    assert pd.read_csv(folder / "submit_task1.csv", dtype=str)["uuid"].tolist() == test["uuid"].tolist()
    for row in ("constant guess", "author rule", "naive Bayes", "random forest", "no author"):
        assert row in done.stdout
    best = max((row for row in metrics["table"][2:]), key=lambda row: row[1]["f1"])
    assert f"are those of: {best[0]} (" in done.stdout and best[1] == metrics["scores"]


def test_of_models_with_the_same_f1_the_lower_log_loss_decides(kit, tmp_path, write_csv):
    """Two papers of a class among sixty: every model calls all papers the other class."""
    train = pd.read_csv(SAMPLE / "train.csv", dtype=str, keep_default_na=False)
    few = pd.concat([train[train["label"] == "0"], train[train["label"] == "1"].head(2)])
    path = write_csv("few.csv", [few.columns, *few.values])
    assert kit("baseline.py", "--train", path, "--folds", 2).returncode == 0
    metrics = json.loads((tmp_path / "outputs/baseline/metrics.json").read_text())
    models = [scores for _, scores, _ in metrics["table"][2:]]
    assert models[0]["f1"] == models[1]["f1"]
    assert metrics["scores"]["log_loss"] == min(scores["log_loss"] for scores in models)


def test_a_damaged_keywords_folder_costs_the_submission_alone(kit, tmp_path):
    keywords = tmp_path / "outputs" / "keywords"
    keywords.mkdir(parents=True)
    for name in ("board.csv", "metrics.json"):
        (keywords / name).write_text("[")
    done = kit("baseline.py")
    assert done.returncode == 2 and "metrics.json is damaged" in done.stderr
    assert sorted(path.name for path in keywords.with_name("baseline").glob("[a-z]*")) == [
        "metrics.json", "test.csv", "valid.csv"]


def test_same_command_same_result(kit, tmp_path):
    for name in ("a", "b"):
        assert kit("baseline.py", "--fields", "title", "abstract", OUT_DIR=tmp_path / name).returncode == 0
    for name in ("valid.csv", "test.csv"):
        assert (tmp_path / "a" / "baseline" / name).read_bytes() == (tmp_path / "b" / "baseline" / name).read_bytes()


def test_papers_without_text_get_a_prediction_and_one_class_alone_a_warning(kit, tmp_path, write_csv):
    rows = [["uuid", "title", "author", "abstract"], *([str(i), "Untitled " * (i % 3), "", ""] for i in range(20))]
    done = kit("baseline.py", "--test", write_csv("t.csv", rows))
    assert done.returncode == 0 and "7 papers of" in done.stderr and "no text" in done.stderr
    assert "warning: 20 of 20 test papers get label" in done.stderr
    uuids = read_predictions(tmp_path / "outputs" / "baseline" / "test.csv")["uuid"].tolist()
    assert uuids == [row[0] for row in rows[1:]]


def test_says_what_is_odd_of_train_and_test(kit, write_csv):
    train = pd.read_csv(SAMPLE / "train.csv", dtype=str, keep_default_na=False)
    rows = [["uuid", "title", "abstract"], ["x7", train["title"][3], train["abstract"][3]], ["x8", "a", "b"]]
    done = kit("baseline.py", "--test", write_csv("t.csv", rows), "--limit", 60)
    assert "1 test papers are in" in done.stderr and "uuid x7" in done.stderr
    assert "field author is left out: no such column, or an empty one, in test" in done.stderr
    assert "--limit 60" in done.stderr and "60 out of fold" in done.stdout


@pytest.mark.parametrize("flags, words", [
    (["--folds", "99"], ["--folds 99", "train"]),
    (["--fields", "Keywords"], ["--fields Keywords"]),
    (["--limit", "1"], ["--limit 1", "label"]),
    (["--train", SAMPLE / "test.csv"], ["test.csv", "no column label"]),
])  # fmt: skip
def test_refuses(refused, flags, words):
    refused("baseline.py", *flags, words=words)


@pytest.mark.slow
def test_no_torch_is_imported():
    code = "import sys, baseline, extract_keywords; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=KIT).returncode == 0

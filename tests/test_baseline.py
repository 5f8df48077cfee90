import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import SAMPLE

import baseline
import common

SETTINGS = {"features": "tfidf", "model": "lr", "strength": 30, "author_weight": 2, "max_features": None, "seed": 0}


@pytest.fixture(scope="module")
def papers():
    return common.read_papers(SAMPLE / "train.csv", labelled=True)


@pytest.mark.parametrize("change", [{}, {"features": "bow"}, {"model": "nb"}, {"model": "svm"}, {"max_features": 500}])
def test_a_held_out_paper_shapes_nothing_in_its_fold(papers, change):
    """Whatever stands in one paper, the other papers of its fold get the same probabilities."""
    settings, labels = {**SETTINGS, **change}, papers["label"].to_numpy()
    folds = common.fold_numbers(papers, 5, 1)
    other = papers.copy()
    paper = int(np.flatnonzero(folds == 0)[0])
    other.loc[paper, ["title", "abstract", "author"]] = ["zebra " * 50, papers["abstract"][paper + 1] * 3, "Q. Q.;" * 9]
    fields = ["title", "author", "abstract"]
    probs = [baseline.out_of_fold(baseline.count_ngrams(p, fields), labels, folds, settings) for p in (papers, other)]
    same = (folds == 0) & (np.arange(len(papers)) != paper)
    assert np.array_equal(probs[0][same], probs[1][same])
    assert not np.array_equal(probs[0][folds == 1], probs[1][folds == 1])  # there it is a training paper


def test_author_characters_tell_what_words_cannot(papers):
    """Where the way authors are written is the label, the author block finds it and so does the rule."""
    labels = papers["label"].to_numpy()
    author = ["Lee, Ann; Chen, Bo" if label else "Ann Lee,Bo Chen" for label in labels]
    written, folds = papers.assign(author=author), common.fold_numbers(papers, 5, 1)
    rule = common.scores(labels, baseline.author_rule(author, labels, folds))
    blocks = baseline.count_ngrams(written, ["title", "author"])
    assert rule["accuracy"] == 1
    assert common.scores(labels, baseline.out_of_fold(blocks, labels, folds, SETTINGS))["f1"] == 1


def test_a_paper_is_counted_alike_in_any_company(papers):
    alone = baseline.count_ngrams(papers.iloc[[5]], ["title", "abstract"])["words"]
    together = baseline.count_ngrams(papers, ["title", "abstract"])["words"]
    assert (alone != together[[5]]).nnz == 0


def test_whole_run(kit, tmp_path):
    done = kit("baseline.py", "--model", "all", "--folds", 3)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "baseline"
    train, test = (pd.read_csv(SAMPLE / f"{name}.csv", dtype=str) for name in ("train", "test"))
    valid = common.read_predictions(folder / "valid.csv")
    assert valid["uuid"].tolist() == train["uuid"].tolist()
    assert valid["label"].astype(str).tolist() == train["label"].tolist()
    assert common.read_predictions(folder / "test.csv")["uuid"].tolist() == test["uuid"].tolist()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["scores"] == common.scores(valid["label"], valid["prob"])
    assert metrics["scores"]["f1"] > 0.75 and metrics["author_free_scores"]["f1"] > 0.75
    assert pd.read_csv(folder / "submit_task1.csv", dtype=str)["uuid"].tolist() == test["uuid"].tolist()
    for row in ("constant guess", "author rule", "naive Bayes", "linear SVM", "random forest", "no author"):
        assert row in done.stdout


def test_same_command_same_result(kit, tmp_path):
    for name in ("a", "b"):
        assert kit("baseline.py", "--tune", "--fields", "title", "abstract", OUT_DIR=tmp_path / name).returncode == 0
    for name in ("valid.csv", "test.csv"):
        assert (tmp_path / "a" / "baseline" / name).read_bytes() == (tmp_path / "b" / "baseline" / name).read_bytes()


def test_papers_without_text_get_a_prediction(kit, tmp_path, write_csv):
    rows = [["uuid", "title", "author", "abstract"], ["1", "", "", ""], ["2", "flu", "", ""]]
    done = kit("baseline.py", "--test", write_csv("t.csv", rows))
    assert done.returncode == 0 and "1 papers of" in done.stderr and "no text" in done.stderr
    assert common.read_predictions(tmp_path / "outputs" / "baseline" / "test.csv")["uuid"].tolist() == ["1", "2"]


def test_says_what_is_odd_of_train_and_test(kit, write_csv):
    train = pd.read_csv(SAMPLE / "train.csv", dtype=str, keep_default_na=False)
    rows = [["uuid", "title", "abstract"], ["x7", train["title"][3], train["abstract"][3]], ["x8", "a", "b"]]
    done = kit("baseline.py", "--test", write_csv("t.csv", rows), "--limit", 60)
    assert "1 test papers stand in" in done.stderr and "uuid x7" in done.stderr
    assert "field author left out of train and test: the test file" in done.stderr
    assert "--limit 60" in done.stderr and "60 out of fold" in done.stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--folds", "1"], ["--folds"]),
        (["--folds", "99"], ["--folds 99", "train"]),
        (["--folds", "many"], ["--folds", "many"]),
        (["--fields", "titel"], ["--fields", "titel"]),
        (["--fields", "Keywords"], ["--fields Keywords"]),
        (["--valid-ratio", "2"], ["--valid-ratio"]),
        (["--limit", "0"], ["--limit"]),
        (["--limit", "1"], ["--limit 1", "label"]),
        (["--strength", "3", "--tune"], ["--strength"]),
        (["--train", "none.csv"], ["none.csv", "no such file"]),
        (["--train", SAMPLE / "test.csv"], ["test.csv", "no column label"]),
        (["--test", SAMPLE / "train.csv"], ["train.csv", "--test"]),
    ],
)
def test_refuses(refused, flags, words):
    refused("baseline.py", *flags, words=words)


def test_as_a_process():
    """From a shell: one line on stderr and exit code 2; and no torch is imported."""
    command = [sys.executable, "baseline.py", "--train", "none.csv"]
    done = subprocess.run(command, cwd=common.HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("baseline.py: none.csv: no such file"), done.stderr
    code = "import sys, baseline, blend; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=common.HERE).returncode == 0

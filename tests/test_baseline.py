import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import KIT, SAMPLE
from scipy.sparse import csr_matrix

import baseline
import common
from lib.results import read_predictions, scores

SETTINGS = {"features": "tfidf", "model": "lr", "strength": 30, "author_weight": 2, "max_features": None, "seed": 0}


@pytest.fixture(scope="module")
def train():
    return common.read_papers(SAMPLE / "train.csv", labelled=True)


@pytest.mark.parametrize("change", [{}, {"features": "bow"}, {"model": "nb"}, {"model": "svm"}, {"max_features": 500}])
def test_a_held_out_paper_shapes_nothing_in_its_fold(train, change):
    """Whatever one paper says, the other papers of its fold get the same probabilities."""
    settings, labels = {**SETTINGS, **change}, train["label"].to_numpy()
    folds = common.fold_numbers(train, 5, 1)
    other = train.copy()
    paper = int(np.flatnonzero(folds == 0)[0])
    other.loc[paper, ["title", "abstract", "author"]] = ["zebra " * 50, train["abstract"][paper + 1] * 3, "Q. Q.;" * 9]
    fields = ["title", "author", "abstract"]
    probs = [baseline.out_of_fold(baseline.count_ngrams(p, fields), labels, folds, settings) for p in (train, other)]
    same = (folds == 0) & (np.arange(len(train)) != paper)
    assert np.array_equal(probs[0][same], probs[1][same])
    assert not np.array_equal(probs[0][folds == 1], probs[1][folds == 1])  # there it is a training paper


def test_author_characters_tell_what_words_cannot(train):
    """Where the way authors are written is the label, the author block finds it and so does the rule."""
    labels = train["label"].to_numpy()
    author = ["Lee, Ann; Chen, Bo" if label else "Ann Lee,Bo Chen" for label in labels]
    written, folds = train.assign(author=author), common.fold_numbers(train, 5, 1)
    assert scores(labels, baseline.author_rule(author, labels, folds))["accuracy"] == 1
    counts = baseline.count_ngrams(written, ["title", "author"])
    assert scores(labels, baseline.out_of_fold(counts, labels, folds, SETTINGS))["f1"] == 1


def test_author_styles():
    cells = ["Lee, Ann; Chen, Bo", "Lee, Ann", "Ann Lee;Bo Chen", "Ann Lee,Bo Chen", "Ann Lee", ""]
    assert [baseline.author_style(cell) for cell in cells] == [";", ";", ";", ",", "name", "none"]


def test_a_paper_is_counted_alike_in_any_company(train):
    alone = baseline.count_ngrams(train.iloc[[5]], ["title", "abstract"])["words"]
    together = baseline.count_ngrams(train, ["title", "abstract"])["words"]
    assert (alone != together[[5]]).nnz == 0


def test_what_one_class_uses_counts_more_than_what_both_use():
    values = csr_matrix([[1.0, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 1]])
    both, first, rare = baseline.class_ratio(values, np.array([0, 0, 1, 1]))
    assert first > rare > both and both < 0.6


@pytest.mark.parametrize("name", ["lr", "nb", "svm", "rf"])
def test_the_strongest_ngrams_are_those_of_the_model(train, name):
    """A word that is planted in every paper of a class leads its list, although columns are hashed."""
    labels = train["label"].to_numpy()
    titles = [f"{title} {'zebra' if label else '斑马'}" for title, label in zip(train["title"], labels)]
    texts = baseline.block_texts(train.assign(title=titles), ["title", "abstract"])
    counts = baseline.count_ngrams(train.assign(title=titles), ["title", "abstract"], 1)
    settings = {**SETTINGS, "features": "bow", "model": name, "strength": baseline.STRENGTH[name]}
    found = baseline.strongest_ngrams(baseline.fit(counts, labels, settings), texts, counts, 1)["words"]
    if name == "rf":  # a forest has no weights
        assert found == {"0": [], "1": []}
    else:
        assert found["1"][0][0] == "zebra" and found["0"][0][0] == "斑马"
        weights = [weight for _, weight in found["1"]]
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
    assert metrics["scores"]["f1"] > 0.75 and metrics["author_free_scores"]["f1"] > 0.75
    assert pd.read_csv(folder / "submit_task1.csv", dtype=str)["uuid"].tolist() == test["uuid"].tolist()
    for row in ("constant guess", "author rule", "naive Bayes", "linear SVM", "random forest", "no author"):
        assert row in done.stdout
    best = max((row for row in metrics["table"][2:]), key=lambda row: row[1]["f1"])
    assert f"{best[0]} (the highest F1)" in done.stdout and best[1] == metrics["scores"]


def test_models_with_the_same_f1_are_no_winner_and_a_loser(kit, write_csv):
    """Two papers of a class among sixty: every model calls all papers the other class."""
    train = pd.read_csv(SAMPLE / "train.csv", dtype=str, keep_default_na=False)
    few = pd.concat([train[train["label"] == "0"], train[train["label"] == "1"].head(2)])
    path = write_csv("few.csv", [few.columns, *few.values])
    done = kit("baseline.py", "--train", path, "--folds", 2)
    assert "equal in F1" in done.stdout and "the highest" not in done.stdout
    refused = kit("baseline.py", "--train", path, "--folds", 2, "--model", "svm")
    assert refused.returncode == 2 and "--model svm or all needs 2 papers" in refused.stderr


def test_a_damaged_keywords_folder_costs_the_submission_alone(kit, tmp_path):
    keywords = tmp_path / "outputs" / "keywords"
    keywords.mkdir(parents=True)
    for name in ("board.csv", "metrics.json"):
        (keywords / name).write_text("[")
    done = kit("baseline.py")
    assert done.returncode == 2 and "metrics.json is damaged" in done.stderr
    assert sorted(path.name for path in keywords.with_name("baseline").glob("[a-z]*")) == [
        "metrics.json", "test.csv", "valid.csv"]


def test_same_command_same_result(kit, tmp_path, monkeypatch):
    """Also where test papers are scored in blocks."""
    for name, block in (("a", 10_000), ("b", 7)):
        monkeypatch.setattr(baseline, "BLOCK", block)
        assert kit("baseline.py", "--tune", "--fields", "title", "abstract", OUT_DIR=tmp_path / name).returncode == 0
    for name in ("valid.csv", "test.csv"):
        assert (tmp_path / "a" / "baseline" / name).read_bytes() == (tmp_path / "b" / "baseline" / name).read_bytes()


def test_papers_without_text_get_a_prediction(kit, tmp_path, write_csv):
    rows = [["uuid", "title", "author", "abstract"], ["1", "", "", ""], ["2", "flu", "", ""]]
    done = kit("baseline.py", "--test", write_csv("t.csv", rows))
    assert done.returncode == 0 and "1 papers of" in done.stderr and "no text" in done.stderr
    assert read_predictions(tmp_path / "outputs" / "baseline" / "test.csv")["uuid"].tolist() == ["1", "2"]


def test_warns_where_all_test_papers_get_one_class(kit, write_csv):
    rows = [["uuid", "title", "author", "abstract"], *([str(i), "Untitled " * (1 + i % 2), "", ""] for i in range(20))]
    done = kit("baseline.py", "--test", write_csv("t.csv", rows))
    assert done.returncode == 0 and "warning: 20 of 20 test papers get label" in done.stderr


def test_says_what_is_odd_of_train_and_test(kit, write_csv):
    train = pd.read_csv(SAMPLE / "train.csv", dtype=str, keep_default_na=False)
    rows = [["uuid", "title", "abstract"], ["x7", train["title"][3], train["abstract"][3]], ["x8", "a", "b"]]
    done = kit("baseline.py", "--test", write_csv("t.csv", rows), "--limit", 60)
    assert "1 test papers are in" in done.stderr and "uuid x7" in done.stderr
    assert "field author is left out: no such column, or an empty one, in test" in done.stderr
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
        (["--train", "none.csv"], ["none.csv", "no such file"]),
        (["--train", SAMPLE / "test.csv"], ["test.csv", "no column label"]),
        (["--test", SAMPLE / "train.csv"], ["train.csv", "--test"]),
    ],
)
def test_refuses(refused, flags, words):
    refused("baseline.py", *flags, words=words)


@pytest.mark.slow
def test_as_a_process():
    """From a shell: one line on stderr and exit code 2; and no torch is imported."""
    command = [sys.executable, "baseline.py", "--train", "none.csv"]
    done = subprocess.run(command, cwd=KIT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("baseline.py: none.csv: no such file"), done.stderr
    code = "import sys, baseline; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=KIT).returncode == 0

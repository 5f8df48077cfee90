import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import KIT, SAMPLE

import blend
from lib.results import paper_record, save_results, scores


@pytest.fixture
def model(tmp_path, papers):
    """Write a made-up model's results: probabilities around the truth, so that f1 falls as `noise` grows."""
    train, test = papers
    answers = pd.read_csv(SAMPLE / "test_labels.csv")["label"].to_numpy()

    def write(name, noise, held_out=None, seed=0):
        random = np.random.default_rng(seed)
        held_out = np.ones(len(train), bool) if held_out is None else held_out
        guess = [np.clip(y + noise * random.normal(size=len(y)), 0, 1) for y in (train["label"][held_out], answers)]
        metrics = {"papers": paper_record(train, test, held_out.sum()), "fields": ["title"]}
        save_results(tmp_path / "outputs" / name, metrics, test, guess[1], train[held_out], guess[0])

    return write


@pytest.mark.parametrize("seed", range(20))
def test_never_worse_than_the_best_single_model(seed):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat([0, 1], [25, 15]))
    models = np.clip(labels + random.uniform(0.2, 0.9, (4, 1)) * random.normal(size=(4, 40)), 0, 1)
    weights = blend.find_weights(models, labels)
    best = [scores(labels, model)["f1"] for model in models]
    mixed = scores(labels, weights @ models)["f1"]
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all() and mixed >= max(best)
    if weights.max() == 1:  # one model: the plainest of the best
        assert weights.argmax() == np.argmax(best)
    else:
        assert mixed > max(best)


def test_mixes_models_that_mend_each_other():
    labels = np.tile([0, 1], 30)
    models = np.array([np.where(np.arange(60) % 3 == i, 1 - labels, labels) * 0.8 + 0.1 for i in range(3)])
    weights = blend.find_weights(models, labels)
    assert scores(labels, weights @ models)["f1"] == 1 and (weights > 0).sum() == 3


def test_submission_follows_the_test_file(kit, tmp_path, model):
    model("baseline", 0.6)
    model("bert", 0.1, seed=1, held_out=np.arange(120) % 5 == 0)
    done = kit("blend.py", "--submit", "out/s.csv")
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "out" / "s.csv", dtype=str, keep_default_na=False)
    assert rows.columns.tolist() == ["uuid", "Keywords", "label"]
    assert rows["uuid"].tolist() == pd.read_csv(SAMPLE / "test.csv", dtype=str)["uuid"].tolist()
    assert rows["label"].tolist() == pd.read_csv(SAMPLE / "test_labels.csv", dtype=str)["label"].tolist()
    assert "100% bert: one model is all it takes" in done.stdout
    assert "24 held out" in done.stdout and "40 test papers" in done.stdout and "AUC" in done.stdout


def test_equal_models_give_the_plainest(papers, kit, model):
    model("lora", 0.01)
    model("another", 0.01)
    model("baseline", 0.02)
    assert "100% baseline" in kit("blend.py").stdout


def test_tables_say_of_which_papers():
    values, labels = scores([0, 1], [0.2, 0.9]), np.array([0, 1, 1])
    metrics = {"baseline": {"papers": {"held_out": 9}, "fields": ["title"], "scores": values}}
    metrics["baseline"]["table"] = [["constant guess", values, "9 out of fold"]]
    metrics["bert"] = {"papers": {"held_out": 3}, "fields": ["abstract"], "scores": values}
    probs = {"baseline": np.array([0.1, 0.9, 0.2]), "bert": labels, "blend": labels}
    (_, held), (_, more) = blend.make_tables(metrics, labels, probs, None, {})
    assert [row[0] for row in held] == ["baseline", "bert", "blend"] and held[0][1]["accuracy"] == pytest.approx(
        2 / 3, abs=1e-6
    )
    assert [row[2] for row in held] == ["3 held out, title", "3 held out, abstract", "3 held out"]
    assert [(name, note) for name, _, note in more] == [
        ("baseline", "9 held out, title"),
        ("constant guess", "9 out of fold"),
    ]
    tables = blend.make_tables(metrics, labels, probs, np.array([1, 1]), {name: np.array([0, 1]) for name in probs})
    assert tables[1][1][1] == ("bert", scores([1, 1], [0, 1]), "2 test papers, abstract")


@pytest.mark.parametrize("accuracy", [0.5, 0.99])
def test_says_when_the_authors_give_the_label_away(accuracy):
    table = [["author rule", {"accuracy": accuracy}, ""], ["naive Bayes, no author", {"accuracy": 0.7654}, ""]]
    said = " ".join(blend.describe_trust(0.5, 40, {"baseline": {"table": table}}))
    assert "0.0250 of accuracy" in said
    assert [("The way authors" in said), ("76.54%" in said)] == [accuracy > 0.9] * 2


def test_refuses_predictions_of_other_papers(refused, model, write_csv):
    refused("blend.py", words=["baseline.py first"])
    model("baseline", 0.1)
    rows = pd.read_csv(SAMPLE / "test.csv", dtype=str, keep_default_na=False)
    rows.loc[4, "abstract"] += " More."
    other = write_csv("t.csv", [rows.columns, *rows.to_numpy()])
    refused("blend.py", "--test", other, words=["baseline", "another test file"])
    refused("blend.py", "--limit", "30", words=["baseline", "--limit"])
    train = pd.read_csv(SAMPLE / "train.csv", dtype=str, keep_default_na=False)
    other = write_csv("t.csv", [train.columns, *train.to_numpy()[:-1]])
    refused("blend.py", "--train", other, words=["baseline", "another train file"])
    model("blend", 0.1)
    refused("blend.py", words=["outputs/blend", "another name"])


def test_refuses_damaged_predictions(refused, model, tmp_path):
    model("baseline", 0.1)
    path = tmp_path / "outputs" / "baseline" / "test.csv"
    whole = path.read_text()
    for broken in (whole[: len(whole) // 2], "uuid,prob\n", whole.replace("prob", "p"), whole + "0,x\n"):
        path.write_text(broken)
        refused("blend.py", words=["baseline"])


def test_unlikeness_tells_other_topics_from_like_ones(papers):
    train, _ = papers
    alike = blend.train_test_auc(train[::2], train[1::2], ["title", "abstract"], 0)
    unlike = blend.train_test_auc(train[train["label"] == 0], train[train["label"] == 1], ["title", "abstract"], 0)
    assert alike < 0.65 and unlike > 0.9
    assert "warning" in blend.describe_auc(unlike) and "warning" not in blend.describe_auc(alike)


def test_run_sh_help_and_unknown_stage():
    shown = subprocess.run(["bash", KIT / "run.sh", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "baseline" in shown.stdout and "DATA_DIR" in shown.stdout
    wrong = subprocess.run(["bash", KIT / "run.sh", "basline"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "basline" in wrong.stderr


def test_sample_is_what_its_readme_says():
    train, test = (pd.read_csv(SAMPLE / f"{n}.csv", dtype=str, keep_default_na=False) for n in ("train", "test"))
    answers = pd.read_csv(SAMPLE / "test_labels.csv", dtype=str)
    assert len(train) == 120 and len(test) == 40 and (answers["uuid"] == test["uuid"]).all()
    assert (train["label"] == "1").sum() == 60 and (answers["label"] == "1").sum() == 20
    text = pd.concat([train, test])["title"]
    assert text.is_unique and "Keywords" not in test
    for label in "01":  # neither the authors nor the keywords give the label away
        rows = train[train["label"] == label]
        assert rows["author"].str.contains(", ").sum() in (29, 30)
        assert rows["Keywords"].str.endswith(".").sum() == 30
    assert json.loads(train.to_json())  # every character is a valid one

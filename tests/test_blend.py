import re

import blend
from conftest import SAMPLE
from lib.results import scores, warn_one_class

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def own_model(tmp_path, papers):
    """Write a user's own model as pandas writes it: with an index, labels as floats, columns in another order."""
    train, test = papers
    folder = tmp_path / "outputs" / "mine"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    valid = train[["uuid"]].assign(prob=0.05 + 0.9 * train["label"], label=train["label"].astype(float))
    valid.sample(frac=1, random_state=1).to_csv(folder / "valid.csv")
    probs = test.assign(prob=random.random(len(test)))[["prob", "uuid", "title"]]
    probs.sample(frac=1, random_state=1).to_csv(folder / "test.csv")
    return folder


# ---- weights and choice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_weights_are_never_worse_than_the_best_single_model(seed):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat([0, 1], [25, 15]))
    models = np.clip(labels + random.uniform(0.2, 0.9, (4, 1)) * random.normal(size=(4, 40)), 0, 1)
    weights = blend.find_weights(models, labels)
    singles = [scores(labels, model)["f1"] for model in models]
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert scores(labels, weights @ models)["f1"] >= max(singles)


def test_models_that_correct_each_other_are_blended():
    labels = np.tile([0, 1], 30)
    probs = {str(i): np.where(np.arange(60) % 3 == i, 1 - labels, labels) * 0.8 + 0.1 for i in range(3)}
    probs["blend"] = blend.nested_blend(np.array(list(probs.values())), labels, np.arange(60) < 30)
    assert scores(labels, probs["blend"])["f1"] == 1
    assert blend.choose(labels, probs)[0] == "blend"


def test_a_blend_of_chance_is_not_taken():
    """The best of many mixtures of guesses looks good on the papers it was chosen on, and only there."""
    random = np.random.default_rng(0)
    labels, models = random.permutation(np.repeat([0, 1], 30)), random.choice([0.1, 0.9], (10, 60))
    probs = {str(i): model for i, model in enumerate(models)}
    probs["blend"] = blend.nested_blend(models, labels, np.arange(60) < 30)
    chosen_here = blend.find_weights(models, labels) @ models
    assert scores(labels, chosen_here)["f1"] > scores(labels, probs["blend"])["f1"] + 0.05
    assert blend.choose(labels, probs)[0] != "blend"


def test_standard_error_is_that_of_a_bootstrap():
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat([0, 1], [250, 150]))
    one, other = (np.where(random.random(400) < wrong, 1 - labels, labels) for wrong in (0.1, 0.2))
    gain, error = blend.f1_gain(labels, one, other)
    drawn = random.integers(0, 400, (2000, 400))
    y, a, b = labels[drawn], one[drawn], other[drawn]
    gains = 2 * (y * a).sum(axis=1) / (y + a).sum(axis=1) - 2 * (y * b).sum(axis=1) / (y + b).sum(axis=1)
    assert gain == pytest.approx(gains.mean(), abs=0.005) and error == pytest.approx(gains.std(), rel=0.1)


@pytest.mark.parametrize("wrong", [0, 1, 5])
def test_one_paper_does_not_decide_but_many_do(wrong):
    labels = np.tile([0, 1], 50)
    other = np.where(np.arange(100) < wrong, 1 - labels, labels)
    plain = np.where(np.arange(100) < wrong + 1, 1 - labels, labels)
    assert blend.choose(labels, {"plain": plain, "other": other})[0] == "plain"
    plain[50:60] = 1 - labels[50:60]
    name, reason = blend.choose(labels, {"plain": plain, "other": other})
    assert name == "other" and "F1 +0." in reason


def test_no_blend_where_a_class_has_one_paper(papers):
    """There is no other half to choose its weights on."""
    few = papers[0].sort_values("label").iloc[56:61]
    assert few["label"].tolist() == [0, 0, 0, 0, 1]
    probs = {"a": np.array([0.1, 0.1, 0.1, 0.8, 0.9]), "b": np.array([0.1, 0.1, 0.8, 0.1, 0.9])}
    assert blend.add_blend(few, probs, dict(probs), seed=42) == "50% a + 50% b"
    assert list(probs) == ["a", "b"]


# ---- the script ------------------------------------------------------------------------------------------------------


def test_the_best_model_is_submitted_in_the_order_of_the_test_file(kit, tmp_path, model):
    model("baseline", 2)
    model("bert", 0.1, np.arange(120) % 5 == 0)
    done = kit("blend.py", "--submit", "out/s.csv")
    assert "100% bert: F1 +" in done.stdout and "24 held out" in done.stdout and "40 test papers" in done.stdout
    rows = pd.read_csv(tmp_path / "out" / "s.csv", dtype=str, keep_default_na=False)
    assert rows.columns.tolist() == ["uuid", "Keywords", "label"]
    assert rows[["uuid", "label"]].equals(pd.read_csv(SAMPLE / "test_labels.csv", dtype=str)[["uuid", "label"]])

    before = (tmp_path / "out" / "s.csv").read_bytes()
    model("a", 0.01, np.arange(120) % 60 < 2)  # shares two of the papers that bert held out
    model("b", 3, np.arange(120) % 5 == 0)
    done = kit("blend.py", "--submit", "out/s.csv")
    assert (tmp_path / "out" / "s.csv").read_bytes() == before
    tables = done.stdout.split("Test papers")[0], done.stdout.split("For comparison")[1]
    assert [("\nb " in table, "\na " in table) for table in tables] == [(True, False), (False, True)]
    assert tables[0].count(" 24 held out") == 3 and " 4 held out" in tables[1]
    assert "warning: a shares 2 held-out papers with the others" in done.stderr
    assert "Not compared" in (tmp_path / "outputs" / "report.html").read_text(encoding="utf-8")


def test_a_tie_goes_to_the_plainest(kit, model):
    for name in ("lora", "another", "baseline"):
        model(name, 0.01)
    assert "100% baseline: F1 +0.0000 against lora, standard error 0.0000: a tie" in kit("blend.py").stdout


def test_a_model_of_your_own_needs_two_files(kit, tmp_path, own_model, model):
    model("bert", 0.9)
    for metrics in ("{}", '{"f1": "great"}', "[1]"):  # of its own kind
        (own_model / "metrics.json").write_text(metrics)
        done = kit("blend.py")
        assert done.returncode == 0 and "100% mine: F1 +" in done.stdout and "120 held out, own model" in done.stdout
    want = pd.read_csv(own_model / "test.csv", dtype={"uuid": str}).set_index("uuid")["prob"] >= 0.5
    rows = pd.read_csv(tmp_path / "submit_task1.csv", dtype={"uuid": str}).set_index("uuid")["label"]
    assert (rows == want.loc[rows.index]).all()


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("valid", lambda frame: frame.drop(columns="label"), "no column label"),
        ("valid", lambda frame: frame.assign(label=1 - frame["label"]), "another label"),
        ("valid", lambda frame: frame.assign(uuid="x" + frame["uuid"]), "is not in the train file"),
        ("test", lambda frame: frame.assign(prob=3), "from 0 to 1 in row 2, 3"),
        ("test", lambda frame: pd.concat([frame, frame.head(2)]), "more than once"),
        ("test", lambda frame: frame.tail(39), "is missing"),
    ],
)
def test_wrong_predictions_are_refused(refused, own_model, file, change, words):
    path = own_model / f"{file}.csv"
    change(pd.read_csv(path, dtype={"uuid": str})).to_csv(path, index=False)
    refused("blend.py", words=[f"outputs/mine/{file}.csv", words])


def test_a_folder_with_one_of_the_two_files_is_left_out(refused, kit, own_model, model):
    (own_model / "test.csv").rename(own_model / "old.csv")
    refused("blend.py", words=["run baseline.py first"])
    model("baseline", 0.1)
    (own_model.parent / "keywords").mkdir()
    (own_model.parent / "keywords" / "test.csv").write_text("uuid,Keywords\n")
    done = kit("blend.py")
    assert done.returncode == 0 and "outputs/mine has no test.csv and is left out" in done.stderr
    assert "warning" not in done.stderr and "outputs/keywords" not in done.stderr


def test_predictions_for_other_papers_are_refused(refused, model, write_csv):
    model("baseline", 0.1)
    for side, change in (("train", lambda rows: rows[:-1]), ("test", lambda rows: [[*rows[0][:-1], "x"], *rows[1:]])):
        frame = pd.read_csv(SAMPLE / f"{side}.csv", dtype=str, keep_default_na=False)
        path = write_csv("other.csv", [frame.columns, *change(frame.to_numpy().tolist())])
        refused("blend.py", f"--{side}", path, words=["baseline", f"another {side} file"])
    refused("blend.py", "--limit", "30", words=["baseline", "--limit"])
    model("blend", 0.1)
    refused("blend.py", words=["outputs/blend", "another name"])


def test_train_against_test_tells_other_topics_from_like_ones(papers):
    train, fields = papers[0], ["title", "abstract"]
    found = blend.compare_texts(train[::2], train[1::2], fields, 0)
    assert re.match(r"AUC 0\.[3-6]\d .* carry over", found)
    found = blend.compare_texts(train[train["label"] == 0], train[train["label"] == 1], fields, 0)
    assert re.match(r"warning: AUC 0\.9\d .* expect lower scores", found)
    assert "not compared" in blend.compare_texts(train, train.head(4), fields, 0)


@pytest.mark.parametrize(
    ("ones", "of", "train_share", "warned"),
    [(0, 40, 0.5, True), (995, 1000, 0.4, True), (985, 1000, 0.4, False), (0, 40, 0.05, False), (0, 3, 0.5, False)],
)
def test_warns_if_all_papers_get_one_class(capsys, ones, of, train_share, warned):
    train_labels = np.arange(100) < 100 * train_share
    assert bool(warn_one_class(np.arange(of) < ones, train_labels)) == warned
    assert ("warning" in capsys.readouterr().err) == warned

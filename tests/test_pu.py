"""baseline.py --pu: train and test share class `known`; the other class of each is about something else."""

import json

import blend
import common
from lib import pu
from lib.results import read_predictions

import numpy as np
import pandas as pd
import pytest

TOPICS = {"shared": "cell gene tumour dose mouse serum", "train": "motor torque circuit gear weld robot",
          "test": "solar biomass soil turbine methane lake"}  # fmt: skip


def make_papers(kinds, first, seed):
    """Papers of ten words of their topic and thirty of all, without authors."""
    random, rows = np.random.default_rng(seed), []
    everything = " ".join(TOPICS.values()).split() + [f"word{i}" for i in range(60)]
    for place, kind in enumerate(kinds):
        words = [*random.choice(TOPICS[kind].split(), 10), *random.choice(everything, 30)]
        rows.append([f"{first}{place}", " ".join(words[:12]), " ".join(random.permutation(words))])
    return pd.DataFrame(rows, columns=["uuid", "title", "abstract"])


@pytest.fixture
def files(tmp_path):
    """Write train.csv and test.csv, 60 + 60 and 40 + 40 papers. Returns a function: files(known) -> (test papers, which
    of them are of the class known, flags).
    """

    def write(known=1, change=None):
        train = make_papers(["shared", "train"] * 60, "a", 0).assign(label=[known, 1 - known] * 60)
        test, is_known = make_papers(["shared", "test"] * 40, "b", 1), np.tile([True, False], 40)
        if change is not None:
            test.loc[change, ["title", "abstract"]] = ["zebra zebra gear", "weld robot solar zebra " * 9]
        for name, papers in (("train", train), ("test", test)):
            papers.to_csv(tmp_path / f"{name}.csv", index=False)
        return test, is_known, ("--train", tmp_path / "train.csv", "--test", tmp_path / "test.csv")

    return write


def read_probs(tmp_path, name):
    return read_predictions(tmp_path / "outputs" / name / "test.csv")["prob"].to_numpy()


@pytest.mark.parametrize("known", [0, 1])
def test_finds_the_shared_class_and_blend_submits_it(kit, files, tmp_path, known):
    """Which label test shares is found out; without --pu the other class is taken for it, and blend.py names the flag.
    """
    _, is_known, flags = files(known)
    assert kit("baseline.py", *flags).returncode == 0
    assert "no model reads authors that tell the label: run baseline.py --pu" in kit("blend.py", *flags).stdout
    done = kit("baseline.py", "--pu", *flags)
    assert done.returncode == 0 and f"--pu: label {known} of train" in done.stderr and "not comparable" in done.stdout
    wanted = np.where(is_known, known, 1 - known)
    right = [np.mean((read_probs(tmp_path, name) >= 0.5) == wanted) for name in ("baseline", "pu")]
    assert right[1] >= 0.9 and right[1] > right[0] + 0.1, right
    valid = read_predictions(tmp_path / "outputs" / "pu" / "valid.csv")
    assert len(valid) == 120 and json.loads((tmp_path / "outputs/pu/metrics.json").read_text())["learned_from_test"]

    done = kit("blend.py", *flags)
    assert done.returncode == 0 and "blend: 100% pu: train and test differ" in done.stdout
    submitted = pd.read_csv(tmp_path / "submit_task1.csv")["label"].to_numpy()
    assert np.array_equal(submitted, read_probs(tmp_path, "pu") >= 0.5)


def test_a_test_paper_shapes_nothing_in_its_fold(kit, files, tmp_path):
    """Whatever a paper says, the others of its fold get the same P, for neither model nor cut saw it; those of other
    folds do not. The same command gives the same bytes.
    """
    test, _, flags = files()
    probs = []
    for change in (None, None, 3):
        files(change=change)
        assert kit("baseline.py", "--pu", *flags).returncode == 0
        probs.append(read_probs(tmp_path, "pu"))
    train = common.read_papers(tmp_path / "train.csv", labelled=True)
    papers = pd.concat([train[train["label"] == 1], test], ignore_index=True)
    kind = np.repeat([1, 0], [60, 80])
    folds = pu.draw_folds(papers, kind, np.arange(140), 5, 42)[60:]
    mates = (folds == folds[3]) & (np.arange(80) != 3)
    assert np.array_equal(probs[0], probs[1])
    assert np.array_equal(probs[0][mates], probs[2][mates]) and mates.sum() > 10
    assert not np.any(probs[0][folds != folds[3]] == probs[2][folds != folds[3]])


def test_no_model_rates_a_paper_that_it_saw():
    """Nor does one learn from labels that such a paper helped to choose: all that the first step sees is among the rows
    of the second.
    """
    first_step = []
    papers = make_papers(["shared"] * 60, "a", 0).assign(label=[0.0, 1] * 15 + [None] * 30)  # which rate does not read

    def rate(rows, labels, others, strength):
        assert not set(rows) & set(others) and set(labels) == {0, 1}
        if strength == pu.STRENGTHS[0]:
            first_step.append({*rows, *others})
        else:
            assert set().union(*first_step[-5:]) == set(rows)
        return np.linspace(-1, 1, len(others))

    probs, found = pu.label_papers(papers, 30, rate, 5, 42)
    assert probs.shape == (60,) and found["known_label"] in (0, 1)


def test_says_where_the_plain_model_does_better(kit, files, tmp_path):
    """Test papers with both classes of train."""
    flags = files()[2]
    make_papers(["shared", "train"] * 40, "b", 1).to_csv(flags[3], index=False)
    done = kit("baseline.py", "--pu", *flags)
    assert "test has both classes of train, and then the model without --pu does better" in done.stderr
    assert not json.loads((tmp_path / "outputs/pu/metrics.json").read_text())["learned_from_test"]["better"]


def test_odd_papers_get_a_prediction(kit, files, tmp_path):
    """Without text, written twice, or a copy of a training paper; one class alone."""
    test, is_known, flags = files()
    train = pd.read_csv(tmp_path / "train.csv")
    odd = test[is_known].copy()
    odd.iloc[:5, 1:] = ""
    odd.iloc[5:20, 1:] = odd.iloc[20, 1:].tolist()
    odd.iloc[21:23, 1:] = train.iloc[:2, 1:3].to_numpy()
    pd.concat([odd, make_papers(["shared"] * 40, "c", 2)]).to_csv(flags[3], index=False)
    done = kit("baseline.py", "--pu", "--folds", "3", *flags)
    assert done.returncode == 0, done.stderr
    assert len(read_probs(tmp_path, "pu")) == 80


@pytest.mark.parametrize(("more", "words"), [
    (["--limit", "49"], "it needs 50 of them, there are 49"),
    (["--model", "nb"], "leave --model"),
])  # fmt: skip
def test_refuses(refused, files, more, words):
    refused("baseline.py", "--pu", *files()[2], *more, words=[words])


@pytest.mark.parametrize(("fields", "rule", "differ", "better", "wanted"), [
    (["title", "author"], 0.99, True, True, False),  # authors carry over to other topics
    (["title", "author"], 0.6, True, True, True),
    (["title"], None, True, True, True),
    (["title"], None, False, True, False),
    (["title"], None, True, False, False),
])  # fmt: skip
def test_when_it_is_submitted(fields, rule, differ, better, wanted):
    table = [["author rule", {"accuracy": rule}, ""]] if rule else []
    learned = {"fields": ["title"], "learned_from_test": {"better": better}}
    models = [blend.Model("baseline", None, None, {"fields": fields, "table": table}),
              blend.Model("pu", None, None, learned)]  # fmt: skip
    chosen, sentence = blend.choose_for_test(models, differ, range(60))
    assert (chosen == "pu") == wanted and sentence
    assert blend.choose_for_test([blend.Model("mine", None, None, {})], True, range(60)) == (None, "")

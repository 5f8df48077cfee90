import re

from lib import files, results
from lib.cli import InputError

import numpy as np
import pandas as pd
import pytest

UUIDS = ["010", "x y ", "&amp;,b"]  # they only pass through, as written
TEST = pd.DataFrame({"uuid": UUIDS, "title": ['Say "x", y', "βeta", "z"], "abstract": ["", "", ""]})


def test_scores():
    values = results.scores([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1])
    expected = {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "auc": 0.75}
    assert {name: values[name] for name in expected} == expected
    assert values["log_loss"] == pytest.approx(-np.log(0.9 * 0.4 * 0.4 * 0.9) / 4, abs=1e-6)
    assert results.scores([1, 1], [1.0, 0.0])["auc"] is None
    assert results.scores([0, 1], [0.0, 1.0])["log_loss"] < 1e-6


def test_the_header_of_a_table_is_above_its_columns():
    values = results.scores([1, 0, 1], [1.0, 0.0, 0.3])
    rows = [("bert", values, "3 held out, title"), ("a longer name", {**values, "auc": None}, "x")]
    header, *lines = results.score_table(rows).splitlines()
    ends = [match.end() for match in re.finditer(r"\S+", header)][1:7]
    for line, (name, _, note) in zip(lines, rows):
        assert [match.end() for match in re.finditer(r"[\d.]+|–", line)][:6] == ends
        assert line.startswith(name) and line.index(note) == header.index("papers, fields")


def test_what_differs_is_named():
    assert results.describe_changes({"lr": 1, "a": 0}, {"lr": 2, "a": 0}) == "lr was 1 and is 2"


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_results_come_back_as_written_or_the_old_ones_stay(tmp_path):
    held_out, probs = TEST.assign(label=[0, 1, 1]), [0.1, 1 / 3, 1.0]
    results.save_results(tmp_path, {"papers": {}}, TEST, probs, held_out, probs[::-1])
    valid, test = (results.read_predictions(tmp_path / name) for name in ("valid.csv", "test.csv"))
    assert valid["uuid"].tolist() == test["uuid"].tolist() == TEST["uuid"].tolist()
    assert test["prob"].tolist() == probs and valid["prob"].tolist() == probs[::-1]
    assert valid["label"].tolist() == [0, 1, 1] and "label" not in test
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for wrong in ([0.1, 0.2], [0.1, 0.2, np.nan], [0.1, 0.2, 1.5]):
        for both in ((wrong, probs), (probs, wrong)):
            with pytest.raises(ValueError, match="3 probabilities in"):
                results.save_results(tmp_path, {"papers": {"more": 1}}, TEST, both[0], held_out, both[1])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uuid,label\na,1\n", "no column prob"),
        ("uuid,prob\na,0.5\nb,1.5\n", "prob .* row 3"),
        ("uuid,prob\na,nan\n", "prob .* row 2"),
        ("uuid,prob\na,\n", "prob .* row 2"),
        ("prob,UUID,label\n0.5,a,2\n", "label .* row 2"),
        ("uuid,prob\na,0.5\nb", "row 3 has 1 cells"),
    ],
)
def test_damaged_predictions_are_refused(tmp_path, text, words):
    (tmp_path / "valid.csv").write_text(text)
    with pytest.raises(InputError, match=f"valid.csv.*{words}"):
        results.read_predictions(tmp_path / "valid.csv")


def test_labels_are_those_of_the_file_beside(tmp_path, write_csv):
    """testB.csv numbers its papers from 0, too: the labels of test.csv say nothing about them."""
    write_csv("test_labels.csv", [["Label", "uuid"], ["1", "&amp;,b"], ["0", "010"], ["1", "x y "], ["0", "other"]])
    assert results.read_labels(tmp_path / "test.csv", TEST).tolist() == [0, 1, 1]
    assert results.read_labels(tmp_path / "testB.csv", TEST) is None
    write_csv("testB_labels.csv", [["uuid", "label"], ["010", "1"], ["x y ", "2"], ["&amp;,b", "0"]])
    assert results.read_labels(tmp_path / "testB.csv", TEST) is None
    write_csv("test_labels.csv", [["uuid"], ["010"]])
    with pytest.raises(InputError, match="test_labels.csv: no column"):
        results.read_labels(tmp_path / "test.csv", TEST)


# ---- submission ------------------------------------------------------------------------------------------------------


def submission(folder, test):
    results.write_submission(folder / "s.csv", test, [1, 0, 1], folder / "outputs")
    return pd.read_csv(folder / "s.csv", dtype=str, keep_default_na=False)


def test_submission_keeps_uuids_order_and_text(tmp_path, capsys):
    expected = pd.DataFrame({"uuid": TEST["uuid"], "Keywords": TEST["title"], "label": ["1", "0", "1"]}, dtype=str)
    assert submission(tmp_path, TEST).equals(expected)
    assert "the titles" in capsys.readouterr().err
    own = TEST.assign(Keywords=["k₂ ; w", "", "v"])
    assert submission(tmp_path, own)["Keywords"].tolist() == ["k₂ ; w", "βeta", "v"]
    assert "the test file" in capsys.readouterr().err
    for wrong in ([1, 0], [1, 0, 2]):
        with pytest.raises(ValueError, match="3 labels"):
            results.write_submission(tmp_path / "s.csv", TEST, wrong, tmp_path)


def test_submission_takes_extracted_keywords_of_these_papers_only(tmp_path, capsys):
    folder = tmp_path / "outputs" / "keywords"
    for name in ("test.csv", "board.csv"):
        files.write_csv(folder / name, {"uuid": TEST["uuid"][::-1], "Keywords": ["k3", "k2", "k1"]})
    files.write_json(folder / "metrics.json", {"papers": {"test_fingerprint": results.fingerprint(TEST)}})
    assert submission(tmp_path, TEST)["Keywords"].tolist() == ["k1", "k2", "k3"]
    other = TEST.assign(title=["x", "y", "z"])
    assert submission(tmp_path, other)["Keywords"].tolist() == ["x", "y", "z"]
    assert "other test papers" in capsys.readouterr().err

import os

import numpy as np
import pandas as pd
import pytest

import common
from common import InputError

HEADER = ["uuid", "title", "author", "abstract", "Keywords", "label"]
ROWS = [
    ["007", "Früh Therapie", "Ann Lee,Bo Chen", "β-cells, “quoted” text", "a; b", "1"],
    ["b-1", "网络 and grids", "Lee, Ann; Chen, Bo", "two\nlines", "", "0"],
    ["9", "", "", "", "", "0"],
    ["10", "Fourth", "Ann Lee", "more text", "c", "1"],
]


def paper_frame(count=40, ones=16):
    labels = np.array([1] * ones + [0] * (count - ones))
    text = [f"text {i}" for i in range(count)]
    return pd.DataFrame({"uuid": [f"u{i}" for i in range(count)], "title": text, "abstract": text, "label": labels})


# ---- reading what participants have


def check_rows(papers):
    assert papers["uuid"].tolist() == ["007", "b-1", "9", "10"]
    assert papers["label"].tolist() == [1, 0, 0, 1]
    assert papers["title"].tolist() == ["Früh Therapie", "网络 and grids", "", "Fourth"]
    assert papers["abstract"].tolist() == ["β-cells, “quoted” text", "two lines", "", "more text"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_reads_every_encoding(write_csv, encoding, newline):
    check_rows(common.read_papers(write_csv("t.csv", [HEADER, *ROWS], encoding, newline), labelled=True))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_reads_what_spreadsheets_write(write_csv, delimiter):
    header = [" UUID", "Title ", "AUTHOR", "abstract", "keywords", "Label", "", ""]
    rows = [[*row, "", ""] for row in ROWS] + [[""] * 8]
    check_rows(common.read_papers(write_csv("t.csv", [header, *rows], "utf-8-sig", delimiter=delimiter), labelled=True))


def test_extra_columns_and_their_order_are_kept(write_csv):
    rows = [["note", *HEADER]] + [[f"n{i}", *row] for i, row in enumerate(ROWS)]
    papers = common.read_papers(write_csv("t.csv", rows), labelled=True)
    check_rows(papers)
    assert papers.columns.tolist() == [*HEADER, "note"] and papers["note"].tolist() == ["n0", "n1", "n2", "n3"]


def test_test_file_needs_neither_keywords_nor_author_nor_label(write_csv):
    papers = common.read_papers(write_csv("t.csv", [["uuid", "title", "abstract"], ["NA", "null", "nan"]]))
    assert papers.to_numpy().tolist() == [["NA", "null", "nan"]]


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("", ""),
        ("a", "a"),
        ("  two   blanks\t\n", "two blanks"),
        ("TNF-&#x3b1; &amp; IL&lt;6", "TNF-α & IL<6"),
        ("e\u0301tude", "étude"),
        ("ﬁne １２", "fine 12"),
        ("AT&T &nosuch;", "AT&T &nosuch;"),
    ],
)
def test_clean(raw, clean):
    assert common.clean(raw) == clean == common.clean(clean)


# ---- refusing what can't be used


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], ["empty"]),
        ([HEADER], ["no rows"]),
        ([HEADER[:-1], *(row[:-1] for row in ROWS)], ["label"]),
        ([HEADER[1:], *(row[1:] for row in ROWS)], ["uuid"]),
        ([[*HEADER, "Label "], *([*row, "1"] for row in ROWS)], ["label", "more than once"]),
        ([HEADER, *ROWS, ["007", *ROWS[0][1:]]], ["uuid", "007", "row 6"]),
        ([HEADER, *ROWS, ["", *ROWS[0][1:]]], ["uuid", "row 6"]),
        ([HEADER, *ROWS, ["11", "t", "", "", "", "2"]], ["label", "row 6"]),
        ([HEADER, *ROWS, ["11", "t", "", "", "", ""]], ["label", "row 6"]),
        ([HEADER, *ROWS, ["11", "t", "", ""]], ["row 6", "4 cells"]),
        ([HEADER, *ROWS, ["11", "t", "", "", "", "1", "more"]], ["row 6", "7 cells"]),
        ([HEADER, *(r for r in ROWS if r[-1] == "1")], ["label", "0 in 0 rows"]),
    ],
)
def test_refuses_rows(write_csv, rows, words):
    path = write_csv("bad.csv", rows)
    with pytest.raises(InputError) as error:
        common.read_papers(path, labelled=True)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


@pytest.mark.parametrize(
    "content, word",
    [
        (b"PK\x03\x04\x14\x00", "Excel"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"uuid,title,abstract\n1,a\0b,c\n", "NUL"),
        ("uuid,title,abstract\n1,naïve,".encode() + "é".encode() * 20 + b"\xe9 x\n", "0xe9"),
        (b"uuid,title,abstract\n1,caf\xe9 r\xe9sum\xe9 \xff,c\n", "encoding"),
        (b'uuid,title,abstract\n1,"a,b\n2,c,d\n', "row 2"),
        (b'uuid,title,abstract\n1,a,b\n2,c,"cut off in the last ce', "row 3"),
    ],
)
def test_refuses_what_is_no_csv(tmp_path, content, word):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(InputError, match="bad.csv") as error:
        common.read_papers(tmp_path / "bad.csv")
    assert word in str(error.value)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        common.read_papers(tmp_path / "none.csv")


# ---- text


def test_text_is_built_alike_for_train_and_test(capsys):
    train = paper_frame().assign(Keywords="k; w")
    test = paper_frame().drop(columns="label")
    fields = common.shared_fields(train, test)
    assert fields == ["title", "abstract"]
    assert "Keywords left out of train and test: the test file" in capsys.readouterr().err
    assert common.build_text(train, fields) == common.build_text(test, fields)
    with pytest.raises(InputError, match="--fields Keywords"):
        common.shared_fields(train, test, ["Keywords"])


def test_abstract_comes_last_and_empty_fields_are_left_out():
    papers = pd.DataFrame({"title": ["T", ""], "author": ["", ""], "abstract": ["A", ""], "Keywords": ["K", ""]})
    assert common.build_text(papers, common.FIELDS) == ["T\nK\nA", ""]
    assert common.build_text(papers, ["abstract", "title"], names=True) == ["title: T\nabstract: A", ""]


# ---- split


@pytest.mark.parametrize("count, ones, ratio", [(40, 16, 0.1), (4, 2, 0.1), (200, 20, 0.25), (10, 5, 0.99)])
def test_split_is_stratified_and_blind_to_the_order_of_rows(count, ones, ratio):
    papers = paper_frame(count, ones)
    held_out = common.split_papers(papers, ratio, seed=1)
    for label, size in ((1, ones), (0, count - ones)):
        share = held_out[papers["label"] == label]
        assert share.sum() == min(max(round(size * ratio), 1), size - 1)
    shuffled = papers.sample(frac=1, random_state=3)
    again = shuffled["uuid"][common.split_papers(shuffled, ratio, seed=1)]
    assert set(again) == set(papers["uuid"][held_out])


def test_split_depends_on_the_seed_and_needs_two_of_a_class():
    papers = paper_frame()
    assert (common.split_papers(papers, seed=1) != common.split_papers(papers, seed=2)).any()
    with pytest.raises(InputError, match="label is 1 in 1 rows"):
        common.split_papers(paper_frame(10, 1))


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_are_stratified_and_blind_to_the_order_of_rows(folds):
    papers = paper_frame(43, 17)
    numbers = common.fold_numbers(papers, folds, seed=1)
    for label in (0, 1):
        sizes = np.bincount(numbers[papers["label"] == label], minlength=folds)
        assert sizes.max() - sizes.min() <= 1 and len(sizes) == folds
    shuffled = papers.sample(frac=1, random_state=3)
    by_uuid = dict(zip(shuffled["uuid"], common.fold_numbers(shuffled, folds, seed=1)))
    assert [by_uuid[u] for u in papers["uuid"]] == numbers.tolist()
    with pytest.raises(InputError, match="--folds 18"):
        common.fold_numbers(papers, 18)


# ---- scores and files


def test_scores():
    values = common.scores([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1])
    expected = {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "auc": 0.75}
    assert {name: values[name] for name in expected} == expected
    assert values["log_loss"] == pytest.approx(-np.log(0.9 * 0.4 * 0.4 * 0.9) / 4, abs=1e-6)
    assert common.scores([1, 1], [1.0, 0.0])["auc"] is None
    assert common.scores([0, 1], [0.0, 1.0])["log_loss"] < 1e-6


def test_predictions_come_back_as_written(tmp_path):
    uuids, probs = ["007", "x y", "NA"], [0.1, 1 / 3, 1.0]
    common.save_predictions(tmp_path / "p" / "valid.csv", uuids, probs, [0, 1, 1])
    back = common.read_predictions(tmp_path / "p" / "valid.csv")
    assert back["uuid"].tolist() == uuids and back["prob"].tolist() == probs and back["label"].tolist() == [0, 1, 1]
    for wrong in ([0.1, 0.2], [0.1, 0.2, np.nan], [0.1, 0.2, 1.5]):
        with pytest.raises(ValueError):
            common.save_predictions(tmp_path / "p" / "valid.csv", uuids, wrong)
    assert common.read_predictions(tmp_path / "p" / "valid.csv").equals(back)
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["valid.csv"]


def submission(tmp_path, test, out_dir="outputs"):
    common.write_submission(tmp_path / "s.csv", test, [1, 0, 1], tmp_path / out_dir)
    return pd.read_csv(tmp_path / "s.csv", dtype=str, keep_default_na=False)


def test_submission_keeps_uuids_order_and_text(tmp_path, capsys):
    test = pd.DataFrame({"uuid": ["010", "2", "a,b"], "title": ['Say "x", y', "βeta", "z"], "abstract": ["", "", ""]})
    expected = pd.DataFrame({"uuid": test["uuid"], "Keywords": test["title"], "label": ["1", "0", "1"]}, dtype=str)
    assert submission(tmp_path, test).equals(expected)
    assert "Keywords from the titles" in capsys.readouterr().err
    test["Keywords"] = ["k; w", "", "v"]
    assert submission(tmp_path, test)["Keywords"].tolist() == ["k; w", "βeta", "v"]
    assert "Keywords from the test file" in capsys.readouterr().err


def test_submission_takes_extracted_keywords_of_these_papers_only(tmp_path, capsys):
    test = pd.DataFrame({"uuid": ["010", "2", "3"], "title": ["a", "b", "c"], "abstract": ["", "", ""]})
    folder = tmp_path / "outputs" / "keywords"
    common.write_csv(folder / "test.csv", {"uuid": ["3", "2", "010"], "Keywords": ["k3", "k2", "k1"]})
    common.write_json(folder / "metrics.json", {"papers": {"test_fingerprint": common.fingerprint(test)}})
    assert submission(tmp_path, test)["Keywords"].tolist() == ["k1", "k2", "k3"]
    assert "keywords/test.csv" in capsys.readouterr().err
    other = test.assign(title=["x", "y", "z"])
    assert submission(tmp_path, other)["Keywords"].tolist() == ["x", "y", "z"]
    assert "of other test papers" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    for path in (tmp_path / "file", tmp_path / "folder"):
        with common.replacing(path) as part:
            part.write_text("old") if path.name == "file" else (part.mkdir(), (part / "x").write_text("old"))
    for path in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(RuntimeError), common.replacing(path) as part:
            part.write_text("new") if path.name == "file" else part.mkdir()
            raise RuntimeError
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "x").read_text() == "old"
    with common.replacing(tmp_path / "folder") as part:
        part.mkdir()
        (part / "y").write_text("new")
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["file", "folder", "y"]


def test_fingerprint_knows_papers_whatever_their_order():
    papers = paper_frame()
    assert common.fingerprint(papers) == common.fingerprint(papers.sample(frac=1, random_state=0))
    changed = papers.copy()
    changed.loc[3, "abstract"] += "."
    assert common.fingerprint(papers) != common.fingerprint(changed)


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    with common.locked(tmp_path):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), common.locked(tmp_path):
            pass
    with common.locked(tmp_path):  # a lock that was left does not block
        pass

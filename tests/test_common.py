import csv
import gzip
import io
import subprocess
import sys
import zipfile

import common
from conftest import KIT
from lib import results
from lib.cli import InputError

import numpy as np
import pandas as pd
import pytest

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


def test_no_torch_is_imported():
    """--help, the baseline and this file answer in seconds."""
    script = "import sys, common, lib.results, lib.items; print({'torch', 'transformers', 'sklearn'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=KIT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---- reading ---------------------------------------------------------------------------------------------------------


def check_rows(papers):
    assert papers["uuid"].tolist() == ["007", "b-1", "9", "10"]
    assert papers["label"].tolist() == [1, 0, 0, 1]
    assert papers["title"].tolist() == ["Früh Therapie", "网络 and grids", "", "Fourth"]
    assert papers["abstract"].tolist() == ["β-cells, “quoted” text", "two lines", "", "more text"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_reads_every_encoding(write_csv, encoding, newline):
    path = write_csv("t.csv", [HEADER, *ROWS], encoding, newline, quoting=csv.QUOTE_ALL)
    check_rows(common.read_papers(path, labelled=True))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_reads_what_spreadsheets_write(write_csv, delimiter):
    header = [" UUID", "Title ", "AUTHOR", "abstract", "keywords", "Label", "", ""]
    rows = [[*row, "", ""] for row in ROWS] + [[""] * 8]
    check_rows(common.read_papers(write_csv("t.csv", [header, *rows], "utf-8-sig", delimiter=delimiter), labelled=True))


@pytest.mark.parametrize(
    "change",
    [
        gzip.compress,
        lambda text: to_zip({"data/any.CSV": text, "readme.txt": b"hi", "__MACOSX/data/._any.csv": b"x"}),
        lambda text: b"sep=,\n" + text,
        lambda text: b"\xef\xbb\xbf" * 2 + text,
        lambda text: b'\xef\xbb\xbf"\xef\xbb\xbf' + text[1:],
        lambda text: text.replace(b'","', b'", "'),
        lambda text: b"\n" + text.replace(b'","', b'";"'),
    ],
    ids=["gzip", "zip", "sep=", "two BOMs", "BOM in quotes", "blanks after commas", "blank line and semicolons"],
)
def test_reads_what_other_programs_write(write_csv, change):
    path = write_csv("t.csv", [HEADER, *ROWS], quoting=csv.QUOTE_ALL)
    path.write_bytes(change(path.read_bytes()))
    check_rows(common.read_papers(path, labelled=True))


@pytest.mark.parametrize("text", [r"\alpha and \"b\"", '"a", "b"', ' "Q" t', 'a, "b; c'])
def test_no_text_changes_how_a_file_is_read(write_csv, text):
    """What looks like another program's quoting is what the paper says."""
    papers = common.read_papers(write_csv("t.csv", [HEADER[:4], ["1", text, "", "x"]]))
    assert papers["title"].tolist() == [text.strip()]


def to_zip(files):
    """A zip file with these files, as bytes. `files`: {name: bytes}."""
    with io.BytesIO() as packed:
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return packed.getvalue()


@pytest.mark.parametrize("labels", [["TRUE", "false"], ["1.0", "0.0"], [" 1", "0 "], ["１", "0"]])
def test_labels_as_programs_write_them(write_csv, labels):
    rows = [["uuid", "title", "abstract", "label"], ["a", "t", "x", labels[0]], ["b", "u", "y", labels[1]]]
    assert common.read_papers(write_csv("t.csv", rows), labelled=True)["label"].tolist() == [1, 0]


def test_a_column_that_says_nothing_is_left_out(write_csv, capsys):
    """And a label in a test file means nothing, whatever it holds."""
    header = ["uuid", "title", "abstract", "author", "keywords", "Label"]
    rows = [[f"u{i}", f"title {i}", "x", cell, "n/a", "9"] for i, cell in enumerate(["Lee, Ann", "NaN", "-"])]
    papers = common.read_papers(write_csv("t.csv", [header, *rows]))
    assert papers.columns.tolist() == ["uuid", "title", "author", "abstract"]
    assert papers["author"].tolist() == ["Lee, Ann", "", ""]
    assert "column Keywords of" in capsys.readouterr().err


def test_keywords_are_cleaned_where_they_are_read(write_csv):
    """The board compares them exactly, so a submission gives them as they came."""
    papers = common.read_papers(write_csv("t.csv", [HEADER[:5], ["1", "t", "", "x", "Keywords: CO₂\nm²"]]))
    assert papers["Keywords"].tolist() == ["Keywords: CO₂\nm²"]
    assert common.build_text(papers, ["title", "Keywords"]) == ["t\nCO2; m2"]


def test_extra_columns_and_their_order_are_kept(write_csv):
    rows = [["note", *HEADER]] + [[f"n{i}", *row] for i, row in enumerate(ROWS)]
    papers = common.read_papers(write_csv("t.csv", rows), labelled=True)
    check_rows(papers)
    assert papers.columns.tolist() == [*HEADER, "note"] and papers["note"].tolist() == ["n0", "n1", "n2", "n3"]


def test_test_file_needs_neither_keywords_nor_author_nor_label(write_csv):
    papers = common.read_papers(write_csv("t.csv", [["uuid", "title", "abstract"], ["NA", "null", "nan"]]))
    assert papers.to_numpy().tolist() == [["NA", "null", "nan"]]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("", ""),
        ("  two   blanks\t\n", "two blanks"),
        ("TNF-&#x3b1; &amp; IL&lt;6", "TNF-α & IL<6"),
        ("e\u0301tude", "étude"),
        ("ﬁne １２", "fine 12"),
        ("AT&T &nosuch;", "AT&T &nosuch;"),
        (f"&#{'9' * 5000};", f"&#{'9' * 5000};"),
        ("CO<sub>2</sub>&nbsp;emis\xadsion", "CO2 emission"),
        ('<jats:p>One.</jats:p><p class="a">Two</p>', "One. Two"),
        ("if a<b and c>d then p < 0.05", "if a<b and c>d then p < 0.05"),
        ("zero\u200bwidth \ufefftext", "zerowidth text"),
    ],
)
def test_clean(raw, clean):
    assert common.clean(raw) == clean == common.clean(clean)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["empty"]),
        ([HEADER], ["no rows"]),
        ([HEADER[:-1], *(row[:-1] for row in ROWS)], ["label"]),
        ([HEADER[1:], *(row[1:] for row in ROWS)], ["uuid"]),
        ([[*HEADER, "Label "], *([*row, "1"] for row in ROWS)], ["label", "more than once"]),
        ([HEADER, *ROWS, ["007", *ROWS[0][1:]]], ["uuid", "007", "row 6"]),
        ([HEADER, *ROWS, ["", *ROWS[0][1:]]], ["uuid", "row 6"]),
        ([HEADER, *ROWS, ["a\nb", *ROWS[0][1:]]], ["line break", "row 6"]),
        ([HEADER, *ROWS, ["1.23E+15", *ROWS[0][1:]]], ["Excel", "row 6"]),
        ([HEADER, *ROWS, HEADER], ["header comes again", "row 6"]),
        ([HEADER, *ROWS, ["11", "t", "", "", "", "2"]], ["label", "row 6"]),
        ([HEADER, *ROWS, ["11", "t", "", "", "", "0_1"]], ["label", "row 6"]),
        ([HEADER, *ROWS, ["11", "t", "", ""]], ["row 6", "4 cells"]),
        ([HEADER, *ROWS, ["11", "t", "", "", "", "1", "more"]], ["row 6", "7 cells"]),
        ([HEADER, *(row for row in ROWS if row[-1] == "1")], ["label", "0 in 0 rows"]),
    ],
)
def test_refuses_rows(write_csv, rows, words):
    path = write_csv("bad.csv", rows)
    with pytest.raises(InputError) as error:
        common.read_papers(path, labelled=True)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no such file"),
        (to_zip({"xl/workbook.xml": b"<x>"}), "Excel"),
        (to_zip({"a.csv": b"x", "b.csv": b"x"}), "2 CSV files"),
        (b"PK\x03\x04\x14\x00", "damaged zip"),
        (gzip.compress(b"x" * 999)[:-9], "damaged zip or gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"uuid,title,abstract\n1,a\0b,c\n", "NUL"),
        ("uuid,title,abstract\n1,naïve,".encode() + "é".encode() * 20 + b"\xe9 x\n", "0xe9"),
        ("uuid,title,abstract\n1,Andréas Müller,naïve\n".encode("latin-1"), "encoding"),  # not taken for GB18030
        (b'uuid,title,abstract\n1,"a,b\n2,c,d\n', "row 2"),
        (b'uuid,title,abstract\n1,a,b\n2,c,"cut off in the last ce', "row 3"),
    ],
)
def test_refuses_what_is_not_csv(tmp_path, content, word):
    if content is not None:
        (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"bad.csv.*{word}"):
        common.read_papers(tmp_path / "bad.csv")


def test_refuses_train_for_test(refused, write_csv):
    path = write_csv("train.csv", [HEADER, *ROWS])
    for test in (path, write_csv("copy.csv", [HEADER[:-1], *(row[:-1] for row in ROWS)])):
        refused("baseline.py", "--train", path, "--test", test, words=[test.name, "same papers"])


def test_invented_papers_for_a_file_of_ones_own_are_said(kit, write_csv):
    path = write_csv("mine.csv", [HEADER[:4], *(row[:4] for row in ROWS)])
    assert "train.csv is the sample, invented papers" in kit("make_llm_data.py", "--test", path).stderr
    assert "is the sample" not in kit("make_llm_data.py").stderr


# ---- text and split --------------------------------------------------------------------------------------------------


def test_text_is_built_alike_for_train_and_test(capsys):
    train = paper_frame().assign(Keywords="k; w")
    test = paper_frame().drop(columns="label")
    fields = common.shared_fields(train, test)
    assert fields == ["title", "abstract"]
    assert "Keywords is left out: no such column, or an empty one, in test" in capsys.readouterr().err
    assert common.build_text(train, fields) == common.build_text(test, fields)
    with pytest.raises(InputError, match="--fields Keywords"):
        common.shared_fields(train, test, ["Keywords"])


def test_abstract_comes_last_and_empty_fields_are_left_out():
    papers = pd.DataFrame({"title": ["T", ""], "author": ["", ""], "abstract": ["A", ""], "Keywords": ["K", ""]})
    assert common.build_text(papers, common.FIELDS) == ["T\nK\nA", ""]
    assert common.build_text(papers, ["abstract", "title"], names=True) == ["title: T\nabstract: A", ""]


@pytest.mark.parametrize(("count", "ones", "ratio"), [(40, 16, 0.1), (4, 2, 0.1), (200, 20, 0.25), (10, 5, 0.99)])
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
    assert [by_uuid[uuid] for uuid in papers["uuid"]] == numbers.tolist()
    with pytest.raises(InputError, match="--folds 18"):
        common.fold_numbers(papers, 18)


@pytest.mark.parametrize(
    "split", [common.split_papers, lambda papers, seed: common.fold_numbers(papers, 3, seed)], ids=["split", "folds"]
)
def test_copies_of_a_paper_are_held_out_together(split):
    papers = paper_frame()
    copies = papers.head(30).assign(uuid=[f"z{i}" for i in range(30)], title=papers["title"].str.upper())
    both = pd.concat([papers, copies], ignore_index=True)
    found = split(both, seed=1)
    assert np.array_equal(found[:30], found[40:]) and len(set(found)) > 1
    assert np.array_equal(found[:40], split(papers, seed=1)), "copies move no other paper"


def test_fingerprint_knows_papers_whatever_their_order():
    papers = paper_frame()
    assert results.fingerprint(papers) == results.fingerprint(papers.sample(frac=1, random_state=0))
    changed = papers.copy()
    changed.loc[3, "abstract"] += "."
    assert results.fingerprint(papers) != results.fingerprint(changed)


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [["--seed", "-1"], ["--limit", "0"], ["--valid-ratio", "1"], ["--valid-ratio", "nan"], ["--fields", "titel"],
     ["--nosuch"]],
)  # fmt: skip
def test_a_wrong_flag_is_one_line(refused, flags):
    refused("baseline.py", *flags, words=[flags[0]])

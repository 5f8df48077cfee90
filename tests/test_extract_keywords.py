import csv
import json

import common
import extract_keywords as keywords
from conftest import SAMPLE, contents
from lib import candidates, casing, files, ranker, results

import numpy as np
import pandas as pd
import pytest

HEADER = ["uuid", "title", "abstract", "Keywords"]


def rows(folder, name="outputs/keywords/test.csv"):
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def build(train):
    """The corpus of training papers alone."""
    return ranker.build_corpus(train, train.head(0), [candidates.split_keywords(cell) for cell in train["Keywords"]])


@pytest.fixture
def extract(kit, write_csv):
    """Run the script on files or on rows of HEADER. Returns its stderr."""

    def run(train, test=None, *flags):
        files = {"--train": train, "--test": test or SAMPLE / "test.csv"}
        for flag, papers in files.items():
            if isinstance(papers, list):
                papers = write_csv(f"{flag[2:]}-rows.csv", [HEADER[: len(papers[0])], *papers])
            flags += (flag, papers)
        done = kit("extract_keywords.py", *flags)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


@pytest.fixture
def few_trees(monkeypatch):
    """Fewer and smaller models: what these tests assert holds for any."""
    for module in (ranker, casing):
        monkeypatch.setattr(module, "TREES", module.TREES | {"max_iter": 6})
    monkeypatch.setattr(keywords, "PARTITIONS", 2)


@pytest.fixture
def small(few_trees, write_csv):
    """A train file of the sample's first papers, a second for each fold."""
    train = common.read_papers(SAMPLE / "train.csv")[HEADER].head(24)
    return write_csv("train.csv", [HEADER, *train.values.tolist()])


@pytest.mark.parametrize(
    "cell, expected",
    [
        ("deep learning;CNN.;;Deep  Learning;", {"deep learning": "deep learning", "cnn": "CNN"}),
        ("1,2-Dicarbonylation; a, b", {"1,2-dicarbonylation": "1,2-Dicarbonylation", "a, b": "a, b"}),
        ("rubella, measles", {"rubella": "rubella", "measles": "measles"}),
        ("[18F]FDG [review]", {"[18f]fdg [review]": "[18F]FDG [review]"}),
        (" . ; ", {}),
    ],
)
def test_split_keywords(cell, expected):
    assert candidates.split_keywords(cell) == expected


LISTS = [["TCP/IP", "edge computing", "5G"], ["deep learning", "1,2-dichloroethane"], ["solar cell", "N-doped carbon"]]


@pytest.mark.parametrize("mark", [";", "；", ",", ", ", "、", " | ", "\n"])
def test_finds_the_separator_of_a_column(mark):
    cells = [mark.join(words) for words in LISTS] + [""]
    separator = candidates.find_separator(cells)
    assert [candidates.split_cell(cell, separator) for cell in cells] == [*LISTS, []]


@pytest.mark.parametrize("cells, separator", [
    (["TCP/IP; a, b", "b; and/or", "a, b"], ";"),
    (["a, b, c;", "deep learning, cnn;"], ", "),
    (["a whole sentence without any mark in it", "TCP / IP"], None),
])  # fmt: skip
def test_a_separator_cuts_most_cells(cells, separator):
    assert candidates.find_separator(cells) == separator


@pytest.mark.parametrize("a, b", [("neural networks", "neural network"), ("t-cells", "t cell"), ("art (x)", "art")])
def test_variants_have_one_stem(a, b):
    assert candidates.stem(a) == candidates.stem(b)


def test_candidates_cross_no_punctuation_and_begin_and_end_with_no_stop_word():
    abstract = "The cell wall, for IL-6 and growth of cells (COVID-19)."
    found = candidates.find_candidates(["Growth of E. coli in milk"], [abstract], [])
    names = {found.phrases[i] for i in found.phrase}
    assert {"e. coli", "cell wall", "il-6", "growth of cells", "covid-19", "growth", "milk"} <= names
    assert not {"of", "the cell", "wall for", "milk the", "milk the cell", "cells covid-19"} & names
    assert [found.words[i] for i in found.head] == [found.phrases[i].split()[0] for i in found.phrase]
    assert [written.lower() for written in found.written] == [found.phrases[i] for i in found.phrase]


def test_own_keywords_change_no_feature_of_a_paper():
    """The trap of leave-one-out counts: what a paper carries must not show in what the ranker reads of it, but must in
    what it reads of other folds.
    """
    train = common.read_papers(SAMPLE / "train.csv").head(30)
    other = train.copy()
    other.loc[3, "Keywords"] = "; ".join(other["title"][3].split()[:2] + ["zeta", "eta theta"])
    folds = np.arange(30) % 6
    before, after = [], []
    for papers, kept in ((train, before), (other, after)):
        corpus = build(papers)
        view = ranker.make_view(corpus, folds)
        features = ranker.make_features(view)
        for paper in (3, 4):
            names = [corpus.found.phrases[i] for i in view.phrase[view.paper == paper]]
            own = {name: values[view.paper == paper] for name, values in features.items()}
            kept.append(pd.DataFrame(own, index=names).sort_index())
    pd.testing.assert_frame_equal(before[0], after[0])
    assert not before[1].equals(after[1])


def test_every_partition_holds_out_each_training_paper_once_and_its_copies_with_it():
    partitions = keywords.draw_partitions(np.array([0, 1, 2, 3, 4, 5, 0]), 2, 3, seed=1)
    for folds in partitions:
        assert folds[[7, 8]].tolist() == [-1, -1] and folds[0] == folds[6]
        assert np.bincount(folds[:6]).tolist() == [2, 2, 2]
    assert len(np.unique(partitions, axis=0)) > 1


def test_ratings_are_the_mean_over_partitions(few_trees):
    """A keyword that is a candidate in one partition alone counts as 0 in the other; the likeliest come first."""
    train = common.read_papers(SAMPLE / "train.csv")
    corpus = build(train)
    paper = np.arange(len(train))
    partitions = np.array([paper % 3, paper // 2 % 3])
    once = [ranker.rate_once(corpus, folds, 3 * i) for i, folds in enumerate(partitions)]
    first, second = ({(p, k): r for p, k, r in zip(*rated)} for rated in once)
    assert set(first) != set(second)
    mean = {key: (first.get(key, 0) + second.get(key, 0)) / 2 for key in {**first, **second}}
    rated = list(zip(*ranker.learn_and_rate(corpus, partitions, 7)))
    for paper in range(len(train)):
        best = sorted((rating for (p, _), rating in mean.items() if p == paper), reverse=True)[:7]
        own = [(mean[p, k], rating) for p, k, rating in rated if p == paper]
        assert np.allclose(own, np.column_stack([best, best]))


def test_scores():
    values = keywords.score_keywords([["a", "b"], ["cells"]], [["a", "c", "d"], ["cell"]])
    assert (values["precision"], values["recall"], values["f1"]) == (0.333333, 0.25, 0.285714)
    assert values["stemmed_f1"] == 0.571429
    assert keywords.cased_recall([["DNA", "rna"], ["cell", "Cell"]], [["RNA", "DNA"], ["Cell"]]) == 0.75


def own_phrases(train):
    """A corpus, and as rated candidates the phrases that are its papers' own keywords."""
    corpus = build(train)
    paper, phrase = corpus.keywords.nonzero()
    return corpus, (paper, phrase, np.full(len(paper), 0.5))


def test_casing_is_learned_from_other_papers():
    """Two journals: one capitalises titles and keywords, the other one neither."""
    texts = [("Growth of Milk Cells", "Milk cells"), ("growth of milk cells", "milk cells")] * 60
    rows = [[str(i), title, f"About {title}.", f"{words}; {words} {i}"] for i, (title, words) in enumerate(texts)]
    train = pd.DataFrame(rows, columns=HEADER)
    entries = casing.list_entries(*own_phrases(train), np.arange(len(train)) % 5)
    for paper, (_, words) in enumerate(texts):
        assert [*entries[paper]][0] == words and {"Milk cells", "milk cells"} <= set(entries[paper])


def test_own_casing_changes_no_feature_of_a_papers_entries():
    train = common.read_papers(SAMPLE / "train.csv").head(30)
    other = train.copy()
    other.loc[3, "Keywords"] = train["Keywords"][3].swapcase()
    seen = []
    for papers in (train, other):
        corpus, rated = own_phrases(papers)
        candidate, written, x, correct = casing.describe_entries(corpus, rated, np.arange(30) % 6)
        own = rated[0][candidate] == 3
        seen.append((np.array(written)[own], x[own], correct[own], x[~own]))
    same = [np.array_equal(before, after) for before, after in zip(*seen)]
    assert same == [True, True, False, False]


def test_writes_keywords_that_the_submission_takes(extract, tmp_path, small):
    extract(small)
    cells = rows(tmp_path)
    test = common.read_papers(SAMPLE / "test.csv")
    assert cells == rows(tmp_path, "submit_task2.csv") and [row["uuid"] for row in cells] == test["uuid"].tolist()
    folder = tmp_path / "outputs/keywords"
    assert [*results.read_keywords(folder, test, "reader")] == [row["Keywords"] for row in cells]
    board = [row["Keywords"] for row in rows(folder, "board.csv")]
    assert [*results.read_keywords(folder, test)] == board
    for cell, row in zip(board, cells):
        words, entries = row["Keywords"].lower().split("; "), cell.split("; ")
        assert 1 <= len(words) <= 30 and len(set(words)) == len(words) and all(map(str.strip, words))
        assert len(set(entries)) == len(entries) == 40 and {*words} <= {entry.lower() for entry in entries}
    scores = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["scores"]
    assert set(scores) >= {"precision", "recall", "f1", "f1_at_5", "f1_at_10", "stemmed_f1"}
    assert scores["cased_recall_at_10"] < scores["cased_recall_at_40"] == scores["board_recall"]
    assert 0 < scores["board_recall_with_period"] < scores["board_recall"], "some of the sample's lists end in one"


def test_flags_set_the_lengths_of_the_lists_that_are_scored(extract, tmp_path, small):
    extract(small, None, "--top", "4", "--entries", "10", "--limit", "20", "--submit", tmp_path / "x.csv")
    for name, length in (("x.csv", 4), ("outputs/keywords/test.csv", 4), ("outputs/keywords/board.csv", 10)):
        assert [len(row["Keywords"].split("; ")) for row in rows(tmp_path, name)] == [length] * 20
    scores = json.loads((tmp_path / "outputs/keywords/metrics.json").read_text(encoding="utf-8"))["scores"]
    assert scores["reader_recall"] < scores["board_recall"] == scores["cased_recall_at_10"]
    assert scores["board_recall"] < scores["cased_recall_at_40"]


def test_a_submission_takes_the_board_list_unless_told_otherwise(tmp_path, papers, capsys):
    test, folder = papers[1].head(3), tmp_path / "keywords"
    files.write_json(folder / "metrics.json", {"papers": {"test_fingerprint": results.fingerprint(test)}})
    for name in ("board.csv", "test.csv"):
        files.write_csv(folder / name, {"uuid": test["uuid"], "Keywords": [name] * 3})
    for wanted, name in (((), "board.csv"), (("reader",), "test.csv")):
        results.write_submission(tmp_path / "s.csv", test, [0, 1, 0], tmp_path, *wanted)
        assert rows(tmp_path, "s.csv")[0]["Keywords"] == name and f"keywords/{name}" in capsys.readouterr().err


def test_a_papers_keywords_do_not_depend_on_the_other_test_papers(extract, tmp_path, small):
    test = common.read_papers(SAMPLE / "test.csv")[HEADER[:3]].values.tolist()
    found = []
    for chosen in (test[:12], test[5:12][::-1], test[7:8]):
        extract(small, chosen)
        both = zip(rows(tmp_path), rows(tmp_path, "outputs/keywords/board.csv"))
        found.append({row["uuid"]: (row["Keywords"], board["Keywords"]) for row, board in both})
    for fewer in found[1:]:
        assert fewer == {uuid: found[0][uuid] for uuid in fewer}


ODD = [
    ["a", "", ""],
    ["b", "Cancer", ""],
    ["c", "基于深度学习的论文分类", "本文提出一种方法，用于分类。实验表明有效。"],
    ["d", "Μελέτη των κυττάρων", "Η μελέτη δείχνει ότι τα κύτταρα."],
    ["e", "$E = mc^2$", "∑_{i=1}^n x_i^2 ≤ α; β → ∞ (1)"],
    ["f", "of the and", "in; the. of"],
    ["g", "; ;", "..."],
    ["h", "word " * 400, "x" * 5000],
]


@pytest.mark.parametrize("labelled", [1, 5])
def test_odd_papers_and_few_keywords(extract, tmp_path, small, labelled):
    train = common.read_papers(small)[HEADER]
    train.loc[labelled:, "Keywords"] = ""
    assert f", {labelled} with keywords" in extract(train.values.tolist(), ODD)
    assert [row["uuid"] for row in rows(tmp_path)] == [row[0] for row in ODD]
    for row in rows(tmp_path):
        words = row["Keywords"].split("; ")
        assert 1 <= len(words) <= 30 and all(word.strip() for word in words)


def test_keywords_with_a_heading_are_those_without(small, extract, tmp_path, write_csv):
    plain = common.read_papers(small)[HEADER]
    named = plain.assign(Keywords="Keywords: " + plain["Keywords"])
    boards = []
    for frame in (plain, named):
        extract(frame.values.tolist())
        boards.append((tmp_path / "outputs/keywords/board.csv").read_bytes())
    assert boards[0] == boards[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("गहन तंत्रिका जाल", ["गहन", "तंत्रिका", "जाल"]),  # vowel signs belong to a word
        (r"of $\mathrm{Ca}^{2+}$ and \textit{in situ}", ["of", "Ca", "2+", "and", "in", "situ"]),
        ("PROGNOSIS OF CANCER", ["prognosis", "of", "cancer"]),
        ("DNA of E. coli", ["DNA", "of", "E.", "coli"]),
    ],
)
def test_words_of_other_scripts_and_programs(text, words):
    assert [word.written for word in candidates.read_words(text, True)] == words


def test_a_submission_that_cannot_be_written_leaves_the_earlier_lists(kit, tmp_path, small, test_b):
    """They and their record are of one test file, whichever it is."""
    assert kit("extract_keywords.py", "--train", small).returncode == 0
    before = contents(tmp_path / "outputs")
    failed = kit("extract_keywords.py", "--train", small, "--test", "testB.csv", "--submit", tmp_path)
    assert failed.returncode == 2 and contents(tmp_path / "outputs") == before


CHINESE = "基于深度学习的论文分类"


@pytest.mark.parametrize("title, cells, found", [
    ("Growth of milk", ["QQ1; (…)", "QQ2; (…)", "QQ3"], None),  # keywords that are in no text
    ("Cancer", ["( )", "x (y)", "a;b"], None),
    (CHINESE, ["深度学习; 分类; 方法"], {"深度学习", "分类", "方法"}),  # without blanks: keywords of similar papers
])  # fmt: skip
def test_odd_keywords(extract, few_trees, tmp_path, title, cells, found):
    papers = [[str(i), title, f"{title} {i}", cells[i % len(cells)]] for i in range(9)]
    said = extract(papers, [["z", title, ""]])
    assert "Warning" not in said and ("in Chinese or Japanese" in said) == (title == CHINESE)
    words = rows(tmp_path)[0]["Keywords"].split("; ")
    assert all(map(str.strip, words)) and (not found or {*words} <= found)


@pytest.mark.parametrize("header, cells, words", [
    (HEADER[:3], ["Growth of milk", "Milk grows."], ["no column Keywords"]),
    (HEADER, ["Growth of milk", "Milk grows.", "."], ["column Keywords is empty"]),
    (HEADER, ["the", "", "a; b"], ["2 papers with Keywords", "no text"]),
    (HEADER, [CHINESE, "", "a; b"], ["2 papers with Keywords", "no text"]),
])  # fmt: skip
def test_refuses_a_train_file_with_nothing_to_learn_from(refused, write_csv, header, cells, words):
    path = write_csv("bare.csv", [header, ["1", *cells], ["2", *cells]])
    refused("extract_keywords.py", "--train", path, words=["bare.csv", *words])


@pytest.mark.parametrize("flags", [("--top", "31"), ("--entries", "0"), ("--folds", "1")])
def test_refuses_flags_out_of_range(refused, flags):
    refused("extract_keywords.py", *flags, words=[flags[0]])


@pytest.mark.slow
def test_out_of_fold_and_unseen_agree(extract, tmp_path):
    """On the sample: better than the titles' words by far, and as good on papers that no model saw."""
    sample = common.read_papers(SAMPLE / "train.csv")[HEADER]
    seen = np.arange(len(sample)) % 4 > 0
    extract(sample[seen].values.tolist(), sample[~seen][HEADER[:3]].values.tolist())
    metrics = json.loads((tmp_path / "outputs/keywords/metrics.json").read_text(encoding="utf-8"))
    cells = [row["Keywords"] for row in rows(tmp_path)], sample[~seen]["Keywords"]
    lists = [[[*candidates.split_keywords(cell)] for cell in column] for column in cells]
    unseen = keywords.score_keywords(*lists)["f1"]
    assert unseen > 0.1 and abs(unseen - metrics["scores"]["f1"]) < 0.1  # 30 papers: a standard error of 0.03

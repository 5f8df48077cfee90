import csv
import json

import numpy as np
import pandas as pd
import pytest

import common
import extract_keywords as keywords
from lib import phrases, ranker
from lib.results import read_keywords

HEADER = ["uuid", "title", "abstract", "Keywords"]


def rows(folder, name="outputs/keywords/test.csv"):
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def few_trees(monkeypatch):
    """Fewer and smaller models: what these tests assert holds for any."""
    monkeypatch.setattr(ranker, "TREES", ranker.TREES | {"max_iter": 12})


@pytest.fixture
def small(few_trees, write_csv):
    """A train file of the sample's first papers, a second for each fold."""
    train = common.read_papers(common.HERE / "data" / "sample" / "train.csv")[HEADER].head(24)
    return write_csv("train.csv", [HEADER, *train.values.tolist()])


@pytest.mark.parametrize(
    "cell, keywords_in_it",
    [
        ("Deep learning; CNN.", ["deep learning", "cnn"]),
        ("deep learning;CNN;;deep  Learning;", ["deep learning", "cnn"]),
        ("1,2-Dicarbonylation; a, b", ["1,2-dicarbonylation", "a, b"]),
        ("rubella, measles, Vietnam.", ["rubella", "measles", "vietnam"]),
        ("SPIRAL INDUCTOR", ["spiral inductor"]),
        (" . ; ", []),
        ("", []),
    ],
)
def test_split_keywords(cell, keywords_in_it):
    assert list(phrases.split_keywords(cell)) == keywords_in_it


@pytest.mark.parametrize("a, b", [("neural networks", "neural network"), ("t-cells", "t cell"), ("art (x)", "art")])
def test_variants_have_one_stem(a, b):
    assert phrases.stem(a) == phrases.stem(b)


def test_candidates_cross_no_punctuation_and_begin_and_end_with_no_stop_word():
    papers = {
        "title": ["Growth of E. coli in milk"],
        "abstract": ["The cell wall, for IL-6 and growth of cells (COVID-19)."],
    }
    found = phrases.find_candidates(papers, 1)
    names = {found.phrases[i] for i in found.phrase}
    assert {"e. coli", "cell wall", "il-6", "growth of cells", "covid-19", "growth", "milk"} <= names
    assert not {"of", "the cell", "wall for", "milk the", "milk the cell", "cells covid-19"} & names
    places = [found.text.word[i] for i in found.first]
    assert places == [found.text.words.index(found.phrases[i].split()[0]) for i in found.phrase]


def test_rates_never_see_the_own_fold():
    """Whatever the keywords of a fold's papers, no rate of theirs moves; that of the others does."""
    draw = np.random.default_rng(0)
    keys, folds = draw.integers(0, 9, 500), draw.integers(-1, 6, 500)
    hits = draw.integers(0, 2, 500).astype(float)
    own = np.flatnonzero(folds == 2)
    other = hits.copy()
    other[own] = 1 - hits[own]
    before, after = (ranker.rates(keys, h, folds, 5) for h in (hits, other))
    assert np.allclose(before[own], after[own])
    assert not np.allclose(before[folds == 3], after[folds == 3])


def test_own_keywords_change_no_feature_of_a_paper():
    """The trap of leave-one-out counts: what a paper carries must not show in what the ranker reads of it."""
    train = common.read_papers(common.HERE / "data" / "sample" / "train.csv").head(30)
    other = train.copy()
    other.loc[3, "Keywords"] = "; ".join(other["title"][3].split()[:2] + ["zeta", "eta theta"])
    folds = np.arange(30) % 6
    kept = []
    for papers in (train, other):
        corpus = ranker.build_corpus(papers, papers.head(0))
        features, paper, phrase, _ = ranker.add_learned(corpus, folds)
        names = [corpus.phrases[i] for i in phrase[paper == 3]]
        kept.append(pd.DataFrame({n: v[paper == 3] for n, v in features.items()}, index=names))
    a, b = kept
    assert list(a.index) == list(b.index)
    for name in a:
        assert np.allclose(a[name], b[name], equal_nan=True), name


def test_every_partition_holds_out_each_labelled_paper_once():
    partitions = keywords.part(np.array([0, 2, 3, 5, 6, 7]), 8, 3, seed=1)
    for folds in partitions:
        assert folds[[1, 4]].tolist() == [-1, -1] and np.bincount(folds[folds >= 0]).tolist() == [2, 2, 2]
    assert len(np.unique(partitions, axis=0)) > 1


def test_ratings_are_the_mean_over_partitions(few_trees):
    """A keyword that is a candidate in one partition alone counts as 0 in the other."""
    train = common.read_papers(common.HERE / "data" / "sample" / "train.csv")
    corpus = ranker.build_corpus(train, train.head(0))
    paper = np.arange(len(train))
    partitions, asked = np.array([paper % 3, paper // 2 % 3]), np.zeros(len(train), dtype=bool)
    once = [ranker.rate_once(corpus, folds, asked, 3 * i) for i, folds in enumerate(partitions)]
    first, second = ({(p, k): r for p, k, r in zip(*rated)} for rated in once)
    mean = {(p, k): r for p, k, r in zip(*ranker.learn_and_rate(corpus, partitions, asked))}
    assert set(first) != set(second) and set(mean) == set(first) | set(second)
    for key, rating in mean.items():
        assert np.isclose(rating, (first.get(key, 0) + second.get(key, 0)) / 2) and 0 <= rating <= 1


def test_scores():
    values = keywords.score_keywords([["a", "b"], ["cells"]], [["a", "c", "d"], ["cell"]])
    assert (values["precision"], values["recall"], values["f1"]) == (0.333333, 0.25, 0.285714)
    assert values["macro_f1"] == 0.2 and values["stemmed_f1"] == 0.571429


def test_writes_keywords_that_the_submission_takes(kit, tmp_path, small):
    done = kit("extract_keywords.py", "--train", small)
    assert done.returncode == 0, done.stderr
    cells, submitted = rows(tmp_path), rows(tmp_path, "submit_task2.csv")
    test = common.read_papers(common.HERE / "data" / "sample" / "test.csv").drop(columns="Keywords", errors="ignore")
    assert cells == submitted and [row["uuid"] for row in cells] == test["uuid"].tolist()
    for row in cells:
        words = [word.lower() for word in row["Keywords"].split("; ")]
        assert 1 <= len(words) <= 30 and len(set(words)) == len(words) and all(word.strip() for word in words)
    metrics = json.loads((tmp_path / "outputs/keywords/metrics.json").read_text(encoding="utf-8"))
    assert set(metrics["scores"]) >= {"precision", "recall", "f1", "macro_f1", "f1_at_5", "f1_at_10", "stemmed_f1"}
    picked = read_keywords(tmp_path / "outputs/keywords", test)
    assert list(picked) == [row["Keywords"] for row in cells]


def test_a_papers_keywords_do_not_depend_on_the_other_test_papers(kit, tmp_path, small, write_csv):
    test = common.read_papers(common.HERE / "data" / "sample" / "test.csv")[HEADER[:3]].values.tolist()
    results = []
    for chosen in (test[:12], test[5:12][::-1], test[7:8]):
        done = kit("extract_keywords.py", "--train", small, "--test", write_csv("test.csv", [HEADER[:3], *chosen]))
        assert done.returncode == 0, done.stderr
        results.append({row["uuid"]: row["Keywords"] for row in rows(tmp_path)})
    for fewer in results[1:]:
        assert fewer == {uuid: results[0][uuid] for uuid in fewer}


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


@pytest.mark.parametrize("labelled", [1, 2, 5])
def test_odd_papers_and_few_keywords(kit, tmp_path, small, write_csv, labelled):
    train = common.read_papers(small)[HEADER]
    train.loc[labelled:, "Keywords"] = ""
    done = kit(
        "extract_keywords.py",
        *("--train", write_csv("few.csv", [HEADER, *train.values.tolist()])),
        *("--test", write_csv("odd.csv", [HEADER[:3], *ODD])),
    )
    assert done.returncode == 0, done.stderr
    assert [row["uuid"] for row in rows(tmp_path)] == [row[0] for row in ODD]
    for row in rows(tmp_path):
        words = row["Keywords"].split("; ")
        assert 1 <= len(words) <= 30 and all(word.strip() for word in words)


def test_keywords_that_stand_in_no_text(kit, tmp_path, small, write_csv):
    train = common.read_papers(small)[HEADER]
    train["Keywords"] = [f"QQ{i}; (…)" for i in range(len(train))]
    done = kit(
        "extract_keywords.py", "--train", write_csv("train2.csv", [HEADER, *train.values.tolist()]), "--top", "3"
    )
    assert done.returncode == 0, done.stderr
    assert all(1 <= len(row["Keywords"].split("; ")) <= 3 for row in rows(tmp_path))


def test_keywords_of_marks_and_papers_without_text(kit, tmp_path, write_csv):
    papers = [[str(i), ("", "Cancer", "the")[i % 3], "", ("( )", "x (y)", "a;b")[i % 3]] for i in range(9)]
    train, test = write_csv("marks.csv", [HEADER, *papers]), write_csv("test.csv", [HEADER[:3], ["z", "x x", ""]])
    done = kit("extract_keywords.py", "--train", train, "--test", test)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and rows(tmp_path)[0]["Keywords"].strip()


def test_top_gives_that_many(kit, tmp_path, small):
    done = kit("extract_keywords.py", "--train", small, "--top", "4", "--limit", "20", "--submit", tmp_path / "x.csv")
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path, "x.csv")) == 20
    assert {len(row["Keywords"].split("; ")) for row in rows(tmp_path, "x.csv")} == {4}


def test_refuses_a_train_file_without_keywords(refused, small, write_csv):
    train = common.read_papers(small)[HEADER[:3]].values.tolist()
    refused("extract_keywords.py", "--train", write_csv("no.csv", [HEADER[:3], *train]), words=["no.csv", "Keywords"])
    empty = write_csv("empty.csv", [HEADER, *([*row, ""] for row in train)])
    refused("extract_keywords.py", "--train", empty, words=["empty.csv", "Keywords", "empty"])


@pytest.mark.parametrize("flags", [("--top", "31"), ("--top", "0"), ("--folds", "1")])
def test_refuses_flags_out_of_range(refused, flags):
    refused("extract_keywords.py", *flags, words=[flags[0]])


@pytest.mark.slow
def test_out_of_fold_and_unseen_agree(kit, tmp_path):
    """On the sample: better than the titles' words by far, and as good on papers that no model saw."""
    sample = common.read_papers(common.HERE / "data" / "sample" / "train.csv")
    sample[::4].drop(columns="Keywords").to_csv(tmp_path / "test.csv", index=False)
    sample[np.arange(len(sample)) % 4 > 0].to_csv(tmp_path / "train.csv", index=False)
    done = kit("extract_keywords.py", "--train", tmp_path / "train.csv", "--test", tmp_path / "test.csv")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "outputs/keywords/metrics.json").read_text(encoding="utf-8"))
    lists = [
        [list(phrases.split_keywords(c)) for c in cells]
        for cells in ([row["Keywords"] for row in rows(tmp_path)], sample[::4]["Keywords"])
    ]
    unseen = keywords.score_keywords(*lists)["f1"]
    assert unseen > 0.1 and abs(unseen - metrics["scores"]["f1"]) < 0.1  # 30 papers: a standard error of 0.03

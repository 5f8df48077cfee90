import re
import subprocess
import sys
from html.parser import HTMLParser

import common
from conftest import KIT, SAMPLE
from lib import plots, report
from lib.files import write_json
from lib.results import paper_record, scores

import numpy as np
import pandas as pd
import pytest

HOSTILE = "<script>alert(1)</script> | `x` $y^2$ [a](http://b) \"q\" & 'r' 论文 <b"


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed, in order. Collects tags, attributes, text and the rows of tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.rows = [], [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def read_page(kit, tmp_path):
    """Run blend.py. Returns the Page, which needs nothing from outside and runs nothing."""

    def read(*flags):
        done = kit("blend.py", *flags)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / "outputs" / "report.html").read_text(encoding="utf-8")
        page = Page(text)
        page.stdout = done.stdout
        assert "default-src 'none'" in text and plots.INK not in text
        assert not {"script", "link", "img", "image", "iframe", "object", "base"} & set(page.tags)
        assert not any(name.startswith("on") or name == "src" for name, _ in page.attributes)
        ids = {value for name, value in page.attributes if name == "id"}
        references = {value for name, value in page.attributes if name.endswith("href")}
        assert references <= {f"#{name}" for name in ids}
        return page

    return read


def test_whole_page(read_page, tmp_path, model):
    table = [["author rule", {**scores([0, 1], [0.2, 0.9]), "accuracy": 0.99}, "2 out of fold"]]
    table.append(["naive Bayes, no author", {**table[0][1], "accuracy": 0.7654}, ""])
    strongest = {"words": {"1": [["cell", 1.5]], "0": []}, "author": {"1": [], "0": [["a ", 2]]}}
    model("baseline", 0.6, train_seconds=50, table=table, strongest=strongest)
    speeds = {"train_papers_per_second": 7.04, "predict_papers_per_second": 2}
    model("bert", 0.5, slice(0, 60), epochs_run=[2], device="cpu, fp32", seconds=120, **speeds)
    model("lora", 0.6, slice(0, 60), epochs_run=[2, 1], trained_on="some GPU", seconds=99)
    page = read_page("--report-only")
    assert not (tmp_path / "submit_task1.csv").exists()
    assert ["bert", "cpu, fp32", "2", "120", "7.0", "2.0", "–"] in page.rows
    assert ["lora", "some GPU", "2 + 1", "99", "–", "–", "–"] in page.rows
    assert ["baseline", *"––––––"] in page.rows  # the seconds of a part say nothing of the whole
    for words in ("60 held out, title", "Test papers", "cell", "a␣", "The 20 hardest", "The way authors", "76.54%"):
        assert words in page.text
    assert ("style", "width:100%") in page.attributes
    assert page.tags.count("svg") == 1


def test_untrusted_text_stays_text(read_page, model, papers, write_csv, recwarn):
    train = papers[0].copy()
    for name in ("title", "author", "abstract"):
        train.loc[train.index[:40], name] = f"{name} {HOSTILE}"
    path = write_csv("train.csv", [train.columns, *train.to_numpy()])
    train = common.read_papers(path, labelled=True)
    model("<i>$\\frac$ | 模型", 0.5, papers=(train, papers[1]))
    model("_b", 0.5, papers=(train, papers[1]))
    page = read_page("--train", path)
    assert not recwarn.list
    assert all(f"{name} {HOSTILE}" in page.text for name in ("title", "author", "abstract"))
    assert "<i>$\\frac$ | 模型" in page.text and page.text.count("_b") > 2, "in the legend, too"


def test_papers_without_authors(read_page, model, papers, write_csv):
    train = papers[0].drop(columns="author")
    path = write_csv("train.csv", [train.columns, *train.to_numpy()])
    model("baseline", 0.5, papers=(train, papers[1]))
    assert "(no author)" in read_page("--train", path).text


@pytest.mark.slow
def test_same_inputs_same_bytes(read_page, tmp_path, model):
    model("baseline", 0.6)
    model("bert", 0.4, slice(0, 60))
    path = tmp_path / "outputs" / "report.html"
    read_page()
    first = path.read_bytes()
    command = [sys.executable, KIT / "blend.py", "--out-dir", tmp_path / "outputs", "--report-only"]
    command += ["--train", SAMPLE / "train.csv", "--test", SAMPLE / "test.csv"]
    assert subprocess.run(command, capture_output=True).returncode == 0  # another process hashes strings another way
    assert first == path.read_bytes()


# ---- keywords and the board ------------------------------------------------------------------------------------------


@pytest.fixture
def keywords(tmp_path, papers):
    """Write metrics.json of extract_keywords.py."""

    def write(papers=papers, **more):
        record = {"scores": {"f1": 0.1234, "cased_recall_at_40": 0.3, **more}, "fields": ["title"], "seconds": 30}
        record["papers"] = paper_record(*papers, 77)
        write_json(tmp_path / "outputs" / "keywords" / "metrics.json", record)

    return write


@pytest.mark.parametrize(("wanted", "estimate"), [("board", "0.520 to 0.550"), ("reader", "0.460")])
def test_the_board_estimate_is_of_the_list_that_is_submitted(read_page, model, keywords, wanted, estimate):
    model("bert", 0)
    keywords(board_recall=0.25, board_recall_with_period=0.2, reader_recall=0.1)
    page = read_page("--keywords", wanted)
    assert ["f1", "0.1234"] in page.rows and ["keywords", "–", "–", "30", *"–––"] in page.rows
    assert "77 papers" in page.text and page.text.count("board estimate") == 2
    parts = "0.4 × F1 1.000 on 120 held-out papers + 0.6 × case-sensitive keyword recall"
    assert f"not official): {estimate} = {parts}" in page.stdout


def test_no_board_estimate_where_the_recall_is_not_known(read_page, model, papers, keywords, write_csv):
    model("bert", 0)
    keywords(board_recall=0.25)
    page = read_page("--keywords", "reader")
    assert "Keywords" in page.text and "board estimate" not in page.text
    keywords((papers[0], papers[1].head(9)), board_recall=0.25)  # another test file
    page = read_page()
    assert "0.1234" not in page.text and "board estimate" not in page.text
    test = papers[1].assign(Keywords=papers[1]["title"] + ". cells")  # its own are submitted
    path = write_csv("test.csv", [test.columns, *test.to_numpy()])
    own = papers[0], common.read_papers(path)
    model("bert", 0, papers=own)
    keywords(own, board_recall=0.25)
    page = read_page("--test", path)
    assert "0.1234" in page.text and "board estimate" not in page.text


# ---- how far to trust it ---------------------------------------------------------------------------------------------


def test_f1_comes_with_an_interval(read_page, model, papers):
    held_out = np.arange(120) % 10 == 0
    model("bert", 0, held_out)  # all right
    low = float(re.search(r"F1 on 12 held-out papers, 95 % interval (0.\d+) to 1.000", read_page().text)[1])
    hits = papers[0]["label"][held_out].sum()
    share = hits / (hits + 1.96**2)  # Wilson's lower bound if all are hits
    assert low == pytest.approx(2 * share / (1 + share), abs=0.001)


def test_warns_if_all_test_papers_get_one_class(read_page, model):
    model("baseline", 0.4, test_probs=np.full(40, 0.1))
    page = read_page()
    assert "40 of 40 test papers get label 0" in page.text and ("class", "trust warn") in page.attributes
    model("baseline", 0.4, table=[["author rule", scores([0, 1], [0.9, 0.2]), ""]])
    page = read_page()
    assert ("class", "trust warn") not in page.attributes
    for words in ("Keywords", "The way authors"):
        assert words not in page.text


def test_hardest_are_the_wrong_and_the_disputed():
    one, other = [0.9, 0.1, 0.1, 0.9, 0.4] * 9, [0.9, 0.1, 0.1, 0.1, 0.4] * 9
    probs = {"one": np.array(one), "other": np.array(other)}  # both right, right, both wrong, disputed, unsure
    papers = pd.DataFrame({"uuid": range(45), "title": "", "abstract": "", "label": [1, 0, 1, 0, 1] * 9})
    rows, _ = report.hardest_papers(papers, probs)
    kinds = [row["uuid"] % 5 for row in rows]
    assert set(kinds[:18]) == {2, 3} and kinds[18:] == [4, 4]
    assert rows[0]["P by one"] == "0.100 ✗" and rows[18]["title"] == "(no title)"

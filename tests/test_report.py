import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import KIT, SAMPLE

import common
from lib import plots, report
from lib.results import paper_record, save_results, scores, write_json

HOSTILE = "<script>alert(1)</script> | `x` $y^2$ [a](http://b) \"q\" & 'r' 论文 <b"
LOG = "epoch,train_loss,accuracy,f1,auc,log_loss\n1,0.7,0.5,0.4,,0.7\n2,0.4,0.9,0.9,0.95,0.3\n"


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed, in order. Collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def model(tmp_path, papers):
    """Write what a model leaves: made-up probabilities, worse as `noise` grows, further metrics and its log.csv."""

    def write(name, noise, held_out=slice(None), papers=papers, test_probs=None, log=None, **metrics):
        train, test = papers
        random, held = np.random.default_rng(list(name.encode())), train[held_out]
        probs = np.clip(held["label"] + noise * random.normal(size=len(held)), 0, 1)
        metrics = {"papers": paper_record(train, test, len(held)), "fields": ["title"], **metrics}
        folder = tmp_path / "outputs" / name
        test_probs = random.random(len(test)) if test_probs is None else test_probs
        save_results(folder, metrics, test, test_probs, held, probs)
        if log is not None:
            (folder / "log.csv").write_text(log)

    return write


@pytest.fixture
def read_page(kit, tmp_path):
    """Run blend.py. Returns (Page, text of report.md); the page needs nothing from outside and runs nothing."""

    def read(*flags):
        done = kit("blend.py", *flags)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / "outputs" / "report.html").read_text(encoding="utf-8")
        page = Page(text)
        assert "default-src 'none'" in text and plots.INK not in text
        assert not {"script", "link", "img", "image", "iframe", "object", "base"} & set(page.tags)
        assert not any(name.startswith("on") or name == "src" for name, _ in page.attributes)
        ids = {value for name, value in page.attributes if name == "id"}
        references = {value for name, value in page.attributes if name.endswith("href")}
        assert references <= {f"#{name}" for name in ids}
        return page, (tmp_path / "outputs" / "report.md").read_text(encoding="utf-8")

    return read


def test_one_model_gives_a_smaller_page(read_page, model):
    table = [["author rule", scores([0, 1], [0.2, 0.9]), "2 out of fold"]]
    strongest = {"words": {"1": [["cell", 1.5]], "0": []}, "author": {"1": [], "0": [["a ", 2]]}}
    model("baseline", 0.6, table=table, strongest=strongest)
    page, text = read_page()
    for title in ("Held-out papers", "Test papers", "author rule", "What words tell the baseline", "The 20 hardest"):
        assert title in page.text and title in text
    for title in ("Learning curves", "Agreement", "Keywords"):
        assert title not in page.text
    assert "| 1 | cell | 1.50 |" in text and "| 0 | a␣ | 2.00 |" in text
    assert ("style", "width:100%") in page.attributes


def test_whole_page(read_page, tmp_path, model):
    model("baseline", 0.6)
    times = {"train_seconds": 119, "train_papers_per_second": 7.04, "predict_papers_per_second": 2}
    model("bert", 0.5, slice(0, 60), log=LOG, epochs_run=[2], device="cpu, fp32", **times)
    model("lora", 0.6, slice(0, 60), log=LOG, epochs_run=2, trained_on="some GPU")
    page, text = read_page("--report-only")
    assert "| bert | cpu, fp32 | 2 | 2.8 min | 7.0 | 2.0 | – |" in text  # 119 s + 50 s for 60 + 40 papers
    assert "some GPU" in text and "60 held out, title" in text
    assert page.tags.count("svg") == 4 + 4 + 1 + 2  # curves of two models; three models and the blend; agreement twice
    assert not (tmp_path / "submit_task1.csv").exists()


def test_untrusted_text_stays_text(read_page, model, papers, write_csv, recwarn):
    train = papers[0].copy()
    for name in ("title", "author", "abstract"):
        train.loc[train.index[:40], name] = f"{name} {HOSTILE}"
    path = write_csv("train.csv", [train.columns, *train.to_numpy()])
    train = common.read_papers(path, labelled=True)
    model("<i>$\\frac$ | 模型", 0.5, papers=(train, papers[1]), log=LOG)
    model("_b", 0.5, papers=(train, papers[1]))
    page, text = read_page("--train", path)
    assert not recwarn.list
    assert all(f"{name} {HOSTILE}" in page.text for name in ("title", "author", "abstract"))
    assert "<i>$\\frac$ | 模型" in page.text
    rows = [line for line in text.splitlines() if line.startswith(("| title \\<script", "| title | uuid"))]
    bars = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert len(rows) > 1 and set(bars) == {7}  # title, uuid, label, two models, blend
    assert "<script" not in re.sub(r"\\.", "", text)


@pytest.mark.slow
def test_same_inputs_same_bytes(read_page, tmp_path, model):
    model("baseline", 0.6)
    model("bert", 0.4, slice(0, 60), log=LOG)
    files = [tmp_path / "outputs" / f"report.{kind}" for kind in ("html", "md")]
    read_page()
    first = [file.read_bytes() for file in files]
    command = [sys.executable, KIT / "blend.py", "--out-dir", tmp_path / "outputs", "--report-only"]
    command += ["--train", SAMPLE / "train.csv", "--test", SAMPLE / "test.csv"]
    assert subprocess.run(command, capture_output=True).returncode == 0  # another process hashes strings another way
    assert first == [file.read_bytes() for file in files]


DAMAGED = ["", "epoch\n", "epoch,f1\n1,0.5\n", LOG.splitlines()[0], LOG.replace("0.4", "x")]
DAMAGED.append(re.sub(r"\n\d,", "\n,", LOG))  # no epoch


@pytest.mark.parametrize("log", DAMAGED)
def test_a_damaged_log_is_left_out(read_page, model, log):
    model("bert", 0.4, log=log)
    assert "Learning curves" not in read_page()[0].text


def test_curves_of_folds_and_of_one_epoch(read_page, tmp_path, model):
    model("bert", 0.4, settings={"folders": ["fold1", "fold2"]}, log="of an earlier run")
    for fold in ("fold1", "fold2"):
        path = tmp_path / "outputs" / "bert" / fold / "log.csv"
        path.parent.mkdir()
        path.write_text(LOG[: LOG.index("\n2")])
    assert "Learning curves" in read_page()[0].text


def test_keywords_and_board_only_of_these_papers(kit, read_page, tmp_path, model, papers):
    model("bert", 0)
    record = {"scores": {"f1_at_5": 0.1234, "cased_recall_at_40": 0.25, "by_label": {}}, "fields": ["title"]}
    record |= {"papers": paper_record(*papers, 77), "seconds": 30}
    write_json(tmp_path / "outputs" / "keywords" / "metrics.json", record)
    text = read_page("--report-only")[1]
    assert "| f1 at 5 | 0.1234 |" in text and "77 papers" in text and "| keywords | – | – | 30 s |" in text
    parts = "0.4 × F1 1.0000 on 120 held-out papers + 0.6 × case-sensitive keyword recall 0.2500"
    assert text.count("keyword recall 0.2500: ") == 1 and "on 40 test papers + 0.6 ×" in text.replace("\\", "")
    assert f"inferred, not official): 0.5500 = {parts}\n" in kit("blend.py").stdout
    record["papers"]["test_fingerprint"] = "other"
    write_json(tmp_path / "outputs" / "keywords" / "metrics.json", record)
    text = read_page("--report-only")[1]
    assert "0.1234" not in text and "oard estimate" not in text


def test_no_board_estimate_if_the_test_file_gives_the_keywords(read_page, tmp_path, model, papers, write_csv):
    train, test = papers[0], papers[1].assign(Keywords=papers[1]["title"] + ". cells")
    path = write_csv("test.csv", [test.columns, *test.to_numpy()])
    test = common.read_papers(path)
    model("bert", 0, papers=(train, test))
    record = {"scores": {"cased_recall_at_40": 0.25}, "fields": [], "papers": paper_record(train, test, 77)}
    write_json(tmp_path / "outputs" / "keywords" / "metrics.json", record)
    text = read_page("--test", path)[1]
    assert "0.2500" in text and "oard estimate" not in text


def test_f1_comes_with_an_interval(read_page, model, papers):
    held_out = np.arange(120) % 10 == 0
    model("bert", 0, held_out)  # all right
    low = float(re.search(r"F1 on 12 held-out papers, 95 % interval (0.\d+) to 1.000: 1.000", read_page()[1])[1])
    hits = papers[0]["label"][held_out].sum()
    share = hits / (hits + 1.96**2)  # Wilson's lower bound if all are hits
    assert low == pytest.approx(2 * share / (1 + share), abs=0.001)


def test_failed_stages_are_shown_until_they_succeed(read_page, tmp_path, model):
    model("baseline", 0.6)
    model("bert", 0.4)
    (tmp_path / "outputs" / "failed.txt").write_text("bert\nlora\n")
    os.utime(tmp_path / "outputs" / "bert" / "metrics.json", (1, 1))
    assert "failed in the last run: bert, lora" in read_page()[0].text
    model("bert", 0.4)
    os.utime(tmp_path / "outputs" / "failed.txt", (1, 1))
    assert "failed in the last run: lora." in read_page()[0].text


@pytest.mark.parametrize(
    ("auc", "words"),
    [(None, "not compared"), (0.1, "shows no difference"), (0.39, "shows no difference"), (0.41, "carry over"),
     (0.59, "carry over"), (0.65, "differ a little"), (0.9, "expect lower scores")],
)  # fmt: skip
def test_what_an_auc_of_train_against_test_means(auc, words):
    said = report.describe_auc(auc)
    assert words in said and said.startswith("warning") == (auc == 0.9) and len(said) <= 160


def test_seeds_show_their_spread(read_page, model):
    seeds = [scores([0, 1], [0.2, 0.9]), scores([0, 1], [0.2, 0.4])]
    model("bert", 0.4, seeds=seeds)
    assert "| bert | 2 | 0.5000 ± 0.7071 | 0.7500 ± 0.3536 |" in read_page()[1]


@pytest.mark.parametrize("accuracy", [0.5, 0.99])
def test_says_when_the_authors_give_the_label_away(read_page, model, accuracy):
    values = scores([0, 1], [0.2, 0.9])
    table = [["author rule", {**values, "accuracy": accuracy}, ""]]
    table.append(["naive Bayes, no author", {**values, "accuracy": 0.7654}, ""])
    model("baseline", 0.4, table=table)
    text = read_page()[0].text
    assert [("The way authors" in text), ("76.54%" in text)] == [accuracy > 0.9] * 2


def test_warns_if_all_test_papers_get_one_class(read_page, model):
    model("baseline", 0.4, test_probs=np.full(40, 0.1))
    page, _ = read_page()
    assert "40 of 40 test papers get label 0" in page.text and ("class", "trust warn") in page.attributes
    model("baseline", 0.4)
    assert ("class", "trust warn") not in read_page()[0].attributes


def test_hardest_are_the_wrong_and_the_disputed():
    labels = np.array([1, 0, 1, 0, 1])
    probs = np.array([[0.9, 0.1, 0.1, 0.9, 0.4], [0.9, 0.1, 0.1, 0.1, 0.4]])  # right, right, wrong, disputed, unsure
    order = report.hardest(labels, probs).tolist()
    assert set(order[:2]) == {2, 3} and order[2] == 4
    assert len(report.hardest(np.tile(labels, 9), np.tile(probs, 9))) == 20


def test_matrices_count_what_they_say():
    labels, probs = np.array([0, 0, 0, 0, 1, 1]), np.array([0.1, 0.5, 0.6, 0.2, 0.9, 0.4])
    cells = re.findall(r">(\d+)<", plots.draw_confusion("m", labels, probs).svg)
    assert cells == ["2", "2", "1", "1"]  # true 0: two right, 0.5 is a 1; true 1: one wrong, one right
    shares = re.findall(r">([\d.]+%)<", plots.draw_agreement("m", {"a": probs, "b": 1 - probs, "c": probs}).svg)
    assert shares == ["100.0%", "16.7%", "100.0%", "16.7%", "100.0%", "16.7%", "100.0%", "16.7%", "100.0%"]

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import KIT, SAMPLE

import baseline
import common
import plots
import report

HOSTILE = "<script>alert(1)</script> | `x` $y^2$ [a](http://b) \"q\" & 'r' 论文 <b>"
LOG = "epoch,train_loss,accuracy,f1,auc,log_loss\n1,0.7,0.5,0.4,,0.7\n2,0.4,0.9,0.9,0.95,0.3\n"


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed, in order; gathers tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
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
        self.text.append(data)


@pytest.fixture
def model(tmp_path, papers):
    """Write what a model leaves: made-up probabilities, worse as `noise` grows, and the files given by name."""
    train, test = papers

    def write(name, noise, held_out=slice(None), metrics=None, train=train, **files):
        random, held = np.random.default_rng(list(name.encode())), train[held_out]
        probs = np.clip(held["label"] + noise * random.normal(size=len(held)), 0, 1)
        found = {"papers": common.paper_record(train, test, len(held)), "fields": ["title"], **(metrics or {})}
        folder = tmp_path / "outputs" / name
        common.save_results(folder, test, random.random(len(test)), found, held, probs)
        for file, text in files.items():
            (folder / f"{file}.csv").write_text(text)

    return write


def read_page(tmp_path):
    """(Page, text of report.md); whatever the report holds, it needs nothing from outside and runs nothing."""
    text = (tmp_path / "outputs" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "default-src 'none'" in text and plots.INK not in text and "currentColor" in text
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not any(name.startswith("on") or name == "src" for name, _ in page.attributes)
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    return page, (tmp_path / "outputs" / "report.md").read_text(encoding="utf-8")


def test_baseline_alone_gives_a_smaller_page(kit, tmp_path, papers):
    assert kit("baseline.py").returncode == 0
    done = kit("blend.py")
    assert done.returncode == 0, done.stderr
    page, text = read_page(tmp_path)
    shown = "".join(page.text)
    for title in (
        "Held-out papers",
        "Test papers",
        "Confusion matrices",
        "What words tell the baseline",
        "The 20 hardest",
    ):
        assert title in shown
    assert "Learning curves" not in shown and "Agreement" not in shown and "Keywords" not in shown
    metrics = json.loads((tmp_path / "outputs" / "baseline" / "metrics.json").read_text())
    for value in (metrics["scores"]["f1"], metrics["table"][1][1]["accuracy"], metrics["author_free_scores"]["auc"]):
        assert f"{value:.4f}" in shown and f"{value:.4f}" in text
    assert "constant guess" in text and "author rule" in text and "no author" in text


def test_whole_page(kit, tmp_path, model):
    times = {"train_seconds": 61.26, "train_papers_per_second": 7.04, "epochs_run": [2], "device": "cpu, fp32"}
    model("baseline", 0.6)
    model("bert", 0.5, slice(0, 60), times, log=LOG)
    model("lora", 0.6, slice(0, 60), {"trained_on": "some GPU", "epochs_run": 2}, log=LOG)
    done = kit("blend.py", "--report-only")
    assert done.returncode == 0 and re.search(r"blend: \d\d% \w+ \+ ", done.stdout)
    page, text = read_page(tmp_path)
    shown = "".join(page.text)
    assert "61.3" in text and "7.0" in text and "some GPU" in text and "60 held out, title" in text
    for title in ("Learning curves", "Confusion matrices", "Reliability", "Agreement between models"):
        assert title in shown
    assert page.tags.count("svg") == 4 + 4 + 1 + 2  # curves of two models; three models and the blend; agreement twice
    assert not (tmp_path / "submit_task1.csv").exists()
    ids = [value for name, value in page.attributes if name == "id"]
    references = {value for name, value in page.attributes if name.endswith("href")}
    assert all(reference[1:] in ids for reference in references)


def test_untrusted_text_stays_text(kit, tmp_path, model, papers, write_csv, recwarn):
    train = papers[0].copy()
    for name in ("title", "author", "abstract"):
        train.loc[train.index[:40], name] = f"{name} {HOSTILE}"
    path = write_csv("train.csv", [train.columns, *train.to_numpy()])
    train = common.read_papers(path, labelled=True)
    model("<i>$\\frac$ | 模型", 0.5, train=train, log=LOG)
    model("_b", 0.5, train=train)
    done = kit("blend.py", "--train", path)
    assert done.returncode == 0 and not recwarn.list, done.stderr
    page, text = read_page(tmp_path)
    shown = "".join(page.text)
    assert f"title {HOSTILE}" in shown and f"author {HOSTILE}" in shown and f"abstract {HOSTILE}" in shown
    assert "<i>$\\frac$ | 模型" in shown
    rows = [line for line in text.splitlines() if line.startswith("| title \\<script")]
    rows += [line for line in text.splitlines() if line.startswith("| title | uuid")]
    assert len(rows) > 1 and all(
        len(re.findall(r"(?<!\\)\|", row)) == 7 for row in rows
    )  # title, uuid, label, two models, blend
    assert "<script" not in re.sub(r"\\.", "", text)


def test_same_inputs_same_bytes(kit, tmp_path, model):
    model("baseline", 0.6)
    model("bert", 0.4, slice(0, 60), log=LOG)
    files = [tmp_path / "outputs" / f"report.{kind}" for kind in ("html", "md")]
    assert kit("blend.py").returncode == 0
    first = [file.read_bytes() for file in files]
    command = [sys.executable, KIT / "blend.py", "--out-dir", tmp_path / "outputs", "--report-only"]
    command += ["--train", SAMPLE / "train.csv", "--test", SAMPLE / "test.csv"]
    assert subprocess.run(command, capture_output=True).returncode == 0  # another process hashes strings another way
    assert first == [file.read_bytes() for file in files]


@pytest.mark.parametrize(
    "log", ["", "epoch\n", "epoch,f1\n1,0.5\n", LOG[: LOG.index("\n") + 1], LOG.replace("0.4", "x")]
)
def test_a_log_that_can_not_be_drawn_is_left_out(kit, tmp_path, model, log):
    model("bert", 0.4, log=log)
    assert kit("blend.py").returncode == 0
    assert "Learning curves" not in "".join(read_page(tmp_path)[0].text)


def test_curves_of_folds_and_of_one_epoch(kit, tmp_path, model):
    model("bert", 0.4, metrics={"settings": {"folders": ["fold1", "fold2"]}}, log="of an earlier run")
    for fold in ("fold1", "fold2"):
        path = tmp_path / "outputs" / "bert" / fold / "log.csv"
        path.parent.mkdir()
        path.write_text(LOG[: LOG.index("\n2")])
    done = kit("blend.py")
    assert done.returncode == 0 and "damaged" not in done.stderr
    assert "Learning curves" in "".join(read_page(tmp_path)[0].text)


def test_keywords_only_of_these_papers(kit, tmp_path, model, papers):
    model("bert", 0.4)
    record = {
        "scores": {"f1_at_5": 0.1234},
        "fields": ["title"],
        "papers": common.paper_record(*papers, 77),
        "papers_per_second": 3.0,
    }
    common.write_json(tmp_path / "outputs" / "keywords" / "metrics.json", record)
    assert kit("blend.py", "--report-only").returncode == 0
    assert "0.1234" in read_page(tmp_path)[1] and "77 papers" in read_page(tmp_path)[1]
    record["papers"]["test_fingerprint"] = "other"
    common.write_json(tmp_path / "outputs" / "keywords" / "metrics.json", record)
    assert kit("blend.py", "--report-only").returncode == 0
    assert "0.1234" not in read_page(tmp_path)[1]


def test_hardest_are_the_wrong_and_the_disputed():
    labels = np.array([1, 0, 1, 0, 1])
    probs = np.array([[0.9, 0.1, 0.1, 0.9, 0.4], [0.9, 0.1, 0.1, 0.1, 0.4]])  # right, right, wrong, disputed, unsure
    order = report.hardest(labels, probs).tolist()
    assert set(order[:2]) == {2, 3} and order[2] == 4
    assert len(report.hardest(np.tile(labels, 9), np.tile(probs, 9))) == 20


def test_matrices_count_what_they_say():
    labels, probs = np.array([0, 0, 0, 0, 1, 1]), np.array([0.1, 0.5, 0.6, 0.2, 0.9, 0.4])
    cells = re.findall(r">(\d+)</tspan>|>(\d+)</text>", figure := plots.draw_confusion("m", labels, probs))
    numbers = [int(a or b) for a, b in cells] or [int(n) for n in re.findall(r">\s*(\d+)\s*<", figure)]
    assert numbers == [2, 2, 1, 1]  # true 0: two right, 0.5 is a 1; true 1: one wrong, one right
    shares = re.findall(r">([\d.]+%)<", plots.draw_agreement("m", {"a": probs, "b": 1 - probs, "c": probs}))
    assert shares == ["100.0%", "16.7%", "100.0%", "16.7%", "100.0%", "16.7%", "100.0%", "16.7%", "100.0%"]


@pytest.mark.parametrize("name", ["lr", "nb", "svm", "rf"])
def test_the_strongest_words_are_those_of_the_model(papers, name):
    """A word planted in every paper of a class leads its list, in hashed columns, too."""
    train = papers[0]
    labels = train["label"].to_numpy()
    planted = train.assign(
        title=[f"{title} {'zebra' if label else '斑马'}" for title, label in zip(train["title"], labels)]
    )
    blocks = baseline.count_ngrams(planted, ["title", "abstract"], (1, 1))
    settings = {"features": "bow", "model": name, "strength": baseline.STRENGTH[name], "author_weight": 0}
    settings |= {"max_features": None, "seed": 0}
    _, weights = baseline.fit(blocks, labels, settings)
    found = baseline.strongest_ngrams(planted, ["title", "abstract"], (1, 1), blocks, weights)["words"]
    if name == "rf":  # a forest has no weights
        assert found == {"0": [], "1": []}
    else:
        assert found["1"][0][0] == "zebra" and found["0"][0][0] == "斑马"
        assert [w for _, w in found["1"]] == sorted((w for _, w in found["1"]), reverse=True)

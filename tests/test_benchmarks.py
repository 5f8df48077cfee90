import subprocess
import sys

import pandas as pd
import pytest
from conftest import KIT, SAMPLE

sys.path.append(str(KIT / "benchmarks"))

import run  # noqa: E402


def start(*flags):
    command = [sys.executable, KIT / "benchmarks" / "run.py", "--data", SAMPLE, "--rounds", "1", *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_papers_asked_for_are_not_learned_from():
    learn, asked, fields = run.draw_papers(run.GROUPS["words"], SAMPLE, 1)
    assert not set(learn["title"]) & set(asked["title"][~asked["is_test"]])
    assert len(learn) + sum(~asked["is_test"]) == 120 and sum(asked["is_test"]) == 40 and asked["uuid"].is_unique
    assert fields == ["title", "author", "abstract"]  # what a test file shows: neither labels nor keywords
    again = run.draw_papers(run.GROUPS["words"], SAMPLE, 2)[0]
    assert set(again["uuid"]) != set(learn["uuid"])
    learn, asked, fields = run.draw_papers(run.GROUPS["keywords"], SAMPLE, 1, limit=5)
    assert len(learn) == len(asked) == 5 and not any(asked["is_test"]) and all(asked["Keywords"])
    assert fields == ["title", "abstract"]


def test_scores():
    asked = pd.DataFrame({"label": [1, 0, 1, 0], "is_test": [True, True, False, False]})
    found = run.score_labels(pd.Series([0.9, 0.8, 0.7, 0.1]).to_numpy(), asked)
    assert (found["test_accuracy"], found["held_out_accuracy"], found["held_out_f1"]) == (0.5, 1, 1)
    unknown = run.score_labels(pd.Series([0.9, 0.8, 0.7, 0.1]).to_numpy(), asked.assign(label=[-1, -1, 1, 0]))
    assert "test_accuracy" not in unknown
    found = run.score_keywords(["flu; lung cancer; x", "rock"], ["flu; Lung Cancer", "art"])
    assert found == pytest.approx({"keyword_f1": 4 / 7, "keyword_recall": 0.25}, abs=1e-6)


def test_tables_show_mean_and_spread():
    found = {
        "kit": [{"test_accuracy": 0.99, "seconds": 1.0}, {"test_accuracy": 0.97, "seconds": 1.2}],
        "peer": [{"seconds": 5.0, "test_accuracy": None}],
        "failed": [],
    }
    lines = run.make_table(("test_accuracy", "seconds"), found).splitlines()
    assert lines[2:] == ["| kit | 0.980 ± 0.014 | 1.1 ± 0.1 |", "| peer | – | 5.0 |"]


@pytest.mark.parametrize("flags, word", [(["--only", "birds"], "birds"), (["--data", "none"], "none"),
                                         (["--rounds", "0"], "0")])  # fmt: skip
def test_wrong_flags_and_files_are_refused(flags, word):
    done = start(*flags)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name, limit", [("words", 24), ("keywords", 24), ("bert", 8)])  # the LLM's takes minutes
def test_a_group_runs_on_a_handful_of_papers(name, limit):
    done = start("--only", name, "--limit", limit)
    assert done.returncode == 0, done.stderr
    assert f"{limit} papers to learn from" in done.stdout and f"--only {name} --rounds 1" in done.stdout
    for row in run.GROUPS[name].rows:
        assert f"| {row} |" in done.stdout or f"{row}: ModuleNotFoundError: No module named" in done.stdout

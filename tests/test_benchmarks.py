import json
import os
import subprocess
import sys
from argparse import Namespace

from conftest import KIT, SAMPLE

import pandas as pd
import pytest

sys.path.append(str(KIT / "benchmarks"))

import peers  # noqa: E402

import run  # noqa: E402


def start(doc, *flags):
    command = [sys.executable, KIT / "benchmarks" / "run.py", "--data", SAMPLE, "--rounds", "1", "--doc", doc, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_papers_asked_for_are_not_learned_from():
    args = Namespace(data=SAMPLE, quick=False)
    learn, asked, fields = run.draw_papers(args, run.GROUPS["words"], 1)
    assert not set(learn["title"]) & set(asked["title"][~asked["is_test"]])
    assert len(learn) + sum(~asked["is_test"]) == 120 and sum(asked["is_test"]) == 40 and asked["uuid"].is_unique
    assert fields == ["title", "author", "abstract"]
    again = run.draw_papers(args, run.GROUPS["words"], 2)[0]
    assert set(again["uuid"]) != set(learn["uuid"])
    learn, asked, _ = run.draw_papers(Namespace(data=SAMPLE, quick=True), run.GROUPS["keywords"], 1)
    assert len(learn) == len(asked) == run.QUICK and not any(asked["is_test"]) and all(asked["Keywords"])


def test_rows_get_the_papers_without_the_answers(tmp_path):
    args = Namespace(data=SAMPLE, quick=True)
    for name in ("keywords", "bert"):
        learn, asked, fields = run.draw_papers(args, run.GROUPS[name], 1)
        run.write_papers(tmp_path, run.GROUPS[name], learn, asked, fields)
        shown = pd.read_csv(tmp_path / "test.csv")
        assert not {"label", "Keywords", "is_test"} & set(shown) and len(shown) == len(asked)
    labels = pd.read_csv(tmp_path / "labels.csv")
    assert labels["uuid"].tolist() == asked["uuid"][asked["is_test"]].tolist()


def test_scores(tmp_path):
    asked = pd.DataFrame({"label": [1, 0, 1, 0], "is_test": [True, True, False, False]})
    found = run.score_labels(pd.Series([0.9, 0.8, 0.7, 0.1]).to_numpy(), asked)
    assert (found["test_accuracy"], found["held_out_accuracy"], found["held_out_f1"]) == (0.5, 1, 1)
    unknown = run.score_labels(pd.Series([0.9, 0.8, 0.7, 0.1]).to_numpy(), asked.assign(label=[-1, -1, 1, 0]))
    assert "test_accuracy" not in unknown
    asked = pd.DataFrame({"uuid": ["1", "2"], "Keywords": ["flu; Lung Cancer", "art"]})
    found = pd.DataFrame({"uuid": ["2", "1"], "Keywords": ["rock", "flu; lung cancer; x"]})
    found.to_csv(tmp_path / "k.csv", index=False)
    assert run.score_keywords(tmp_path / "k.csv", asked) == {"keyword_f1": 4 / 7, "keyword_recall": 0.25}


def test_tables_show_mean_spread_and_a_winner_only_beyond_the_spread():
    found = {
        "kit": [{"test_accuracy": 0.99, "seconds": 1.0}, {"test_accuracy": 0.97, "seconds": 1.2}],
        "peer": [{"test_accuracy": 0.98, "seconds": 5.0}, {"test_accuracy": 0.97, "seconds": 6.0}],
        "failed": [],
    }
    lines = run.make_table(("test_accuracy", "seconds"), found).splitlines()
    assert lines[2:] == ["| kit | 0.980 ± 0.014 | **1.1 ± 0.1** |", "| peer | 0.975 ± 0.007 | 5.5 ± 0.7 |"]
    one_round = run.make_table(("seconds",), {name: rounds[:1] for name, rounds in found.items()})
    assert "| kit | 1.0 |" in one_round and "**" not in one_round
    never = [{"minutes_to_goal": None, "epochs": 3}, {"minutes_to_goal": 2.0, "epochs": 3}]
    assert run.cell("minutes_to_goal", never) == "not in 3 epochs (1 of 2 times)"


def test_ratios_are_of_one_round():
    done = {"kit": {"train_speed": 6}, "peer": {"train_speed": 2}, "title": {}}
    assert run.add_ratios(done, "kit")["peer"]["train_ratio"] == 3 and "train_ratio" not in done["title"]


def test_the_clock_stops_at_the_goal_and_does_not_count_the_looks():
    answers = iter([[0.9, 0.9], [0.9, 0.1]])
    clock = peers.Clock(Namespace(labels=pd.Series([1, 0]).to_numpy()), 8, lambda: pd.Series(next(answers)).to_numpy())
    assert [clock.tick() for _ in range(4)] == [False, False, False, True]
    assert 0 < clock.reached <= clock.seconds() and clock.metrics(4)["train_papers_per_second"] > 0


@pytest.mark.slow
def test_a_run_writes_its_section_and_keeps_the_others(tmp_path):
    doc = tmp_path / "benchmarks.md"
    run.write_section(doc, "lora-speed", "## earlier")
    done = start(doc, "--only", "words")
    assert done.returncode == 0, done.stderr
    text = doc.read_text()
    assert text.index("## Words") < text.index("## earlier") and text.count("<!-- end -->") == 2
    assert "| **baseline.py** | " in text and "96 papers to learn from" in text and "--only words --rounds 1" in text
    rows = [line for line in text.splitlines() if "the tutorial's recipe" in line]
    assert len(rows) == 1 and rows[0].count("|") == 7


@pytest.mark.parametrize("flags, word", [(["--only", "birds"], "birds"), (["--data", "none"], "none"),
                                         (["--rounds", "0"], "0")])  # fmt: skip
def test_wrong_flags_and_files_are_refused(tmp_path, flags, word):
    done = start(tmp_path / "b.md", *flags)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("names", [["bert", "bert-busy"], ["keywords"], ["words"]])  # the LLM's takes minutes
def test_quick_runs_a_group_idle_on_a_handful_of_papers(tmp_path, names):
    done = start(tmp_path / "b.md", "--quick", "--only", *names)
    assert done.returncode == 0, done.stderr
    for row in run.GROUPS[names[0]].rows:
        shown = done.stdout.count(f"| {row.name} |") == 1
        assert shown or f"{row.name}: ModuleNotFoundError: No module named" in done.stdout
    assert not list(tmp_path.iterdir()), "docs/benchmarks.md keeps the tables of real runs"


# ---- gpu.py, on a CPU ------------------------------------------------------------------------------------------------


def check_gpu(folder, *names):
    """Run sections of gpu.py. Nothing may be wrong; returns the rows."""
    command = [sys.executable, KIT / "benchmarks" / "gpu.py", "--out-dir", folder, "--only", *names]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    rows = json.loads((folder / "gpu.json").read_text())
    assert done.returncode == 0 and all(row["ok"] is not False for row in rows), done.stderr
    assert {row["section"] for row in rows} == set(names)
    table = done.stdout.splitlines()
    assert table[0] == "| section | what | found | right |" and len(table) == 2 + len(rows)
    return rows


@pytest.mark.slow
def test_the_check_of_a_card_proves_itself_on_a_cpu(tmp_path):
    rows = check_gpu(tmp_path, "machine", "correctness", "scripts", "scaler", "llm", "bert", "4bit")
    right = [row["section"] for row in rows if row["ok"]]
    assert right.count("correctness") == 3 + 3 * 6 and right.count("scaler") == 3, "BERT and three decoders"
    assert rows[-1]["value"] == "skipped: needs a card"


def test_a_fault_ends_one_section_and_is_told(tmp_path):
    """Here, of torch that can't be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('no such library')")
    command = [sys.executable, KIT / "benchmarks" / "gpu.py", "--out-dir", tmp_path, "--only", "scaler", "machine"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 1 and [row["section"] for row in rows] == ["scaler", "machine"]
    assert all(row["what"] == "fault" and row["value"] == "ImportError: no such library" for row in rows)
    assert done.stdout.count("| NO |") == 2

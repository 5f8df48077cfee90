import copy
import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import KIT, SAMPLE

sys.path.append(str(KIT / "benchmarks"))

import run  # noqa: E402
import tables  # noqa: E402

RESULTS = json.loads((KIT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
TEXTS = [(KIT / name).read_text(encoding="utf-8") for name in run.READMES]


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [0, 1])
def test_the_readme_says_what_was_measured(language):
    """If this fails: python benchmarks/run.py --write-readme"""
    assert tables.insert(TEXTS[language], RESULTS, language) == TEXTS[language]
    assert sorted(re.findall(r"<!-- benchmark: (\S+) -->", TEXTS[language])) == sorted(tables.BLOCKS)


@pytest.mark.parametrize("language", [0, 1])
def test_every_other_result_makes_another_readme(language):
    """So that the test above can fail: each peer's speed, in each case, stands in the README."""
    for case, found in RESULTS.items():
        for peer, rows in found["runs"].items():
            other = copy.deepcopy(RESULTS)
            for row in other[case]["runs"][peer]:
                row["papers_per_second"] *= 3
            assert not rows or tables.insert(TEXTS[language], other, language) != TEXTS[language], (case, peer)


def test_every_case_stands_in_one_table():
    cases = [case for block in tables.BLOCKS.values() for case in block]
    assert sorted(cases) == sorted(run.CASES) == sorted(tables.PEERS) == sorted(tables.CAPTIONS)
    assert all("kit" in peers for peers in tables.PEERS.values()) and set(tables.VERSIONS) == set(tables.BLOCKS)


def row(number, speed, memory=100, **scores):
    seen = {"learn": 9, "fields": ["title"], "seconds": 1}
    return {"round": number, "papers_per_second": speed, "peak_memory_mb": memory, **seen, **scores}


def found(**runs):
    files = {"train": {"papers": 9, "fingerprint": "ab"}}
    machine = {"processor": "P", "cores": 2, "matmul_gflops": 1, "versions": {"Python": "3"}}
    return {"files": files, "limit": None, "machine": machine, "runs": runs}


def cells(text, name):
    """The cells of the row that begins with `name`, by column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return dict(zip(lines[0], next(line for line in lines if line[0] == name)))


def test_median_spread_and_ratios_by_round():
    """Ratios are of runs of the same round, also where a round of one peer failed."""
    kit, peer = [row(1, 10), row(2, 20), row(3, 40)], [row(1, 5, 300), row(3, 10, 150)]
    text = tables.table("bert-predict", found(kit=kit, original=peer), 0)
    assert cells(text, "**this kit**")["papers/s"] == "20.0 (10.0–40.0)"
    found_cells = cells(text, "the tutorial's loop (padding to 512)")
    assert found_cells["papers/s"] == "7.50 (5.00–10.0)"
    assert found_cells["speed, kit ÷ this"] == "3.00 (2.00–4.00)"
    assert found_cells["memory, this ÷ kit"] == "2.25 (1.50–3.00)"


def test_a_peer_that_wins_is_shown():
    runs = {"kit": [row(1, 10, accuracy=0.8, f1=0.7)], "fasttext": [row(1, 40, 50, accuracy=0.9, f1=0.6)]}
    text = tables.table("baseline", found(**runs), 0)
    wins = cells(text, "fastText, supervised")
    assert wins["speed, kit ÷ this"] == "**0.25**" and wins["memory, this ÷ kit"] == "**0.50**"
    assert wins["test accuracy"] == "**0.900**" and wins["test F1"] == "0.600"
    assert "Not run: the tutorial's recipe" in text and "SetFit" in text.splitlines()[-1]


def test_a_marker_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="birds"):
        tables.insert("<!-- benchmark: birds -->\n<!-- end -->", RESULTS, 0)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run run.py's main in this process, its runs replaced by `call`; returns what then stands in the results file."""
    path = tmp_path / "results.json"

    def start(call, *flags):
        monkeypatch.setattr(run, "call", call)
        monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(path), *flags])
        run.main()
        return json.loads(path.read_text())

    return start


class Calls(list):
    """Stands for run.call: keeps what it was asked for, and fails or stops where told."""

    def __init__(self, fails=(), stops=()):
        super().__init__()
        self.fails, self.stops = fails, stops

    def __call__(self, args, *one):
        if one == ("machine",):
            return found()["machine"], None
        if one in self.stops:
            raise KeyboardInterrupt
        self.append(one)
        number = one[-1]
        return (None, "no memory") if one in self.fails else ({**row(number, 1), "round": number}, None)


def test_peers_take_turns_and_a_stopped_run_goes_on(bench, tmp_path):
    flags = ("--only", "bert-train", "lora-predict", "--rounds", "2")
    calls = Calls(stops=[("bert-train", "trainer", 2)])
    with pytest.raises(KeyboardInterrupt):
        bench(calls, *flags)
    done = [("bert-train", peer, number) for number in (1, 2) for peer in ("kit", "original", "trainer")]
    assert calls == done[:-1]
    rest = Calls()
    bench(rest, *flags)
    assert rest == [done[-1]] + [("lora-predict", peer, number) for number in (1, 2) for peer in ("kit", "original")]


def test_finished_cases_are_kept_unless_named_or_the_papers_change(bench, tmp_path):
    only = ("--only", "lora", "--rounds", "1")
    first = bench(Calls(), *only)
    everything = Calls()
    assert bench(everything, "--rounds", "1")["lora-train"] == first["lora-train"]
    assert everything and not any(case.startswith("lora") for case, *_ in everything)
    named, limited = Calls(), Calls()
    bench(named, *only)
    bench(limited, *only, "--limit", "5")
    assert len(named) == len(limited) == 4


def test_a_failed_peer_costs_only_its_own_runs(bench, tmp_path, capsys):
    calls = Calls(fails=[("lora-train", "trainer", 1)])
    with pytest.raises(SystemExit, match="1 runs failed"):
        bench(calls, "--only", "lora", "--rounds", "1")
    assert len(calls) == 4 and "trainer failed in round 1: no memory" in capsys.readouterr().err
    again = Calls()
    bench(again, "--only", "lora-train", "--rounds", "1")
    assert again == [("lora-train", "trainer", 1)]


def test_a_peer_that_is_not_installed_is_left_out(bench, monkeypatch, capsys):
    monkeypatch.setattr(run, "NEEDS", {"keybert": "no_such_module", "yake": "json"})
    calls = Calls()
    results = bench(calls, "--only", "keywords", "--rounds", "1")
    assert "keybert" not in results["keywords"]["runs"] and ("keywords", "yake", 1) in calls
    assert "keybert left out" in capsys.readouterr().err
    assert "Not run: KeyBERT" in tables.blocks(results, 0)["keywords"]


def test_papers_asked_for_are_not_learned_from(monkeypatch):
    import papers

    args = run.argparse.Namespace(train=SAMPLE / "train.csv", test=SAMPLE / "test.csv", round=1)
    drawn = papers.draw(args)
    assert not set(drawn.learn["title"]) & set(drawn.asked["title"][~drawn.is_test])
    assert len(drawn.learn) + sum(~drawn.is_test) == 120 and sum(drawn.is_test) == 40
    assert drawn.fields == ["title", "author", "abstract"] and "label" not in drawn.asked
    values = papers.judge(drawn, drawn.labels)
    assert values["accuracy"] == values["held_out_f1"] == 1
    args.round = 2
    assert set(papers.draw(args).learn["uuid"]) != set(drawn.learn["uuid"])


def test_wrong_flags_and_files_are_refused(tmp_path):
    for flags, word in (
        (["--only", "birds"], "birds"),
        (["--train", "none.csv"], "none.csv"),
        (["--rounds", "0"], "0"),
    ):
        command = [sys.executable, KIT / "benchmarks" / "run.py", "--results", tmp_path / "r.json", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_run(tmp_path):
    """The cases and peers of the tables are those of the modules, and one of them runs from its command line."""
    for case, (module, _, _) in run.CASES.items():
        assert set(importlib.import_module(module).CASES[case]) == set(tables.PEERS[case])
    command = [sys.executable, KIT / "benchmarks" / "run.py", "--results", tmp_path / "r.json", "--rounds", "1"]
    command += ["--limit", "24", "--only", "ablation-baseline"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "r.json").read_text())["ablation-baseline"]["runs"]
    assert runs["kit"][0]["fields"] == ["title", "author", "abstract"] and runs["kit"][0]["peak_memory_mb"] > 10
    assert runs["no-author"][0]["accuracy"] is not None

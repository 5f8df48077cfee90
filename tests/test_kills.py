"""Every script is killed between two changes of the disk or after a batch, for what a kill leaves behind depends on
nothing else; then it goes on, and must end as if nothing had happened.

The scripts run in processes forked from one that has imported them and done no more: that saves the seconds of the
imports, and a fork with running threads could hang.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import KIT, SAMPLE
from safetensors import safe_open

from lib import cli

MOMENTS = {"bert-folds": 4, "bert-seeds": 4, "lora-folds": 4, "lora-predict-new": 4}  # in one run; 6 of the others
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
QUICK = ["--batch-size", "4", "--epochs", "2", "--save-minutes", "0"]
BERT = ["bert_finetune.py", "--model", "BERT", "--limit", "24", *QUICK, "--lr", "0.003", "--no-short-copies"]
BERT += ["--max-length"]
DATA = ["make_llm_data.py", "--limit", "24", "--fields", "title"]
LORA = ["lora_finetune.py", "--model", "LLM", *QUICK, "--lr", "0.01", "--rank"]
SCORE = ["lora_predict.py", "--limit", "24"]
BASELINE = ["baseline.py", "--limit", "24", "--fields", "title"]
NEW_TEST = ["--predict-only", "--test", "testB.csv"]
FOLDS, SEEDS = ["--folds", "2"], ["--seeds", "2"]
RESULTS = ["test.csv", "metrics.json", "valid.csv"]

# name: (what ran before, with other settings; the command that is killed; what it writes, of which the first file says
# that all the others are of one finished run)
CASES = {
    "bert": ([[*BERT, 48]], [*BERT, 32], "bert", [*RESULTS, "best/model.safetensors"]),
    "bert-folds": ([[*BERT, 48, *FOLDS]], [*BERT, 32, *FOLDS], "bert", [*RESULTS, "fold1/best/model.safetensors"]),
    "bert-seeds": ([[*BERT, 48, *FOLDS]], [*BERT, 32, *SEEDS], "bert", [*RESULTS, "seed43/best/model.safetensors"]),
    "bert-predict": ([[*BERT, 48]], ["bert_finetune.py", *NEW_TEST], "bert", RESULTS),
    "lora": ([DATA, [*LORA, 4], SCORE], [*LORA, 8], "lora", ["training.json", "best/adapter_model.safetensors"]),
    "lora-folds": (
        [DATA, [*LORA, 4], SCORE],
        [*LORA, 8, *FOLDS],
        "lora",
        ["training.json", "fold1/best/adapter_model.safetensors", "fold2/best/adapter_model.safetensors"],
    ),
    "lora-predict": ([DATA, [*LORA, 4], SCORE], [*SCORE, "--max-length", 80], "lora", RESULTS),
    "lora-predict-new": ([DATA, [*LORA, 4], SCORE], ["lora_predict.py", *NEW_TEST], "lora", RESULTS),
    "llm-data": (
        [DATA],
        [*DATA, "abstract"],
        ".",
        [f"paper_label_{side}.json" for side in ("source", "valid", "test")] + ["paper_label.json"],
    ),
    "baseline": ([BASELINE], [*BASELINE, "abstract"], "baseline", RESULTS),
    "blend": ([BASELINE], ["blend.py", "--limit", "24", "--fields", "title"], "..", ["submit_task1.csv"]),
}


def child(folder, command, moment, number):
    """Run a script in `folder`; send this process the signal `number` at its `moment`-th moment (from 1)."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a CI that runs in the background ignores it
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        stream.flush()
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    passed = 0

    def pass_moment():
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), number)

    def audit(event, arguments):
        if event in CHANGES or event == "open" and "w" in str(arguments[1]):
            path = os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else "/dev"
            if not Path(path).is_absolute() or path.startswith(str(folder)):  # shutil.rmtree gives names alone
                pass_moment()

    sys.argv = list(map(str, command))
    script = __import__(command[0].removesuffix(".py"))
    if training := sys.modules.get("lib.training"):
        update = training.tqdm.update
        training.tqdm.update = lambda bar, count: update(bar, count) or pass_moment()
    sys.addaudithook(audit)
    code = 0
    try:
        cli.run_script(script.main)
    except SystemExit as end:
        code = end.code
    moments = passed
    Path("moments").write_text(str(moments))
    sys.stdout.flush()
    os._exit(code)


@pytest.fixture(scope="session")
def server():
    """Where the children are forked."""
    before = dict(os.environ)
    paths = os.pathsep.join([str(KIT), str(KIT / "tests")])
    os.environ |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DATA_DIR": str(SAMPLE)}
    context = multiprocessing.get_context("forkserver")
    scripts = ["bert_finetune", "lora_finetune", "lora_predict", "make_llm_data", "baseline", "blend"]
    context.set_forkserver_preload([*scripts, "sklearn.metrics", "test_kills"])
    multiprocessing.forkserver.ensure_running()
    yield context
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(server):
    """Run a script in a folder, to its end or to a signal. Returns (exit code, stderr, moments it had)."""

    def start(folder, command, moment=0, number=signal.SIGKILL):
        process = server.Process(target=child, args=(folder, command, moment, number))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        moments = int((folder / "moments").read_text()) if (folder / "moments").exists() else None
        return process.exitcode, (folder / "stderr").read_text(), moments

    return start


@pytest.fixture
def prepared(run, tmp_path, tiny_bert, tiny_llm, test_b):
    """Of a case: (folder as the earlier runs left it, another in which the command ran to its end, a function that runs
    the command, the number of its moments)."""

    def prepare(case):
        earlier, command, *_ = CASES[case]
        for name in ("earlier", "whole"):
            (tmp_path / name).mkdir()

        def go(folder, command, *more):
            models = {"BERT": tiny_bert, "LLM": tiny_llm, "testB.csv": tmp_path / "testB.csv"}
            return run(folder, [*(models.get(word, word) for word in command), "--out-dir", folder / "outputs"], *more)

        for step in earlier:
            code, stderr, _ = go(tmp_path / "earlier", step)
            assert code == 0, stderr
        shutil.copytree(tmp_path / "earlier", tmp_path / "whole", dirs_exist_ok=True)
        code, stderr, moments = go(tmp_path / "whole", command)
        assert code == 0, stderr
        return tmp_path / "earlier", tmp_path / "whole", go, moments

    return prepare


def contents(case, folder):
    """What the files of a case say, without times and places: a list, None for a file that is not there."""
    *_, place, names = CASES[case]
    found = []
    for path in (folder / "outputs" / place / name for name in names):
        if not path.exists():
            found.append(None)
        elif path.name in ("metrics.json", "training.json"):
            record = json.loads(path.read_text())
            found.append({key: record.get(key) for key in ("scores", "papers", "fields", "settings", "epochs_run")})
        else:
            found.append(path.read_bytes())
    return found


def check_whole(folder, known):
    """Every file under its own name is whole. `known`: the folders of finished runs."""
    for path in (folder / "outputs").rglob("[!.]*"):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or path.is_dir():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(key) is not None for key in file.keys())
        elif path.name == "log.csv":
            assert path.read_text().endswith("\n") and pd.read_csv(path).notna().all(axis=None)
        elif path.suffix == ".csv":
            assert path.read_bytes() in [(run / name).read_bytes() for run in known if (run / name).exists()], name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed(prepared, tmp_path, case):
    earlier, whole, go, moments = prepared(case)
    command = CASES[case][1]
    want = [contents(case, folder) for folder in (earlier, whole)]
    assert want[0] != want[1]
    if command[0] in ("bert_finetune.py", "lora_finetune.py") and "--predict-only" not in command:
        again = [*command, "--resume"]
    else:
        again = command
    for moment in random.Random(case).sample(range(1, moments + 1), min(MOMENTS.get(case, 6), moments)):
        folder = tmp_path / f"killed {moment}"
        shutil.copytree(earlier, folder)
        assert go(folder, command, moment)[0] == -signal.SIGKILL
        check_whole(folder, (earlier, whole))
        left = contents(case, folder)
        assert left[0] is None or left in want, f"moment {moment}: files of two runs"
        code, stderr, _ = go(folder, again)
        assert code == 0, f"moment {moment}: {stderr}"
        assert contents(case, folder) == want[1], f"moment {moment}"
        if (lock := folder / "outputs" / CASES[case][2] / ".lock").exists():
            assert [path for path in lock.parent.rglob(".*")] == [lock], "rubbish stays"
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bert", "lora", "lora-predict"])
def test_interrupted(prepared, case):
    earlier, whole, go, moments = prepared(case)
    command, want = CASES[case][1], contents(case, whole)
    resume = [] if case == "lora-predict" else ["--resume"]
    code, stderr, _ = go(earlier, command, moments // 2, signal.SIGINT)
    assert code == 130 and "Traceback" not in stderr, stderr
    hint = "the same command with --resume goes on" if resume else "the same command starts again"
    assert stderr.splitlines()[-1].endswith(f"{command[0]}: interrupted; {hint}"), stderr
    code, stderr, _ = go(earlier, [*command, *resume])
    assert code == 0, stderr
    assert contents(case, earlier) == want

"""Scripts are killed between two changes of the disk or after a batch, for what a kill leaves behind depends on nothing
else, or interrupted; then they go on, and must end as if nothing had happened.

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
from dataclasses import dataclass
from pathlib import Path

from conftest import KIT, SAMPLE
from lib import cli

import pandas as pd
import pytest
from safetensors import safe_open

MOMENTS = 4  # at which a case is killed
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
QUICK = ["--batch-size", "4", "--epochs", "2", "--save-minutes", "0"]
BERT = ["bert_finetune.py", "--model", "BERT", "--limit", "24", *QUICK, "--lr", "0.003", "--no-short-copies"]
BERT += ["--folds", "2", "--max-length"]
DATA = ["make_llm_data.py", "--limit", "24", "--fields", "title"]
LORA = ["lora_finetune.py", "--model", "LLM", *QUICK, "--lr", "0.01", "--rank"]
SCORE = ["lora_predict.py", "--limit", "24"]
BASELINE = ["baseline.py", "--limit", "24", "--fields", "title"]


@dataclass
class Case:
    earlier: list  # of commands that ran before, with other settings
    command: list  # the one that is killed
    names: list  # files under outputs/; if the first is there, all of them are, of one finished run
    hint: str  # what it says when it is interrupted


def results(name):
    return [f"{name}/test.csv", f"{name}/metrics.json", f"{name}/valid.csv"]


GOES_ON = "interrupted; the same command with --resume goes on"
STARTS_AGAIN = "interrupted; the same command starts again"
CASES = {
    "bert": Case([[*BERT, 48]], [*BERT, 32], [*results("bert"), "bert/fold1/best/model.safetensors"], GOES_ON),
    "lora": Case([DATA, [*LORA, 4], SCORE], [*LORA, 8], ["lora/training.json", "lora/best/adapter_model.safetensors"],
                 GOES_ON),
    "lora-predict": Case([DATA, [*LORA, 4], SCORE], [*SCORE, "--max-length", 80], results("lora"), STARTS_AGAIN),
    "baseline": Case([BASELINE], [*BASELINE, "abstract"], results("baseline"), "interrupted"),
}  # fmt: skip


def child(folder, command, passed, moment, number):
    """Run a script in `folder`; send this process the signal `number` at its `moment`-th moment (from 1). `passed`: a
    shared counter of the moments.
    """
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a CI that runs in the background ignores it
    sys.stdout, sys.stderr = open(os.devnull, "w"), open("stderr", "w", buffering=1)

    def pass_moment():
        passed.value += 1
        if passed.value == moment:
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
    os._exit(code)


@pytest.fixture(scope="module")
def run():
    """Run a script in a folder, to its end or to a signal. Returns (exit code, stderr, moments it had)."""
    context = multiprocessing.get_context("forkserver")
    scripts = ["bert_finetune", "lora_finetune", "lora_predict", "make_llm_data", "baseline"]
    context.set_forkserver_preload([*scripts, "sklearn.metrics", "test_kills"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(KIT), str(KIT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DATA_DIR", str(SAMPLE))
        multiprocessing.forkserver.ensure_running()

    def start(folder, command, moment=0, number=signal.SIGKILL):
        passed = context.Value("i", lock=False)
        process = context.Process(target=child, args=(folder, command, passed, moment, number))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, (folder / "stderr").read_text(), passed.value

    return start


def contents(case, folder):
    """What the files of a case say, without times and places: a list, None for a file that is not there."""
    found = []
    for name in case.names:
        path = folder / "outputs" / name
        if not path.exists():
            found.append(None)
        elif path.suffix == ".json":
            record = json.loads(path.read_text())
            found.append({key: record.get(key) for key in ("scores", "papers", "fields", "settings", "epochs_run")})
        else:
            found.append(path.read_bytes())
    return found


def check_whole(folder, known):
    """Every file under its own name is whole. `known`: the folders of finished runs."""
    for path in (folder / "outputs").rglob("*.*"):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            safe_open(path, "pt")  # raises an error unless the file is as long as its header says
        elif path.name == "log.csv":
            assert path.read_text().endswith("\n") and pd.read_csv(path).notna().all(axis=None)
        elif path.suffix == ".csv":
            assert path.read_bytes() in [(run / name).read_bytes() for run in known if (run / name).exists()], name


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_or_interrupted(run, tmp_path, tiny_bert, tiny_llm, name):
    case, earlier, whole = CASES[name], tmp_path / "earlier", tmp_path / "whole"

    def go(folder, command, *more):
        command = [{"BERT": tiny_bert, "LLM": tiny_llm}.get(word, word) for word in command]
        return run(folder, [*command, "--out-dir", folder / "outputs"], *more)

    earlier.mkdir()
    for step in case.earlier:
        code, stderr, _ = go(earlier, step)
        assert code == 0, stderr
    shutil.copytree(earlier, whole)
    code, stderr, moments = go(whole, case.command)
    assert code == 0, stderr
    want = [contents(case, folder) for folder in (earlier, whole)]
    assert want[0] != want[1]

    draw = random.Random(name)
    starts = [moments * part // MOMENTS for part in range(MOMENTS)]
    signals = [(start + draw.randint(1, moments // MOMENTS), signal.SIGKILL) for start in starts]
    for moment, number in [*signals, (moments // 2, signal.SIGINT)]:
        folder = tmp_path / f"{number.name} {moment}"
        shutil.copytree(earlier, folder)
        code, stderr, _ = go(folder, case.command, moment, number)
        if number == signal.SIGKILL:
            assert code == -number
        else:
            assert code == 130 and "Traceback" not in stderr, stderr
            assert stderr.splitlines()[-1] == f"{case.command[0]}: {case.hint}"
        check_whole(folder, (earlier, whole))
        left = contents(case, folder)
        assert left[0] is None or left in want, f"{folder.name}: files of two runs"
        code, stderr, _ = go(folder, [*case.command, *["--resume"] * (case.hint == GOES_ON)])
        if "leave --resume out" in stderr:  # it had not begun: the earlier run is still there
            assert left == want[0]
            code, stderr, _ = go(folder, case.command)
        assert code == 0, f"{folder.name}: {stderr}"
        assert contents(case, folder) == want[1], folder.name
        assert {path.name for path in (folder / "outputs").rglob(".*")} <= {".lock"}, "rubbish stays"
        shutil.rmtree(folder)

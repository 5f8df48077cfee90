"""run.sh with an interpreter that only writes down what it is asked to run: a chain takes a tenth of a second."""

import os
import shutil
import signal
import subprocess
import sys

from conftest import KIT

import pytest

CHAIN = ["baseline.py", "bert_finetune.py", "make_llm_data.py", "lora_finetune.py", "lora_predict.py"]
CHAIN += ["extract_keywords.py", "blend.py"]
# It says that it is Python 3.11 in /usr, makes a .venv with itself in it, and writes what it should run to $LOG/pip, or
# $LOG/scripts and $LOG/commands. FAIL="bert_finetune.py=2" lets a script (or a requirements file) fail. With
# CTRL_C=bert_finetune.py Ctrl-C is pressed while that runs.
INTERPRETER = r"""#!/usr/bin/env bash
case "$1" in */launch.py) shift ;; esac
case "$*" in
"-c import pip") exit 0 ;;
"-c "*) version="3 11 /usr" && [ "${version#3 9}" = "$version" ] && echo "$version"; exit ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit ${VENV_CODE:-0} ;;
"-m pip "*) echo "$*" >>"$LOG/pip" ;;
*build.py) echo "${BUILD:-}" ;;
*.py*) basename "$1" >>"$LOG/scripts"; echo "$*" >>"$LOG/commands"; env >"$LOG/env" ;;
esac
name=$(basename -- "$1")
[ "$1" != -m ] || name=$(basename "${@: -1}")
[ "$name" != "${CTRL_C:-}" ] || "$REAL" -c 'import os, signal, time; os.killpg(0, signal.SIGINT); time.sleep(60)'
case " ${FAIL:-} " in *" $name="*) code=${FAIL#*"$name="} && exit "${code%% *}" ;; esac
"""
OLD = INTERPRETER.replace("3 11 /usr", "3 9 /usr")


def write_interpreter(path, text=INTERPRETER):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Shell:
    """A copy of run.sh in a folder with a blank, with that interpreter; it is run from another folder."""

    def __init__(self, folder):
        self.folder, self.kit = folder, folder / "a kit é"
        for name in ("a kit é", "log", "elsewhere"):
            (folder / name).mkdir()
        for path in [KIT / "run.sh", *KIT.glob("requirements*.txt")]:
            shutil.copy(path, self.kit)
        python = write_interpreter(folder / "python")
        self.env = {"PATH": os.environ["PATH"], "LOG": folder / "log", "REAL": sys.executable, "PYTHON": python}

    def __call__(self, *stages, path=None, **settings):
        env = {name: str(value) for name, value in {**self.env, **settings}.items() if value is not None}
        pipes = {"capture_output": True, "text": True, "timeout": 30, "start_new_session": True}
        command = ["bash", path or self.kit / "run.sh", *stages]
        return subprocess.run(command, env=env, cwd=self.folder / "elsewhere", **pipes)

    def log(self, name):
        """The lines that the interpreter wrote to log/NAME."""
        path = self.folder / "log" / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_every_stage_runs_once_in_its_order(shell):
    done = shell(SEED=7, LLM_4BIT=1, RESUME="False")
    assert done.returncode == 0 and shell.log("scripts") == CHAIN
    assert "== 1 of 7: python baseline.py" in done.stderr and "== 7 of 7: python blend.py" in done.stderr
    assert "NO DATA YET" in done.stderr and f"PWD={shell.folder}/elsewhere" in shell.log("env")
    seeded = [script for script, line in zip(CHAIN, shell.log("commands")) if "--seed 7" in line]
    assert seeded == [name for name in CHAIN if name not in ("make_llm_data.py", "lora_predict.py")]
    assert shell.log("commands")[3].endswith("lora_finetune.py --seed 7 --model auto --load-in-4bit")
    assert "requirements-4bit.txt" in shell.log("pip")[-1]


def test_some_stages_and_help(shell):
    (shell.folder / "link").symlink_to(shell.kit / "run.sh")
    shell("blend", "baseline", path="../link")
    assert shell.log("commands") == [f"{shell.kit}/{name} --seed 42" for name in ("baseline.py", "blend.py")]
    shown = subprocess.run(["sh", shell.kit / "run.sh", "--help"], capture_output=True, text=True)  # dash on Debian
    assert shown.returncode == 0 and "baseline" in shown.stdout and "DATA_DIR" in shown.stdout


@pytest.mark.parametrize(
    "fail, left_out, failed",
    [
        ("bert_finetune.py=137", [], "bert"),
        ("baseline.py=1 extract_keywords.py=2", [], "baseline keywords"),
        ("make_llm_data.py=2", ["lora_finetune.py", "lora_predict.py"], "llm-data lora lora-predict"),
        ("blend.py=2 requirements-models.txt=1", [], "setup blend"),
    ],
)
def test_a_stage_that_fails_costs_that_stage(shell, fail, left_out, failed):
    done = shell(FAIL=fail, SEED=7, BERT_MODEL="a b")
    assert done.returncode == 1 and shell.log("scripts") == [name for name in CHAIN if name not in left_out]
    why, again = done.stderr.splitlines()[-2:]
    assert f"FAILED: {failed}." in why and ("memory" in done.stderr) == ("137" in fail)
    blend = "" if failed.endswith("blend") else " blend"
    assert again.startswith(r"SEED=7 BERT_MODEL=a\ b PYTHON=") and again.endswith(f"run.sh' {failed}{blend}")
    env = {"LOG": str(shell.folder / "log"), "PATH": os.environ["PATH"]}
    assert subprocess.run(["bash", "-c", again], env=env, stderr=subprocess.DEVNULL).returncode == 0


def test_a_published_chatglm2_is_converted_once(shell):
    (shell.folder / "config.json").write_text('{"model_type": "chatglm"}')
    assert shell("lora", LLM_MODEL="..").returncode == 0
    converted, trained = shell.log("commands")
    target = shell.kit / ".cache" / str(shell.folder).replace("/", "_")
    assert converted.endswith(f"convert_chatglm2.py {shell.folder} {target}") and trained.endswith(f"--model {target}")
    target.mkdir(parents=True)
    shell("lora", LLM_MODEL="..")
    assert shell.log("scripts")[2:] == ["lora_finetune.py"]


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="as under nohup; bash can't undo that")
@pytest.mark.parametrize("moment, left", [("bert_finetune.py", "bert blend"), ("requirements.txt", "setup bert blend")])
def test_ctrl_c_stops_at_once_and_prints_how_to_go_on(shell, moment, left):
    settings = {"SEED": 7, "HF_ENDPOINT": "http://hub", "PIP_INDEX_URL": "http://pip", "CUDA_VISIBLE_DEVICES": ""}
    done = shell("setup", "bert", "blend", CTRL_C=moment, HF_TOKEN="secret", **settings)
    assert done.returncode == 130 and "blend.py" not in shell.log("scripts") and "secret" not in done.stderr
    again = done.stderr.splitlines()[-1].split("to go on: ")[1]
    resume = " RESUME=1" if "bert" in moment else ""
    hub = " HF_ENDPOINT=http://hub PIP_INDEX_URL=http://pip CUDA_VISIBLE_DEVICES='' HF_TOKEN=$HF_TOKEN bash "
    assert again.startswith(f"SEED=7{resume} PYTHON=") and hub in again and again.endswith(f"/run.sh' {left}")


# ---- .venv -----------------------------------------------------------------------------------------------------------


def test_the_build_of_torch_is_chosen_before_it_is_installed(shell):
    flag = "--extra-index-url https://download.pytorch.org/whl/cu126"
    assert shell("setup", BUILD=flag).returncode == 0
    torch, models = shell.log("pip")
    assert f"{flag} -r " in torch and torch.endswith("/requirements.txt") and flag not in models


def test_nothing_is_installed_twice(shell):
    assert shell("setup").returncode == 0 and len(shell.log("pip")) == 2
    assert all(" --no-user " in line for line in shell.log("pip"))
    shell("baseline", PYTHON=None)
    assert len(shell.log("pip")) == 2
    (shell.kit / "requirements.txt").write_text("numpy==2.4.6\n")
    shell("baseline")
    assert len(shell.log("pip")) == 3 and "requirements.txt" in shell.log("pip")[2]
    write_interpreter(shell.kit / ".venv" / "bin" / "python", INTERPRETER.replace("3 11 /usr", "3 12 /usr"))
    shell("baseline", PYTHON=None)
    assert len(shell.log("pip")) == 5


@pytest.mark.parametrize(
    "interpreter",
    [None, INTERPRETER.replace('pip") exit 0', 'pip") exit 1'), OLD, INTERPRETER.replace("3 11 /usr", "3 13 /opt")],
    ids=["a link to nothing", "half made, without pip", "too old", "not PYTHON"],
)
def test_a_venv_that_does_not_work_is_made_again(shell, interpreter):
    if interpreter:
        write_interpreter(shell.kit / ".venv" / "bin" / "python", interpreter)
    else:
        (shell.kit / ".venv").symlink_to("nowhere")
    done = shell("baseline")
    assert done.returncode == 0 and "== making" in done.stderr and shell.log("scripts") == ["baseline.py"]
    assert len(shell.log("pip")) == 2


@pytest.mark.parametrize(
    "stage, settings, words",
    [
        ("blend", {"PYTHON": "no-such-python"}, ["no-such-python"]),
        ("blend", {"PYTHON": "../old"}, ["3.11", "PYTHON"]),
        ("blend", {"VENV_CODE": 1}, ["python3-venv"]),
        ("blend", {"FAIL": "requirements.txt=1"}, ["PIP_INDEX_URL"]),
        ("blend", {"DATA_DIR": "nowhere"}, ["nowhere", "train.csv"]),
        ("basline", {}, ["basline", "--help"]),
    ],
)
def test_what_stops_everything_is_one_line(shell, stage, settings, words):
    write_interpreter(shell.folder / "old", OLD)
    done = shell(stage, **settings)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("run.sh: ") and all(word in last for word in words)
    assert not shell.log("scripts")


# ---- surroundings ----------------------------------------------------------------------------------------------------


def test_what_a_shell_left_behind(shell):
    (shell.folder / "elsewhere" / "link").symlink_to(shell.kit)
    left = dict.fromkeys(["PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH", "PIP_USER"], "1")
    done = shell("baseline", path="link/run.sh", CDPATH=".:/tmp", **left)
    assert done.returncode == 0 and shell.log("scripts") == ["baseline.py"]
    assert not [line for line in shell.log("env") if line.startswith("PYTHON") and not line.startswith("PYTHON=")]

"""run.sh with an interpreter that only writes down what it is asked to run: a chain takes a tenth of a second."""

import os
import shutil
import signal
import site
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import KIT

CHAIN = ["baseline.py", "bert_finetune.py", "make_llm_data.py", "lora_finetune.py", "lora_predict.py"]
CHAIN += ["extract_keywords.py", "blend.py"]
# It says that it is Python 3.11 in /usr, makes a .venv with itself in it, and writes what it should run to $LOG/scripts
# and $LOG/commands. FAIL="bert_finetune.py=2" lets a script fail, SLOW=bert_finetune.py lets it take a minute.
INTERPRETER = r"""#!/usr/bin/env bash
version="3 11 /usr"
case "$*" in
"-c import pip") exit 0 ;;
"-c "*) [ "${version#3 9}" = "$version" ] && echo "$version"; exit ;;
"-m venv "*) mkdir -p "$3/bin" "$3/lib/python3.11/site-packages" && cp "$0" "$3/bin/python" && exit ${VENV_CODE:-0} ;;
"-m pip freeze") echo "${FROZEN-numpy==2.4.6}" && exit ;;
"-m pip "*) echo "$*" >>"$LOG/pip"; env >"$LOG/env"; exit ${PIP_CODE:-0} ;;
*/launch.py\ *) shift ;;
esac
name=$(basename "$1")
echo "$name" >>"$LOG/scripts"
echo "$*" >>"$LOG/commands"
[ "$name" != "${SLOW:-none}" ] || "$REAL" -c 'import time; time.sleep(60)'
case " ${FAIL:-} " in *" $name="*) code=${FAIL#*"$name="} && exit "${code%% *}" ;; esac
"""


def write_interpreter(path, version="3 11 /usr"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(INTERPRETER.replace("3 11 /usr", version))
    path.chmod(0o755)
    return path


@pytest.fixture
def shell(tmp_path):
    """A copy of run.sh, in a folder with a blank, and the interpreter. shell(*stages, **settings) runs it elsewhere;
    shell.kit is the copy, shell.log(name) the lines that the interpreter wrote.
    """
    kit, log, elsewhere = tmp_path / "a kit é", tmp_path / "log", tmp_path / "elsewhere"
    (kit / "lib").mkdir(parents=True)
    log.mkdir()
    elsewhere.mkdir()
    for path in [KIT / "run.sh", *KIT.glob("requirements*.txt"), *KIT.glob("lib/*.sh"), KIT / "lib" / "launch.py"]:
        shutil.copy(path, kit / path.relative_to(KIT))
    base = {"PATH": os.environ["PATH"], "LOG": str(log), "REAL": sys.executable}
    base["PYTHON"] = str(write_interpreter(tmp_path / "python"))

    def start(*stages, path=kit / "run.sh", **settings):
        env = {name: str(value) for name, value in {**base, **settings}.items() if value is not None}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["bash", path, *stages], env=env, cwd=elsewhere, **pipes)

    def run(*stages, **settings):
        process = start(*stages, **settings)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def read_log(name):
        return (log / name).read_text().splitlines() if (log / name).exists() else []

    run.kit, run.log, run.start, run.folder = kit, read_log, start, log
    return run


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_every_stage_runs_once_in_its_order(shell):
    done = shell()
    assert done.returncode == 0 and shell.log("scripts") == CHAIN
    assert f"submission: {shell.folder.with_name('elsewhere')}/submit_task1.csv" in done.stdout


@pytest.mark.parametrize("value", ["-1", "20261124235900", "7"])
def test_the_scripts_judge_the_seed(shell, value):
    shell("baseline", SEED=value)
    assert shell.log("commands")[0].endswith(f"baseline.py --seed {value}")


@pytest.mark.parametrize(
    "fail, left_out, failed",
    [
        ("bert_finetune.py=2", [], "bert"),
        ("bert_finetune.py=137", [], "bert"),
        ("baseline.py=1 extract_keywords.py=2", [], "baseline keywords"),
        ("lora_finetune.py=1", ["lora_predict.py"], "lora lora-predict"),
        ("make_llm_data.py=2", ["lora_finetune.py", "lora_predict.py"], "llm-data lora lora-predict"),
        ("blend.py=2", [], "blend"),
    ],
)
def test_a_stage_that_fails_costs_that_stage(shell, fail, left_out, failed):
    done = shell(FAIL=fail, SEED=7, BERT_MODEL="a b")
    assert done.returncode == 1 and shell.log("scripts") == [name for name in CHAIN if name not in left_out]
    assert (shell.kit / "outputs" / "failed.txt").read_text().split() == failed.split()
    why, again = done.stderr.splitlines()[-2:]
    blend = "" if "blend" in failed else " blend"
    assert f"FAILED: {failed}." in why and ("memory" in done.stderr) == ("137" in fail)
    assert again.startswith(r"SEED=7 BERT_MODEL=a\ b PYTHON=") and again.endswith(f"run.sh' {failed}{blend}")
    assert ("submission:" in done.stdout) == ("blend.py" not in fail)
    env = {"LOG": str(shell.folder), "PATH": os.environ["PATH"]}
    assert subprocess.run(["bash", "-c", again], env=env).returncode == 0
    assert not (shell.kit / "outputs" / "failed.txt").exists()


def test_a_published_chatglm2_is_converted_once(shell, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}')
    dead, alive = (shell.kit / ".cache" / f".chatglm2.{pid}.part" for pid in (2**22 + 1, os.getpid()))
    dead.mkdir(parents=True)
    alive.mkdir()
    assert shell("lora", LLM_MODEL=tmp_path).returncode == 0
    target = shell.log("commands")[0].rsplit("/", 1)[1]
    assert shell.log("scripts") == ["convert_chatglm2.py", "lora_finetune.py"]
    assert not dead.exists() and alive.exists()
    (shell.kit / ".cache" / target).mkdir()
    shell("lora", LLM_MODEL=tmp_path)
    assert shell.log("scripts").count("convert_chatglm2.py") == 1


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("target", ["&-", "/dev/full"])
def test_a_stream_that_takes_nothing(shell, stream, target):
    script = f'bash "$0" baseline blend {1 if stream == "stdout" else 2}>{target}'
    done = shell(script, shell.kit / "run.sh", path="-c")
    assert done.returncode == 0 and shell.log("scripts") == ["baseline.py", "blend.py"]


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_stops_the_child_at_once(shell, name, code):
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup, and bash can't undo that")
    process = shell.start("baseline", "bert", "blend", SLOW="bert_finetune.py", SEED=7, LLM_4BIT=1)
    while "bert_finetune.py" not in shell.log("scripts"):
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=20)  # which waits until nobody holds the pipe: the child's child is gone, too
    assert time.monotonic() - started < 5
    assert process.returncode == code and shell.log("scripts") == ["baseline.py", "bert_finetune.py"]
    last = [line for line in err.split("bert_finetune.py --model auto\n")[1].splitlines() if line]
    assert len(last) == 1 and "stopped during bert" in last[0]
    assert last[0].endswith("run.sh' bert blend") and " SEED=7 LLM_4BIT=1 RESUME=1 " in last[0]


@pytest.fixture
def two_processes(tmp_path):
    """Start lib/launch.py's launcher with a script of two processes. Returns the Popen."""

    def start(code):
        (tmp_path / "script.py").write_text(code)
        launch = "import sys; from lib.launch import launch; sys.exit(launch(2, [sys.argv[1]]))"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", launch, tmp_path / "script.py"], cwd=KIT, **pipes)

    return start


@pytest.mark.slow
@pytest.mark.parametrize("code, status", [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(0)", 0)])
def test_the_launcher_adds_nothing_to_what_a_process_says(two_processes, code, status):
    code = f"import os, sys\nif os.environ['RANK'] == '1':\n    print('why', flush=True)\n    {code}\n"
    process = two_processes(code)
    assert process.communicate(timeout=120) == ("why\n", "") and process.returncode == status


@pytest.mark.slow
def test_what_run_sh_sends_stops_the_processes_of_the_launcher(two_processes):
    process = two_processes("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    assert [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2, "both have begun"
    process.terminate()
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 143


# ---- .venv -----------------------------------------------------------------------------------------------------------


def test_nothing_is_installed_twice(shell):
    assert shell("setup").returncode == 0 and len(shell.log("pip")) == 2
    assert all(" --no-user " in line for line in shell.log("pip"))  # pip.conf may say user = true
    shell("setup", PYTHON=None)
    shell("baseline")
    assert len(shell.log("pip")) == 2
    (shell.kit / "requirements.txt").write_text("numpy==2.4.6\n")
    shell("baseline")
    assert [Path(line).name for line in shell.log("pip")[2:]] == ["requirements.txt"]


def link_to_nothing(kit, tmp_path):
    shutil.rmtree(kit / ".venv")
    (kit / ".venv").symlink_to(tmp_path / "gone")


def upgrade(kit, tmp_path):
    write_interpreter(kit / ".venv" / "bin" / "python", "3 12 /usr")
    return {"PYTHON": None}


def age(kit, tmp_path):
    write_interpreter(kit / ".venv" / "bin" / "python", "3 9 /usr")


def take_pip(kit, tmp_path):
    path = kit / ".venv" / "bin" / "python"
    path.write_text(path.read_text().replace('pip") exit 0', 'pip") exit 1'))


def set_python(kit, tmp_path):
    return {"PYTHON": write_interpreter(tmp_path / "other", "3 13 /opt")}


@pytest.mark.parametrize("spoil", [link_to_nothing, upgrade, age, take_pip, set_python])
def test_a_venv_that_does_not_work_is_made_again(shell, tmp_path, spoil):
    shell("setup")
    settings = spoil(shell.kit, tmp_path) or {}
    done = shell("baseline", **{"PYTHON": tmp_path / "python", **settings})
    assert done.returncode == 0, done.stderr
    assert len(shell.log("pip")) == 4 and shell.log("scripts") == ["baseline.py"]


def test_half_a_venv_is_made_again(shell):
    first = shell("setup", VENV_CODE=1)
    assert first.returncode == 2 and "python3-venv" in first.stderr.splitlines()[-1]
    take_pip(shell.kit, None)
    assert shell("baseline").returncode == 0 and len(shell.log("pip")) == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"PYTHON": "no-such-python"}, ["no-such-python"]),
        ({"PYTHON": "OLD"}, ["3.11", "PYTHON"]),
        ({"PIP_CODE": 1}, ["PIP_INDEX_URL"]),
        ({"FROZEN": ""}, ["pip config list"]),  # target= in pip.conf
        ({"DATA_DIR": "nowhere"}, ["nowhere", "train.csv"]),
    ],
)
def test_what_stops_everything_is_one_line(shell, tmp_path, settings, words):
    write_interpreter(tmp_path / "old", "3 9 /usr")
    settings = {name: str(tmp_path / "old") if value == "OLD" else value for name, value in settings.items()}
    done = shell(**settings)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("run.sh: ") and all(word in last for word in words)
    assert not shell.log("scripts")


def test_models_that_cannot_be_installed_cost_no_stage(shell):
    pip = INTERPRETER.replace("exit ${PIP_CODE:-0}", 'case "$*" in */requirements-models.txt) exit 1 ;; esac; exit 0')
    shell.folder.with_name("python").write_text(pip)
    done = shell()
    assert done.returncode == 1 and shell.log("scripts") == CHAIN and "FAILED: setup." in done.stderr


def test_the_scripts_find_common_without_their_folder(shell, monkeypatch):
    """PYTHONSAFEPATH=1 .venv/bin/python baseline.py: a .pth file leads to the kit, in whatever folder .venv is seen."""
    shell("setup")
    (shell.kit / "link").mkdir()
    (shell.kit / "link" / ".venv").symlink_to(shell.kit / ".venv")
    monkeypatch.setattr(sys, "path", [])
    for folder in (shell.kit, shell.kit / "link"):
        site.addsitedir(str(folder / ".venv" / "lib" / "python3.11" / "site-packages"))
        assert sys.path[-1] == str(folder)


# ---- surroundings ----------------------------------------------------------------------------------------------------

LEFT = ["PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH", "PIP_USER", "PIP_TARGET", "RANK", "WORLD_SIZE", "LOCAL_RANK"]
LEFT += ["MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "OMPI_COMM_WORLD_RANK"]


def test_what_a_shell_or_a_cluster_left_behind(shell):
    done = shell("setup", PIP_INDEX_URL="http://mirror", HF_ENDPOINT="http://hub", **dict.fromkeys(LEFT, "1"))
    names = {line.split("=")[0] for line in shell.log("env")}
    assert done.returncode == 0 and not names & set(LEFT) and names >= {"PIP_INDEX_URL", "HF_ENDPOINT"}


def test_cdpath(shell):
    (shell.folder.with_name("elsewhere") / "link").symlink_to(shell.kit)
    done = shell("baseline", path="link/run.sh", CDPATH=".:/tmp")
    assert done.returncode == 0 and shell.log("scripts") == ["baseline.py"]


def test_a_clone_with_windows_line_ends(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true"]
    for path in [KIT / "run.sh", *KIT.glob("lib/*.sh"), KIT / ".gitattributes", KIT / ".ci" / "run"]:
        (tmp_path / "kit" / path.relative_to(KIT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "kit" / path.relative_to(KIT))
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=tmp_path / "kit", check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*git, "clone", "-q", "kit", "clone"], cwd=tmp_path, check=True)
    for path in ("run.sh", "lib/setup.sh", "lib/stages.sh", ".ci/run"):
        assert b"\r" not in (tmp_path / "clone" / path).read_bytes()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    files = ["run.sh", ".ci/run", "lib/setup.sh", "lib/stages.sh"]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=KIT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- what a script prints --------------------------------------------------------------------------------------------

PRINTS = """
import os
from lib import cli
cli.run_script(lambda: (cli.log("a line"), print("± 中", os.open("run.sh", 0) > 2, flush=True)))
"""


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_output_that_is_not_utf_8(encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINTS], cwd=KIT, env=env, capture_output=True)
    shown = "± 中".encode(encoding, "replace")
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, shown + b" True", b"a line")


@pytest.mark.parametrize("closed, shown", [("2>&-", "± 中 True\n"), (">&-", ""), ("<&- >&- 2>&-", "")])
def test_closed_streams(closed, shown):
    command = ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, PRINTS]
    done = subprocess.run(command, cwd=KIT, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, shown)

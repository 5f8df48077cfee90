"""What a script prints, and where it can't."""

import os
import subprocess
import sys

from conftest import KIT
from lib import cli

import pytest

PRINTS = """
import os
from lib import cli
cli.run_script(lambda: (cli.log("a line"), print("± 中", os.open("run.sh", 0) > 2)))
"""


@pytest.mark.parametrize(
    "streams, code, shown, said",
    [
        ("2>&-", 0, "± 中 True\n", ""),  # a file that is opened doesn't become stderr
        (">&-", 0, "", "a line\n"),
        ("<&- >&- 2>&-", 0, "", ""),
        (">/dev/full", 2, "", "a line\n-c: input/output: No space left on device\n"),
    ],
)
def test_streams_that_take_nothing(streams, code, shown, said):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["bash", "-c", f'"$0" -c "$1" {streams}', sys.executable, PRINTS]
    done = subprocess.run(command, cwd=KIT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, shown, said)


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_output_that_is_not_utf_8(encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINTS], cwd=KIT, env=env, capture_output=True)
    shown = "± 中".encode(encoding, "replace")
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, shown + b" True", b"a line")


LOOK = """
import os, sys
class Look:
    def find_spec(self, name, *more):
        if name in ("torch", "sklearn", "matplotlib", "huggingface_hub"):
            print(*map(os.environ.get, ("GOMP_SPINCOUNT", "MPLBACKEND", "HF_HUB_DISABLE_XET")), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Look())
__import__(sys.argv[1])
"""


@pytest.mark.parametrize("script", ["baseline", "lora_predict"])
def test_settings_come_before_the_libraries_that_read_them(script):
    """Before the first of them is loaded. The order of imports in pyproject.toml sees to it. What the user has set
    stays, but a notebook's backend.
    """
    env = os.environ | {"GOMP_SPINCOUNT": "7", "MPLBACKEND": "module://x", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", LOOK, script], cwd=KIT, env=env, capture_output=True, text=True)
    assert done.stdout == "7 svg 1\n", done.stderr


def test_a_notebook_prints_on_after_a_refusal():
    script = "from lib import cli\ntry: cli.run_script(lambda: cli.Parser().parse_args(['x']))\n"
    script += "except SystemExit: print('still here')"
    done = subprocess.run([sys.executable, "-c", script], cwd=KIT, capture_output=True, text=True)
    assert done.stdout == "still here\n" and "unrecognized" in done.stderr


def test_a_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("OUT_DIR", "~/out")
    args = cli.arg_parser("", "test").parse_args(["--test", "~/t.csv"])
    assert (str(args.test), str(args.out_dir)) == ("/home/ann/t.csv", "/home/ann/out")


def test_zipped_downloads_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setattr(cli, "KIT", tmp_path)
    assert cli.data_file("train.csv") == tmp_path / "data" / "sample" / "train.csv"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv.part").touch()  # a download that isn't finished
    assert cli.data_file("train.csv") == tmp_path / "data" / "sample" / "train.csv"
    for name in ("train.csv.zip", "test.csv.zip", "test_labels.csv"):
        (tmp_path / "data" / name).touch()
    assert [cli.data_file(name).name for name in ("train.csv", "test.csv")] == ["train.csv.zip", "test.csv.zip"]

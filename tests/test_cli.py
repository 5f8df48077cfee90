"""What a script prints, and where it can't."""

import os
import subprocess
import sys

import pytest
from conftest import KIT

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

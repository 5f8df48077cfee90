"""lib/launch.py with two processes, on a CPU."""

import os
import signal
import subprocess
import sys

from conftest import KIT

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def two_processes(tmp_path):
    """Start the launcher with a script of two processes. Returns the Popen."""

    def start(code):
        (tmp_path / "script.py").write_text(code)
        launch = "import sys; from lib.launch import launch; sys.exit(launch(2, [sys.argv[1]]))"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen([sys.executable, "-c", launch, tmp_path / "script.py"], cwd=KIT, **pipes)

    return start


@pytest.mark.parametrize("code, status", [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(0)", 0)])
def test_the_launcher_adds_nothing_to_what_a_process_says(two_processes, code, status):
    code = f"import os, sys\nif os.environ['RANK'] == '1':\n    print('why', flush=True)\n    {code}\n"
    process = two_processes(code)
    assert process.communicate(timeout=120) == ("why\n", "") and process.returncode == status


def test_ctrl_c_stops_the_processes_of_the_launcher(two_processes):
    code = "import sys, time\nsys.excepthook = print\nprint('.', end='', flush=True)\ntime.sleep(600)\n"
    process = two_processes(code)
    assert process.stdout.read(2) == "..", "both have begun"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 130

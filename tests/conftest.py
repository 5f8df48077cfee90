import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import common

KIT = Path(__file__).resolve().parent.parent
SAMPLE = KIT / "data" / "sample"


@pytest.fixture
def kit(tmp_path, monkeypatch, capsys):
    """Run a script of the kit in tmp_path as a user does, but in this process, which saves the seconds of the imports.
    Returns an object with returncode, stdout and stderr, like subprocess.run."""

    def run(script, *flags, **env):
        monkeypatch.chdir(tmp_path)
        env = {"OUT_DIR": tmp_path / "outputs", "DATA_DIR": SAMPLE, **env}
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            common.run_script(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, out, err)

    return run


@pytest.fixture
def refused(kit, tmp_path):
    """Run a script that must refuse its input: exit code 2, one line that holds all of `words`, nothing written."""

    def run(*command, words, **env):
        before = sorted(tmp_path.rglob("*"))
        done = kit(*command, **env)
        assert done.returncode == 2, done.stderr
        faults = [line for line in done.stderr.splitlines() if line.startswith(f"{command[0]}: ")]
        assert len(faults) == 1 and all(word in faults[0] for word in words), done.stderr
        assert "Traceback" not in done.stderr and not done.stdout
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def write_csv(tmp_path):
    def write(name, rows, encoding="utf-8", newline="\n", **options):
        with open(tmp_path / name, "w", encoding=encoding, newline="") as file:
            csv.writer(file, lineterminator=newline, **options).writerows(rows)
        return tmp_path / name

    return write

import errno
import os
import threading

from lib import files
from lib.cli import InputError

import pytest


def put(path, text):
    """Write `text` to a file; if `path` has no suffix, to a file in a folder."""
    with files.atomic_write(path) as part:
        if path.suffix:
            return part.write_text(text)
        part.mkdir()
        (part / text).write_text(text)


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_a_write_replaces_all_or_nothing(tmp_path, name):
    path = tmp_path / "new" / name
    read = path.read_text if path.suffix else lambda: os.listdir(path)[0]
    for text in ("old", "newer"):
        put(path, text)
        assert read() == text
        with pytest.raises(RuntimeError), files.atomic_write(path) as part:
            part.write_text("half") if path.suffix else part.mkdir()
            raise RuntimeError
        assert read() == text and os.listdir(path.parent) == [name]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    put(tmp_path / "folder", "mine")
    with pytest.raises(OSError), files.atomic_write(tmp_path / "folder") as part:
        part.write_text("a file")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["mine"]


def test_of_a_link_the_target_is_replaced(tmp_path):
    put(tmp_path / "disk" / "a.txt", "old")
    (tmp_path / "link.txt").symlink_to("disk/a.txt")
    put(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "disk" / "a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "disk", "link.txt"]


def test_a_pipe_is_written_to(tmp_path):
    pipe, read = tmp_path / "pipe.txt", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    put(pipe, "all of it")
    reader.join(10)
    assert read == ["all of it"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe.txt"]


@pytest.mark.parametrize("content", ["", "{", "[" * 5000, "5", "[]", '{"papers": 5, "fields": []}', '{"papers": {}}'])
def test_damaged_json_is_refused(tmp_path, content):
    path = tmp_path / "metrics.json"
    assert files.read_json(path, papers=dict, fields=list) == {}
    path.write_text(content)
    with pytest.raises(InputError, match="metrics.json is damaged"):
        files.read_json(path, papers=dict, fields=list)


# ---- the lock --------------------------------------------------------------------------------------------------------


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    folder = tmp_path / "outputs" / "bert"
    with files.locked(folder):
        with pytest.raises(InputError, match="bert is in use by another run"), files.locked(folder):
            pass
    with files.locked(folder):  # a lock that was left does not block
        pass


def test_what_a_kill_between_two_renames_left_is_put_back(tmp_path):
    for name in ("fold1/.best.123.old", "fold2/.best.123.old", "fold2/best", ".test.csv.7.part"):
        put(tmp_path / name / "x.txt", name)
    with files.locked(tmp_path):
        assert (tmp_path / "fold1" / "best" / "x.txt").read_text() == "fold1/.best.123.old"
        assert (tmp_path / "fold2" / "best" / "x.txt").read_text() == "fold2/best"
        assert not list(tmp_path.rglob(".*.*"))


def test_a_file_system_without_locks_is_said_and_goes_on(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    with files.locked(tmp_path / "model"):
        files.write_json(tmp_path / "model" / "a.json", {})
    assert "no file locks" in capsys.readouterr().err and (tmp_path / "model" / "a.json").is_file()


def test_what_is_synced_is_open_for_writing(tmp_path, monkeypatch):
    """Windows refuses the other."""
    fcntl, modes = pytest.importorskip("fcntl"), []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    files.write_json(tmp_path / "a.json", {})
    assert modes == [os.O_RDWR]

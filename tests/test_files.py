import errno
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from behrt_jax import files as module
from behrt_jax.errors import InputError
from behrt_jax.files import (
    check_room,
    check_writable,
    locked,
    new_file,
    remove_leftovers,
    resolved,
    work_folder,
)


def test_a_folder_is_removed_whatever_happens(tmp_path):
    with pytest.raises(KeyError), work_folder(tmp_path, "making-out") as folder:
        (folder / "part").write_text("half")
        assert folder.name.startswith(".making-out.")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(module.platform, "node", lambda: "host.of[me]")
    names = {
        ".making-o[u]t.host-of-me-.abc": False,
        ".making-o[u]t.another.abc": True,  # cannot be known
        ".making-out.host-of-me-.abc": True,  # of another output
    }
    for name in names:
        (tmp_path / name / "prepared").mkdir(parents=True)
    with (
        work_folder(tmp_path, "making-o[u]t"),
        pytest.raises(InputError, match="another process works there"),
        work_folder(tmp_path, "making-o[u]t"),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


HOLDER = """
import sys, time
from pathlib import Path
from behrt_jax.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_says_who_holds_it_and_dies_with_its_process(tmp_path):
    lock = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match=rf"{holder.pid} on .*, since 20\d\d-") as caught, locked(lock):
            pass
        assert str(lock) in str(caught.value)
        holder.send_signal(signal.SIGKILL)
    assert lock.exists()  # stale
    with locked(lock):
        assert json.loads(lock.read_text())["process"] == os.getpid()
    assert not lock.exists()


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_without_locks_of_the_file_system_the_record_decides(tmp_path, monkeypatch, dead):
    monkeypatch.setattr(module, "_flock", lambda descriptor: None)
    lock, here = tmp_path / ".lock", module.platform.node()
    for process, host, free in ((dead, here, True), (os.getpid(), here, False), (dead, "another", False)):
        lock.write_text(json.dumps({"process": process, "host": host, "since": "yesterday"}))
        if free:
            with locked(lock):
                pass
        else:
            with pytest.raises(InputError, match="another process works there"), locked(lock):
                pass


def test_a_lock_file_that_its_holder_removed_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """Its holder ends between the opening of the file and the lock: another process may have a new one."""
    lock, original = tmp_path / ".lock", module._flock
    lock.touch()

    def slow(descriptor):
        monkeypatch.setattr(module, "_flock", original)
        lock.unlink()
        return original(descriptor)

    monkeypatch.setattr(module, "_flock", slow)
    with locked(lock), pytest.raises(InputError), locked(lock):
        pass


def test_what_dead_processes_left_is_removed_or_put_back(tmp_path):
    for name in (".report.html.31430.tmp", ".a.tmp", "b.1.tmp"):
        (tmp_path / name).touch()
    for name in (".adapter.new-12", ".adapter.old-12", ".bank.old-3", "bank"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "another.html")
    assert len(list(tmp_path.iterdir())) == 7
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".a.tmp", "b.1.tmp", "adapter", "bank"}


def test_a_new_file_is_made_by_one_process_and_never_over_another(tmp_path):
    path = tmp_path / "below" / "scores[*]$.parquet"
    with new_file(path) as temporary:
        temporary.write_text("whole")
        with pytest.raises(InputError, match="another process"), new_file(path):
            pass
    with pytest.raises(InputError, match="is there already"), new_file(path):
        pass
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_path_is_absolute_without_tilde_dots_and_links_above_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    (tmp_path / "table.csv").symlink_to("blob")
    for given, expected in {
        "~/x": "home/x", "a/../b": "b", "link/../x": "deep/x", "link/..": "deep", "table.csv": "table.csv",
        ".": "", "no [such]*\n$": "no [such]*\n$",
    }.items():  # fmt: skip
        assert resolved(Path(given)) == tmp_path / expected, given
    (tmp_path / "circle").symlink_to("circle")
    for wrong in ("~nobody-of-this-name/x", "circle/x"):
        with pytest.raises(InputError, match="leads nowhere"):
            resolved(Path(wrong))


def test_outputs_are_tried_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "run", "--output")
    check_writable(tmp_path, "--output")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is a file, not a folder. Give another --to_meds"):
        check_writable(tmp_path / "file" / "below" / "out", "--to_meds")
    with pytest.raises(InputError, match="cannot write /proc/out"):
        check_writable(Path("/proc/out"), "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        check_writable(tmp_path / "run", "--output")


def test_room_on_the_disk_is_told_before_it_is_needed(tmp_path, monkeypatch):
    check_room(tmp_path, 1, "a line")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: namedtuple("U", "free")(3 * 2**20))
    check_room(tmp_path, 2 * 2**20, "a checkpoint")
    with pytest.raises(OSError, match=r"a checkpoint takes up to 3\.1 MB, 3\.1 MB are free") as caught:
        check_room(tmp_path, 2 * 2**20 + 1, "a checkpoint")
    assert caught.value.errno == errno.ENOSPC

"""Whatever ends a command is one line, a status, and, where nobody foresaw it, a file with the traceback."""

import errno
import os
import stat
import tempfile
from pathlib import Path

import jax
import pytest

from behrt_jax.errors import NO_ROOM, UNFORESEEN, DivergenceError, InputError, explain

OUTPUT = Path("/runs/a")


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.fixture(autouse=True)
def tracebacks(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("error", "status", "parts"),
    [
        (InputError("--x is wrong"), 2, ["--x is wrong"]),
        (DivergenceError("Loss nan"), 1, ["Loss nan"]),
        (KeyboardInterrupt(), 130, ["SIGINT"]),
        (OSError(errno.ENOSPC, "No space left on device", "/big/file"), NO_ROOM, ["/big/file", "--resume"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), NO_ROOM, ["no space left for /runs/a"]),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device"), NO_ROOM, ["no space left for /runs/a"]),
        (MemoryError("Unable to allocate 3 TiB"), NO_ROOM, ["memory ran out", "3 TiB", "train.batch_size"]),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), NO_ROOM,
         ["memory ran out", "train.micro_batches"]),
    ],
)  # fmt: skip
def test_what_is_foreseen_is_told_with_its_mend(error, status, parts, tracebacks):
    for one in (raised(error), raised(RuntimeError("in a thread"), raised(error))):
        line, found = explain(one, OUTPUT)
        if one.__cause__ is None or status == NO_ROOM:
            assert found == status and all(part in line for part in parts), line
            assert "\n" not in line
            assert not list(tracebacks.iterdir())


def test_the_rest_is_a_place_and_a_file_for_the_user_alone(tracebacks):
    line, status = explain(raised(KeyError("subject 4711")), OUTPUT)
    assert status == UNFORESEEN
    (file,) = tracebacks.iterdir()
    assert line.startswith("KeyError at test_errors.py:") and str(file) in line
    assert "4711" not in line  # a library's words may be a patient's
    assert "subject 4711" in file.read_text() and "Traceback" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_words_of_the_system_are_shown(tracebacks):
    line, status = explain(raised(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/b")), OUTPUT)
    assert status == UNFORESEEN and "Permission denied: '/a/b'" in line


def test_where_no_file_can_be_written_the_line_stands_alone(tracebacks, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tracebacks / "gone"))
    line, status = explain(raised(KeyError("x")), None)
    assert status == UNFORESEEN and "could not be written" in line

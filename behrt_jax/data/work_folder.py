"""Temporary folders beside an output, recognised and removed where a process died without doing so."""

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def work_folder(beside: Path, purpose: str) -> Iterator[Path]:
    """A new hidden folder, removed in the end, whatever happens; those of dead processes are removed first.

    A process that is killed leaves its folder behind. The name tells purpose, machine and process, so that
    the next one for the same purpose on that machine can tell that it is not in use; folders of other
    machines are left alone.

    Args:
        beside: folder to make it in.
        purpose: such as ``preparing-NAME``.
    """
    prefix = f".{purpose}.{re.sub('[^A-Za-z0-9]', '-', platform.node())}."
    for left in beside.glob(f"{_literal(prefix)}*"):
        process = left.name.removeprefix(prefix).split(".")[0]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}.", dir=beside) as folder:
        yield Path(folder)


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere the question itself may end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True

"""Errors of what a user gives, of a training, of the machine, and what a command says of each."""

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

NO_ROOM, UNFORESEEN, PEER_LOST = 3, 70, 75
"""Exit statuses: space or memory ran out; an error that nobody foresaw (EX_SOFTWARE of sysexits.h); another
process of the run has ended (EX_TEMPFAIL: start it again)."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors where a file finds no room: disk full, quota, largest size of a file."""


class InputError(ValueError):
    """A configuration, a file or an option is wrong.

    The message names the file, row, field or option at fault and how to mend it. Commands print it
    as one line and exit with status 2; library users catch it as a ``ValueError``.
    """


class DivergenceError(RuntimeError):
    """The training loss or gradient is no longer finite. Commands exit with status 1."""


def explain(error: BaseException, output: Path | None) -> tuple[str, int]:
    """One line for the user, and the exit status, where a command ends in this error.

    What is not foreseen here is written, as a traceback, to a file that only the user can read, and the line
    names it: messages of libraries may quote records of patients, and logs are read by others.

    Args:
        error: that ended the command.
        output: what the command was to write, where that is known.
    """
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, DivergenceError):
        return str(error), 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by SIGINT: what was written before is kept.", 130
    chain = list(_chain(error))
    for one in chain:
        if _finds_no_space(one):
            named = [name for other in chain if (name := getattr(other, "filename", None))]
            return no_space(Path(os.fsdecode(named[0])) if named else output, one), NO_ROOM
    for one in chain:
        if isinstance(one, MemoryError) or "RESOURCE_EXHAUSTED" in str(one):
            return (
                f"memory ran out ({_first_line(one)}): give it less at once (train.batch_size, rows; "
                "train.micro_batches cuts a batch into parts) or more of it; a run goes on with --resume.",
                NO_ROOM,
            )
        if _frame(one).filename.endswith("xla_bridge.py"):  # of JAX, where it starts its devices
            platforms = os.environ.get("JAX_PLATFORMS")
            named = f"JAX_PLATFORMS is {platforms}" if platforms else "JAX_PLATFORMS is not set"
            return (
                f"JAX cannot start the devices it is told to use ({named}; {_first_line(one)}): set "
                "JAX_PLATFORMS to what is there, such as cpu, or unset it.",
                2,
            )
    frame = _frame(error)
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    said = f" ({_first_line(error)})" if isinstance(error, OSError) else ""
    return f"{type(error).__name__} at {place}{said}, not foreseen{_traceback_file(error)}", UNFORESEEN


def no_space(path: Path | None, error: BaseException) -> str:
    """The line that says where there is no room for a file."""
    where = "" if path is None else f" for {path}"
    return (
        f"there is no space left{where} ({_first_line(error)}): free some, or give a place on another disk. "
        "A training run goes on from its last checkpoint with --resume."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]


def _finds_no_space(error: BaseException) -> bool:
    # Libraries that write by themselves have the system's words alone.
    return getattr(error, "errno", None) in NO_SPACE or any(os.strerror(n) in str(error) for n in NO_SPACE)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _frame(error: BaseException) -> traceback.FrameSummary:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1] if frames else traceback.FrameSummary("unknown", 0, "")


def _traceback_file(error: BaseException) -> str:
    """Write the traceback to a new file; the end of a sentence that says where."""
    lines = [f"{' '.join(sys.argv)}\n\n", *traceback.format_exception(error)]
    try:
        number, name = tempfile.mkstemp(prefix="behrt-jax-error-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError as failed:
        return f"; its traceback could not be written ({_first_line(failed)})."
    return f": the traceback is in {name}. It may quote your data: look before you pass it on."

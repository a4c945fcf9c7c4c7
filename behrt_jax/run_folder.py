"""The files of a run folder: made once, written whole, readable after an interruption.

::

    config.json     the resolved configuration, versions, devices, data fingerprint
    parameters.json counts of parameters, total and trainable, by group
    metrics.jsonl   one JSON object a line, append only
    summary.json    best and last figures; SUMMARY.txt is the same for a person
    checkpoints/    adapter/    plots/    vocabulary.parquet    report.html

Everything is strict JSON: a number that is not finite is written as ``null``.
"""

import json
import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, TypeGuard

from behrt_jax.errors import InputError
from behrt_jax.files import (
    JsonObject,
    json_text,
    leftover_of,
    locked,
    read_json,
    remove_leftovers,
    write_text,
)

Records: TypeAlias = Sequence[JsonObject]
"""Records of metrics.jsonl, in the order written."""

CONFIG_FILE = "config.json"
PARAMETERS_FILE = "parameters.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
SUMMARY_TEXT_FILE = "SUMMARY.txt"
CHECKPOINTS_FOLDER = "checkpoints"
PLOTS_FOLDER = "plots"
REPORT_FILE = "report.html"

VOCABULARY_FILE = "vocabulary.parquet"
LOCK_FILE = ".lock"

LOCK_FILE = ".lock"

_SIGNS_OF_A_RUN = (CONFIG_FILE, METRICS_FILE, CHECKPOINTS_FOLDER)
_BEFORE_CONFIG = ("vocabulary.parquet", PARAMETERS_FILE)
"""What a run writes before its config.json."""


@contextmanager
def open_run_folder(path: Path, resume: bool, alone: bool = True) -> Iterator[Path]:
    """The run folder of :func:`prepare_run_folder`, locked until this ends; one that stays empty is removed.

    Args:
        path: of the folder.
        resume: whether to go on with the run that is there.
        alone: False in a process that shares the run with one that holds the lock.

    Raises:
        InputError: as :func:`prepare_run_folder`; or another process trains there.
    """
    folder = path.expanduser().resolve()
    with ExitStack() as stack:
        if not resume and not folder.exists():
            _make(folder)
            stack.callback(_remove_if_empty, folder)
        if alone and folder.is_dir():
            stack.enter_context(locked(folder / LOCK_FILE))
        yield prepare_run_folder(folder, resume)


def prepare_run_folder(path: Path, resume: bool) -> Path:
    """Make the run folder, or with `resume` find the one that is there; returns its absolute path.

    What a dead process left half-written in a run's folder is removed. Where it died before config.json
    stood there is no run yet: the folder is emptied, with `resume` too.

    Raises:
        InputError: the folder holds another run or other files and `resume` is off; `resume` is on
            and no run is there; or the folder cannot be made.
    """
    folder = path.expanduser().resolve()
    if not resume:
        if any((folder / name).exists() for name in _SIGNS_OF_A_RUN):
            raise InputError(
                f"{folder} holds a run already: add --resume to go on with it, or give another --output."
            )
        _make(folder)
    if (folder / CONFIG_FILE).is_file():
        for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
            if place.name != CHECKPOINTS_FOLDER:
                remove_leftovers(place)
        return folder
    found = {entry.name for entry in folder.iterdir()} - {LOCK_FILE} if folder.is_dir() else set()
    begun = {name for name in found if leftover_of(name) or name in _BEFORE_CONFIG}
    if found - begun and not resume:
        raise InputError(f"{folder} holds other files: give an --output that is new or empty.")
    if resume and (found - begun or not begun):
        raise InputError(
            f"{folder} holds no run to go on with ({CONFIG_FILE} is not there): give the --output of "
            "an earlier run, or leave out --resume to start a new one."
        )
    for name in begun:
        (folder / name).unlink()
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the run folder {folder} ({error.strerror}): give another --output."
        ) from error


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def shown_files(folder: Path) -> list[str]:
    """Names of what the folder holds, without hidden files."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def read_config(folder: Path) -> JsonObject:
    """The config.json of a run; its ``settings`` and ``data`` are objects.

    Raises:
        InputError: it is missing, or is not what a run writes.
    """
    record = read_json(folder / CONFIG_FILE)
    if not (isinstance(record, dict) and all(isinstance(record.get(n), dict) for n in ("settings", "data"))):
        raise InputError(
            f"{folder / CONFIG_FILE} is not as a run writes it (settings or data are not there): bring the "
            "run's own back, or give another run."
        )
    return record


def append_metrics(path: Path, record: JsonObject) -> None:
    """Add one record, as one whole line, and hand it to the operating system at once."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json_text(record))
        file.flush()


def read_metrics(path: Path) -> list[JsonObject]:
    """All records, in the order written; none where the file does not exist yet.

    A last line without its newline is what an interrupted writer leaves: it is taken if it is whole
    and left out if it is not.

    Raises:
        InputError: any other line is not a JSON object with an integer ``step``.
    """
    if not path.exists():
        return []
    # A line that was written whole ends with a newline, so the last piece is empty, or torn.
    *lines, rest = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            raise InputError(f"{path}, line {number}, is not a metrics record: delete that line.")
        records.append(record)
    last = _record(rest)
    return records if last is None else [*records, last]


def of_split(records: Records, split: str) -> list[JsonObject]:
    """Records of one split: ``train`` or ``tuning``, which are the validations."""
    return [record for record in records if record.get("split") == split]


def is_number(figure: object) -> TypeGuard[float]:
    """True of a figure of a record that is known: a number, and finite."""
    return isinstance(figure, numbers.Real) and math.isfinite(figure)


def truncate_metrics(path: Path, step: int) -> int:
    """Drop the records past `step`, and a torn last line, so that a run resumed there has each step once.

    Returns the number of records dropped (a torn line is no record). The file is rewritten whole or
    not at all; a missing file stays missing.

    Raises:
        InputError: as :func:`read_metrics`.
    """
    if not path.exists():
        return 0
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= step]
    write_text(path, "".join(map(json_text, kept)))
    return len(records) - len(kept)


def _record(line: bytes) -> JsonObject | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None

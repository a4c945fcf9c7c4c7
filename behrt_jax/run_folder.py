"""The files of a run folder: made once, written whole, readable after an interruption.

::

    config.json     the resolved configuration, versions, devices, data fingerprint
    parameters.json counts of parameters, total and trainable, by group
    metrics.jsonl   one JSON object a line, append only
    summary.json    best and last figures; SUMMARY.txt is the same for a person
    checkpoints/    adapter/    plots/    vocabulary.parquet    preparation.json    report.html
    files.json      size and SHA-256 of each of these files that is read again, and of itself

Everything is strict JSON: a number that is not finite is written as ``null``. Checkpoints and adapters have
digests of their own in their folders.
"""

import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, TypeGuard

from behrt_jax.errors import InputError
from behrt_jax.files import (
    JsonObject,
    check_files,
    digest_of,
    is_record,
    json_text,
    leftover_of,
    locked,
    read_json,
    remove_leftovers,
    resolved,
    say_unrecorded,
    sealed,
    write_bytes,
    write_json,
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
PREPARATION_FILE = "preparation.json"
"""Rules by which the data were prepared, beside the vocabulary; of an adapter too: see `data.prepared`."""
FILES_FILE = "files.json"
LOCK_FILE = ".lock"

_SIGNS_OF_A_RUN = (CONFIG_FILE, METRICS_FILE, CHECKPOINTS_FOLDER)
_BEFORE_CONFIG = (VOCABULARY_FILE, PREPARATION_FILE, PARAMETERS_FILE, FILES_FILE)
"""What a run writes before its config.json."""


@contextmanager
def open_run_folder(path: Path, resume: bool) -> Iterator[Path]:
    """The run folder of :func:`prepare_run_folder`, locked until this ends; one that stays empty is removed.

    Args:
        path: of the folder.
        resume: whether to go on with the run that is there.

    Raises:
        InputError: as :func:`prepare_run_folder`; or another process trains there.
    """
    folder = resolved(path).resolve()
    with ExitStack() as stack:
        if not resume and not folder.exists():
            _make(folder)
            stack.callback(_remove_if_empty, folder)
        if folder.is_dir():
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
    folder = resolved(path).resolve()
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
    record = read_json(checked(folder, CONFIG_FILE))
    if not (isinstance(record, dict) and all(isinstance(record.get(n), dict) for n in ("settings", "data"))):
        raise InputError(
            f"{folder / CONFIG_FILE} is not as a run writes it (settings or data are not there): bring the "
            "run's own back, or give another run."
        )
    return record


# The digests of a run's files. While a file is replaced its record allows the old state and the new, so that
# a run that is killed in between can be read.

_MEND = "bring the file back from a copy, or train the run again."
_States: TypeAlias = Sequence[JsonObject | None]
"""What a file may be, as `files.digest_of` has it; None: not there. Of metrics.jsonl its beginning."""


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a run, each whole or not at all and in this order, and record their digests.

    Raises:
        InputError: files.json is damaged.
    """
    record = _recorded(folder)
    if record is None:  # a new run, or one of an older version
        known = (file for file in folder.glob("*.*") if file.suffix in (".json", ".jsonl", ".parquet"))
        record = {file.name: [digest_of(file.read_bytes())] for file in known}
    new: dict[str, _States] = {name: [digest_of(content)] for name, content in contents.items()}
    either = {name: [*states, *record.get(name, [None])] for name, states in new.items()}
    write_json(folder / FILES_FILE, sealed({"files": record | either}))
    for name, content in contents.items():
        write_bytes(folder / name, content)
    write_json(folder / FILES_FILE, sealed({"files": record | new}))


def record_metrics(folder: Path) -> None:
    """Record what metrics.jsonl holds by now, to which later lines may be added."""
    path = folder / METRICS_FILE
    if path.exists():
        write_files(folder, {METRICS_FILE: path.read_bytes()})


def checked(folder: Path, name: str) -> Path:
    """The path of a file of a run, whose content was compared with its record; it may not be there.

    Raises:
        InputError: the file is missing or damaged, or the run has not written it.
    """
    record, path = _recorded(folder), folder / name
    if record is None:
        config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
        if isinstance(config, dict) and config.get("recorded"):
            raise InputError(f"{folder / FILES_FILE} is missing: {_MEND}")
        say_unrecorded(folder)
        return path
    problems = []
    for state in record.get(name, [None]):
        if state is not None:
            try:
                check_files(folder, {name: state}, _MEND)
                return path
            except InputError as error:
                problems.append(error)
        elif not path.exists():
            return path
        else:
            problems.append(InputError(f"{path} is not of this run, which has written none: remove it."))
    raise problems[0]


def read_document(folder: Path, name: str) -> JsonObject:
    """The object in a JSON file of a run, which must be there.

    Raises:
        InputError: as :func:`checked`, or the file holds no JSON object.
    """
    value = read_json(checked(folder, name))
    if not isinstance(value, dict):
        raise InputError(f"{folder / name} holds no JSON object: {_MEND}")
    return value


def _recorded(folder: Path) -> dict[str, _States] | None:
    """Name -> states of each file; None where there is no record."""
    path = folder / FILES_FILE
    if not path.exists():
        return None
    record = read_json(path)
    if not is_record(record):
        raise InputError(f"{path} is damaged (it is not what the run wrote): {_MEND}")
    return record["files"]


def append_metrics(path: Path, record: JsonObject) -> None:
    """Add one record, as one whole line, and hand it to the operating system at once."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json_text(record))
        file.flush()


def read_metrics(path: Path) -> list[JsonObject]:
    """All records, in the order written; none where the file does not exist yet. What files.json knows of
    them is compared.

    A last line without its newline is what an interrupted writer leaves: it is taken if it is whole
    and left out if it is not.

    Raises:
        InputError: any other line is not a JSON object with an integer ``step``; the file is gone or changed
            since it was recorded.
    """
    content = path.read_bytes() if path.exists() else None
    states = (_recorded(path.parent) or {}).get(path.name, [])
    if states and not any(
        content is None if state is None else digest_of((content or b"")[: state["bytes"]]) == state
        for state in states
    ):
        raise InputError(f"{path} is missing or damaged: {_MEND}")
    if content is None:
        return []
    # A line that was written whole ends with a newline, so the last piece is empty, or torn.
    *lines, rest = content.split(b"\n")
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
    not at all, and recorded; a missing file stays missing.

    Raises:
        InputError: as :func:`read_metrics`.
    """
    if not path.exists():
        return 0
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= step]
    write_files(path.parent, {path.name: "".join(map(json_text, kept)).encode()})
    return len(records) - len(kept)


def _record(line: bytes) -> JsonObject | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None

"""Files and folders: written whole, by one process at a time; found as data; JSON; digests of files."""

import dataclasses
import errno
import hashlib
import json
import logging
import math
import numbers
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, TypeVar

import numpy as np

from behrt_jax.errors import NO_SPACE, InputError

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"
"""Any value that a JSON file can hold."""
JsonObject: TypeAlias = dict[str, Any]
"""A JSON object as it is read or collected: its values are of mixed types, which whoever takes one knows."""
C = TypeVar("C")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, which replaces ``path`` when the block ends, or is removed where the block fails.

    A reader sees the old content or the new, never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: replacing is atomic
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, and have it on the disk."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and have it on the disk."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def json_text(value: object, indent: int | None = None, escaped: bool = True) -> str:
    """`value` as JSON with a line end after it; equal input gives equal text.

    Takes what ``json`` takes, and dataclasses, paths, numpy scalars and arrays (device arrays too); a number
    that is not finite becomes ``null``, and keys stay in the order given. ``escaped``: in ASCII alone.

    Raises:
        TypeError: a value of another type.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=escaped) + "\n"


def write_json(path: Path, value: object, escaped: bool = True) -> None:
    """Write `value` as indented JSON, whole or not at all; arguments and errors of :func:`json_text`."""
    write_text(path, json_text(value, 2, escaped))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): mend it or write it anew.") from error


def from_stored(kind: type[C], values: Mapping[str, object]) -> C:
    """A record of this kind (a dataclass) from its JSON, which another version of behrt_jax may have written.

    What is not there has its default, and what this version does not know is passed over.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    read: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in known
    }
    return kind(**read)


def absolute(path: Path | None) -> str | None:
    """A path as JSON that is read in other folders says it."""
    return None if path is None else str(path.resolve())


def _plain(value: object) -> JSON:
    """`value` in the types of JSON."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind == "V":  # bfloat16: numpy has no type of its own for it
            array = array.astype(np.float64)
        if array.dtype.kind in "biufSU":
            return _plain(array.tolist())
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


# The files of a data set that somebody else has written.


def data_files(folder: Path, endings: tuple[str, ...] = (".parquet",)) -> list[Path]:
    """Every file of data below a folder, at any depth, in the order of its path.

    Left out is what lies below a name that begins with ``.`` or ``_``, which is no data (a notebook's
    checkpoints, what Spark has not finished, marks of success). Links to folders are followed, but never
    into a folder that holds them.

    Args:
        folder: the names of itself and of what holds it are its user's own.
        endings: of the names of files, in lower case; names are taken in any case.

    Raises:
        InputError: a folder cannot be read or is a table in versions (`refuse_versions`); a link leads
            nowhere.
    """
    found: list[Path] = []

    def search(folder: Path, above: tuple[Path, ...]) -> None:
        refuse_versions(folder)
        here = folder.resolve()
        if here in above:
            return
        for entry in folder.iterdir():
            wanted = entry.name.lower().endswith(endings)
            if is_hidden(entry):
                continue
            if entry.is_dir():
                search(entry, (*above, here))
            elif wanted and entry.is_file():
                found.append(entry)
            elif entry.is_symlink() and not entry.exists() and (wanted or not entry.suffix):
                raise InputError(f"{entry} is a link to what is not there: mend or remove it.")

    try:
        search(folder, ())
    except OSError as error:
        place = error.filename or folder
        raise InputError(f"{place} cannot be read ({error.strerror}): mend its permissions.") from error
    return sorted(found)


def is_hidden(path: Path) -> bool:
    """The name begins with ``.`` or ``_``: by the custom of Hadoop and Arrow, no data."""
    return path.name.startswith((".", "_"))


def refuse_versions(folder: Path) -> None:
    """Refuse a table of Delta Lake, Hudi or Iceberg: its folder holds files of earlier versions too, with
    rows that were changed or deleted since.

    Raises:
        InputError: with the export to make.
    """
    if (folder / "_delta_log").is_dir():
        kind, reader = "Delta Lake", "spark.read.format('delta').load(TABLE)"
    elif (folder / ".hoodie").is_dir():
        kind, reader = "Hudi", "spark.read.format('hudi').load(TABLE)"
    elif any((folder / "metadata").glob("*.metadata.json")):
        kind, reader = "Iceberg", "spark.read.format('iceberg').load(TABLE)"
    else:
        return
    raise InputError(
        f"{folder} is a table of {kind}, whose files hold earlier versions of its rows too: export "
        f"the current one as plain Parquet, such as by {reader}.write.parquet(FOLDER), and give that."
    )


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a folder beside ``folder``, then let it take that one's place."""
    folder = folder.absolute()
    fresh = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    older = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    fresh.mkdir(parents=True)
    try:
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        if folder.exists():
            folder.rename(older)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(older, ignore_errors=True)
        elif older.exists():
            older.rename(folder)


@contextmanager
def work_folder(beside: Path, purpose: str) -> Iterator[Path]:
    """A new hidden folder, removed in the end, whatever happens; those of dead processes are removed first.

    A process that is killed leaves its folder behind. The name tells purpose and machine; one process at a
    time may have one for a purpose, so that those of this machine that are there are in use no more. Folders
    of other machines are left alone.

    Args:
        beside: folder to make it in.
        purpose: such as ``preparing-NAME``.

    Raises:
        InputError: another process has one.
    """
    prefix = f".{purpose}.{re.sub('[^A-Za-z0-9]', '-', platform.node())}."
    with locked(beside / f".{purpose}.lock"):
        for left in beside.glob(f"{_literal(prefix)}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as folder:
            yield Path(folder)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """As :func:`written_whole`, of a file that takes long: its folder is made, and one process makes it.

    Raises:
        InputError: there is such a file, or another process makes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        if path.exists():
            raise InputError(f"{path} is there already: give another --output, or remove it.")
        remove_leftovers(path.parent, path.name)
        with written_whole(path) as temporary:
            yield temporary


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which says who holds it and is gone in the end.

    The kernel lets go of it when its process dies, in whatever container. Where a file system has no locks,
    what the file says decides: a process of this machine that is no more holds nothing.

    Raises:
        InputError: another process holds it.
    """
    descriptor = _take_lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take_lock(path: Path) -> int:
    """Descriptor of the lock file, which is locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken, holder = _flock(descriptor), _holder(descriptor)
            if taken is False or (taken is None and _may_live(holder)):
                who = "{process} on {host}, since {since}".format_map(holder) if holder else "that just began"
                raise InputError(
                    f"another process works there ({who}; {path}): wait for it, or give another --output."
                )
            # Who held it may have removed the file since it was opened: then it is another one by now.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    own = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json_text(own).encode(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _holder(descriptor: int) -> JsonObject:
    """Process, host and start of who took the lock; empty where that was not written yet."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return {name: found[name] for name in ("process", "host", "since")}
    except (ValueError, TypeError, KeyError):
        return {}


def _may_live(holder: JsonObject) -> bool:
    return bool(holder) and (holder["host"] != platform.node() or _alive(int(holder["process"])))


_LEFT = re.compile(r"\.(.+)\.(?:\d+\.tmp|(new|old)-\d+)", re.DOTALL)


def leftover_of(name: str) -> str | None:
    """Name of the file or folder that one of this name was to become; None where it is no such thing."""
    found = _LEFT.fullmatch(name)
    return found and found[1]


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Remove what dead processes left of files and folders that they were writing, whole or not at all.

    To be called under a lock: nobody else is at work here. A folder that was moved aside, and has no
    successor yet, gets its place back.

    Args:
        folder: to look in, not below.
        of: name of the file that was being written; all where not given.
    """
    for left in folder.iterdir():
        name = leftover_of(left.name)
        if name is None or of not in (None, name):
            continue
        if left.suffix == ".tmp":
            left.unlink(missing_ok=True)
        elif left.suffix.startswith(".old-") and not (folder / name).exists():
            left.rename(folder / name)
        else:
            shutil.rmtree(left, ignore_errors=True)


def resolved(path: Path) -> Path:
    """The path, absolute and without ``~`` and ``..``.

    Its last name stays as it is, a link or not: its ending tells what kind of file it is.

    Raises:
        InputError: ``~NAME`` of no user, links in a circle, an address such as ``gs://bucket/name``.
    """
    if address := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", str(path)):
        rest = str(path)[address.end() :]
        raise InputError(
            f"{address[1]}://{rest} is an address, not a path: data are mapped into memory, and folders are "
            "locked, so that both must be on a file system. Mount the bucket (gcsfuse, mount-s3), or copy it "
            "to a disk that all processes see."
        )
    try:
        path = path.expanduser()
        return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} leads nowhere ({error}): give another path.") from error


def check_new_folder(path: Path, option: str) -> None:
    """Raise InputError, which names the option, unless `path` is a folder without files or does not exist."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} holds other files: give an {option} that is new or empty.")


def check_writable(path: Path, option: str) -> None:
    """Try whether something can be written at `path`, which need not exist; leaves nothing behind.

    Raises:
        InputError: it is below a file, or in a folder that takes no files; names the option.
        OSError: the disk is full.
    """
    try:
        folder = next(place for place in (path, *path.parents) if place.exists())
        if folder == path and not path.is_dir():
            folder = path.parent
        if not folder.is_dir():
            raise InputError(f"cannot write {path}: {folder} is a file, not a folder. Give another {option}.")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise InputError(f"cannot write {path} ({error.strerror}): give another {option}.") from error


def check_room(folder: Path, needed: int, of: str) -> None:
    """Raise OSError unless the disk of `folder` has room for `needed` bytes; `of` says what they are of."""
    free, needed = shutil.disk_usage(folder).free, needed + 2**20  # for small files and ends of blocks
    if free < needed:
        words = f"{of} takes up to {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, words, str(folder))


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


# Sizes and SHA-256 of files, so that a damaged one is told from what was written.

SEAL = "sha256"
"""Entry of a sealed JSON object that holds the SHA-256 of its other entries."""
READ_THROUGH = 2 << 30
"""Bytes of files that are read through without being asked, some seconds' worth; of more, sizes tell."""

_logger = logging.getLogger(__name__)
_read_through: dict[Path, tuple[Any, ...]] = {}
"""File -> its state on disk when it was read through in this process, and the SHA-256 that it had."""


def sealed(value: JsonObject) -> JsonObject:
    """A JSON object with the SHA-256 of itself in it; arguments and errors of :func:`json_text`."""
    plain = json.loads(json_text(value))
    return plain | {SEAL: _seal(plain)}


def is_sealed(value: JsonObject) -> bool:
    """Tell whether an object, as it was read, is what :func:`sealed` made."""
    return value.get(SEAL) == _seal(value)


def is_record(value: object) -> TypeGuard[JsonObject]:
    """Tell whether this, as it was read, is a sealed record of files and nothing else: ``{"files": ...}``."""
    return isinstance(value, dict) and value.keys() == {"files", SEAL} and is_sealed(value)


def _seal(value: JsonObject) -> str:
    rest = {name: entry for name, entry in value.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest_of(content: bytes) -> JsonObject:
    """The record of a file with this content: its ``bytes`` and ``sha256``."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def digests_of(folder: Path) -> dict[str, JsonObject]:
    """Name below ``folder``, with slashes, -> record of each file in it, at any depth."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        found = pool.map(lambda file: {"bytes": file.stat().st_size, "sha256": _sha256(file)}, files)
        return {
            file.relative_to(folder).as_posix(): record for file, record in zip(files, found, strict=True)
        }


def check_files(
    folder: Path, records: Mapping[str, JsonObject], mend: str, at_most: int | None = READ_THROUGH
) -> None:
    """Check that files are those of their records: sizes at once, contents by threads, once in a process.

    Args:
        folder: that they are below.
        records: of :func:`digests_of`, all or some.
        mend: what to do where they are not, after a colon.
        at_most: bytes to read; where the files hold more, the largest are not read. None: read all.

    Raises:
        InputError: a file is missing, or is another than was written.
    """
    chosen = []
    for name, record in sorted(records.items(), key=lambda item: item[1]["bytes"]):
        file = folder / name
        try:
            found = file.stat()
        except OSError as error:
            raise InputError(f"{file} is missing or cannot be read ({error.strerror}): {mend}") from error
        if found.st_size != record["bytes"]:
            raise InputError(
                f"{file} is damaged, it has {found.st_size:,} bytes where {record['bytes']:,} were written: "
                f"{mend}"
            )
        state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, record["sha256"])
        if _read_through.get(file.absolute()) != state:
            chosen.append((file, state))
    if at_most is not None:
        held = np.cumsum([state[0] for _, state in chosen])
        chosen = chosen[: int(np.searchsorted(held, at_most, "right"))]

    def check(one: tuple[Path, tuple[Any, ...]]) -> None:
        file, state = one
        if _sha256(file) != state[-1]:
            raise InputError(f"{file} is damaged, its SHA-256 is not that of what was written: {mend}")
        if time.time_ns() - max(state[1:3]) > 1_000_000_000:  # or a change may have the same time
            _read_through[file.absolute()] = state

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, chosen))


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}).") from error


def say_unrecorded(folder: Path) -> None:
    """Log, once for each folder, that an older version wrote it without records of its files."""
    _say_unrecorded(folder.absolute())


@cache
def _say_unrecorded(folder: Path) -> None:
    _logger.warning("%s was written without digests of its files: damage to them is not noticed.", folder)

"""The folder of an adapter: replaced in one go, and its two files read back with all checks on them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from behrt_jax.errors import InputError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter.safetensors"
FORMAT_VERSION = 1


def import_safetensors() -> Any:
    """The module ``safetensors.numpy``; raises InputError, which names the package, where it is missing."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise InputError("adapter files need the package safetensors: pip install safetensors") from error
    return safetensors.numpy


def refuse_other_files(folder: Path) -> None:
    """Replacing a folder deletes what is in it: raise InputError unless this is an adapter's or absent."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the adapter")
    other = sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG_FILE, TENSOR_FILE))
    if other:
        raise InputError(f"{folder} holds {other[0]}, which is no adapter's; give a folder of its own")


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


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration; raises InputError where it is missing, damaged or of another format version."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; give the folder of an adapter") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged (not JSON); save the adapter again") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {version}; this version of behrt_jax reads {FORMAT_VERSION}"
        )
    for entry in ("vocabulary_fingerprint", "base_fingerprint", "tensors_sha256", "tensors"):
        if entry not in config:
            raise InputError(f"{path} has no entry {entry}; save the adapter again")
    return config


def read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All tensors, after a check against the table and the digest in the configuration.

    Raises:
        InputError: the file is missing or damaged, or safetensors is not installed.
    """
    path = folder / TENSOR_FILE
    deserialise = import_safetensors().load
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; copy the whole adapter folder") from error
    try:
        tensors = deserialise(data)
    except Exception as error:  # the reader's own error type, and others on garbage
        raise InputError(f"{path} is damaged (not a safetensors file); save the adapter again") from error
    table = config["tensors"]
    for key in sorted(table.keys() ^ tensors.keys()):
        state = "is missing" if key in table else f"is not in the table of {CONFIG_FILE}"
        raise InputError(f"{path}: tensor {key} {state}; save the adapter again")
    for key in sorted(table):
        check_shape(folder, key, tensors[key].shape, table[key])
    if hashlib.sha256(data).hexdigest() != config["tensors_sha256"]:
        raise InputError(f"{path} is damaged (its digest differs); save the adapter again")
    return {key: tensors[key] for key in sorted(tensors)}


def check_shape(folder: Path, key: str, found: Iterable[int], expected: Iterable[int]) -> None:
    """Raise InputError, which names the tensor, where two shapes differ."""
    if tuple(found) != tuple(expected):
        raise InputError(
            f"{folder}: tensor {key} has shape {list(found)} where {list(expected)} is expected; "
            "use the configuration that the adapter was trained with"
        )

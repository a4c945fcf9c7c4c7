"""The settings that a run is made with, and whether another start may go on with it."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from behrt_jax import __version__
from behrt_jax.config import FinetuneConfig, LoRAConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.tracking.run_folder import CONFIG_FILE, read_json
from behrt_jax.tracking.summary import flat

# A resumed run may differ in these: they say how long to train and where, not how.
FREE = (
    "output",
    "resume",
    "train.epochs",
    "train.max_steps",
    "train.patience",
    "train.data_on_device",
    "train.steps_per_call",
    "mesh.data",
    "mesh.fsdp",
    "data.path",
    "data",
    "labels",
    "init",
    "compilation_cache",
)


def default_folder(name: str) -> Path:
    """``runs/<name>-<time>`` in the working directory."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def run_record(
    config: PretrainConfig | FinetuneConfig,
    data: Mapping[str, Any],
    facts: Mapping[str, Any],
    baselines: Mapping[str, Any],
) -> dict[str, Any]:
    """Content of config.json: settings, versions, devices, what the data is (no events), and what the
    doctor goes by.
    """
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "settings": settings(config),
        "versions": {
            "behrt_jax": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "devices": [device.device_kind for device in jax.devices()],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "data": dict(data),
        "facts": dict(facts),
        "baselines": dict(baselines),
    }


def settings(config: Any) -> dict[str, Any]:
    """A configuration (a dataclass) as nested dicts, ready for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(asdict(config))


def check_same_run(folder: Path, config: PretrainConfig | FinetuneConfig, fingerprint: str) -> None:
    """Refuse to resume a run with settings or data other than its own.

    Raises:
        InputError: names the first setting that differs, with both values.
    """
    record = read_json(folder / CONFIG_FILE)
    completed = _completed(record["settings"], type(config))
    stored, given = (_comparable(value) for value in (completed, settings(config)))
    for name in sorted(stored.keys() | given.keys()):
        if stored.get(name) != given.get(name):
            raise InputError(
                f"--resume: {name} is {given.get(name)}, but the run in {folder} was made with "
                f"{stored.get(name)}: give the same settings (only {', '.join(FREE[2:])} may change)."
            )
    if record["data"]["fingerprint"] != fingerprint:
        raise InputError(
            f"--resume: the data, or its labels, differ from those of the run in {folder}: give the same, or "
            "start a new run with another --output."
        )


def _completed(stored: Mapping[str, Any], kind: type[PretrainConfig | FinetuneConfig]) -> dict[str, Any]:
    """Settings of a run, with the defaults of those that its version of behrt_jax did not have."""
    defaults = settings(kind(lora=LoRAConfig()))
    return {
        name: {**default, **stored[name]} if isinstance(stored.get(name), dict) else stored.get(name, default)
        for name, default in defaults.items()
    }


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    lists = {
        f"{section}.{name}": value
        for section, inner in values.items()
        if isinstance(inner, dict)
        for name, value in inner.items()
        if isinstance(value, list)
    }
    return {name: value for name, value in {**dict(flat(dict(values))), **lists}.items() if name not in FREE}

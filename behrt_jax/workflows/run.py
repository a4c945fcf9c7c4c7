"""The settings that a run is made with, and whether another start may go on with it."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from behrt_jax import __version__
from behrt_jax.adapters.files import AdapterConfig, save_adapter
from behrt_jax.config import FinetuneConfig, FreezingConfig, LoRAConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.files import read_json, write_json, write_text
from behrt_jax.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    PLOTS_FOLDER,
    SUMMARY_FILE,
    SUMMARY_TEXT_FILE,
    read_metrics,
)
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.plots import plot_curves
from behrt_jax.tracking.report import write_report
from behrt_jax.tracking.summary import Summary, flat, summarise, summary_text
from behrt_jax.training.checkpoints import Checkpoints
from behrt_jax.training.freezing import count_parameters
from behrt_jax.training.loop import Cursor
from behrt_jax.training.state import Setup, TaskSetup
from behrt_jax.training.step import TrainState, Variables
from behrt_jax.workflows.doctor import Examination

# Going on where a run stopped.


def restore_latest(checkpoints: Checkpoints, state: TrainState, console: Console) -> tuple[Any, Cursor]:
    """State and cursor of the latest checkpoint; the fresh ones where there is none yet."""
    step = checkpoints.latest_step()
    if step is None:
        console.log("No checkpoint was written yet: the run starts from its beginning.")
        return state, Cursor()
    params, lora, opt_state = checkpoints.restore(
        step, params=state.variables["params"], lora=state.variables["lora"], opt_state=state.opt_state
    )
    console.log(f"Resuming after step {step:,}.")
    step_array = jax.device_put(state.step.dtype.type(step), state.step.sharding)
    return (
        TrainState(step_array, {"params": params, "lora": lora}, opt_state),
        Cursor.from_json(checkpoints.read_cursor(step)),
    )


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


# What is written when a training run ends, however it ended.


@dataclass(frozen=True)
class RunResult:
    """Where a run is and how it ended."""

    folder: Path
    summary: Mapping[str, Any]
    """Content of summary.json."""
    exit_status: int = 0
    """0, or 128 plus the number of the signal that stopped the run."""


def parameter_report(freezing: FreezingConfig, setup: Setup | TaskSetup) -> dict[str, Any]:
    """Content of parameters.json: counts by group, the regime, and the adapted layers."""
    return {
        **count_parameters(setup.shapes, setup.mask),
        "regime": "+".join(freezing.groups) or freezing.regime,
        "adapters": [
            {"name": layer.name, "in": layer.inputs, "out": layer.outputs, "rank": layer.rank}
            for layer in setup.layers
        ],
    }


def write_adapter(
    folder: Path, config: PretrainConfig, setup: Setup, variables: Variables, vocabulary_fingerprint: str
) -> list[Path]:
    """Write the adapter with all that was trained beside it; none where the model has no adapters."""
    if config.lora is None:
        return []
    values = settings(config)
    adapter = AdapterConfig(
        lora=values["lora"], model=values["model"], vocabulary_fingerprint=vocabulary_fingerprint
    )
    trained = setup.mask["params"]
    return save_adapter(folder / "adapter", variables["params"], variables["lora"], trained, adapter)


def write_summary(
    folder: Path,
    config: PretrainConfig,
    *,
    baselines: Mapping[str, Any],
    assessment: Mapping[str, Any],
    best_step: int | None,
    stop_reason: str,
    seconds: float,
    examination: Examination,
    data: Mapping[str, Any],
    parameters: Mapping[str, Any],
    startup: Mapping[str, float],
) -> Summary:
    """Write summary.json, SUMMARY.txt, plots and report.html; returns the summary.

    `startup` has the marks of :class:`behrt_jax.training.runtime.Startup`.
    """
    metrics = read_metrics(folder / METRICS_FILE)
    found = summarise(metrics, dict(baselines), best_step, stop_reason, seconds, dict(data), dict(parameters))
    summary = Summary(**found, **assessment)
    if "first step" in startup:
        summary["first_step_seconds"] = startup["first step"]
        summary["startup_seconds"] = dict(startup)
    summary["findings"] = examination.after(summary)
    write_json(folder / SUMMARY_FILE, summary)
    write_text(folder / SUMMARY_TEXT_FILE, summary_text(summary, config.name))
    plot_curves(metrics, dict(baselines), folder / PLOTS_FOLDER)
    write_report(folder)
    return summary


def try_write_adapter(console: Console, *arguments: Any) -> list[Path]:
    """As :func:`write_adapter`; where safetensors is not installed, say so and go on."""
    try:
        return write_adapter(*arguments)
    except InputError as error:
        console.log(f"The adapter was not written: {error} Its values are in checkpoints/ all the same.")
        return []

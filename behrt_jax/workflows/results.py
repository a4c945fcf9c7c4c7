"""What is written when a training run ends, however it ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from behrt_jax.adapters.files import save_adapter
from behrt_jax.config import FreezingConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.plots import plot_curves
from behrt_jax.tracking.report import write_report
from behrt_jax.tracking.run_folder import (
    METRICS_FILE,
    PLOTS_FOLDER,
    SUMMARY_FILE,
    SUMMARY_TEXT_FILE,
    read_metrics,
    write_json,
    write_text,
)
from behrt_jax.tracking.summary import summarise, summary_text
from behrt_jax.training.parameter_report import count_parameters
from behrt_jax.training.state import Setup
from behrt_jax.training.task_state import TaskSetup
from behrt_jax.training.update import Variables
from behrt_jax.workflows.examination import Examination
from behrt_jax.workflows.run_settings import settings


@dataclass(frozen=True)
class RunResult:
    """Where a run is and how it ended."""

    folder: Path
    summary: dict[str, Any]
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
    return save_adapter(
        folder / "adapter",
        params=variables["params"],
        lora=variables["lora"],
        trained=setup.mask["params"],
        lora_config=values["lora"],
        model_config=values["model"],
        vocabulary_fingerprint=vocabulary_fingerprint,
    )


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
) -> dict[str, Any]:
    """Write summary.json, SUMMARY.txt, plots and report.html; returns the summary.

    `startup` has the marks of :class:`behrt_jax.tracking.startup.Startup`.
    """
    metrics = read_metrics(folder / METRICS_FILE)
    summary = summarise(
        metrics, dict(baselines), best_step, stop_reason, seconds, dict(data), dict(parameters)
    )
    summary |= assessment
    if "first step" in startup:
        summary |= {"first_step_seconds": startup["first step"], "startup_seconds": dict(startup)}
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

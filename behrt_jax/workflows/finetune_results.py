"""What a fine-tuning run writes: while it trains, and when it ends."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from behrt_jax.adapters.files import save_adapter
from behrt_jax.config import FinetuneConfig, TaskConfig, TaskKind
from behrt_jax.errors import InputError
from behrt_jax.evaluation.decisions import fit_temperature, fit_threshold, mean_predictions
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.formats import format_duration
from behrt_jax.tracking.plots import plot_curves
from behrt_jax.tracking.run_folder import (
    METRICS_FILE,
    PLOTS_FOLDER,
    SUMMARY_FILE,
    SUMMARY_TEXT_FILE,
    append_metrics,
    read_metrics,
    write_json,
    write_text,
)
from behrt_jax.training.task_scores import task_metrics
from behrt_jax.training.update import Variables
from behrt_jax.workflows.finetune_setup import Finetuning
from behrt_jax.workflows.labelled_data import LabelledData
from behrt_jax.workflows.run_settings import settings

TASK_FILE = "task.json"
MEMBERS_FOLDER = "members"


@dataclass(frozen=True)
class Calibration:
    """What was fitted on the tuning split once the model was trained."""

    temperature: float = 1.0
    """Divides the outputs."""
    threshold: float | None = None
    """Binary: probability from which on a prediction is positive."""


def calibrate(config: TaskConfig, kind: TaskKind, outputs: np.ndarray, targets: np.ndarray) -> Calibration:
    """Fit temperature and threshold.

    Args:
        config: how the threshold is chosen.
        kind: of the task.
        outputs: of the tuning examples, float32 ``[members, examples, outputs]``.
        targets: theirs, float32 ``[examples, targets]``.
    """
    temperature = fit_temperature(kind, outputs, targets)
    if kind != "binary":
        return Calibration(temperature)
    probabilities = mean_predictions(kind, outputs, temperature)[:, 0]
    return Calibration(temperature, fit_threshold(probabilities, targets[:, 0] > 0.5, config.threshold))


@dataclass(frozen=True)
class TaskReporter:
    """Passes the training loop's reports on to console and metrics.jsonl."""

    console: Console
    metrics_path: Path

    def step(self, step: int, tokens: int, loss: float | None) -> None:
        """A step was dispatched."""
        self.console.step(step, tokens, loss)

    def record(self, metrics: dict[str, Any]) -> None:
        """Append to metrics.jsonl; a validation is also shown."""
        append_metrics(self.metrics_path, metrics)
        if metrics["split"] != "train":
            where = f"epoch {metrics['epoch']:.1f}  step {metrics['step']:,}"
            self.console.log(f"{where}  validation {_figures(metrics)}")


def write_results(
    console: Console,
    config: FinetuneConfig,
    run: Finetuning,
    *,
    variables: Variables | None,
    calibration: Calibration | None,
    best_step: int | None,
    stop_reason: str,
    seconds: float,
) -> dict[str, Any]:
    """Write task.json, the adapter, summary.json, SUMMARY.txt and plots; returns the summary."""
    folder, labelled, parameters = run.folder, run.labelled, run.parameters
    metrics = read_metrics(folder / METRICS_FILE)
    validations = [record for record in metrics if record.get("split") == "tuning"]
    best = next((record for record in validations if record["step"] == best_step), None)
    prevalence = loss_of_base_rate(labelled)
    summary: dict[str, Any] = {
        "task": labelled.task.kind,
        "best_step": best_step,
        "best": best,
        "last": validations[-1] if validations else None,
        "epochs": max((record.get("epoch") or 0.0 for record in metrics), default=0.0),
        "steps": max((record["step"] for record in metrics), default=0),
        "stop_reason": stop_reason,
        "wall_seconds": seconds,
        "baselines": {"base rate": {"loss": prevalence}},
        "calibration": None if calibration is None else asdict(calibration),
        "data": labelled.counts,
        "parameters": {key: value for key, value in parameters.items() if key != "adapters"},
    }
    if variables is not None and calibration is not None:
        record = task_record(config, run, calibration)
        write_json(folder / TASK_FILE, record)
        if config.lora is not None:
            try_write_adapter(console, folder / "adapter", run, variables, record)
    write_json(folder / SUMMARY_FILE, summary)
    write_text(folder / SUMMARY_TEXT_FILE, _text(config, summary))
    plot_curves(metrics, {}, folder / PLOTS_FOLDER)
    console.log(f"Stopped: {stop_reason}.")
    console.log(_verdict(summary))
    console.log(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return summary


def task_record(config: FinetuneConfig, run: Finetuning, calibration: Calibration) -> dict[str, Any]:
    """All that prediction needs beside the parameters, ready for JSON."""
    new = len(run.labelled.vocabulary) - len(run.labelled.base_codes)
    return {
        "task": run.labelled.task.to_json(),
        "pooling": config.task.pooling,
        "max_length": config.task.max_length,
        "model": settings(run.model),
        "lora": None if config.lora is None else settings(config.lora),
        "freezing": settings(config.freezing),
        "parameters": {name: run.parameters[name] for name in ("total", "trainable")},
        "calibration": asdict(calibration),
        "new_codes": new,
        "base": str(config.init),
    }


def try_write_adapter(
    console: Console, folder: Path, run: Finetuning, variables: Variables, record: Mapping[str, Any]
) -> None:
    """Write an adapter folder; where safetensors is not installed, say so and go on."""
    codes = run.labelled.vocabulary.codes[len(run.labelled.base_codes) :]
    (folder / TASK_FILE).unlink(missing_ok=True)  # of the run before it was resumed
    try:
        save_adapter(
            folder,
            params=variables["params"],
            lora=variables["lora"],
            trained=run.setup.mask["params"],
            lora_config=record["lora"],
            model_config=record["model"],
            vocabulary_fingerprint=run.pretrained.vocabulary.fingerprint(),
            new_codes=codes,
        )
    except InputError as error:
        console.log(f"The adapter was not written: {error} Its values are in checkpoints/ all the same.")
        return
    write_json(folder / TASK_FILE, {**record, "base": str(run.pretrained.run.resolve())})


def loss_of_base_rate(labelled: LabelledData) -> float:
    """Loss on tuning of saying of everyone what is true on average in the train split."""
    kind = labelled.task.kind
    outputs = labelled.base_outputs()
    everyone = np.broadcast_to(outputs, (len(labelled.tuning_targets), len(outputs)))
    return task_metrics(kind, everyone, labelled.tuning_targets)["loss"]


def _verdict(summary: Mapping[str, Any]) -> str:
    best, base = summary["best"], summary["baselines"]["base rate"]["loss"]
    if best is None:
        return "There is no validation yet."
    if best["loss"] >= base:
        return (
            f"The validation loss, {best['loss']:.4f}, is NOT below that of the base rate, {base:.4f}: the "
            "model has learned nothing of use. Try another learning rate, more epochs or more labels."
        )
    return (
        f"The validation loss, {best['loss']:.4f}, is below that of the base rate, {base:.4f}. How good the "
        "model is, predict.py and evaluate.py tell on the held_out split, beside simple baselines."
    )


def _text(config: FinetuneConfig, summary: Mapping[str, Any]) -> str:
    title = f"Fine-tuning run: {config.name} ({summary['task']})"
    best, parameters = summary["best"], summary["parameters"]
    took = format_duration(summary["wall_seconds"])
    lines = [
        f"{title}\n{'=' * len(title)}",
        f"{summary['epochs']:.1f} epochs, {summary['steps']:,} steps, {took}. "
        f"Stopped: {summary['stop_reason'].rstrip('.')}.",
        f"Best validation (step {summary['best_step']}): {_figures(best)}." if best else "No validation yet.",
        _verdict(summary),
        f"Parameters: {parameters['trainable']:,} trained of {parameters['total']:,}"
        f" ({parameters['trainable_percent']:.2f} %).",
    ]
    if calibration := summary["calibration"]:
        fitted = [f"{name} {value:.4g}" for name, value in calibration.items() if value is not None]
        lines.append(f"Fitted on tuning: {', '.join(fitted)}.")
    return "\n\n".join(lines).encode("ascii", "replace").decode("ascii") + "\n"


def _figures(metrics: Mapping[str, Any]) -> str:
    names = [name for name in ("loss", "auroc", "accuracy") if metrics.get(name) is not None]
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in names)

"""What a fine-tuning run is made of, a single one or a population: model, examples, batches, optimizer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh

from behrt_jax.adapters.files import save_adapter
from behrt_jax.config import FinetuneConfig, ModelConfig, TaskConfig
from behrt_jax.data.examples import TaskBatches
from behrt_jax.data.labels import Labels, LabelTables
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.tasks import KINDS, TaskKind
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import fit_temperature, fit_threshold, mean_predictions
from behrt_jax.files import write_json, write_text
from behrt_jax.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    PARAMETERS_FILE,
    PLOTS_FOLDER,
    SUMMARY_FILE,
    SUMMARY_TEXT_FILE,
    append_metrics,
    prepare_run_folder,
    read_metrics,
)
from behrt_jax.tracking.console import Console, format_duration
from behrt_jax.tracking.plots import plot_curves
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import Pretrained, open_pretrained
from behrt_jax.training.runtime import keep_freed_memory, use_compilation_cache
from behrt_jax.training.state import TaskSetup, set_up_task, task_optimizer
from behrt_jax.training.step import Variables
from behrt_jax.training.validation import task_metrics
from behrt_jax.workflows import announce
from behrt_jax.workflows.checks import check_finetune, model_of
from behrt_jax.workflows.labelled_data import (
    LabelledData,
    announce_labels,
    label_data,
    label_tasks,
    split_batches,
)
from behrt_jax.workflows.run import check_same_run, default_folder, parameter_report, run_record, settings


class Finetuning(NamedTuple):
    """All of a run but its parameters."""

    folder: Path
    pretrained: Pretrained
    model: ModelConfig
    mesh: Mesh
    labelled: LabelledData
    setup: TaskSetup
    parameters: dict[str, Any]
    """Content of parameters.json."""
    batches: TaskBatches
    tuning: TaskBatches
    micro_batches: int
    total_steps: int
    optimizer: optax.GradientTransformation


def open_finetuning(
    config: FinetuneConfig,
    data: SequenceSet,
    labels: Labels | LabelTables,
    delays: Sequence[str],
    devices: Sequence[Any] | None,
    console: Console,
) -> Finetuning:
    """Work out everything that can go wrong, make the run folder, and say what will be trained on what.

    Raises:
        InputError: something in the configuration, the data or the labels is wrong.
    """
    keep_freed_memory()
    check_finetune(config)
    assert config.init is not None
    if reason := use_compilation_cache(config.compilation_cache):
        console.log(reason)
    pretrained = open_pretrained(config.init)
    model = model_of(config, pretrained.model)
    mesh = make_mesh(devices, config.mesh)
    if isinstance(labels, LabelTables):
        labelled = label_tasks(config, model, pretrained.vocabulary, data, labels, delays)
    else:
        labelled = label_data(config, model, pretrained.vocabulary, data, labels, delays)
    task = labelled.task
    announce_labels(console, task.kind, labelled.counts)
    setup = set_up_task(
        model,
        len(pretrained.vocabulary),
        task,
        config.task.pooling,
        config.lora,
        config.freezing,
        mesh,
        first_outputs=None if labelled.tasks else labelled.base_outputs(),
        new_codes=len(labelled.vocabulary) - len(pretrained.vocabulary),
        packed=config.task.packed,
    )
    parameters = parameter_report(config.freezing, setup)
    announce.parameters(console, parameters, setup.predictor.product)
    batches, tuning, micro_batches = split_batches(config, model, labelled, mesh)
    total_steps = config.train.epochs * batches.steps_per_epoch
    total_steps = min(total_steps, config.train.max_steps or total_steps)
    examples = len(labelled.train) / batches.steps_per_epoch
    console.log(
        f"A step: {examples:.1f} examples in {batches.batch_rows} rows of {batches.row_length}. "
        f"In all {total_steps:,} steps at most."
    )
    optimizer = task_optimizer(config.optimizer, setup, total_steps)
    folder = prepare_run_folder(config.output or default_folder(config.name), config.resume)
    if config.resume:
        check_same_run(folder, config, _fingerprint(data, labelled))
    labelled.vocabulary.write(folder / "vocabulary.parquet")
    write_json(folder / PARAMETERS_FILE, parameters)
    facts = {
        "task": task.to_json(),
        "model": settings(model),
        "micro_batches": micro_batches,
        "total_steps": total_steps,
    }
    description = {"fingerprint": _fingerprint(data, labelled), **labelled.counts}
    write_json(folder / CONFIG_FILE, run_record(config, description, facts, {}))
    return Finetuning(
        folder,
        pretrained,
        model,
        mesh,
        labelled,
        setup,
        parameters,
        batches,
        tuning,
        micro_batches,
        total_steps,
        optimizer,
    )


def _fingerprint(data: SequenceSet, labelled: LabelledData) -> str:
    """SHA-256 of the data, and of the labels that are learned from: held_out ones may be added later."""
    digest = hashlib.sha256(data.fingerprint.encode())
    for examples, targets in (
        (labelled.train, labelled.train_targets),
        (labelled.tuning, labelled.tuning_targets),
    ):
        for column in (examples.subject_ids, examples.times, targets):
            digest.update(column.tobytes())
    return digest.hexdigest()


# What a fine-tuning run writes: while it trains, and when it ends.

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
    if not KINDS[kind].thresholded:
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

"""A fine-tuning run, of a single model or a population: its opening, and the model that it leaves behind."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from behrt_jax.adapters.files import AdapterConfig, save_adapter
from behrt_jax.config import FinetuneConfig, TaskConfig
from behrt_jax.data.batches import TaskBatches
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.labels import Labels, LabelTables
from behrt_jax.data.prepared import rule_files
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.tasks import KINDS, TaskKind
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import fit_temperature, fit_threshold, mean_predictions
from behrt_jax.files import JsonObject, json_text
from behrt_jax.models.behrt import BEHRTForTask
from behrt_jax.run_folder import CHECKPOINTS_FOLDER
from behrt_jax.tracking.console import Console
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import Devices, make_mesh
from behrt_jax.training.loop import Schedule
from behrt_jax.training.pretrained import Pretrained, open_pretrained
from behrt_jax.training.runtime import keep_freed_memory, use_compilation_cache
from behrt_jax.training.state import assemble, set_up_task
from behrt_jax.training.step import Variables, task_objective
from behrt_jax.training.validation import task_metrics
from behrt_jax.workflows import announce
from behrt_jax.workflows.checks import check_finetune, model_of
from behrt_jax.workflows.labelled_data import (
    TRAINS,
    LabelledData,
    announce_codes,
    announce_labels,
    check_codes,
    label_data,
    label_tasks,
    split_batches,
)
from behrt_jax.workflows.run import (
    Run,
    check_same_run,
    parameter_report,
    run_record,
    settings,
    write_start,
)

TASK_FILE = "task.json"
MEMBERS_FOLDER = "members"


def check_readable(config: FinetuneConfig) -> None:
    """Check that there is a model to start from, before data and labels are read.

    Raises:
        InputError: no finished run of pretraining, or none with a checkpoint that is whole.
    """
    assert config.init is not None
    run = open_pretrained(config.init).run
    with open_checkpoints(run / CHECKPOINTS_FOLDER) as checkpoints:
        if not config.from_scratch and checkpoints.latest_step() is None:
            raise InputError(f"--init: {run} has no checkpoint to start from: give another run.")


@dataclass(frozen=True, eq=False)
class Finetuning(Run):
    """A fine-tuning run that is about to begin."""

    batches: TaskBatches
    labelled: LabelledData
    tuning: TaskBatches
    pretrained: Pretrained
    preparation: Preparation | None
    """Rules by which the data were prepared, where they are known."""


def open_finetuning(
    config: FinetuneConfig,
    folder: Path,
    data: SequenceSet,
    labels: Labels | LabelTables,
    delays: Sequence[str],
    devices: Devices | None,
    console: Console,
) -> Finetuning:
    """Work out everything that can go wrong, and say what will be trained on what, in the run's folder.

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
    codes = check_codes(
        data, TRAINS, labelled.vocabulary, pretrained.preparation, config.max_unknown, config.init
    )
    announce_codes(console, codes)
    labelled.counts["codes"] = codes
    network = BEHRTForTask(model, len(pretrained.vocabulary), task.outputs, config.task.pooling)
    setup = set_up_task(
        network,
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
    schedule = Schedule.of(config.train, batches.steps_per_epoch)
    examples = len(labelled.train) / batches.steps_per_epoch
    console.log(
        f"A step: {examples:.1f} examples in {batches.batch_rows} rows of {batches.row_length}. "
        f"In all {schedule.total_steps:,} steps at most."
    )
    objective = task_objective(setup.predictor, task.of.loss)
    assembly = assemble(config, setup, objective, schedule.total_steps, mesh)
    if config.resume:
        check_same_run(folder, config, _fingerprint(data, labelled))
    facts = {
        "task": task.to_json(),
        "model": settings(model),
        "micro_batches": micro_batches,
        "total_steps": schedule.total_steps,
    }
    description = {"fingerprint": _fingerprint(data, labelled), **labelled.counts}
    rules = rule_files(labelled.vocabulary, data.preparation)
    write_start(folder, rules, parameters, run_record(config, description, facts, {}))
    counts = labelled.vocabulary.counts
    return Finetuning(
        folder,
        assembly,
        batches,
        schedule,
        micro_batches,
        parameters,
        counts,
        labelled,
        tuning,
        pretrained,
        data.preparation,
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


@dataclass(frozen=True)
class Calibration:
    """Temperature and threshold, fitted on the tuning split once the model was trained."""

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


def task_record(config: FinetuneConfig, run: Finetuning, calibration: Calibration) -> JsonObject:
    """All that prediction needs beside the parameters, ready for JSON."""
    new = len(run.labelled.vocabulary) - len(run.labelled.base_codes)
    return {
        "task": run.labelled.task.to_json(),
        "pooling": config.task.pooling,
        "max_length": config.task.max_length,
        "model": settings(run.assembly.setup.predictor.model.config),
        "lora": None if config.lora is None else settings(config.lora),
        "freezing": settings(config.freezing),
        "parameters": {name: run.parameters[name] for name in ("total", "trainable")},
        "calibration": asdict(calibration),
        "new_codes": new,
        "base": str(config.init),
        "data": None if config.data is None else str(config.data.resolve()),
        "labels": None if config.labels is None else str(config.labels.resolve()),
    }


def try_write_adapter(
    console: Console, folder: Path, run: Finetuning, variables: Variables, record: JsonObject
) -> None:
    """Write an adapter folder; where safetensors is not installed, say so and go on."""
    codes = run.labelled.vocabulary.codes[len(run.labelled.base_codes) :]
    task = json_text({**record, "base": str(run.pretrained.run.resolve())}, 2).encode()
    try:
        adapter = AdapterConfig(
            lora=record["lora"],
            model=record["model"],
            vocabulary_fingerprint=run.pretrained.vocabulary.fingerprint(),
            new_codes=codes,
        )
        trained = run.assembly.setup.mask["params"]
        beside = {TASK_FILE: task, **rule_files(run.labelled.vocabulary, run.preparation)}
        save_adapter(folder, variables["params"], variables["lora"], trained, adapter, beside)
    except InputError as error:
        console.log(f"The adapter was not written: {error} Its values are in checkpoints/ all the same.")


def loss_of_base_rate(labelled: LabelledData) -> float:
    """Loss on tuning of saying of everyone what is true on average in the train split."""
    kind = labelled.task.kind
    outputs = labelled.base_outputs()
    everyone = np.broadcast_to(outputs, (len(labelled.tuning_targets), len(outputs)))
    return task_metrics(kind, everyone, labelled.tuning_targets)["loss"]

"""What a fine-tuning run is made of, a single one or a population: model, examples, batches, optimizer."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from behrt_jax.config import FinetuneConfig, ModelConfig
from behrt_jax.data.label_tables import LabelTables
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.task_batches import TaskBatches
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.run_folder import CONFIG_FILE, PARAMETERS_FILE, prepare_run_folder, write_json
from behrt_jax.training.compilation import use_compilation_cache
from behrt_jax.training.host_memory import keep_freed_memory
from behrt_jax.training.mesh import make_mesh
from behrt_jax.training.pretrained import Pretrained, open_pretrained
from behrt_jax.training.task_state import TaskSetup, set_up_task, task_optimizer
from behrt_jax.workflows import announce
from behrt_jax.workflows.finetune_checks import check_finetune, model_of
from behrt_jax.workflows.label_counts import announce_labels
from behrt_jax.workflows.labelled_data import LabelledData, label_data, split_batches
from behrt_jax.workflows.labelled_tasks import label_tasks
from behrt_jax.workflows.results import parameter_report
from behrt_jax.workflows.run_settings import check_same_run, default_folder, run_record, settings


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

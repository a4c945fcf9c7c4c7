"""A fine-tuned model that is ready to predict, from a run, an adapter or an export."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from behrt_jax.adapters.files import CONFIG_FILE as ADAPTER_FILE
from behrt_jax.adapters.files import load_adapter, read_config
from behrt_jax.config.model import FreezingConfig, LoRAConfig, ModelConfig
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.prepared import read_preparation
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.evaluation.count_model import CountModel
from behrt_jax.files import JsonObject, from_stored, read_json
from behrt_jax.models.behrt import BEHRTForTask
from behrt_jax.models.stacked_layers import with_layout_of
from behrt_jax.run_folder import CHECKPOINTS_FOLDER, VOCABULARY_FILE, checked, read_document
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import replicated, replicated_shapes
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.training.state import Setup, set_up_task
from behrt_jax.training.step import Variables
from behrt_jax.weights.portable import Portable, is_portable, open_portable, read_weights
from behrt_jax.workflows.finetune_run import MEMBERS_FOLDER, TASK_FILE, Calibration


class Finetuned(NamedTuple):
    """A model that is ready to predict."""

    task: Task
    setup: Setup
    members: list[Variables]
    """Variables of each model whose mean predicts, one where it is no ensemble; on the devices, whole on
    each, frozen leaves shared."""
    vocabulary: Vocabulary
    preparation: Preparation | None
    """Rules by which its data were prepared, where they are known."""
    model: ModelConfig
    max_length: int | None
    calibration: Calibration
    blend: tuple[CountModel, float] | None
    """What predictions are blended with, and its share."""
    trained: JsonObject
    """Regime, and counts of parameters, for the record of predictions."""


def open_finetuned(folder: Path, base: Path | None, mesh: Mesh) -> Finetuned:
    """Read a model.

    Args:
        folder: a run of finetune (a population predicts with its chosen members), an adapter in it, or an
            exported model.
        base: of an adapter: the pretraining run; the one that the adapter names where not given.
        mesh: the devices.

    Raises:
        InputError: neither a finished fine-tuning run nor an adapter nor the export of one, a run of several
            tasks, or an adapter of another base.
    """
    record = read_task(folder)
    if "tasks" in record:
        tasks = ", ".join(f"{k} ({name})" for k, name in enumerate(record["tasks"]))
        raise InputError(
            f"--model: {folder} has a model for each of several tasks: give {folder / MEMBERS_FOLDER / 'K'}, "
            f"where K is one of {tasks}."
        )
    is_adapter = (folder / ADAPTER_FILE).is_file()
    if "members" in record and not is_adapter:
        folders = [folder / MEMBERS_FOLDER / str(k) for k in record["members"]]
        setup, members, vocabulary = _from_adapters(folders, base, mesh)
    elif is_adapter:
        setup, members, vocabulary = _from_adapters([folder], base, mesh)
    elif is_portable(folder):
        setup, members, vocabulary = _from_export(open_portable(folder), record, mesh)
    else:
        vocabulary = Vocabulary.read(checked(folder, VOCABULARY_FILE))
        setup = _set_up(record, len(vocabulary) - record["new_codes"], mesh)
        members = [_restored(folder, setup, mesh)]
    freezing, blend = from_stored(FreezingConfig, record["freezing"]), record.get("blend")
    return Finetuned(
        Task.from_json(record["task"]),
        setup,
        members,
        vocabulary,
        read_preparation(folder),
        setup.predictor.model.config,
        record["max_length"],
        Calibration(**record["calibration"]),
        None if blend is None else (CountModel.from_json(blend["count_model"]), blend["share"]),
        {"regime": "+".join(freezing.groups) or freezing.regime, **record["parameters"]},
    )


def is_finetuned(folder: Path) -> bool:
    """Whether a folder is a run of finetune, an adapter of one, or an export: one with a task."""
    if is_portable(folder):
        return open_portable(folder).config.task is not None
    return (folder / TASK_FILE).is_file()


def read_task(folder: Path) -> JsonObject:
    """What task.json of a fine-tuned model says, or the export of one.

    Raises:
        InputError: the folder holds no fine-tuned model, or a damaged one.
    """
    if is_portable(folder):
        config = open_portable(folder).config
        if config.task is None:
            raise InputError(f"--model: {folder} is the export of a pretrained model: give a fine-tuned one.")
        return {**config.task, "model": config.model, "lora": config.lora, "new_codes": config.new_codes}
    if not (folder / TASK_FILE).is_file():
        raise InputError(
            f"--model: {folder} holds no fine-tuned model ({TASK_FILE} is not there): give a finished run of "
            "finetune.py, or the adapter in it."
        )
    if (folder / ADAPTER_FILE).is_file():
        adapter, record = read_config(folder), read_json(folder / TASK_FILE)
        # What PEFT saved there may have other adapters than the run that task.json is of.
        return {**record, "lora": adapter.lora} if adapter.base_fingerprint is None else record
    return read_document(folder, TASK_FILE)


def _set_up(record: JsonObject, vocabulary_size: int, mesh: Mesh) -> Setup:
    model, task = from_stored(ModelConfig, record["model"]), Task.from_json(record["task"])
    return set_up_task(
        BEHRTForTask(model, vocabulary_size, task.outputs, record["pooling"]),
        None if record["lora"] is None else from_stored(LoRAConfig, record["lora"]),
        from_stored(FreezingConfig, record["freezing"]),
        mesh,
        new_codes=record["new_codes"],
    )


def _from_adapters(
    folders: Sequence[Path], base: Path | None, mesh: Mesh
) -> tuple[Setup, list[Variables], Vocabulary]:
    """Adapters of equal shapes on one base."""
    record = read_task(folders[0])
    pretrained = open_pretrained(base or Path(record["base"]))
    setup = _set_up(record, len(pretrained.vocabulary), mesh)
    # Every leaf of a head comes with the adapter.
    heads = {name: head for name, head in setup.shapes["params"].items() if name.endswith("_head")}
    heads = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), heads)
    params = {"behrt": read_encoder(pretrained, mesh).params, **heads}
    members, new_codes = [], ()
    for folder in folders:
        found, lora, config = load_adapter(folder, params, pretrained.vocabulary.fingerprint())
        members.append(jax.device_put({"params": found, "lora": lora}, replicated(mesh)))
        new_codes = config.new_codes
    return setup, members, pretrained.vocabulary.extended(new_codes)


def _from_export(
    portable: Portable, record: JsonObject, mesh: Mesh
) -> tuple[Setup, list[Variables], Vocabulary]:
    params, adapters = read_weights(portable)
    if portable.lora is None:  # whatever trained, there are no adapters any more
        record = {**record, "freezing": asdict(FreezingConfig())}
    setup = _set_up(record, len(portable.vocabulary) - portable.config.new_codes, mesh)
    found = {"params": params, "lora": adapters}
    found = {name: with_layout_of(portable.model.scan_layers, part) for name, part in found.items()}
    return setup, [jax.device_put(found, replicated(mesh))], portable.vocabulary


def _restored(folder: Path, setup: Setup, mesh: Mesh) -> Variables:
    shapes = replicated_shapes(setup.shapes, mesh)
    with open_checkpoints(folder / CHECKPOINTS_FOLDER) as checkpoints:
        checkpoints.refuse_damaged()
        step = checkpoints.best_step()
        if step is None:
            raise InputError(f"--model: {folder} has no checkpoint with a validation: train it further.")
        found = checkpoints.restore(step, params=shapes["params"], lora=shapes["lora"])
    return {"params": found.params, "lora": found.lora}

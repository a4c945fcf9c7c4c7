"""A fine-tuned model from its run folder, or from an adapter and the base that it belongs to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from behrt_jax.adapters.files import load_adapter
from behrt_jax.adapters.folders import CONFIG_FILE as ADAPTER_FILE
from behrt_jax.config import FreezingConfig, LoRAConfig, ModelConfig
from behrt_jax.config.stored import from_stored
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.tracking.run_folder import CHECKPOINTS_FOLDER, read_json
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.mesh import replicated
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.training.task_state import TaskSetup, set_up_task
from behrt_jax.workflows.finetune_results import MEMBERS_FOLDER, TASK_FILE, Calibration


class Finetuned(NamedTuple):
    """A model that is ready to predict."""

    task: Task
    setup: TaskSetup
    members: list[dict[str, Any]]
    """Variables of each model whose mean predicts, one where it is no ensemble; on the devices, whole on
    each, frozen leaves shared."""
    vocabulary: Vocabulary
    model: ModelConfig
    max_length: int | None
    calibration: Calibration
    trained: dict[str, Any]
    """Regime, and counts of parameters, for the record of predictions."""


def open_finetuned(folder: Path, base: Path | None, mesh: Mesh) -> Finetuned:
    """Read a model.

    Args:
        folder: a run of finetune (a population predicts with its chosen members), or an adapter in it.
        base: of an adapter: the pretraining run; the one that the adapter names where not given.
        mesh: the devices.

    Raises:
        InputError: neither a finished fine-tuning run nor an adapter, a run of several tasks, or an adapter
            of another base.
    """
    record = _record(folder)
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
    else:
        vocabulary = Vocabulary.read(folder / "vocabulary.parquet")
        setup = _set_up(record, len(vocabulary) - record["new_codes"], mesh)
        members = [_restored(folder, setup, mesh)]
    freezing = from_stored(FreezingConfig, record["freezing"])
    return Finetuned(
        Task.from_json(record["task"]),
        setup,
        members,
        vocabulary,
        setup.predictor.model.config,
        record["max_length"],
        Calibration(**record["calibration"]),
        {"regime": "+".join(freezing.groups) or freezing.regime, **record["parameters"]},
    )


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / TASK_FILE).is_file():
        raise InputError(
            f"--model: {folder} holds no fine-tuned model ({TASK_FILE} is not there): give a finished run of "
            "finetune.py, or the adapter in it."
        )
    return read_json(folder / TASK_FILE)


def _set_up(record: dict[str, Any], vocabulary_size: int, mesh: Mesh) -> TaskSetup:
    return set_up_task(
        from_stored(ModelConfig, record["model"]),
        vocabulary_size,
        Task.from_json(record["task"]),
        record["pooling"],
        None if record["lora"] is None else from_stored(LoRAConfig, record["lora"]),
        from_stored(FreezingConfig, record["freezing"]),
        mesh,
        new_codes=record["new_codes"],
    )


def _from_adapters(
    folders: Sequence[Path], base: Path | None, mesh: Mesh
) -> tuple[TaskSetup, list[dict[str, Any]], Vocabulary]:
    """Adapters of equal shapes on one base."""
    record = _record(folders[0])
    pretrained = open_pretrained(base or Path(record["base"]))
    setup = _set_up(record, len(pretrained.vocabulary), mesh)
    head = setup.init(jax.random.key(0))["params"]["task_head"]
    params = {"behrt": read_encoder(pretrained, mesh).params, "task_head": head}
    members, new_codes = [], ()
    for folder in folders:
        found, lora, config = load_adapter(folder, params, pretrained.vocabulary.fingerprint())
        members.append(jax.device_put({"params": found, "lora": lora}, replicated(mesh)))
        new_codes = config.get("new_codes", ())
    return setup, members, pretrained.vocabulary.extended(new_codes)


def _restored(folder: Path, setup: TaskSetup, mesh: Mesh) -> dict[str, Any]:
    whole = replicated(mesh)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), setup.shapes
    )
    with open_checkpoints(folder / CHECKPOINTS_FOLDER) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise InputError(f"--model: {folder} has no checkpoint with a validation: train it further.")
        found = checkpoints.restore(step, params=shapes["params"], lora=shapes["lora"])
    return {"params": found.params, "lora": found.lora}

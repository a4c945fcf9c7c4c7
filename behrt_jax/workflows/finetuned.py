"""A fine-tuned model from its run folder, or from an adapter and the base that it belongs to."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from behrt_jax.adapters.files import load_adapter
from behrt_jax.adapters.folders import CONFIG_FILE as ADAPTER_FILE
from behrt_jax.config import FreezingConfig, LoRAConfig, ModelConfig
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.tracking.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, read_json
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.mesh import replicated
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.training.task_state import TaskSetup, set_up_task
from behrt_jax.workflows.finetune_results import TASK_FILE, Calibration


class Finetuned(NamedTuple):
    """A model that is ready to predict."""

    task: Task
    setup: TaskSetup
    variables: dict[str, Any]
    """On the devices, whole on each."""
    vocabulary: Vocabulary
    model: ModelConfig
    max_length: int | None
    calibration: Calibration
    trained: dict[str, Any]
    """Regime, and counts of parameters, for the record of predictions."""


def open_finetuned(folder: Path, base: Path | None, mesh: Mesh) -> Finetuned:
    """Read a model.

    Args:
        folder: a run of finetune, or its adapter/ or a copy of that.
        base: of an adapter: the pretraining run; the one that the adapter names where not given.
        mesh: the devices.

    Raises:
        InputError: neither a finished fine-tuning run nor an adapter, or an adapter of another base.
    """
    if not (folder / TASK_FILE).is_file():
        raise InputError(
            f"--model: {folder} holds no fine-tuned model ({TASK_FILE} is not there): give a finished run of "
            "finetune.py, or the adapter in it."
        )
    record = read_json(folder / TASK_FILE)
    task, model = Task.from_json(record["task"]), _filled(ModelConfig, record["model"])
    adapters = None if record["lora"] is None else _filled(LoRAConfig, record["lora"])
    freezing = _filled(FreezingConfig, record["freezing"])
    is_adapter = (folder / ADAPTER_FILE).is_file()
    if is_adapter:
        pretrained = open_pretrained(base or Path(record["base"]))
        vocabulary = pretrained.vocabulary
    else:
        vocabulary = Vocabulary.read(folder / "vocabulary.parquet")
    setup = set_up_task(model, len(vocabulary), task, record["pooling"], adapters, freezing, mesh)
    if is_adapter:
        encoder, _ = read_encoder(pretrained, mesh)
        head = jax.device_put(setup.init(jax.random.key(0))["params"]["task_head"], replicated(mesh))
        params = {"behrt": encoder, "task_head": head}
        params, lora, _ = load_adapter(folder, params, vocabulary.fingerprint())
        variables = jax.device_put({"params": params, "lora": lora}, replicated(mesh))
    else:
        variables = _restored(folder, setup, mesh)
    trained = {"regime": "+".join(freezing.groups) or freezing.regime, **record["parameters"]}
    calibration = Calibration(**record["calibration"])
    return Finetuned(task, setup, variables, vocabulary, model, record["max_length"], calibration, trained)


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


def _filled(kind: Any, values: dict[str, Any]) -> Any:
    """A configuration from JSON; settings that it does not know are passed over."""
    known = kind.__dataclass_fields__
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


__all__ = ["CONFIG_FILE", "Finetuned", "open_finetuned"]

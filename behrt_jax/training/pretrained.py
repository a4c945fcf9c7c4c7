"""The encoder of a finished pretraining run: its configuration, its vocabulary, its parameters."""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.config import ModelConfig
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, example_inputs
from behrt_jax.tracking.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, SUMMARY_FILE, read_json
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.mesh import replicated
from behrt_jax.training.warm_start import adapter_shapes, lora_config


class Pretrained(NamedTuple):
    """What a run tells of its model without reading its parameters."""

    run: Path
    model: ModelConfig
    vocabulary: Vocabulary
    options: dict[str, Any]
    """Its settings of the data: which codes were selected, and so on."""


def open_pretrained(run: Path) -> Pretrained:
    """Read the small files of a finished pretraining run.

    Raises:
        InputError: there is no such run, it is not finished, or it is none of pretraining.
    """
    for name in (CONFIG_FILE, SUMMARY_FILE, "vocabulary.parquet"):
        if not (run / name).is_file():
            raise InputError(
                f"--init: {run} holds no finished run ({name} is not there): give the folder of one."
            )
    settings = read_json(run / CONFIG_FILE)["settings"]
    if "masking" not in settings:
        raise InputError(f"--init: {run} is no run of pretraining: give the folder that pretrain.py wrote.")
    known = {field.name for field in fields(ModelConfig)}
    model = ModelConfig(**{name: value for name, value in settings["model"].items() if name in known})
    return Pretrained(run, model, Vocabulary.read(run / "vocabulary.parquet"), settings["data"])


class Encoder(NamedTuple):
    """The parameters of a pretrained encoder."""

    params: dict[str, Any]
    """What the model has under ``behrt``, on the devices."""
    step: int
    """Of the checkpoint that they are of."""


def read_encoder(pretrained: Pretrained, mesh: Mesh) -> Encoder:
    """The encoder of the best checkpoint, or of the last where there is no best.

    Adapters of that run are merged into them.

    Raises:
        InputError: there is no checkpoint, or it cannot be read.
    """
    model = BEHRTForMLM(pretrained.model, len(pretrained.vocabulary))
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), *example_inputs(pretrained.model))["params"]
    )
    whole = replicated(mesh)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    with open_checkpoints(pretrained.run / CHECKPOINTS_FOLDER) as checkpoints:
        step = checkpoints.best_step()
        step = checkpoints.latest_step() if step is None else step
        if step is None:
            raise InputError(f"--init: {pretrained.run} has no checkpoint to start from: give another run.")
        adapters = lora_config(pretrained.run)
        if adapters is None:
            params = checkpoints.restore(step, params=shapes).params
        else:
            found = checkpoints.restore(step, params=shapes, lora=adapter_shapes(shapes, adapters))
            params = lora.merge(found.params, found.lora, adapters)
    return Encoder(params["behrt"], step)

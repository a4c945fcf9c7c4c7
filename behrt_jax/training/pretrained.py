"""A finished pretraining run: its settings, its vocabulary, its parameters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.config import LoRAConfig, ModelConfig
from behrt_jax.config.stored import from_stored
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, example_inputs
from behrt_jax.tracking.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, SUMMARY_FILE, read_json
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.mesh import replicated_shapes


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
    check_finished(run, "--init", (CONFIG_FILE, SUMMARY_FILE, "vocabulary.parquet"))
    settings = stored_settings(run)
    if "masking" not in settings:
        raise InputError(f"--init: {run} is no run of pretraining: give the folder that pretrain.py wrote.")
    model = from_stored(ModelConfig, settings["model"])
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
    params, step = read_parameters(pretrained.run, "--init", replicated_shapes(shapes, mesh))
    return Encoder(params["behrt"], step)


def read_parameters(run: Path, option: str, shapes: Any) -> tuple[Any, int]:
    """Parameters of a run's best checkpoint, or of its last where it has no best, and the step they are of.

    Adapters of that run are merged into them (:func:`behrt_jax.adapters.lora.merge`).

    Args:
        run: its folder.
        option: that names the run, for messages.
        shapes: of the parameters, arrays or ``jax.ShapeDtypeStruct``, with the shardings that they get.

    Raises:
        InputError: there is no checkpoint, it cannot be read, or its parameters have other shapes.
    """
    with open_checkpoints(run / CHECKPOINTS_FOLDER) as checkpoints:
        step = checkpoints.best_step()
        step = checkpoints.latest_step() if step is None else step
        if step is None:
            raise InputError(f"{option}: {run} has no checkpoint to start from: give another run.")
        stored = stored_settings(run)["lora"]
        if stored is None:
            return checkpoints.restore(step, params=shapes).params, step
        adapters = from_stored(LoRAConfig, stored)
        found = checkpoints.restore(step, params=shapes, lora=_adapter_shapes(shapes, adapters))
    return lora.merge(found.params, found.lora, adapters), step


def check_finished(run: Path, option: str, files: Sequence[str] = (CONFIG_FILE, SUMMARY_FILE)) -> None:
    """Check that the folder holds a finished run.

    Raises:
        InputError: one of its files is not there; names the option and the file.
    """
    for name in files:
        if not (run / name).is_file():
            raise InputError(
                f"{option}: {run} holds no finished run ({name} is not there): give the folder of one."
            )


def stored_settings(run: Path) -> dict[str, Any]:
    """Settings that a run was made with, as its version of behrt_jax wrote them."""
    return read_json(run / CONFIG_FILE)["settings"]


def _adapter_shapes(params: Any, config: LoRAConfig) -> Any:
    """The adapters that a model with these parameters has, as shapes, whole on each of their devices."""
    shapes = jax.eval_shape(lambda key, tree: lora.init(key, tree, config), jax.random.key(0), params)
    return replicated_shapes(shapes, jax.tree.leaves(params)[0].sharding.mesh)

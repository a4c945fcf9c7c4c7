"""Model, adapters and first state of a fine-tuning run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.config import FreezingConfig, LoRAConfig, ModelConfig, OptimizerConfig
from behrt_jax.data.tasks import Task
from behrt_jax.models.behrt import BEHRTForTask, example_inputs
from behrt_jax.models.pooling import Pooling
from behrt_jax.training.freezing import optimizer_labels
from behrt_jax.training.optimizer import make_optimizer
from behrt_jax.training.sharding import shardings_of
from behrt_jax.training.state import what_trains
from behrt_jax.training.task_step import TaskPredictor
from behrt_jax.training.update import TrainState, Variables


class TaskSetup(NamedTuple):
    """What a fine-tuning run trains and how."""

    predictor: TaskPredictor
    init_with: Callable[[jax.Array, LoRAConfig | None], Variables]
    """From a key and adapters, of whatever rank, to random variables."""
    init: Callable[[jax.Array], Variables]
    """The same with the adapters of the run."""
    shapes: Any
    """The variables as ``jax.ShapeDtypeStruct``."""
    mask: Any
    """Tree of booleans with the structure of the variables: does this leaf train?"""
    layers: list[lora.AdaptedLayer]
    """Adapted layers; empty without LoRA."""


def set_up_task(
    model: ModelConfig,
    vocabulary_size: int,
    task: Task,
    pooling: Pooling,
    adapters: LoRAConfig | None,
    freezing: FreezingConfig,
    mesh: Mesh | None = None,
    first_outputs: np.ndarray | None = None,
    new_codes: int = 0,
    packed: bool = True,
) -> TaskSetup:
    """Work out model, adapters and what trains, without computing anything.

    Args:
        model: of the encoder.
        vocabulary_size: rows of the pretrained embedding table.
        task: what the head is for.
        pooling: see `models.pooling`.
        adapters: LoRA, or None.
        freezing: what trains.
        mesh: the devices; one where not given.
        first_outputs: bias of the head before training, float32 `[outputs]`, see
            :func:`behrt_jax.training.task_losses.base_outputs`; zero where not given.
        new_codes: rows of embeddings beside the pretrained ones, see `adapters.new_codes`.
        packed: rows may hold several examples.

    Raises:
        InputError: adapters that match nothing, a regime that trains nothing, and the like.
    """
    base = BEHRTForTask(model, vocabulary_size, task.outputs, pooling)
    network = BEHRTForTask(model, vocabulary_size + new_codes, task.outputs, pooling)

    def init_with(key: jax.Array, adapters: LoRAConfig | None) -> Variables:
        params_key, lora_key = jax.random.split(key)
        params: Any = base.init(params_key, *example_inputs(model), segments=1)["params"]
        if first_outputs is not None:
            params["task_head"]["dense"]["bias"] = jnp.asarray(first_outputs, jnp.float32)
        if new_codes:
            params["new_codes"] = {"rows": jnp.zeros((new_codes, model.embedding_size))}
        return {"params": params, "lora": lora.init(lora_key, params, adapters) if adapters else {}}

    def init(key: jax.Array) -> Variables:
        return init_with(key, adapters)

    shapes = jax.eval_shape(init, jax.random.key(0))
    trains = what_trains(shapes, freezing, adapters, model.compute_dtype)
    predictor = TaskPredictor(network, task.kind, adapters, trains.product, mesh, packed)
    return TaskSetup(predictor, init_with, init, shapes, trains.mask, trains.layers)


def task_optimizer(
    config: OptimizerConfig, setup: TaskSetup, total_steps: int
) -> optax.GradientTransformation:
    """AdamW for what trains in `setup`, nothing for the rest."""
    return make_optimizer(config, total_steps, optimizer_labels(setup.shapes, setup.mask))


def with_encoder(state: TrainState, encoder: Any, new_rows: np.ndarray | None = None) -> TrainState:
    """The state with the parameters of `encoder` in place of its own, spread over the devices as these.

    `new_rows` are the first values of the rows of new codes, float32 `[codes, embedding]`.
    """
    params = state.variables["params"]
    found = {"behrt": encoder} if new_rows is None else {"behrt": encoder, "new_codes": {"rows": new_rows}}
    shardings = {name: shardings_of(params[name]) for name in found}
    return state._replace(
        variables={**state.variables, "params": {**params, **jax.device_put(found, shardings)}}
    )

"""The first train state, and what follows from model, adapters and regime alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from behrt_jax.adapters import lora
from behrt_jax.adapters.products import Product, resolve_product
from behrt_jax.config import FreezingConfig, LoRAConfig, ModelConfig, OptimizerConfig, PretrainConfig
from behrt_jax.data.tasks import Task
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask, Pooling, example_inputs
from behrt_jax.training.devices import replicated, shardings_of
from behrt_jax.training.freezing import adapted_kernels_frozen, optimizer_labels, regime, trainable
from behrt_jax.training.optimizer import make_optimizer
from behrt_jax.training.runtime import RUN_ONCE
from behrt_jax.training.step import Predictor, TaskPredictor, TrainState, Variables

LARGE = 2**16


def state_shardings(state: "TrainState", mesh: Mesh, large: int = LARGE) -> "TrainState":
    """Sharding of each leaf of a train state.

    Args:
        state: arrays, or ``jax.ShapeDtypeStruct``.
        mesh: with the axis `fsdp`; where that is 1, every leaf is replicated.
        large: elements from which on a leaf is split, along its largest axis that `fsdp` divides.

    Returns:
        The same tree with a ``NamedSharding`` for each leaf.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        adapter = _names(path)[0] == "lora"
        return replicated(mesh) if adapter else _split(leaf.shape, mesh, large)

    variables = tree_map_with_path(sharding, state.variables)
    leaves = {_names(path): leaf for path, leaf in tree_leaves_with_path(state.variables)}
    shardings = {_names(path): leaf for path, leaf in tree_leaves_with_path(variables)}

    def like_its_parameter(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        """A moment has the path of its parameter at the end of its own, and the same shape."""
        names = _names(path)
        for start in range(len(names)):
            own = names[start:]
            if own in leaves and leaves[own].shape == leaf.shape:
                return shardings[own]
        return replicated(mesh)

    opt_state = tree_map_with_path(like_its_parameter, state.opt_state)
    return state._replace(step=replicated(mesh), variables=variables, opt_state=opt_state)


def _split(shape: tuple[int, ...], mesh: Mesh, large: int) -> NamedSharding:
    parts = mesh.shape["fsdp"]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or np.prod(shape) < large or not axes:
        return replicated(mesh)
    axis = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


class Setup(NamedTuple):
    """What a run trains and how."""

    predictor: Predictor
    shapes: Any
    """The variables as ``jax.ShapeDtypeStruct``."""
    mask: Any
    """Tree of booleans with the structure of the variables: does this leaf train?"""
    layers: list[lora.AdaptedLayer]
    """Adapted layers; empty without LoRA."""


def set_up(config: PretrainConfig, vocabulary_size: int, mesh: Mesh | None = None) -> Setup:
    """Work out model, adapters and what trains, without computing anything.

    Without a mesh, all is on one device.

    Raises:
        InputError: adapters that match nothing, a regime that trains nothing, and the like.
    """
    model = BEHRTForMLM(config.model, vocabulary_size)
    shapes = jax.eval_shape(lambda: _init_variables(model, config, jax.random.key(0)))
    trains = what_trains(shapes, config.freezing, config.lora, config.model.compute_dtype)
    predictor = Predictor(model, config.lora, trains.product, mesh, config.data.packed)
    return Setup(predictor, shapes, trains.mask, trains.layers)


class Trains(NamedTuple):
    """What trains of a model, and how its adapters are computed."""

    mask: Any
    """As in :class:`Setup`."""
    product: Product
    layers: list[lora.AdaptedLayer]


def what_trains(
    shapes: Any, freezing: FreezingConfig, adapters: LoRAConfig | None, compute_dtype: str
) -> Trains:
    """What trains of variables with these shapes.

    Raises:
        InputError: as in :func:`set_up`.
    """
    mask = trainable(shapes, regime(freezing))
    if adapters is None:
        return Trains(mask, "activations", [])
    product = resolve_product(adapters, compute_dtype, adapted_kernels_frozen(shapes, mask))
    return Trains(mask, product, lora.adapted_layers(shapes["params"], adapters))


def optimizer_for(config: PretrainConfig, setup: Setup, total_steps: int) -> optax.GradientTransformation:
    """AdamW for what trains in `setup`, nothing for the rest."""
    return make_optimizer(config.optimizer, total_steps, optimizer_labels(setup.shapes, setup.mask))


def init_state(
    config: PretrainConfig,
    setup: Setup,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    large: int = LARGE,
) -> TrainState:
    """Initialise the model of `config`, see :func:`first_state`."""
    model = setup.predictor.model
    return first_state(
        lambda key: _init_variables(model, config, key), setup.shapes, optimizer, key, mesh, large
    )


def first_state(
    init_variables: Callable[[jax.Array], Variables],
    shapes: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    large: int = LARGE,
) -> TrainState:
    """Initialise everything in one jitted call, spread over the mesh as `sharding.state_shardings` says.

    Leaf by leaf it would take seconds, and an uncommitted first state would compile the step twice.

    Args:
        init_variables: from a key to the variables.
        shapes: of these variables.
        optimizer: whose state is initialised.
        key: typed PRNG key.
        mesh: the devices.
        large: see `sharding.state_shardings`.
    """

    def init(key: jax.Array) -> TrainState:
        variables = init_variables(key)
        return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(variables))

    shardings = shardings_of(abstract_state(shapes, optimizer, mesh, large))
    return jax.jit(init, out_shardings=shardings, compiler_options=RUN_ONCE)(jax.random.clone(key))


def abstract_state(
    shapes: Any, optimizer: optax.GradientTransformation, mesh: Mesh, large: int = LARGE
) -> TrainState:
    """What :func:`first_state` returns, as ``jax.ShapeDtypeStruct`` with shardings: no arrays are made."""
    opt_state = jax.eval_shape(optimizer.init, shapes)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(step, shapes, opt_state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh, large),
    )


def run_keys(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Typed keys of a run: of initialisation, of the training steps and of validation."""
    # One program: key by key, each operation would be compiled or read from disk by itself.
    keys = jax.jit(lambda: tuple(jax.random.split(jax.random.key(seed), 3)))
    init_key, step_key, validation_key = keys()
    return init_key, step_key, validation_key


def _init_variables(model: BEHRTForMLM, config: PretrainConfig, key: jax.Array) -> Variables:
    params_key, lora_key = jax.random.split(key)
    params = model.init(params_key, *example_inputs(config.model))["params"]
    adapters = {} if config.lora is None else lora.init(lora_key, params, config.lora)
    return {"params": params, "lora": adapters}


# Model, adapters and first state of a fine-tuning run.


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
            :meth:`behrt_jax.data.tasks.Task.base_outputs`; zero where not given.
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
    predictor = TaskPredictor(network, task.of.loss, adapters, trains.product, mesh, packed)
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

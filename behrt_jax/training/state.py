"""The first train state, and what follows from model, adapters and regime alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.adapters.products import Product, resolve_product
from behrt_jax.config import FreezingConfig, LoRAConfig, PretrainConfig
from behrt_jax.models.behrt import BEHRTForMLM, example_inputs
from behrt_jax.training.compilation import RUN_ONCE
from behrt_jax.training.freezing import adapted_kernels_frozen, optimizer_labels, regime, trainable
from behrt_jax.training.optimizer import make_optimizer
from behrt_jax.training.sharding import LARGE, shardings_of, state_shardings
from behrt_jax.training.step import Predictor
from behrt_jax.training.update import TrainState, Variables


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

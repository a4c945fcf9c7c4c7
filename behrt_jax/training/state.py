"""A training run put together from its configuration: what trains, its first state, its step.

:func:`set_up` (pretraining) and :func:`set_up_task` work out the model, its adapters and what trains,
without computing anything. An :class:`Assembly` adds objective, optimizer, keys and devices: pretraining,
fine-tuning, benchmarks and studies all train by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from behrt_jax.adapters import lora
from behrt_jax.adapters.lora import Tree, path_names, resolve_product
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import FinetuneConfig, OptimizerConfig, PretrainConfig
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask, example_batch
from behrt_jax.models.questions import BEHRTForQueries, init_params, pretraining_model
from behrt_jax.training.devices import replicated, shapes_of, shardings_of
from behrt_jax.training.freezing import adapted_kernels_frozen, optimizer_labels, regime, trainable
from behrt_jax.training.optimizer import make_optimizer
from behrt_jax.training.runtime import RUN_ONCE
from behrt_jax.training.step import (
    Objective,
    Predictor,
    Step,
    Totals,
    TrainState,
    Variables,
    make_update_step,
    masked_code_objective,
)

CODE_TABLE = ("behrt", "embeddings", "code", "embedding")
"""Path of the code embedding, `[vocabulary, embedding]`, among the parameters."""
LARGE = 2**16
"""Elements from which on a leaf is split over devices."""


class Setup(NamedTuple):
    """Model, adapters, and the parameters that train."""

    predictor: Predictor
    init_with: Callable[[jax.Array, LoRAConfig | None], Variables]
    """From a key and adapters, of whatever rank, to random variables."""
    shapes: Variables
    """The variables as ``jax.ShapeDtypeStruct``."""
    mask: Tree
    """Tree of booleans with the structure of the variables: does this leaf train?"""
    layers: list[lora.AdaptedLayer]
    """Adapted layers; empty without LoRA."""

    def init(self, key: jax.Array) -> Variables:
        """Random variables, with the adapters of the run."""
        return self.init_with(key, self.predictor.lora)


def set_up(config: PretrainConfig, vocabulary_size: int, mesh: Mesh | None = None) -> Setup:
    """Setup of pretraining, for its objective. Without a mesh, all is on one device.

    Raises:
        InputError: adapters that match nothing, a regime that trains nothing, and the like.
    """
    groups = len(config.queries.groups)
    model = pretraining_model(config.model, vocabulary_size, config.objective, groups)
    init = partial(init_params, model)
    return _of_model(model, init, config.lora, config.freezing, mesh, config.data.packed)


def set_up_task(
    model: BEHRTForTask,
    adapters: LoRAConfig | None,
    freezing: FreezingConfig,
    mesh: Mesh | None = None,
    first_outputs: np.ndarray | None = None,
    new_codes: int = 0,
    packed: bool = True,
) -> Setup:
    """Setup of a labelled task.

    Args:
        model: whose vocabulary is the pretrained one.
        adapters: LoRA, or None.
        freezing: the regime, or the groups that train.
        mesh: the devices; one where not given.
        first_outputs: bias of the head before training, float32 `[outputs]`, see
            :meth:`behrt_jax.data.tasks.Kind.base_outputs`; zero where not given.
        new_codes: rows of embeddings beside the pretrained ones, see `adapters.new_codes`.
        packed: rows may hold several examples.

    Raises:
        InputError: as :func:`set_up`.
    """

    def init(key: jax.Array) -> Tree:
        params = model.init(key, example_batch(model.config), segments=1)["params"]
        if first_outputs is not None:
            params["task_head"]["dense"]["bias"] = jnp.asarray(first_outputs, jnp.float32)
        if new_codes:
            params["new_codes"] = {"rows": jnp.zeros((new_codes, model.config.embedding_size))}
        return params

    extended = model.clone(vocabulary_size=model.vocabulary_size + new_codes)
    return _of_model(extended, init, adapters, freezing, mesh, packed)


def _of_model(
    model: BEHRTForMLM | BEHRTForTask | BEHRTForQueries,
    init: Callable[[jax.Array], Tree],
    adapters: LoRAConfig | None,
    freezing: FreezingConfig,
    mesh: Mesh | None,
    packed: bool,
) -> Setup:
    def init_with(key: jax.Array, adapters: LoRAConfig | None) -> Variables:
        params_key, lora_key = jax.random.split(key)
        params = init(params_key)
        return {"params": params, "lora": lora.init(lora_key, params, adapters) if adapters else {}}

    shapes = jax.eval_shape(lambda: init_with(jax.random.key(0), adapters))
    mask = trainable(shapes, regime(freezing))
    if adapters is None:
        return Setup(Predictor(model, None, "activations", mesh, packed), init_with, shapes, mask, [])
    frozen = adapted_kernels_frozen(shapes, mask)
    product = resolve_product(adapters, model.config.compute_dtype, frozen)
    layers = lora.adapted_layers(shapes["params"], adapters)
    return Setup(Predictor(model, adapters, product, mesh, packed), init_with, shapes, mask, layers)


def optimizer_for(config: OptimizerConfig, setup: Setup, total_steps: int) -> optax.GradientTransformation:
    """AdamW for what trains in `setup`, nothing for the rest."""
    return make_optimizer(config, total_steps, optimizer_labels(setup.shapes, setup.mask))


class RunKeys(NamedTuple):
    """Typed PRNG keys of a run."""

    init: jax.Array
    step: jax.Array
    validation: jax.Array


def run_keys(seed: int) -> RunKeys:
    """Keys of initialisation, of the training steps and of validation."""

    # One program: key by key, each operation would be compiled or read from disk by itself.
    @jax.jit
    def keys() -> tuple[jax.Array, ...]:
        return tuple(jax.random.split(jax.random.key(seed), 3))

    return RunKeys(*keys())


@dataclass(frozen=True)
class Assembly:
    """All that the steps of a run are made of, but for their batches."""

    setup: Setup
    objective: Objective
    optimizer: optax.GradientTransformation
    mesh: Mesh
    keys: RunKeys
    clip_norm: float | None

    @cached_property
    def state_shapes(self) -> TrainState:
        """The state as ``jax.ShapeDtypeStruct`` with shardings: no arrays are made."""
        return abstract_state(self.setup.shapes, self.optimizer, self.mesh)

    @cached_property
    def initialise(self) -> Any:
        """Key -> state before the first step, spread over the devices; jitted."""
        return init_program(self.setup, self.optimizer, self.mesh)

    def first_state(self) -> TrainState:
        """State before the first step, spread over the devices."""
        return self.initialise(jax.random.clone(self.keys.init))

    def step(self, micro_batches: int = 1) -> Step:
        """The train step, not jitted, see :func:`behrt_jax.training.step.make_update_step`."""
        return make_update_step(
            self.objective,
            self.optimizer,
            self.setup.mask,
            self.keys.step,
            clip_norm=self.clip_norm,
            micro_batches=micro_batches,
        )

    def jit(self, step: Callable[..., tuple[TrainState, Totals]]) -> Any:
        """A function from (state, ...) to (state, figures), jitted; it uses up the state that it is given."""
        out = shardings_of(self.state_shapes), replicated(self.mesh)
        return jax.jit(step, donate_argnums=0, out_shardings=out)

    def compile(self, program: Any, batch: Any) -> None:
        """Compile a jitted step for batches like this one, on the devices: its first call need not."""
        program.lower(self.state_shapes, shapes_of(batch)).compile()


def assemble(
    config: PretrainConfig | FinetuneConfig, setup: Setup, objective: Objective, total_steps: int, mesh: Mesh
) -> Assembly:
    """Put a run together; `objective` is one of `training.step`."""
    optimizer = optimizer_for(config.optimizer, setup, total_steps)
    keys = run_keys(config.train.seed)
    return Assembly(setup, objective, optimizer, mesh, keys, config.optimizer.clip_norm)


def assemble_pretraining(
    config: PretrainConfig, vocabulary_size: int, mesh: Mesh, total_steps: int = 1000
) -> Assembly:
    """A pretraining run without its data, to look at or to time."""
    setup = set_up(config, vocabulary_size, mesh)
    objective = masked_code_objective(setup.predictor, config.masking, config.train.static_masks)
    return assemble(config, setup, objective, total_steps, mesh)


def init_state(
    setup: Setup, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh, large: int = LARGE
) -> TrainState:
    """Initialise everything in one jitted call, spread over the mesh as :func:`state_shardings` says."""
    return init_program(setup, optimizer, mesh, large)(jax.random.clone(key))


def init_program(
    setup: Setup, optimizer: optax.GradientTransformation, mesh: Mesh, large: int = LARGE
) -> Any:
    """A jitted function from a key to what :func:`init_state` gives.

    Leaf by leaf it would take seconds, and an uncommitted first state would compile the step twice.
    """

    def init(key: jax.Array) -> TrainState:
        variables = setup.init(key)
        return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(variables))

    shardings = shardings_of(abstract_state(setup.shapes, optimizer, mesh, large))
    return jax.jit(init, out_shardings=shardings, compiler_options=RUN_ONCE)


def abstract_state(
    shapes: Variables, optimizer: optax.GradientTransformation, mesh: Mesh, large: int = LARGE
) -> TrainState:
    """The state of :func:`init_state` as ``jax.ShapeDtypeStruct`` with shardings: no arrays are made."""
    opt_state = jax.eval_shape(optimizer.init, shapes)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, shapes, opt_state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, mesh, large),
    )


def with_encoder(state: TrainState, encoder: Tree, new_rows: np.ndarray | None = None) -> TrainState:
    """The state with the parameters of `encoder` in place of its own, spread over the devices as these.

    `new_rows` are the first values of the rows of new codes, float32 `[codes, embedding]`.
    """
    params = state.variables["params"]
    found = {"behrt": encoder} if new_rows is None else {"behrt": encoder, "new_codes": {"rows": new_rows}}
    shardings = {name: shardings_of(params[name]) for name in found}
    return state._replace(
        variables={**state.variables, "params": {**params, **jax.device_put(found, shardings)}}
    )


def with_code_rows(state: TrainState, rows: np.ndarray) -> TrainState:
    """The state with other rows of the code embedding than its own, those of special tokens apart.

    `rows`, float32 `[codes, embedding]`, are those of the vocabulary's end.
    """
    params: dict[Any, Any] = {**flatten_dict(state.variables["params"])}
    table = params[CODE_TABLE]
    put = jax.jit(lambda own, rows: own.at[-len(rows) :].set(rows), out_shardings=table.sharding)
    params[CODE_TABLE] = put(table, rows)
    return state._replace(variables={**state.variables, "params": unflatten_dict(params)})


def with_adapters_of_base(state: TrainState, adapters: LoRAConfig | None, key: jax.Array) -> TrainState:
    """The state before its first step with adapters as they begin on the parameters that it has now: with
    ``init`` pissa they are worked out of these. Any others stay.
    """
    if adapters is None or adapters.init != "pissa":
        return state
    shardings = shardings_of(state.variables["lora"])
    begin = jax.jit(partial(lora.init, config=adapters), out_shardings=shardings, compiler_options=RUN_ONCE)
    fresh = begin(jax.random.clone(key), state.variables["params"])
    return state._replace(variables={**state.variables, "lora": fresh})


def state_shardings(state: TrainState, mesh: Mesh, large: int = LARGE) -> TrainState:
    """Sharding of each leaf of a train state.

    Args:
        state: arrays, or ``jax.ShapeDtypeStruct``.
        mesh: with the axis `fsdp`; where that is 1, every leaf is replicated.
        large: elements from which on a leaf is split, along its largest axis that `fsdp` divides.

    Returns:
        The same tree with a ``NamedSharding`` for each leaf.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        adapter = path_names(path)[0] == "lora"
        return replicated(mesh) if adapter else _split(leaf.shape, mesh, large)

    variables = tree_map_with_path(sharding, state.variables)
    leaves = {path_names(path): leaf for path, leaf in tree_leaves_with_path(state.variables)}
    shardings = {path_names(path): leaf for path, leaf in tree_leaves_with_path(variables)}

    def like_its_parameter(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        """A moment has the path of its parameter at the end of its own, and the same shape."""
        names = path_names(path)
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

"""One step of training, whatever is predicted: differentiate, sum, clip, update."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from behrt_jax.evaluation.metrics import add_totals
from behrt_jax.models.dropout import batch_rows
from behrt_jax.training.freezing import stop_frozen, trainable_leaves
from behrt_jax.training.optimizer import clip_factor
from behrt_jax.training.sharding import sum_over_devices

Variables = dict[str, Any]
Totals = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array
    """Steps done, int32 scalar."""
    variables: Variables
    """``{"params": ..., "lora": ...}``."""
    opt_state: optax.OptState


class Objective(NamedTuple):
    """What is predicted of a batch, and how well it was."""

    inputs: Callable[[jax.Array, Any], Any]
    """(key, batch) -> arrays `[rows, ...]` that the loss is computed from; all that is drawn at random for
    whole rows, such as masks, is drawn here."""
    loss: Callable[[Variables, Any, jax.Array, jax.Array], tuple[jax.Array, Totals]]
    """(variables, inputs, number of each row in the batch, dropout key) -> sum of the losses, and totals by
    name, ``targets`` (how many losses were summed) among them. Sums, so that parts of a batch add up."""
    same_inputs: bool = False
    """Draw the same inputs at every step."""


def make_update_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mask: Any,
    key: jax.Array,
    *,
    clip_norm: float | None,
    micro_batches: int = 1,
    merged: Callable[[Variables], Any] = lambda variables: {},
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Totals]]:
    """Build a train step. Its result depends on the state and the batch alone; jit it with its first argument
    donated.

    Args:
        objective: inputs and loss of a batch.
        optimizer: a transformation of the whole variables tree, see `optimizer.make_optimizer`.
        mask: tree of booleans with the structure of the variables, True where a leaf trains.
        key: typed PRNG key of the run; inputs and dropout come from it and the step.
        clip_norm: largest norm of the gradient over all trainable leaves.
        micro_batches: parts into which the batch is cut; it must divide the number of rows.
        merged: what is worked out once for all parts, see `lora.merged_kernels`.
        mesh: devices that share the rows of a batch; a single one where not given.

    Returns:
        A function from (state, batch) to the new state and the objective's totals, with ``gradient_norm``
        (before clipping, trainable leaves only) and ``gradient_squares``, the sum of squares of each
        trainable leaf's, float32 `[leaves]`.
    """
    # Steps built from one key (to compare their speed, say) draw the same.
    input_key, dropout_key = jax.random.split(jax.random.clone(key))

    def loss_of(variables: Variables, merged: Any, inputs: Any, rows: jax.Array, key: jax.Array):
        return objective.loss({**stop_frozen(variables, mask), "merged": merged}, inputs, rows, key)

    def gradient_of(variables: Variables, merged: Any, inputs: Any, rows: jax.Array, key: jax.Array):
        gradient, sums = jax.grad(loss_of, has_aux=True)(variables, merged, inputs, rows, key)
        return trainable_leaves(gradient, mask), sums

    def sums_of(variables: tuple[Variables, Any], keys: tuple[jax.Array, jax.Array], rows: tuple[Any, Any]):
        batch, numbers = rows
        inputs = objective.inputs(keys[0], batch)
        return _accumulate(partial(gradient_of, *variables), inputs, numbers, keys[1], micro_batches)

    def update_step(state: TrainState, batch: Any) -> tuple[TrainState, Totals]:
        step_input_key = input_key if objective.same_inputs else jax.random.fold_in(input_key, state.step)
        keys = step_input_key, jax.random.fold_in(dropout_key, state.step)
        variables = state.variables, merged(state.variables)
        # Dropout goes by the row, whatever device and part it is on.
        rows = batch, batch_rows(jax.tree.leaves(batch)[0])
        gradient, sums = sum_over_devices(sums_of, mesh)(variables, keys, rows)

        gradient = [leaf / jnp.maximum(sums["targets"], 1.0) for leaf in gradient]
        norm = optax.tree.norm(gradient)
        telemetry = {
            "gradient_norm": norm,
            # The norm is made of the same sums: the compiler works them out once.
            "gradient_squares": jnp.stack([jnp.square(leaf).sum() for leaf in gradient]),
        }
        factor = clip_factor(norm, clip_norm)
        gradient = iter([leaf * factor for leaf in gradient])
        full_gradient = jax.tree.map(
            lambda leaf, trains: next(gradient) if trains else jnp.zeros_like(leaf), state.variables, mask
        )
        updates, opt_state = optimizer.update(full_gradient, state.opt_state, state.variables)
        variables = jax.tree.map(
            lambda leaf, update, trains: leaf + update if trains else leaf, state.variables, updates, mask
        )
        return TrainState(state.step + 1, variables, opt_state), {**sums, **telemetry}

    return update_step


def _accumulate(gradient_of, inputs, rows, key, parts):
    """Sums of gradients and totals over parts of the batch, one part in memory at a time."""
    if parts == 1:
        return gradient_of(inputs, rows, key)
    # Part p takes the rows p, p + parts, ...
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), (inputs, rows)
    )

    def add_part(sums, part):
        gradient, totals = gradient_of(*part, key)
        return ([a + b for a, b in zip(sums[0], gradient, strict=True)], add_totals(sums[1], totals)), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(gradient_of, *first, key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add_part, zeros, split)[0]

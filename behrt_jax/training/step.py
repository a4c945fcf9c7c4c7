"""The jitted train and validation steps of masked-code pretraining."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.adapters.new_codes import with_new_codes
from behrt_jax.adapters.products import Product
from behrt_jax.config import LoRAConfig, MaskingConfig
from behrt_jax.data.batches import Batch
from behrt_jax.data.examples import TaskBatch
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask, example_inputs
from behrt_jax.models.layers import batch_rows
from behrt_jax.models.losses import (
    CodeLosses,
    add_totals,
    decoder_losses,
    logit_losses,
    task_losses,
    totals,
    vocabulary_chunk,
)
from behrt_jax.training.devices import gather, sum_over_devices
from behrt_jax.training.freezing import stop_frozen, trainable_leaves
from behrt_jax.training.masking import MaskedCodes, mask_codes
from behrt_jax.training.optimizer import clip_factor

# One step of training, whatever is predicted: differentiate, sum, clip, update.

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


class Predictor(NamedTuple):
    """How a batch becomes logits: the model and, if any, its adapters."""

    model: BEHRTForMLM
    lora: LoRAConfig | None = None
    product: Product = "activations"
    mesh: Mesh | None = None
    """Devices that share the rows of a batch; a single one where not given."""
    packed: bool = True
    """Rows may hold several subjects, see `models.attention.SelfAttention`."""

    def adapters(self, deterministic: bool, rows: jax.Array | None = None) -> AbstractContextManager[None]:
        """Context in which the model is applied."""
        return lora.applying(self.lora, self.product, deterministic, rows) if self.lora else nullcontext()

    def merged(self, variables: Variables) -> dict[str, Any]:
        """What a step works out once for all its micro-batches, see `lora.merged_kernels`."""
        if self.lora is None or self.product != "merged":
            return {}
        return lora.merged_kernels(variables["params"], variables["lora"], self.lora)

    def logits(
        self,
        variables: Variables,
        batch: Batch,
        masked: MaskedCodes,
        key: jax.Array | None,
        rows: jax.Array | None = None,
        decode: bool = True,
    ) -> Any:
        """Logits at the masked columns, float32 `[batch, budget, vocabulary]`; no key, no dropout.

        `rows` numbers the examples, int32 `[batch]`, where they are not 0, 1, ... Without `decode`, the
        input of the head's last layer in place of logits, float32 `[batch, budget, hidden]`.
        """
        with self.adapters(key is None, rows):
            return self.model.apply(
                gather(variables, self.mesh),
                masked.codes,
                batch.ages,
                batch.visits,
                batch.positions,
                batch.segment_ids,
                masked.columns,
                deterministic=key is None,
                rows=rows,
                packed=self.packed,
                decode=decode,
                rngs=None if key is None else {"dropout": key},
            )

    def losses(
        self,
        variables: Variables,
        batch: Batch,
        masked: MaskedCodes,
        key: jax.Array | None,
        rows: jax.Array | None = None,
    ) -> CodeLosses:
        """Losses and ranks of the masked codes, `[batch, budget]`; arguments as in :meth:`logits`."""
        config, shape = self.model.config, masked.labels.shape
        chunk = vocabulary_chunk(config.head_chunk, masked.labels.size, self.model.vocabulary_size)
        # An adapter on the last layer is added to its output: all logits are needed.
        adapted = "decoder" in variables.get("lora", {}).get("mlm_head", {})
        if chunk is None or adapted:
            logits = self.logits(variables, batch, masked, key, rows)
            return logit_losses(logits, masked.labels, masked.weights)
        features = self.logits(variables, batch, masked, key, rows, decode=False)  # [B, T, D]
        decoder = variables["params"]["mlm_head"]["decoder"]
        loss, losses, ranks = decoder_losses(
            features.reshape(-1, features.shape[-1]),
            decoder["kernel"],
            decoder["bias"],
            masked.labels.reshape(-1),
            masked.weights.reshape(-1),
            chunk=chunk,
            dtype=jnp.dtype(config.compute_dtype),
        )
        return CodeLosses(loss, losses.reshape(shape), ranks.reshape(shape))


def example_logits(predictor: Predictor, variables: Variables) -> jax.Array:
    """Logits of a made-up row at every column, for questions about the computation and not its values."""
    with predictor.adapters(deterministic=True):
        return predictor.model.apply(variables, *example_inputs(predictor.model.config))  # pyright: ignore[reportReturnType]


def make_train_step(
    predictor: Predictor,
    optimizer: optax.GradientTransformation,
    mask: Any,
    masking: MaskingConfig,
    key: jax.Array,
    *,
    clip_norm: float | None,
    micro_batches: int = 1,
    static_masks: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Totals]]:
    """Build the train step of masked-code prediction, see :func:`behrt_jax.training.step.make_update_step`.

    Args:
        predictor: model and adapters.
        optimizer: a transformation of the whole variables tree, see `optimizer.make_optimizer`.
        mask: tree of booleans with the structure of the variables, True where a leaf trains.
        masking: how codes are masked.
        key: typed PRNG key of the run; masks and dropout come from it and the step.
        clip_norm: largest norm of the gradient over all trainable leaves.
        micro_batches: parts into which the batch is cut; it must divide the number of rows.
        static_masks: masks from the row's id alone, the same in each epoch.
    """
    local = predictor._replace(mesh=None)

    def inputs(key: jax.Array, batch: Batch) -> tuple[Batch, MaskedCodes]:
        codes = predictor.model.vocabulary_size
        return batch, mask_codes(key, batch.codes, batch.row_ids, masking, codes)

    def loss(variables: Variables, inputs: tuple[Batch, MaskedCodes], rows: jax.Array, key: jax.Array):
        batch, masked = inputs
        found = local.losses(variables, batch, masked, key, rows)
        return found.loss, totals(found.loss, found.ranks, masked.weights)

    return make_update_step(
        Objective(inputs, loss, static_masks),
        optimizer,
        mask,
        key,
        merged=predictor.merged,
        mesh=predictor.mesh,
        clip_norm=clip_norm,
        micro_batches=micro_batches,
    )


def make_validation_step(
    predictor: Predictor, masking: MaskingConfig, key: jax.Array
) -> Callable[[Variables, Batch], Totals]:
    """Build the validation step: totals of a batch, with masks fixed by the key and the row ids."""

    def validation_step(variables: Variables, batch: Batch) -> Totals:
        masked = mask_codes(key, batch.codes, batch.row_ids, masking, predictor.model.vocabulary_size)
        found = predictor.losses(variables, batch, masked, None)
        return totals(found.loss, found.ranks, masked.weights)

    return validation_step


# The jitted steps of a labelled task.


class TaskPredictor(NamedTuple):
    """How rows of examples become outputs: the model and, if any, its adapters."""

    model: BEHRTForTask
    loss: str
    """A name in `models.losses.LOSSES`."""
    lora: LoRAConfig | None = None
    product: Product = "activations"
    mesh: Mesh | None = None
    packed: bool = True
    """Rows may hold several examples, see `models.attention.SelfAttention`."""

    def merged(self, variables: Variables) -> dict[str, Any]:
        """What a step works out once for all its micro-batches, see `lora.merged_kernels`."""
        if self.lora is None or self.product != "merged":
            return {}
        return lora.merged_kernels(variables["params"], variables["lora"], self.lora)

    def outputs(
        self,
        variables: Variables,
        batch: Batch,
        segments: int,
        key: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        """Outputs of each segment, float32 `[batch, segments, outputs]`; no key, no dropout.

        `rows` numbers the rows, int32 `[batch]`, where they are not 0, 1, ...
        """
        deterministic = key is None
        adapters = lora.applying(self.lora, self.product, deterministic, rows) if self.lora else nullcontext()
        with adapters:
            return self.model.apply(  # pyright: ignore[reportReturnType]
                with_new_rows(gather(variables, self.mesh)),
                batch.codes,
                batch.ages,
                batch.visits,
                batch.positions,
                batch.segment_ids,
                segments,
                deterministic=deterministic,
                rows=rows,
                packed=self.packed,
                rngs=None if key is None else {"dropout": key},
            )


def with_new_rows(variables: Variables) -> Variables:
    """Variables whose code table ends with the rows of new codes, if there are any."""
    return {**variables, "params": with_new_codes(variables["params"])}


def task_objective(predictor: TaskPredictor) -> Objective:
    """The task's loss, each example weighed as its batch says."""
    local = predictor._replace(mesh=None)

    def loss(
        variables: Variables, batch: TaskBatch, rows: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Totals]:
        outputs = local.outputs(variables, batch.rows, batch.targets.shape[1], key, rows)  # [B, S, O]
        losses = task_losses(local.loss, outputs, batch.targets) * batch.weights  # [B, S]
        return losses.sum(), {"loss": losses.sum(), "targets": batch.weights.sum()}

    return Objective(lambda key, batch: batch, loss)


def make_output_step(predictor: TaskPredictor) -> Callable[[Variables, TaskBatch], jax.Array]:
    """Build what tells the outputs of a batch, float32 `[rows, segments, outputs]`, without dropout."""

    def output_step(variables: Variables, batch: TaskBatch) -> jax.Array:
        return predictor.outputs(variables, batch.rows, batch.weights.shape[1])

    return output_step

"""One step of training, whatever is predicted.

A :class:`Predictor` makes outputs of a batch; an :class:`Objective` makes a loss of them, of masked codes or
of a task; :func:`make_update_step` makes a step of that.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.adapters.lora import Product
from behrt_jax.adapters.new_codes import with_new_codes
from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.batches import Batch, TaskBatch
from behrt_jax.data.questions import QuestionBatch
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask, decoder_weights
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
from behrt_jax.models.questions import Asked, BEHRTForQueries
from behrt_jax.models.stacked_layers import Tree
from behrt_jax.training.devices import gather, sum_over_devices
from behrt_jax.training.freezing import Variables, stop_frozen, trainable_leaves
from behrt_jax.training.masking import MaskedCodes, mask_codes
from behrt_jax.training.optimizer import clip_factor

Totals = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array
    """Steps done, int32 scalar."""
    variables: Variables
    """``{"params": ..., "lora": ...}``."""
    opt_state: optax.OptState


Step = Callable[[TrainState, Any], tuple[TrainState, Totals]]
"""(state, batch) -> state after it, and its figures."""


class Predictor(NamedTuple):
    """A model with its adapters, if any: from variables and a batch to what its head puts out."""

    model: BEHRTForMLM | BEHRTForTask | BEHRTForQueries
    lora: LoRAConfig | None = None
    product: Product = "activations"
    mesh: Mesh | None = None
    """Devices that share the rows of a batch; a single one where not given."""
    packed: bool = True
    """Rows may hold several subjects, see `models.attention.SelfAttention`."""

    def outputs(
        self,
        variables: Variables,
        batch: Batch,
        head: jax.Array | Asked | int | None = None,
        key: jax.Array | None = None,
        rows: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Output of the model's head; no key, no dropout.

        Args:
            variables: ``{"params": ..., "lora": ...}``, and ``merged`` (:meth:`merged`) where it was worked
                out before; codes that are new to the model have rows of their own (`adapters.new_codes`).
            batch: of events.
            head: what the head is asked: columns, int32 `[batch, targets]`, of masked codes (all where not
                given), questions, or the number of segments of a task.
            key: of dropout.
            rows: numbers the rows, int32 `[batch]`, where they are not 0, 1, ...
            options: others that the model's call takes.
        """
        adapters = lora.applying(self.lora, self.product, key is None, rows) if self.lora else nullcontext()
        with adapters:
            return self.model.apply(  # pyright: ignore[reportReturnType]
                with_new_rows(gather(variables, self.mesh)),
                batch,
                head,
                deterministic=key is None,
                rows=rows,
                packed=self.packed,
                **options,
                rngs=None if key is None else {"dropout": key},
            )

    def merged(self, variables: Variables) -> Tree:
        """Kernels that a step merges once for all its micro-batches, see `lora.merged_kernels`."""
        if self.lora is None or self.product != "merged":
            return {}
        return lora.merged_kernels(variables["params"], variables["lora"], self.lora)


def with_new_rows(variables: Variables) -> Variables:
    """Variables whose code table ends with the rows of new codes, if there are any."""
    return {**variables, "params": with_new_codes(variables["params"])}


def masked_code_losses(
    predictor: Predictor,
    variables: Variables,
    batch: Batch,
    masked: MaskedCodes,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
    guess: bool = False,
) -> CodeLosses:
    """Losses and ranks of the masked codes, `[batch, budget]`; arguments as in :meth:`Predictor.outputs`.

    The head runs at the masked columns alone, and over a large vocabulary in parts. With `guess`, the code
    held most likely is told too.
    """
    config, shape = predictor.model.config, masked.labels.shape
    shown = batch._replace(codes=masked.codes)  # pyright: ignore[reportArgumentType]
    chunk = vocabulary_chunk(config.head_chunk, masked.labels.size, predictor.model.vocabulary_size)
    # An adapter on the last layer is added to its output: all logits are needed.
    adapted = "decoder" in variables.get("lora", {}).get("mlm_head", {})
    if chunk is None or adapted:
        logits = predictor.outputs(variables, shown, masked.columns, key, rows)  # [B, T, V]
        found = logit_losses(logits, masked.labels, masked.weights)
        return found._replace(guesses=logits.argmax(-1).astype(jnp.int32)) if guess else found
    features = predictor.outputs(variables, shown, masked.columns, key, rows, decode=False)  # [B, T, D]
    decoder = decoder_weights(variables["params"], config.tied_decoder)
    dtype = jnp.dtype(config.compute_dtype)
    loss, losses, ranks, _ = decoder_losses(
        features.reshape(-1, features.shape[-1]),
        *decoder,
        masked.labels.reshape(-1),
        masked.weights.reshape(-1),
        chunk=chunk,
        dtype=dtype,
    )
    guesses = _most_likely(features, decoder, dtype) if guess else None
    return CodeLosses(loss, losses.reshape(shape), ranks.reshape(shape), guesses)


def _most_likely(features: jax.Array, decoder: tuple[jax.Array, jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The code of the largest logit, int32 `[B, T]` of features `[B, T, D]`, a row of the batch at a time."""

    def of_row(row: jax.Array) -> jax.Array:
        kernel, bias = decoder[0].astype(dtype), decoder[1].astype(dtype)
        logits = jnp.matmul(row.astype(dtype), kernel, preferred_element_type=jnp.float32)  # [T, V]
        return (logits + bias.astype(jnp.float32)[None, :]).argmax(-1).astype(jnp.int32)

    return jax.lax.map(of_row, features)


class Objective(NamedTuple):
    """A prediction from a batch, and its loss."""

    inputs: Callable[[jax.Array, Any], Any]
    """(key, batch) -> arrays `[rows, ...]` that the loss is computed from; all that is drawn at random for
    whole rows, such as masks, is drawn here."""
    loss: Callable[[Variables, Any, jax.Array, jax.Array], tuple[jax.Array, Totals]]
    """(variables, inputs, number of each row in the batch, dropout key) -> sum of the losses, and totals by
    name, ``targets`` (how many losses were summed) among them. Sums, so that parts of a batch add up."""
    merged: Callable[[Variables], Tree] = lambda variables: {}
    """Worked out once for all parts of a batch, see :meth:`Predictor.merged`."""
    mesh: Mesh | None = None
    """Devices that share the rows of a batch; a single one where not given."""
    same_inputs: bool = False
    """Draw the same inputs at every step."""


def masked_code_objective(
    predictor: Predictor, masking: MaskingConfig, static_masks: bool = False
) -> Objective:
    """Masked-code prediction; `static_masks` are drawn from the row's id alone, the same in each epoch."""
    local = predictor._replace(mesh=None)

    def inputs(key: jax.Array, batch: Batch) -> tuple[Batch, MaskedCodes]:
        codes = predictor.model.vocabulary_size
        given = key, batch.codes, batch.row_ids, masking, codes
        return batch, mask_codes(*given, batch.visits, batch.segment_ids)

    def loss(variables: Variables, inputs: tuple[Batch, MaskedCodes], rows: jax.Array, key: jax.Array):
        found = masked_code_losses(local, variables, *inputs, key, rows)
        return found.loss, totals(found.loss, found.ranks, inputs[1].weights)

    return Objective(inputs, loss, predictor.merged, predictor.mesh, static_masks)


def task_objective(predictor: Predictor, loss: str) -> Objective:
    """A task's loss, a name in `models.losses.LOSSES`, each example weighed as its batch says."""
    local = predictor._replace(mesh=None)

    def loss_of(variables: Variables, batch: TaskBatch, rows: jax.Array, key: jax.Array):
        outputs = local.outputs(variables, batch.rows, batch.targets.shape[1], key, rows)  # [B, S, O]
        losses = task_losses(loss, outputs, batch.targets) * batch.weights  # [B, S]
        return losses.sum(), {"loss": losses.sum(), "targets": batch.weights.sum()}

    return Objective(lambda key, batch: batch, loss_of, predictor.merged, predictor.mesh)


def question_log_odds(
    predictor: Predictor,
    variables: Variables,
    batch: QuestionBatch,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Answers to the questions of a batch, float32 `[batch, segments, questions]`; other arguments as in
    :meth:`Predictor.outputs`.
    """
    asked = Asked(jnp.asarray(batch.questions.codes), jnp.asarray(batch.questions.horizons))
    return predictor.outputs(variables, batch.rows, asked, key, rows)


def question_objective(
    predictor: Predictor, masking: MaskingConfig | None = None, mlm_factor: float = 0.0
) -> Objective:
    """Answers to questions, each weighed as its batch says; with `masking`, masked codes beside them.

    Their sums of losses are added, that of masked codes times `mlm_factor`, and divided by the weights of the
    questions: the factor holds how many questions there are for a masked code. For these the encoder reads
    the rows once more, with the codes hidden: questions are asked of whole histories.
    """
    local = predictor._replace(mesh=None)

    def inputs(key: jax.Array, batch: QuestionBatch) -> tuple[QuestionBatch, MaskedCodes | None]:
        if masking is None:
            return batch, None
        rows, codes = batch.rows, predictor.model.vocabulary_size
        given = key, rows.codes, rows.row_ids, masking, codes
        return batch, mask_codes(*given, rows.visits, rows.segment_ids)

    def loss(
        variables: Variables,
        inputs: tuple[QuestionBatch, MaskedCodes | None],
        rows: jax.Array,
        key: jax.Array,
    ):
        batch, masked = inputs
        log_odds = question_log_odds(local, variables, batch, jax.random.fold_in(key, 0), rows)
        losses = optax.losses.sigmoid_binary_cross_entropy(log_odds, jnp.asarray(batch.questions.answers))
        weights = jnp.asarray(batch.questions.weights)
        of_questions, targets = (losses * weights).sum(), weights.sum()
        if masked is None:
            return of_questions, {"loss": of_questions, "targets": targets}
        found = masked_code_losses(local, variables, batch.rows, masked, jax.random.fold_in(key, 1), rows)
        both = of_questions + mlm_factor * found.loss
        of_masked = {"mlm_loss": found.loss, "mlm_targets": masked.weights.sum(dtype=jnp.float32)}
        return both, {"loss": both, "targets": targets, "question_loss": of_questions, **of_masked}

    return Objective(inputs, loss, predictor.merged, predictor.mesh)


def make_update_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mask: Tree,
    key: jax.Array,
    *,
    clip_norm: float | None,
    micro_batches: int = 1,
) -> Step:
    """Build a train step: differentiate, sum, clip, update. Its result depends on the state and the batch
    alone; jit it with its first argument donated.

    Args:
        objective: inputs and loss of a batch.
        optimizer: a transformation of the whole variables tree, see `optimizer.make_optimizer`.
        mask: tree of booleans with the structure of the variables, True where a leaf trains.
        key: typed PRNG key of the run; inputs and dropout come from it and the step.
        clip_norm: largest norm of the gradient over all trainable leaves.
        micro_batches: parts into which the batch is cut; it must divide the number of rows.

    Returns:
        A function from (state, batch) to the new state and the objective's totals, with ``gradient_norm``
        (before clipping, trainable leaves only) and ``gradient_squares``, the sum of squares of each
        trainable leaf's, float32 `[leaves]`.
    """

    def loss_of(variables: Variables, merged: Tree, inputs: Any, rows: jax.Array, key: jax.Array):
        return objective.loss({**stop_frozen(variables, mask), "merged": merged}, inputs, rows, key)

    def gradient_of(variables: Variables, merged: Tree, inputs: Any, rows: jax.Array, key: jax.Array):
        gradient, sums = jax.grad(loss_of, has_aux=True)(variables, merged, inputs, rows, key)
        return trainable_leaves(gradient, mask), sums

    def sums_of(variables: tuple[Variables, Tree], keys: tuple[jax.Array, jax.Array], rows: tuple[Any, Any]):
        batch, numbers = rows
        inputs = objective.inputs(keys[0], batch)
        return _accumulate(partial(gradient_of, *variables), inputs, numbers, keys[1], micro_batches)

    def update_step(state: TrainState, batch: Any) -> tuple[TrainState, Totals]:
        # Steps built from one key (to compare their speed, say) draw the same. Split here and not outside:
        # there, these small operations would be programs of their own, compiled before the first step.
        input_key, dropout_key = jax.random.split(jax.random.clone(key))
        step_input_key = input_key if objective.same_inputs else jax.random.fold_in(input_key, state.step)
        keys = step_input_key, jax.random.fold_in(dropout_key, state.step)
        variables = state.variables, objective.merged(state.variables)
        # Dropout goes by the row, whatever device and part it is on.
        rows = batch, batch_rows(jax.tree.leaves(batch)[0])
        gradient, sums = sum_over_devices(sums_of, objective.mesh)(variables, keys, rows)

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

"""The jitted train and validation steps of masked-code pretraining."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.config import LoRAConfig, MaskingConfig
from behrt_jax.data.rows import Batch
from behrt_jax.evaluation.code_losses import CodeLosses, decoder_losses, logit_losses, vocabulary_chunk
from behrt_jax.evaluation.metrics import add_totals, totals
from behrt_jax.models.behrt import BEHRTForMLM, example_inputs
from behrt_jax.models.dropout import batch_rows
from behrt_jax.training.freezing import stop_frozen, trainable_leaves
from behrt_jax.training.objectives import MaskedCodes, mask_codes
from behrt_jax.training.optimizer import clip_factor
from behrt_jax.training.sharding import gather, sum_over_devices

Variables = dict[str, Any]
Totals = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array
    """Steps done, int32 scalar."""
    variables: Variables
    """``{"params": ..., "lora": ...}``."""
    opt_state: optax.OptState


class Predictor(NamedTuple):
    """How a batch becomes logits: the model and, if any, its adapters."""

    model: BEHRTForMLM
    lora: LoRAConfig | None = None
    product: Literal["activations", "merged"] = "activations"
    mesh: Mesh | None = None
    """Devices that share the rows of a batch; a single one where not given."""

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
    """Build the train step: mask, encode, predict, differentiate, clip, update.

    The result depends on the state and the batch alone. Jit it with its first argument donated.

    Args:
        predictor: model and adapters.
        optimizer: a transformation of the whole variables tree, see `optimizer.make_optimizer`.
        mask: tree of booleans with the structure of the variables, True where a leaf trains.
        masking: how codes are masked.
        key: typed PRNG key of the run; masks and dropout come from it and the step.
        clip_norm: largest norm of the gradient over all trainable leaves.
        micro_batches: parts into which the batch is cut; it must divide the number of rows.
        static_masks: masks from the row's id alone, the same in each epoch.

    Returns:
        A function from (state, batch) to the new state and the totals of
        `metrics.totals`, with ``gradient_norm`` (before clipping, trainable leaves only) and
        ``gradient_squares``, the sum of squares of each trainable leaf's, float32 `[leaves]`.
    """
    # Steps built from one key (to compare their speed, say) draw the same.
    mask_key, dropout_key = jax.random.split(jax.random.clone(key))
    local = predictor._replace(mesh=None)

    def loss_of(variables: Variables, merged: Any, batch: Batch, masked: MaskedCodes, rows, key):
        variables = {**stop_frozen(variables, mask), "merged": merged}
        found = local.losses(variables, batch, masked, key, rows)
        return found.loss, totals(found.loss, found.ranks, masked.weights)

    def gradient_of(
        variables: Variables, merged: Any, batch: Batch, masked: MaskedCodes, rows, key: jax.Array
    ):
        gradient, sums = jax.grad(loss_of, has_aux=True)(variables, merged, batch, masked, rows, key)
        return trainable_leaves(gradient, mask), sums

    def sums_of(variables: tuple[Variables, Any], keys: tuple[jax.Array, jax.Array], rows: tuple[Batch, Any]):
        batch, numbers = rows
        masked = mask_codes(keys[0], batch.codes, batch.row_ids, masking, predictor.model.vocabulary_size)
        return _accumulate(partial(gradient_of, *variables), batch, masked, numbers, keys[1], micro_batches)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Totals]:
        step_mask_key = mask_key if static_masks else jax.random.fold_in(mask_key, state.step)
        keys = step_mask_key, jax.random.fold_in(dropout_key, state.step)
        variables = state.variables, predictor.merged(state.variables)
        # Dropout goes by the row, whatever device and part it is on.
        rows = batch, batch_rows(batch.codes)
        gradient, sums = sum_over_devices(sums_of, predictor.mesh)(variables, keys, rows)

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

    return train_step


def make_validation_step(
    predictor: Predictor, masking: MaskingConfig, key: jax.Array
) -> Callable[[Variables, Batch], Totals]:
    """Build the validation step: totals of a batch, with masks fixed by the key and the row ids."""

    def validation_step(variables: Variables, batch: Batch) -> Totals:
        masked = mask_codes(key, batch.codes, batch.row_ids, masking, predictor.model.vocabulary_size)
        found = predictor.losses(variables, batch, masked, None)
        return totals(found.loss, found.ranks, masked.weights)

    return validation_step


def _accumulate(gradient_of, batch, masked, rows, key, parts):
    """Sums of gradients and totals over parts of the batch, one part in memory at a time."""
    if parts == 1:
        return gradient_of(batch, masked, rows, key)
    # Part p takes the rows p, p + parts, ...
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0),
        (batch, masked, rows),
    )

    def add_part(sums, part):
        gradient, totals = gradient_of(*part, key)
        return ([a + b for a, b in zip(sums[0], gradient, strict=True)], add_totals(sums[1], totals)), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(gradient_of, *first, key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add_part, zeros, split)[0]

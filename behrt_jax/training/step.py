"""The jitted train and validation steps of masked-code pretraining."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.adapters.products import Product
from behrt_jax.config import LoRAConfig, MaskingConfig
from behrt_jax.data.rows import Batch
from behrt_jax.evaluation.code_losses import CodeLosses, decoder_losses, logit_losses, vocabulary_chunk
from behrt_jax.evaluation.metrics import totals
from behrt_jax.models.behrt import BEHRTForMLM, example_inputs
from behrt_jax.training.objectives import MaskedCodes, mask_codes
from behrt_jax.training.sharding import gather
from behrt_jax.training.update import Objective, Totals, TrainState, Variables, make_update_step


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
    """Build the train step of masked-code prediction, see :func:`behrt_jax.training.update.make_update_step`.

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

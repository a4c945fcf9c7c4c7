"""BEHRT (Li et al. 2020, doi 10.1038/s41598-020-62922-y) with a pre-LayerNorm encoder."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.config import ModelConfig
from behrt_jax.models.embeddings import Embeddings
from behrt_jax.models.encoder import Encoder
from behrt_jax.models.heads import MLMHead, TaskHead
from behrt_jax.models.pooling import Pooling, pool_segments


class BEHRT(nn.Module):
    """Events in, one vector an event out."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        ages: jax.Array,
        visits: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
    ) -> jax.Array:
        """Encode rows of events, in each of which several subjects may stand one after the other.

        Args:
            codes: vocabulary ids, int32 `[batch, length]`.
            ages: years at the event, float32 `[batch, length]`.
            visits: ordinal of the visit in the subject's history from 0, int32 `[batch, length]`.
            positions: ordinal of the token in the subject's sequence from 0, int32 `[batch, length]`.
            segment_ids: subject within the row from 1, int32 `[batch, length]`; 0 is padding.
            deterministic: no dropout; otherwise a `dropout` PRNG key is needed.
            rows: number of each row in its batch, int32 `[batch]`, for dropout; 0, 1, ... where not given.
            packed: False promises that no row holds more than one subject, see `SelfAttention`.

        Returns:
            float32 `[batch, length, hidden]`; at padding, numbers without meaning.
        """
        chex.assert_rank(codes, 2)
        chex.assert_equal_shape([codes, ages, visits, positions, segment_ids])
        x = Embeddings(self.config, self.vocabulary_size, name="embeddings")(
            codes, ages, visits, positions, deterministic, rows
        )
        return Encoder(self.config, name="encoder")(x, segment_ids, deterministic, rows, packed)


class BEHRTForMLM(nn.Module):
    """BEHRT with the masked-code head."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        ages: jax.Array,
        visits: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        targets: jax.Array | None = None,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
        decode: bool = True,
    ) -> jax.Array:
        """Logits over the vocabulary.

        Args:
            codes: as the other inputs up to `segment_ids`, see :class:`BEHRT`.
            ages: see :class:`BEHRT`.
            visits: see :class:`BEHRT`.
            positions: see :class:`BEHRT`.
            segment_ids: see :class:`BEHRT`.
            targets: columns at which the head is evaluated, int32 `[batch, targets]`; every column
                where not given. The head is the widest layer: evaluate it only where it is asked.
            deterministic: no dropout.
            rows: see :class:`BEHRT`.
            packed: see :class:`BEHRT`.
            decode: False for the input of the head's last layer in place of its logits.

        Returns:
            float32 `[batch, targets or length, vocabulary]`, or `[batch, targets or length, hidden]`.
        """
        hidden = BEHRT(self.config, self.vocabulary_size, name="behrt")(
            codes, ages, visits, positions, segment_ids, deterministic, rows, packed
        )
        if targets is not None:
            chex.assert_shape(targets, (codes.shape[0], None))
            hidden = jnp.take_along_axis(hidden, targets[:, :, None], axis=1)  # [B, T, D]
        head = MLMHead(self.vocabulary_size, jnp.dtype(self.config.compute_dtype), name="mlm_head")
        return head(hidden, decode)


class PatientEmbedding(nn.Module):
    """One vector for each subject: BEHRT and a pooling over the subject's events.

    Raises:
        ValueError: `cls` pooling for a model whose sequences carry no [CLS] token.
    """

    config: ModelConfig
    vocabulary_size: int
    pooling: Pooling = "mean"

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        ages: jax.Array,
        visits: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        segments: int,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
    ) -> jax.Array:
        """Return float32 `[batch, segments, hidden]`; inputs as in :class:`BEHRT`."""
        if self.pooling == "cls" and not self.config.cls_token:
            raise ValueError("cls pooling needs sequences with a [CLS] token: set model.cls_token")
        hidden = BEHRT(self.config, self.vocabulary_size, name="behrt")(
            codes, ages, visits, positions, segment_ids, deterministic, rows, packed
        )
        return pool_segments(hidden, segment_ids, self.pooling, segments)


class BEHRTForTask(nn.Module):
    """:class:`PatientEmbedding`, beside whose parameters stands one linear layer on the pooled vector."""

    config: ModelConfig
    vocabulary_size: int
    outputs: int
    """Numbers that the task needs for an example, such as a logit a class."""
    pooling: Pooling = "mean"

    @nn.compact
    def __call__(self, *inputs: Any, **options: Any) -> jax.Array:
        """Return float32 `[batch, segments, outputs]`; arguments as in :class:`PatientEmbedding`."""
        embedding = PatientEmbedding(self.config, self.vocabulary_size, self.pooling)
        nn.share_scope(self, embedding)  # its parameters have the same paths here as there
        pooled = embedding(*inputs, **options)  # [B, S, D]
        return TaskHead(self.outputs, name="task_head")(pooled)


def example_inputs(config: ModelConfig, rows: int = 1) -> tuple[jax.Array, ...]:
    """Inputs of the right shapes and dtypes, `[rows, positions]`, to initialise or tabulate a model."""
    shape = (rows, config.positions)
    integers = jnp.zeros(shape, jnp.int32)
    return integers, jnp.zeros(shape, jnp.float32), integers, integers, jnp.ones(shape, jnp.int32)

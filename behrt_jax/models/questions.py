"""Answers to questions about the future: from the vector of a history, a code and a horizon to a probability.

The encoder reads a history once; the head then answers as many questions of it as are asked.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import ObjectiveName
from behrt_jax.data.batches import Batch
from behrt_jax.models.behrt import BEHRT, EMBEDDING_STDDEV, BEHRTForMLM, example_batch, pool_segments
from behrt_jax.models.layers import Norm, gelu
from behrt_jax.models.stacked_layers import Tree

TYPICAL_DAYS = 180.0
"""Horizon whose features are zero."""


class Asked(NamedTuple):
    """Questions about each segment of a batch."""

    codes: jax.Array
    """Vocabulary ids, or ``vocabulary + g`` for group g, int32 `[batch, segments, questions]`."""
    horizons: jax.Array
    """Days, float32 `[batch, segments, questions]`."""


def horizon_features(days: jax.Array) -> jax.Array:
    """A horizon as two smooth numbers, by its logarithm: float32 `[...]` to `[..., 2]`; 0, of slots without
    a question, counts as a minute.
    """
    scale = jnp.log(jnp.maximum(days, 1 / 1440) / TYPICAL_DAYS)
    return jnp.stack([scale, 0.25 * scale * scale], axis=-1)


class QueryHead(nn.Module):
    """A small network of a history, a code and a horizon: log odds that the code comes within the horizon.

    Its last layer sees the sum of the three, and beside it how well history and question fit, as the product
    of a vector of each.
    """

    config: ModelConfig
    groups: int = 0

    @nn.compact
    def __call__(self, history: jax.Array, asked: Asked, table: jax.Array) -> jax.Array:
        """Answer the questions of a batch.

        Args:
            history: vectors of segments, `[batch, segments, features]`.
            asked: what is asked of each.
            table: the code embedding, float32 `[vocabulary, embedding]`.

        Returns:
            Log odds, float32 `[batch, segments, questions]`.
        """
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        # What the answer is made of is small at first, so that training starts at the loss of an even guess.
        small, usual = nn.initializers.normal(EMBEDDING_STDDEV), nn.initializers.lecun_normal()

        def dense(name: str, bias: bool = config.bias, kernel_init: Any = usual) -> nn.Dense:
            return nn.Dense(
                config.hidden_size, use_bias=bias, dtype=dtype, kernel_init=kernel_init, name=name
            )

        if self.groups:
            own = self.param("groups", small, (self.groups, table.shape[1]))
            table = jnp.concatenate([table, own])
        # Codes are gathered last where there are fewer of them than questions.
        few = len(table) <= asked.codes.size
        code = Norm(config.norm, config.bias, name="code_norm")(table if few else table[asked.codes])
        code = dense("code")(code.astype(dtype))
        horizon = horizon_features(jnp.asarray(asked.horizons)).astype(dtype)  # [B, S, Q, 2]
        question = (code[asked.codes] if few else code) + dense("horizon", bias=False)(horizon)
        history = history.astype(dtype)
        match = dense("match", kernel_init=small)(history)[:, :, None]  # [B, S, 1, D]
        fit = (match * question).astype(jnp.float32).sum(-1) * config.hidden_size**-0.5  # [B, S, Q]
        x = gelu(dense("history")(history)[:, :, None] + question)  # [B, S, Q, D]
        x = gelu(dense("joint")(x)).astype(jnp.float32)
        return nn.Dense(1, kernel_init=small, name="answer")(x)[..., 0] + fit


class BEHRTForQueries(nn.Module):
    """BEHRT with the question head and, where both are trained, the masked-code head."""

    config: ModelConfig
    vocabulary_size: int
    groups: int = 0
    """Groups of codes that are questions of their own."""
    mlm: bool = False
    """There is a masked-code head as well."""

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        head: Asked | jax.Array | None = None,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
        **options: Any,
    ) -> jax.Array:
        """Answer questions about the segments of a batch.

        Args:
            batch: see :class:`behrt_jax.models.behrt.BEHRT`.
            head: the questions; columns of masked codes (or None for all) call the other head, with all
                arguments and the result of :class:`behrt_jax.models.behrt.BEHRTForMLM`.
            deterministic: no dropout.
            rows: see `models.behrt`.
            packed: see `models.behrt`.
            options: of the other head.

        Returns:
            Log odds, float32 `[batch, segments, questions]`; without meaning where there is no segment.
        """
        mode = deterministic, rows, packed
        if not isinstance(head, Asked):
            masked = BEHRTForMLM(self.config, self.vocabulary_size)
            nn.share_scope(self, masked)  # its parameters have the same paths here as there
            return masked(batch, head, *mode, **options)
        chex.assert_rank([head.codes, head.horizons], 3)
        hidden = BEHRT(self.config, self.vocabulary_size, name="behrt")(batch, *mode)
        ids, segments = jnp.asarray(batch.segment_ids), head.codes.shape[1]
        pooled = [pool_segments(hidden, ids, how, segments) for how in ("mean", "last")]
        table = self.variables["params"]["behrt"]["embeddings"]["code"]["embedding"]
        answers = QueryHead(self.config, self.groups, name="query_head")
        return answers(jnp.concatenate(pooled, axis=-1), head, table)


def example_questions(batch: Batch) -> Asked:
    """One question about the first segment of each row, to initialise or tabulate a model."""
    shape = (batch.codes.shape[0], 1, 1)
    return Asked(jnp.zeros(shape, jnp.int32), jnp.full(shape, TYPICAL_DAYS, jnp.float32))


def pretraining_model(
    config: ModelConfig, vocabulary_size: int, objective: ObjectiveName = "mlm", groups: int = 0
) -> BEHRTForMLM | BEHRTForQueries:
    """The model that an objective of pretraining trains; `groups` of codes are questions of their own."""
    if objective == "mlm":
        return BEHRTForMLM(config, vocabulary_size)
    return BEHRTForQueries(config, vocabulary_size, groups, mlm=objective == "both")


def init_params(model: BEHRTForMLM | BEHRTForQueries, key: jax.Array) -> Tree:
    """First parameters of a model for pretraining, those of all its heads."""
    batch = example_batch(model.config)
    if isinstance(model, BEHRTForMLM):
        return model.init(key, batch)["params"]
    key, other = jax.random.split(key)
    params = model.init(key, batch, example_questions(batch))["params"]
    if model.mlm:
        masked = BEHRTForMLM(model.config, model.vocabulary_size).init(other, batch)["params"]
        params = {**params, "mlm_head": masked["mlm_head"]}
    return params

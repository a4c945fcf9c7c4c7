"""Multi-head self-attention with four plain Dense layers: query, key, value, out."""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.config.model import Attention
from behrt_jax.models.chunked_attention import (
    MASKED,
    Words,
    chunked_attention,
    dropout_words,
    kept,
    product,
    same_segment,
)
from behrt_jax.models.layers import rotate

# Attention by cuDNN, NVIDIA's library: one kernel a pass, without weights in memory (bfloat16 alone).


def segment_mask(segment_ids: jax.Array) -> jax.Array:
    """Mask of who may attend to whom in packed rows: bool `[batch, 1, length, length]`.

    Args:
        segment_ids: subject of each token within its row, int32 `[batch, length]`; 0 is padding.
            Padding attends to padding, so that no row of the softmax is empty.
    """
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


def cudnn_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segment_ids: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
    scale: float = 1.0,
    packed: bool = True,
) -> jax.Array:
    """Attention on an NVIDIA GPU in bfloat16; arguments as in `chunked_attention`, but for the last two.

    Args:
        queries: as the other arguments up to `rows`, see `chunked_attention`.
        keys: see there.
        values: see there.
        segment_ids: see there.
        rate: 0.
        key: not read.
        rows: not read.
        scale: factor on the scores, where `queries` are not scaled yet.
        packed: rows may hold several segments. Without, each holds one and then padding: the length of each
            row takes the place of a mask of all pairs, which is faster.

    Raises:
        ValueError: a dropout rate above 0: cuDNN's bits would not be those of the other forms.
    """
    if rate:
        raise ValueError("cudnn attention has no dropout: set attention_dropout to 0")
    queries, keys, values = (x.transpose(0, 2, 1, 3) for x in (queries, keys, values))  # [B, L, N, K]
    attend = functools.partial(
        jax.nn.dot_product_attention, queries, keys, values, scale=scale, implementation="cudnn"
    )
    if packed:
        mixed = attend(mask=segment_mask(segment_ids))
    else:
        # An empty row reads its first token of padding: a softmax over nothing is no number.
        lengths = jnp.maximum((segment_ids > 0).sum(-1, dtype=jnp.int32), 1)  # [B]
        mixed = attend(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return mixed.transpose(0, 2, 1, 3)


def cudnn_takes(length: int, size: int, dtype: jnp.dtype, rate: float) -> bool:
    """Tell whether cuDNN is there and takes rows of `length` tokens with heads of `size`, in both passes."""
    fits = size % 8 == 0 and size <= 128 and length % 2 == 0
    return fits and dtype == jnp.bfloat16 and rate == 0.0 and has_cudnn()


@functools.cache
def has_cudnn() -> bool:
    """Tell whether JAX computes on an NVIDIA GPU of compute capability 8.0 (Ampere) or later."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; AMD's are "gfx90a"
    return capability[:1].isdigit() and int(capability.split(".")[0]) >= 8


# Attention that holds all weights of a batch at once: the fastest form for short rows.

Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Words]


def dense_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segment_ids: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention within segments (Vaswani et al. 2017); arguments as in `chunked_attention`.

    The softmax is divided by its sum after the product with the values, and the backward pass is spelt out:
    one array of weights is kept for it, whose signs tell what dropout dropped.
    """
    chex.assert_equal_shape([queries, keys, values])
    chex.assert_shape(segment_ids, (queries.shape[0], queries.shape[2]))
    return _attend(rate, (queries, keys, values, segment_ids, dropout_words(rate, key, rows, queries)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rate: float, operands: Operands) -> jax.Array:
    return _forward(rate, operands)[0]


def _forward(rate: float, operands: Operands):
    queries, keys, values, segments, words = operands
    heads, length = queries.shape[1:3]
    scores = product(keys, queries.swapaxes(-1, -2))  # [B, N, S, T]
    scores = jnp.where(same_segment(segments, segments), scores, MASKED)
    weights = jnp.exp(scores - scores.max(-2, keepdims=True))
    total = weights.sum(-2, keepdims=True)  # [B, N, 1, T]
    keep = kept(words, rate, length, (heads, length, length), 0, 0)
    used = weights if keep is None else jnp.where(keep, weights, 0.0)
    mixed = product(values.swapaxes(-1, -2), used.astype(values.dtype))  # [B, N, K, T]
    out = (mixed / (total * (1.0 - rate))).astype(values.dtype)
    signed = weights if keep is None else jnp.where(keep, weights, -weights)
    return out.swapaxes(-1, -2), (operands, out, signed, total)


def _backward(rate: float, saved, gradient: jax.Array):
    (queries, keys, values, *_), out, signed, total = saved
    gradient_across = gradient.swapaxes(-1, -2)  # [B, N, K, T]
    # Sum over keys of weight times its gradient, dropout or not.
    projection = (gradient_across.astype(jnp.float32) * out.astype(jnp.float32)).sum(-2, keepdims=True)
    weights = jnp.abs(signed) / total  # [B, N, S, T]
    used = jnp.maximum(signed, 0.0) / (total * (1.0 - rate))
    by_weight = product(values, gradient_across) / (1.0 - rate)
    by_weight = jnp.where(signed > 0.0, by_weight, 0.0)
    by_score = (weights * (by_weight - projection)).astype(queries.dtype)
    by_query = product(keys.swapaxes(-1, -2), by_score).swapaxes(-1, -2)
    by_key = product(by_score, queries)
    by_value = product(used.astype(values.dtype), gradient)
    return ((*(part.astype(values.dtype) for part in (by_query, by_key, by_value)), None, None),)


_attend.defvjp(_forward, _backward)

CHUNKED_FROM = 512
"""Length of a row from which `auto` takes the chunked form where cuDNN is not to be had."""


FORMS = {"dense": dense_attention, "chunked": chunked_attention, "cudnn": cudnn_attention}


class SelfAttention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017) with a float32 softmax."""

    heads: int
    dropout: float
    dtype: jnp.dtype
    form: Attention = "auto"
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
        rotation: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Attend within segments.

        Args:
            x: `[batch, length, hidden]`.
            segment_ids: subject of each token within its row, int32 `[batch, length]`; 0 is padding.
            deterministic: no dropout.
            rows: number of each row in its batch, int32 `[batch]`, for dropout; 0, 1, ... where not given.
            packed: rows may hold several segments; False is faster in the `cudnn` form where each holds one.
            rotation: of queries and keys, of `layers.rotations`; none where not given.

        Returns:
            `[batch, length, hidden]` in `dtype`.
        """
        batch, length, hidden = x.shape
        size = hidden // self.heads

        def project(name: str, rotation: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
            y = nn.Dense(hidden, dtype=self.dtype, use_bias=self.use_bias, name=name)(x)
            y = y.reshape(batch, length, self.heads, size)
            y = y if rotation is None else rotate(y, rotation)
            return y.transpose(0, 2, 1, 3)  # [B, N, L, K]

        queries, keys, values = project("query", rotation), project("key", rotation), project("value")
        rate = 0.0 if deterministic else self.dropout
        form = self.form
        if form == "auto":
            form = "dense" if length < CHUNKED_FROM else "chunked"
            if cudnn_takes(length, size, self.dtype, rate):
                form = "cudnn"
        if form == "cudnn":  # scales without a pass of its own
            attend = partial(cudnn_attention, scale=size**-0.5, packed=packed)
        else:
            attend, queries = FORMS[form], queries * size**-0.5
        dropout_key = self.make_rng("dropout") if rate else None
        mixed = attend(queries, keys, values, segment_ids, rate=rate, key=dropout_key, rows=rows)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, hidden)  # [B, L, D]
        return nn.Dense(hidden, dtype=self.dtype, use_bias=self.use_bias, name="out")(mixed)

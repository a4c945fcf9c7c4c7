"""Attention that holds all weights of a batch at once: the fastest form for short rows."""

import functools

import chex
import jax
import jax.numpy as jnp

from behrt_jax.models.attention_tiles import MASKED, Words, dropout_words, kept, product, same_segment

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

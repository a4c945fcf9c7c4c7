"""From token vectors to one vector for each subject in a packed row."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

Pooling = Literal["cls", "mean", "max", "last"]


def pool_segments(hidden: jax.Array, segment_ids: jax.Array, how: Pooling, segments: int) -> jax.Array:
    """Pool each segment's tokens.

    Args:
        hidden: `[batch, length, hidden]`.
        segment_ids: int32 `[batch, length]`, 0 for padding, subjects from 1 up.
        how: `cls` takes the vector of the first token (which must be [CLS]), `last` that of the last, `mean`
            and `max` go over all tokens of the segment.
        segments: how many segments to return a row, at least the largest id.

    Returns:
        `[batch, segments, hidden]`; segment `s + 1` at index `s`, zeros where it does not occur.
    """
    chex.assert_rank(hidden, 3)
    chex.assert_shape(segment_ids, hidden.shape[:2])
    ids = jnp.arange(1, segments + 1, dtype=segment_ids.dtype)
    member = segment_ids[:, None, :] == ids[None, :, None]  # [B, S, L]
    present = member.any(axis=-1, keepdims=True)  # [B, S, 1]
    if how == "cls":
        first = jnp.argmax(member, axis=-1)  # [B, S]
        pooled = jnp.take_along_axis(hidden, first[:, :, None], axis=1)  # [B, S, D]
    elif how == "last":
        last = member.shape[-1] - 1 - jnp.argmax(member[:, :, ::-1], axis=-1)  # [B, S]
        pooled = jnp.take_along_axis(hidden, last[:, :, None], axis=1)  # [B, S, D]
    elif how == "mean":
        total = jnp.einsum("bsl,bld->bsd", member.astype(hidden.dtype), hidden)
        pooled = total / jnp.maximum(member.sum(axis=-1, keepdims=True), 1)
    elif how == "max":
        pooled = jax.vmap(lambda rows, ids: jax.ops.segment_max(rows, ids, num_segments=segments + 1)[1:])(
            hidden, segment_ids
        )
    else:
        raise ValueError(f"pooling must be cls, mean, max or last, not {how!r}")
    return jnp.where(present, pooled, 0.0)

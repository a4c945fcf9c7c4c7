"""Dropout whose mask is a counter-based hash, much cheaper than threefry bits.

An element is dropped or kept by a hash of (key, row, index within the row). The key tells run, step and
layer apart; the row is the example's number in its batch. So the mask of an example is the same however a
batch is cut into micro-batches or split over devices.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from behrt_jax.models.platform import on_cpu


def batch_rows(x: jax.Array | np.ndarray) -> jax.Array:
    """Numbers of the rows of a whole batch, int32 `[batch]`, for `x` `[batch, ...]`."""
    return jnp.arange(x.shape[0], dtype=jnp.int32)


def row_words(key: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words for each row, from which the bits of its elements are made: uint32 `[batch]` each.

    Args:
        key: typed PRNG key.
        rows: integers `[batch]`.
    """
    words = jax.random.key_data(key).reshape(-1)
    row = rows.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    first = finalise(finalise(row ^ words[0]) ^ words[-1])
    return first, finalise(first + jnp.uint32(0x9E3779B9))


def bits_at(first: jax.Array, second: jax.Array, index: jax.Array) -> jax.Array:
    """Pseudo-random uint32 bits: a hash of a row's two words and the index of an element in the row.

    The MurmurHash3 finaliser (Appleby, public domain) of the index, keyed at its start and again in its
    middle. Good enough for dropout masks, not for initialisation or sampling.

    Args:
        first: uint32, broadcast against `index`.
        second: uint32, likewise.
        index: uint32 place of the element within its row, as if the row were flat.
    """
    x = index ^ first
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B) ^ second
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def finalise(x: jax.Array) -> jax.Array:
    """MurmurHash3 finaliser, uint32 -> uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def hashed_bits(key: jax.Array, shape: tuple[int, ...], rows: jax.Array | None = None) -> jax.Array:
    """Pseudo-random uint32 bits of the given shape, see :func:`bits_at`.

    Every element depends on its row and its own index alone, so the bits do not change when the array is
    sharded.

    Args:
        key: typed PRNG key.
        shape: shape of the result; its first axis is the rows.
        rows: number of each row, integers `[shape[0]]`; 0, 1, ... where not given.
    """
    index = jnp.zeros((1,) * len(shape), jnp.uint32)
    stride = 1
    for axis in reversed(range(1, len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, (1, *shape[1:]), axis) * jnp.uint32(
            stride & 0xFFFFFFFF
        )
        stride *= shape[axis]
    rows = jnp.arange(shape[0], dtype=jnp.int32) if rows is None else rows
    first, second = (word.reshape(-1, *(1,) * (len(shape) - 1)) for word in row_words(key, rows))
    return bits_at(first, second, index)


def threshold(rate: float) -> int:
    """An element is kept where its bits are at least this."""
    return round(rate * 2**32)


def dropout(key: jax.Array, x: jax.Array, rate: float, rows: jax.Array | None = None) -> jax.Array:
    """Zero each element of `x` with probability `rate` and scale the rest by 1 / (1 - rate).

    Args:
        key: typed PRNG key.
        x: `[batch, ...]`.
        rate: from 0 up to, but not, 1.
        rows: number of each row, see :func:`hashed_bits`.
    """
    return _drop(x, hashed_bits(key, x.shape, rows) >= jnp.uint32(threshold(rate)), 1.0 / (1.0 - rate))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x: jax.Array, keep: jax.Array, factor: float) -> jax.Array:
    return jnp.where(keep, x * factor, jnp.zeros_like(x))


def _forward(x, keep, factor):
    return _drop(x, keep, factor), keep


def _backward(factor, keep, gradient):
    dropped = jnp.where(keep, gradient * factor, jnp.zeros_like(gradient))
    # Without the barrier, a GPU's compiler writes it twice, with and without the factor, and has a slower
    # matrix product read the latter.
    return dropped if on_cpu() else jax.lax.optimization_barrier(dropped), None


_drop.defvjp(_forward, _backward)


class Dropout(nn.Module):
    """Drop-in for ``flax.linen.Dropout`` on the `dropout` PRNG stream."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool, rows: jax.Array | None = None) -> jax.Array:
        """Apply dropout to `x` `[batch, ...]` unless `deterministic` or the rate is 0."""
        if deterministic or self.rate == 0.0:
            return x
        return dropout(self.make_rng("dropout"), x, self.rate, rows)

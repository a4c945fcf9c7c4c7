"""Dropout whose mask is a counter-based hash, much cheaper than threefry bits."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Pseudo-random uint32 bits of the given shape: a hash of (key, index of the element).

    Two rounds of the MurmurHash3 finaliser (Appleby, public domain), one per key word. Good enough
    for dropout masks, not for initialisation or sampling. Every element depends on its own index
    alone, so the bits do not change when the array is sharded.

    Args:
        key: typed PRNG key.
        shape: shape of the result.
    """
    words = jax.random.key_data(key).reshape(-1)
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    return _finalise(_finalise(index ^ words[0]) ^ words[-1])


def _finalise(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Zero each element of `x` with probability `rate` and scale the rest by 1 / (1 - rate)."""
    keep = hashed_bits(key, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class Dropout(nn.Module):
    """Drop-in for ``flax.linen.Dropout`` on the `dropout` PRNG stream."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Apply dropout to `x` (any shape) unless `deterministic` or the rate is 0."""
        if deterministic or self.rate == 0.0:
            return x
        return dropout(self.make_rng("dropout"), x, self.rate)

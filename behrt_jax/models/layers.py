"""What blocks are made of beside matrix products: dropout, GELU, norms, rotations."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def on_cpu() -> bool:
    """Tell whether JAX computes on a CPU by default. Results do not depend on it, up to rounding."""
    return jax.default_backend() == "cpu"


# Dropout whose mask is a counter-based hash, much cheaper than threefry bits.


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


# GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), exact, at half the price of ``jax.nn.gelu``.


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """``x * Phi(x)``, Phi the normal distribution function; same shape and dtype as `x`.

    It is worked out in float32 and rounded once, to bfloat16 where that is the dtype of `x`.

    Phi comes from `erf`. ``jax.nn.gelu(approximate=False)`` takes `erfc`, for which XLA computes two
    approximations and chooses: more digits where the result is next to 0, for twice the time.
    """
    return _gelu_forward(x)[0]


def _phi(x):
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_forward(x):
    wide = x.astype(jnp.float32)
    return (wide * _phi(wide)).astype(x.dtype), x


def _gelu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    density = (2.0 * jnp.pi) ** -0.5 * jnp.exp(-0.5 * wide * wide)
    return ((gradient.astype(jnp.float32) * (_phi(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)

# The sine, at a tenth of the price of ``jnp.sin`` on a CPU, where XLA calls a function for each number.

_PI = (3.140625, 507 / 2**19, 6.27833e-07)
"""Pi as a sum, of whose first two terms products with whole numbers up to 2**15 are exact."""


@jax.custom_vjp
def sine(x: jax.Array) -> jax.Array:
    """``sin(x)`` of float32 `x` up to 100,000 in size, within 2e-7; same shape."""
    return _halves(x)[0]


def _halves(x):
    """Sine and cosine, by their series around the nearest multiple of pi."""
    count = jnp.round(x * (1.0 / np.pi))
    rest = x
    for part in _PI:
        rest = rest - count * part
    sign = 1.0 - 2.0 * (count - 2.0 * jnp.floor(0.5 * count))
    square = rest * rest

    def series(first: int) -> jax.Array:
        """``1 - x**2 / ((first + 1) * (first + 2)) + ...``: the cosine from 0, the sine over x from 1."""
        total = jnp.ones_like(square)
        for term in range(first + 11, first, -2):
            total = 1.0 - square * total * (1.0 / (term * (term + 1)))
        return total

    return sign * rest * series(1), sign * series(0)


sine.defvjp(lambda x: (sine(x), x), lambda x, gradient: (gradient * _halves(x)[1],))

# Norms with backward passes of their own: LayerNorm (Ba et al. 2016, arXiv 1607.06450) and RMSNorm.

EPSILON = 1e-5


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalise the last axis of `x` to mean 0 and variance 1, then scale and shift it.

    Mean and mean of squares come from one pass. The backward pass reads `x` again, in place of the
    several arrays of its size that plain differentiation keeps.

    Args:
        x: `[..., size]`.
        scale: float32 `[size]`.
        bias: float32 `[size]`.

    Returns:
        float32 `[..., size]`.
    """
    return _layer_norm_forward(x, scale, bias)[0]


def _statistics(x):
    mean = x.mean(-1, keepdims=True)  # [..., 1]
    variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    return mean, jax.lax.rsqrt(variance + EPSILON)


def _layer_norm_forward(x, scale, bias):
    mean, inverse = _statistics(x.astype(jnp.float32))
    lead = (1,) * (x.ndim - 1)
    y = (x - mean) * inverse * scale.reshape(*lead, -1) + bias.reshape(*lead, -1)
    return y, (x, mean, inverse, scale)


def _layer_norm_backward(residuals, gradient):
    x, mean, inverse, scale = residuals
    normal = (x - mean) * inverse  # [..., size]
    scaled = gradient * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    along = (scaled * normal).mean(-1, keepdims=True)  # [..., 1]
    dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - normal * along)
    return dx.astype(x.dtype), *_sums(gradient * normal, gradient)


def _sums(left, right):
    """Each summed over all axes but the last."""
    axes = tuple(range(left.ndim - 1))
    if on_cpu():
        return left.sum(axes), right.sum(axes)
    # A GPU's compiler does not see that both read the same arrays, and would read them twice.
    zero = jnp.zeros((), left.dtype)
    return jax.lax.reduce(
        (left, right), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), dimensions=axes
    )


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divide the last axis of `x` by its root mean square, then scale it (arXiv 1910.07467).

    Args:
        x: `[..., size]`.
        scale: float32 `[size]`.

    Returns:
        float32 `[..., size]`.
    """
    return _rms_norm_forward(x, scale)[0]


def _rms_norm_forward(x, scale):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + EPSILON)  # [..., 1]
    return wide * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,)), (x, inverse, scale)


def _rms_norm_backward(residuals, gradient):
    x, inverse, scale = residuals
    normal = x * inverse  # [..., size]
    scaled = gradient * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    dx = inverse * (scaled - normal * (scaled * normal).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (gradient * normal).sum(tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class Norm(nn.Module):
    """LayerNorm or RMSNorm, in float32: parameters `scale` and, of LayerNorm with `use_bias`, `bias`, float32
    `[size]`.
    """

    kind: Literal["layer", "rms"] = "layer"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x` `[..., size]`; float32 out."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        if self.kind == "rms":
            return rms_norm(x, scale)
        if not self.use_bias:
            return layer_norm(x, scale, jnp.zeros(shape, jnp.float32))
        return layer_norm(x, scale, self.param("bias", nn.initializers.zeros, shape, jnp.float32))


# Rotary positions (Su et al. 2021, arXiv 2104.09864).

_DIGIT = 256


def rotations(places: jax.Array, size: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines by which queries and keys at some places are rotated.

    Component pair i turns by ``base ** (-2i / size)`` a step. The angles are tabled in float64 by the two
    digits of a place to the base 256 and added: in float32 the angle of a place in the thousands has lost its
    last digits.

    Args:
        places: int32 `[batch, length]`, from 0 to 65,535, as which larger ones count.
        size: of a head, even.
        base: see `config.model.ModelConfig.rope_base`.

    Returns:
        float32 `[batch, length, size / 2]` each.
    """
    frequencies = base ** (-np.arange(0, size, 2) / size)  # [K / 2]
    digits = np.arange(_DIGIT)[:, None] * frequencies  # [256, K / 2]
    low, high = (
        jnp.asarray(np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32))
        for angle in (digits, _DIGIT * digits)
    )  # [2, 256, K / 2]
    places = jnp.clip(places, 0, _DIGIT**2 - 1)
    (a, b), (c, d) = low[:, places % _DIGIT], high[:, places // _DIGIT]  # [B, L, K / 2]
    return a * c - b * d, b * c + a * d


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each head's vectors, component i together with component ``size / 2 + i``.

    Args:
        x: `[batch, length, heads, size]`.
        rotation: of :func:`rotations`.

    Returns:
        Shape and dtype of `x`; worked out in float32.
    """
    cosines, sines = (part[:, :, None] for part in rotation)  # [B, L, 1, K / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)

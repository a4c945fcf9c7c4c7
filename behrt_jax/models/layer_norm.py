"""LayerNorm (Ba et al. 2016, arXiv 1607.06450) with a backward pass of its own."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.models.platform import on_cpu

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
    return _forward(x, scale, bias)[0]


def _statistics(x):
    mean = x.mean(-1, keepdims=True)  # [..., 1]
    variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    return mean, jax.lax.rsqrt(variance + EPSILON)


def _forward(x, scale, bias):
    mean, inverse = _statistics(x.astype(jnp.float32))
    lead = (1,) * (x.ndim - 1)
    y = (x - mean) * inverse * scale.reshape(*lead, -1) + bias.reshape(*lead, -1)
    return y, (x, mean, inverse, scale)


def _backward(residuals, gradient):
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


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """Drop-in for ``flax.linen.LayerNorm``: parameters `scale` and `bias`, float32 `[size]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x` `[..., size]`; float32 out."""
        size = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (size,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (size,), jnp.float32)
        return layer_norm(x, scale, bias)

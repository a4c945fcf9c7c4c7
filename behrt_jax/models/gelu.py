"""GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), exact, at half the price of ``jax.nn.gelu``."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """``x * Phi(x)``, Phi the normal distribution function; same shape and dtype as `x`.

    It is worked out in float32 and rounded once, to bfloat16 where that is the dtype of `x`.

    Phi comes from `erf`. ``jax.nn.gelu(approximate=False)`` takes `erfc`, for which XLA computes two
    approximations and chooses: more digits where the result is next to 0, for twice the time.
    """
    return _forward(x)[0]


def _phi(x):
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _forward(x):
    wide = x.astype(jnp.float32)
    return (wide * _phi(wide)).astype(x.dtype), x


def _backward(x, gradient):
    wide = x.astype(jnp.float32)
    density = (2.0 * jnp.pi) ** -0.5 * jnp.exp(-0.5 * wide * wide)
    return ((gradient.astype(jnp.float32) * (_phi(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(_forward, _backward)

"""GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), exact, at half the price of ``jax.nn.gelu``."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """``x * Phi(x)``, Phi the normal distribution function; same shape and dtype as `x`.

    Phi comes from `erf`. ``jax.nn.gelu(approximate=False)`` takes `erfc`, for which XLA computes two
    approximations and chooses: more digits where the result is next to 0, for twice the time.
    """
    return x * _phi(x)


def _phi(x):
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _forward(x):
    return x * _phi(x), x


def _backward(x, gradient):
    density = (2.0 * jnp.pi) ** -0.5 * jnp.exp(-0.5 * x * x)
    return (gradient * (_phi(x) + x * density),)


gelu.defvjp(_forward, _backward)

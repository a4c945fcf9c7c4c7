"""The machine's rate of large matrix products, a contender of the training benchmark."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

TURN_SECONDS = 0.02
"""Duration of a turn, about: a host's wait for an accelerator is short beside it."""


def ceiling(task: Mapping[str, Any]) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """A turn's seconds are those of ``flops``, one product or several of the same square matrices."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    dtype = jnp.bfloat16 if task["precision"] == "bfloat16" else jnp.float32

    @jax.jit
    def operands() -> tuple[jax.Array, jax.Array]:
        # Not ones or zeros: a chip draws less power for those, and so runs faster.
        left, right = jax.random.normal(jax.random.key(0), (2, size, size))
        # A product has values about as large as the left matrix, and so has the product of that.
        return left.astype(dtype), (right * size**-0.5).astype(dtype)

    @jax.jit
    def multiply(left: jax.Array, right: jax.Array, products: int) -> jax.Array:
        def product(_: int, x: jax.Array) -> jax.Array:
            return jnp.matmul(x, right, preferred_element_type=dtype)

        return jax.lax.fori_loop(0, products, product, left)

    left, right = operands()

    def run(products: int) -> jax.Array:
        return jax.block_until_ready(multiply(left, right, products))

    run(1)  # compiles
    started = time.perf_counter()
    run(1)
    products = max(1, round(TURN_SECONDS / (time.perf_counter() - started)))
    return lambda index: run(products), {
        "flops": 2.0 * size**3 * products,
        "device": jax.devices()[0].device_kind,
    }

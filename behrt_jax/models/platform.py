"""Where the compiler needs to be told something that holds on one kind of device alone."""

import jax


def on_cpu() -> bool:
    """Whether JAX computes on a CPU by default. Results do not depend on it, up to rounding."""
    return jax.default_backend() == "cpu"

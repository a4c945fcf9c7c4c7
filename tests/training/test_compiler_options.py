"""Compiler options: used where the compiler knows them."""

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.training import compiler_options
from behrt_jax.training.compiler_options import step_options


def test_options_that_this_compiler_does_not_know_are_left_out(monkeypatch):
    known = {"xla_backend_optimization_level": 1}
    monkeypatch.setattr(compiler_options, "CPU_OPTIONS", {**known, "xla_cpu_no_such_option": True})
    step_options.cache_clear()
    try:
        assert step_options("cpu") == known
    finally:
        step_options.cache_clear()
    assert step_options("gpu") is None


def test_a_program_compiles_with_them_and_computes_the_same():
    x = jnp.linspace(-1, 1, 64).reshape(8, 8)

    def products(x):
        return jnp.tanh(x @ x) @ x

    tuned = jax.jit(products, compiler_options=step_options("cpu"))(x)
    np.testing.assert_allclose(tuned, jax.jit(products)(x), rtol=1e-6, atol=1e-6)

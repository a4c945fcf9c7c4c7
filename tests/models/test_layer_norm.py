"""LayerNorm and GELU against the definitions of flax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from behrt_jax.models.layers import EPSILON, LayerNorm, gelu


@pytest.fixture(params=["cpu", "accelerator"])
def sums(request, monkeypatch):
    monkeypatch.setattr("behrt_jax.models.layers.on_cpu", lambda: request.param == "cpu")


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**16), st.floats(-3, 3), st.floats(0.1, 10))
def test_layer_norm_and_its_gradients_are_those_of_flax(dtype, seed, mean, spread):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = (mean + spread * jax.random.normal(keys[0], (3, 5, 16))).astype(dtype)
    weights = jax.random.normal(keys[1], (3, 5, 16))
    params = {"scale": jax.random.normal(keys[2], (16,)), "bias": jax.random.normal(keys[3], (16,))}

    def loss(module):
        return lambda params, x: (module.apply({"params": params}, x).astype(jnp.float32) * weights).sum()

    flax_norm = nn.LayerNorm(EPSILON, dtype=jnp.float32)
    ours = jax.value_and_grad(loss(LayerNorm()), (0, 1))(params, x)
    theirs = jax.value_and_grad(loss(flax_norm), (0, 1))(params, x)
    assert jax.tree.map(lambda a: a.dtype, ours) == jax.tree.map(lambda a: a.dtype, theirs)
    tolerance = 2e-5 if dtype == "float32" else 1e-2  # the gradient of x is rounded to 8 bits
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = float(jnp.abs(b).max()) + float(jnp.abs(weights).max())
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), atol=tolerance * scale)


def test_layer_norm_has_the_parameters_of_flax():
    x = jnp.zeros((1, 4))
    ours, theirs = (module.init(jax.random.key(0), x) for module in (LayerNorm(), nn.LayerNorm()))
    chex.assert_trees_all_equal(ours, theirs)


def test_gelu_and_its_gradient_are_exact():
    x = jnp.linspace(-9, 9, 4001)
    exact = jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(gelu(x), exact, atol=2e-6)
    slopes = (jax.vmap(jax.grad(f))(x) for f in (gelu, lambda x: jax.nn.gelu(x, approximate=False)))
    np.testing.assert_allclose(*slopes, atol=2e-6)


def test_gelu_in_bfloat16_is_rounded_once():
    x = jnp.linspace(-9, 9, 4001).astype(jnp.bfloat16)
    wide, slope = jax.vmap(jax.value_and_grad(gelu))(x.astype(jnp.float32))
    value, gradient = jax.vmap(jax.value_and_grad(gelu))(x)
    for ours, exact in ((value, wide), (gradient, slope)):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))

"""LayerNorm and GELU against the definitions of flax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from behrt_jax.models.layers import EPSILON, Norm, dropout, gelu, hashed_bits, sine


@pytest.fixture(params=["cpu", "accelerator"])
def sums(request, monkeypatch):
    monkeypatch.setattr("behrt_jax.models.layers.on_cpu", lambda: request.param == "cpu")
    return request.param


@functools.cache
def loss_and_gradients(norm, sums):
    """One program for all examples; `sums` tells apart what is traced on a CPU and elsewhere."""
    module = Norm() if norm == "ours" else nn.LayerNorm(EPSILON, dtype=jnp.float32)

    def loss(params, x, weights):
        return (module.apply({"params": params}, x).astype(jnp.float32) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**16), st.floats(-3, 3), st.floats(0.1, 10))
def test_layer_norm_and_its_gradients_are_those_of_flax(sums, dtype, seed, mean, spread):
    rng = np.random.default_rng(seed)
    x = (mean + spread * rng.normal(size=(3, 5, 16))).astype(jnp.dtype(dtype))
    weights, scale, bias = (rng.normal(size=size).astype("f4") for size in ((3, 5, 16), 16, 16))
    params = {"scale": scale, "bias": bias}
    ours = jax.device_get(loss_and_gradients("ours", sums)(params, x, weights))
    theirs = jax.device_get(loss_and_gradients("flax", sums)(params, x, weights))
    assert jax.tree.map(lambda a: a.dtype, ours) == jax.tree.map(lambda a: a.dtype, theirs)
    tolerance = 2e-5 if dtype == "float32" else 1e-2  # the gradient of x is rounded to 8 bits
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = float(np.abs(b).max()) + float(np.abs(weights).max())
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), atol=tolerance * scale)


def test_layer_norm_has_the_parameters_of_flax():
    x = jnp.zeros((1, 4))
    ours, theirs = (module.init(jax.random.key(0), x) for module in (Norm(), nn.LayerNorm()))
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


def test_the_sine_of_large_angles_and_its_gradient_are_those_of_float64():
    rng = np.random.default_rng(0)
    near = np.arange(-500, 500) * np.pi / 2
    x = np.concatenate([near, rng.uniform(-30, 30, 2000), rng.uniform(-1e5, 1e5, 5000)]).astype("f4")
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(sine)))(x)
    np.testing.assert_allclose(value, np.sin(x.astype(np.float64)), atol=2e-7)
    np.testing.assert_allclose(slope, np.cos(x.astype(np.float64)), atol=2e-7)


# Dropout from a counter-based hash.


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_scale(rate):
    x = dropout(jax.random.key(3), jnp.ones((200, 500)), rate)
    kept = np.asarray(x) > 0
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / kept.size)
    np.testing.assert_allclose(np.asarray(x)[kept], 1 / (1 - rate), rtol=1e-6)


def test_bits_are_even_in_every_bit_and_uncorrelated_between_keys_and_neighbours():
    first = np.asarray(hashed_bits(jax.random.key(0), (400, 250)))
    second = np.asarray(hashed_bits(jax.random.key(1), (400, 250)))
    bits = (first[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 0.01
    uniform = first / 2**32 - 0.5
    for other in (second / 2**32 - 0.5, np.roll(uniform, 1, 0), np.roll(uniform, 1, 1)):
        assert abs((uniform * other).mean() * 12) < 0.015
    assert len(np.unique(first)) > 0.99 * first.size


def test_bits_do_not_depend_on_sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(lambda key: hashed_bits(key, (16, 33)), out_shardings=rows)(jax.random.key(5))
    np.testing.assert_array_equal(sharded, hashed_bits(jax.random.key(5), (16, 33)))


def test_bits_go_by_the_number_of_the_row_and_not_by_its_place():
    key, rows = jax.random.key(5), jnp.array([7, 2, 9])
    some = hashed_bits(key, (3, 4, 5), rows)
    whole = hashed_bits(key, (10, 4, 5))
    np.testing.assert_array_equal(some, whole[rows])


def test_masks_of_rows_layers_and_steps_are_independent():
    """Correlations of the masks of many keys and rows, at the same place and shifted, stay at chance."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), layer)
            for step in range(8) for layer in range(8)]  # fmt: skip
    kept = np.stack([np.asarray(hashed_bits(key, (8, 512))) >= 2**32 // 10 for key in keys])
    kept = kept.reshape(-1, 512).astype(np.float64) - 0.9  # [masks, 512]
    correlation = kept @ kept.T / 512 / 0.09
    others = correlation[~np.eye(len(kept), dtype=bool)]
    assert abs(others.mean()) < 5e-3 and np.abs(others).max() < 6.5 / np.sqrt(512)
    for shift in (1, 2, 4, 8, 16, 64, 256):
        along = (kept * np.roll(kept, shift, 1)).mean() / 0.09
        assert abs(along) < 5 / np.sqrt(kept.size), shift
    runs = (kept > 0).all(1).mean()
    assert runs == 0.0  # 0.9 ** 512
    per_mask = (kept > 0).mean(1)
    assert abs(per_mask.std() / np.sqrt(0.09 / 512) - 1) < 0.2


@pytest.mark.parametrize("cpu", [True, False])
def test_gradient_passes_where_a_number_was_kept(cpu, monkeypatch):
    monkeypatch.setattr("behrt_jax.models.layers.on_cpu", lambda: cpu)
    x, gradient = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    keys = jax.random.split(jax.random.key(1), 3)

    def outcome(key, x, gradient):
        out, pull = jax.vjp(lambda x: dropout(key, x, 0.3), x)
        return out, *pull(gradient)

    out, passed = jax.jit(jax.vmap(outcome))(keys, x, gradient)
    kept = np.asarray(out != 0)
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(out, np.where(kept, x / 0.7, 0), rtol=1e-6)
    np.testing.assert_allclose(passed, np.where(kept, gradient / 0.7, 0), rtol=1e-6)

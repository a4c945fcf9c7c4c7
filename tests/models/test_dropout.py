"""Dropout from a counter-based hash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from behrt_jax.models.dropout import dropout, hashed_bits


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

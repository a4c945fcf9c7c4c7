"""Adapters of one rank brought to another, with the same product."""

import jax
import numpy as np
import pytest

from behrt_jax.adapters import lora as ranks

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("layers", [(), (2,)])
def test_adapters_of_a_larger_rank_have_the_same_product_and_are_cut_back(layers):
    a, b = RNG.normal(size=(*layers, 4, 2)), RNG.normal(size=(*layers, 2, 5))
    tree = {"encoder": {"query": {"a": a.astype(np.float32), "b": b.astype(np.float32)}}}
    padded = ranks.pad(tree, 3)
    longer = padded["encoder"]["query"]
    assert longer["a"].shape == (*layers, 4, 3) and longer["b"].shape == (*layers, 3, 5)
    np.testing.assert_allclose(longer["a"] @ longer["b"], a @ b, rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, ranks.cut(padded, 2), tree)
    twice = ranks.scaled(padded, 2.0)["encoder"]["query"]
    np.testing.assert_allclose(twice["a"] @ twice["b"], 2 * a @ b, rtol=1e-4, atol=1e-6)

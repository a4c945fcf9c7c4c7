"""Which layers are adapted, and each one's rank and scale."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from behrt_jax.adapters import lora
from behrt_jax.adapters.lora import scale
from behrt_jax.adapters.targets import adapted_layers
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.models.stacked_layers import stack_layers, unstack_layers
from tests.models.rows import VOCABULARY, random_batch, tiny_model

MODEL = BEHRTForMLM(tiny_model(layers=2), VOCABULARY)
QUERIES = tuple(("behrt", "encoder", f"layer_{layer}", "attention", "query") for layer in range(2))
BY_PATTERN = LoRAConfig(
    rank=4,
    alpha=6.0,
    targets=("query", "out", "intermediate", "output"),
    exclude=("behrt/encoder/layer_0/output",),
    rank_pattern=("behrt/encoder/layer_1/*/query=1", "query=3", "out=2"),
    alpha_pattern=("intermediate=2.5",),
)


@pytest.fixture(scope="module")
def params():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0), example_batch(MODEL.config))["params"])


@pytest.fixture(scope="module")
def adapters(params):
    fresh = jax.device_get(jax.jit(partial(lora.init, config=BY_PATTERN))(jax.random.key(1), params))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), fresh)


def test_rank_and_alpha_by_pattern_and_layers_left_out(params, adapters):
    found = {layer.name: layer for layer in adapted_layers(params, BY_PATTERN)}
    encoder = "behrt/encoder/layer_"
    assert f"{encoder}0/output" not in found and f"{encoder}1/output" in found
    ranks = {"0/attention/query": 3, "1/attention/query": 1, "0/attention/out": 2, "0/intermediate": 4}
    assert {place: found[encoder + place].rank for place in ranks} == ranks  # the first that matches counts
    for name, layer in found.items():
        leaves = lora.leaves_by_path(adapters)
        path = tuple(name.split("/"))
        assert leaves[(*path, "a")].shape == (layer.inputs, layer.rank)
        assert leaves[(*path, "b")].shape == (layer.rank, layer.outputs)
    assert {layer.alpha for name, layer in found.items() if name.endswith("intermediate")} == {2.5}


def test_scale_goes_by_the_layer():
    assert [scale(BY_PATTERN, path) for path in QUERIES] == [6.0 / 3, 6.0]
    assert scale(BY_PATTERN, ("x", "intermediate")) == 2.5 / 4
    assert scale(BY_PATTERN) == 1.5
    stabilised = LoRAConfig(rank=16, rank_pattern=("query=4",), rank_stabilised=True)
    assert scale(stabilised, QUERIES[0]) == 8.0 / 2  # alpha is twice the layer's own rank


@pytest.mark.parametrize("product", ["activations", "extended", "merged"])
def test_every_product_and_merging_use_each_layers_own_scale(params, adapters, product):
    batch = random_batch(1)
    kernels, pairs = lora.leaves_by_path(params), lora.leaves_by_path(adapters)
    for path in lora.layer_paths(adapters):
        rank = pairs[(*path, "a")].shape[1]
        factor = (2.5 if path[-1] == "intermediate" else 6.0) / rank
        kernels[(*path, "kernel")] = (
            kernels[(*path, "kernel")] + factor * pairs[(*path, "a")] @ pairs[(*path, "b")]
        )
    expected = lora.unflatten_dict(kernels)
    chex.assert_trees_all_close(lora.merge(params, adapters, BY_PATTERN), expected, rtol=1e-5, atol=1e-6)

    @jax.jit
    def both(adapters):
        with lora.applying(BY_PATTERN, product):
            adapted = MODEL.apply({"params": params, "lora": adapters}, batch)
        return adapted, MODEL.apply({"params": expected}, batch)

    ours, theirs = both(adapters)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    before = lora.merge(params, lora.with_scale(adapters, BY_PATTERN), LoRAConfig(rank=1, alpha=1.0))
    chex.assert_trees_all_close(before, expected, rtol=1e-5, atol=1e-6)


def test_padding_goes_to_each_layers_own_rank_and_back(adapters):
    wide = LoRAConfig(rank=6, rank_pattern=("query=5", "out=2"))
    padded = lora.pad(adapters, wide)
    widths = {
        path[-2]: leaf.shape[1] for path, leaf in lora.leaves_by_path(padded).items() if path[-1] == "a"
    }
    assert widths == {"query": 5, "out": 2, "intermediate": 6, "output": 6}
    chex.assert_trees_all_equal(lora.cut(padded, BY_PATTERN), adapters)


def test_stacked_layers_have_patterns_that_are_alike(params):
    stacked = stack_layers(params)
    config = LoRAConfig(rank=4, targets=("query", "out"), rank_pattern=("behrt/encoder/layer_*/*/query=3",))
    ours = jax.device_get(jax.jit(partial(lora.init, config=config))(jax.random.key(1), stacked))
    assert ours["behrt"]["encoder"]["layers"]["attention"]["query"]["a"].shape == (2, 16, 3)
    moved = jax.tree.map(lambda leaf: leaf + np.float32(0.1), ours)
    merged = unstack_layers(lora.merge(stacked, moved, config))
    expected = lora.merge(unstack_layers(stacked), unstack_layers(moved), config)
    chex.assert_trees_all_close(merged, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match=r"layer_1/\S+key has another rank or alpha.*scan_layers off"):
        adapted_layers(stacked, LoRAConfig(rank_pattern=("behrt/encoder/layer_1/*=2",)))
    with pytest.raises(InputError, match=r"layer_1/\S+out is not among the targets"):
        adapted_layers(stacked, LoRAConfig(exclude=("behrt/encoder/layer_1/*/out",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude": ("output",)}, r"exclude: 'output' matches no layer among the targets.*key, out, que"),
        ({"exclude": ("*",)}, "lora.exclude leaves out every layer"),
        ({"rank_pattern": ("output=2",)}, r"rank_pattern: 'output' matches no adapted layer.*key, out, que"),
        ({"alpha_pattern": ("qery=2",)}, "lora.alpha_pattern: 'qery' matches no adapted layer"),
        ({"rank_pattern": ("query=x",)}, "lora.rank_pattern has 'query=x': give PATTERN=NUMBER"),
        ({"rank_pattern": ("query",)}, "lora.rank_pattern has 'query': give PATTERN=NUMBER"),
        ({"rank_pattern": ("query=0",)}, "lora.rank_pattern is 0"),
        ({"alpha_pattern": ("query=-1",)}, "lora.alpha_pattern is -1"),
        ({"alpha_pattern": ("query=nan",)}, "lora.alpha_pattern is nan"),
        ({"rank": 17}, r"layer_0/attention/key is of 16 to 16, but its adapter has rank 17: give 16"),
        ({"rank_pattern": ("out=17",)}, r"attention/out is of 16 to 16, but its adapter has rank 17"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named_with_what_exists(params, changes, message):
    with pytest.raises(InputError, match=message):
        adapted_layers(params, LoRAConfig(**changes))


def test_a_factor_for_each_layer(adapters):
    paths = lora.layer_paths(adapters)
    scaled = lora.scaled(adapters, jnp.arange(len(paths), dtype=jnp.float32))
    for number, path in enumerate(paths):
        before, after = (lora.leaves_by_path(tree) for tree in (adapters, scaled))
        np.testing.assert_array_equal(after[(*path, "a")], before[(*path, "a")])
        np.testing.assert_array_equal(after[(*path, "b")], number * before[(*path, "b")])

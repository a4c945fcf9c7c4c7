"""Stacked and scanned layers against layers one by one."""

from functools import partial
from itertools import combinations

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.adapters import lora
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.models.layers import Dropout
from behrt_jax.models.stacked_layers import count_stacked_layers, stack_layers, unstack_layers, with_layout_of
from tests.models.rows import VOCABULARY, random_batch, tiny_model

LAYERS = 3
SCANNED = BEHRTForMLM(tiny_model(layers=LAYERS, scan_layers=True), VOCABULARY)
UNROLLED = BEHRTForMLM(tiny_model(layers=LAYERS), VOCABULARY)
ADAPTERS = LoRAConfig(rank=2, targets=("query", "out", "intermediate", "mlm_head/dense"))


@pytest.fixture(scope="module")
def variables():
    """Of the scanned model, adapters included, none of them zero."""
    params = jax.jit(SCANNED.init)(jax.random.key(0), example_batch(SCANNED.config))["params"]
    adapters = jax.jit(lora.init, static_argnums=2)(jax.random.key(1), params, ADAPTERS)
    rng = np.random.default_rng(2)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f4"), jax.device_get(adapters))
    return jax.device_put({"params": params, "lora": moved})


@partial(jax.jit, static_argnames=("model", "product"))
def loss_and_gradients(model, variables, batch, product="activations"):
    """Of logits and all; `merged` gives adapters their gradients, and the kernels beneath them none."""

    def loss(variables):
        with lora.applying(ADAPTERS, product):
            logits = model.apply(variables, batch)
        return (logits**2).mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(variables)


@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("product", ["activations", "merged"])
def test_scanned_layers_compute_what_layers_one_by_one_do(variables, product, rematerialise):
    batch = random_batch(0)
    model = SCANNED.clone(config=tiny_model(layers=LAYERS, scan_layers=True, rematerialise=rematerialise))
    (loss, logits), gradients = loss_and_gradients(model, variables, batch, product)
    (expected, their_logits), theirs = loss_and_gradients(UNROLLED, unstack_layers(variables), batch, product)
    np.testing.assert_allclose(logits, their_logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    chex.assert_trees_all_close(unstack_layers(gradients), theirs, rtol=1e-4, atol=1e-7)
    assert all(
        np.abs(leaf).max(axis=(1, 2)).min() > 0 for leaf in jax.tree.leaves(gradients["lora"]["behrt"])
    )


def test_every_layer_starts_from_values_of_its_own(variables):
    layers = variables["params"]["behrt"]["encoder"]["layers"]
    kernel = np.asarray(layers["attention"]["query"]["kernel"])
    chex.assert_shape(kernel, (LAYERS, 16, 16))
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-2
    one = jax.jit(UNROLLED.init)(jax.random.key(0), example_batch(UNROLLED.config))["params"]["behrt"][
        "encoder"
    ]
    spread = np.asarray(one["layer_0"]["attention"]["query"]["kernel"]).std()
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), spread, rtol=0.25)


def zeros_of(model, variables, module_is, config):
    """Where the outputs of some modules of the encoder are zero, under dropout: bool `[layers, ...]` each."""

    @jax.jit
    def outputs(variables):
        with lora.applying(config, deterministic=False):
            _, seen = model.apply(
                variables, random_batch(1), deterministic=False, rngs={"dropout": jax.random.key(5)},
                capture_intermediates=lambda module, _: module_is(module), mutable=["intermediates"],
            )  # fmt: skip
        return seen["intermediates"]["behrt"]["encoder"]

    found = flatten_dict(outputs(variables))
    return [np.asarray(leaf[0]) == 0 for leaf in found.values()]


def test_dropout_of_the_model_differs_from_layer_to_layer(variables):
    model = SCANNED.clone(config=tiny_model(layers=LAYERS, scan_layers=True, dropout=0.5))
    masks = zeros_of(model, variables, lambda module: isinstance(module, Dropout), ADAPTERS)
    assert masks
    for mask in masks:
        assert len(mask) == LAYERS
        assert all((one ^ other).mean() > 0.1 for one, other in combinations(mask, 2))


def test_dropout_of_adapters_differs_from_layer_to_layer(variables):
    """The layer gives just what the adapter lets through: its kernel is zero, the adapter the identity."""
    config = LoRAConfig(rank=16, dropout=0.5, targets=("out",))
    identity = np.tile(np.eye(16, dtype=np.float32), (LAYERS, 1, 1))
    params = flatten_dict(variables["params"], sep="/")
    for name in ("kernel", "bias"):
        params[f"behrt/encoder/layers/attention/out/{name}"] = np.zeros_like(
            params[f"behrt/encoder/layers/attention/out/{name}"]
        )
    adapters = {"behrt/encoder/layers/attention/out": {"a": identity, "b": identity}}
    trees = {"params": unflatten_dict(params, sep="/"), "lora": unflatten_dict(adapters, sep="/")}
    model = SCANNED.clone(config=tiny_model(layers=LAYERS, scan_layers=True, dropout=0.0))
    (mask,) = zeros_of(model, trees, lambda module: module.name == "out", config)
    assert len(mask) == LAYERS
    np.testing.assert_allclose(mask.mean(axis=(1, 2, 3)), 0.5, atol=0.1)
    assert all((one ^ other).mean() > 0.3 for one, other in combinations(mask, 2))


def test_layouts_convert_into_each_other(variables):
    apart = unstack_layers(variables)
    assert (count_stacked_layers(variables), count_stacked_layers(apart)) == (LAYERS, 0)
    shapes = jax.eval_shape(UNROLLED.init, jax.random.key(0), example_batch(UNROLLED.config))["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(apart["params"], shapes)
    chex.assert_trees_all_equal(stack_layers(apart), variables)
    for tree in (variables, apart):
        chex.assert_trees_all_equal(with_layout_of(True, tree), variables)
        chex.assert_trees_all_equal(with_layout_of(False, tree), apart)
    host = jax.tree.map(np.asarray, variables)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stack_layers(unstack_layers(host))))


@given(st.integers(1, 12), st.integers(0, 3), st.booleans())
def test_any_number_of_layers_goes_there_and_back(layers, rank, others):
    stacked = {"layers": {"x": np.arange(layers * 2.0).reshape(layers, 2, *[1] * rank)}}
    tree = {"behrt": {"encoder": stacked}} | ({"mlm_head": {"layer": np.ones(3)}} if others else {})
    apart = unstack_layers(tree)
    assert list(apart["behrt"]["encoder"]) == [f"layer_{i}" for i in range(layers)]
    chex.assert_trees_all_equal(stack_layers(apart), tree)
    shuffled = dict(reversed(apart["behrt"]["encoder"].items()))
    chex.assert_trees_all_equal(stack_layers({**apart, "behrt": {"encoder": shuffled}}), tree)


def test_layers_that_are_not_alike_cannot_be_stacked():
    x = np.ones((2, 3))
    with pytest.raises(
        InputError, match="encoder/layers/query/a cannot be stacked: layer_0 has no such leaf"
    ):
        stack_layers({"encoder": {"layer_1": {"query": {"a": x}}}})
    with pytest.raises(InputError, match="encoder/layers/a cannot be stacked: layer_1 has no such leaf"):
        stack_layers({"encoder": {"layer_0": {"a": x, "b": x}, "layer_1": {"b": x}}})
    with pytest.raises(InputError, match="encoder/layers/a cannot be stacked: layer_2 has no such leaf"):
        stack_layers({"encoder": {"layer_0": {"a": x}, "layer_1": {"a": x}}}, layers=3)
    with pytest.raises(InputError, match="encoder/layers/b cannot be stacked: the shapes"):
        stack_layers({"encoder": {"layer_0": {"b": x}, "layer_1": {"b": x.T}}})

"""Adapters on stacked layers: the same as on layers one by one."""

import chex
import jax
import numpy as np
import pytest

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import load_adapter, save_adapter
from behrt_jax.config import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, example_inputs
from behrt_jax.models.stacked_layers import stack_layers, unstack_layers
from tests.models.rows import VOCABULARY, tiny_model

CONFIG = LoRAConfig(rank=3, targets=("query", "intermediate", "mlm_head/dense"))


@pytest.fixture(scope="module")
def stacked():
    model = BEHRTForMLM(tiny_model(layers=3, scan_layers=True), VOCABULARY)
    return jax.jit(model.init)(jax.random.key(0), *example_inputs(model.config))["params"]


def moved(adapters):
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapters)


def test_fresh_adapters_are_those_of_layers_one_by_one(stacked):
    ours = lora.init(jax.random.key(1), stacked, CONFIG)
    chex.assert_shape(ours["behrt"]["encoder"]["layers"]["intermediate"]["a"], (3, 16, 3))
    chex.assert_shape(ours["behrt"]["encoder"]["layers"]["intermediate"]["b"], (3, 3, 64))
    theirs = lora.init(jax.random.key(1), unstack_layers(stacked), CONFIG)
    chex.assert_trees_all_equal(unstack_layers(ours), theirs)
    a = ours["behrt"]["encoder"]["layers"]["attention"]["query"]["a"]
    assert np.abs(a[0] - a[1]).max() > 0.01


def test_merging_is_that_of_layers_one_by_one_and_can_be_undone(stacked):
    adapters = moved(lora.init(jax.random.key(1), stacked, CONFIG))
    merged = lora.merge(stacked, adapters, CONFIG)
    theirs = lora.merge(unstack_layers(stacked), unstack_layers(adapters), CONFIG)
    chex.assert_trees_all_close(unstack_layers(merged), theirs, rtol=1e-6, atol=1e-7)
    kernel = ("behrt", "encoder", "layers", "attention", "query", "kernel")
    before, after = (flatten(tree)[kernel] for tree in (stacked, merged))
    assert np.abs(after - before).max(axis=(1, 2)).min() > 0.01
    chex.assert_trees_all_close(lora.unmerge(merged, adapters, CONFIG), stacked, atol=1e-6)


def flatten(tree):
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_layers_are_named_as_if_they_were_apart(stacked):
    config = LoRAConfig(targets=("out", "behrt/encoder/layer_*/attention/query"))
    ours, theirs = (lora.adapted_layers(tree, config) for tree in (stacked, unstack_layers(stacked)))
    assert {layer.name for layer in ours} == {layer.name for layer in theirs}
    assert len(ours) == len(theirs) == 6
    assert {(layer.inputs, layer.outputs) for layer in ours} == {(16, 16)}


def test_single_layers_of_a_stack_cannot_be_adapted(stacked):
    with pytest.raises(InputError, match=r"layer_1/\S+ is not among the targets.*layer_\*.*scan_layers off"):
        lora.adapted_layers(stacked, LoRAConfig(targets=("behrt/encoder/layer_0/*",)))
    each = tuple(f"behrt/encoder/layer_{layer}/*" for layer in range(3))
    assert len(lora.adapted_layers(stacked, LoRAConfig(targets=each))) == 3 * 6


@pytest.mark.parametrize("saved_stacked", [True, False])
@pytest.mark.parametrize("loaded_stacked", [True, False])
def test_an_adapter_file_fits_its_base_in_either_layout(stacked, tmp_path, saved_stacked, loaded_stacked):
    def layout(tree, wanted):
        return tree if wanted else unstack_layers(tree)

    adapters = moved(lora.init(jax.random.key(1), stacked, CONFIG))
    params = layout(stacked, saved_stacked)

    def trains(path, _):  # some of what is stacked trains, some does not
        return any(key.key in ("mlm_head", "ffn_norm") for key in path)

    save_adapter(
        tmp_path / "adapter",
        params=params,
        lora=layout(adapters, saved_stacked),
        trained=jax.tree_util.tree_map_with_path(trains, params),
        lora_config={"rank": 3},
        model_config={},
        vocabulary_fingerprint="v",
    )
    other = jax.tree_util.tree_map_with_path(lambda p, x: x + 1.0 if trains(p, x) else x, stacked)
    found_params, found_lora, config = load_adapter(tmp_path / "adapter", layout(other, loaded_stacked))
    chex.assert_trees_all_equal(found_params, layout(stacked, loaded_stacked))
    chex.assert_trees_all_equal(found_lora, layout(adapters, loaded_stacked))
    assert "lora/behrt/encoder/layer_2/attention/query/a" in config["tensors"]

    changed = jax.tree.map(lambda x: x, other)
    kernel = changed["behrt"]["encoder"]["layers"]["output"]["kernel"]
    changed["behrt"]["encoder"]["layers"]["output"]["kernel"] = kernel.at[2, 0, 0].add(1.0)
    with pytest.raises(InputError, match="frozen parameters differ"):
        load_adapter(tmp_path / "adapter", layout(changed, loaded_stacked))


@pytest.mark.parametrize(("layer", "missing"), [(0, 1), (1, 0)])
def test_an_adapter_on_some_layers_does_not_fit_a_stack(stacked, tmp_path, layer, missing):
    params = unstack_layers(stacked)
    config = LoRAConfig(rank=3, targets=(f"behrt/encoder/layer_{layer}/attention/query",))
    adapters = lora.init(jax.random.key(1), params, config)
    save_adapter(
        tmp_path / "adapter",
        params=params,
        lora=adapters,
        trained=jax.tree.map(lambda _: False, params),
        lora_config={"rank": 3},
        model_config={},
        vocabulary_fingerprint="v",
    )
    with pytest.raises(InputError, match=f"query/a cannot be stacked: layer_{missing} has no"):
        load_adapter(tmp_path / "adapter", stack_layers(params))

"""Training with stacked layers: the same steps as with layers one by one, and nothing left behind."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from behrt_jax.config import FreezingConfig, LoRAConfig, OptimizerConfig, PretrainConfig
from behrt_jax.models.stacked_layers import unstack_layers
from behrt_jax.training.devices import put_rows
from behrt_jax.training.optimizer import make_optimizer
from behrt_jax.training.state import set_up
from behrt_jax.training.telemetry import make_probe
from behrt_jax.workflows.facts import unreached_adapters
from tests.models.rows import VOCABULARY, random_batch, tiny_model
from tests.training.test_step import on_host, start

LAYERS = 3
STACKED = PretrainConfig(
    model=tiny_model(layers=LAYERS, scan_layers=True, dropout=0.0),
    lora=LoRAConfig(rank=2, targets=("query", "out", "intermediate", "output")),
    freezing=FreezingConfig("lora"),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0),
)
APART = replace(STACKED, model=replace(STACKED.model, scan_layers=False))


def after_steps(config, steps, variables=None, optimizer=None):
    """Host copies of the variables, before and after, and the losses."""
    _, state, step, mesh = start(config, optimizer=optimizer)
    if variables is not None:
        state = state._replace(variables=jax.device_put(variables, state.step.sharding))
    before, losses = on_host(state.variables), []
    for index in range(steps):
        state, totals = step(state, put_rows(random_batch(index), mesh))
        losses.append(float(totals["loss"] / totals["targets"]))
    return before, on_host(state.variables), losses


@pytest.mark.slow
@pytest.mark.parametrize("product", ["activations", "merged"])
@pytest.mark.parametrize("rematerialise", [False, True])
def test_after_two_steps_every_layers_adapter_has_moved_and_the_base_is_bit_identical(product, rematerialise):
    config = replace(STACKED, lora=replace(STACKED.lora, product=product))
    config = replace(config, model=replace(config.model, rematerialise=rematerialise, dropout=0.1))
    before, after, _ = after_steps(config, 2)
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), unstack_layers(before), unstack_layers(after))
    moved = flatten_dict(moved, sep="/")
    trains = {name: name.startswith("lora/") or "embeddings" in name or "head" in name for name in moved}
    assert moved == trains
    assert sum(name.startswith("lora/") for name in moved) == 2 * 4 * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["lora", "full", "all_but_adapted"])
def test_the_same_start_trains_the_same_way_in_both_layouts(regime):
    """By plain gradient descent: Adam would blow up the rounding of gradients that are zero."""
    ours, theirs = (replace(config, freezing=FreezingConfig(regime)) for config in (STACKED, APART))
    before, after, losses = after_steps(ours, 3, optimizer=optax.sgd(0.3))
    _, expected, their_losses = after_steps(theirs, 3, unstack_layers(before), optax.sgd(0.3))
    np.testing.assert_allclose(losses, their_losses, rtol=1e-5)
    chex.assert_trees_all_close(unstack_layers(after), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [STACKED, APART], ids=["stacked", "apart"])
def test_weight_decay_falls_on_matrices_and_never_on_vectors(config):
    variables = set_up(config, VOCABULARY).shapes
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
    labels = jax.tree.map(lambda _: "base", variables)
    decay = replace(config.optimizer, weight_decay=0.5)
    optimizer = make_optimizer(decay, 10, labels)
    nothing = jax.tree.map(jnp.zeros_like, variables)
    updates, _ = optimizer.update(nothing, optimizer.init(variables), variables)
    for path, update in flatten_dict(updates).items():
        decays = path[-1] in ("kernel", "embedding", "a", "b")
        np.testing.assert_allclose(update, -5e-3 if decays else 0.0, rtol=1e-6, err_msg="/".join(path))


def test_the_adapter_that_moved_least_is_named_with_its_layer():
    _, state, _, _ = start(STACKED)
    adapters = jax.tree.map(lambda x: x + 0.0, state.variables["lora"])
    probe = make_probe(adapters, np.zeros(VOCABULARY), 1)
    moved = jax.tree.map(lambda x: x.at[:, 0].add(1.0), adapters)
    out = moved["behrt"]["encoder"]["layers"]["attention"]["out"]
    for part, leaf in adapters["behrt"]["encoder"]["layers"]["attention"]["out"].items():
        out[part] = out[part].at[2].set(leaf[2])
    least = probe(state._replace(variables={**state.variables, "lora": moved}))["adapters"]
    assert {value["layer"] for value in least.values()} == {"behrt/encoder/layer_2/attention/out"}
    assert max(value["movement"] for value in least.values()) < 1e-6


def test_adapters_on_stacked_layers_are_reached(monkeypatch):
    assert unreached_adapters(set_up(STACKED, VOCABULARY)) == []
    from behrt_jax.adapters import lora

    # Adapters that nothing applies are found in stacked layers as well.
    monkeypatch.setattr(lora, "activation_product", lambda x, a, b, *_: x[..., :1] * b.sum())
    config = replace(STACKED, lora=replace(STACKED.lora, product="activations"))
    unreached = unreached_adapters(set_up(config, VOCABULARY))
    assert len(unreached) == 4
    assert all("encoder/layers" in name and name.endswith("/a") for name in unreached)

"""The train step: what moves, what stays, and equal results by different ways."""

import re
from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from behrt_jax import presets
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig
from behrt_jax.data.batches import Batch
from behrt_jax.models.behrt import example_batch
from behrt_jax.models.stacked_layers import unstack_layers
from behrt_jax.training.devices import make_mesh, put_rows, replicated, shardings_of
from behrt_jax.training.freezing import REGIMES, trainable_leaves
from behrt_jax.training.masking import mask_codes
from behrt_jax.training.optimizer import make_optimizer
from behrt_jax.training.state import LARGE as LARGE_LEAF
from behrt_jax.training.state import abstract_state, init_state, optimizer_for, set_up
from behrt_jax.training.step import TrainState, make_update_step, masked_code_losses, masked_code_objective
from behrt_jax.training.telemetry import make_probe
from behrt_jax.training.validation import make_scoring_step, make_validation_step
from behrt_jax.workflows.checks import unreached_adapters
from tests.models.rows import MODERN, VOCABULARY, random_batch, tiny_model

ALL_LINEARS = ("query", "key", "value", "out", "intermediate", "output")
TINY = PretrainConfig(
    model=tiny_model(),
    lora=LoRAConfig(rank=2, targets=ALL_LINEARS),
    freezing=FreezingConfig("lora"),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0),
)
# Where nothing is about layers, one of them compiles more quickly.
SHALLOW = replace(TINY, model=tiny_model(layers=1))
OF_TODAY = replace(
    TINY,
    model=tiny_model(layers=1, **MODERN),
    lora=LoRAConfig(rank=2, targets=(*ALL_LINEARS, "gate")),
)
SGD = optax.sgd(0.5)


@cache
def first_variables(config):
    """Of a model and its adapters, on the host."""
    setup, mesh = set_up(config, VOCABULARY), make_mesh(jax.devices()[:1])
    init_key, _ = jax.random.split(jax.random.key(0))
    return jax.device_get(init_state(setup, optax.identity(), init_key, mesh).variables)


def first_state(config, optimizer, abstract):
    """As `init_state` makes it; what is drawn at random is drawn once for all that begin alike."""
    model = replace(config.model, dropout=0.0, head_chunk=None)
    adapters = config.lora and replace(config.lora, dropout=0.0, product="auto")
    variables = first_variables(PretrainConfig(model=model, lora=adapters))
    state = TrainState(np.zeros((), np.int32), variables, jax.jit(optimizer.init)(variables))
    return jax.device_put(state, shardings_of(abstract))


@cache
def built(config, mesh, micro_batches, optimizer, large, options):
    """Setup, first state and jitted step, once for all tests that ask for the same."""
    setup = set_up(config, VOCABULARY, mesh)
    optimizer = optimizer or optimizer_for(config.optimizer, setup, total_steps=100)
    _, step_key = jax.random.split(jax.random.key(0))
    state = first_state(config, optimizer, abstract_state(setup.shapes, optimizer, mesh, large))
    step = jax.jit(
        make_update_step(
            masked_code_objective(setup.predictor, config.masking, **dict(options)),
            optimizer, setup.mask, step_key,
            clip_norm=config.optimizer.clip_norm, micro_batches=micro_batches,
        ),
        donate_argnums=0,
        out_shardings=(shardings_of(state), replicated(mesh)),
    )  # fmt: skip
    return setup, state, step


def start(config, devices=None, micro_batches=1, optimizer=None, mesh=None, large=LARGE_LEAF, **options):
    """Setup, first state and jitted step of a configuration."""
    mesh = mesh or make_mesh(devices or jax.devices()[:1])
    setup, state, step = built(config, mesh, micro_batches, optimizer, large, tuple(options.items()))
    # A copy: the step takes the memory of its state over.
    return setup, jax.device_put(state, shardings_of(state), may_alias=False), step, mesh


def run(config, steps, batches=None, **options):
    _, state, step, mesh = start(config, **options)
    metrics = []
    for index in range(steps):
        batch = random_batch(index, rows=8) if batches is None else batches[index]
        state, totals = step(state, put_rows(batch, mesh))
        totals = jax.device_get(totals)
        del totals["gradient_squares"]  # some are of rounding alone, such as those of a key's bias
        metrics.append(totals)
    return jax.device_get(state), metrics


def sgd(config, steps, batches=None, **options):
    """As :func:`run`, by plain gradient descent: Adam divides a gradient by its own size, and would
    blow the rounding of a near-zero one up to a whole step.
    """
    return run(config, steps, batches, optimizer=SGD, **options)


def on_host(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize(
    ("config", "product"),
    [(TINY, "activations"), (SHALLOW, "extended"), (OF_TODAY, "merged")],
)
def test_after_two_steps_every_adapter_has_moved_and_the_base_is_bit_identical(config, product):
    config = replace(config, lora=replace(config.lora, product=product))
    setup, state, step, mesh = start(config)
    before = on_host(state.variables)
    for index in range(2):
        state, _ = step(state, put_rows(random_batch(index), mesh))
    after = on_host(state.variables)
    flat_mask, flat_before = flatten_dict(setup.mask), flatten_dict(before)
    for path, leaf in flatten_dict(after).items():
        moved = not np.array_equal(leaf, flat_before[path])
        assert moved == flat_mask[path], path
        if path[0] == "lora":
            assert moved, path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "base"),
    [
        *((regime, SHALLOW) for regime in REGIMES),
        *((regime, OF_TODAY) for regime in ("lora_only", "all_but_adapted")),
    ],
    ids=lambda value: {SHALLOW: "shallow", OF_TODAY: "of today"}.get(value),
)
def test_each_regime_moves_its_leaves_and_no_other(regime, base):
    config = replace(base, lora=LoRAConfig(rank=2, targets=("out",)), freezing=FreezingConfig(regime))
    setup, state, step, mesh = start(config)
    before = on_host(state.variables)
    for index in range(3):
        state, _ = step(state, put_rows(random_batch(index), mesh))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, on_host(state.variables))
    for path, trains in flatten_dict(setup.mask).items():
        assert flatten_dict(moved)[path] == trains, path


@pytest.mark.slow
def test_clipping_and_gradient_norm_are_over_trainable_leaves_alone():
    config = replace(SHALLOW, optimizer=replace(TINY.optimizer, clip_norm=1e-3))
    setup, state, step, mesh = start(config)
    batch = random_batch(0)
    _, step_key = jax.random.split(jax.random.key(0))
    mask_key, dropout_key = jax.random.split(step_key)
    variables = on_host(state.variables)

    def loss(variables):
        masked = mask_codes(
            jax.random.fold_in(mask_key, 0), batch.codes, batch.row_ids, config.masking, VOCABULARY
        )
        shown = batch._replace(codes=masked.codes)
        key = jax.random.fold_in(dropout_key, 0)
        logits = setup.predictor.outputs(variables, shown, masked.columns, key)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), masked.labels[..., None], -1)[..., 0]
        return jnp.where(masked.weights, losses, 0.0).sum() / masked.weights.sum()

    leaves = trainable_leaves(jax.jit(jax.grad(loss))(variables), setup.mask)
    expected = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in leaves))
    _, totals = step(state, put_rows(batch, mesh))
    np.testing.assert_allclose(totals["gradient_norm"], expected, rtol=1e-4)


@pytest.mark.parametrize("adapter_dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_micro_batches_equal_one_batch(adapter_dropout):
    """Dropout is on: an example's masks do not depend on the part that it is in."""
    config = replace(SHALLOW, lora=replace(TINY.lora, dropout=adapter_dropout))
    whole, whole_metrics = sgd(config, 3)
    parts, parts_metrics = sgd(config, 3, micro_batches=4)
    chex.assert_trees_all_close(whole.variables, parts.variables, atol=1e-6, rtol=1e-5)
    chex.assert_trees_all_close(whole_metrics, parts_metrics, rtol=1e-5)


@pytest.mark.slow
def test_uneven_micro_batches_are_weighted_by_their_targets():
    """Parts with many and with few targets: the mean over targets, not the mean of means."""
    model = tiny_model(layers=1, dropout=0.0)
    config = replace(TINY, model=model, optimizer=replace(TINY.optimizer, clip_norm=None))
    batch = random_batch(0, rows=4)
    # Micro-batch p has the rows p and p + 2: the second has four or five tokens a row.
    keep = np.array([True, False, True, False])[:, None] | (np.arange(batch.codes.shape[1]) < 5)
    sparse = Batch(*(np.where(keep, x, 0).astype(x.dtype) for x in batch[:-1]), row_ids=batch.row_ids)
    whole, metrics = sgd(config, 1, [sparse])
    parts, parts_metrics = sgd(config, 1, [sparse], micro_batches=2)
    chex.assert_trees_all_close(whole.variables, parts.variables, atol=1e-6, rtol=1e-5)
    chex.assert_trees_all_close(metrics, parts_metrics, rtol=1e-5)


def test_eight_devices_equal_one():
    one, one_metrics = sgd(SHALLOW, 4)
    eight, eight_metrics = sgd(SHALLOW, 4, devices=jax.devices())
    chex.assert_trees_all_close(one_metrics, eight_metrics, rtol=1e-5)
    chex.assert_trees_all_close(one.variables, eight.variables, atol=1e-6, rtol=1e-5)


def test_a_tied_decoder_in_parts_on_eight_devices_trains_as_whole_on_one():
    """The code table, which the first and the last layer share, gets the gradients of both."""
    one, one_metrics = sgd(OF_TODAY, 2)
    many, many_metrics = sgd(in_parts(OF_TODAY), 2, devices=jax.devices())
    chex.assert_trees_all_close(one_metrics, many_metrics, rtol=1e-5)
    # Embeddings of size 0.04 are normalised: the rounding of their gradients is 25 times that of others.
    chex.assert_trees_all_close(one.variables, many.variables, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_empty_rows_change_nothing():
    config = replace(TINY, model=tiny_model(layers=1, dropout=0.0))
    batch = random_batch(0, rows=4)
    padded = Batch(
        *(np.concatenate([x, np.zeros_like(x)]) for x in batch[:-1]), np.r_[batch.row_ids, -np.ones(4)]
    )
    padded = padded._replace(row_ids=padded.row_ids.astype(np.int32))
    without, _ = sgd(config, 1, [batch])
    with_empty, _ = sgd(config, 1, [padded])
    chex.assert_trees_all_close(without.variables, with_empty.variables, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_masks_are_new_at_each_step_unless_they_are_static():
    """The first historic data mistake, reproduced on demand."""
    model = tiny_model(layers=1, dropout=0.0)
    config = replace(TINY, model=model, optimizer=replace(TINY.optimizer, learning_rate=1e-12))
    batch = random_batch(0, rows=8)
    _, fresh = run(config, 3, [batch] * 3)
    _, static = run(config, 3, [batch] * 3, static_masks=True)
    assert len({float(metrics["loss"]) for metrics in fresh}) == 3
    np.testing.assert_allclose([metrics["loss"] for metrics in static], static[0]["loss"], rtol=1e-5)


def test_validation_is_repeatable_and_without_dropout():
    setup, state, _, mesh = start(replace(TINY, model=tiny_model(layers=1, dropout=0.5)))
    validation = jax.jit(make_validation_step(setup.predictor, TINY.masking, jax.random.key(1)))
    batch = put_rows(random_batch(0), mesh)
    chex.assert_trees_all_equal(validation(state.variables, batch), validation(state.variables, batch))


def test_a_group_has_its_own_learning_rate_and_weight_decay():
    rates = replace(TINY.optimizer.learning_rates, head=1e-12)
    decays = replace(TINY.optimizer.weight_decays, embedding=10.0)
    optimizer = replace(TINY.optimizer, learning_rates=rates, weight_decay=0.0, weight_decays=decays)
    config = replace(SHALLOW, optimizer=optimizer)
    _, state, step, mesh = start(config)
    before = on_host(state.variables["params"])
    state, _ = step(state, put_rows(random_batch(0), mesh))
    after = on_host(state.variables["params"])
    chex.assert_trees_all_close(before["mlm_head"], after["mlm_head"], atol=1e-9)
    # Nothing but decay acts on the row of a code that is not in the batch: factor 1 - 1e-2 * 10.
    tables = [tree["behrt"]["embeddings"]["code"]["embedding"] for tree in (before, after)]
    np.testing.assert_allclose(tables[1][0], 0.9 * tables[0][0], rtol=1e-5)
    # Vectors do not decay: LayerNorm's scale, 1 at first, moves by the rate at most.
    scales = after["behrt"]["embeddings"]["norm"]["scale"]
    assert np.abs(scales - 1.0).max() < 1.01e-2


# Two layers: each further one adds what the second does.
LARGE = replace(presets.LARGE, layers=2)


@cache
def compiled_flops(config, forward_alone=False):
    """FLOPs of the compiled train step, with clipping on and the gradient norm returned; or of its loss."""
    setup = set_up(config, 1000)
    optimizer = optimizer_for(config.optimizer, setup, total_steps=100)
    objective = masked_code_objective(setup.predictor, config.masking)
    step = make_update_step(objective, optimizer, setup.mask, jax.random.key(0), clip_norm=1.0)
    mesh = make_mesh(jax.devices()[:1])
    state = abstract_state(setup.shapes, optimizer, mesh)
    batch = example_batch(config.model, 128)

    def loss(state, batch):
        masked = mask_codes(jax.random.key(0), batch.codes, batch.row_ids, config.masking, 1000)
        return masked_code_losses(setup.predictor, state.variables, batch, masked, jax.random.key(1)).loss

    function = jax.jit(loss) if forward_alone else jax.jit(step, donate_argnums=0)
    return function.lower(state, batch).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_a_step_with_adapters_takes_little_more_than_twice_the_forward_pass():
    adapters = LoRAConfig(rank=16, targets=ALL_LINEARS)
    config = PretrainConfig(model=LARGE, lora=adapters, freezing=FreezingConfig("lora"))
    forward = compiled_flops(config, forward_alone=True)
    # Twice for the frozen layers, 0.1 for the products of rank 16, 0.06 for attention's second product.
    assert 1.9 < compiled_flops(config) / forward <= 2.20
    full = PretrainConfig(model=LARGE)
    assert compiled_flops(full) / compiled_flops(full, forward_alone=True) > 2.5


@pytest.mark.slow
def test_compiled_flops_of_the_lora_step_of_large():
    """Frozen gradients are never computed, although the norm is clipped and logged."""
    full = compiled_flops(PretrainConfig(model=LARGE))
    for product in ("merged", "extended", "activations"):
        adapters = LoRAConfig(rank=16, product=product)
        adapted = compiled_flops(PretrainConfig(model=LARGE, lora=adapters, freezing=FreezingConfig("lora")))
        assert adapted / full < 0.80, product
    plain = PretrainConfig(model=LARGE, lora=LoRAConfig(rank=16, product="activations"))
    assert compiled_flops(plain) / full > 1.0  # nothing frozen: the measure itself can tell


# Training with the vocabulary in parts equals training with all logits.


CHUNK = 17  # of a vocabulary of 60


def in_parts(config: PretrainConfig) -> PretrainConfig:
    return replace(config, model=replace(config.model, head_chunk=CHUNK))


def assert_equal_training(config, **options):
    whole, whole_metrics = sgd(config, 3, **options)
    parts, parts_metrics = sgd(in_parts(config), 3, **options)
    chex.assert_trees_all_close(whole_metrics, parts_metrics, rtol=1e-5)
    chex.assert_trees_all_close(whole.variables, parts.variables, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "regime"),
    [
        (LoRAConfig(rank=2, targets=("out",)), "lora_only"),
        (LoRAConfig(rank=2, targets=("mlm_head/decoder", "query")), "lora_only"),
        (LoRAConfig(rank=2, targets=("mlm_head/decoder",)), "lora"),
    ],
)
def test_equal_training(lora, regime):
    assert_equal_training(replace(SHALLOW, lora=lora, freezing=FreezingConfig(regime)))


@pytest.mark.slow
def test_equal_training_by_micro_batches_on_eight_devices():
    one, one_metrics = sgd(SHALLOW, 2)
    many, many_metrics = sgd(in_parts(SHALLOW), 2, devices=jax.devices()[:4], micro_batches=2)
    chex.assert_trees_all_close(one_metrics, many_metrics, rtol=1e-5)
    chex.assert_trees_all_close(one.variables, many.variables, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [make_validation_step, make_scoring_step])
def test_equal_validation(make):
    results = []
    for config in (SHALLOW, in_parts(SHALLOW)):
        setup, state, _, mesh = start(config)
        step = jax.jit(make(setup.predictor, config.masking, jax.random.key(1)))
        results.append(jax.device_get(step(state.variables, put_rows(random_batch(0), mesh))))
    chex.assert_trees_all_close(*results, rtol=1e-5)


def products(regime):
    """Shapes of the compiled step's matrix products, as the HLO writes them."""
    config = replace(
        in_parts(SHALLOW), lora=LoRAConfig(rank=2, targets=("out",)), freezing=FreezingConfig(regime)
    )
    _, state, step, mesh = start(config)
    program = step.lower(state, put_rows(random_batch(0, rows=5), mesh)).compile().as_text()
    return set(re.findall(r"= f32(\[[0-9,]+\])\S* dot\(", program))


@pytest.mark.slow
def test_the_frozen_head_costs_no_gradient_of_its_kernel():
    # 60 codes in parts of at most 17 are four parts of 15; the hidden size is 16, and there are 20
    # slots for masked codes.
    assert {"[16,15]", "[15,16]"} & products("lora_pretrained")
    assert not {"[16,15]", "[15,16]"} & products("lora_only")


# Training with stacked layers: the same steps as with layers one by one, and nothing left behind.


LAYERS = 2
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
@pytest.mark.parametrize(("product", "rematerialise"), [("activations", True), ("merged", False)])
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
@pytest.mark.parametrize("regime", ["full", "all_but_adapted"])
def test_the_same_start_trains_the_same_way_in_both_layouts(regime):
    """By plain gradient descent: Adam would blow up the rounding of gradients that are zero."""
    ours, theirs = (replace(config, freezing=FreezingConfig(regime)) for config in (STACKED, APART))
    optimizer = optax.sgd(0.3)
    before, after, losses = after_steps(ours, 3, optimizer=optimizer)
    _, expected, their_losses = after_steps(theirs, 3, unstack_layers(before), optimizer)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-5)
    chex.assert_trees_all_close(unstack_layers(after), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [STACKED, APART], ids=["stacked", "apart"])
def test_weight_decay_falls_on_matrices_and_never_on_vectors(config):
    variables = set_up(config, VOCABULARY).shapes
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    labels = jax.tree.map(lambda _: "base", variables)
    decay = replace(config.optimizer, weight_decay=0.5)
    optimizer = make_optimizer(decay, 10, labels)
    nothing = jax.tree.map(np.zeros_like, variables)
    opt_state = jax.jit(optimizer.init)(variables)
    updates, _ = jax.jit(optimizer.update)(nothing, opt_state, variables)
    for path, update in flatten_dict(updates).items():
        decays = path[-1] in ("kernel", "embedding", "a", "b")
        np.testing.assert_allclose(update, -5e-3 if decays else 0.0, rtol=1e-6, err_msg="/".join(path))


def test_the_adapter_that_moved_least_is_named_with_its_layer():
    _, state, _, _ = start(STACKED)
    adapters = on_host(state.variables["lora"])
    probe = make_probe(adapters, np.zeros(VOCABULARY), 1)
    moved = on_host(adapters)
    for leaf in jax.tree.leaves(moved):
        leaf[:, 0] += 1.0
    out = moved["behrt"]["encoder"]["layers"]["attention"]["out"]
    for part, leaf in adapters["behrt"]["encoder"]["layers"]["attention"]["out"].items():
        out[part][1] = leaf[1]
    least = probe(state._replace(variables={**state.variables, "lora": moved}))["adapters"]
    assert {value["layer"] for value in least.values()} == {"behrt/encoder/layer_1/attention/out"}
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

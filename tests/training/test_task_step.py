"""The steps of labelled tasks: equal results by different ways, what moves and what it costs."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from behrt_jax import presets
from behrt_jax.config.training import OptimizerConfig
from behrt_jax.data.batches import Batch, TaskBatch
from behrt_jax.models.behrt import BEHRTForTask
from behrt_jax.training.devices import make_mesh, put_rows
from behrt_jax.training.state import abstract_state, optimizer_for, set_up_task, with_encoder
from behrt_jax.training.step import make_update_step, task_objective
from behrt_jax.training.validation import make_output_step
from tests.models.rows import padded_segment, tiny_model
from tests.training.labelled import (
    REGIMES,
    SEGMENTS,
    TASKS,
    first_variables,
    labelled_batch,
    run,
    set_up,
    start,
)

BINARY = TASKS["binary"]


def noisy(variables, scale=0.3):
    """Variables with noise on every leaf: adapters that do something, a head that tells classes apart."""
    leaves, treedef = jax.tree.flatten(variables)
    rng = np.random.default_rng(9)
    return treedef.unflatten(
        [leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )


def alone(batch, row, segment):
    """One example of a packed batch in a padded row of its own."""
    one = padded_segment(batch.rows, row, segment + 1)
    cells = (slice(row, row + 1), slice(segment, segment + 1))
    return TaskBatch(one, *(values[cells] for values in batch[1:]))


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_packed_equals_padded(pooling):
    task = TASKS["multiclass"]
    setup = set_up(task, "lora", pooling=pooling)
    variables = noisy(first_variables(task, "lora"))
    output_step = jax.jit(make_output_step(setup.predictor))
    batch = labelled_batch(1, task, rows=2)
    packed = np.asarray(output_step(variables, batch))
    assert packed.shape == (2, SEGMENTS, 3)
    for row, segment in np.argwhere(batch.examples >= 0):
        found = np.asarray(output_step(variables, alone(batch, row, segment)))[0, 0]
        np.testing.assert_allclose(found, packed[row, segment], rtol=1e-5, atol=1e-5)


def test_the_last_vector_is_that_of_the_last_event():
    """Without attention to others, so that it is told apart from every other event's."""
    setup = set_up(BINARY, pooling="last")
    variables = noisy(first_variables(BINARY))
    output_step = jax.jit(make_output_step(setup.predictor))
    batch = labelled_batch(1, BINARY, rows=1)
    from behrt_jax.models.behrt import BEHRT

    rows = batch.rows
    encoder = BEHRT(setup.predictor.model.config, setup.predictor.model.vocabulary_size)
    hidden = jax.jit(encoder.apply)({"params": variables["params"]["behrt"]}, rows)
    head = variables["params"]["task_head"]["dense"]
    for segment in range(SEGMENTS):
        last = np.flatnonzero(rows.segment_ids[0] == segment + 1)[-1]
        expected = np.asarray(hidden)[0, last] @ head["kernel"] + head["bias"]
        found = np.asarray(output_step(variables, batch))[0, segment]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_events_of_other_segments_change_nothing():
    setup = set_up(BINARY)
    variables = noisy(first_variables(BINARY))
    output_step = jax.jit(make_output_step(setup.predictor))
    batch = labelled_batch(2, BINARY, rows=1)
    before = np.asarray(output_step(variables, batch))[0]
    others = batch.rows.segment_ids > 1
    codes = np.where(others, 5 + (batch.rows.codes + 7) % 50, batch.rows.codes)
    ages = np.where(others, batch.rows.ages / 2 + 11, batch.rows.ages)
    changed = batch._replace(
        rows=batch.rows._replace(codes=codes.astype(np.int32), ages=ages.astype(np.float32))
    )
    after = np.asarray(output_step(variables, changed))[0]
    np.testing.assert_array_equal(after[0], before[0])
    assert (np.abs(after[1:] - before[1:]) > 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [("multiclass", {"devices": jax.devices()}), ("survival", {"micro_batches": 4})],
    ids=["devices", "micro_batches"],
)
def test_eight_devices_and_four_micro_batches_equal_one(kind, options):
    """Losses, gradient norms and parameters. Dropout is on, and parts differ in their number of examples."""
    task = TASKS[kind]
    setup = set_up(task, dropout=0.1)
    batches = [labelled_batch(seed, task) for seed in range(2)]
    whole, figures = run(setup, task, batches)
    divided, of_divided = run(setup, task, batches, **options)
    assert figures[0]["targets"] == batches[0].weights.sum()
    chex.assert_trees_all_close(figures, of_divided, rtol=1e-5)
    chex.assert_trees_all_close(whole.variables, divided.variables, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_empty_rows_and_segments_change_nothing():
    setup = set_up(BINARY)
    batch = labelled_batch(1, BINARY, rows=4)
    more = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    more.rows.row_ids[4:] = -1
    more.examples[4:] = -1
    without, figures = run(setup, BINARY, [batch])
    filled, figures_filled = run(setup, BINARY, [more])
    chex.assert_trees_all_close(figures, figures_filled, rtol=1e-5)
    chex.assert_trees_all_close(without.variables, filled.variables, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_merged_adapters_equal_those_on_activations():
    setup = set_up(BINARY, "lora")
    assert setup.predictor.product == "merged"
    activations = setup._replace(predictor=setup.predictor._replace(product="activations"))
    batches = [labelled_batch(seed, BINARY) for seed in range(3)]
    merged, figures = run(setup, BINARY, batches)
    other, other_figures = run(activations, BINARY, batches)
    chex.assert_trees_all_close(figures, other_figures, rtol=1e-5)
    chex.assert_trees_all_close(merged.variables, other.variables, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("regime", REGIMES)
def test_what_trains_moves_and_what_is_frozen_stays_bit_for_bit(regime):
    setup = set_up(BINARY, regime)
    config = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, schedule="constant")
    state, step, mesh = start(setup, BINARY, optimizer=optimizer_for(config, setup, 10))
    before = jax.tree.map(np.array, state.variables)
    for seed in range(3):
        state, _ = step(state, put_rows(labelled_batch(seed, BINARY), mesh))
    after = flatten_dict(jax.tree.map(np.array, state.variables))
    mask = flatten_dict(setup.mask)
    for path, leaf in flatten_dict(before).items():
        assert np.array_equal(after[path], leaf) != mask[path], path
    groups = {path[:2] if path[0] == "params" else path[:1] for path, trains in mask.items() if trains}
    expected = {("params", "task_head")}
    expected |= {"full": {("params", "behrt")}, "lora": {("lora",)}, "probe": set()}[regime]
    assert groups == expected
    assert step._cache_size() == 1


def test_training_begins_at_the_base_rate_with_the_encoder_that_is_given():
    task = TASKS["multiclass"]
    setup = set_up(task, "lora")
    state, _, _ = start(setup, task)
    encoder = noisy(jax.tree.map(np.array, state.variables["params"]["behrt"]))
    head = np.array(state.variables["params"]["task_head"]["dense"]["bias"])
    targets = labelled_batch(0, task).targets.reshape(24, -1)
    np.testing.assert_array_equal(head, task.of.base_outputs(targets, task.outputs))
    state = with_encoder(state, encoder)
    chex.assert_trees_all_equal(jax.tree.map(np.array, state.variables["params"]["behrt"]), encoder)
    np.testing.assert_array_equal(state.variables["params"]["task_head"]["dense"]["bias"], head)
    # Adapters do nothing at first.
    batch = labelled_batch(1, task)
    plain = setup.predictor._replace(lora=None)
    without = jax.jit(make_output_step(plain))(state.variables, batch)
    np.testing.assert_array_equal(jax.jit(make_output_step(setup.predictor))(state.variables, batch), without)


# Two layers: each further one adds what the second does.
LARGE = replace(presets.LARGE, layers=2)


def compiled_flops(regime, product=None):
    adapters, freezing = REGIMES[regime]
    setup = set_up_task(BEHRTForTask(LARGE, 1000, 1), adapters, freezing)
    if product is not None:
        setup = setup._replace(predictor=setup.predictor._replace(product=product))
    optimizer = optax.sgd(0.1)
    step = make_update_step(
        task_objective(setup.predictor, "sigmoid"),
        optimizer,
        setup.mask,
        jax.random.key(0),
        clip_norm=1.0,
    )
    state = abstract_state(setup.shapes, optimizer, make_mesh(jax.devices()[:1]))
    rows, length = 4, LARGE.positions

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct((rows, *sizes), dtype)

    kinds = (jnp.int32, jnp.float32, jnp.int32, jnp.int32, jnp.int32, jnp.int32)
    batch = TaskBatch(
        Batch(*(shape(kind, length) for kind in kinds), row_ids=shape(jnp.int32)),
        shape(jnp.int32, SEGMENTS),
        shape(jnp.float32, SEGMENTS, 1),
        shape(jnp.float32, SEGMENTS),
    )
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_compiled_flops_of_frozen_encoders_are_below_those_of_full_training():
    """Frozen gradients are never computed, although the norm is clipped and logged."""
    full = compiled_flops("full")
    for product in ("merged", "activations"):
        assert compiled_flops("lora", product) / full < 0.85, product
    assert compiled_flops("probe") / full < 0.45


def test_a_regime_that_trains_nothing_of_the_encoder_needs_no_adapters():
    setup = set_up_task(BEHRTForTask(tiny_model(), 60, 1), *REGIMES["probe"])
    assert setup.layers == [] and setup.shapes["lora"] == {}

"""The encoder: shapes, packing, causes and effects, numerics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from behrt_jax.models.behrt import BEHRT, EACH, BEHRTForMLM, PatientEmbedding, age_bins, example_batch
from behrt_jax.presets import LARGE, MEDIUM, PAPER, SMALL
from tests.models.rows import VOCABULARY, padded_segment, random_batch, tiny_model

PAPER_LIKE = {
    "embedding_size": 16,
    "position_embedding": "sinusoidal",
    "position_of": "visit",
    "visit_embedding": "alternating",
    "age_bin_years": 1 / 12,
    "age_rows": 1321,
}


@functools.cache
def initialised(config):
    model = BEHRTForMLM(config, VOCABULARY)
    return model, jax.jit(model.init)(jax.random.key(0), example_batch(config))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, batch, columns, dropout_key):
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply(variables, batch, columns, deterministic=rngs is None, rngs=rngs)


def logits_of(model, variables, batch, columns=None, dropout_key=None) -> np.ndarray:
    """One program for each model and shape, in place of one for each operation."""
    return jax.device_get(_logits(model, variables, batch, columns, dropout_key))


@pytest.mark.parametrize("changes", [{}, PAPER_LIKE, {"ffn_size": 20, "compute_dtype": "bfloat16"}])
def test_logits_have_the_stated_shape_and_dtype(changes):
    model, variables = initialised(tiny_model(**changes))
    batch = random_batch(0)
    chex.assert_shape(logits_of(model, variables, batch), (4, 24, VOCABULARY))
    logits = logits_of(model, variables, batch, np.zeros((4, 7), np.int32))
    chex.assert_shape(logits, (4, 7, VOCABULARY))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("facts", [0, 2])
@pytest.mark.parametrize("changes", [{}, PAPER_LIKE])
def test_packed_logits_equal_padded_logits(changes, facts):
    model, variables = initialised(tiny_model(**changes))
    batch = random_batch(1)
    is_fact = (batch.segment_ids > 0) & (batch.positions < facts)
    batch = batch._replace(visits=np.where(is_fact, -1, batch.visits))
    packed = logits_of(model, variables, batch)
    for row in range(4):
        for segment in (1, 2, 3):
            there = batch.segment_ids[row] == segment
            alone = logits_of(model, variables, padded_segment(batch, row, segment))
            np.testing.assert_allclose(alone[0, : there.sum()], packed[row, there], rtol=1e-5, atol=1e-6)


def test_no_gradient_flows_between_subjects_of_a_row():
    config = tiny_model()
    model, variables = initialised(config)
    batch = random_batch(2)
    first = batch.segment_ids == 1

    @jax.jit
    @jax.grad
    def gradient_of_first_subject(table):
        params = jax.tree.map(lambda x: x, variables["params"])
        params["behrt"]["embeddings"]["code"]["embedding"] = table
        logits = model.apply({"params": params}, batch)
        return jnp.where(first[:, :, None], logits, 0.0).sum()

    table = variables["params"]["behrt"]["embeddings"]["code"]["embedding"]
    gradient = jax.device_get(gradient_of_first_subject(table))
    used = np.unique(batch.codes[first])
    unused = np.setdiff1d(np.arange(VOCABULARY), used)
    assert np.abs(gradient[used]).max() > 0
    np.testing.assert_array_equal(gradient[unused], 0.0)


def test_head_at_targets_equals_head_everywhere():
    model, variables = initialised(tiny_model())
    batch = random_batch(3)
    columns = np.array([[0, 5, 2], [1, 1, 9], [3, 4, 8], [23, 0, 11]])
    everywhere = logits_of(model, variables, batch)
    chosen = logits_of(model, variables, batch, columns)
    # Sums of terms of the size of 0.04, added up in another order: near zero only the absolute error counts.
    same = np.take_along_axis(everywhere, columns[:, :, None], 1)
    np.testing.assert_allclose(chosen, same, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["codes", "ages", "visits", "positions"])
def test_every_input_matters(name):
    model, variables = initialised(tiny_model())
    batch = random_batch(4)
    changed = batch._replace(**{name: (getattr(batch, name) + 7) % 20})
    real = batch.segment_ids > 0
    difference = logits_of(model, variables, batch) - logits_of(model, variables, changed)
    assert np.abs(difference[real]).max() > 1e-3


def test_an_unknown_age_has_the_last_row():
    ages = np.array([-0.5, 0.0, 4.99, 5.0, 104.9, 105.0, 9999.0, np.nan], np.float32)
    assert age_bins(ages, 5.0, 22).tolist() == [0, 0, 0, 1, 20, 21, 21, 21]


def test_age_zero_and_visit_zero_are_not_padding():
    """A newborn's first visit is embedded by rows of its own, and attended to."""
    model, variables = initialised(tiny_model())
    batch = random_batch(5, segments=1)
    newborn = batch._replace(ages=np.zeros_like(batch.ages), visits=np.zeros_like(batch.visits))
    other = newborn._replace(codes=np.where(newborn.positions == 0, 7, newborn.codes).astype(np.int32))
    difference = logits_of(model, variables, newborn) - logits_of(model, variables, other)
    elsewhere = (batch.segment_ids > 0) & (batch.positions > 0) & (newborn.codes[:, :1] != 7)
    assert np.abs(difference[elsewhere]).max() > 1e-4


def test_rematerialisation_changes_no_gradient():
    batch = random_batch(6)

    def gradient(rematerialise):
        model, variables = initialised(tiny_model(rematerialise=rematerialise))
        return jax.jit(jax.grad(lambda v: (model.apply(v, batch) ** 2).mean()))(variables)

    chex.assert_trees_all_close(gradient(True), gradient(False), rtol=1e-5, atol=1e-7)


def test_bfloat16_is_close_to_float32():
    model, variables = initialised(tiny_model())
    half = BEHRTForMLM(tiny_model(compute_dtype="bfloat16"), VOCABULARY)
    batch = random_batch(7)
    real = batch.segment_ids > 0
    whole = logits_of(model, variables, batch)[real]
    difference = np.abs(whole - logits_of(half, variables, batch)[real]).max()
    assert 0 < difference < 0.05 * np.abs(whole).max()


def test_dropout_needs_a_key_and_changes_the_output():
    model, variables = initialised(tiny_model(dropout=0.5))
    batch = random_batch(8)
    still = logits_of(model, variables, batch)
    noisy = logits_of(model, variables, batch, dropout_key=jax.random.key(1))
    assert np.abs(still - noisy).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cls", "mean", "max", "attention"])
def test_pooled_packed_subjects_equal_padded_ones(how):
    config = tiny_model(cls_token=True)
    model = PatientEmbedding(config, VOCABULARY, how)
    behrt = BEHRT(config, VOCABULARY)
    batch = random_batch(9)
    variables = jax.jit(model.init, static_argnames="segments")(jax.random.key(0), batch, segments=4)
    pooled = jax.jit(model.apply, static_argnames="segments")(variables, batch, segments=4)
    chex.assert_shape(pooled, (4, 4, config.hidden_size))
    hidden = jax.device_get(jax.jit(behrt.apply)({"params": variables["params"]["behrt"]}, batch))
    query = jax.random.normal(jax.random.key(2), (config.hidden_size, config.heads))
    if how == "attention":  # begins as the mean, and then weighs by a query for each head
        np.testing.assert_array_equal(variables["params"]["pooling_head"]["query"], 0.0)
        variables["params"]["pooling_head"]["query"] = query
        pooled = jax.jit(model.apply, static_argnames="segments")(variables, batch, segments=4)

    def attended(own):
        weights = jax.nn.softmax(own @ query, axis=0)  # [L, H]
        parts = np.split(own, config.heads, axis=1)
        return np.concatenate([weights[:, h] @ part for h, part in enumerate(parts)])

    reduce = {
        "cls": lambda x: x[0],
        "mean": lambda x: x.mean(0),
        "max": lambda x: x.max(0),
        "attention": attended,
    }[how]
    for row in range(4):
        for segment in (1, 2, 3):
            own = hidden[row, batch.segment_ids[row] == segment]
            np.testing.assert_allclose(pooled[row, segment - 1], reduce(own), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pooled[:, 3], 0.0)


def test_a_search_computes_every_pooling_and_takes_the_chosen_one():
    config, batch = tiny_model(layers=1), random_batch(9)
    each = PatientEmbedding(config, VOCABULARY, "each")
    variables = jax.jit(each.init, static_argnames="segments")(jax.random.key(0), batch, segments=4)
    query = jax.random.normal(jax.random.key(2), (config.hidden_size, config.heads))
    for place, how in enumerate(EACH):
        choice = jnp.arange(len(EACH)) == place
        heads = {"query": query, "choice": choice.astype(jnp.float32)}
        found = each.apply({"params": {**variables["params"], "pooling_head": heads}}, batch, segments=4)
        own = {"behrt": variables["params"]["behrt"]}
        if how == "attention":
            own["pooling_head"] = {"query": query}
        alone = PatientEmbedding(config, VOCABULARY, how).apply({"params": own}, batch, segments=4)
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)


def test_cls_pooling_without_a_cls_token_is_refused():
    model = PatientEmbedding(tiny_model(), VOCABULARY, "cls")
    with pytest.raises(ValueError, match="cls_token"):
        model.init(jax.random.key(0), random_batch(0), segments=3)


@pytest.mark.parametrize("config", [SMALL, MEDIUM, LARGE, PAPER], ids=["small", "medium", "large", "paper"])
def test_tabulate(config):
    table = BEHRTForMLM(config, 1000).tabulate(
        jax.random.key(0), example_batch(config), console_kwargs={"width": 200, "force_terminal": False}
    )
    assert "mlm_head" in table
    assert "Total Parameters" in table


# Rematerialised blocks: the same gradients from less memory, for one more forward pass.


LAYERS, LENGTH = 6, 96


def compiled(scan_layers, rematerialise, dropout=0.1):
    config = tiny_model(
        layers=LAYERS, hidden_size=32, positions=LENGTH, dropout=dropout,
        scan_layers=scan_layers, rematerialise=rematerialise,
    )  # fmt: skip
    model = BEHRTForMLM(config, VOCABULARY)
    params = jax.jit(model.init)(jax.random.key(0), example_batch(config))["params"]
    batch = random_batch(0, rows=8, length=LENGTH)

    def loss(params):
        return (
            model.apply({"params": params}, batch, deterministic=False, rngs={"dropout": jax.random.key(1)})
            ** 2
        ).mean()

    return params, jax.jit(jax.value_and_grad(loss)).lower(params).compile()


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_equal_gradients_for_another_forward_pass_and_from_less_memory_in_a_loop(scan_layers):
    params, kept = compiled(scan_layers, False)
    _, again = compiled(scan_layers, True)
    chex.assert_trees_all_close(again(params), kept(params), rtol=1e-4, atol=1e-7)
    if scan_layers:
        # XLA's CPU backend recomputes blocks that are not in a loop all at once, and saves nothing by it.
        bytes_kept, bytes_again = (run.memory_analysis().temp_size_in_bytes for run in (kept, again))
        assert bytes_again < 0.5 * bytes_kept
    else:  # not the whole of a forward pass again: XLA finds some of it twice. (A loop is counted once.)
        flops = again.cost_analysis()["flops"] / kept.cost_analysis()["flops"]
        assert 1.05 < flops < 1.4

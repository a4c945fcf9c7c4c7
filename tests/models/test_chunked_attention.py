"""Attention in tiles and attention at once: the same values, gradients and dropout."""

import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from behrt_jax.adapters import lora
from behrt_jax.config.model import LoRAConfig
from behrt_jax.models.attention import (
    SelfAttention,
    cudnn_attention,
    cudnn_takes,
    dense_attention,
    has_cudnn,
    segment_mask,
)
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.models.chunked_attention import chunked_attention
from behrt_jax.models.layers import dropout
from tests.models.rows import VOCABULARY, random_batch, tiny_model

HEADS, SIZE = 2, 4


def plain_attention(queries, keys, values, segment_ids, *, rate=0.0, key=None, rows=None):
    """The textbook form, differentiated by JAX."""
    scores = jnp.einsum("bnqk,bnsk->bnqs", queries, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(segment_mask(segment_ids), scores, jnp.finfo(jnp.float32).min))
    if rate:
        weights = dropout(key, weights, rate, rows)
    return jnp.matmul(weights.astype(values.dtype), values)


@functools.partial(jax.jit, static_argnums=(0, 1))
def output_and_gradients(form, rate, operands, segment_ids, gradient, key, rows):
    attend = functools.partial(form, segment_ids=segment_ids, rate=rate, key=key, rows=rows)
    out, pull = jax.vjp(lambda *operands: attend(*operands), *operands)
    return out, pull(gradient)


def operands_of(seed, batch, length, dtype="float32", segments=3):
    rng = np.random.default_rng(seed)
    queries, keys, values, gradient = (
        rng.normal(size=(batch, HEADS, length, SIZE)).astype(jnp.dtype(dtype)) for _ in range(4)
    )
    segment_ids = np.zeros((batch, length), np.int32)
    for row in range(batch):
        ends = np.sort(rng.integers(0, length + 1, segments))
        for segment, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            segment_ids[row, start:end] = segment
    return (queries, keys, values), segment_ids, gradient


TILES = [(1, 1, 1, 3), (2, 12, 4, 4), (2, 12, 5, 24), (3, 21, 24, 8), (3, 21, 6, 1), (3, 21, 8, 5)]
"""Rows, their length, and sizes of tiles: of one place, that divide the length, leave a rest, exceed it."""


@functools.cache
def in_tiles(query_chunk, key_chunk):
    """One function for all examples of a size, so that JAX knows its programs again."""
    return functools.partial(chunked_attention, query_chunk=query_chunk, key_chunk=key_chunk)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    tiles=st.sampled_from(TILES),
    segments=st.integers(1, 5),
    rate=st.sampled_from([0.0, 0.4]),
    ordered=st.booleans(),
)
def test_tiles_equal_the_textbook_form(seed, tiles, segments, rate, ordered):
    batch, length, *chunks = tiles
    operands, segment_ids, gradient = operands_of(seed, batch, length, segments=segments)
    if not ordered:
        segment_ids = np.random.default_rng(seed).permutation(segment_ids, axis=1)
    rows = np.arange(batch, dtype=np.int32) + 7
    rest = (rate, operands, segment_ids, gradient, jax.random.key(seed), rows)
    chunked = in_tiles(*chunks)
    expected = output_and_gradients(plain_attention, *rest)
    chex.assert_trees_all_close(output_and_gradients(chunked, *rest), expected, rtol=2e-5, atol=2e-5)
    chex.assert_trees_all_close(output_and_gradients(dense_attention, *rest), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", [dense_attention, functools.partial(chunked_attention, key_chunk=16)])
def test_bfloat16_operands(form):
    """Against float32 of the same operands: what is off is rounding of the weights, 2**-8 of each."""
    operands, segment_ids, gradient = operands_of(0, 2, 50, "bfloat16")
    exact = tuple(x.astype(jnp.float32) for x in operands)
    key, rows = jax.random.key(1), jnp.arange(2)
    out = output_and_gradients(form, 0.3, operands, segment_ids, gradient, key, rows)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}
    expected = output_and_gradients(
        plain_attention, 0.3, exact, segment_ids, gradient.astype(jnp.float32), key, rows
    )
    for ours, theirs in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(ours, np.float32) - theirs).max()
        assert 0 < error < 2**-6 * np.abs(theirs).max()


def test_large_scores_stay_finite():
    operands, segment_ids, gradient = operands_of(1, 2, 19)
    operands = tuple(x * scale for x, scale in zip(operands, (60.0, 60.0, 1.0), strict=True))
    rest = (0.0, operands, segment_ids, gradient, jax.random.key(0), jnp.arange(2))
    chunked = in_tiles(4, 8)
    expected = output_and_gradients(plain_attention, *rest)
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_close(output_and_gradients(chunked, *rest), expected, rtol=1e-3, atol=1e-3)


def compiled(form, length, segments=None):
    shape = jax.ShapeDtypeStruct((1, 8, length, 32), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def train(operands, segment_ids, gradient, key):
        return output_and_gradients(form, 0.1, operands, segment_ids, gradient, key, jnp.arange(1))

    return jax.jit(train).trace((shape, shape, shape), ids, shape, jax.eval_shape(jax.random.key, 0))


def largest_array(jaxpr):
    """Elements of the largest array that any equation makes, in loops and calls as well."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size")]
        sizes += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


def test_no_array_is_quadratic_in_the_length():
    length = 2048
    assert largest_array(compiled(dense_attention, length).jaxpr.jaxpr) >= 8 * length**2
    assert largest_array(compiled(chunked_attention, length).jaxpr.jaxpr) <= 8 * length * 128


def test_temporaries_grow_linearly_and_stay_small():
    sizes = {
        length: compiled(chunked_attention, length).lower().compile().memory_analysis().temp_size_in_bytes
        for length in (2048, 4096, 8192)
    }
    first, second = sizes[4096] - sizes[2048], sizes[8192] - sizes[4096]
    assert first > 0
    assert abs(second / first - 2) < 0.1
    assert sizes[8192] < 150 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_whole_model_with_adapters(rate):
    """Logits, and gradients of all parameters and adapters."""
    batch = random_batch(3)
    config = LoRAConfig(rank=3)
    still = tiny_model(dropout=rate)
    params = jax.jit(BEHRTForMLM(still, VOCABULARY).init)(jax.random.key(0), example_batch(still))["params"]
    adapters = lora.init(jax.random.key(1), params, config)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)

    def results(attention):
        model = BEHRTForMLM(tiny_model(dropout=rate, attention=attention), VOCABULARY)

        def loss(params, adapters, key):
            with lora.applying(config, deterministic=False):
                logits = model.apply(
                    {"params": params, "lora": adapters},
                    batch,
                    deterministic=False,
                    rngs={"dropout": key},
                )
            return (logits**2).mean(), logits

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, adapters, jax.random.key(2))

    chex.assert_trees_all_close(results("chunked"), results("dense"), rtol=1e-4, atol=1e-6)


def test_auto_takes_the_chunked_form_for_long_rows_alone():
    def loops(form, length):
        module = SelfAttention(HEADS, 0.0, jnp.dtype("float32"), form)
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return "while" in str(jax.make_jaxpr(module.init)(jax.eval_shape(jax.random.key, 0), x, ids))

    assert [loops("auto", length) for length in (200, 2048)] == [False, True]
    assert [loops("dense", 2048), loops("chunked", 200)] == [False, True]


@pytest.mark.parametrize("packed", [True, False])
def test_auto_takes_cudnn_where_it_is_to_be_had(packed, monkeypatch):
    """CuDNN's own numbers need its GPU; what is asked of it does not."""
    asked = []

    def stand_in(queries, keys, values, segment_ids, *, scale, packed, **options):
        asked.append((scale, packed))
        return dense_attention(queries * scale, keys, values, segment_ids, **options)

    monkeypatch.setattr("behrt_jax.models.attention.cudnn_attention", stand_in)
    x = jax.random.normal(jax.random.key(1), (2, 6, 64), jnp.bfloat16)
    segment_ids = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])

    module = SelfAttention(8, 0.0, jnp.bfloat16)
    params = module.init(jax.random.key(0), x, segment_ids)

    def attend():
        return module.apply(params, x, segment_ids, packed=packed).astype("f4")

    monkeypatch.setattr("behrt_jax.models.attention.has_cudnn", lambda: False)
    dense = attend()
    assert not asked
    monkeypatch.setattr("behrt_jax.models.attention.has_cudnn", lambda: True)
    np.testing.assert_allclose(attend(), dense, atol=2e-2)
    assert asked == [(8**-0.5, packed)]


def test_cudnn_is_asked_for_what_it_can_do_alone(monkeypatch):
    fitting = {"length": 6, "size": 8, "dtype": jnp.dtype("bfloat16"), "rate": 0.0}
    monkeypatch.setattr("behrt_jax.models.attention.has_cudnn", lambda: True)
    assert cudnn_takes(**fitting)
    for unfit in ({"dtype": jnp.dtype("float32")}, {"rate": 0.1}, {"size": 4}, {"size": 136}, {"length": 5}):
        assert not cudnn_takes(**(fitting | unfit)), unfit
    monkeypatch.setattr("behrt_jax.models.attention.has_cudnn", lambda: False)
    assert not cudnn_takes(**fitting)


@pytest.mark.parametrize(
    ("capability", "has"), [("9.0", True), ("7.5", False), ("gfx90a", False), (None, False)]
)
def test_cudnn_is_on_nvidia_gpus_from_ampere_on(capability, has, monkeypatch):
    device = SimpleNamespace(**({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert has_cudnn.__wrapped__() == has


def test_dropout_is_refused_without_a_key_and_by_cudnn():
    operands, segment_ids, _ = operands_of(0, 1, 5)
    for form in (dense_attention, chunked_attention):
        with pytest.raises(ValueError, match="needs a key"):
            form(*operands, segment_ids, rate=0.1)
    with pytest.raises(ValueError, match="attention_dropout"):
        cudnn_attention(*operands, segment_ids, rate=0.1, key=jax.random.key(0))

"""Rotary positions, times, gated layers, RMSNorm and a tied decoder: equal to plain formulas in float64, and
the same whichever way they are computed.
"""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from behrt_jax.data.batches import Batch, RowShape, training_batches
from behrt_jax.data.events import DAY
from behrt_jax.data.sequences import Sequences
from behrt_jax.models.behrt import CENTURY, BEHRTForMLM, Time2Vec, example_batch, visit_gaps
from behrt_jax.models.layers import EPSILON, rms_norm, rotate, rotations
from behrt_jax.models.stacked_layers import stack_layers
from tests.models import rows
from tests.models.rows import VOCABULARY, padded_segment, random_batch, tiny_model

MODERN = tiny_model(**rows.MODERN)
# One layer compiles more quickly.
DATED = tiny_model(
    position_embedding="rope_time", time="gaps", ffn="geglu", visit_embedding="alternating", layers=1
)
VISITS = tiny_model(position_embedding="rope", position_of="visit", bias=False, tied_decoder=True, layers=1)
MODELS = {"modern": MODERN, "dated": DATED, "visits": VISITS}


def dated_batch(seed, count=4, length=24, segments=3):
    """Rows of subjects from any year of 1900 to 2100, visits months apart, two facts before some of them."""
    rng = np.random.default_rng(seed)
    batch = random_batch(seed, count, length, segments)
    visits, days = np.zeros_like(batch.visits), np.zeros_like(batch.days)
    for row in range(count):
        for segment in range(1, segments + 1):
            cells = np.flatnonzero(batch.segment_ids[row] == segment)
            new = rng.random(len(cells)) < 0.4
            facts = 2 if segment % 2 and len(cells) > 3 else 0
            new[: facts + 1] = False
            ordinal = int(rng.integers(0, 5)) + np.cumsum(new)
            ordinal[:facts] = -1
            elapsed = np.cumsum(
                np.where(new, rng.integers(1, 4000, len(cells)), rng.integers(0, 2, len(cells)))
            )
            elapsed -= elapsed[facts]
            elapsed[:facts] = 0
            visits[row, cells] = ordinal
            days[row, cells] = int(rng.integers(-25_567, 47_482)) + elapsed
    return batch._replace(visits=visits, days=days)


@functools.cache
def drawn(config):
    """Parameters none of which is zero, float32."""
    model = BEHRTForMLM(config, VOCABULARY)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example_batch(config))["params"]
    sizes = {"scale": 0.2, "bias": 0.1, "embedding": 0.1, "phase": 3.0}

    def draw(number, path, shape):
        noise = np.random.default_rng(number).normal(size=shape)
        if path[-1] == "frequency":  # a turn in 10 to 300 years, whose angle float32 holds
            return np.abs(noise) * 20 + 2
        size = 0.03 if path[-2:] in (("gap", "scale"), ("calendar", "scale")) else sizes.get(path[-1], 0.3)
        return size * noise + (path[-1] == "scale" and "norm" in path[-2])

    leaves = enumerate(sorted(flatten_dict(shapes).items()))
    return unflatten_dict({path: draw(n, path, leaf.shape).astype(np.float32) for n, (path, leaf) in leaves})


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, batch):
    return BEHRTForMLM(config, VOCABULARY).apply({"params": params}, batch)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(config, params, batch, weights):
    return jax.grad(lambda params: (_logits(config, params, batch) * weights).sum())(params)


def logits_of(config, batch, params=None):
    """Logits at real tokens, float32 `[tokens, vocabulary]`."""
    params = drawn(config) if params is None else params
    return np.asarray(_logits(config, params, batch))[batch.segment_ids > 0]


def weights_of(batch):
    """Of the logits in the sum that is differentiated, none at padding."""
    weights = np.random.default_rng(1).normal(size=(*batch.codes.shape, VOCABULARY))
    return (weights * (batch.segment_ids > 0)[:, :, None]).astype(np.float32)


# The textbook forms, written without regard to speed.


def plain_norm(config, params, x):
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * params["scale"]
    return x + params.get("bias", 0.0)


def plain_dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def plain_gaps(batch):
    """Days between visits, by loops over events."""
    gaps = np.zeros(batch.days.shape)
    for row, column in np.ndindex(*gaps.shape):
        of = [
            other
            for other in range(column)
            if batch.segment_ids[row, other] == batch.segment_ids[row, column]
        ]
        visit = batch.visits[row, column]
        before = [other for other in of if batch.visits[row, other] < visit]
        this = [other for other in [*of, column] if batch.visits[row, other] == visit]
        if before and batch.segment_ids[row, column]:
            gaps[row, column] = batch.days[row, this[0]] - batch.days[row, before[-1]]
    return gaps


def plain_time2vec(params, days):
    angle = days[:, :, None] / 36525.0 * params["frequency"] + params["phase"]
    return params["scale"] * jnp.concatenate([angle[..., :1], jnp.sin(angle[..., 1:])], -1)


def plain_rotation(x, places, base):
    """Each pair of components as a complex number, turned by its angle: Su et al. 2021, equation 13."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(
        1j * places[:, :, None, None] * base ** (-np.arange(half) / half)
    )
    return jnp.concatenate([turned.real, turned.imag], -1)


def plain_logits(config, params, batch):
    """The model in the dtype of `params`, from the definitions."""
    e, visits = params["behrt"]["embeddings"], np.maximum(batch.visits, 0)
    x = e["code"]["embedding"][batch.codes]
    x = x + e["age"]["embedding"][np.minimum(batch.ages // config.age_bin_years, 21).astype(int)]
    if config.visit_embedding == "ordinal":
        x = x + e["visit"]["embedding"][visits]
    elif config.visit_embedding == "alternating":
        x = x + e["visit"]["embedding"][visits % 2]
    if config.time != "none":
        x = x + plain_time2vec(e["gap"], plain_gaps(batch))
    if config.time == "time2vec":
        x = x + plain_time2vec(e["calendar"], batch.days - 10_957.0)
    x = plain_dense(e["projection"], plain_norm(config, e["norm"], x))
    places = batch.days if config.position_embedding == "rope_time" else batch.positions
    places = (visits if config.position_of == "visit" else places).astype(float)
    count, length, hidden = x.shape
    size = hidden // config.heads
    same = batch.segment_ids[:, None, :, None] == batch.segment_ids[:, None, None, :]  # [B, 1, T, S]
    for number in range(config.layers):
        layer = params["behrt"]["encoder"][f"layer_{number}"]
        y = plain_norm(config, layer["attention_norm"], x)
        q, k, v = (
            plain_dense(layer["attention"][name], y).reshape(count, length, config.heads, size)
            for name in ("query", "key", "value")
        )
        q, k = (plain_rotation(part, places, config.rope_base) for part in (q, k))
        scores = jnp.einsum("btnk,bsnk->bnts", q, k) / size**0.5
        weights = jax.nn.softmax(jnp.where(same, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bnts,bsnk->btnk", weights, v).reshape(x.shape)
        x = x + plain_dense(layer["attention"]["out"], mixed)
        y = plain_norm(config, layer["ffn_norm"], x)
        wide = plain_dense(layer["intermediate"], y)
        if config.ffn == "gelu":
            wide = jax.nn.gelu(wide, approximate=False)
        else:
            gate = plain_dense(layer["gate"], y)
            through = {"geglu": gate * jax.scipy.stats.norm.cdf(gate), "swiglu": gate / (1 + jnp.exp(-gate))}
            wide = wide * through[config.ffn]
        x = x + plain_dense(layer["output"], wide)
    x = plain_norm(config, params["behrt"]["encoder"]["norm"], x)
    head = params["mlm_head"]
    x = plain_norm(config, head["norm"], jax.nn.gelu(plain_dense(head["dense"], x), approximate=False))
    kernel = e["code"]["embedding"].T if config.tied_decoder else head["decoder"]["kernel"]
    return x @ kernel + head["decoder"]["bias"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_are_those_of_the_textbook_forms(name):
    config, batch = MODELS[name], dated_batch(0)
    params, weights = drawn(config), weights_of(batch)
    found = flatten_dict(jax.device_get(_gradient(config, params, batch, weights)))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def plain(params):
        logits = plain_logits(config, params, batch)
        return (logits * weights).sum(), logits

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        (_, expected), slopes = jax.device_get(jax.jit(plain)(wide))
    assert expected.dtype == np.float64
    expected, slopes = expected[batch.segment_ids > 0], flatten_dict(slopes)
    assert np.std(expected, axis=0).mean() > 0.1
    np.testing.assert_allclose(logits_of(config, batch), expected, atol=2e-5)
    assert found.keys() == slopes.keys()
    typical = np.median([np.linalg.norm(leaf) for leaf in slopes.values()])
    for path, leaf in slopes.items():
        error = np.linalg.norm(found[path] - leaf)
        assert error < 2e-5 * max(np.linalg.norm(leaf), 1e-2 * typical), ("/".join(path), error)


# Rotary positions.


def test_rotations_are_those_of_float64_over_a_century_of_days():
    rng = np.random.default_rng(0)
    places = np.concatenate([np.arange(300), rng.integers(0, 65_536, 400), [36_525, 65_535]])[None].astype(
        "i4"
    )
    cosines, sines = jax.device_get(rotations(jnp.asarray(places), 16, 10_000.0))
    angle = places[:, :, None] * 10_000.0 ** (-np.arange(8) / 8)
    assert cosines.dtype == np.float32
    np.testing.assert_allclose(cosines, np.cos(angle), atol=3e-7)
    np.testing.assert_allclose(sines, np.sin(angle), atol=3e-7)


def test_a_product_of_rotated_vectors_knows_their_distance_alone():
    queries, keys = jax.random.normal(jax.random.key(0), (2, 1, 2, 3, 16))
    base = 500.0

    def scores(first, second):
        places = jnp.array([[first, second]], jnp.int32)
        rotation = rotations(places, 16, base)
        q, k = (jax.device_get(rotate(x, rotation)) for x in (queries, keys))
        return (q[0, 0].astype(float) * k[0, 1]).sum(-1)  # of each head

    near, far = scores(3, 40), scores(36_003, 36_040)
    np.testing.assert_allclose(near, far, atol=1e-5)
    assert np.abs(near - scores(3, 41)).max() > 1e-2
    half = np.arange(8)
    q, k = (np.asarray(x, float)[..., :8] + 1j * np.asarray(x, float)[..., 8:] for x in (queries, keys))
    expected = (q[0, 0] * np.conj(k[0, 1]) * np.exp(1j * (3 - 40) * base ** (-half / 8))).sum(-1).real
    np.testing.assert_allclose(near, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shift", "tolerance"),
    [
        ("modern", lambda batch: batch._replace(positions=batch.positions + 7), 2e-5),
        ("dated", lambda batch: batch._replace(days=batch.days + 30_000 * batch.segment_ids), 0.0),
        ("visits", lambda batch: batch._replace(visits=batch.visits + 9 * (batch.visits >= 0)), 2e-5),
    ],
)
def test_moving_all_of_a_segment_changes_nothing(name, shift, tolerance):
    config, batch = replace(MODELS[name], visit_embedding="none"), dated_batch(1)
    if name == "visits":  # facts are at the first visit, so only whole histories move alike
        batch = batch._replace(visits=np.maximum(batch.visits, 0))
    found = logits_of(config, batch)
    np.testing.assert_allclose(logits_of(config, shift(batch)), found, atol=tolerance)
    stretched = batch._replace(
        positions=batch.positions * 2, days=batch.days + 50 * batch.positions, visits=batch.visits * 2
    )
    assert np.abs(logits_of(config, stretched) - found).max() > 1e-2


# Times.


@pytest.mark.parametrize(
    ("shortest", "longest", "reach"), [(2.0, CENTURY / 5, 7305), (30.0, 2 * CENTURY, 36_525)]
)
def test_time2vec_is_the_float64_form_and_tells_a_day_from_the_next(shortest, longest, reach):
    module = Time2Vec(16, shortest, longest)
    days = np.stack(
        [np.arange(-reach, -reach + 40), np.arange(reach - 40, reach)]
    )  # 1900 and 2100 of a calendar
    variables = module.init(jax.random.key(0), days)
    found = np.asarray(jax.jit(module.apply)(variables, days), np.float64)
    frequency, phase, scale = (
        np.asarray(variables["params"][name], np.float64) for name in ("frequency", "phase", "scale")
    )
    periods = 2 * np.pi / frequency[1:] * CENTURY
    np.testing.assert_allclose([periods[0], periods[-1]], [longest, shortest], rtol=1e-5)
    angle = days[:, :, None] / CENTURY * frequency + phase
    expected = scale * np.where(np.arange(16) == 0, angle, np.sin(angle))
    error = np.linalg.norm(found - expected, axis=-1).max()
    step = np.linalg.norm(np.diff(found, axis=1), axis=-1).min()  # of one day
    assert error < 0.02 * step
    # Every function moves at about the scale of the other embeddings.
    np.testing.assert_allclose(scale, 0.02 * 2**0.5, rtol=1e-6)


def gaps_of(batch):
    return np.asarray(jax.jit(visit_gaps)(batch.days, batch.visits, batch.segment_ids))


def test_gaps_are_those_of_loops_over_events_in_packed_rows():
    for seed in range(20):
        batch = dated_batch(seed)
        found = jax.device_get(
            visit_gaps(jnp.asarray(batch.days), jnp.asarray(batch.visits), jnp.asarray(batch.segment_ids))
        )
        real = batch.segment_ids > 0
        np.testing.assert_array_equal(found[real], plain_gaps(batch)[real])
        assert (found[real] > 0).sum() > 20


def test_the_first_visit_of_a_window_has_no_gap():
    """Also where its history goes on from an earlier window."""
    rng = np.random.default_rng(0)
    lengths = np.array([60, 5, 33, 18])
    visits = np.concatenate([np.arange(length) // 2 for length in lengths]).astype(np.int32)
    days = np.concatenate(
        [np.cumsum(rng.integers(1, 300, length // 2 + 1)).repeat(2)[:length] for length in lengths]
    )
    tokens = lengths.sum()
    sequences = Sequences(
        np.arange(4), np.concatenate([[0], np.cumsum(lengths)]), np.arange(5, 5 + tokens, dtype=np.int32),
        np.ones(tokens, np.float32), visits, days * DAY,
    )  # fmt: skip
    batches = training_batches(sequences, RowShape(12, cls_token=True), batch_size=4, window="all", seed=0)
    windows = 0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        found = np.asarray(
            visit_gaps(*(jnp.asarray(x) for x in (batch.days, batch.visits, batch.segment_ids)))
        )
        for row, column in zip(*np.nonzero(batch.segment_ids), strict=True):
            of = np.flatnonzero(batch.segment_ids[row] == batch.segment_ids[row, column])
            first = batch.visits[row, column] == batch.visits[row, of[0]]
            windows += column == of[0]
            if first:
                assert found[row, column] == 0
            else:
                token = batch.codes[row, column] - 5
                start = token - token_in_visit(sequences, token)
                assert found[row, column] == days[start] - days[start - 1]
    assert windows > len(lengths)


def token_in_visit(sequences, token):
    """Place of a token among those of its visit."""
    place = 0
    while sequences.visits[token - place - 1] == sequences.visits[token]:
        place += 1
    return place


# RMSNorm.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_and_its_gradients_are_those_of_the_formula(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(1 + 3 * rng.normal(size=(3, 5, 16)), dtype)
    scale, weights = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (16, (3, 5, 16)))

    def plain(x, scale):
        x = x.astype(jnp.float32)
        return x * (jnp.mean(x * x, -1, keepdims=True) + EPSILON) ** -0.5 * scale[None, None]

    def slopes(norm):
        return jax.jit(jax.value_and_grad(lambda x, scale: (norm(x, scale) * weights).sum(), (0, 1)))(
            x, scale
        )

    ours, theirs = slopes(rms_norm), slopes(plain)
    assert rms_norm(x, scale).dtype == jnp.float32
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5 if dtype == "float32" else 1e-2, atol=1e-5)


# The same, computed in other ways.


@pytest.mark.parametrize("name", MODELS)
def test_packed_subjects_have_the_logits_of_padded_ones(name):
    config, batch = MODELS[name], dated_batch(2)
    alone = [padded_segment(batch, row, segment) for row in range(4) for segment in (1, 2, 3)]
    padded = Batch(*(np.concatenate(parts) for parts in zip(*alone, strict=True)))
    # Segments stand in a row in the order in which they are taken out of it.
    np.testing.assert_allclose(logits_of(config, padded), logits_of(config, batch), atol=1e-5)


@pytest.mark.parametrize("name", ["modern", pytest.param("dated", marks=pytest.mark.slow)])
def test_attention_in_tiles_has_the_logits_of_the_dense_form(name):
    batch = dated_batch(3, count=2, length=300)
    dense, chunked = (
        logits_of(replace(MODELS[name], attention=form), batch, drawn(MODELS[name]))
        for form in ("dense", "chunked")
    )
    np.testing.assert_allclose(chunked, dense, atol=2e-5)


@pytest.mark.parametrize("rematerialise", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scanned_layers_have_the_gradients_of_layers_one_by_one(rematerialise):
    batch = dated_batch(0)
    params, weights = drawn(MODERN), weights_of(batch)
    expected = stack_layers(jax.device_get(_gradient(MODERN, params, batch, weights)))
    scanned = replace(MODERN, scan_layers=True, rematerialise=rematerialise)
    found = _gradient(scanned, stack_layers(params), batch, weights)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, atol=2e-6 * size, rtol=1e-4)


@pytest.mark.slow
def test_rematerialised_layers_have_the_same_gradients():
    batch = dated_batch(0)
    params, weights = drawn(MODERN), weights_of(batch)
    kept, again = (
        _gradient(replace(MODERN, rematerialise=again), params, batch, weights) for again in (False, True)
    )
    chex.assert_trees_all_close(again, kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["modern", pytest.param("dated", marks=pytest.mark.slow)])
def test_bfloat16_is_close_to_float32(name):
    config, batch = MODELS[name], dated_batch(2)
    whole = logits_of(config, batch)
    half = logits_of(replace(config, compute_dtype="bfloat16"), batch, drawn(config))
    assert 0 < np.abs(whole - half).max() < 0.05 * np.abs(whole).max()

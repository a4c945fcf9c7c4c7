"""The step on questions: what moves, packed as padded, and equal results by different ways."""

from dataclasses import replace
from functools import cache

import chex
import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import MaskingConfig, PretrainConfig, QueriesConfig
from behrt_jax.data.questions import QuestionBatch, Questions
from behrt_jax.models.questions import Asked, horizon_features
from behrt_jax.training.devices import make_mesh, put_rows, replicated, shardings_of
from behrt_jax.training.state import init_state, set_up
from behrt_jax.training.step import make_update_step, question_log_odds, question_objective
from tests.models.rows import VOCABULARY, padded_segment, random_batch, tiny_model

GROUPS = ("A", "B")
ASKED = PretrainConfig(
    model=tiny_model(layers=1),
    objective="both",
    lora=LoRAConfig(rank=2),
    freezing=FreezingConfig("lora"),
    queries=QueriesConfig(groups=GROUPS),
)
SEGMENTS, QUESTIONS = 3, 5
SGD = optax.sgd(0.5)


def question_batch(seed, rows=8):
    rng, shape = np.random.default_rng(seed), (rows, SEGMENTS, QUESTIONS)
    batch = random_batch(seed, rows=rows, segments=SEGMENTS)
    filled = rng.random((rows, SEGMENTS)) < 0.8
    weights = rng.uniform(0.1, 2.0, shape) * filled[:, :, None]
    questions = Questions(
        codes=rng.integers(5, VOCABULARY + len(GROUPS), shape).astype(np.int32),
        horizons=rng.choice([30.0, 365.0], shape).astype(np.float32),
        answers=(rng.random(shape) < 0.3).astype(np.float32),
        weights=weights.astype(np.float32),
    )
    return QuestionBatch(batch, np.where(filled, 0, -1).astype(np.int32), questions)


@cache
def built(config, devices=1, micro_batches=1):
    mesh = make_mesh(jax.devices()[:devices])
    setup = set_up(config, VOCABULARY, mesh)
    init_key, step_key = jax.random.split(jax.random.key(0))
    state = init_state(setup, SGD, init_key, mesh)
    masking = MaskingConfig() if config.objective == "both" else None
    objective = question_objective(setup.predictor._replace(mesh=mesh), masking, 3.0)
    step = make_update_step(objective, SGD, setup.mask, step_key, clip_norm=1.0, micro_batches=micro_batches)
    out = shardings_of(state), replicated(mesh)
    return setup, jax.device_get(state), jax.jit(step, out_shardings=out), mesh


def run(config, batches, **options):
    setup, first, step, mesh = built(config, **options)
    state, figures = jax.device_put(first, replicated(mesh)), []
    for batch in batches:
        state, totals = step(state, put_rows(batch, mesh))
        totals = jax.device_get(totals)
        del totals["gradient_squares"]
        figures.append(totals)
    return setup, jax.device_get(state.variables), figures


def test_adapters_head_and_embeddings_move_and_the_base_stays():
    setup, after, figures = run(ASKED, [question_batch(seed) for seed in range(2)])
    before = flatten_dict(built(ASKED)[1].variables)
    for path, leaf in flatten_dict(after).items():
        moved = not np.array_equal(leaf, before[path])
        assert moved == flatten_dict(setup.mask)[path], path
    heads = {path[1] for path in before if path[0] == "params"}
    assert heads == {"behrt", "mlm_head", "query_head"}
    totals = figures[0]
    assert totals["targets"] == pytest.approx(question_batch(0).questions.weights.sum(), rel=1e-5)
    assert totals["loss"] == pytest.approx(totals["question_loss"] + 3.0 * totals["mlm_loss"], rel=1e-5)


def test_questions_alone_have_no_masked_code_head():
    setup = set_up(replace(ASKED, objective="queries"), VOCABULARY)
    assert set(setup.shapes["params"]) == {"behrt", "query_head"}
    assert setup.shapes["params"]["query_head"]["groups"].shape == (2, 12)


def answers(setup, variables, batch):
    return np.asarray(jax.jit(question_log_odds, static_argnums=0)(setup.predictor, variables, batch))


def noisy(variables):
    """Away from the first values, at which answers are small and adapters do nothing."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), variables)


def test_a_history_is_answered_packed_as_alone_and_others_change_nothing():
    setup, state, *_ = built(ASKED)
    variables, batch = noisy(state.variables), question_batch(3)
    packed = answers(setup, variables, batch)
    assert packed.shape == (8, SEGMENTS, QUESTIONS) and packed.std() > 0.1
    for row, segment in ((0, 0), (1, 1), (2, 2)):
        own = Questions(*(values[row, segment][None, None] for values in batch.questions))
        alone = QuestionBatch(padded_segment(batch.rows, row, segment + 1), np.zeros((1, 1), np.int32), own)
        found = answers(setup, variables, alone)[0, 0]
        np.testing.assert_allclose(found, packed[row, segment], rtol=1e-4, atol=1e-5)


def test_codes_gathered_first_or_last_are_answered_alike():
    """Which of both is done goes by the number of questions."""
    setup, state, *_ = built(ASKED)
    variables, batch = noisy(state.variables), question_batch(4, rows=8)
    assert batch.questions.codes.size > VOCABULARY + len(GROUPS)
    many = answers(setup, variables, batch)
    few = jax.tree.map(lambda x: x[:2], batch)
    assert few.questions.codes.size < VOCABULARY + len(GROUPS)
    np.testing.assert_allclose(answers(setup, variables, few), many[:2], rtol=1e-4, atol=1e-5)


def test_answers_depend_on_code_group_and_horizon_smoothly():
    setup, state, *_ = built(ASKED)
    variables, batch = noisy(state.variables), random_batch(0, rows=1, segments=SEGMENTS)
    asked = jax.jit(setup.predictor.outputs)
    days = np.geomspace(20, 800, 41).astype(np.float32)
    shape = (1, SEGMENTS, len(days))
    curves = {}
    for code in (7, 8, VOCABULARY, VOCABULARY + 1):
        question = Asked(np.full(shape, code, np.int32), np.broadcast_to(days, shape))
        curves[code] = np.asarray(asked(variables, batch, question))[0, 0]
    found = np.stack([*curves.values()])
    assert (np.abs(np.diff(found, axis=0)).max(axis=1) > 1e-3).all()
    bends = np.abs(np.diff(found, n=2, axis=1)).max()
    assert 0 < bends < 0.1 * (found.max() - found.min()) / 4
    assert np.isfinite(horizon_features(np.zeros(1, np.float32))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"devices": 8}, {"micro_batches": 4}], ids=["eight devices", "four micro-batches"]
)
def test_devices_and_micro_batches_equal_one(options):
    """Dropout is on, and parts differ in their questions."""
    config = replace(ASKED, model=replace(ASKED.model, dropout=0.1))
    batches = [question_batch(seed) for seed in range(2)]
    _, whole, figures = run(config, batches)
    _, divided, of_divided = run(config, batches, **options)
    chex.assert_trees_all_close(figures, of_divided, rtol=2e-5)
    chex.assert_trees_all_close(whole, divided, atol=2e-6, rtol=1e-5)


def test_slots_without_a_question_change_nothing():
    batch = question_batch(1)
    other = batch.questions._replace(
        answers=np.where(batch.questions.weights > 0, batch.questions.answers, 1.0).astype(np.float32),
        horizons=np.where(batch.questions.weights > 0, batch.questions.horizons, 0.0).astype(np.float32),
    )
    _, ours, _ = run(ASKED, [batch])
    _, theirs, _ = run(ASKED, [batch._replace(questions=other)])
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)

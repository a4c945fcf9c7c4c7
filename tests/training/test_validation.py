"""Single masked codes of the validation pass: the same codes, losses and hits as its sums."""

import jax
import numpy as np
import pytest

from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.batches import RowShape, validation_batches
from behrt_jax.data.vocabulary import MASK, PAD
from behrt_jax.errors import InputError
from behrt_jax.evaluation.masked_codes import results_of
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.feeding import PlacedBatches
from behrt_jax.training.step import Predictor
from behrt_jax.training.validation import (
    make_scoring_step,
    make_validation_step,
    mask_split,
    score_masked_codes,
    validate,
)
from tests.evaluation.masked import sequences_of
from tests.models.rows import tiny_model

VOCABULARY = 50
MASKING = MaskingConfig(probability=0.3)


def batches_of(window="all", cls_token=False, packed=True, seed=0):
    rng = np.random.default_rng(seed)
    histories = [rng.integers(5, VOCABULARY, length) for length in rng.integers(1, 40, 37)]
    return validation_batches(
        sequences_of(histories),
        RowShape(16, packed=packed, cls_token=cls_token, multiple_of=8),
        rows_per_batch=8,
        window=window,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("cls_token", "packed"), [(False, True), (True, False)])
def test_sums_over_single_codes_equal_the_validation_step(cls_token, packed):
    model = BEHRTForMLM(tiny_model(positions=16, cls_token=cls_token), VOCABULARY)
    params = jax.jit(model.init)(jax.random.key(0), example_batch(model.config))["params"]
    variables, predictor, key = {"params": params, "lora": {}}, Predictor(model), jax.random.key(3)
    batches, mesh = batches_of(cls_token=cls_token, packed=packed), make_mesh()
    sums = validate(
        jax.jit(make_validation_step(predictor, MASKING, key)), variables, PlacedBatches(batches, mesh)
    )
    split = mask_split(batches, MASKING, key, VOCABULARY)
    step = jax.jit(make_scoring_step(predictor, MASKING, key))
    results = results_of(split, *score_masked_codes(step, variables, batches, mesh))
    single = results.metrics()
    assert single["targets"] == sums["targets"] == len(split.targets)
    assert single["loss"] == pytest.approx(sums["loss"], rel=1e-6)
    assert single["accuracy_top10"] == pytest.approx(sums["accuracy_top10"], rel=1e-6)
    # A guess is the code exactly where no other is ranked before it.
    assert results.guesses is not None and 0 < np.mean(results.ranks == 0) < 1
    np.testing.assert_array_equal(results.guesses == split.codes, results.ranks == 0)
    # Each loss belongs to its code: those of the codes' own logits, not of some other target's.
    code = int(np.bincount(split.codes).argmax())
    changed = jax.tree.map(lambda leaf: leaf, variables)
    decoder = changed["params"]["mlm_head"]["decoder"]
    decoder["bias"] = decoder["bias"].at[code].add(30.0)
    biased = results_of(split, *score_masked_codes(step, changed, batches, mesh))
    np.testing.assert_array_equal(biased.ranks == 0, split.codes == code)
    assert biased.guesses is not None and set(biased.guesses.tolist()) == {code}


@pytest.mark.slow
def test_guesses_of_a_large_vocabulary_are_those_of_all_logits():
    mesh, key, found = make_mesh(), jax.random.key(3), []
    batches = batches_of()
    split = mask_split(batches, MASKING, key, VOCABULARY)
    for chunk in (None, 16):  # the vocabulary in parts
        model = BEHRTForMLM(tiny_model(positions=16, head_chunk=chunk), VOCABULARY)
        params = jax.jit(model.init)(jax.random.key(0), example_batch(model.config))["params"]
        step = jax.jit(make_scoring_step(Predictor(model), MASKING, key))
        scores = score_masked_codes(step, {"params": params, "lora": {}}, batches, mesh)
        found.append(results_of(split, *scores))
    whole, parts = found
    assert len(set(whole.guesses.tolist())) > 1
    np.testing.assert_array_equal(whole.guesses, parts.guesses)
    np.testing.assert_array_equal(parts.guesses == split.codes, parts.ranks == 0)


@pytest.mark.parametrize("window", ["all", "recent"])
def test_the_split_is_shown_as_the_batches_show_it(window):
    batches = batches_of(window)
    split = mask_split(batches, MASKING, jax.random.key(3), VOCABULARY)
    sequences = split.sequences
    assert len(np.unique(split.targets)) == len(split.targets)
    changed = np.flatnonzero((split.shown != sequences.codes) & (split.shown != PAD))
    assert set(changed) <= set(split.targets)
    assert 0.7 < np.mean(split.shown[split.targets] == MASK) < 0.9
    unseen = split.windows < 0
    np.testing.assert_array_equal(unseen, split.shown == PAD)
    seen = np.add.reduceat(~unseen, sequences.offsets[:-1])
    expected = sequences.lengths if window == "all" else np.minimum(sequences.lengths, 16)
    np.testing.assert_array_equal(seen, expected)
    windows = [len(np.unique(part[part >= 0])) for part in np.split(split.windows, sequences.offsets[1:-1])]
    np.testing.assert_array_equal(windows, -(-expected // 16))
    np.testing.assert_array_equal(split.subjects, np.repeat(np.arange(37), sequences.lengths)[split.targets])


def test_a_split_too_small_to_mask_is_refused():
    batches = validation_batches(sequences_of([[7]]), RowShape(4), rows_per_batch=1)
    with pytest.raises(InputError, match=r"No code of the tuning split is masked.*masking\.probability"):
        mask_split(batches, MaskingConfig(probability=1e-6), jax.random.key(0), VOCABULARY)

"""The oracle: equal to enumeration on tiny models, calibrated on generated records."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.config.data import DataConfig
from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.sequences import Sequences, with_separators
from behrt_jax.data.vocabulary import MASK, SPECIAL_TOKENS, UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation.masked_codes import MaskedSplit, Unigram
from behrt_jax.evaluation.oracle import Oracle, make_oracle, oracle_of
from behrt_jax.records.load import load_sequences
from behrt_jax.records.synthetic.histories import FIRST_DAY, LAST_DAY
from behrt_jax.records.synthetic.latent import COVARIATES
from tests.evaluation.latent_cases import (
    FIRST,
    brute_posterior,
    make_sequences,
    split_of,
    tiny_model,
    with_covariates,
)

PLAIN = MaskingConfig(mask_share=1.0, random_share=0.0)
DATA = DataConfig(
    source="latent", subjects=1500, vocabulary_size=120, difficulty=0.3, tuning_fraction=0.6, seed=3
)


def masked(sequences: Sequences, vocabulary: int, masking: MaskingConfig, seed: int) -> MaskedSplit:
    """Each code drawn by itself, subjects as windows."""
    rng = np.random.default_rng(seed)
    drawn = rng.random(len(sequences.codes)) < masking.probability
    kind = rng.random(len(drawn))
    shown = sequences.codes.copy()
    shown[drawn & (kind < masking.mask_share)] = MASK
    random = drawn & (kind >= masking.mask_share) & (kind < masking.mask_share + masking.random_share)
    shown[random] = rng.integers(FIRST, vocabulary, random.sum())
    return split_of(sequences, shown.tolist(), rng.permutation(np.flatnonzero(drawn)).tolist())


def posterior_of(oracle: Oracle, split: MaskedSplit, masking: MaskingConfig) -> np.ndarray:
    """Probability of every code at every target, float64 ``[targets, vocabulary]``."""
    found = np.empty((len(split.targets), oracle.emissions.shape[2]))
    for where, posterior in oracle.posteriors(split, masking):
        found[where] = posterior
    return found


@pytest.fixture(scope="module")
def latent() -> tuple[Sequences, Oracle, Unigram]:
    data = load_sequences(DATA, sep_token=False)
    oracle = oracle_of(DATA, data.vocabulary.codes)
    assert oracle is not None
    return data.splits["tuning"], oracle, Unigram(data.vocabulary.counts, FIRST)


@given(st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_posterior_equals_enumeration(seed, data):
    model = tiny_model(seed, conditions=data.draw(st.integers(1, 2)))
    known = data.draw(st.integers(2, 4))  # the other codes have no row in the vocabulary
    ids = [FIRST + code if code < known else UNK for code in range(4)]
    mask_share = data.draw(st.sampled_from([1.0, 0.8, 0.3]))
    random_share = (1 - mask_share) * data.draw(st.sampled_from([0.5, 0.9]))
    masking = MaskingConfig(0.3, mask_share, random_share, data.draw(st.sampled_from(["code", "visit"])))
    days = np.cumsum(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    shown = st.sampled_from([MASK, *sorted(set(ids))])
    history = [(int(day), data.draw(st.lists(shown, min_size=1, max_size=2))) for day in days]
    # Any code can stand at the target; [UNK] is never one.
    flat = [code for _, codes in history for code in codes]
    target = data.draw(st.integers(0, len(flat) - 1))
    if flat[target] == UNK or (mask_share == 1 and flat[target] != MASK):
        flat[target] = MASK
        codes = iter(flat)
        history = [(day, [next(codes) for _ in visit]) for day, visit in history]
    if masking.unit == "visit" and mask_share == 1:  # all codes of a visit are [MASK], or none
        history = [
            (day, [MASK if MASK in visit and id != UNK else id for id in visit]) for day, visit in history
        ]
        flat = [id for _, visit in history for id in visit]

    oracle = make_oracle(model, (*SPECIAL_TOKENS, *model.codes[:known]))
    truth = make_sequences([[(day, [FIRST for _ in visit]) for day, visit in history]])
    split = split_of(truth, flat, [target])
    expected = np.zeros(FIRST + known)
    expected[FIRST:] = brute_posterior(model, history, ids, target, masking)[:known]
    np.testing.assert_allclose(posterior_of(oracle, split, masking)[0], expected, rtol=1e-10, atol=1e-13)
    results = oracle.predict(split, masking)
    np.testing.assert_allclose(results.losses, -np.log(expected[FIRST]), rtol=1e-10)


@pytest.mark.parametrize("unknown", [None, *COVARIATES])
@pytest.mark.parametrize("unit", ["code", "visit"])
def test_covariates_known_and_unknown_equal_enumeration(unknown, unit):
    rng = np.random.default_rng([ord(letter) for letter in f"{unknown}{unit}"])
    for case in range(4):
        model = with_covariates(tiny_model(case), case)
        codes = [*range(FIRST, FIRST + 3), UNK]
        masking = MaskingConfig(0.3, 0.8, 0.15, unit)
        days = np.cumsum([rng.integers(1, 20), *rng.choice([1, 3, 4, 900], 2)])
        history = [(int(day), rng.choice([MASK, *codes], rng.integers(1, 3)).tolist()) for day in days]
        flat = [code for _, visit in history for code in visit]
        target = next((place for place, code in enumerate(flat) if code != UNK), 0)
        if flat[target] == UNK:
            history[0][1][0] = flat[0] = MASK
        first_day = int(rng.integers(FIRST_DAY, LAST_DAY))
        oracle = make_oracle(model, (*SPECIAL_TOKENS, *model.codes[:3]))
        truth = make_sequences([[(day, [FIRST for _ in visit]) for day, visit in history]], first_day)
        ((_, found),) = oracle.posteriors(split_of(truth, flat, [target]), masking, unknown)
        expected = brute_posterior(model, history, codes, target, masking, first_day, unknown)[:3]
        np.testing.assert_allclose(found[0, FIRST:], expected, rtol=1e-9, atol=1e-13)


@pytest.fixture(scope="module")
def depending() -> tuple[Sequences, Oracle]:
    """Records with all covariates."""
    data = replace(DATA, subjects=700, covariates=COVARIATES, difficulty=0.5)
    loaded = load_sequences(data, sep_token=False)
    oracle = oracle_of(data, loaded.vocabulary.codes)
    assert oracle is not None
    return loaded.splits["tuning"], oracle


def test_posterior_with_covariates_is_calibrated(depending):
    """Loss less entropy is 0 on average for the oracle, and for readers who lack something."""
    sequences, oracle = depending
    split = masked(sequences, DATA.vocabulary_size, MaskingConfig(), seed=11)
    for unknown in (None, "sex", "gaps"):
        excess = np.empty(len(split.targets))
        for where, posterior in oracle.posteriors(split, MaskingConfig(), unknown):
            own = posterior[np.arange(len(where)), split.codes[where]]
            with np.errstate(divide="ignore", invalid="ignore"):
                entropy = -np.where(posterior > 0, posterior * np.log(posterior), 0.0).sum(axis=1)
            excess[where] = -np.log(own) - entropy
        assert abs(excess.mean()) < 3 * excess.std() / np.sqrt(len(excess))


@pytest.mark.slow
def test_every_covariate_is_worth_something(depending):
    """Half of the codes are masked: 15 in 100 are too few to tell what a covariate is worth from 0."""
    sequences, oracle = depending
    assert oracle.model.covariates is not None
    assert oracle.model.covariates.names == COVARIATES
    masking = MaskingConfig(probability=0.5)
    split = masked(sequences, DATA.vocabulary_size, masking, seed=11)
    best = oracle.predict(split, masking).losses
    subjects = split.windows[split.targets]
    for unknown in COVARIATES:
        worth = oracle.predict(split, masking, unknown).losses - best
        # Codes of one subject depend on each other: the standard error of a ratio of sums over subjects.
        excess = np.bincount(subjects, worth - worth.mean())
        assert worth.mean() > 2 * np.sqrt((excess**2).sum()) / len(worth)
        assert worth.mean() > 0.005


def test_windows_are_apart_and_chunks_change_nothing(latent, monkeypatch):
    sequences, oracle, _ = latent
    masking = MaskingConfig()
    split = masked(sequences, DATA.vocabulary_size, masking, seed=1)
    whole = oracle.predict(split, masking)
    monkeypatch.setattr("behrt_jax.evaluation.oracle._CHUNK", 1)
    some = replace(split, targets=split.targets[:300])
    by_one = oracle.predict(some, masking)
    np.testing.assert_allclose(by_one.losses, whole.losses[:300], rtol=1e-9)
    np.testing.assert_array_equal(by_one.ranks, whole.ranks[:300])


def test_ranks_follow_the_posterior_and_ties_go_to_the_lower_id():
    model = tiny_model(0)
    model = replace(model, emissions=np.full_like(model.emissions, 0.25))
    oracle = make_oracle(model, (*SPECIAL_TOKENS, *model.codes))
    truth = make_sequences([[(3, [FIRST, FIRST + 1, FIRST + 3])]])
    results = oracle.predict(split_of(truth, [MASK, MASK, MASK], [2, 0, 1]), PLAIN)
    np.testing.assert_array_equal(results.ranks, [3, 0, 1])
    np.testing.assert_array_equal(results.codes, truth.codes[[2, 0, 1]])
    np.testing.assert_allclose(results.losses, np.log(4))


def test_ranks_count_the_codes_ahead(latent):
    sequences, oracle, _ = latent
    split = masked(sequences, DATA.vocabulary_size, PLAIN, seed=2)
    posterior, results = posterior_of(oracle, split, PLAIN), oracle.predict(split, PLAIN)
    own = posterior[np.arange(len(posterior)), results.codes]
    np.testing.assert_array_equal(results.ranks, (posterior > own[:, None]).sum(axis=1))
    np.testing.assert_allclose(posterior.sum(axis=1), 1.0)
    assert not posterior[:, :FIRST].any()


def test_separators_tell_nothing(latent):
    sequences, oracle, _ = latent
    split = masked(sequences, DATA.vocabulary_size, PLAIN, seed=4)
    separated = with_separators(sequences)
    codes = np.flatnonzero(separated.codes >= FIRST)
    shown = separated.codes.copy()
    shown[codes] = split.shown
    results = oracle.predict(split_of(separated, shown.tolist(), codes[split.targets].tolist()), PLAIN)
    np.testing.assert_allclose(results.losses, oracle.predict(split, PLAIN).losses, rtol=1e-12)


def test_tokens_outside_every_window_are_not_seen(latent):
    sequences, oracle, _ = latent
    split = masked(sequences, DATA.vocabulary_size, PLAIN, seed=5)
    places = np.arange(len(split.shown)) - np.repeat(sequences.offsets[:-1], sequences.lengths)
    cut = replace(
        split,
        windows=np.where(places < 10, split.windows, -1),
        targets=split.targets[places[split.targets] < 10],
    )
    other = replace(cut, shown=np.where(cut.windows < 0, FIRST, cut.shown))
    results = oracle.predict(cut, PLAIN)
    np.testing.assert_array_equal(results.losses, oracle.predict(other, PLAIN).losses)
    assert not np.allclose(results.losses, oracle.predict(replace(split, targets=cut.targets), PLAIN).losses)


def test_a_window_from_the_middle_is_an_error(latent):
    sequences, oracle, _ = latent
    split = masked(sequences, DATA.vocabulary_size, PLAIN, seed=6)
    late = replace(split, windows=np.where(sequences.visits > 0, split.windows, -1))
    late = replace(late, targets=late.targets[sequences.visits[late.targets] > 0])
    with pytest.raises(InputError, match=r"raise data.max_length \(and model.positions\)"):
        oracle.predict(late, PLAIN)


def test_a_vocabulary_of_other_codes_is_an_error():
    with pytest.raises(InputError, match="The code DX//OTHER of the vocabulary is none of the latent"):
        make_oracle(tiny_model(0), (*SPECIAL_TOKENS, "C1", "DX//OTHER"))


def test_other_sources_have_no_oracle():
    assert oracle_of(DataConfig(source="uniform"), SPECIAL_TOKENS) is None


@pytest.mark.parametrize("masking", [MaskingConfig(0.3, 1.0, 0.0), MaskingConfig(0.3, 0.5, 0.3)])
def test_posterior_is_calibrated(latent, masking):
    sequences, oracle, _ = latent
    split = masked(sequences, DATA.vocabulary_size, masking, seed=7)
    posterior = posterior_of(oracle, split, masking)
    truth = np.zeros_like(posterior, bool)
    truth[np.arange(len(truth)), split.codes] = True
    # Each bin of probabilities holds as many true codes as it promises, within 4 standard errors.
    bins = np.digitize(posterior, [1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7])
    for number in np.unique(bins[posterior > 0]):
        of_bin = (bins == number) & (posterior > 0)
        expected = posterior[of_bin].sum()
        error = np.sqrt((posterior[of_bin] * (1 - posterior[of_bin])).sum())
        assert abs(truth[of_bin].sum() - expected) < 4 * error, (number, truth[of_bin].sum(), expected)

    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = np.where(posterior > 0, -np.log(posterior), 0.0)
    excess = surprise[truth] - (posterior * surprise).sum(axis=1)  # loss less entropy, of each target
    assert abs(excess.mean()) < 3 * excess.std() / np.sqrt(len(excess))
    assert excess.std() / np.sqrt(len(excess)) < 0.04


def test_every_kind_of_context_counts(latent):
    sequences, oracle, unigram = latent
    masking = MaskingConfig()
    split = masked(sequences, DATA.vocabulary_size, masking, seed=8)
    best = oracle.predict(split, masking).losses.mean()
    assert best < unigram.predict(split).losses.mean() - 1.0

    ages = replace(sequences, ages=np.full_like(sequences.ages, np.median(sequences.ages)))
    assert oracle.predict(replace(split, sequences=ages), masking).losses.mean() > best + 0.1

    rng = np.random.default_rng(0)
    visits = np.cumsum((np.diff(sequences.visits, prepend=0) != 0) | (np.diff(split.windows, prepend=0) != 0))
    order = np.lexsort((rng.random(len(visits)), visits))
    place = np.argsort(order)
    shuffled = split_of(
        replace(sequences, codes=sequences.codes[order]),
        split.shown[order].tolist(),
        place[split.targets].tolist(),
    )
    assert oracle.predict(shuffled, masking).losses.mean() > best + 0.1

    alone = replace(
        split, windows=visits, sequences=replace(sequences, visits=np.zeros_like(sequences.visits))
    )
    assert oracle.predict(alone, masking).losses.mean() > best + 0.05


def test_no_other_predictor_of_the_family_does_better(latent):
    sequences, oracle, _ = latent
    masking = MaskingConfig()
    split = masked(sequences, DATA.vocabulary_size, masking, seed=9)
    best = oracle.predict(split, masking).losses
    for wrong in ({"continues": oracle.model.continues * 0.5}, {"initial": oracle.model.initial[::-1]}):
        other = replace(oracle, model=replace(oracle.model, **wrong))
        worse = other.predict(split, masking).losses - best
        assert worse.mean() > 3 * worse.std() / np.sqrt(len(worse))
    worse = oracle.predict(split, replace(masking, random_share=0.0, mask_share=0.9)).losses - best
    assert worse.mean() > 0


def test_long_histories_do_not_underflow():
    data = replace(DATA, subjects=12, events_mean=2000.0, events_spread=0.0)
    sequences = load_sequences(data, sep_token=False).splits["tuning"]
    oracle = oracle_of(data, load_sequences(data, sep_token=False).vocabulary.codes)
    assert oracle is not None
    results = oracle.predict(masked(sequences, 120, PLAIN, seed=10), PLAIN)
    assert np.isfinite(results.losses).all()
    assert results.losses.mean() < 4.0

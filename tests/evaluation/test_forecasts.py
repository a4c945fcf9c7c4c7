"""Forecasts of the oracle: equal to enumeration on tiny models, calibrated on generated records."""

from itertools import product

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from behrt_jax.config.data import DataConfig
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation import forecasts
from behrt_jax.evaluation.forecasts import (
    chances_of_visits_left,
    next_visit_codes,
    occurrence_probability,
    onset_probabilities,
    stage_posteriors,
)
from behrt_jax.evaluation.oracle import make_oracle, oracle_of
from behrt_jax.records.load import load_sequences
from behrt_jax.records.synthetic.latent import LatentModel
from experiments.studies.latent_course import latent_paths, onset_labels
from tests.evaluation.latent_cases import (
    FIRST,
    make_sequences,
    stage_paths,
    tiny_model,
    visit_chance,
    with_covariates,
)

HISTORY = [(2, [FIRST + 1, FIRST]), (3, [FIRST + 2]), (7, [FIRST + 1, UNK])]  # code 3 has no row
OTHER = [(9, [FIRST]), (13, [FIRST + 2, FIRST + 2])]
BANDS = (0, 1)


def tiny(seed: int):
    model = tiny_model(seed)
    oracle = make_oracle(model, (*SPECIAL_TOKENS, *model.codes[:3]))
    return model, oracle, stage_posteriors(oracle, make_sequences([HISTORY, OTHER]))


def brute_stages(model: LatentModel, history) -> np.ndarray:
    """Joint stage at the last visit given all codes, ``[Z]``."""
    bands = [min(day // 10, 1) for day, _ in history]
    ways = [[{3 if code == UNK else code - FIRST: 1.0} for code in codes] for _, codes in history]
    found = np.zeros(len(model.states))
    for path, chance in stage_paths(model, bands):
        seen = [visit_chance(model, *at) for at in zip(path, bands, ways, strict=True)]
        found[path[-1]] += chance * np.prod(seen)
    return found / found.sum()


@pytest.mark.parametrize("seed", range(4))
def test_stages_and_next_visit_equal_enumeration(seed):
    model, oracle, posteriors = tiny(seed)
    found = next_visit_codes(oracle, posteriors, np.array([2, 4]))
    assert found.shape == (2, FIRST + 3)
    for history, last, forecast in zip((HISTORY, OTHER), (2, 4), found, strict=True):
        stages = brute_stages(model, history)
        np.testing.assert_allclose(posteriors.stages[last], stages, rtol=1e-10)
        day = history[-1][0]
        expected = np.zeros(4)
        total = 0.0
        for gap in range(1, 120):
            band = min((day + gap) // 10, 1)
            for share, size in zip(model.sizes, (1, 2, 3), strict=True):
                chance = model.daily_visit * (1 - model.daily_visit) ** (gap - 1) * share
                total += chance
                next_stages = stages @ model.transitions[band]
                for code in range(4):
                    others = {other: 1.0 for other in range(4) if other != code}
                    absent = [visit_chance(model, state, band, [others] * size) for state in range(4)]
                    expected[code] += chance * (1 - next_stages @ absent)
        np.testing.assert_allclose(total, 1.0, atol=1e-12)
        np.testing.assert_allclose(forecast[[FIRST, FIRST + 1, FIRST + 2, UNK]], expected, rtol=1e-10)
        assert not forecast[[0, 1, 3, 4]].any()


def test_records_with_covariates_are_refused():
    model = with_covariates(tiny_model(0), 0)
    oracle = make_oracle(model, (*SPECIAL_TOKENS, *model.codes[:3]))
    with pytest.raises(InputError, match=r"without covariates: leave out data\.covariates"):
        stage_posteriors(oracle, make_sequences([HISTORY]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("condition", [0, 1])
def test_onset_equals_enumeration(seed, condition):
    model, oracle, posteriors = tiny(seed)
    horizon = 5
    found = onset_probabilities(oracle, posteriors, np.array([2, 4]), condition, horizon)
    present = model.states[:, condition] > 0
    for history, probability in zip((HISTORY, OTHER), found, strict=True):
        stages = brute_stages(model, history)
        expected = 0.0
        for visited in product([False, True], repeat=horizon):
            chance = np.prod([model.daily_visit if visit else 1 - model.daily_visit for visit in visited])
            state = np.where(present, 0.0, stages)
            for gap, visit in enumerate(visited, start=1):
                if visit:
                    state = state @ model.transitions[min((history[-1][0] + gap) // 10, 1)]
            expected += chance * state[present].sum()
        np.testing.assert_allclose(probability, expected, rtol=1e-10)


def test_chunks_change_nothing(monkeypatch):
    data = DataConfig(source="latent", subjects=60, vocabulary_size=100)
    loaded = load_sequences(data, sep_token=True)
    oracle = oracle_of(data, loaded.vocabulary.codes)
    assert oracle is not None
    whole = stage_posteriors(oracle, loaded.splits["train"])
    monkeypatch.setattr(forecasts, "_CHUNK", 12)
    parts = stage_posteriors(oracle, loaded.splits["train"])
    np.testing.assert_allclose(parts.stages, whole.stages, rtol=1e-9)


def test_forecasts_are_calibrated():
    data = DataConfig(
        source="latent", subjects=1800, vocabulary_size=100, tuning_fraction=0.6, events_mean=20.0, seed=4
    )
    loaded = load_sequences(data, sep_token=False)
    sequences = loaded.splits["tuning"]
    oracle = oracle_of(data, loaded.vocabulary.codes)
    assert oracle is not None
    posteriors = stage_posteriors(oracle, sequences)
    visits = posteriors.visits

    # Next visit: the codes of the second one from the first.
    more = np.flatnonzero(visits.counts > 1)
    forecast = next_visit_codes(oracle, posteriors, visits.firsts[more])[:, FIRST:]
    labels = np.zeros((len(visits.starts), 100), bool)
    labels[visits.of_token, sequences.codes] = True
    labels = labels[visits.firsts[more] + 1, FIRST:]
    _check_calibration(forecast, labels)
    assert roc_auc_score(labels.reshape(-1), forecast.reshape(-1)) > 0.75

    # Onset: from the last visit on, in two years.
    options = (data.subjects, 95, data.events_mean, data.events_spread, data.seed, data.difficulty)
    paths = latent_paths(*options, follow_up_days=730)
    last = np.append(paths.histories.first_visits[1:], len(paths.states)) - 1
    order = np.argsort(paths.histories.subject_ids)
    of_split = order[np.searchsorted(paths.histories.subject_ids[order], sequences.subject_ids)]
    for condition in range(4):
        labels = onset_labels(paths, last[of_split], condition, 730)
        chosen = visits.firsts + visits.counts - 1
        forecast = onset_probabilities(oracle, posteriors, chosen, condition, 730)
        _check_calibration(forecast, labels)
        assert roc_auc_score(labels, forecast) > 0.6
        losses = -np.where(labels, np.log(forecast), np.log1p(-forecast))
        base = labels.mean()
        assert losses.mean() < -(base * np.log(base) + (1 - base) * np.log(1 - base))


def _check_calibration(probabilities: np.ndarray, labels: np.ndarray, least_bins: int = 4) -> None:
    bins = np.digitize(probabilities, [0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85])
    assert len(np.unique(bins)) >= least_bins
    for number in np.unique(bins):
        chosen = probabilities[bins == number]
        error = np.sqrt((chosen * (1 - chosen)).sum())
        assert abs(labels[bins == number].sum() - chosen.sum()) < 4 * error


# Questions.

QUESTIONS = [[FIRST + 1], [FIRST, FIRST + 2], [UNK]]


def brute_occurrence(model: LatentModel, history, codes: list[int], horizon: int):
    """Chance of yes and of no in a record with 0, 1, ... visits left, day by day."""
    others = {code: float(code not in codes) for code in range(4)}
    absent = [
        sum(
            share
            * np.array([visit_chance(model, z, band, [others] * size) for z in range(len(model.states))])
            for share, size in zip(model.sizes, (1, 2, 3), strict=True)
        )
        for band in BANDS
    ]
    stages = brute_stages(model, history)
    yes, no = np.zeros((2, horizon + 2))
    for visited in product([False, True], repeat=horizon):
        chance = np.prod([model.daily_visit if visit else 1 - model.daily_visit for visit in visited])
        state, days = stages, np.flatnonzero(visited) + 1
        without = [1.0]  # chance of no occurrence in the first 0, 1, ... visits
        for day in history[-1][0] + days:
            band = min(day // 10, 1)
            state = (state @ model.transitions[band]) * absent[band]
            without.append(state.sum())
        for left in range(horizon + 2):
            yes[left] += chance * (1 - without[min(left, len(days))])
            no[left] += chance * without[-1] * (len(days) < left)
    return yes, no


def test_occurrence_equals_enumeration():
    model, oracle, posteriors = tiny(0)
    horizon, chosen = 5, np.array([2, 4])
    found = occurrence_probability(oracle, posteriors, chosen, QUESTIONS, horizon)
    left = np.array([[0.2, 0.3, 0.1, 0.4], [0.0, 0.5, 0.5, 0.0]])
    answered = occurrence_probability(oracle, posteriors, chosen, QUESTIONS, horizon, left)
    for row, history in enumerate((HISTORY, OTHER)):
        for number, codes in enumerate([[1], [0, 2], [3]]):
            yes, no = brute_occurrence(model, history, codes, horizon)
            # With more visits left than there are days it is as if the record went on for ever.
            np.testing.assert_allclose([found[row, number], no[-1]], [yes[-1], 1 - yes[-1]], rtol=1e-10)
            yes, no = left[row] @ yes[:4], left[row] @ no[:4]
            np.testing.assert_allclose(answered[row, number], yes / (yes + no), rtol=1e-10)


def test_endless_records_answer_every_question():
    _, oracle, posteriors = tiny(0)
    chosen = np.array([2, 4, 0])
    found = occurrence_probability(oracle, posteriors, chosen, QUESTIONS, 40)
    left = np.zeros((3, 60))
    left[:, -1] = 1.0
    answered = occurrence_probability(oracle, posteriors, chosen, QUESTIONS, 40, left)
    np.testing.assert_allclose(answered, found, rtol=1e-12)


@pytest.fixture(scope="module")
def records():
    data = DataConfig(
        source="latent",
        subjects=1500,
        vocabulary_size=80,
        tuning_fraction=0.8,
        events_mean=20.0,
        events_spread=0.6,
        seed=5,
    )
    loaded = load_sequences(data, sep_token=False)
    oracle = oracle_of(data, loaded.vocabulary.codes)
    assert oracle is not None
    sequences = loaded.splits["tuning"]
    return data, sequences, oracle, stage_posteriors(oracle, sequences)


def test_visits_left_are_as_frequent_as_promised(records):
    data, _, oracle, posteriors = records
    visits = posteriors.visits
    for so_far in (1, 4):
        reached = visits.counts[visits.counts >= so_far] - so_far
        chances = chances_of_visits_left(oracle.model, data, np.array([so_far]))[0]
        np.testing.assert_allclose(chances.sum(), 1.0)
        found = np.bincount(reached, minlength=len(chances))[:12]
        expected = len(reached) * chances[:12]
        assert (np.abs(found - expected) < 4 * np.sqrt(expected) + 1).all()


@pytest.mark.parametrize("horizon", [60, 400])
def test_answers_of_records_are_calibrated(records, horizon):
    """After the second visit, of records as they are: unknown answers are left out."""
    data, sequences, oracle, posteriors = records
    visits = posteriors.visits
    longer = np.flatnonzero(visits.counts > 1)
    chosen = visits.firsts[longer] + 1
    last = visits.firsts[longer] + visits.counts[longer] - 1
    frequent = np.argsort(-np.bincount(sequences.codes, minlength=80), kind="stable")
    questions = [[int(frequent[0])], [int(frequent[12])], frequent[20:30].tolist()]
    left = chances_of_visits_left(oracle.model, data, np.full(len(chosen), 2))
    found = occurrence_probability(oracle, posteriors, chosen, questions, horizon, left)
    endless = occurrence_probability(oracle, posteriors, chosen, questions, horizon)
    follow_up = visits.days[last] - visits.days[chosen]
    owner = np.repeat(np.arange(len(visits.counts)), visits.counts)[visits.of_token]
    of_second = np.zeros(len(visits.counts), np.int64)
    of_second[longer] = visits.days[chosen]
    days = visits.days[visits.of_token] - of_second[owner]
    late = (days > 0) & (days <= horizon)
    for number, codes in enumerate(questions):
        occurring = np.bincount(owner[late & np.isin(sequences.codes, codes)], minlength=len(visits.counts))
        yes = occurring[longer] > 0
        known = yes | (follow_up > horizon)
        assert known.sum() > 300
        _check_calibration(found[known, number], yes[known], least_bins=2)
        assert (found[:, number] > endless[:, number]).all()


def test_questions_that_cannot_be_asked():
    _, oracle, posteriors = tiny(0)
    with pytest.raises(InputError, match="The horizon is 0 days: give at least 1"):
        occurrence_probability(oracle, posteriors, np.array([2]), [[FIRST]], 0)
    with pytest.raises(InputError, match="names no code"):
        occurrence_probability(oracle, posteriors, np.array([2]), [[FIRST], []], 10)

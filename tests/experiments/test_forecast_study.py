"""The study of forecasts: no model beats the best possible one, and each row says what was compared."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from behrt_jax.config import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TaskTrainConfig,
    TrainConfig,
)
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation.oracle import make_oracle, oracle_of
from behrt_jax.records.load import load_sequences
from behrt_jax.records.synthetic.latent import LatentModel
from experiments.studies import forecast as oracle_forecast
from experiments.studies.forecast import (
    ForecastStudyConfig,
    forecast_metrics,
    forecast_study,
    next_visit_codes,
    onset_probabilities,
    stage_posteriors,
    with_subjects,
)
from experiments.studies.latent_course import latent_paths, onset_labels
from tests.evaluation.latent_cases import FIRST, make_sequences, stage_paths, tiny_model, visit_chance

BASE = PretrainConfig(
    model=ModelConfig(embedding_size=16, hidden_size=16, layers=1, heads=2, positions=32, dropout=0.0),
    data=DataConfig(
        source="latent",
        subjects=800,
        vocabulary_size=80,
        window="first",
        events_spread=0.5,
        held_out_fraction=0.4,
    ),
    optimizer=OptimizerConfig(learning_rate=4e-3),
    train=TrainConfig(epochs=2, batch_size=64),
)
PROBE = FinetuneConfig(
    name="scratch",
    from_scratch=True,
    optimizer=OptimizerConfig(learning_rate=3e-3),
    train=TaskTrainConfig(epochs=2),
)


@pytest.mark.slow
def test_the_oracle_is_not_beaten_and_runs_are_not_made_twice(tmp_path):
    config = ForecastStudyConfig(label_fractions=(1.0,), output=tmp_path)
    found = forecast_study(config, BASE, (PROBE,))
    assert found == json.loads((tmp_path / "forecast_study.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["scratch", "logistic regression", "gradient boosting"]
    assert found["oracle"]["auroc"]["value"] > 0.6
    for row in found["rows"]:
        gap = row["oracle_less_model"]
        assert gap["value"] == pytest.approx(found["oracle"]["auroc"]["value"] - row["auroc"]["value"])
        assert gap["high"] > 0  # never better than the best possible, beyond chance
        assert set(row["above"]) == {"oracle", *(other["model"] for other in found["rows"])} - {row["model"]}
    before = (tmp_path / "scratch_1" / "summary.json").stat().st_mtime_ns
    assert forecast_study(config, BASE, (PROBE,)) == found
    assert (tmp_path / "scratch_1" / "summary.json").stat().st_mtime_ns == before


def test_other_data_has_no_known_optimum(tmp_path):
    base = replace(BASE, data=DataConfig(source="clinical"))
    with pytest.raises(InputError, match="must be latent"):
        forecast_study(ForecastStudyConfig(output=tmp_path), base, ())


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no lora: choose among scratch"):
        forecast_study(ForecastStudyConfig(ways=("lora",), output=tmp_path), BASE, (PROBE,))


def test_twice_the_subjects_get_half_of_the_epochs():
    base = replace(BASE, train=replace(BASE.train, epochs=9))
    more, (way,) = with_subjects(2 * base.data.subjects, base, (PROBE,))
    assert more.data == replace(base.data, subjects=2 * base.data.subjects)
    assert (more.train.epochs, way.train.epochs) == (4, 1)
    assert with_subjects(None, base, (PROBE,)) == (base, (PROBE,))


# Forecasts of the oracle: equal to enumeration on tiny models, calibrated on generated records.


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
    monkeypatch.setattr(oracle_forecast, "_CHUNK", 12)
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
    assert forecast_metrics(forecast, labels)["auroc"] > 0.75

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
        metrics = forecast_metrics(forecast, labels)
        assert metrics["auroc"] > 0.6
        assert metrics["average_precision"] > 1.2 * labels.mean()
        base = labels.mean()
        assert metrics["loss"] < -(base * np.log(base) + (1 - base) * np.log(1 - base))


def _check_calibration(probabilities: np.ndarray, labels: np.ndarray) -> None:
    bins = np.digitize(probabilities, [0.01, 0.03, 0.1, 0.2, 0.3, 0.5])
    assert len(np.unique(bins)) > 3
    for number in np.unique(bins):
        chosen = probabilities[bins == number]
        error = np.sqrt((chosen * (1 - chosen)).sum())
        assert abs(labels[bins == number].sum() - chosen.sum()) < 4 * error


def test_forecast_metrics():
    probabilities = np.array([[0.9, 0.2], [0.6, 0.7]])
    labels = np.array([[True, False], [False, True]])
    metrics = forecast_metrics(probabilities, labels)
    assert metrics["loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.7]).mean())
    assert metrics["auroc"] == 1.0
    assert metrics["average_precision"] == 1.0
    assert (metrics["positives"], metrics["count"]) == (2, 4)
    alike = forecast_metrics(probabilities, np.zeros((2, 2), bool))
    assert alike["auroc"] is None
    assert alike["average_precision"] is None

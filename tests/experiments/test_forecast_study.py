"""The study of forecasts: no model beats the best possible one, and each row says what was compared."""

import json
from dataclasses import replace

import jax
import pytest

from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import (
    FinetuneConfig,
    OptimizerConfig,
    PretrainConfig,
    TaskTrainConfig,
    TrainConfig,
)
from behrt_jax.errors import InputError
from experiments.studies.forecast import ForecastStudyConfig, forecast_study, with_subjects

ONE = jax.devices()[:1]
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
def test_the_oracle_is_not_beaten_and_runs_are_not_made_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
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

"""The study of questions: it runs, compares like with like, and makes nothing twice."""

import json
from dataclasses import replace

import jax
import pytest

from behrt_jax.config.data import DataConfig
from behrt_jax.config.training import TaskTrainConfig
from experiments.studies import queries
from experiments.studies.queries import ASKED, NEVER, STUDY_BASE, QueriesStudyConfig, queries_study
from tests.models.rows import tiny_model

ONE = jax.devices()[:1]


@pytest.mark.slow
def test_the_study_asks_what_was_asked_and_what_never_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
    base = replace(
        STUDY_BASE,
        model=tiny_model(layers=1),
        data=DataConfig(
            source="latent", subjects=900, vocabulary_size=80, tuning_fraction=0.2, held_out_fraction=0.3
        ),
        queries=replace(STUDY_BASE.queries, questions=8),
    )
    head = replace(queries.WAYS["head"], train=TaskTrainConfig(max_steps=5))
    monkeypatch.setattr(queries, "WAYS", {"head": head})
    config = QueriesStudyConfig(
        quick=True, subjects=900, epochs=2, sizes=(60, 300), output=tmp_path / "study"
    )
    found = queries_study(config, base)
    assert found == json.loads((tmp_path / "study" / "queries_study.json").read_text())
    assert {row["horizon_days"]: row["asked_in_training"] for row in found["horizons"]} == {
        **dict.fromkeys(ASKED, True),
        **dict.fromkeys(NEVER, False),
    }
    assert not set(NEVER) & set(base.queries.horizon_days) and set(ASKED) < set(base.queries.horizon_days)
    for row in found["horizons"]:
        gap = row["best_less_zero_shot"]["value"]
        assert gap == pytest.approx(row["best"]["value"] - row["zero_shot"]["value"])
    # Of one horizon alone, so few subjects may be luckier with the prevalence.
    best, prevalence = (sum(row["loss"][who] for row in found["horizons"]) for who in ("best", "prevalence"))
    assert best < prevalence
    names = {"best possible", "zero-shot", "head", "logistic regression", "gradient boosting"}
    few, every = (row["labels"] for row in found["labels"]["rows"])
    assert few == 60 < every < 300  # all that there are
    for row in found["labels"]["rows"]:
        assert set(row["auroc"]) == names
        assert row["less_zero_shot"]["zero-shot"]["value"] == 0
    monkeypatch.setattr(queries, "pretrain", None)
    monkeypatch.setattr(queries, "finetune_on", None)
    again = queries_study(config, base)
    assert again == found
    assert "by the train labels" in capsys.readouterr().out

"""The study of few labels: what its labels say, and a run of it as a whole."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from behrt_jax.config.training import SearchConfig, TaskTrainConfig
from behrt_jax.data.prepared import read_prepared
from behrt_jax.presets import FINETUNE
from experiments.studies.few_labels import (
    CAUSE,
    OUTCOME,
    TEST,
    VALUE,
    WAYS,
    FewLabelsStudyConfig,
    drawn,
    few_labels_study,
    labels_of,
    prepared_records,
)

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return FewLabelsStudyConfig((CAUSE,), (60,), seeds=1, subjects=800, hidden=16, layers=1, output=output)


def test_a_cause_and_a_value_decide(config):
    data = read_prepared(prepared_records(config))
    codes = data.vocabulary.codes
    bins = [codes.index(f"{TEST}//Q{number}") for number in range(1, 6)]
    part = data.splits["train"]
    own = {
        subject: part.codes[start:stop]
        for subject, start, stop in zip(part.subject_ids, part.offsets[:-1], part.offsets[1:], strict=True)
    }
    labels = labels_of(CAUSE, config.output, data)
    train = np.isin(labels.subject_ids, part.subject_ids)
    has = np.array([codes.index(OUTCOME) in own[subject] for subject in labels.subject_ids[train]])
    # Log odds of -2 and 1.
    assert labels.values[train][has].mean() == pytest.approx(0.73, abs=0.12)
    assert labels.values[train][~has].mean() == pytest.approx(0.12, abs=0.05)
    labels = labels_of(VALUE, config.output, data)
    train = np.isin(labels.subject_ids, part.subject_ids)
    last = [[code for code in own[s] if code in bins][-1] for s in labels.subject_ids[train]]
    agree = np.isin(last, bins[3:]) == labels.values[train]
    assert 0.95 < agree.mean() < 1.0
    some = drawn(labels, data, 60, 0)
    sizes = {name: np.isin(some.subject_ids, one.subject_ids).sum() for name, one in data.splits.items()}
    assert (sizes["train"], sizes["tuning"]) == (60, 15)
    assert not np.array_equal(drawn(labels, data, 60, 1).subject_ids, some.subject_ids)


@pytest.mark.slow
def test_the_study_compares_with_the_better_baseline(config, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
    # What is compared does not depend on how long it trains, and of so few labels would be 800 steps.
    short = {"train": TaskTrainConfig(max_steps=20), "search": SearchConfig(size=2)}
    monkeypatch.setitem(FINETUNE, "lora", replace(FINETUNE["lora"], **short))
    found = few_labels_study(config)
    assert found == json.loads((config.output / "few_labels.json").read_text())
    (row,) = found["rows"]
    best = row[row["best baseline"]]["value"]
    assert best == max(row[name]["value"] for name in ("logistic regression", "gradient boosting"))
    for name in WAYS:
        less = row[f"{name} less the best"]
        assert less["value"] == pytest.approx(row[name]["value"] - best)
        assert less["low"] <= less["value"] <= less["high"]
    assert few_labels_study(config) == found  # from the predictions that are there

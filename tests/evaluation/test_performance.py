"""Intervals come from resampled subjects; an assessment compares on the same draws and takes groups apart."""

from dataclasses import replace

import numpy as np

from behrt_jax.data.predictions import PredictionFile
from behrt_jax.evaluation.performance import (
    Figures,
    age_groups,
    assess_predictions,
    bootstrap,
    fact_groups,
    interval,
    mean_figures,
    subject_draws,
    too_small,
)
from behrt_jax.evaluation.task_baselines import Baseline


def mean_scorer(values):
    return lambda weights: {"mean": weights @ values / weights.sum(axis=1)}


def test_all_examples_of_a_subject_come_together_and_as_many_subjects_as_there_are():
    ids = np.array([7, 9, 7, -3, 9, 9])
    weights = np.concatenate(list(subject_draws(ids, 50, seed=1).weights()))
    assert weights.shape == (50, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), np.full(50, 3.0))
    assert len(np.unique(weights, axis=0)) > 5


def test_draws_are_those_of_the_seed_whatever_the_pieces(monkeypatch):
    ids = np.arange(40) % 11
    first = np.concatenate(list(subject_draws(ids, 30, seed=1).weights()))
    monkeypatch.setattr("behrt_jax.evaluation.performance._PIECE", 80)
    pieces = list(subject_draws(ids, 30, seed=1).weights())
    assert len(pieces) == 15
    np.testing.assert_array_equal(np.concatenate(pieces), first)
    assert (np.concatenate(list(subject_draws(ids, 30, seed=2).weights())) != first).any()


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for seed in range(200):
        of_subject = rng.normal(size=60)
        ids = np.repeat(np.arange(60), 3)
        found = bootstrap(mean_scorer(of_subject[ids]), subject_draws(ids, 200, seed)).entry("mean")
        held += found["low"] <= 0 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.90 <= held / 200 <= 0.98
    # Were the examples resampled in place of subjects, the width would be that of 180 values.
    np.testing.assert_allclose(np.mean(widths), 2 * 1.96 / np.sqrt(60), rtol=0.1)


def test_differences_are_paired():
    values = np.random.default_rng(0).normal(size=100)
    draws = subject_draws(np.arange(100), 300, 0)
    one, other = bootstrap(mean_scorer(values), draws), bootstrap(mean_scorer(values - 0.25), draws)
    found = one.less(other, "mean")
    np.testing.assert_allclose([found["value"], found["low"], found["high"]], 0.25)
    both = mean_figures([one, other])
    np.testing.assert_allclose(both.values["mean"], one.values["mean"] - 0.125)
    np.testing.assert_allclose(both.drawn["mean"], one.drawn["mean"] - 0.125)


def test_one_subject_has_no_interval_and_undefined_draws_are_counted():
    found = bootstrap(mean_scorer(np.ones(3)), subject_draws(np.full(3, 5), 100, 0)).entry("mean")
    assert found == {"value": 1.0, "low": None, "high": None}
    drawn = np.concatenate([np.full(30, np.nan), np.linspace(0, 1, 70)])
    assert Figures({"a": 0.5}, {"a": drawn}).entry("a")["undefined_draws"] == 30
    assert interval(np.array([np.nan, np.nan, 1.0])) is None
    assert Figures({"a": np.nan}, {"a": drawn}).entry("a") == {"value": None, "low": None, "high": None}


# Assessments of predictions.


def binary_file(seed=0, count=300, flipped=0.0):
    rng = np.random.default_rng(seed)
    probabilities = rng.random(count)
    labels = rng.random(count) < probabilities
    shown = np.where(rng.random(count) < flipped, 1 - probabilities, probabilities)
    none = dict.fromkeys(("seen_before", "members"))
    return PredictionFile(
        "binary", {"kind": "binary"}, (), rng.integers(0, 100, count), np.arange(count), labels, shown,
        decisions=shown > 0.5, **none,
    ), probabilities  # fmt: skip


def test_a_better_baseline_is_ahead_and_an_equal_one_is_not_told_apart():
    file, truth = binary_file(flipped=0.5)
    baselines = [
        Baseline("truth", truth, "knows"),
        Baseline("same", file.predictions, "equal"),
        Baseline("none", None, "Not fitted: why."),
    ]
    found = assess_predictions(file, baselines, {}, draws=200, seed=0)
    better, same, missing = found["baselines"]
    for name, worse in (("auroc", -1), ("average_precision", -1), ("brier", 1), ("log_loss", 1)):
        entry = better["model_less_baseline"][name]
        assert entry["ahead"] == entry["better"] == "baseline"
        assert entry["value"] * worse > 0
        figures = found["model"]["figures"][name]["value"], better["figures"][name]["value"]
        np.testing.assert_allclose(entry["value"], figures[0] - figures[1])
        equal = same["model_less_baseline"][name]
        assert (equal["value"], equal["low"], equal["high"]) == (0, 0, 0)
        assert (equal["ahead"], equal["better"]) == ("unclear", "equal")
    assert (missing["figures"], missing["note"]) == (None, "Not fitted: why.")
    # Where the figures of both vary alike, the paired interval is narrower than that of either.
    close = Baseline("close", np.clip(file.predictions + 0.01, 0, 1), "")
    paired = assess_predictions(file, [close], {}, 200, 0)["baselines"][0]
    own, both = paired["figures"]["brier"], paired["model_less_baseline"]["brier"]
    assert both["high"] - both["low"] < 0.3 * (own["high"] - own["low"])


def test_groups_are_judged_by_their_own_examples():
    file, _ = binary_file()
    inside = np.arange(300) < 120
    groups = {"age": {"young": inside, "few": np.arange(300) < 8}}
    found = assess_predictions(file, [], groups, draws=30, seed=0)["groups"]["age"]
    part = replace(
        file, subject_ids=file.subject_ids[inside], times=file.times[inside], labels=file.labels[inside],
        predictions=file.predictions[inside], decisions=file.decisions[inside],
    )  # fmt: skip
    alone = assess_predictions(part, [], {}, draws=30, seed=0)
    assert found[0]["figures"] == alone["model"]["figures"]
    assert found[0]["counts"] == alone["counts"]
    assert found[1]["figures"] is None
    assert "fewer than 10" in found[1]["reason"]


def test_counts_tell_examples_subjects_and_positives():
    file, _ = binary_file()
    counts = assess_predictions(file, [], {}, draws=2, seed=0)["counts"]
    ids = file.subject_ids.tolist()
    assert counts == {
        "examples": 300,
        "subjects": len(set(ids)),
        "positives": int(file.labels.sum()),
        "positive_subjects": len({subject for subject, label in zip(ids, file.labels, strict=True) if label}),
    }


def test_an_ensemble_of_equal_members_gains_nothing():
    file, _ = binary_file()
    file = replace(file, members=np.stack([file.predictions] * 3, axis=1))
    figures = assess_predictions(file, [], {}, draws=20, seed=0)["ensemble"]["figures"]
    np.testing.assert_allclose(figures["auroc"]["ensemble"], figures["auroc"]["mean_member"])
    np.testing.assert_allclose(figures["auroc"]["spread"], 0, atol=1e-12)
    entry = figures["ece"]["ensemble_less_mean_member"]
    np.testing.assert_allclose([entry["value"], entry["low"], entry["high"]], 0, atol=1e-12)
    assert figures["calibration_slope"]["mean_member"] == figures["calibration_slope"]["ensemble"]


# Groups by age and sex hold each example once; small ones are said to be so.


def test_age_bands_are_of_completed_years():
    ages = np.array([0.0, 17.99, 18.0, 39.9, 40, 64.99, 65, 79.9, 80, 101], np.float32)
    groups = age_groups(ages)
    found = {name: np.flatnonzero(inside).tolist() for name, inside in groups.items()}
    assert found == {"0-17": [0, 1], "18-39": [2, 3], "40-64": [4, 5], "65-79": [6, 7], "80+": [8, 9]}
    assert list(age_groups(np.array([30.0, 90.0]))) == ["18-39", "80+"]
    assert [inside.tolist() for inside in age_groups(np.array([30.0, np.nan])).values()] == [
        [True, False],
        [False, True],
    ]


def test_groups_are_what_static_facts_say():
    ids = np.array([1, 2, 2, 3, 4])
    facts = {1: "GENDER//F", 2: "SEX//M", 9: "SEX//M"}

    def places(*known):
        return {
            name: {value: np.flatnonzero(inside).tolist() for value, inside in groups.items()}
            for name, groups in fact_groups(ids, *known).items()
        }

    found = places([*facts, 3, 3, 1], [*facts.values(), "GENDER//F", "SEX//M", "RACE//X"])
    sex = {"F": [0], "F and M": [3], "M": [1, 2], "unknown": [4]}
    assert found == {"sex": sex, "race": {"X": [0], "unknown": [1, 2, 3, 4]}}
    assert places([1, 2], ["INSURANCE//X", "MARITAL//Y"]) == {}
    concepts = ["GENDER//8507", "Gender/F", "RACE//8527", "RACE//0", "ETHNICITY//38003563"]
    named = places([1, 2, 1, 2, 3], concepts)
    assert named["sex"] == {"F": [1, 2], "male": [0], "unknown": [3, 4]}
    assert named["race"] == {"White": [0], "unknown": [1, 2, 3, 4]}
    assert named["ethnicity"] == {"Hispanic or Latino": [3], "unknown": [0, 1, 2, 4]}


def test_groups_with_few_positives_or_negatives_are_too_small():
    assert too_small("binary", np.arange(30) < 10) is None
    assert too_small("binary", np.arange(30) < 9) == "too small: 9 positives (fewer than 10)"
    assert too_small("binary", np.arange(3) < 1) == "too small: 1 positives and 2 negatives (fewer than 10)"
    assert too_small("regression", np.zeros(9)) == "too small: 9 examples (fewer than 10)"
    assert too_small("survival", np.stack([np.ones(30), np.arange(30) < 9], axis=1)) is not None
    assert too_small("survival", np.stack([np.ones(30), np.arange(30) < 10], axis=1)) is None

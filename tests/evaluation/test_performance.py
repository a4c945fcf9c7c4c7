"""An assessment compares on the same draws, takes groups apart, and gives reasons in place of figures."""

from dataclasses import replace

import numpy as np

from behrt_jax.data.predictions import PredictionFile
from behrt_jax.evaluation.performance import age_groups, assess_predictions, sex_groups, too_small
from behrt_jax.evaluation.task_baselines import Baseline


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


def test_sex_is_what_static_facts_say():
    ids = np.array([1, 2, 2, 3, 4])
    facts = {1: "GENDER//F", 2: "SEX//M", 9: "SEX//M"}
    groups = sex_groups(ids, [*facts, 3, 3, 1], [*facts.values(), "GENDER//F", "SEX//M", "RACE//X"])
    found = {name: np.flatnonzero(inside).tolist() for name, inside in groups.items()}
    assert found == {"F": [0], "F and M": [3], "M": [1, 2], "unknown": [4]}
    assert sex_groups(ids, [1, 2], ["RACE//X", "RACE//Y"]) == {}


def test_groups_with_few_positives_or_negatives_are_too_small():
    assert too_small("binary", np.arange(30) < 10) is None
    assert too_small("binary", np.arange(30) < 9) == "too small: 9 positives (fewer than 10)"
    assert too_small("binary", np.arange(3) < 1) == "too small: 1 positives and 2 negatives (fewer than 10)"
    assert too_small("regression", np.zeros(9)) == "too small: 9 examples (fewer than 10)"
    assert too_small("survival", np.stack([np.ones(30), np.arange(30) < 9], axis=1)) is not None
    assert too_small("survival", np.stack([np.ones(30), np.arange(30) < 10], axis=1)) is None

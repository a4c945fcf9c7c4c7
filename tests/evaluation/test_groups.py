"""Groups by age and sex hold each example once; small ones are said to be so."""

import numpy as np

from behrt_jax.evaluation.performance import age_groups, sex_groups, too_small


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

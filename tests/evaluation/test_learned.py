"""What a model makes of codes: by hand on a few, and without those that hardly anyone has."""

import numpy as np

from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.evaluation.learned import LEAST, confusions, neighbours
from behrt_jax.evaluation.masked_codes import MaskedCodeResults

FIRST = len(SPECIAL_TOKENS)
A, B, C, RARE = range(FIRST, FIRST + 4)


def vocabulary(counts=(500, 300, 100, 3)):
    return Vocabulary(
        (*SPECIAL_TOKENS, "A", "B", "C", "RARE"),
        np.array([0] * FIRST + list(counts)),
        (*[None] * FIRST, "first", "second", None, "of few"),
    )


def results(codes, guesses, subjects):
    codes, guesses = np.array(codes, np.int32), np.array(guesses, np.int32)
    ranks = (codes != guesses).astype(np.int64)
    return MaskedCodeResults(codes, np.ones(len(codes)), ranks, np.array(subjects), guesses)


def test_the_code_predicted_instead_most_often_is_named():
    # A is masked in ten subjects, found in four, taken for B in five and for C in one; B is always found.
    guesses = [A] * 4 + [B] * 5 + [C] + [B] * LEAST
    found = confusions(vocabulary(), results([A] * 10 + [B] * LEAST, guesses, [*range(10), *range(LEAST)]))
    assert found == [
        {
            "code": "A",
            "description": "first",
            "masked": 10,
            "subjects": 10,
            "found": 0.4,
            "instead_code": "B",
            "instead_description": "second",
            "instead_share": 0.5,
        }
    ]


def test_those_most_often_missed_come_first_and_no_more_than_asked():
    codes, guesses = [A] * 10 + [B] * 20, [B] * 10 + [A] * 15 + [B] * 5
    found = results(codes, guesses, [*range(10), *range(20)])
    assert [one["code"] for one in confusions(vocabulary(), found)] == ["B", "A"]
    assert [one["code"] for one in confusions(vocabulary(), found, most=1)] == ["B"]


def test_codes_of_few_subjects_and_few_events_are_not_named():
    # Nine subjects have A masked, however often; RARE is masked in many, but has three train events.
    few = results([A] * 30, [B] * 30, [k % 9 for k in range(30)])
    assert confusions(vocabulary(), few) == []
    rare = results([RARE] * 20, [A] * 20, range(20))
    assert confusions(vocabulary(), rare) == []
    taken = results([A] * 10, [RARE] * 6 + [C] * 4, range(10))
    (one,) = confusions(vocabulary(), taken)
    assert (one["instead_code"], one["instead_share"]) == ("C", 0.4)
    assert confusions(vocabulary(), results([A] * 10, [RARE] * 10, range(10))) == []


def test_special_tokens_are_never_named():
    counts = vocabulary()
    counts.counts[2] = 5000  # events whose code got no row
    assert confusions(counts, results([2] * 20, [A] * 20, range(20))) == []
    assert [one["code"] for one in neighbours(counts, np.eye(FIRST + 4))] == ["A", "B", "C"]


def test_neighbours_are_those_of_the_nearest_direction():
    table = np.zeros((FIRST + 4, 2), np.float32)
    table[A], table[B], table[C], table[RARE] = (1, 0), (3, 3), (0, -2), (1, 0)
    found = neighbours(vocabulary(), table, most=2, near=1)
    assert [(one["code"], one["events"]) for one in found] == [("A", 500), ("B", 300)]
    (of_a,), (of_b,) = (one["near"] for one in found)
    assert (of_a["code"], of_b["code"]) == ("B", "A")  # RARE points exactly as A does, but is not named
    np.testing.assert_allclose([of_a["cosine"], of_b["cosine"]], np.sqrt(0.5), rtol=1e-6)
    assert all(len(one["near"]) == 2 for one in neighbours(vocabulary(), table))
    assert np.isfinite(
        [near["cosine"] for one in neighbours(vocabulary(), table * 0) for near in one["near"]]
    ).all()

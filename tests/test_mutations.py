"""A sample of what ``python -m tests.mutations`` does at length."""

from collections import Counter

import pytest

from behrt_jax.errors import InputError
from tests.mutations import SUBJECTS, Subject, outcomes


@pytest.mark.parametrize(
    ("kind", "count"),
    [("prepared", 40), ("inputs", 5), pytest.param("runs", 40, marks=pytest.mark.slow)],
)
def test_what_is_damaged_is_named_or_makes_no_difference(tmp_path, kind, count):
    for subject in SUBJECTS[kind](tmp_path):
        found = [*outcomes(subject, count, seed=1)]
        assert not [what for outcome, what in found if outcome in ("silent", "traceback")]
        counts = Counter(outcome for outcome, _ in found)
        assert counts["named"] >= count // 4, (subject.name, counts)


def test_a_difference_without_a_word_and_an_exception_are_told(tmp_path):
    (tmp_path / "digits").write_text("123456")

    def read(folder):
        text = (folder / "digits").read_text()
        if len(text) < 6:
            raise InputError("digits is cut short: write it again.")
        return int(text)

    ours, theirs = (Subject("digits", tmp_path, read, ours) for ours in (True, False))
    found = Counter(outcome for outcome, _ in outcomes(ours, 100, seed=0))
    assert min(found[outcome] for outcome in ("named", "silent", "traceback")) > 0
    told = Counter(outcome for outcome, _ in outcomes(theirs, 100, seed=0))
    assert told["other"] == found["silent"] and not told["silent"]

"""Checks of the visits in prepared data: codes that are stamped at their end, and repeated codes."""

from collections.abc import Iterator

import numpy as np

from behrt_jax.data.places import place_in
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.visits import DAY
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.diagnosis.leakage_data import FIRST_CODE

_LEAST_VISITS = 20
_MOST = 0.9  # of the visits of a family, and of the other events of a visit


def check_repeats(data: SequenceSet) -> Iterator[Finding]:
    """How many codes of a visit the subject already had in an earlier one."""
    later = repeats = 0
    for part in data.splits.values():
        codes = part.codes >= FIRST_CODE
        subject = np.repeat(np.arange(len(part)), part.lengths)[codes]
        code, visit = part.codes[codes], part.visits[codes]
        order = np.lexsort([visit, code, subject])
        subject, code, visit = subject[order], code[order], visit[order]
        new = np.ones(len(code), bool)  # a code of a subject
        new[1:] = (subject[1:] != subject[:-1]) | (code[1:] != code[:-1])
        in_visit = new.copy()
        in_visit[1:] |= visit[1:] != visit[:-1]
        counted = in_visit & (visit > 0)
        later += int(np.count_nonzero(counted))
        repeats += int(np.count_nonzero(counted & ~new))
    if later:
        yield Finding(
            "repeated-codes",
            "info",
            f"{repeats / later:.1%} of the {later:,} codes of visits after the first are repeats of the "
            "subject's earlier codes.",
            "Repeats are easy, and hide how well new codes are predicted.",
            "Report metrics of new and of repeated codes apart.",
        )


def check_visit_ends(data: SequenceSet) -> Iterator[Finding]:
    """Families of codes (what stands before the first //) that close their visits, as billing codes do.

    A family closes a visit if all its events have one time, by which most others of the visit are past.
    Only stays of a day and more count, so visits need ids: what is done last in a consultation is no sign.
    """
    families, family_of = np.unique(
        [code.split("//")[0] for code in data.vocabulary.codes], return_inverse=True
    )
    visits = np.zeros(len(families), np.int64)  # stays in which it is among others
    closed = visits.copy()
    chance = np.zeros(len(families))  # logarithm, that a random order closes all of those
    for part in data.splits.values():
        if len(part):
            _add_visit_ends(part, family_of, visits, closed, chance)
    alarm = (visits >= _LEAST_VISITS) & (closed >= _MOST * visits)
    alarm &= chance < np.log(0.01 / len(families))
    # What is called a discharge belongs there.
    alarm &= np.array(["DISCHARGE" not in family.upper() for family in families.tolist()])
    alarm[family_of[:FIRST_CODE]] = False
    for row in np.flatnonzero(alarm):
        yield Finding(
            "stamped-at-visit-end",
            "warning",
            f"{families[row]} codes come all at once at the end of {closed[row]:,} of {visits[row]:,} visits "
            "of a day or more.",
            "They look written at discharge: during the visit they are not known, though other sources date "
            "them at its beginning.",
            "Predict before or after the whole visit, and say with delays when they are known.",
        )


def _add_visit_ends(
    part: Sequences, family_of: np.ndarray, visits: np.ndarray, closed: np.ndarray, chance: np.ndarray
) -> None:
    """Add the visits of one split to the counts of each family, ``[families]``."""
    per_subject = np.maximum.reduceat(part.visits, part.offsets[:-1]).astype(np.int64) + 1  # [S]
    visit = np.repeat(np.cumsum(per_subject) - per_subject, part.lengths) + part.visits  # [T]
    order = np.lexsort([part.times, family_of[part.codes], visit])
    by_visit, family, time = visit[order], family_of[part.codes][order], part.times[order]
    leads = np.ones(len(order), bool)
    leads[1:] = (by_visit[1:] != by_visit[:-1]) | (family[1:] != family[:-1])
    first = np.flatnonzero(leads)  # of each family in each visit
    size = np.diff(first, append=len(order))
    at, family, begin, end = by_visit[first], family[first], time[first], time[first + size - 1]

    order = np.lexsort([part.times, visit])
    time, by_visit = part.times[order], visit[order]
    starts = np.searchsorted(by_visit, at)
    stops = np.searchsorted(by_visit, at, side="right")
    new_time = np.ones(len(time), bool)
    new_time[1:] = (by_visit[1:] != by_visit[:-1]) | (time[1:] != time[:-1])
    distinct = np.bincount(by_visit[new_time])[at]  # times of the visit
    others = stops - starts - size
    past = place_in(time, starts, stops, end, inclusive=True) - starts - size
    span = time[stops - 1] - time[starts]
    counted = (others > 0) & (span >= DAY)
    closes = counted & (begin == end) & (past >= _MOST * others)
    visits += np.bincount(family[counted], minlength=len(visits))
    closed += np.bincount(family[closes], minlength=len(visits))
    likely = np.log(np.minimum(1 / distinct[closes] + 1 - _MOST, 1))
    chance += np.bincount(family[closes], likely, minlength=len(visits))

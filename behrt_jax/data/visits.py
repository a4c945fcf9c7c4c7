"""Visits of sorted events: their numbers, and the codes that come again within one."""

import numpy as np

from behrt_jax.data.ordering import sort_rows

DAY = 86_400_000_000
"""Microseconds in a day."""
_SHORT = 8
"""Events of a visit that are compared with each other one by one."""


def number_visits(
    subject: np.ndarray, time: np.ndarray, named: np.ndarray | None = None, visit: np.ndarray | None = None
) -> np.ndarray:
    """Number the visits of all subjects through, in the order of their first events.

    Args:
        subject: int32 ``[events]``, ascending.
        time: int64 ``[events]`` microseconds, ascending within a subject.
        named: bool ``[events]``, whether the event has a visit id; none has where not given.
        visit: int64 ``[events]``, that id. A visit without one is a calendar day.

    Returns:
        int32 ``[events]``.
    """
    if not len(subject):
        return np.empty(0, np.int32)
    day = time // DAY
    columns = (
        [subject, day] if named is None or visit is None else [subject, named, np.where(named, visit, day)]
    )
    leads = _leads(columns)  # an event that continues the visit of the one before it does not lead
    run = np.cumsum(leads, dtype=np.int32) - np.int32(1)  # [events]
    if named is None or not named.any():
        return run
    # Other visits may interrupt one, so that it has several runs.
    runs = np.arange(run[-1] + 1, dtype=np.int32)
    *key, grouped = sort_rows([*(column[leads] for column in columns), runs])
    heads = _leads(key)
    is_first = np.zeros(len(runs), bool)
    is_first[grouped[heads]] = True
    number = np.cumsum(is_first, dtype=np.int32) - np.int32(1)  # right where is_first
    of_run = np.empty(len(runs), np.int32)
    of_run[grouped] = number[grouped[heads]][np.cumsum(heads) - 1]
    return of_run[run]


def first_in_visit(visit: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first event of each code in each visit.

    Args:
        visit: int32 ``[events]``, as `number_visits` gives them.
        code: int32 ``[events]``.

    Returns:
        Whether an event is the first, bool ``[events]``; the places of those firsts whose code comes again,
        int32 ``[repeated]``; and how often that code is in the visit, int64 ``[repeated]``, 2 or more.
    """
    first = np.ones(len(code), bool)
    again = _may_come_again(visit, code)
    if not again.any():
        return first, np.empty(0, np.int32), np.empty(0, np.int64)
    # Only visits with such an event need sorting.
    suspect = np.zeros(int(visit.max()) + 1, bool)
    suspect[visit[again]] = True
    shared = np.flatnonzero(suspect[visit]).astype(np.int32)
    *key, place = sort_rows([visit[shared], code[shared], shared])
    heads = np.flatnonzero(_leads(key))
    times = np.diff(np.append(heads, len(shared)))
    place = place[heads]
    first[shared] = False
    first[place] = True
    return first, place[times > 1], times[times > 1]


def _may_come_again(visit: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Whether an event's code is in its visit before it; events of long or interrupted visits just may.

    Comparing each event with the few before it is many times faster than sorting.

    Returns:
        bool ``[events]``.
    """
    again = np.zeros(len(code), bool)
    for back in range(1, min(_SHORT, len(code))):
        same = visit[back:] == visit[:-back]
        if not same.any():
            break
        again[back:] |= same & (code[back:] == code[:-back])
    if len(code) > _SHORT:
        again[_SHORT:] |= visit[_SHORT:] == visit[:-_SHORT]
    if (visit[1:] < visit[:-1]).any():
        again = (np.bincount(visit) > 1)[visit]
    return again


def _leads(columns: list[np.ndarray]) -> np.ndarray:
    """Whether a row differs from the one before it: bool ``[rows]``; the first one does."""
    leads = np.ones(len(columns[0]), bool)
    leads[1:] = columns[0][1:] != columns[0][:-1]
    for column in columns[1:]:
        leads[1:] |= column[1:] != column[:-1]
    return leads

"""Where subjects and times lie in the flat arrays of a split."""

import numpy as np


def place_in(
    ascending: np.ndarray, starts: np.ndarray, stops: np.ndarray, at: np.ndarray, inclusive: bool
) -> np.ndarray:
    """Binary search in many runs of one array side by side.

    Args:
        ascending: int64 ``[n]``, ascending within each run.
        starts: first place of each run, int64 ``[runs]``.
        stops: one after the last, int64 ``[runs]``.
        at: what to look for, int64 ``[runs]``.
        inclusive: whether equal ones count as before.

    Returns:
        One after the last place of the run whose value is below ``at`` (or equal), int64 ``[runs]``.
    """
    low, high = starts.astype(np.int64), stops.astype(np.int64)
    while (low < high).any():
        searching = low < high
        middle = (low + high) // 2
        value = ascending[np.where(searching, middle, 0)]
        before = (value <= at) if inclusive else (value < at)
        low = np.where(searching & before, middle + 1, low)
        high = np.where(searching & ~before, middle, high)
    return low


def find_subjects(subject_ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Place of each of some subjects.

    Args:
        subject_ids: int64 ``[subjects]``, distinct, in any order.
        wanted: int64 ``[n]``.

    Returns:
        int64 ``[n]``, -1 where it is not there.
    """
    if not len(subject_ids):
        return np.full(len(wanted), -1)
    order = np.argsort(subject_ids, kind="stable")
    place = order[np.searchsorted(subject_ids[order], wanted).clip(max=len(order) - 1)]
    return np.where(subject_ids[place] == wanted, place, -1)

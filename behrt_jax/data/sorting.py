"""Sorting rows by several integer columns at once, runs of equal rows, and search in sorted arrays.

To be sorted, the columns are packed into 64-bit words first.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

_WORD = 64
_FEW = 4096
# Common granularities of microsecond times: minute, second, millisecond.
_STEPS = (60_000_000, 1_000_000, 1_000)


def sort_rows(columns: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Sort rows by the first column, ties by the second, and so on.

    Rows that are in order already come back as they are. Where all columns fit into one word of 64 bits
    together (less each column's smallest value and its common time step), that word alone is sorted and
    taken apart again, which is several times faster than finding a permutation and applying it.

    Args:
        columns: integer or bool arrays ``[rows]``, the most significant first.

    Returns:
        The columns with their rows in order, of the same types; they may share memory with the given.
    """
    columns = list(columns)
    if not len(columns[0]) or in_order(columns):
        return columns
    ranges = [_Range(column) for column in columns]
    if sum(part.bits for part in ranges) > _WORD:
        ranges = [part.with_step() for part in ranges]
    words = _pack(ranges)
    if len(words) > 1:
        order = _order(words)
        return columns if order is None else [column[order] for column in columns]
    word = words[0]
    if ascending(word):
        return columns
    order = _rough_order(word)
    if order is not None:
        word = word[order]
    word.sort(kind="stable")
    left = _WORD
    result = []
    for part in ranges:
        left -= part.bits
        result.append(part.unpack(word, left))
    return result


def in_order(columns: Sequence[np.ndarray]) -> bool:
    """Tell whether rows ascend by the first column, ties by the second, and so on; looks at a few first."""
    if len(columns[0]) > 2 * _FEW and not in_order([column[:_FEW] for column in columns]):
        return False
    tied = np.ones(len(columns[0]) - 1, bool)  # rows like the one before them in the columns so far
    for column in columns:
        before, after = column[:-1], column[1:]
        if ((after < before) & tied).any():
            return False
        tied &= after == before
        if not tied.any():
            break
    return True


def ascending(values: np.ndarray) -> bool:
    """Tell whether no value is smaller than the one before it; looks at a few first."""
    some = values[:_FEW]
    return bool((some[1:] >= some[:-1]).all() and (values[1:] >= values[:-1]).all())


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Distinct int64 numbers, ascending, of numbers ``[n]`` in any order.

    What `np.unique` gives, but many times faster for numbers that come as runs in order.
    """
    numbers = np.asarray(numbers, np.int64)
    if not ascending(numbers):
        (numbers,) = sort_rows([numbers])
    return numbers[leads([numbers])]


def _rough_order(word: np.ndarray) -> np.ndarray | None:
    """Permutation that sorts a word's highest 16 bits in use; None where they are in order already.

    Such few bits are sorted by radix, and a merge sort of what is nearly in order then takes a third
    of the time of sorting outright (measured at a million rows).
    """
    used = int(word.max()).bit_length()
    highest = (word >> np.uint64(max(0, used - 16))).astype(np.uint16)
    return None if ascending(highest) else np.argsort(highest, kind="stable")


class _Range:
    """A column as unsigned offsets from its smallest value, in units of its step."""

    def __init__(self, column: np.ndarray, step: int = 1):
        self.column = column
        self.step = step
        self.least = int(column.min())
        self.bits = ((int(column.max()) - self.least) // step).bit_length()

    def with_step(self) -> "_Range":
        if self.bits <= 32:
            return self
        for step in _STEPS:
            if not (self.column[:1024] % step).any() and not (self.column % step).any():
                return _Range(self.column, step)
        return self

    def offsets(self) -> np.ndarray:
        """uint64 ``[rows]``."""
        # Differences of int64 that overflow wrap around to the right unsigned number.
        offsets = self.column.astype(np.int64).view(np.uint64)
        offsets = offsets - np.uint64(self.least % 2**_WORD)
        return offsets if self.step == 1 else offsets // np.uint64(self.step)

    def unpack(self, word: np.ndarray, shift: int) -> np.ndarray:
        """The column back from words that hold it in ``bits`` bits from ``shift`` up."""
        if not self.bits:
            return np.full(len(word), self.least, self.column.dtype)
        offsets = word >> np.uint64(shift)
        offsets &= np.uint64(2**self.bits - 1)
        if self.step != 1:
            offsets *= np.uint64(self.step)
        offsets += np.uint64(self.least % 2**_WORD)
        return offsets.view(np.int64).astype(self.column.dtype, copy=False)


def _pack(ranges: Sequence[_Range]) -> list[np.ndarray]:
    """Lay the columns' bits end to end in as many words ``[rows]`` as they need; columns may straddle."""
    rows = len(ranges[0].column)
    words = [np.zeros(rows, np.uint64)]
    left = _WORD
    for part in ranges:
        if not part.bits:
            continue
        offsets = part.offsets()
        over = part.bits - left
        if over > 0:
            if left:
                words[-1] |= offsets >> np.uint64(over)
            offsets = offsets & np.uint64(2**over - 1)
            words.append(np.zeros(rows, np.uint64))
            left, bits = _WORD, over
        else:
            bits = part.bits
        left -= bits
        words[-1] |= offsets << np.uint64(left)
    return words


def _order(words: list[np.ndarray]) -> np.ndarray | None:
    """Permutation that sorts by the first word, ties by the next ones; None where it changes nothing."""
    first = words[0]
    in_order = ascending(first)
    if in_order:
        same = first[1:] == first[:-1]
        if not same.any():
            return None
        order = np.arange(len(first))
    else:
        # The row's number takes the place of the lowest bits: sorting is faster than finding a permutation.
        low = np.uint64((len(first) - 1).bit_length())
        tagged = ((first >> low) << low) | np.arange(len(first), dtype=np.uint64)
        rough = _rough_order(tagged)
        tagged = tagged if rough is None else tagged[rough]
        tagged.sort(kind="stable")
        order = (tagged & ((np.uint64(1) << low) - np.uint64(1))).view(np.int64)
        tagged >>= low
        same = tagged[1:] == tagged[:-1]
    if same.any():
        run = np.concatenate([[0], np.cumsum(~same)])
        member = np.zeros(len(first), bool)
        member[1:] = same
        member[:-1] |= same
        places = np.flatnonzero(member)  # of rows that are not told apart so far
        rows = order[places]
        lower = np.lexsort([*(word[rows] for word in words[::-1]), run[places]])
        if in_order and ascending(lower):
            return None
        order[places] = rows[lower]
    return order


# Runs of rows in flat arrays, and search in them.


def leads(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Rows that differ from the one before them in any column, and the first one: bool ``[rows]``."""
    found = np.ones(len(columns[0]), bool)
    found[1:] = columns[0][1:] != columns[0][:-1]
    for column in columns[1:]:
        found[1:] |= column[1:] != column[:-1]
    return found


def runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of equal values: the place of the first, and one after that of the last."""
    if len(values):
        yield from pairwise([*np.flatnonzero(leads([values])).tolist(), len(values)])


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges ``starts[i], ..., starts[i] + lengths[i] - 1``: int64 ``[sum of lengths]``.

    Both are integers ``[ranges]``, the lengths zero or more.
    """
    ends = np.cumsum(lengths, dtype=np.int64)  # [ranges]
    total = ends[-1] if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


def run_offsets(lengths: ArrayLike) -> np.ndarray:
    """Starts of the runs of a concatenation, and the end of the last one: int64 ``[runs + 1]``."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


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


def find_ids(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Place of each of the wanted ids, int64 ``[n]``, in ``ids``: -1 where it is not there.

    The first one where it is there several times. The ids, integers ``[ids]``, may be in any order; they are
    searched at once where they ascend.
    """
    if not len(ids):
        return np.full(len(wanted), -1)
    order = None if ascending(ids) else np.argsort(ids, kind="stable")
    listed = ids if order is None else ids[order]
    place = np.searchsorted(listed, wanted).clip(max=len(ids) - 1)
    found = listed[place] == wanted
    return np.where(found, place if order is None else order[place], -1)

"""Windows of histories, and rows that several windows share.

Which windows share a row is chosen from the histogram of their lengths alone, by best-fit decreasing
(Johnson 1974, Fast algorithms for bin packing): windows are placed from long to short, each into the fullest
row that still holds it. Windows of one length are interchangeable, so all of them are placed at once (the
histogram of Krell et al. 2021, arXiv 2107.02027); the cost then depends on the number of distinct lengths,
not of windows. The outcome is a recipe (so many rows with such lengths) that random windows fill anew in each
epoch; the number of rows never changes.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from behrt_jax.data.facts import FactRuns
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.sorting import ragged_indices, run_offsets
from behrt_jax.errors import InputError

WindowChoice = Literal["all", "random", "recent", "first"]


@dataclass(frozen=True)
class Windows:
    """Runs of tokens, one or more per subject."""

    starts: np.ndarray
    """First token of each window in the flat arrays, int64 ``[windows]``."""
    lengths: np.ndarray
    """Tokens of each window, int32 ``[windows]``."""
    facts: FactRuns | None = None
    """Static facts that stand before each window; None where a model reads none."""

    def __len__(self) -> int:
        return len(self.starts)

    def segment_lengths(self, cls_token: bool) -> np.ndarray:
        """Tokens of each segment, with its facts and [CLS]: int32 ``[windows]``."""
        lengths = self.lengths + cls_token
        return lengths if self.facts is None else lengths + self.facts.lengths

    def take(self, chosen: np.ndarray) -> "Windows":
        """Some of them."""
        facts = None if self.facts is None else self.facts.take(chosen)
        return Windows(self.starts[chosen], self.lengths[chosen], facts)


def choose_windows(
    sequences: Sequences, max_tokens: int, how: WindowChoice, rng: np.random.Generator | None = None
) -> Windows:
    """Choose which part of each history is read where it is longer than the model.

    The lengths do not depend on ``rng``, so the number of rows that the windows fill is the same in every
    epoch.

    Args:
        sequences: the histories.
        max_tokens: longest window, in tokens, static facts included where the histories have any.
        how: ``all`` cuts every history into consecutive windows of ``max_tokens`` tokens, of which the last
            may be shorter, so that every token is in exactly one. The others take one window of
            ``min(tokens of the subject, max_tokens)`` tokens: ``recent`` the last tokens of a history,
            ``first`` the first, and ``random`` draws the start uniformly.
        rng: needed where ``how`` is ``random``.

    Returns:
        Windows in the order of the subjects; ``[subjects]``, but for ``all``, where a history without tokens
        has none.

    Raises:
        InputError: if ``max_tokens`` leaves no room for an event or ``how`` is unknown.
        ValueError: if ``how`` is ``random`` and there is no ``rng``.
    """
    tokens, starts = sequences.lengths, sequences.offsets[:-1]
    subjects = np.arange(len(tokens))
    facts = None if sequences.facts is None else sequences.facts.runs(subjects)
    room = room_beside(facts, max_tokens)  # [subjects], or the same for all
    if how not in get_args(WindowChoice):
        raise InputError(f"data.window is {how!r}: choose one of {', '.join(get_args(WindowChoice))}")
    lengths = np.minimum(tokens, room)
    if how == "all":
        pieces = -(-tokens // room)  # [subjects]
        subjects = np.repeat(subjects, pieces)  # [windows]
        longest = np.broadcast_to(room, len(tokens))[subjects]
        starts = starts[subjects] + longest * ragged_indices(np.zeros_like(pieces), pieces)
        lengths = np.minimum(longest, sequences.offsets[1:][subjects] - starts)
        facts = None if facts is None else facts.take(subjects)
    elif how == "recent":
        starts = starts + (tokens - lengths)
    elif how == "random":
        if rng is None:
            raise ValueError("random windows need a generator of random numbers")
        starts = starts + rng.integers(0, tokens - lengths, endpoint=True)
    return Windows(np.asarray(starts, np.int64), lengths.astype(np.int32), facts)


def room_beside(facts: FactRuns | None, max_tokens: int) -> np.ndarray | int:
    """Tokens that are left for events beside facts: int64 ``[n]``, or the same for all where there are none.

    Raises:
        InputError: not one is left, beside the facts of some subject.
    """
    if max_tokens < 1:
        raise InputError(f"data.max_length leaves a sequence {max_tokens} codes: give it more")
    if facts is None or not len(facts.lengths):
        return max_tokens
    most = int(facts.lengths.max())
    if most >= max_tokens:
        raise InputError(
            f"data.max_length leaves a sequence {max_tokens} codes, but a subject has {most} static facts: "
            "give it more, or prepare with fewer --static_codes."
        )
    return max_tokens - facts.lengths.astype(np.int64)


# Rows of windows.

Composition = tuple[tuple[int, int], ...]  # of (window length, copies)


@dataclass(frozen=True)
class Packing:
    """Compositions of rows, and how many rows have each."""

    row_length: int
    """Tokens that a row holds."""
    lengths: np.ndarray
    """Window lengths of every composition, one composition after the other, int32 ``[slots]``."""
    offsets: np.ndarray
    """Composition ``i`` is ``lengths[offsets[i]:offsets[i + 1]]``, int64 ``[compositions + 1]``."""
    uses: np.ndarray
    """Rows of each composition, int64 ``[compositions]``."""

    @property
    def rows(self) -> int:
        """Rows in all."""
        return int(self.uses.sum())


@dataclass(frozen=True)
class RowPlan:
    """Rows, each with the windows that share it."""

    windows: np.ndarray
    """Window indices, one row after the other, int64 ``[windows]``."""
    row_offsets: np.ndarray
    """Row ``i`` holds ``windows[row_offsets[i]:row_offsets[i + 1]]``, int64 ``[rows + 1]``."""

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Windows of some rows, int64 ``[rows]``; row -1 has none."""
        return np.where(rows < 0, 0, self.row_offsets[rows + 1] - self.row_offsets[rows])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Window indices of some rows, one row after the other."""
        return self.windows[ragged_indices(self.row_offsets[rows], self.counts(rows))]

    def table(self, rows: np.ndarray, segments: int) -> np.ndarray:
        """Window indices of some rows, none of which has more than so many: int64 ``[rows, segments]``, -1
        where there is no window.
        """
        filled = np.arange(segments) < self.counts(rows)[:, None]
        found = np.full(filled.shape, -1, np.int64)
        found[filled] = self.take(rows)
        return found


def pack_lengths(lengths: np.ndarray, row_length: int) -> Packing:
    """Compose rows of at most ``row_length`` tokens that hold windows of lengths ``[windows]``, integers.

    Only how often each length occurs matters, not their order.

    Raises:
        ValueError: if a window is longer than a row or has no tokens.
    """
    counts = np.bincount(_checked(lengths, row_length))
    rows_by_space: dict[int, list[tuple[Composition, int]]] = defaultdict(list)  # tokens free -> rows
    spaces: list[int] = []  # its keys that have rows, ascending

    def put(space: int, composition: Composition, rows: int) -> None:
        if not rows_by_space[space]:
            insort(spaces, space)
        rows_by_space[space].append((composition, rows))

    for length in map(int, np.flatnonzero(counts)[::-1]):
        left = int(counts[length])
        while left:
            place = bisect_left(spaces, length)
            fresh = place == len(spaces)
            if fresh:
                space, composition, rows = row_length, (), left
            else:
                space = spaces[place]
                composition, rows = rows_by_space[space].pop()
                if not rows_by_space[space]:
                    del spaces[place]
            # A row that took one window is now the fullest that fits, so it takes as many as it can.
            copies = min(space // length, left)
            filled = min(rows, left // copies)
            put(space - copies * length, (*composition, (length, copies)), filled)
            if rows > filled and not fresh:
                put(space, composition, rows - filled)
            left -= copies * filled
    return _flattened(row_length, (row for rows in rows_by_space.values() for row in rows))


def plan_rows(lengths: np.ndarray, row_length: int, rng: np.random.Generator) -> RowPlan:
    """Pack windows into rows; which window of a length goes where, and the order of rows, is random.

    The plan is a pure function of lengths, integers ``[windows]``, row length and the state of ``rng``.

    Raises:
        ValueError: if a window is longer than a row or has no tokens.
    """
    packing = pack_lengths(lengths, row_length)
    # Integers of 16 bits are sorted by radix, several times faster.
    lengths = np.asarray(lengths).astype(np.min_scalar_type(row_length))
    row_compositions = rng.permutation(np.repeat(np.arange(len(packing.uses)), packing.uses))  # [rows]
    slots = np.diff(packing.offsets)[row_compositions]  # [rows]
    slot_lengths = packing.lengths[ragged_indices(packing.offsets[row_compositions], slots)]  # [windows]
    shuffled = rng.permutation(len(lengths))
    windows = np.empty(len(lengths), np.int64)
    by_length = np.argsort(slot_lengths.astype(lengths.dtype), kind="stable")
    windows[by_length] = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    return RowPlan(windows, run_offsets(slots))


def one_per_row(count: int, rng: np.random.Generator | None = None) -> RowPlan:
    """Plan one window a row: in order, or in random order where there is an ``rng``."""
    windows = np.arange(count, dtype=np.int64) if rng is None else rng.permutation(count)
    return RowPlan(windows, np.arange(count + 1, dtype=np.int64))


def _checked(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Lengths that may be packed, or the error that says why not."""
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"a window of {lengths.min()} tokens cannot be packed: it needs one at least")
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(
            f"a window of {lengths.max()} tokens does not fit in a row of {row_length}: cut it first"
        )
    return lengths


def _flattened(row_length: int, rows: Iterable[tuple[Composition, int]]) -> Packing:
    """Packing as arrays, from pairs of a composition and the rows that have it."""
    compositions, uses = [], []
    for composition, count in rows:
        lengths, copies = np.array(composition, np.int32).T
        compositions.append(np.repeat(lengths, copies))
        uses.append(count)
    flat = np.concatenate([np.empty(0, np.int32), *compositions])
    return Packing(row_length, flat, run_offsets([len(c) for c in compositions]), np.array(uses, np.int64))

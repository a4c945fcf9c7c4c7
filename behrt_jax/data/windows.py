"""Which part of each subject's history is read, where the history is longer than the model.

A window is a run of consecutive tokens of one subject. Windows are held as starts and lengths into
the flat arrays of :class:`~behrt_jax.data.sequences.Sequences`, so choosing them copies no token.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from behrt_jax.data.sequences import Sequences
from behrt_jax.errors import InputError

SingleWindow = Literal["random", "recent", "first"]
WindowChoice = Literal["all", "random", "recent", "first"]


@dataclass(frozen=True)
class Windows:
    """Runs of tokens, one or more per subject."""

    starts: np.ndarray
    """First token of each window in the flat arrays, int64 ``[windows]``."""
    lengths: np.ndarray
    """Tokens of each window, int32 ``[windows]``."""

    def __len__(self) -> int:
        return len(self.starts)


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges ``starts[i], ..., starts[i] + lengths[i] - 1``.

    Args:
        starts: integers ``[ranges]``.
        lengths: integers ``[ranges]``, zero or more.

    Returns:
        int64 ``[sum of lengths]``.
    """
    ends = np.cumsum(lengths, dtype=np.int64)  # [ranges]
    total = ends[-1] if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


def choose_windows(
    sequences: Sequences, max_tokens: int, how: WindowChoice, rng: np.random.Generator | None = None
) -> Windows:
    """Windows of every subject: ``all`` cuts histories into :func:`consecutive_windows`, the other
    choices take one of :func:`subject_windows`; arguments and errors are theirs.
    """
    if how == "all":
        return consecutive_windows(sequences, max_tokens)
    return subject_windows(sequences, max_tokens, how, rng)


def subject_windows(
    sequences: Sequences, max_tokens: int, how: SingleWindow, rng: np.random.Generator | None = None
) -> Windows:
    """Choose one window of ``min(tokens of the subject, max_tokens)`` tokens for every subject.

    The lengths do not depend on ``how`` nor on ``rng``, so the number of rows that the windows fill
    is the same in every epoch.

    Args:
        sequences: the histories.
        max_tokens: longest window, in tokens.
        how: ``recent`` takes the last tokens of a history, ``first`` the first, ``random`` draws the
            start uniformly.
        rng: needed where ``how`` is ``random``.

    Returns:
        Windows ``[subjects]``, in the order of the subjects.

    Raises:
        InputError: if ``max_tokens`` is below 1 or ``how`` is unknown.
        ValueError: if ``how`` is ``random`` and there is no ``rng``.
    """
    _check(max_tokens, how)
    tokens = sequences.lengths
    lengths = np.minimum(tokens, max_tokens)
    starts = sequences.offsets[:-1]
    if how == "recent":
        starts = starts + (tokens - lengths)
    elif how == "random":
        if rng is None:
            raise ValueError("random windows need a generator of random numbers")
        starts = starts + rng.integers(0, tokens - lengths, endpoint=True)
    return Windows(np.asarray(starts, np.int64), lengths.astype(np.int32))


def consecutive_windows(sequences: Sequences, max_tokens: int) -> Windows:
    """Cut every history into consecutive windows of ``max_tokens`` tokens; the last may be shorter.

    Every token is in exactly one window. A history without tokens has none.

    Raises:
        InputError: if ``max_tokens`` is below 1.
    """
    _check(max_tokens)
    pieces = -(-sequences.lengths // max_tokens)  # [subjects]
    ends = np.repeat(sequences.offsets[1:], pieces)  # [windows]
    starts = np.repeat(sequences.offsets[:-1], pieces)
    starts = starts + max_tokens * ragged_indices(np.zeros_like(pieces), pieces)
    return Windows(np.asarray(starts, np.int64), np.minimum(max_tokens, ends - starts).astype(np.int32))


def _check(max_tokens: int, how: str = "first") -> None:
    if max_tokens < 1:
        raise InputError(f"data.max_length leaves a sequence {max_tokens} codes: give it more")
    if how not in get_args(WindowChoice):
        raise InputError(f"data.window is {how!r}: choose one of {', '.join(get_args(WindowChoice))}")

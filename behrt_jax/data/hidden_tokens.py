"""Which tokens of a history are not known yet at a prediction time, and what is left without them."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from behrt_jax.data.delays import CodeDelays
from behrt_jax.data.places import place_in
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.visits import number_visits
from behrt_jax.data.windows import ragged_indices

_PIECE_TOKENS = 1 << 22
"""Tokens looked at together."""

Known = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Examples ``[n]``, tokens of each that are known ``[n]``, places of those tokens in the split and their
visits ``[sum of the tokens]``."""


def known_where_hidden(
    part: Sequences,
    delays: CodeDelays,
    subjects: np.ndarray,
    times: np.ndarray,
    up_to: np.ndarray,
    max_tokens: int,
) -> Iterator[Known]:
    """The last known tokens of those examples from which a delay hides some token.

    Visits are numbered anew, in the order of their first known tokens: a number that is skipped would tell
    that there is something hidden.

    Args:
        part: the histories.
        delays: of the codes.
        subjects: int64 ``[examples]``, places in ``part``.
        times: prediction times, int64 ``[examples]``.
        up_to: one after the last token at or before that time, int64 ``[examples]``.
        max_tokens: most tokens of an example.
    """
    if not delays.delayed.any() or not len(subjects):
        return
    order = np.argsort(subjects, kind="stable")
    own, first = np.unique(subjects[order], return_index=True)
    first = np.append(first, len(order))
    for begin, end in _runs(np.cumsum(part.lengths[own]) // _PIECE_TOKENS):
        examples = order[first[begin] : first[end]]
        rank = np.repeat(np.arange(end - begin), np.diff(first[begin : end + 1]))  # [examples]
        yield from _known_of(
            part, delays, own[begin:end], examples, rank, times[examples], up_to[examples], max_tokens
        )


def _known_of(
    part: Sequences,
    delays: CodeDelays,
    own: np.ndarray,
    examples: np.ndarray,
    rank: np.ndarray,
    times: np.ndarray,
    up_to: np.ndarray,
    max_tokens: int,
) -> Iterator[Known]:
    """Those of some subjects, places ``own`` in the split; ``rank`` is an example's place in ``own``."""
    known_at = delays.known_at(part, own)  # [T], the tokens of these subjects
    tokens = ragged_indices(part.offsets[own], part.lengths[own])
    offsets = np.concatenate([[0], np.cumsum(part.lengths[own])])
    starts, stops = offsets[rank], offsets[rank + 1]
    up_to = starts + up_to - part.offsets[own[rank]]

    late = np.flatnonzero(known_at > part.times[tokens])
    owner = np.searchsorted(offsets, late, side="right")
    by_known = known_at[late][np.lexsort([known_at[late], owner])]
    begin = np.searchsorted(late, starts)
    recorded = np.searchsorted(late, up_to) - begin
    known = place_in(by_known, begin, np.searchsorted(late, stops), times, inclusive=True) - begin
    affected = np.flatnonzero(recorded > known)
    lengths = (up_to - starts)[affected]
    for first, last in _runs(np.cumsum(lengths) // _PIECE_TOKENS):
        chosen = affected[first:last]
        place = ragged_indices(starts[chosen], lengths[first:last])
        example = np.repeat(np.arange(len(chosen), dtype=np.int32), lengths[first:last])
        seen = known_at[place] <= times[chosen][example]
        place, example = tokens[place[seen]], example[seen]
        visits = _renumbered(example, part.times[place], part.visits[place])
        count = np.bincount(example, minlength=len(chosen))
        kept = np.minimum(count, max_tokens)
        recent = ragged_indices(np.cumsum(count) - kept, kept)
        yield examples[chosen], kept, place[recent], visits[recent]


def _renumbered(example: np.ndarray, times: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Visits of each example from 0, in the order of their first tokens: int32 ``[tokens]``."""
    if not len(example):
        return np.zeros(0, np.int32)
    number = number_visits(example, times, np.ones(len(example), bool), visits.astype(np.int64))
    leads = np.concatenate([[True], example[1:] != example[:-1]])
    return number - number[leads][np.cumsum(leads) - 1]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where runs of equal values begin and end."""
    if len(values):
        yield from pairwise([0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)])

"""Numeric values as part of the code: a quantile bin, fitted on the train split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from behrt_jax.data.event_columns import EventColumns
from behrt_jax.data.ordering import sort_rows
from behrt_jax.data.splits import hash_words

SAMPLE = 4096
"""Most values of a code that its quantiles are taken of."""


class ValueSample:
    """A bounded sample of each code's values, the same in whatever order and pieces they are added."""

    def __init__(self, names: Sequence[str], valued: np.ndarray):
        """Begin with nothing.

        Args:
            names: the codes.
            valued: bool ``[names]``, which of them to sample.
        """
        self.names = names
        self.valued = valued
        self.seen = np.zeros(len(names), np.int64)
        """Values added of each code, ``[names]``."""
        self._code = np.empty(0, np.int32)
        self._hash = np.empty(0, np.int64)
        self._value = np.empty(0, np.float32)

    def add(self, subject_ids: np.ndarray, times: np.ndarray, codes: np.ndarray, values: np.ndarray) -> None:
        """Add events: int64, int64, int32 places in ``names`` and float32, ``[events]`` each."""
        chosen = np.flatnonzero(self.valued[codes] & np.isfinite(values))
        code, value = codes[chosen], values[chosen] + np.float32(0)  # no negative zero
        self.seen += np.bincount(code, minlength=len(self.names))
        words = hash_words(subject_ids[chosen])
        for part in (times[chosen], code.astype(np.int64), value.view(np.int32).astype(np.int64)):
            words = hash_words((words ^ part.view(np.uint64)).view(np.int64))
        code = np.concatenate([self._code, code])
        hashed = np.concatenate([self._hash, (words >> np.uint64(1)).view(np.int64)])
        bits = np.concatenate([self._value, value]).view(np.int32)
        code, hashed, bits = sort_rows([code, hashed, bits])
        starts = np.searchsorted(code, np.arange(len(self.names)))
        kept = np.arange(len(code)) - starts[code] < SAMPLE
        self._code, self._hash, self._value = code[kept], hashed[kept], bits[kept].view(np.float32)

    def fit(self, bins: int, least: int) -> "ValueBins":
        """Cut the values of each code with at least ``least`` of them into bins of equal frequency."""
        fitted = np.flatnonzero(self.valued & (self.seen >= max(least, 1)))
        shares = np.arange(1, bins) / bins
        edges = [
            np.quantile(self._value[self._code == code], shares, method="inverted_cdf")
            for code in fitted.tolist()
        ]
        return ValueBins(
            tuple(self.names[code] for code in fitted.tolist()),
            np.array(edges, np.float32).reshape(len(fitted), bins - 1),
        )


@dataclass(frozen=True, eq=False)
class ValueBins:
    """Quantile bins of the codes that have any."""

    codes: tuple[str, ...]
    edges: np.ndarray
    """float32 ``[codes, bins - 1]``: bin Q1 ends with the first edge, which belongs to it, and so on. A
    value that makes up more than a bin's share closes several bins at once, and some stay empty."""

    def apply(self, events: EventColumns, values: np.ndarray) -> tuple[EventColumns, np.ndarray]:
        """Put the bin behind the code (``CODE//Q3``) where the event has a value and the code has bins.

        Args:
            events: the events.
            values: float32 ``[events]``, NaN where null.

        Returns:
            The events, with other ``names``, the same for whatever events; and which names are those of a
            bin, bool ``[names]``.
        """
        count = self.edges.shape[1] + 1
        binned = [[f"{code}//Q{place + 1}" for place in range(count)] for code in self.codes]
        names = sorted({*events.names, *(name for row in binned for name in row)})
        place = {name: index for index, name in enumerate(names)}
        own = np.array([place[name] for name in events.names], np.int32)
        of_bin = np.array([[place[name] for name in row] for row in binned], np.int32).reshape(-1, count)
        row_of = np.full(len(events.names), -1, np.int32)  # row in edges of each code
        given = {name: index for index, name in enumerate(events.names)}
        row_of[[given[code] for code in self.codes]] = np.arange(len(self.codes))
        row = row_of[events.codes]
        changed = (row >= 0) & np.isfinite(values)
        row, value = row[changed], values[changed]
        bins = np.zeros(len(row), np.int32)
        for edge in range(count - 1):
            bins += value > self.edges[row, edge]
        codes = own[events.codes]
        codes[changed] = of_bin[row, bins]
        is_bin = np.zeros(len(names), bool)
        is_bin[of_bin.ravel()] = True
        return replace(events, codes=codes, names=names), is_bin

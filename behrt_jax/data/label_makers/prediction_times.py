"""At which times a subject is labelled: which candidates are left, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from behrt_jax.config import MakeLabelsConfig
from behrt_jax.data.label_makers.split_history import SplitHistory
from behrt_jax.data.splits import hash_words


@dataclass(frozen=True, eq=False)
class MadeLabels:
    """The labels of one split, with an account of all candidates."""

    subject_ids: np.ndarray
    """int64 ``[labels]``."""
    times: np.ndarray
    """Prediction times, int64 ``[labels]``, microseconds since 1970."""
    values: Mapping[str, pa.Array]
    """Column of the label table -> ``[labels]``."""
    counts: Mapping[str, int]
    """``candidates`` (ends of visits) equals ``labels`` and all that begins with ``left out``."""


@dataclass(eq=False)
class Candidates:
    """The ends of visits, from which rule after rule leaves some out."""

    subjects: np.ndarray
    """int64 ``[candidates]``, places in the split, ascending."""
    times: np.ndarray
    """int64 ``[candidates]``."""
    left: np.ndarray = field(init=False)
    """bool ``[candidates]``: no rule has left it out so far."""
    counts: dict[str, int] = field(init=False)

    def __post_init__(self):
        self.left = np.ones(len(self.subjects), bool)
        self.counts = {"candidates": len(self.subjects)}

    def leave_out(self, why: str, rows: np.ndarray) -> None:
        """Leave out those of ``rows``, bool ``[candidates]``, that are left, and count them."""
        gone = rows & self.left
        self.left &= ~gone
        if count := int(np.count_nonzero(gone)):
            self.counts[f"left out: {why}"] = count

    def leave_out_short(self, history: SplitHistory, least: int) -> None:
        """Leave out those with fewer than ``least`` events up to the prediction time, and a time again."""
        events = history.events_up_to(self.subjects, self.times)
        self.leave_out(f"fewer than {least} events of history", events < least)
        rows = np.flatnonzero(self.left)
        rows = rows[np.lexsort([self.times[rows], self.subjects[rows]])]
        same = (np.diff(self.subjects[rows]) == 0) & (np.diff(self.times[rows]) == 0)
        again = np.zeros(len(self.times), bool)
        again[rows[1:][same]] = True
        self.leave_out("another visit ends at the same time", again)

    def choose(self, history: SplitHistory, config: MakeLabelsConfig, room: np.ndarray | None = None) -> None:
        """Keep all, or one of each subject: the last, or one drawn by a hash of seed and subject.

        Args:
            history: of these subjects.
            config: its ``times`` and ``seed`` are read.
            room: bool ``[candidates]``, which of them the last is taken from, whatever the outcome; of all
                that are left where not given.
        """
        if config.times == "all":
            return
        if config.times == "last" and room is not None:
            self.leave_out("follow-up ends before the horizon does", ~room)
        rows = np.flatnonzero(self.left)
        rows = rows[np.lexsort([self.times[rows], self.subjects[rows]])]
        own, first, count = np.unique(self.subjects[rows], return_index=True, return_counts=True)
        place = count - 1
        if config.times == "random":
            words = hash_words(history.part.subject_ids[own]).view(np.int64) ^ np.int64(config.seed)
            words = hash_words(words)
            place = (words % count.astype(np.uint64)).astype(np.int64)
        other = self.left.copy()
        other[rows[first + place]] = False
        self.leave_out("not the one that is chosen of the subject", other)

    def labelled(self, history: SplitHistory, values: Mapping[str, pa.Array], **counts: int) -> MadeLabels:
        """The candidates that are left, with values of each; ``counts`` are added to the account."""
        labels = int(np.count_nonzero(self.left))
        return MadeLabels(
            history.part.subject_ids[self.subjects[self.left]],
            self.times[self.left],
            values,
            self.counts | {"labels": labels} | counts,
        )

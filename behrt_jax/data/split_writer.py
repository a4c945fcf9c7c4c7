"""The sequences of one split, collected and written as they belong into a prepared data set."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from behrt_jax.data.arrow_columns import write_columns
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.store import EVENTS, SUBJECTS, read_split

_PART_ROWS = 1 << 20


class SplitWriter:
    """Collects the subjects of one split, ascending by id.

    Events are held in memory, or in raw files after a `flush`. Codes are any numbers at first: the
    vocabulary, which gives their ids, is only fitted when all are there.
    """

    def __init__(self, folder: Path, name: str):
        self._name = name
        self._raw = {field.name: folder / f"{name}-{field.name}.raw" for field in EVENTS}
        self.held = 0
        """Bytes of events in memory."""
        self._parts: dict[str, list[np.ndarray]] = {field.name: [] for field in EVENTS}
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._subjects: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []

    def append(
        self,
        subject_ids: np.ndarray,
        lengths: np.ndarray,
        codes: np.ndarray,
        ages: np.ndarray,
        visits: np.ndarray,
        times: np.ndarray,
    ) -> None:
        """Add subjects: ids and lengths int64 ``[subjects]``, the rest ``[events]`` as in `Sequences`."""
        self._subjects.append(subject_ids)
        self._lengths.append(lengths)
        for name, column in zip(self._parts, (codes, ages, visits, times), strict=True):
            # A view would keep all of what it is a part of.
            self._parts[name].append(column if column.base is None else column.copy())
            self.held += column.nbytes

    def flush(self) -> None:
        """Move what is held in memory to raw files."""
        for name, parts in self._parts.items():
            if name not in self._files:
                self._files[name] = self._stack.enter_context(self._raw[name].open("wb"))
            for part in parts:
                self._files[name].write(part.data)
            parts.clear()
        self.held = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def finish(self, folder: Path, ids: np.ndarray) -> Sequences:
        """Write all that was added into the data set, once, and give it back memory-mapped.

        Args:
            folder: the data set's.
            ids: vocabulary id of each code's number, int32.
        """
        lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
        subjects = np.concatenate([np.empty(0, np.int64), *self._subjects])
        offsets = np.cumsum(lengths)
        self._stack.close()
        kinds = (field.type.to_pandas_dtype() for field in EVENTS)
        columns = [self._events(name, kind) for name, kind in zip(self._parts, kinds, strict=True)]
        columns[0] = (ids[part] for part in columns[0])
        split = folder / self._name
        split.mkdir(parents=True, exist_ok=True)
        write_columns(split / "events.arrow", EVENTS, int(offsets[-1]), columns)
        write_columns(split / "subjects.arrow", SUBJECTS, len(subjects), [[subjects], [offsets[:-1]]])
        for file in self._raw.values():
            file.unlink(missing_ok=True)
        return read_split(split)

    def _events(self, name: str, kind: type) -> Iterator[np.ndarray]:
        """One column in parts; each leaves memory when the next one comes."""
        if self._files:
            with self._raw[name].open("rb") as file:
                while len(part := np.fromfile(file, kind, _PART_ROWS)):
                    yield part
        parts = self._parts[name]
        for place, part in enumerate(parts):
            parts[place] = np.empty(0, kind)
            yield part

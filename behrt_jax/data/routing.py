"""What happens to each chunk of events as it is read: codes numbered and selected, subjects noted, rows cut
by bucket of subjects.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EventCounts
from behrt_jax.data.ordering import ascending, distinct

_MANY_SUBJECTS = 1 << 22
_MARKS = 1 << 25  # bytes of a table with a mark for each subject
_CELLS = 1 << 16  # of a table that gives the bucket of most ids


class CodeNumbers:
    """Numbers of codes, given in the order in which they are met."""

    def __init__(self, select: Callable[[Sequence[str]], np.ndarray]):
        self._select = select
        self._place: dict[str, int] = {}
        self._known = pa.array([], pa.string())
        self._ascending: tuple[str, ...] = ()
        self._place_ascending = np.empty(0, np.int32)
        self.selected = np.empty(0, bool)
        self.events = np.empty(0, np.int64)

    @property
    def names(self) -> list[str]:
        return list(self._place)

    def numbers(self, dictionary: pa.Array) -> np.ndarray:
        """int32 ``[codes]``."""
        places = _places(dictionary, self._known)
        if places.null_count:
            new = dictionary.filter(places.is_null()).unique().to_pylist()
            chosen = self._select(new)
            markers = [name in (BIRTH_CODE, DEATH_CODE) for name in new]
            self.selected = np.concatenate([self.selected, chosen | markers])
            self.events = np.concatenate([self.events, np.zeros(len(new), np.int64)])
            self._place |= {name: index for index, name in enumerate(new, start=len(self._place))}
            self._known = pa.array(list(self._place), pa.string())
            places = _places(dictionary, self._known)
        return places.to_numpy()

    def ascending(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The names met so far, ascending, and the place among them of each number, int32 ``[names]``."""
        known = len(self._ascending)
        if known < len(self._place):
            new = sorted(list(self._place)[known:])
            self._ascending = tuple(sorted([*self._ascending, *new]))
            numbers = [self._place[name] for name in self._ascending]
            places = np.empty(len(numbers), np.int32)
            places[numbers] = np.arange(len(numbers), dtype=np.int32)
            self._place_ascending = places
        return self._ascending, self._place_ascending

    def prefixes(self) -> dict[str, int]:
        found = Counter()
        for name, events in zip(self._place, self.events.tolist(), strict=True):
            if name not in (BIRTH_CODE, DEATH_CODE):
                found[name.split("//")[0]] += events
        return dict(found)


def _places(names: pa.Array, known: pa.Array) -> pa.Array:
    """Place of each name in ``known``, int32; null where it is not there."""
    return pc.call_function("index_in", [names], pc.SetLookupOptions(known))


class SubjectSet:
    """The distinct subjects of many chunks: marks in a table while the ids lie close together."""

    def __init__(self):
        self._least = 0
        self._marks = np.zeros(0, bool)
        self._parts: list[np.ndarray] = []
        self._held = 0

    def add(self, ids: np.ndarray) -> None:
        """Note int64 ids ``[n]``, n at least 1."""
        if ascending(ids):
            ids = distinct(ids)
        least, most = int(ids.min()), int(ids.max())
        if len(self._marks):
            least, most = min(least, self._least), max(most, self._least + len(self._marks) - 1)
        if most - least < _MARKS:
            self._cover(least, most)
            self._marks[ids - self._least] = True
            return
        self._parts.append(pa.array(ids).unique().to_numpy())
        self._held += len(self._parts[-1])
        if self._held > _MANY_SUBJECTS:
            self._parts = [self.all()]
            self._held = len(self._parts[0]) // 2  # grows, so that merging stays rare

    def _cover(self, least: int, most: int) -> None:
        """Let the table reach from ``least`` to ``most``, and further, so that it rarely grows."""
        known = self._marks
        if len(known) and self._least <= least and most < self._least + len(known):
            return
        size = min(_MARKS, 2 * (most - least + 1))
        start = least if not len(known) or least == self._least else most - size + 1
        start = max(start, np.iinfo(np.int64).min)
        self._marks = np.zeros(max(size, most - start + 1), bool)
        if len(known):
            self._marks[self._least - start :][: len(known)] = known
        self._least = start

    def all(self) -> np.ndarray:
        marked = np.flatnonzero(self._marks) + self._least
        return distinct(np.concatenate([marked, *self._parts])) if self._parts else marked


def select_rows(table: pa.Table, codes: CodeNumbers, values: bool, counts: EventCounts) -> pa.RecordBatch:
    """The rows with a selected code, with that code's number."""
    code = table["code"].combine_chunks()
    lookup = codes.numbers(code.dictionary)
    indices = code.indices.to_numpy()
    np.add.at(codes.events, lookup, np.bincount(indices, minlength=len(lookup)))
    columns = {
        "subject_id": table["subject_id"],
        "time": table["time"].cast(pa.int64()),
        "code": lookup[indices],
    }
    if "visit_id" in table.column_names and table["visit_id"].null_count < table.num_rows:
        columns["visit_id"] = table["visit_id"]
    if values:
        columns["numeric_value"] = table["numeric_value"]
    rows = pa.table(columns)
    wanted = codes.selected[lookup]
    if not wanted.all():
        rows = rows.filter(pa.array(wanted[indices]))
        counts.drop("code not selected", table.num_rows - rows.num_rows)
    batches = rows.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], rows.schema)


class Buckets:
    """Cuts rows by bucket of their subject."""

    def __init__(self, boundaries: np.ndarray):
        self._boundaries = boundaries
        self._kind = np.uint8 if len(boundaries) < 256 else np.uint16  # narrow ones are sorted by radix
        self._shift = 0
        self._of_cell = self._cut = None
        if len(boundaries) and (span := int(boundaries[-1]) - int(boundaries[0])) < 1 << 62:
            # Cells are runs of ids, of equal length: only those that a boundary cuts must be searched.
            self._shift = max(0, (span // _CELLS).bit_length())
            starts = int(boundaries[0]) + (np.arange((span >> self._shift) + 1) << self._shift)
            lowest, highest = (
                np.searchsorted(boundaries, ids, side="right")
                for ids in (starts, starts + (1 << self._shift) - 1)
            )
            self._of_cell = lowest.astype(self._kind)
            self._cut = lowest != highest

    def cut(self, batch: pa.RecordBatch) -> list[tuple[int, pa.RecordBatch]]:
        """Bucket and rows; buckets without rows are left out."""
        boundaries = self._boundaries
        subject = batch["subject_id"].to_numpy()
        if ascending(subject):
            cuts = np.searchsorted(subject, boundaries)
        else:
            bucket = self._of(subject)
            cuts = np.cumsum(np.bincount(bucket, minlength=len(boundaries) + 1))[:-1]
            if len(boundaries):
                order = np.argsort(bucket, kind="stable")
                batch = batch.take(pa.array(order))
        edges = [0, *cuts.tolist(), batch.num_rows]
        return [
            (bucket, batch.slice(edges[bucket], edges[bucket + 1] - edges[bucket]))
            for bucket in range(len(edges) - 1)
            if edges[bucket + 1] > edges[bucket]
        ]

    def _of(self, subject: np.ndarray) -> np.ndarray:
        """Bucket of each subject ``[rows]``."""
        boundaries = self._boundaries
        if self._of_cell is None or self._cut is None:
            return np.searchsorted(boundaries, subject, side="right").astype(self._kind)
        cell = np.clip(subject, boundaries[0], boundaries[-1])
        cell -= boundaries[0]
        cell >>= self._shift
        bucket = self._of_cell[cell]
        doubtful = np.flatnonzero(self._cut[cell])
        bucket[doubtful] = np.searchsorted(boundaries, subject[doubtful], side="right")
        below = subject < boundaries[0]
        bucket[below] = 0
        return bucket

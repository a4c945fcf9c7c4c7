"""Small data sets for tests: events as plain rows, as an events table, and as a MEDS folder."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behrt_jax.data.events import BIRTH_CODE, EVENT_SCHEMA, SPLITS, VISIT_FIELD, EventCounts, EventSet
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.sequences import SequenceSet

DAY = 86_400_000_000
HOUR = 3_600_000_000
Layout = Literal["nested", "flat", "deep"]


class Row(NamedTuple):
    """One event; ``time`` in microseconds since 1970."""

    subject: int | None
    time: int | None
    code: str | None
    visit: int | None = None
    value: float | None = None


def born(subject: int, time: int = 0) -> Row:
    """The birth of a subject."""
    return Row(subject, time, BIRTH_CODE)


def events_table(rows: Sequence[Row], visits: bool = True) -> pa.Table:
    """Rows as an events table."""
    fields = [*EVENT_SCHEMA, *([VISIT_FIELD] if visits else [])]
    columns: dict[str, list[Any]] = {
        "subject_id": [row.subject for row in rows],
        "time": [row.time for row in rows],
        "code": [row.code for row in rows],
        "numeric_value": [row.value for row in rows],
        "visit_id": [row.visit for row in rows],
    }
    arrays = []
    for field in fields:
        values = pa.array(columns[field.name], None if field.name == "code" else field.type)
        arrays.append(values.cast(pa.string()).dictionary_encode() if field.name == "code" else values)
    return pa.table(arrays, names=[field.name for field in fields])


def event_set(
    rows: Sequence[Row], splits: Mapping[str, Sequence[int]] | None = None, **more: Any
) -> EventSet:
    """Rows as an event set; without splits of its own where none are given."""
    arrays = {name: np.array(ids, dtype=np.int64) for name, ids in (splits or {}).items()}
    visits = any(row.visit is not None for row in rows)
    return EventSet("test", events_table(rows, visits), arrays, EventCounts(read=len(rows)), **more)


def history_rows(subjects: int = 20, days: int = 6, seed: int = 0) -> list[Row]:
    """Made-up histories: each subject is born and then has a few codes on each of some days."""
    draw = random.Random(seed)
    rows = []
    for subject in range(1, subjects + 1):
        birth = draw.randrange(-20_000, 0) * DAY
        rows.append(born(subject, birth))
        for visit in range(days):
            day = draw.randrange(0, 5000) * DAY
            for _ in range(draw.randrange(1, 5)):
                time = day + draw.randrange(24) * HOUR
                code = f"DIAGNOSIS//{draw.randrange(8)}"
                rows.append(Row(subject, time, code, visit, draw.random()))
    return rows


def by_remainder(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Splits of the rows' subjects, about 8 : 1 : 1."""
    names = ["train"] * 8 + ["tuning", "held_out"]
    subjects = sorted({row.subject for row in rows if row.subject is not None})
    return {
        name: [subject for place, subject in enumerate(subjects) if names[place % 10] == name]
        for name in SPLITS
    }


def write_meds(
    folder: Path,
    rows: Sequence[Row],
    splits: Mapping[str, Sequence[int]] | None = None,
    *,
    layout: Layout = "flat",
    split_file: bool = True,
    types: Mapping[str, pa.DataType] | None = None,
    leave_out: Sequence[str] = (),
    extra: bool = False,
    descriptions: Mapping[str, str | None] | None = None,
    version: str = "0.4.1",
) -> Path:
    """Write a MEDS folder and return it.

    Args:
        folder: made if it is not there.
        rows: the events; a row's visit goes to the column ``hadm_id``.
        splits: split name -> subject ids; needed for the layout ``nested`` and for the split file.
        layout: shards in ``data/<split>/0.parquet``, in ``data/{0,1}.parquet``, or, as some pipelines
            write them, in ``data/part=0/cohort/0.parquet``.
        split_file: whether to write ``metadata/subject_splits.parquet`` (where there are splits).
        types: column -> Arrow type to write it in, in place of the standard's.
        leave_out: columns not to write.
        extra: add columns that the standard does not know.
        descriptions: of ``metadata/codes.parquet``; not written where not given.
        version: ``meds_version`` in ``metadata/dataset.json``.
    """
    parts: dict[str, list[Row]] = {}
    split_of = {subject: name for name, ids in (splits or {}).items() for subject in ids}
    for row in rows:
        subject = row.subject or 0
        name = {
            "nested": f"{split_of.get(subject, 'rest')}/0.parquet",
            "flat": f"{subject % 2}.parquet",
            "deep": "part=0/cohort/0.parquet",
        }[layout]
        parts.setdefault(name, []).append(row)
    for name, part in parts.items():
        file = folder / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_shard(part, types or {}, leave_out, extra), file)
    metadata = folder / "metadata"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "dataset.json").write_text(json.dumps({"dataset_name": "test", "meds_version": version}))
    if splits is not None and split_file:
        write_splits(folder, [(subject, name) for name, ids in splits.items() for subject in ids])
    if descriptions is not None:
        table = {"code": list(descriptions), "description": list(descriptions.values())}
        parents = pa.array([[]] * len(descriptions), pa.list_(pa.string()))
        pq.write_table(pa.table(table | {"parent_codes": parents}), metadata / "codes.parquet")
    return folder


def write_splits(folder: Path, pairs: Sequence[tuple[int | None, str | None]]) -> None:
    """Write ``metadata/subject_splits.parquet`` from (subject, split) pairs."""
    subjects, names = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    table = pa.table({"subject_id": pa.array(subjects, pa.int64()), "split": pa.array(names, pa.string())})
    pq.write_table(table, folder / "metadata" / "subject_splits.parquet")


def _shard(
    rows: Sequence[Row], types: Mapping[str, pa.DataType], leave_out: Sequence[str], extra: bool
) -> pa.Table:
    table = events_table(rows).rename_columns(["subject_id", "time", "code", "numeric_value", "hadm_id"])
    table = table.set_column(2, "code", table["code"].cast(pa.string()))
    for column, kind in types.items():
        table = table.set_column(table.column_names.index(column), column, _as(table[column], kind))
    if extra:
        table = table.append_column("__index_level_0__", pa.array(range(len(rows))))
        table = table.append_column("text_value", pa.array(["note"] * len(rows)))
    return table.drop_columns(list(leave_out))


def _as(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(kind):
        return values.cast(kind.value_type).dictionary_encode().cast(kind)
    if pa.types.is_timestamp(kind) and kind.tz:  # of what clocks there show
        options = pc.AssumeTimezoneOptions(kind.tz, ambiguous="earliest", nonexistent="latest")
        return pc.call_function("assume_timezone", [values], options)
    return values.cast(kind, safe=False)


def tokens(folder: Path) -> dict[int, tuple[list, ...]]:
    """Subject of prepared data -> its codes by name, ages, visits and times."""
    return tokens_of(read_prepared(folder))


def tokens_of(data: SequenceSet) -> dict[int, tuple[list, ...]]:
    """Likewise, of sequences in memory."""
    found = {}
    for part in data.splits.values():
        for place, subject in enumerate(part.subject_ids.tolist()):
            of = slice(part.offsets[place], part.offsets[place + 1])
            codes = [data.vocabulary.codes[code] for code in part.codes[of]]
            found[subject] = codes, *(column[of].tolist() for column in (part.ages, part.visits, part.times))
    return found

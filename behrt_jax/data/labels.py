"""Labels of subjects at prediction times, as the label schema of the Medical Event Data Standard has them.

Columns: subject_id (int64), prediction_time (timestamp, inclusive: an event at that very time is known),
and one of boolean_value, integer_value, float_value and categorical_value; the others are absent or null.
Source: the label schema of MEDS 0.4, https://github.com/Medical-Event-Data-Standard/meds.

Two kinds more, in columns that a reader of that schema can pass over: a set of codes (categorical_values, a
list of strings, for multi-label tasks), and survival, where every row has boolean_value (the event was seen)
and float_value (days from the prediction time to the event, or to the end of follow-up).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from behrt_jax.data.parquet import (
    cast_column,
    cast_or_refuse,
    is_whole_or_float,
    open_parquet,
    read_columns,
    require_columns,
)
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, data_files, refuse_versions

LabelKind = Literal["boolean", "integer", "float", "categorical", "codes", "survival", "none"]
"""``none``: subjects and prediction times alone, whose outcome nobody knows yet."""
KEYS = ("subject_id", "prediction_time")
VALUE_COLUMNS = {
    "boolean_value": pa.bool_(),
    "integer_value": pa.int64(),
    "float_value": pa.float64(),
    "categorical_value": pa.string(),
    "categorical_values": pa.list_(pa.string()),
}
"""The first four are those of the MEDS schema; the last one holds a set of codes."""
COLUMNS_OF_KIND: Mapping[LabelKind, tuple[str, ...]] = {
    "boolean": ("boolean_value",),
    "integer": ("integer_value",),
    "float": ("float_value",),
    "categorical": ("categorical_value",),
    "codes": ("categorical_values",),
    "survival": ("boolean_value", "float_value"),
}


_NO_LABELS = pa.schema(
    [("subject_id", pa.int64()), ("prediction_time", pa.timestamp("us")), *VALUE_COLUMNS.items()]
)


@dataclass(frozen=True, eq=False)
class Labels:
    """A label table, its rows in the order of the files and of their rows."""

    subject_ids: np.ndarray
    """int64 ``[labels]``; a subject may have several labels, and need not be in the data."""
    times: np.ndarray
    """Prediction times, int64 ``[labels]``, microseconds since 1970, inclusive."""
    values: np.ndarray
    """``[labels]``, none missing: bool, int64, float64, or object (strings; tuples of distinct strings in
    ascending order for codes), by ``kind``. Survival has float64 ``[labels, 2]``: days, and 1 where the event
    was seen, 0 where follow-up ended before. Of the kind ``none`` all are None (object)."""
    kind: LabelKind
    """Which of the value columns they come from."""
    duplicates: int = 0
    """Rows left out because they repeated the subject, time and value of another."""
    account: JsonObject = field(default_factory=dict)
    """What `workflows.make_labels` says of a table that it made; empty for others."""

    def __len__(self) -> int:
        return len(self.subject_ids)

    def positive(self) -> np.ndarray | None:
        """Which labels are positive, bool ``[labels]``; None where they are neither boolean nor 0 and 1."""
        if self.kind == "boolean":
            return self.values
        if self.kind == "integer" and np.isin(self.values, (0, 1)).all():
            return self.values == 1
        return None

    def value_ids(self) -> np.ndarray:
        """A number for each label, equal where the values are: int64 ``[labels]``, from 0."""
        if self.kind in ("codes", "none"):
            ids: dict[object, int] = {}
            return np.array([ids.setdefault(value, len(ids)) for value in self.values], np.int64)
        return np.unique(self.values, axis=None if self.values.ndim == 1 else 0, return_inverse=True)[1]

    def columns(self) -> Mapping[str, np.ndarray]:
        """The value columns as a table has them; of the kind ``none`` all of them."""
        if self.kind == "none":
            return dict.fromkeys(VALUE_COLUMNS, self.values)
        names = COLUMNS_OF_KIND[self.kind]
        if len(names) == 1:
            return {names[0]: self.values}
        return {"boolean_value": self.values[:, 1] > 0, "float_value": self.values[:, 0]}

    def take(self, rows: Sequence[int] | np.ndarray) -> "Labels":
        """Some of the rows, by number or by a bool ``[labels]``."""
        chosen = {name: getattr(self, name)[np.asarray(rows)] for name in ("subject_ids", "times", "values")}
        return replace(self, **chosen)


def read_labels(path: Path, *, as_written: bool = False, without_values: bool = False) -> Labels:
    """Read a Parquet file of labels, or all those in a folder (`files.data_files`) together.

    Files without rows add nothing, whatever their columns.

    Args:
        path: the file or folder.
        as_written: keep rows that repeat or contradict another; else a repeated subject, time and value is
            left out and counted.
        without_values: take a table without any value too, such as one of the two keys alone; its kind is
            ``none``.

    Raises:
        InputError: no file, one that is cut short, a missing column, a wrong type, a null subject id or
            prediction time, rows without a value or with values of several types, numbers that are not
            finite, labels that contradict each other, or no row at all.
    """
    path = Path(path)
    files = _files(path)
    rows = pa.concat_tables([_read_label_file(file) for file in files])
    if not rows.num_rows:
        raise InputError(f"{path} has no labels (0 rows): give the table of a task, with its labels.")
    kind = _kind_of(path, rows)
    if kind == "none" and not without_values:
        raise InputError(
            f"{path} has no value in any of its {rows.num_rows} rows: fill in one of "
            f"{', '.join(VALUE_COLUMNS)} (only predict does without)."
        )
    labels = Labels(
        subject_ids=rows["subject_id"].to_numpy(),
        times=rows["prediction_time"].cast(pa.int64()).to_numpy(),
        values=_values_of(path, rows, kind),
        kind=kind,
        account=_account(files[0]) if len(files) == 1 else {},
    )
    return labels if as_written else _distinct(path, labels)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        refuse_versions(path.parent)
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist: give a Parquet file of labels, or a folder of such files.")
    files = data_files(path)
    if not files:
        raise InputError(f"{path} holds no .parquet file: give the folder with the label table.")
    return files


def _account(file: Path) -> JsonObject:
    try:
        account = json.loads((pq.read_schema(file).metadata or {}).get(b"behrt_jax", b"{}"))
    except ValueError:
        return {}
    return account if isinstance(account, dict) else {}


def _distinct(path: Path, labels: Labels) -> Labels:
    """Each subject, time and value once, where it comes first."""
    value = labels.value_ids()
    order = np.lexsort([value, labels.times, labels.subject_ids])  # stable: first come, first kept
    subject, time, value = labels.subject_ids[order], labels.times[order], value[order]
    same = (subject[1:] == subject[:-1]) & (time[1:] == time[:-1])  # [labels - 1]
    other = same & (value[1:] != value[:-1])
    if other.any():
        pair = np.cumsum(np.concatenate([[True], ~same]))  # number of the subject and time, [labels]
        pairs = len(np.unique(pair[1:][other]))
        raise InputError(
            f"{path} has {pairs} pairs of subject and prediction time with labels that differ: keep one "
            "label for each."
        )
    if not same.any():
        return labels
    kept = np.sort(order[np.concatenate([[True], ~same])])
    return replace(labels.take(kept), duplicates=len(labels) - len(kept))


def _read_label_file(file: Path) -> pa.Table:
    """The columns of the schema, in its types; null where the file has none of that name."""
    with open_parquet(file) as opened:
        if not opened.metadata.num_rows:
            return _NO_LABELS.empty_table()
        require_columns(file, opened, KEYS)
        present = [name for name in (*KEYS, *VALUE_COLUMNS) if name in opened.schema_arrow.names]
        table = read_columns(file, opened, present)
    columns = {
        "subject_id": cast_column(file, "subject_id", table["subject_id"], pa.int64()),
        "prediction_time": cast_column(file, "prediction_time", table["prediction_time"], pa.timestamp("us")),
    }
    for name, values in columns.items():
        if values.null_count:
            raise InputError(
                f"{file} has no {name} in {values.null_count} of {table.num_rows} rows: fill it in, or "
                "leave these rows out."
            )
    for name, target in VALUE_COLUMNS.items():
        empty = pa.chunked_array([pa.nulls(table.num_rows, target)])
        columns[name] = _cast(file, name, table[name], target) if name in present else empty
    return pa.table(columns)


def _kind_of(path: Path, rows: pa.Table) -> LabelKind:
    """The one kind of which there are values, in every row; ``none`` where no row has any."""
    counts = {name: rows.num_rows - rows[name].null_count for name in VALUE_COLUMNS}
    counts = {name: count for name, count in counts.items() if count}
    if not counts:
        return "none"
    for kind, names in COLUMNS_OF_KIND.items():
        if tuple(counts) == names and min(counts.values()) == rows.num_rows:
            return kind
    if len(counts) > 1:
        found = " and ".join(f"{count} in {name}" for name, count in counts.items())
        raise InputError(
            f"{path} mixes types of labels, {found} (of {rows.num_rows} rows): put each task into a table of "
            "its own, with one value column (survival labels alone have two, boolean_value and float_value "
            "in every row)."
        )
    ((column, count),) = counts.items()
    raise InputError(
        f"{path} has no value in {rows.num_rows - count} of {rows.num_rows} rows: fill in {column}, or "
        "leave these rows out."
    )


def _values_of(path: Path, rows: pa.Table, kind: LabelKind) -> np.ndarray:
    """The values as :class:`Labels` has them; InputError where one is not finite, negative or null."""
    if kind == "none":
        return np.full(rows.num_rows, None)
    if kind == "codes":
        return _code_sets(path, rows["categorical_values"])
    *events, values = (rows[name].to_numpy() for name in COLUMNS_OF_KIND[kind])
    if np.issubdtype(values.dtype, np.floating):
        wrong = ~np.isfinite(values) | (values < 0 if events else False)
        if wrong.any():
            what = "a finite number of days, 0 or more," if events else "a finite number"
            raise InputError(
                f"{path} has float_value that is not {what} in {np.count_nonzero(wrong)} of {len(wrong)} "
                "rows: mend them, or leave these rows out."
            )
    return np.stack([values, events[0].astype(np.float64)], axis=1) if events else values


def _code_sets(path: Path, column: pa.ChunkedArray) -> np.ndarray:
    """Lists of codes as tuples, each of distinct codes in ascending order: object ``[rows]``."""
    lists = column.combine_chunks()
    flat = lists.flatten().dictionary_encode()
    if flat.null_count:
        raise InputError(
            f"{path} has {flat.null_count} null codes within categorical_values: leave them out of the lists."
        )
    names = np.array(flat.dictionary.to_pylist(), object)
    order = np.argsort(names)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    counts = np.diff(lists.offsets.to_numpy())
    row = np.repeat(np.arange(len(lists)), counts)
    place = np.unique(row * max(len(names), 1) + rank[flat.indices.to_numpy()])
    row, place = np.divmod(place, max(len(names), 1))
    ends = np.searchsorted(row, np.arange(len(lists)), side="right").tolist()
    codes, sets, start = names[order][place].tolist(), np.empty(len(lists), object), 0
    for index, end in enumerate(ends):
        sets[index] = tuple(codes[start:end])
        start = end
    return sets


def _cast(file: Path, name: str, values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    kind = values.type.value_type if pt.is_dictionary(values.type) else values.type
    if not _fits(kind, target) and not pt.is_null(kind):
        raise InputError(
            f"{file} has {values.type} in the column {name} ({len(values)} rows): write it as {target}."
        )
    return cast_or_refuse(file, name, values, target)


def _fits(kind: pa.DataType, target: pa.DataType) -> bool:
    if pt.is_list(target):
        is_list = pt.is_list(kind) or pt.is_large_list(kind)
        return is_list and (_fits(kind.value_type, target.value_type) or pt.is_null(kind.value_type))
    return {
        pa.bool_(): pt.is_boolean(kind),
        pa.int64(): is_whole_or_float(kind),
        pa.float64(): pt.is_floating(kind),
        pa.string(): pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind),
    }[target]


# Label tables of several binary tasks side by side: who is asked what at which time.


@dataclass(frozen=True, eq=False)
class LabelTables:
    """Tables of binary labels, and the subjects and prediction times that are in any of them."""

    names: tuple[str, ...]
    tables: tuple[Labels, ...]
    pairs: Labels
    """Each subject and prediction time once, ascending: the same whatever the order of tables and rows.
    Its values say nothing."""
    targets: np.ndarray
    """float32 ``[pairs, tables]``: 1 for a positive label, 0 for a negative one, NaN where there is none."""


def side_by_side(names: Sequence[str], tables: Sequence[Labels]) -> LabelTables:
    """Put tables of binary labels together: one at least, each of which has a subject and time once."""
    subjects = np.concatenate([table.subject_ids for table in tables])  # [labels of all tables]
    times = np.concatenate([table.times for table in tables])
    order = np.lexsort([times, subjects])
    ids, at = subjects[order], times[order]
    first = np.append(True, (ids[1:] != ids[:-1]) | (at[1:] != at[:-1]))
    pair = np.empty(len(order), np.int64)
    pair[order] = np.cumsum(first) - 1
    table = np.repeat(np.arange(len(tables)), [len(one) for one in tables])
    targets = np.full((np.count_nonzero(first), len(tables)), np.nan, np.float32)
    answers = [answer for one in tables if (answer := one.positive()) is not None]
    targets[pair, table] = np.concatenate(answers)
    pairs = Labels(ids[first], at[first], np.zeros(len(targets), bool), "boolean")
    return LabelTables(tuple(names), tuple(tables), pairs, targets)


def read_label_tables(paths: Sequence[Path]) -> LabelTables:
    """Read a table of each binary task, called after its file.

    Raises:
        InputError: as `labels.read_labels`, or a table of another kind of task; it names the file.
    """
    tables = []
    for path in paths:
        labels = read_labels(path)
        if labels.positive() is None:
            values = "integers other than 0 and 1" if labels.kind == "integer" else f"{labels.kind} labels"
            raise InputError(
                f"population.labels: {path} has {values}, but tasks that are trained at once are binary: "
                "give boolean_value, or train it by itself with --labels."
            )
        tables.append(labels)
    return side_by_side([path.stem for path in paths], tables)

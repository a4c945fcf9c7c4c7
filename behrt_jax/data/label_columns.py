"""The columns of a label table: read from files, checked, and turned into arrays of one kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from behrt_jax.data.sources.meds_files import cast_column, open_parquet, read_columns, require_columns
from behrt_jax.errors import InputError

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


def read_label_file(file: Path) -> pa.Table:
    """The columns of the schema, in its types; null where the file has none of that name.

    Raises:
        InputError: a file that cannot be read, a missing column, a wrong type, or a null key.
    """
    with open_parquet(file) as opened:
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
        if name in present:
            columns[name] = _cast(file, name, table[name], target)
        else:
            columns[name] = pa.chunked_array([pa.nulls(table.num_rows, target)])
    return pa.table(columns)


def kind_of(path: Path, rows: pa.Table) -> LabelKind:
    """The one kind of which there are values, in every row; ``none`` where no row has any.

    Raises:
        InputError: there are several kinds, or some rows are without a value.
    """
    counts = {name: rows.num_rows - rows[name].null_count for name in VALUE_COLUMNS}
    counts = {name: count for name, count in counts.items() if count}
    if not counts:
        return "none"
    if tuple(counts) == COLUMNS_OF_KIND["survival"] and set(counts.values()) == {rows.num_rows}:
        return "survival"
    if len(counts) > 1:
        found = " and ".join(f"{count} in {name}" for name, count in counts.items())
        raise InputError(
            f"{path} mixes types of labels, {found} (of {rows.num_rows} rows): put each task into a table of "
            "its own, with one value column (survival labels alone have two, boolean_value and float_value "
            "in every row)."
        )
    ((column, count),) = counts.items()
    if count < rows.num_rows:
        raise InputError(
            f"{path} has no value in {rows.num_rows - count} of {rows.num_rows} rows: fill in {column}, or "
            "leave these rows out."
        )
    return next(kind for kind, names in COLUMNS_OF_KIND.items() if names == (column,))


def values_of(path: Path, rows: pa.Table, kind: LabelKind) -> np.ndarray:
    """The values as `labels.Labels` has them.

    Raises:
        InputError: a number that is not finite, negative days, or a null among codes.
    """
    if kind == "none":
        return np.full(rows.num_rows, None)
    if kind == "codes":
        return code_sets(path, rows["categorical_values"])
    columns = [rows[name].to_numpy() for name in COLUMNS_OF_KIND[kind]]
    if kind in ("float", "survival"):
        numbers = columns[-1]
        wrong = ~np.isfinite(numbers)
        if kind == "survival":
            wrong |= numbers < 0
        if wrong.any():
            what = "a finite number" if kind == "float" else "a finite number of days, 0 or more,"
            raise InputError(
                f"{path} has float_value that is not {what} in {np.count_nonzero(wrong)} of {len(wrong)} "
                "rows: mend them, or leave these rows out."
            )
    if kind == "survival":
        event, days = columns
        return np.stack([days, event.astype(np.float64)], axis=1)
    return columns[0]


def code_sets(path: Path, column: pa.ChunkedArray) -> np.ndarray:
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
    try:
        return values.cast(target)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{file} has values in the column {name} that do not fit into {target}: mend or drop them."
        ) from error


def _fits(kind: pa.DataType, target: pa.DataType) -> bool:
    if pt.is_list(target):
        is_list = pt.is_list(kind) or pt.is_large_list(kind)
        return is_list and (_fits(kind.value_type, target.value_type) or pt.is_null(kind.value_type))
    return {
        pa.bool_(): pt.is_boolean(kind),
        pa.int64(): pt.is_integer(kind),
        pa.float64(): pt.is_floating(kind),
        pa.string(): pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind),
    }[target]

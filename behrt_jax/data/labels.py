"""Labels of subjects at prediction times, as the label schema of the Medical Event Data Standard has them.

Columns: subject_id (int64), prediction_time (timestamp, inclusive: an event at that very time is known),
and one of boolean_value, integer_value, float_value and categorical_value; the others are absent or null.
Source: the label schema of MEDS 0.4, https://github.com/Medical-Event-Data-Standard/meds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from behrt_jax.data.sources.meds_files import cast_column, open_parquet, read_columns, require_columns
from behrt_jax.errors import InputError

LabelKind = Literal["boolean", "integer", "float", "categorical"]
_KEYS = ("subject_id", "prediction_time")
_TYPES: dict[LabelKind, pa.DataType] = {
    "boolean": pa.bool_(),
    "integer": pa.int64(),
    "float": pa.float64(),
    "categorical": pa.string(),
}


@dataclass(frozen=True, eq=False)
class Labels:
    """A label table, its rows in the order of the files and of their rows."""

    subject_ids: np.ndarray
    """int64 ``[labels]``; a subject may have several labels, and need not be in the data."""
    times: np.ndarray
    """Prediction times, int64 ``[labels]``, microseconds since 1970, inclusive."""
    values: np.ndarray
    """``[labels]``, none missing: bool, int64, float64 or object (strings), by ``kind``."""
    kind: LabelKind
    """Which of the value columns they come from."""

    def __len__(self) -> int:
        return len(self.subject_ids)

    def positive(self) -> np.ndarray | None:
        """Which labels are positive, bool ``[labels]``; None where they are neither boolean nor 0 and 1."""
        if self.kind == "boolean":
            return self.values
        if self.kind == "integer" and np.isin(self.values, (0, 1)).all():
            return self.values == 1
        return None

    def unknown_to(self, subject_ids: np.ndarray) -> int:
        """How many distinct subjects of the labels are not among ``subject_ids``, int64 ``[n]``."""
        return len(np.setdiff1d(self.subject_ids, subject_ids))


def read_labels(path: Path) -> Labels:
    """Read a Parquet file of labels, or all ``.parquet`` files in a folder, at any depth, together.

    Raises:
        InputError: no file, one that is cut short, a missing column, a wrong type, a null subject id or
            prediction time, rows without a value or with values of several types, or no row at all.
    """
    path = Path(path)
    parts = [_read_file(file) for file in _files(path)]
    rows = pa.concat_tables(parts)
    if not rows.num_rows:
        raise InputError(f"{path} has no labels (0 rows): give the table of a task, with its labels.")
    kind = _kind_of(path, rows)
    values = rows[f"{kind}_value"].combine_chunks()
    if values.null_count:
        raise InputError(
            f"{path} has no value in {values.null_count} of {rows.num_rows} rows: fill in {kind}_value, or "
            "leave these rows out."
        )
    return Labels(
        subject_ids=rows["subject_id"].to_numpy(),
        times=rows["prediction_time"].cast(pa.int64()).to_numpy(),
        values=values.to_numpy(zero_copy_only=False),
        kind=kind,
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist: give a Parquet file of labels, or a folder of such files.")
    files = sorted(file for file in path.rglob("*.parquet") if file.is_file())
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise InputError(f"{path} holds no .parquet file: give the folder with the label table.")
    return files


def _read_file(file: Path) -> pa.Table:
    """The columns of the schema, in its types; null where the file has none of that name."""
    with open_parquet(file) as opened:
        require_columns(file, opened, _KEYS)
        wanted = [*_KEYS, *(f"{kind}_value" for kind in _TYPES)]
        present = [name for name in wanted if name in opened.schema_arrow.names]
        table = read_columns(file, opened, present)
    if len(present) == len(_KEYS):
        raise InputError(
            f"{file} has no column of values (of {table.num_rows} rows): add boolean_value, integer_value, "
            "float_value or categorical_value."
        )
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
    for kind, target in _TYPES.items():
        name = f"{kind}_value"
        if name in present:
            columns[name] = _values(file, name, table[name], target)
        else:
            columns[name] = pa.chunked_array([pa.nulls(table.num_rows, target)])
    return pa.table(columns)


def _values(file: Path, name: str, values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    kind = values.type.value_type if pt.is_dictionary(values.type) else values.type
    fits = {
        pa.bool_(): pt.is_boolean(kind),
        pa.int64(): pt.is_integer(kind),
        pa.float64(): pt.is_floating(kind),
        pa.string(): pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind),
    }[target]
    if not fits and not pt.is_null(kind):
        raise InputError(
            f"{file} has {values.type} in the column {name} ({len(values)} rows): write it as {target}."
        )
    try:
        return values.cast(target)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{file} has values in the column {name} that do not fit into {target}: mend or drop them."
        ) from error


def _kind_of(path: Path, rows: pa.Table) -> LabelKind:
    """The one kind of which there are values."""
    counts: dict[LabelKind, int] = {}
    for kind in get_args(LabelKind):
        column = rows[f"{kind}_value"]
        if column.null_count < rows.num_rows:
            counts[kind] = rows.num_rows - column.null_count
    if not counts:
        raise InputError(f"{path} has no value in any of its {rows.num_rows} rows: fill in one value column.")
    if len(counts) > 1:
        found = " and ".join(f"{count} in {kind}_value" for kind, count in counts.items())
        raise InputError(
            f"{path} mixes types of labels, {found} (of {rows.num_rows} rows): put each task into a table of "
            "its own, with one value column."
        )
    return next(iter(counts))

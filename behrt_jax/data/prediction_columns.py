"""The columns of predictions and of their labels, checked, as arrays; see `behrt_jax.data.predictions`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.config import TaskKind
from behrt_jax.errors import InputError

LABEL_COLUMNS: dict[TaskKind, tuple[tuple[str, ...], ...]] = {
    "binary": (("boolean_value",), ("integer_value",)),
    "multiclass": (("integer_value",), ("categorical_value",)),
    "multilabel": (("categorical_values",),),
    "regression": (("float_value",),),
    "survival": (("boolean_value", "float_value"),),
}
"""The columns, all of one choice, that a file of each kind has its labels in."""


def prediction_schema(kind: TaskKind, label: str | None = None) -> pa.Schema:
    """The columns of a file of predictions.

    Args:
        kind: of the task.
        label: multiclass: ``integer`` or ``categorical``, as the labels are.
    """
    columns: list[tuple[str, pa.DataType]] = [
        ("subject_id", pa.int64()),
        ("prediction_time", pa.timestamp("us")),
    ]
    if kind == "binary":
        columns += [("boolean_value", pa.bool_()), ("predicted_boolean_value", pa.bool_())]
        columns += [("predicted_boolean_probability", pa.float64())]
    elif kind == "multiclass":
        value = pa.int64() if label == "integer" else pa.string()
        columns += [(f"{label}_value", value), (f"predicted_{label}_value", value)]
        columns += [("predicted_probabilities", pa.list_(pa.float64()))]
    elif kind == "multilabel":
        columns += [("categorical_values", pa.list_(pa.string()))]
        columns += [
            ("predicted_probabilities", pa.list_(pa.float32())),
            ("seen_before", pa.list_(pa.bool_())),
        ]
    elif kind == "regression":
        columns += [("float_value", pa.float64()), ("predicted_float_value", pa.float64())]
    else:
        columns += [("boolean_value", pa.bool_()), ("float_value", pa.float64())]
        columns += [("predicted_survival", pa.list_(pa.float64()))]
    return pa.schema(columns)


def take_column(path: Path, table: pa.Table, name: str, target: pa.DataType) -> np.ndarray:
    """A column as an array ``[rows]``; InputError where it is missing, null somewhere or of another type."""
    if name not in table.column_names:
        raise InputError(
            f"{path} has no column {name}: predict again; it has {', '.join(table.column_names)}."
        )
    column = table[name]
    if column.null_count:
        raise InputError(f"{path} has no {name} in {column.null_count} of {table.num_rows} rows.")
    try:
        return column.cast(target).to_numpy()
    except pa.ArrowException as error:
        raise InputError(f"{path} has {column.type} in the column {name}: write it as {target}.") from error


def read_label(
    path: Path, table: pa.Table, kind: TaskKind, columns: tuple[str, ...], classes: tuple[Any, ...]
) -> tuple[np.ndarray, tuple[Any, ...]]:
    """Labels as `PredictionFile` has them, and the classes with those that labels alone have."""
    if kind == "binary":
        if columns == ("boolean_value",):
            return take_column(path, table, "boolean_value", pa.bool_()), ()
        numbers = take_column(path, table, "integer_value", pa.int64())
        if not np.isin(numbers, (0, 1)).all():
            raise InputError(f"{path} has labels other than 0 and 1 in integer_value: predict again.")
        return numbers == 1, ()
    if kind == "regression":
        return _finite(path, "float_value", take_column(path, table, "float_value", pa.float64())), ()
    if kind == "survival":
        days = _finite(path, "float_value", take_column(path, table, "float_value", pa.float64()))
        if (days < 0).any():
            raise InputError(f"{path} has negative days in float_value ({np.count_nonzero(days < 0)} rows).")
        return np.stack([days, take_column(path, table, "boolean_value", pa.bool_())], axis=1), ()  # [n, 2]
    if not classes:
        raise InputError(f"{path} names no classes in its metadata: predict again.")
    if kind == "multiclass":
        target = pa.int64() if columns[0] == "integer_value" else pa.string()
        values = [str(value) for value in take_column(path, table, columns[0], target).tolist()]
        known = set(classes)
        classes = (*classes, *sorted(set(values) - known))
        place = {value: index for index, value in enumerate(classes)}
        return np.array([place[value] for value in values], np.int64), classes
    lists = table["categorical_values"]
    if lists.null_count:
        raise InputError(f"{path} has no categorical_values in {lists.null_count} of {table.num_rows} rows.")
    place = {value: index for index, value in enumerate(classes)}
    rows = np.repeat(np.arange(table.num_rows), pc.call_function("list_value_length", [lists]).to_numpy())
    places = np.array(
        [place.get(code, -1) for code in pc.call_function("list_flatten", [lists]).to_pylist()], np.int64
    )
    labels = np.zeros((table.num_rows, len(classes)), bool)
    labels[rows[places >= 0], places[places >= 0]] = True
    return labels, classes


def read_prediction(
    path: Path, table: pa.Table, kind: TaskKind, metadata: Mapping[str, Any], classes: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Predictions, decisions and ``seen_before`` as `PredictionFile` has them."""
    if kind == "binary":
        name = "predicted_boolean_probability"
        probabilities = _probabilities(path, name, take_column(path, table, name, pa.float64()))
        if "predicted_boolean_value" not in table.column_names:
            return probabilities, None, None
        return probabilities, take_column(path, table, "predicted_boolean_value", pa.bool_()), None
    if kind == "regression":
        name = "predicted_float_value"
        return _finite(path, name, take_column(path, table, name, pa.float64())), None, None
    if kind == "survival":
        edges = np.asarray(metadata.get("edges_days") or (), np.float64)
        if not len(edges) or (np.diff(edges) <= 0).any():
            raise InputError(f"{path} names no ascending edges_days in its metadata: predict again.")
        name = "predicted_survival"
        return _probabilities(path, name, _lists(path, table, name, len(edges), np.float64)), None, None
    name, known = "predicted_probabilities", len(metadata["classes"])
    numbers = np.float32 if kind == "multilabel" else np.float64
    probabilities = _probabilities(path, name, _lists(path, table, name, known, numbers))
    if kind == "multiclass":
        return np.pad(probabilities, ((0, 0), (0, classes - known))), None, None
    return probabilities, None, _lists(path, table, "seen_before", known, np.bool_)


def _lists(path: Path, table: pa.Table, name: str, length: int, numbers: type) -> np.ndarray:
    """A column of lists of one length, ``[rows, length]``."""
    if name not in table.column_names:
        raise InputError(
            f"{path} has no column {name}: predict again; it has {', '.join(table.column_names)}."
        )
    column = table[name]
    lengths = pc.call_function("list_value_length", [column])
    if column.null_count or (lengths.to_numpy() != length).any():
        raise InputError(f"{path} needs {length} values in each row of {name}: predict again.")
    values = pc.call_function("list_flatten", [column])
    if values.null_count:
        raise InputError(f"{path} has {values.null_count} nulls within {name}: predict again.")
    return values.to_numpy().astype(numbers, copy=False).reshape(-1, length)


def _finite(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    wrong = np.count_nonzero(~np.isfinite(values))
    if wrong:
        raise InputError(f"{path} has {wrong} values in {name} that are not finite: mend or drop them.")
    return values


def _probabilities(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    wrong = np.count_nonzero(~((values >= 0) & (values <= 1)))  # NaN is wrong too
    if wrong:
        raise InputError(f"{path} has {wrong} values in {name} that are no probabilities: predict again.")
    return values

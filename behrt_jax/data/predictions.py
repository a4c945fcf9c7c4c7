"""Predictions on disk: one Parquet row an example, with the label as it was beside what was predicted.

Columns by kind of task, after ``subject_id`` and ``prediction_time``:

- binary: ``boolean_value`` (or 0 and 1 in ``integer_value``); ``predicted_boolean_value`` and
  ``predicted_boolean_probability`` (the schema of meds-evaluation, which refuses any other column:
  https://github.com/kamilest/meds-evaluation);
- multiclass: ``integer_value`` or ``categorical_value``; the same with ``predicted_``, and
  ``predicted_probabilities`` in the order of the metadata's ``classes``;
- multilabel: ``categorical_values`` (a list of codes); ``predicted_probabilities``, ``seen_before``;
- regression: ``float_value``; ``predicted_float_value``;
- survival: ``boolean_value`` (event seen), ``float_value`` (days to it, or to the end of follow-up);
  ``predicted_survival``, the probability of no event up to each of the metadata's ``edges_days``.

Where the outcomes are not known yet, all label columns are null. What else there is to know (kind, classes,
model, data, labels ...) is JSON in the file's metadata.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behrt_jax.config import TaskKind
from behrt_jax.data.examples import Examples
from behrt_jax.data.labels import VALUE_COLUMNS, Labels
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import UNK
from behrt_jax.errors import InputError

# The columns of predictions and of their labels, checked, as arrays; see `behrt_jax.data.predictions`.

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


# Predictions of some examples as rows of a file, see `behrt_jax.data.predictions`.


def schema_of(task: Task, labels: Labels) -> pa.Schema:
    """The columns for these labels; for kind ``none``, those for labels as the task was fitted on."""
    without = "integer" if task.of_integers else "categorical"
    return prediction_schema(task.kind, without if labels.kind == "none" else labels.kind)


def prediction_rows(
    schema: pa.Schema,
    task: Task,
    labels: Labels,
    predicted: np.ndarray,
    threshold: float | None,
    seen_before: np.ndarray | None,
) -> pa.Table:
    """Rows of a table of predictions, in the order of the labels; label columns of kind ``none`` are null.

    Args:
        schema: of :func:`schema_of`.
        task: what is predicted.
        labels: of the examples, one each.
        predicted: float64 ``[examples, outputs]``, of `evaluation.decisions.predictions`.
        threshold: binary: from which probability on a prediction is positive.
        seen_before: multi-label: of :func:`codes_seen`.
    """
    columns: dict[str, Any] = {
        "subject_id": labels.subject_ids,
        "prediction_time": pa.array(labels.times, pa.timestamp("us")),
    }
    columns |= _label_columns(task, labels)
    first = predicted[:, 0]
    if task.kind == "binary":
        columns["predicted_boolean_value"] = first >= threshold
        columns["predicted_boolean_probability"] = first
    elif task.kind == "multiclass":
        chosen = np.array(task.classes, object)[predicted.argmax(axis=1)]
        if "integer_value" in schema.names:
            columns["predicted_integer_value"] = chosen.astype(np.int64)
        else:
            columns["predicted_categorical_value"] = chosen
        columns["predicted_probabilities"] = _prediction_rows_lists(predicted, pa.float64())
    elif task.kind == "multilabel":
        columns["predicted_probabilities"] = _prediction_rows_lists(predicted, pa.float32())
        columns["seen_before"] = _prediction_rows_lists(seen_before, pa.bool_())
    elif task.kind == "regression":
        columns["predicted_float_value"] = first * task.deviation + task.mean
    else:
        columns["predicted_survival"] = _prediction_rows_lists(predicted, pa.float64())
    return pa.table([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def _label_columns(task: Task, labels: Labels) -> dict[str, Any]:
    values = labels.values
    if labels.kind == "none":
        return dict.fromkeys(VALUE_COLUMNS, values)
    if task.kind == "binary":
        return {"boolean_value": labels.positive()}
    if task.kind == "multilabel":
        return {"categorical_values": [list(codes) for codes in values]}
    if task.kind == "survival":
        return {"boolean_value": values[:, 1] > 0, "float_value": values[:, 0]}
    return {f"{labels.kind}_value": values}


def member_schema(members: int) -> pa.Schema:
    """Columns of the file of an ensemble's members."""
    keys = [("subject_id", pa.int64()), ("prediction_time", pa.timestamp("us"))]
    return pa.schema([*keys, *((f"member_{k}", pa.float64()) for k in range(members))])


def member_rows(schema: pa.Schema, labels: Labels, predicted: Sequence[np.ndarray]) -> pa.Table:
    """Rows of that file: predictions of each member, float64 ``[examples]``, in the order of the labels."""
    times = pa.array(labels.times, pa.timestamp("us"))
    return pa.table([labels.subject_ids, times, *predicted], schema=schema)


def codes_seen(histories: Examples, ids: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """Which codes occur in the histories, bool ``[examples, codes]``.

    Args:
        histories: whole ones.
        ids: of the codes, int64 ``[codes]``; of one that the vocabulary lacks, [UNK], nothing is seen.
        vocabulary_size: rows of the vocabulary.
    """
    place = np.full(vocabulary_size, -1)
    place[ids] = np.arange(len(ids))
    place[UNK] = -1
    windows = histories.windows
    seen = np.zeros((len(histories), len(ids)), bool)
    for row, (start, length) in enumerate(zip(windows.starts, windows.lengths, strict=True)):
        places = place[histories.sequences.codes[start : start + length]]
        seen[row, places[places >= 0]] = True
    return seen


def _prediction_rows_lists(values: Any, kind: pa.DataType) -> pa.Array:
    """Rows of a matrix as lists."""
    rows, columns = values.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * columns
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1), type=kind))


METADATA_KEY = b"behrt_jax"


@dataclass(frozen=True, eq=False)
class PredictionFile:
    """Predictions with their labels; n examples, K classes, T edges of time."""

    kind: TaskKind
    metadata: dict[str, Any]
    """What the writer said; ``kind`` alone for binary predictions of other tools."""
    classes: tuple[str, ...]
    """K of them (integers as text), those of multiclass and multilabel; else none. Classes of labels that
    the model does not know come last (multiclass), with probability 0."""
    subject_ids: np.ndarray
    """int64 ``[n]``."""
    times: np.ndarray
    """Prediction times, int64 ``[n]``, microseconds since 1970."""
    labels: np.ndarray
    """binary: bool ``[n]``. multiclass: int64 ``[n]``, places in ``classes``. multilabel: bool ``[n, K]``.
    regression: float64 ``[n]``. survival: float64 ``[n, 2]``, days and whether the event came (0 or 1)."""
    predictions: np.ndarray
    """binary: float64 ``[n]``, probability of a positive label. multiclass: float64 ``[n, K]``. multilabel:
    float32 ``[n, K]``. regression: float64 ``[n]``. survival: float64 ``[n, T]``, none up to each edge."""
    decisions: np.ndarray | None
    """binary: bool ``[n]``, positive by the threshold; None where the file has none."""
    seen_before: np.ndarray | None
    """multilabel: bool ``[n, K]``, the code occurs in the history."""
    members: np.ndarray | None
    """Of an ensemble: predictions of each member, float64 ``[n, members]``; else None."""

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def edges_days(self) -> np.ndarray:
        """float64 ``[T]``, ascending, days from the prediction time; empty for other kinds than survival."""
        return np.asarray(self.metadata.get("edges_days") or (), np.float64)


def members_path(path: Path) -> Path:
    """Where an ensemble's members have their predictions: ``P.members.parquet`` beside ``P.parquet``."""
    return Path(path).with_suffix(".members.parquet")


class PredictionWriter:
    """Writes predictions batch by batch; the file appears, whole, when the ``with`` block ends well.

    Args:
        path: file to write; its folder is made.
        schema: the columns of the module's docstring.
        metadata: ready for JSON when the block ends, which is when it is written, with what was counted
            meanwhile; ``kind`` at least, with ``classes`` or ``edges_days`` where it has them.

    Raises:
        InputError: there is such a file already.
    """

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, Any]):
        self.path = Path(path)
        if self.path.exists():
            raise InputError(f"{self.path} is there already: give another --output, or remove it.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.schema, self._metadata = schema, metadata
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._writer = pq.ParquetWriter(self._temporary, self.schema)

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Append rows; their columns must be those of the schema, in its order and types."""
        self._writer.write(rows)

    def __enter__(self) -> "PredictionWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                text = json.dumps(self._metadata, allow_nan=False)
                self._writer.add_key_value_metadata({METADATA_KEY: text.encode()})
            self._writer.close()
            if kind is None:
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def read_predictions(path: Path) -> PredictionFile:
    """Read a file of predictions, and its members' where there are any.

    A file without our metadata is read where it has the columns of binary predictions.

    Raises:
        InputError: no such file, no predictions in it, columns that are missing, null or not finite,
            probabilities outside [0, 1], lists of another length than the classes or edges, or members
            of other examples.
    """
    path = Path(path)
    table = _read(path)
    metadata = _metadata(path, table)
    kind: TaskKind = metadata["kind"]
    present = [names for names in LABEL_COLUMNS[kind] if set(names) <= set(table.column_names)]
    if not present:
        wanted = " or ".join(" with ".join(names) for names in LABEL_COLUMNS[kind])
        raise InputError(
            f"{path} has no labels ({wanted}), so there is nothing to compare {kind} predictions with."
        )
    if not table.num_rows:
        raise InputError(f"{path} has no predictions (0 rows): predict for subjects of the data.")
    if all(table[name].null_count == table.num_rows for name in present[0]):
        raise InputError(
            f"{path} has no label in any of its {table.num_rows} rows, so there is nothing to compare the "
            "predictions with: predict again with a label table that has values."
        )
    subject_ids = take_column(path, table, "subject_id", pa.int64())
    times = take_column(path, table, "prediction_time", pa.timestamp("us")).astype(np.int64)
    labels, classes = read_label(
        path, table, kind, present[0], tuple(map(str, metadata.get("classes") or ()))
    )
    predictions, decisions, seen_before = read_prediction(path, table, kind, metadata, len(classes))
    members = _members(members_path(path), subject_ids, times)
    return PredictionFile(
        kind, metadata, classes, subject_ids, times, labels, predictions, decisions, seen_before, members
    )


def _read(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: give the file that predict wrote.") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable Parquet file: give the file that predict wrote.") from error


def _metadata(path: Path, table: pa.Table) -> dict[str, Any]:
    text = (table.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        if "predicted_boolean_probability" not in table.column_names:
            raise InputError(
                f"{path} holds no predictions (neither our metadata nor predicted_boolean_probability): give "
                "the file that predict wrote."
            )
        return {"kind": "binary"}
    try:
        metadata = json.loads(text)
        known = metadata["kind"] in get_args(TaskKind)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has damaged metadata: predict again.") from error
    if not known:
        raise InputError(
            f"{path} is of kind {metadata['kind']!r}, not one of {', '.join(get_args(TaskKind))}."
        )
    return metadata


def _members(path: Path, subject_ids: np.ndarray, times: np.ndarray) -> np.ndarray | None:
    if not path.is_file():
        return None
    table = _read(path)
    names = [name for name in table.column_names if name.startswith("member_")]
    same = table.num_rows == len(subject_ids) and bool(names)
    if same:
        ids = take_column(path, table, "subject_id", pa.int64())
        at = take_column(path, table, "prediction_time", pa.timestamp("us")).astype(np.int64)
        same = np.array_equal(ids, subject_ids) and np.array_equal(at, times)
    if not same:
        raise InputError(f"{path} does not have the examples of the predictions beside it: predict again.")
    return np.stack([take_column(path, table, name, pa.float64()) for name in names], axis=1)  # [n, members]

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Required, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behrt_jax.data.examples import Examples
from behrt_jax.data.labels import COLUMNS_OF_KIND, VALUE_COLUMNS, LabelKind, Labels
from behrt_jax.data.parquet import open_whole, plain_times, readable, sound
from behrt_jax.data.tasks import KINDS, Kind, Task, TaskKind
from behrt_jax.data.vocabulary import UNK
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, new_file

METADATA_KEY = b"behrt_jax"
_KEYS = (("subject_id", pa.int64()), ("prediction_time", pa.timestamp("us")))


class PredictionMetadata(TypedDict, total=False):
    """What a file of predictions says of itself; ``kind`` alone for binary predictions of other tools."""

    kind: Required[TaskKind]
    classes: Sequence[str]
    edges_days: Sequence[float]
    model: str | None
    data: str | None
    labels: str | None
    split: str
    threshold: float | None
    temperature: float
    max_tokens: int
    fact_tokens: bool
    trained: JsonObject
    counts: dict[str, int]
    input: str | None
    codes: JsonObject
    question: JsonObject
    """What was asked of a model without labels (`workflows.ask`)."""


@dataclass(frozen=True, eq=False)
class PredictionFile:
    """Predictions with their labels; n examples, K classes, T edges of time."""

    kind: TaskKind
    metadata: PredictionMetadata
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

    def take(self, rows: np.ndarray) -> "PredictionFile":
        """Some of the examples, by a bool ``[n]``."""
        columns = ("subject_ids", "times", "labels", "predictions", "decisions", "seen_before", "members")
        found = {name: getattr(self, name) for name in columns}
        return replace(self, **{name: None if one is None else one[rows] for name, one in found.items()})

    def predicting(self, predictions: np.ndarray) -> "PredictionFile":
        """The same examples with others' predictions, which no threshold has decided."""
        return replace(self, predictions=predictions, decisions=None)


def members_path(path: Path) -> Path:
    """Where an ensemble's members have their predictions: ``P.members.parquet`` beside ``P.parquet``."""
    return Path(path).with_suffix(".members.parquet")


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
    kind = KINDS[metadata["kind"]]
    there = set(table.column_names)
    present: list[LabelKind] = [one for one in kind.labels if there.issuperset(COLUMNS_OF_KIND[one])]
    if not present:
        wanted = " or ".join(" with ".join(COLUMNS_OF_KIND[one]) for one in kind.labels)
        raise InputError(
            f"{path} has no labels ({wanted}), so there is nothing to compare {kind.name} predictions with."
        )
    if not table.num_rows:
        raise InputError(f"{path} has no predictions (0 rows): predict for subjects of the data.")
    if all(table[name].null_count == table.num_rows for name in COLUMNS_OF_KIND[present[0]]):
        raise InputError(
            f"{path} has no label in any of its {table.num_rows} rows, so there is nothing to compare the "
            "predictions with: predict again with a label table that has values."
        )
    labels = _labels(path, table, kind, present[0])
    known = tuple(map(str, metadata.get("classes") or ()))
    if kind.has_classes and not known:
        raise InputError(f"{path} names no classes in its metadata: predict again.")
    classes = kind.with_classes_of(labels, known)
    truths, _ = kind.truths(labels, np.arange(len(labels)), classes)
    # Other tools leave the decisions null throughout: such a column is none.
    decided = kind.thresholded and "predicted_boolean_value" in there
    decided = decided and table["predicted_boolean_value"].null_count < table.num_rows
    return PredictionFile(
        kind.name,
        metadata,
        classes,
        labels.subject_ids,
        labels.times,
        truths,
        _predictions(path, table, kind, metadata, len(classes)),
        decisions=_column(path, table, "predicted_boolean_value", pa.bool_()) if decided else None,
        seen_before=_lists(path, table, "seen_before", len(known), np.bool_)
        if kind.tells_seen_codes
        else None,
        members=_members(members_path(path), labels),
    )


def _read(path: Path) -> pa.Table:
    if path.is_dir():
        raise InputError(f"{path} is a folder: give one file of predictions.")
    if not path.exists():
        raise InputError(f"{path} does not exist: give the file that predict wrote.")
    message = f"{path} is no readable Parquet file: give the file that predict wrote."
    with readable(path, message), open_whole(path) as file:
        return sound(path, file.read())


def _metadata(path: Path, table: pa.Table) -> PredictionMetadata:
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
        known = metadata["kind"] in KINDS
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has damaged metadata: predict again.") from error
    if not known:
        raise InputError(f"{path} is of kind {metadata['kind']!r}, not one of {', '.join(KINDS)}.")
    return metadata


def _keys(path: Path, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    ids, times = (_column(path, table, name, kind) for name, kind in _KEYS)
    return ids, times.astype(np.int64)


def _labels(path: Path, table: pa.Table, kind: Kind, label: LabelKind) -> Labels:
    """The labels of a file that has them as of a kind."""
    names = COLUMNS_OF_KIND[label]
    columns = {name: _column(path, table, name, VALUE_COLUMNS[name]) for name in names}
    if "float_value" in columns:
        _checked(path, "float_value", columns["float_value"])
    *events, values = columns.values()
    if events:
        if negative := np.count_nonzero(values < 0):
            raise InputError(f"{path} has negative days in float_value ({negative} rows).")
        values = np.stack([values, *events], axis=1)
    labels = Labels(*_keys(path, table), values, label)
    if not kind.takes(labels):
        raise InputError(f"{path} has labels other than 0 and 1 in integer_value: predict again.")
    return labels


def _predictions(
    path: Path, table: pa.Table, kind: Kind, metadata: PredictionMetadata, classes: int
) -> np.ndarray:
    name, form = kind.column
    if not pa.types.is_list(form):
        return _checked(path, name, _column(path, table, name, form), kind.predicts == "number")
    known = len(metadata.get("classes") or ())
    if not kind.has_classes:
        edges = np.asarray(metadata.get("edges_days") or (), np.float64)
        if not len(edges) or (np.diff(edges) <= 0).any():
            raise InputError(f"{path} names no ascending edges_days in its metadata: predict again.")
        known = classes = len(edges)
    values = _lists(path, table, name, known, form.value_type.to_pandas_dtype())
    return np.pad(_checked(path, name, values, numbers=False), ((0, 0), (0, classes - known)))


def _present(path: Path, table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in (names := table.column_names):
        raise InputError(f"{path} has no column {name}: predict again; it has {', '.join(names)}.")
    return table[name]


def _column(path: Path, table: pa.Table, name: str, target: pa.DataType) -> np.ndarray:
    """A column as an array ``[rows]``; InputError where it is missing, null somewhere or of another type."""
    column = _present(path, table, name)
    if column.null_count:
        raise InputError(f"{path} has no {name} in {column.null_count} of {table.num_rows} rows.")
    try:
        return (plain_times(column) if pa.types.is_timestamp(target) else column.cast(target)).to_numpy()
    except pa.ArrowException as error:
        raise InputError(f"{path} has {column.type} in the column {name}: write it as {target}.") from error


def _lists(path: Path, table: pa.Table, name: str, length: int, numbers: type) -> np.ndarray:
    """A column of lists of one length, ``[rows, length]``."""
    column = _present(path, table, name)
    lengths = pc.call_function("list_value_length", [column])
    if column.null_count or (lengths.to_numpy() != length).any():
        raise InputError(f"{path} needs {length} values in each row of {name}: predict again.")
    values = pc.call_function("list_flatten", [column])
    if values.null_count:
        raise InputError(f"{path} has {values.null_count} nulls within {name}: predict again.")
    return values.to_numpy().astype(numbers, copy=False).reshape(-1, length)


def _checked(path: Path, name: str, values: np.ndarray, numbers: bool = True) -> np.ndarray:
    """The values; InputError where one is not finite, or (but for numbers) no probability."""
    fine = np.isfinite(values) if numbers else (values >= 0) & (values <= 1)
    if wrong := np.count_nonzero(~fine):
        what = "not finite: mend or drop them" if numbers else "no probabilities: predict again"
        raise InputError(f"{path} has {wrong} values in {name} that are {what}.")
    return values


def _members(path: Path, labels: Labels) -> np.ndarray | None:
    if not path.is_file():
        return None
    table = _read(path)
    names = [name for name in table.column_names if name.startswith("member_")]
    own = labels.subject_ids, labels.times
    if not (names and table.num_rows == len(labels) and np.array_equal(_keys(path, table), own)):
        raise InputError(f"{path} does not have the examples of the predictions beside it: predict again.")
    return np.stack([_column(path, table, name, pa.float64()) for name in names], axis=1)  # [n, members]


# Writing: a schema, the rows of some examples at a time, and the file around them.


def prediction_schema(kind: TaskKind, label: LabelKind | None = None) -> pa.Schema:
    """The columns of a file of predictions; multiclass: of labels ``integer`` or ``categorical``."""
    own = KINDS[kind]
    if not own.has_classes or label not in own.labels:
        label = own.labels[0]
    columns = [*_KEYS, *((name, VALUE_COLUMNS[name]) for name in COLUMNS_OF_KIND[label])]
    if own.decides:
        (value,) = COLUMNS_OF_KIND[label]
        columns.append((f"predicted_{value}", VALUE_COLUMNS[value]))
    columns.append(own.column)
    if own.tells_seen_codes:
        columns.append(("seen_before", pa.list_(pa.bool_())))
    return pa.schema(columns)


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
        predicted: float64 ``[examples, outputs]``, of `evaluation.calibration.predictions`.
        threshold: binary: from which probability on a prediction is positive.
        seen_before: multi-label: of :func:`codes_seen`.
    """
    kind, keys = task.of, {"subject_id": labels.subject_ids, "prediction_time": labels.times}
    columns = {**keys, **labels.columns(), kind.column[0]: kind.in_file(task, predicted)}
    if (positive := labels.positive()) is not None:
        columns["boolean_value"] = positive
    if kind.decides:
        columns[f"predicted_{schema.names[len(keys)]}"] = kind.decide(task, predicted, threshold)
    if seen_before is not None:
        columns["seen_before"] = seen_before
    return pa.table([_array(columns[field.name], field.type) for field in schema], schema=schema)


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A column; rows of a matrix as lists, and classes, which are text, as integers where these are asked."""
    if values.ndim == 1:
        return pa.array(values, None if pa.types.is_int64(kind) else kind).cast(kind)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1), kind.value_type))


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


def member_schema(members: int) -> pa.Schema:
    """Columns of the file of an ensemble's members."""
    return pa.schema([*_KEYS, *((f"member_{k}", pa.float64()) for k in range(members))])


def member_rows(schema: pa.Schema, labels: Labels, predicted: Sequence[np.ndarray]) -> pa.Table:
    """Rows of that file: predictions of each member, float64 ``[examples]``, in the order of the labels."""
    times = pa.array(labels.times, pa.timestamp("us"))
    return pa.table([labels.subject_ids, times, *predicted], schema=schema)


class PredictionWriter:
    """Writes predictions batch by batch; the file appears, whole, when the ``with`` block ends well.

    Args:
        path: file to write; its folder is made.
        schema: of :func:`schema_of`.
        metadata: ready for JSON when the block ends, which is when it is written, with what was counted
            meanwhile; ``kind`` at least, with ``classes`` or ``edges_days`` where it has them.

    Raises:
        InputError: there is such a file already, or another process writes it.
    """

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, object]):
        self.path = Path(path)
        self.schema, self._metadata = schema, metadata
        self._file = new_file(self.path)
        self._writer = pq.ParquetWriter(self._file.__enter__(), self.schema, write_page_checksum=True)

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Append rows; their columns must be those of the schema, in its order and types."""
        self._writer.write(rows)

    def __enter__(self) -> "PredictionWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                text = json.dumps(self._metadata, allow_nan=False)
                self._writer.add_key_value_metadata({METADATA_KEY: text.encode()})
            self._writer.close()
        except BaseException as failed:
            self._file.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._file.__exit__(kind, error, trace)

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.config import TaskKind
from behrt_jax.data.prediction_columns import LABEL_COLUMNS, read_label, read_prediction, take_column
from behrt_jax.errors import InputError

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

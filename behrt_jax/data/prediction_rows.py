"""Predictions of some examples as rows of a file, see `behrt_jax.data.predictions`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from behrt_jax.data.examples import Examples
from behrt_jax.data.label_columns import VALUE_COLUMNS
from behrt_jax.data.labels import Labels
from behrt_jax.data.prediction_columns import prediction_schema
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import UNK


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
        columns["predicted_probabilities"] = _lists(predicted, pa.float64())
    elif task.kind == "multilabel":
        columns["predicted_probabilities"] = _lists(predicted, pa.float32())
        columns["seen_before"] = _lists(seen_before, pa.bool_())
    elif task.kind == "regression":
        columns["predicted_float_value"] = first * task.deviation + task.mean
    else:
        columns["predicted_survival"] = _lists(predicted, pa.float64())
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


def _lists(values: Any, kind: pa.DataType) -> pa.Array:
    """Rows of a matrix as lists."""
    rows, columns = values.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * columns
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1), type=kind))

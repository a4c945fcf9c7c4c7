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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.label_columns import VALUE_COLUMNS, LabelKind, kind_of, read_label_file, values_of
from behrt_jax.errors import InputError

__all__ = ["LabelKind", "Labels", "read_labels"]


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
    account: Mapping[str, Any] = field(default_factory=dict)
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
            ids: dict[Any, int] = {}
            return np.array([ids.setdefault(value, len(ids)) for value in self.values], np.int64)
        return np.unique(self.values, axis=0 if self.kind == "survival" else None, return_inverse=True)[1]

    def take(self, rows: Sequence[int] | np.ndarray) -> "Labels":
        """Some of the rows, by number or by a bool ``[labels]``."""
        chosen = np.asarray(rows)
        return replace(
            self, subject_ids=self.subject_ids[chosen], times=self.times[chosen], values=self.values[chosen]
        )

    def unknown_to(self, subject_ids: np.ndarray) -> int:
        """How many distinct subjects of the labels are not among ``subject_ids``, int64 ``[n]``."""
        return len(np.setdiff1d(self.subject_ids, subject_ids))


def read_labels(path: Path, *, as_written: bool = False, without_values: bool = False) -> Labels:
    """Read a Parquet file of labels, or all ``.parquet`` files in a folder, at any depth, together.

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
    rows = pa.concat_tables([read_label_file(file) for file in files])
    if not rows.num_rows:
        raise InputError(f"{path} has no labels (0 rows): give the table of a task, with its labels.")
    kind = kind_of(path, rows)
    if kind == "none" and not without_values:
        raise InputError(
            f"{path} has no value in any of its {rows.num_rows} rows: fill in one of "
            f"{', '.join(VALUE_COLUMNS)} (only predict does without)."
        )
    labels = Labels(
        subject_ids=rows["subject_id"].to_numpy(),
        times=rows["prediction_time"].cast(pa.int64()).to_numpy(),
        values=values_of(path, rows, kind),
        kind=kind,
        account=_account(files[0]) if len(files) == 1 else {},
    )
    return labels if as_written else _distinct(path, labels)


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


def _account(file: Path) -> Mapping[str, Any]:
    try:
        account = json.loads((pq.read_schema(file).metadata or {}).get(b"behrt_jax", b"{}"))
    except ValueError:
        return {}
    return account if isinstance(account, dict) else {}


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

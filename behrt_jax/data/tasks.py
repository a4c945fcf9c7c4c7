"""What a table of labels asks for: the kind of task, its classes or intervals, and targets as numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from behrt_jax.config import TaskKind
from behrt_jax.data.labels import LabelKind, Labels, read_labels
from behrt_jax.errors import InputError

OF_LABELS: dict[LabelKind, TaskKind] = {
    "boolean": "binary",
    "integer": "multiclass",
    "categorical": "multiclass",
    "float": "regression",
    "codes": "multilabel",
    "survival": "survival",
}


@dataclass(frozen=True)
class Task:
    """A task, as the labels of the train split define it."""

    kind: TaskKind
    classes: tuple[str, ...] = ()
    """Multi-class: the values, as text. Multi-label: the codes."""
    edges_days: tuple[float, ...] = ()
    """Survival: where the intervals end, in days from the prediction time, ascending."""
    mean: float = 0.0
    """Regression: of the train labels."""
    deviation: float = 1.0
    """Regression: standard deviation of the train labels."""
    of_integers: bool = False
    """Multi-class: the classes are those of integer_value, not text (which may be digits, such as 007)."""

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for an example."""
        return len(self.classes or self.edges_days) or 1

    def fits(self, labels: Labels) -> bool:
        """Whether labels are of this kind."""
        if self.kind == "binary":
            return labels.positive() is not None
        if labels.kind == "integer" and self.kind == "multiclass":
            return all(name.lstrip("-").isdecimal() for name in self.classes)
        return OF_LABELS.get(labels.kind) == self.kind

    def targets(self, labels: Labels, rows: np.ndarray) -> np.ndarray:
        """Targets of some labels, float32 ``[rows, targets]``, as `training.task_losses.TARGETS` says.

        Raises:
            InputError: labels of another kind, or a class that no label of the train split has.
        """
        if not self.fits(labels):
            raise InputError(f"The labels are of the kind {labels.kind}, which is no {self.kind} task.")
        values = labels.values[rows]
        if self.kind == "binary":
            positive = labels.positive()
            assert positive is not None
            return positive[rows].astype(np.float32)[:, None]
        if self.kind == "regression":
            return ((values - self.mean) / self.deviation).astype(np.float32)[:, None]
        if self.kind == "survival":
            days, event = values[:, 0], values[:, 1]
            # An edge belongs to the interval that it ends; who was followed up to it has survived that one.
            ends = [np.searchsorted(self.edges_days, days, side=side) for side in ("left", "right")]
            interval = np.where(event > 0, *ends)
            seen = (event > 0) & (interval < len(self.edges_days))
            return np.stack([interval, seen], axis=1).astype(np.float32)
        places = {name: place for place, name in enumerate(self.classes)}
        if self.kind == "multiclass":
            found = np.array([places.get(str(value), -1) for value in values], np.int64)
            if unknown := int(np.count_nonzero(found < 0)):
                raise InputError(
                    f"{unknown} of {len(found)} labels have a class that no label of the train split has: "
                    "merge rare classes, or leave these labels out."
                )
            return found.astype(np.float32)[:, None]
        targets = np.zeros((len(rows), len(self.classes)), np.float32)
        pairs = [(row, places[code]) for row, codes in enumerate(values) for code in codes if code in places]
        if pairs:
            targets[tuple(np.array(pairs).T)] = 1.0
        return targets

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Task":
        """Inverse of :meth:`to_json`."""
        return cls(**{**value, "classes": tuple(value["classes"]), "edges_days": tuple(value["edges_days"])})


def fit_task(labels: Labels, rows: np.ndarray, intervals: int = 10) -> Task:
    """The task that labels define, whose classes, scale and intervals come from the train split alone.

    Args:
        labels: of all splits.
        rows: those of the train split, int64 ``[n]``.
        intervals: survival: how many, each with about as many events as the others.

    Raises:
        InputError: there is nothing to learn, such as one class alone.
    """
    values = labels.values[rows]
    if labels.positive() is not None:
        return Task("binary")
    kind = OF_LABELS[labels.kind]
    if kind == "multiclass":
        found, counts = np.unique(values, return_counts=True)
        if len(found) > 1000 or len(found) * 2 > counts.sum():
            raise InputError(
                f"{len(found):,} classes in {counts.sum():,} train labels are too many to learn: "
                "give numbers as float_value, or merge classes."
            )
        classes = tuple(str(value) for value in found)
        if len(classes) < 2:
            raise InputError("All train labels have the same class: there is nothing to learn.")
        return Task(kind, classes=classes, of_integers=labels.kind == "integer")
    if kind == "multilabel":
        codes = sorted({code for row in values for code in row})
        if not codes:
            raise InputError("No train label names a code: there is nothing to learn.")
        return Task(kind, classes=tuple(codes))
    if kind == "regression":
        if wrong := int((~np.isfinite(values)).sum()):
            raise InputError(f"{wrong} train labels are not finite: leave them out, or mend them.")
        deviation = float(values.std())
        if deviation == 0.0:
            raise InputError("All train labels have the same value: there is nothing to learn.")
        return Task(kind, mean=float(values.mean()), deviation=deviation)
    events = values[values[:, 1] > 0, 0]
    if not len(events):
        raise InputError("No train label has an event: there is nothing to learn.")
    edges = np.unique(np.quantile(events, np.linspace(0, 1, intervals + 1)[1:], method="higher"))
    return Task(kind, edges_days=tuple(float(edge) for edge in edges))


# Label tables of several binary tasks side by side: who is asked what at which time.

BINARY = Task("binary")


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
    """Put tables together.

    Args:
        names: of the tables, distinct.
        tables: one at least; each has a subject and prediction time once.

    Raises:
        InputError: labels that are not binary.
    """
    subjects = np.concatenate([table.subject_ids for table in tables])  # [labels of all tables]
    times = np.concatenate([table.times for table in tables])
    order = np.lexsort([times, subjects])
    ids, at = subjects[order], times[order]
    first = np.append(True, (ids[1:] != ids[:-1]) | (at[1:] != at[:-1]))
    pair = np.empty(len(order), np.int64)
    pair[order] = np.cumsum(first) - 1
    table = np.repeat(np.arange(len(tables)), [len(one) for one in tables])
    targets = np.full((np.count_nonzero(first), len(tables)), np.nan, np.float32)
    targets[pair, table] = np.concatenate([BINARY.targets(one, np.arange(len(one)))[:, 0] for one in tables])
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
        if not BINARY.fits(labels):
            values = "integers other than 0 and 1" if labels.kind == "integer" else f"{labels.kind} labels"
            raise InputError(
                f"population.labels: {path} has {values}, but tasks that are trained at once are binary: "
                "give boolean_value, or train it by itself with --labels."
            )
        tables.append(labels)
    return side_by_side([path.stem for path in paths], tables)

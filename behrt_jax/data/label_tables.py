"""Label tables of several binary tasks side by side: who is asked what at which time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.tasks import Task
from behrt_jax.errors import InputError

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

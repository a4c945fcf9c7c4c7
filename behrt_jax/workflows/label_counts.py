"""What there is to learn from, counted and said."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from behrt_jax.config import TaskKind
from behrt_jax.data.examples import Examples
from behrt_jax.data.labels import Labels
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.data.vocabulary_map import VocabularyMap
from behrt_jax.tracking.console import Console

TRAINS = ("train", "tuning")


def count_labels(labels: Labels, unknown: int) -> dict[str, int]:
    """What a table has, and what is left out of it."""
    return {
        "labels": len(labels),
        "duplicate_labels": labels.duplicates,
        "labels_of_unknown_subjects": unknown,
    }


def count_codes(mapped: VocabularyMap, vocabulary: Vocabulary) -> dict[str, int]:
    """What became of the codes that the model does not know."""
    return {
        "codes_unknown_to_the_model": len(mapped.new_codes),
        "train_events_of_such_codes": mapped.new_events,
        "codes_added": len(mapped.vocabulary) - len(vocabulary),
    }


def describe(examples: Examples, task: Task, targets: np.ndarray) -> dict[str, Any]:
    """Counts of a split: of its examples and of what their targets, float32 ``[examples, targets]``, say."""
    found: dict[str, Any] = {
        "examples": len(examples),
        "subjects": len(np.unique(examples.subject_ids)),
        "empty_histories": int(examples.empty.sum()),
    }
    if task.kind == "binary":
        found["positive"] = int(targets.sum())
    if task.kind == "multiclass":
        found["smallest_class"] = int(np.bincount(targets[:, 0].astype(int), minlength=task.outputs).min())
    if task.kind == "multilabel":
        found["codes_per_example"] = round(float(targets.sum(axis=1).mean()), 2)
    if task.kind == "survival":
        found["events"] = int(targets[:, 1].sum())
    return found


def announce_labels(console: Console, kind: TaskKind, counts: Mapping[str, Any]) -> None:
    """Say what there is to learn from, and what was left out.

    Args:
        console: where to.
        kind: of the task or tasks.
        counts: of `labelled_data.LabelledData`.
    """
    tables: Mapping[str, Any] = counts.get("tasks") or {"": counts}
    columns = list(next(iter(tables.values()))["train"])
    several = "tasks" in counts
    console.table(
        f"Labels ({kind})",
        (*(["task"] if several else []), "split", *(column.replace("_", " ") for column in columns)),
        [
            (*([name] if several else []), split, *(table[split][column] for column in columns))
            for name, table in tables.items()
            for split in TRAINS
        ],
    )
    for name, table in tables.items():
        of_table = f" of {name}" if several else ""
        if unknown := table["labels_of_unknown_subjects"]:
            labels = f"{table['labels']:,} labels{of_table}"
            console.log(f"{unknown:,} of {labels} are of subjects that the data lacks.")
        if duplicates := table["duplicate_labels"]:
            console.log(f"{duplicates:,} labels{of_table} came twice and were taken once.")
    if unknown := counts["codes_unknown_to_the_model"]:
        what = "got embeddings of their own" if counts["codes_added"] else "are read as [UNK]"
        events = f"{counts['train_events_of_such_codes']:,} train events"
        console.log(f"{unknown:,} codes that the model does not know ({events}) {what}.")

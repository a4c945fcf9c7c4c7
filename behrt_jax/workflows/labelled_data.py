"""From folders of prepared data and labels to the batches of a fine-tuning run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from behrt_jax.adapters.new_codes import new_rows
from behrt_jax.config import FinetuneConfig, ModelConfig
from behrt_jax.data.examples import Examples, find_examples
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.store import read_manifest, read_prepared
from behrt_jax.data.task_batches import TaskBatches, task_batches
from behrt_jax.data.tasks import Task, fit_task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.data.vocabulary_map import VocabularyMap, map_vocabulary
from behrt_jax.errors import InputError
from behrt_jax.tracking.console import Console
from behrt_jax.training.micro_batches import likely_parts

TRAINS = ("train", "tuning")


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Examples of the train and the tuning split, and what they are to be predicted for."""

    task: Task
    vocabulary: Vocabulary
    """In which the examples are written: the pretrained model's, with the new codes after it if it is
    extended."""
    base_codes: tuple[str, ...]
    """The pretrained model's alone."""
    train: Examples
    train_targets: np.ndarray
    """float32 ``[examples, targets]``."""
    tuning: Examples
    tuning_targets: np.ndarray
    """float32 ``[examples, targets]``."""
    counts: dict[str, Any]
    """What is in the splits and what was left out."""

    def first_rows(self, encoder: Mapping[str, Any]) -> np.ndarray | None:
        """First embeddings of the new codes, float32 ``[codes, embedding]``; None where there are none."""
        new = self.vocabulary.codes[len(self.base_codes) :]
        return new_rows({"behrt": encoder}, self.base_codes, new).rows if new else None


def read_labelled(data: Path | None, labels: Path | None) -> tuple[SequenceSet, Labels, tuple[str, ...]]:
    """Open prepared data without separators, read its labels, and the delays that its manifest has.

    Raises:
        InputError: a folder or file is missing or wrong.
    """
    if data is None:
        raise InputError("--data is missing: give the folder that prepare wrote.")
    if labels is None:
        raise InputError("--labels is missing: give a label table (make_labels.py writes some).")
    delays = tuple(read_manifest(data)["options"].get("delays", ()))
    return read_prepared(data), read_labels(labels), delays


def label_data(
    config: FinetuneConfig,
    model: ModelConfig,
    vocabulary: Vocabulary,
    data: SequenceSet,
    labels: Labels,
    delays: Sequence[str],
) -> LabelledData:
    """Cut histories at the prediction times and fit the task on the train split.

    Raises:
        InputError: no label of the train or the tuning split, or labels that tell nothing.
    """
    data, mapped = in_vocabulary(data, vocabulary, config.extend_vocabulary)
    found = {name: examples_of(data, name, labels, model, config.task.max_length, delays) for name in TRAINS}
    for name, examples in found.items():
        if not len(examples):
            mend = "choose the best epoch and calibrate" if name == "tuning" else "learn"
            raise InputError(
                f"The labels have none of the {name} split ({examples.unknown_subjects:,} of {len(labels):,} "
                f"labels are of subjects that the data does not have): add some, to {mend} by."
            )
    train, tuning = found.values()
    if config.task.label_fraction < 1.0:
        train = train.of_some_subjects(config.task.label_fraction, config.train.seed)
    task = fit_task(labels, train.rows, config.task.intervals)
    targets = task.targets(labels, train.rows), task.targets(labels, tuning.rows)
    counts = {
        "labels": len(labels),
        "duplicate_labels": labels.duplicates,
        "labels_of_unknown_subjects": train.unknown_subjects,
        "codes_unknown_to_the_model": len(mapped.new_codes),
        "train_events_of_such_codes": mapped.new_events,
        "codes_added": len(mapped.vocabulary) - len(vocabulary),
        "train": _describe(train, task, targets[0]),
        "tuning": _describe(tuning, task, targets[1]),
    }
    return LabelledData(
        task, mapped.vocabulary, vocabulary.codes, train, targets[0], tuning, targets[1], counts
    )


def in_vocabulary(
    data: SequenceSet, vocabulary: Vocabulary, extend: bool = False
) -> tuple[SequenceSet, VocabularyMap]:
    """The data written in a model's vocabulary, and how its codes were mapped onto that."""
    found = map_vocabulary(data.vocabulary, vocabulary, extend)
    return replace(data, vocabulary=found.vocabulary, splits=found.apply_to(data.splits)), found


def examples_of(
    data: SequenceSet,
    split: str,
    labels: Labels,
    model: ModelConfig,
    max_length: int | None,
    delays: Sequence[str],
) -> Examples:
    """Histories of a split's labels as a model reads them; arguments and errors of `find_examples`."""
    return find_examples(
        data,
        split,
        labels,
        max_tokens=(max_length or model.positions) - model.cls_token,
        delays=delays,
        sep_token=model.sep_token,
    )


def split_batches(
    config: FinetuneConfig, model: ModelConfig, labelled: LabelledData, mesh: Mesh
) -> tuple[TaskBatches, TaskBatches, int]:
    """Batches of the train and the tuning split, and the number of micro-batches of a step."""
    common: dict[str, Any] = {
        "row_length": config.task.max_length or model.positions,
        "batch_size": config.train.batch_size,
        "packed": config.task.packed,
        "cls_token": model.cls_token,
        "multiple_of": mesh.size,
    }
    seed = config.train.seed
    train = task_batches(labelled.train, labelled.train_targets, seed=seed, **common)
    tuning = task_batches(labelled.tuning, labelled.tuning_targets, seed=None, **common)
    rows = -(-train.rows_per_batch // mesh.size)
    width = model.ffn_size or 4 * model.hidden_size
    platform = mesh.devices.flat[0].platform
    parts = config.train.micro_batches or likely_parts(rows, train.row_length, width, platform)
    multiple = mesh.size * parts
    return replace(train, batch_rows=-(-train.rows_per_batch // multiple) * multiple), tuning, parts


def announce_labels(console: Console, labelled: LabelledData) -> None:
    """Say what there is to learn from, and what was left out."""
    counts = labelled.counts
    splits = {name: counts[name] for name in TRAINS}
    columns = list(splits["train"])
    console.table(
        f"Labels ({labelled.task.kind})",
        ("split", *(column.replace("_", " ") for column in columns)),
        [(name, *(part[column] for column in columns)) for name, part in splits.items()],
    )
    if unknown := counts["labels_of_unknown_subjects"]:
        console.log(f"{unknown:,} of {counts['labels']:,} labels are of subjects that the data lacks.")
    if unknown := counts["codes_unknown_to_the_model"]:
        what = "got embeddings of their own" if counts["codes_added"] else "are read as [UNK]"
        events = f"{counts['train_events_of_such_codes']:,} train events"
        console.log(f"{unknown:,} codes that the model does not know ({events}) {what}.")
    if duplicates := counts["duplicate_labels"]:
        console.log(f"{duplicates:,} labels came twice and were taken once.")


def _describe(examples: Examples, task: Task, targets: np.ndarray) -> Mapping[str, Any]:
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

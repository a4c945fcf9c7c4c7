"""From folders of prepared data and labels to the batches of a fine-tuning run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from behrt_jax.adapters.new_codes import new_rows
from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import FinetuneConfig
from behrt_jax.data.batches import RowShape, TaskBatches, task_batches
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.examples import Examples, OutsideLife, find_examples, of_unknown_subjects
from behrt_jax.data.labels import Labels, LabelTables, read_labels
from behrt_jax.data.prepared import read_manifest, read_prepared
from behrt_jax.data.sequences import SequenceSet, VocabularyMap, map_vocabulary
from behrt_jax.data.tasks import BINARY, Task, TaskKind, fit_task
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject
from behrt_jax.models.stacked_layers import Tree
from behrt_jax.tracking.console import Console
from behrt_jax.training.micro_batches import likely_parts
from behrt_jax.workflows.checks import check_days

# What there is to learn from, counted and said.

TRAINS = ("train", "tuning")


def count_labels(labels: Labels, unknown: int) -> dict[str, int]:
    """What a table has, and what is left out of it."""
    return {
        "labels": len(labels),
        "duplicate_labels": labels.duplicates,
        "labels_of_unknown_subjects": unknown,
    }


def count_outside(*examples: Examples) -> dict[str, int]:
    """Labels that are left out as before birth or after death."""
    return {
        f"labels_{where}": sum(part.outside_life.get(where, 0) for part in examples)
        for where in ("before_birth", "after_death")
    }


def count_codes(mapped: VocabularyMap, vocabulary: Vocabulary) -> dict[str, int]:
    """What became of the codes that the model does not know."""
    return {
        "codes_unknown_to_the_model": len(mapped.new_codes),
        "train_events_of_such_codes": mapped.new_events,
        "codes_added": len(mapped.vocabulary) - len(vocabulary),
    }


def describe(examples: Examples, task: Task, targets: np.ndarray) -> dict[str, int | float]:
    """Counts of a split: of its examples and of what their targets, float32 ``[examples, targets]``, say."""
    return {
        "examples": len(examples),
        "subjects": len(np.unique(examples.subject_ids)),
        "empty_histories": int(examples.empty.sum()),
        **task.of.tell(targets, task.outputs),
    }


def announce_labels(console: Console, kind: TaskKind, counts: JsonObject) -> None:
    """Say what there is to learn from, and what was left out.

    Args:
        console: where to.
        kind: of the task or tasks.
        counts: of `labelled_data.LabelledData`.
    """
    tables: JsonObject = counts.get("tasks") or {"": counts}
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
    outside = {where: counts[f"labels_{where}"] for where in ("before_birth", "after_death")}
    if sum(outside.values()):
        before, after = outside.values()
        console.log(
            f"{before:,} labels before the subject's birth and {after:,} on a day after the death are left "
            "out (--task.outside_life keep keeps them)."
        )
    if unknown := counts["codes_unknown_to_the_model"]:
        what = "got embeddings of their own" if counts["codes_added"] else "are read as [UNK]"
        events = f"{counts['train_events_of_such_codes']:,} train events"
        console.log(f"{unknown:,} codes that the model does not know ({events}) {what}.")


MANY_TOKENS = 1000
"""From so many on, a share of them can be held against that of training."""


def check_codes(
    data: SequenceSet,
    splits: Sequence[str],
    vocabulary: Vocabulary,
    preparation: Preparation | None,
    most: float | None,
    like: Path,
) -> JsonObject:
    """Count the tokens that a model does not know, and those of bins of values that are others to it.

    Args:
        data: in its own vocabulary.
        splits: that are counted.
        vocabulary: of the model.
        preparation: rules of what the model was trained on, where they are known.
        most: largest share of either; a rule where not given, see ``max_unknown``.
        like: the model's folder, for messages.

    Returns:
        ``tokens``, and as shares of them ``unknown``, ``unknown_in_training``, ``changed_bins`` (None where
        it is not known) and the ``limit``; ``unknown_codes``, the most frequent ones.

    Raises:
        InputError: a share is above the limit; it names the most frequent unknown codes. Or ``most`` is no
            share.
    """
    if most is not None and not 0 <= most <= 1:
        raise InputError(f"max_unknown is {most:g}: give a share from 0 to 1.")
    parts = (data.splits[name].codes for name in splits)
    events = np.zeros(len(data.vocabulary), np.int64)
    for part in parts:
        events += np.bincount(part, minlength=len(events))
    tokens = int(events.sum())
    unknown = vocabulary.encode(data.vocabulary.codes) == UNK
    counts = {data.vocabulary.codes[row]: int(events[row]) for row in np.flatnonzero(unknown & (events > 0))}
    counts = {**data.unknown_codes, **counts}
    counts.pop(SPECIAL_TOKENS[UNK], None)
    trained = float(vocabulary.counts[UNK] / max(vocabulary.counts.sum(), 1))
    limit = most
    if limit is None:
        limit = max(min(0.5, 3 * trained), trained + 0.1) if tokens >= MANY_TOKENS else 0.5
    changed = None
    if preparation is not None and data.preparation is not None:
        differs = data.preparation.other_bins(preparation, data.vocabulary.codes)
        changed = float(events[differs & ~unknown].sum() / max(tokens, 1))
    found = {
        "tokens": tokens,
        "unknown": float(events[unknown].sum() / max(tokens, 1)),
        "unknown_in_training": trained,
        "changed_bins": changed,
        "limit": limit,
        "unknown_codes": sorted(counts, key=lambda code: (-counts[code], code))[:10],
    }
    wrong = {
        "are codes that the model does not know": found["unknown"],
        "have a bin of values with other edges than the model learned": changed or 0.0,
    }
    codes = f" Most frequent unknown codes: {', '.join(found['unknown_codes'])}." if counts else ""
    for what, share in wrong.items():
        if share > limit:
            raise InputError(
                f"{share:.1%} of the {tokens:,} tokens {what} (the limit is {limit:.1%}; in its training "
                f"{trained:.1%} are unknown).{codes} Prepare the records with --like {like}, write their "
                "codes as the model's are, or give a higher --max_unknown."
            )
    return found


def announce_codes(console: Console, found: JsonObject) -> None:
    """Say what :func:`check_codes` found."""
    bins = "not known" if found["changed_bins"] is None else f"{found['changed_bins']:.1%}"
    console.log(
        f"Of {found['tokens']:,} tokens {found['unknown']:.1%} are unknown to the model ([UNK]; in its "
        f"training {found['unknown_in_training']:.1%}); with other bins of values than in training: {bins}."
    )
    if found["unknown_codes"]:
        console.log(f"The most frequent unknown codes: {', '.join(found['unknown_codes'])}.")


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
    """float32 ``[examples, targets]``; of several tasks ``[examples, tasks]``, NaN where no label is."""
    tuning: Examples
    tuning_targets: np.ndarray
    """float32, as of train."""
    counts: JsonObject
    """What is in the splits and what was left out."""
    tasks: Mapping[str, "LabelledData"] = field(default_factory=dict)
    """Where these are examples of several tasks: those of each, by the name of its label table."""

    def drawn(self, most: int, seed: int) -> "LabelledData":
        """With that many examples of each split at most, drawn at random; of one task."""

        def some(count: int, place: int) -> np.ndarray:
            return np.random.default_rng([seed, place]).permutation(count) < most

        train, tuning = some(len(self.train), 0), some(len(self.tuning), 1)
        return replace(
            self,
            train=self.train.take(train),
            train_targets=self.train_targets[train],
            tuning=self.tuning.take(tuning),
            tuning_targets=self.tuning_targets[tuning],
        )

    def base_outputs(self) -> np.ndarray:
        """Outputs that tell of each example what is true on average in train, float32 ``[outputs]``."""
        return self.task.of.base_outputs(self.train_targets, self.task.outputs)

    def first_rows(self, encoder: Tree) -> np.ndarray | None:
        """First embeddings of the new codes, float32 ``[codes, embedding]``; None where there are none."""
        new = self.vocabulary.codes[len(self.base_codes) :]
        return new_rows({"behrt": encoder}, self.base_codes, new).rows if new else None


def read_labelled(
    data: Path | None, labels: Path | None, without_values: bool = False
) -> tuple[SequenceSet, Labels, tuple[str, ...]]:
    """As :func:`read_data`, and its labels (see `labels.read_labels`) between data and delays."""
    if data is not None and labels is None:
        raise InputError("--labels is missing: give a label table (make_labels.py writes some).")
    sequences, delays = read_data(data)
    assert labels is not None
    return sequences, read_labels(labels, without_values=without_values), delays


def read_data(data: Path | None) -> tuple[SequenceSet, tuple[str, ...]]:
    """Open prepared data without separators, and read the delays that its manifest has.

    Raises:
        InputError: a folder or file is missing or wrong.
    """
    if data is None:
        raise InputError("--data is missing: give the folder that prepare wrote.")
    delays = tuple(read_manifest(data)["options"].get("delays", ()))
    return read_prepared(data), delays


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
    train, tuning, mapped = examples_to_train(config, model, vocabulary, data, labels, delays)
    for name, examples in zip(TRAINS, (train, tuning), strict=True):
        require_labels("The labels", name, len(examples), train.unknown_subjects, len(labels))
    task = fit_task(labels, train.rows, config.task.intervals)
    targets = task.targets(labels, train.rows), task.targets(labels, tuning.rows)
    counts = {
        **count_labels(labels, train.unknown_subjects),
        **count_outside(train, tuning),
        **count_codes(mapped, vocabulary),
        "train": describe(train, task, targets[0]),
        "tuning": describe(tuning, task, targets[1]),
    }
    return LabelledData(
        task, mapped.vocabulary, vocabulary.codes, train, targets[0], tuning, targets[1], counts
    )


def examples_to_train(
    config: FinetuneConfig,
    model: ModelConfig,
    vocabulary: Vocabulary,
    data: SequenceSet,
    labels: Labels,
    delays: Sequence[str],
) -> tuple[Examples, Examples, VocabularyMap]:
    """Examples of the train split (as many as ``task.label_fraction`` says), of the tuning split, and how the
    codes were mapped onto those of the model. Arguments as of :func:`label_data`, errors of `find_examples`.
    """
    check_days(model, {name: data.splits[name] for name in TRAINS})
    data, mapped = in_vocabulary(data, vocabulary, model, config.extend_vocabulary)
    train, tuning = (
        examples_of(data, name, labels, model, config.task.max_length, delays, config.task.outside_life)
        for name in TRAINS
    )
    if config.task.label_fraction < 1.0:
        train = train.of_some_subjects(config.task.label_fraction, config.train.seed)
    return train, tuning, mapped


def require_labels(whose: str, split: str, examples: int, unknown: int, labels: int) -> None:
    """Raise :class:`InputError` where there is no example; `whose` says of which labels."""
    if not examples:
        mend = "choose the best epoch and calibrate" if split == "tuning" else "learn"
        raise InputError(
            f"{whose} have none of the {split} split ({unknown:,} of {labels:,} labels are of subjects that "
            f"the data does not have): add some, to {mend} by."
        )


def in_vocabulary(
    data: SequenceSet, vocabulary: Vocabulary, model: ModelConfig, extend: bool = False
) -> tuple[SequenceSet, VocabularyMap]:
    """The data written in a model's vocabulary, with static facts where it reads them, and how the codes were
    mapped onto that.
    """
    data = data.with_facts() if model.fact_tokens else data
    found = map_vocabulary(data.vocabulary, vocabulary, extend)
    alone = {name: found.apply_to_facts(facts) for name, facts in data.facts_without_events.items()}
    splits = found.apply_to(data.splits)
    return replace(data, vocabulary=found.vocabulary, splits=splits, facts_without_events=alone), found


def examples_of(
    data: SequenceSet,
    split: str,
    labels: Labels,
    model: ModelConfig,
    max_length: int | None,
    delays: Sequence[str],
    outside_life: OutsideLife = None,
) -> Examples:
    """Histories of a split's labels as a model reads them; arguments and errors of `find_examples`."""
    return find_examples(
        data,
        split,
        labels,
        max_tokens=(max_length or model.positions) - model.cls_token,
        delays=delays,
        sep_token=model.sep_token,
        outside_life=outside_life,
    )


LEAST_AT_ONCE, MOST_AT_ONCE = 16, 128
"""Examples of a batch whose size is not given."""


def batch_size(config: FinetuneConfig, examples: int) -> int:
    """Examples a step, as given, or by the number of train examples."""
    return config.train.batch_size or min(MOST_AT_ONCE, max(LEAST_AT_ONCE, examples // 16))


def split_batches(
    config: FinetuneConfig, model: ModelConfig, labelled: LabelledData, mesh: Mesh
) -> tuple[TaskBatches, TaskBatches, int]:
    """Batches of the train and the tuning split, and the number of micro-batches of a step."""
    length = config.task.max_length or model.positions
    size = batch_size(config, len(labelled.train))
    shape = RowShape(length, config.task.packed, model.cls_token, mesh.size)
    seed = config.train.seed
    train = task_batches(labelled.train, labelled.train_targets, shape, batch_size=size, seed=seed)
    of_tuning = config.train.batch_size or MOST_AT_ONCE
    tuning = task_batches(labelled.tuning, labelled.tuning_targets, shape, batch_size=of_tuning, seed=None)
    rows = -(-train.rows_per_batch // mesh.size)
    width = model.inner_size
    platform = mesh.devices.flat[0].platform
    parts = config.train.micro_batches or likely_parts(rows, train.row_length, width, platform)
    return train.with_rows_a_multiple_of(mesh.size * parts), tuning, parts


# Examples of several binary tasks: each subject and prediction time is read once for all of them.


def label_tasks(
    config: FinetuneConfig,
    model: ModelConfig,
    vocabulary: Vocabulary,
    data: SequenceSet,
    tables: LabelTables,
    delays: Sequence[str],
) -> LabelledData:
    """As `labelled_data.label_data`, of several tables.

    Raises:
        InputError: a table without a label of the train or the tuning split; it names the table.
    """
    train, tuning, mapped = examples_to_train(config, model, vocabulary, data, tables.pairs, delays)
    targets = {"train": tables.targets[train.rows], "tuning": tables.targets[tuning.rows]}
    found = {"train": train, "tuning": tuning}
    fraction = config.task.label_fraction
    limited = f" (task.label_fraction is {fraction:g})" if fraction < 1 else ""
    tasks: dict[str, LabelledData] = {}
    whole = LabelledData(
        BINARY, mapped.vocabulary, vocabulary.codes, train, targets["train"], tuning, targets["tuning"], {}
    )
    for k, (name, labels) in enumerate(zip(tables.names, tables.tables, strict=True)):
        unknown = of_unknown_subjects(data, labels)
        own, of_task = {}, {}
        for split, examples in found.items():
            labelled = ~np.isnan(targets[split][:, k])
            own[split], of_task[split] = examples.take(labelled), targets[split][labelled, k : k + 1]
            whose = f"population.labels: the labels of {name}{limited}"
            require_labels(whose, split, len(own[split]), unknown, len(labels))
        counts = {
            **count_labels(labels, unknown),
            **{split: describe(own[split], BINARY, of_task[split]) for split in found},
        }
        tasks[name] = replace(
            whole,
            train=own["train"],
            train_targets=of_task["train"],
            tuning=own["tuning"],
            tuning_targets=of_task["tuning"],
            counts=counts,
        )
    counts = {
        **count_outside(train, tuning),
        **count_codes(mapped, vocabulary),
        **{split: {"examples": len(examples)} for split, examples in found.items()},
        "tasks": {name: one.counts for name, one in tasks.items()},
    }
    return replace(whole, counts=counts, tasks=tasks)

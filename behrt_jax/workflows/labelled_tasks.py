"""Examples of several binary tasks: each subject and prediction time is read once for all of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from behrt_jax.config import FinetuneConfig, ModelConfig
from behrt_jax.data.examples import of_unknown_subjects
from behrt_jax.data.label_tables import BINARY, LabelTables
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.workflows.label_counts import count_codes, count_labels, describe
from behrt_jax.workflows.labelled_data import LabelledData, examples_to_train, require_labels


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
        **count_codes(mapped, vocabulary),
        **{split: {"examples": len(examples)} for split, examples in found.items()},
        "tasks": {name: one.counts for name, one in tasks.items()},
    }
    return replace(whole, counts=counts, tasks=tasks)

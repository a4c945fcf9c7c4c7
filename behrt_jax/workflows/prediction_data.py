"""Histories to predict or embed: from prepared data, or records, and labels to batches and their counts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVarTuple

import numpy as np
from jax.sharding import Mesh

from behrt_jax.config.commands import PredictConfig
from behrt_jax.config.data import PrepareConfig
from behrt_jax.config.model import ModelConfig
from behrt_jax.data.batches import RowShape, TaskBatches, task_batches
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.events import SPLITS
from behrt_jax.data.examples import Examples, of_unknown_subjects
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.prepared import read_rules
from behrt_jax.data.sequences import SequenceSet, told_facts
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, absolute, work_folder
from behrt_jax.run_folder import CONFIG_FILE
from behrt_jax.tracking.console import Console
from behrt_jax.training.pretrained import stored_settings
from behrt_jax.weights.portable import is_portable
from behrt_jax.workflows.checks import check_days
from behrt_jax.workflows.finetune_run import TASK_FILE
from behrt_jax.workflows.finetuned import read_task
from behrt_jax.workflows.labelled_data import (
    announce_codes,
    check_codes,
    examples_of,
    in_vocabulary,
    read_data,
)

Values = TypeVarTuple("Values")

AT_ONCE = 8192
"""Examples that are held in memory together."""


def check_output(output: Path | None, rows: int) -> None:
    """Refuse a file of predictions that cannot be written anew, and a batch without rows.

    Raises:
        InputError: it is either.
    """
    if output is None:
        raise InputError("--output is missing: give a Parquet file to write.")
    if output.exists():
        raise InputError(f"{output} is there already: give another --output, or remove it.")
    if rows < 1:
        raise InputError(f"rows is {rows}: give 1 or more.")


class Histories(NamedTuple):
    """Histories of subjects up to the times of labels."""

    data: SequenceSet
    """In the vocabulary of the model."""
    labels: dict[str, Labels]
    """Of the subjects of each split."""
    delays: tuple[str, ...]
    """See `examples.find_examples`."""


class Records(NamedTuple):
    """Records of subjects to predict."""

    data: SequenceSet
    """In the vocabulary of the model."""
    delays: tuple[str, ...]
    splits: tuple[str, ...]
    """Whose subjects are predicted."""
    folder: Path | None
    """Of the prepared data; None where records were given and prepared for this alone."""
    labels: Path | None
    """Table of labels: the one that is given, or that of the model where it knows the data."""
    codes: JsonObject
    """What `labelled_data.check_codes` found."""

    def at(self, labels: Labels) -> Histories:
        """Histories up to the labels of the subjects that are predicted."""
        parts = {
            name: labels.take(np.isin(labels.subject_ids, self.data.subject_ids(name)))
            for name in self.splits
        }
        return Histories(self.data, parts, self.delays)


@contextmanager
def open_records(
    config: PredictConfig,
    vocabulary: Vocabulary,
    preparation: Preparation | None,
    model: ModelConfig,
    console: Console,
) -> Iterator[Records]:
    """Open the prepared data, or prepare the records that are given as those of the model were.

    Args:
        config: names the model and either of the two, or neither: then the model knows its data.
        vocabulary: of the model.
        preparation: rules of what it was trained on, where they are known.
        model: its settings.
        console: told what was found.

    Raises:
        InputError: both are given or none is known, they cannot be read, the model knows too few codes, or
            it reads days that it does not know.
    """
    assert config.model is not None and config.output is not None
    if config.data is not None and config.input is not None:
        raise InputError("--data and --input are both given: give prepared data, or records to prepare.")
    for name in ("source", "visit_column", "births", "table"):
        if config.input is None and getattr(config, name) != getattr(PredictConfig(), name):
            raise InputError(f"--{name} has no effect without --input, the records to prepare: leave it out.")
    with ExitStack() as stack:
        folder, labels = config.data, config.labels
        if config.data is None and config.input is None:
            folder, labels = known(config.model, "data"), labels or known(config.model, "labels")
        if config.input is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            purpose = f"predicting-{config.output.name}"
            folder = stack.enter_context(work_folder(config.output.parent, purpose)) / "prepared"
            prepare_input(config, folder, console)
        if folder is None:
            raise InputError("--data is missing: give the folder that prepare wrote, or records by --input.")
        own, delays = read_data(folder)
        split = config.split or ("held_out" if config.input is None else "all")
        splits = SPLITS if split == "all" else (split,)
        codes = check_codes(own, splits, vocabulary, preparation, config.max_unknown, config.model)
        announce_codes(console, codes)
        data, _ = in_vocabulary(own, vocabulary, model)
        check_days(model, {name: data.splits[name] for name in splits})
        for line in told_facts(data, splits):
            console.log(line)
        yield Records(data, delays, splits, None if config.input is not None else folder, labels, codes)


def prepare_input(config: PredictConfig, folder: Path, console: Console) -> None:
    """Prepare the records of ``config.input`` like the model's own into a new folder, and report on it."""
    from behrt_jax.records.prepare.manifest import (
        read_like,  # sources are slow to import, and others need none
    )
    from behrt_jax.records.prepare.pipeline import prepare
    from behrt_jax.workflows.prepare import SOURCES, open_source, report

    assert config.model is not None
    source = config.source or read_rules(config.model, "--model")[1].source
    if source not in SOURCES:
        raise InputError(
            f"--source is missing: the model was trained on {source} records, which does not tell the form "
            f"of those in --input: give one of {', '.join(SOURCES)}."
        )
    wanted = PrepareConfig(
        source=source,  # pyright: ignore[reportArgumentType]
        input=config.input,
        output=folder,
        like=config.model,
        visit_column=config.visit_column,
        births=config.births,
        table=config.table,
    )
    wanted, _ = read_like(wanted, "--model")
    report(console, prepare(open_source(wanted), wanted))


def known(model: Path, what: Literal["data", "labels"]) -> Path | None:
    """The prepared data of a run or an adapter, or the labels that it was fine-tuned on, where it knows."""
    if (model / TASK_FILE).is_file() and (path := read_task(model).get(what)):
        return Path(path)
    if is_portable(model) or not (model / CONFIG_FILE).is_file():
        return None
    found = stored_settings(model).get(what)
    if isinstance(found, dict):  # of pretraining
        found = found["path"] if found["source"] == "prepared" else None
    return None if found is None else Path(found)


def labels_to_predict(records: Records) -> tuple[Labels, int]:
    """The labels, else one of each subject at its last event; and how many subjects have no event."""
    if records.labels is not None:
        return read_labels(records.labels, without_values=True), 0
    data = records.data
    without = sum(len(data.subject_ids(name)) - len(data.splits[name]) for name in records.splits)
    return last_events(data, records.splits), without


def last_events(data: SequenceSet, splits: Sequence[str]) -> Labels:
    """Labels of no value at the last event of each subject that has any."""
    parts = [data.splits[name] for name in splits]
    times = np.concatenate([part.times[part.offsets[1:] - 1] for part in parts])
    subjects = np.concatenate([part.subject_ids for part in parts])
    return Labels(subjects, times, np.full(len(times), None), "none")


def count_labels(records: Records, labels: Labels, histories: Histories) -> dict[str, int]:
    """Counts of a file of predictions, as far as the labels tell them.

    Args:
        records: to predict.
        labels: all of them.
        histories: up to those of the subjects that are predicted.

    Raises:
        InputError: no label is left.
    """
    counts = {
        "examples": sum(len(part) for part in histories.labels.values()),
        "unknown_subjects": of_unknown_subjects(records.data, labels),
        "empty_histories": 0,
        "duplicates": labels.duplicates,
    }
    if not counts["examples"]:
        raise InputError(
            f"--labels: none of the {len(labels):,} labels is of a subject of {named(records.splits)} "
            f"({counts['unknown_subjects']:,} are of subjects that the data lacks)."
        )
    return counts


def named(splits: Sequence[str]) -> str:
    """Splits, in words."""
    return " or ".join(f"the split {name}" for name in splits)


def pieces_of(
    config: PredictConfig, model: ModelConfig, max_length: int | None, histories: Histories, mesh: Mesh
) -> Iterator[tuple[str, Labels, Examples, TaskBatches]]:
    """Split, labels, examples and batches of a few thousand examples at a time, in the order of the labels.

    Args:
        config: its ``rows`` and ``outside_life`` are read.
        model: that reads the histories.
        max_length: tokens of a row; the model's positions where not given.
        histories: to read.
        mesh: the devices.
    """
    shape, segments = RowShape(max_length or model.positions, cls_token=model.cls_token), 1
    data, delays = histories.data, histories.delays
    for split, labels in histories.labels.items():
        for start in range(0, len(labels), AT_ONCE):
            part = labels.take(np.arange(start, min(start + AT_ONCE, len(labels))))
            examples = examples_of(data, split, part, model, max_length, delays, config.outside_life)
            part = part.take(examples.rows)  # without those that are left out
            if not len(part):
                continue
            targets = np.zeros((len(examples), 1), np.float32)
            batches = task_batches(
                examples, targets, shape, batch_size=len(examples), seed=None, least_segments=segments
            )
            # A power of two, so that few subjects are quick and there are few programs.
            rows = min(config.rows, 2 ** (batches.rows_per_batch - 1).bit_length())
            batches = batches.of_rows(rows, mesh.size)
            segments = batches.segments  # one shape for all that follow
            yield split, part, examples, batches


def shown(
    pieces: Iterable[tuple[Labels, *Values]], counts: dict[str, int], console: Console
) -> Iterator[tuple[Labels, *Values]]:
    """Labels and what is written of them, with the progress of the writing.

    Args:
        pieces: a few thousand examples at a time.
        counts: ``examples`` are all labels at first; in the end those that came, without ``outside_life``.
        console: shows the progress.

    Raises:
        InputError: no example came.
    """
    console.start(counts["examples"], 0, None)
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece[0])
        console.step(done, len(piece[0]))
    if outside := counts["examples"] - done:
        counts.update(examples=done, outside_life=outside)
    if not done:
        raise InputError("--labels: all labels are before their subject's birth or after its death.")


def announce_counts(console: Console, counts: Mapping[str, int], **said: str) -> None:
    """Say how many labels were left out, and of other counts what `said` says of each by its name."""
    left_out = {
        "outside_life": "labels outside of their subject's life are left out",
        "unknown_subjects": "labels are of subjects that the data lacks: left out",
    }
    for name, words in {**left_out, **said}.items():
        if counts.get(name):
            console.log(f"{counts[name]:,} {words}.")


def metadata_of(model: Path, records: Records, max_tokens: int) -> JsonObject:
    """What a file of predictions says of where they come from, `max_tokens` being the longest history."""
    return {
        "model": absolute(model),
        "data": absolute(records.folder),
        "labels": absolute(records.labels),
        "split": "all" if records.splits == SPLITS else records.splits[0],
        "codes": records.codes,
        "max_tokens": max_tokens,
        "fact_tokens": records.data.splits["train"].facts is not None,
    }

"""From a file of predictions to what they are worth: figures, intervals, baselines, groups, a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax import __version__
from behrt_jax.config.commands import EvaluateConfig
from behrt_jax.data.events import SPLITS
from behrt_jax.data.examples import Examples, find_examples
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.predictions import PredictionFile, PredictionMetadata, read_predictions
from behrt_jax.data.prepared import read_manifest, read_prepared, read_static
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.vocabulary import UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation import task_baselines
from behrt_jax.evaluation.performance import EvaluationRecord, age_groups, assess_predictions, fact_groups
from behrt_jax.files import check_new_folder, work_folder, write_json, write_text
from behrt_jax.run_folder import PLOTS_FOLDER, REPORT_FILE, SUMMARY_TEXT_FILE
from behrt_jax.tracking import evaluation_report
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.tracking.evaluation_plots import plot_evaluation

FIGURES_FILE = "metrics.json"
_WHOLE_HISTORY = 1 << 30
_MEND = "give --data (the folder that prepare wrote) and --labels (the label table with the train split)."


def evaluate(config: EvaluateConfig) -> EvaluationRecord:
    """Judge ``config.predictions`` and write the folder ``config.output``, whole or not at all.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: a missing option, an output with other files, or files that cannot be read.
    """
    output = _checked(config)
    assert config.predictions is not None
    file = read_predictions(config.predictions)
    with open_console() as console:
        console.log(f"Read {len(file):,} predictions ({file.kind}) from {config.predictions}.")
        record = _judge(config, file, console)
        _write(output, config.predictions.stem, record)
        console.log(evaluation_report.heading(record))
        for table in evaluation_report.evaluation_tables(record):
            console.table(*table)
        for sentence in evaluation_report.plain_words(record):
            console.log(f"- {sentence}")
        names = [str(path.relative_to(output)) for path in sorted(output.rglob("*")) if path.is_file()]
        console.log(f"Written to {output}: {', '.join(names)}")
    return record


def _checked(config: EvaluateConfig) -> Path:
    if config.predictions is None:
        raise InputError("--predictions is missing: give the file that predict wrote.")
    if config.output is None:
        raise InputError("--output is missing: give a folder to write.")
    for name, least in (("draws", 2), ("max_train_examples", 1), ("boosting_codes", 1)):
        if getattr(config, name) < least:
            raise InputError(f"--{name} is {getattr(config, name)}: give {least} or more.")
    if config.baselines and find_spec("sklearn") is None:
        raise InputError(
            "The baselines need scikit-learn, which is not installed: pip install scikit-learn, or give "
            "--no_baselines."
        )
    output = config.output.expanduser().absolute()
    check_new_folder(output, "--output")
    return output


def _judge(config: EvaluateConfig, file: PredictionFile, console: Console) -> EvaluationRecord:
    records, missing = open_records(config, file)
    groups = {} if records is None else find_groups(file, records)
    reason, counts = missing, {}
    baselines: list[task_baselines.Baseline] = []
    if not config.baselines:
        reason = "--no_baselines was given."
    elif records is not None:
        data, reason, counts = baseline_data(config, file, records)
        if data is not None:
            lost = {split: counts[f"{split}_left_out"] for split in ("train", "tuning")}
            left_out = "".join(f" ({n:,} of {split} left out)" for split, n in lost.items() if n)
            console.log(
                f"Fitting baselines on {counts['train']:,} examples of train and {counts['tuning']:,} of "
                f"tuning{left_out}."
            )
            baselines = task_baselines.run_baselines(data)
    task = file.metadata.copy()
    task.pop("classes", None)
    return {
        "format_version": 1,
        "behrt_jax": __version__,
        "task": task,
        **assess_predictions(file, baselines, groups, config.draws, config.seed),
        "baseline_examples": counts or None,
        "without_baselines": reason or None,
        "without_groups": missing or None,
    }


def _write(output: Path, title: str, record: EvaluationRecord) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(output.parent, f"evaluating-{output.name}") as work:
        check_new_folder(output, "--output")
        folder = work / "evaluation"
        folder.mkdir()
        write_json(folder / FIGURES_FILE, record)
        write_text(folder / SUMMARY_TEXT_FILE, evaluation_report.summary_text(record))
        pictures = plot_evaluation(record, folder / PLOTS_FOLDER)
        evaluation_report.write_evaluation_report(
            folder / REPORT_FILE, f"Evaluation of {title}", record, pictures
        )
        folder.replace(output)


# What baselines and groups need beside the predictions: histories, and labels of train and tuning.


@dataclass(frozen=True, eq=False)
class Records:
    """The prepared data that the predictions were made of."""

    folder: Path
    data: SequenceSet
    find: Callable[..., Examples]
    """Finds the histories of a split's labels."""
    evaluated: task_baselines.HistoryCounts
    """Of the predictions' examples, in their order."""


def open_records(config: EvaluateConfig, file: PredictionFile) -> tuple[Records | None, str]:
    """The histories of the predictions' examples; else None and why there are none.

    Raises:
        InputError: ``config.data`` is given, but is no prepared data or not that of the predictions.
    """
    named = config.data or file.metadata.get("data")
    if named is None:
        return None, f"the predictions do not name their data: {_MEND}"
    folder = Path(named)
    if config.data is None and not folder.is_dir():
        return None, f"the data that the predictions name is not there ({folder}): {_MEND}"
    data = read_prepared(folder)
    if file.metadata.get("fact_tokens"):  # what the model reads, the baselines read
        data = data.with_facts()
    find = partial(
        find_examples,
        data,
        max_tokens=file.metadata.get("max_tokens") or _WHOLE_HISTORY,
        delays=tuple(read_manifest(folder)["options"].get("delays", ())),
    )
    wanted = Labels(file.subject_ids, file.times, np.zeros(len(file), bool), "boolean")
    found = [find(name, wanted, outside_life="keep") for name in _splits(file.metadata)]
    rows = np.concatenate([examples.rows for examples in found])
    if len(rows) != len(file):
        missing = f"{len(file) - len(rows):,} of {len(file):,} examples are not in {folder}"
        if config.data is not None:
            raise InputError(f"--data: {missing}: give the data that was predicted.")
        return None, f"{missing}: {_MEND}"
    parts = [task_baselines.count_codes(examples, len(data.vocabulary)) for examples in found]
    return Records(folder, data, find, task_baselines.join_histories(parts, np.argsort(rows))), ""


def baseline_data(
    config: EvaluateConfig, file: PredictionFile, records: Records
) -> tuple[task_baselines.BaselineData | None, str, dict[str, int]]:
    """What baselines are fitted on; else None and why there is nothing; and counts of examples.

    Raises:
        InputError: ``config.labels`` is given but cannot be read, or is of another kind.
    """
    named = config.labels or file.metadata.get("labels")
    if named is None:
        return None, f"the predictions do not name their labels: {_MEND}", {}
    path = Path(named)
    if config.labels is None and not path.exists():
        return None, f"the labels that the predictions name are not there ({path}): {_MEND}", {}
    labels = read_labels(path)
    parts: dict[str, tuple[task_baselines.HistoryCounts, np.ndarray]] = {}
    counts: dict[str, int] = {}
    for place, split in enumerate(("train", "tuning")):
        examples = records.find(split, labels, outside_life="leave_out")
        targets, rows = task_baselines.targets_of(file.kind, file.classes, labels, examples.rows)
        if len(rows) > config.max_train_examples:
            rng = np.random.default_rng([config.seed, place])
            chosen = np.sort(rng.permutation(len(rows))[: config.max_train_examples])
            targets, rows = targets[chosen], rows[chosen]
        parts[split] = task_baselines.count_codes(examples, len(records.data.vocabulary), rows), targets
        counts |= {split: len(rows), f"{split}_left_out": len(examples) - len(rows)}
    if not counts["train"]:
        return None, f"{path} has no label of the train split: {_MEND}", counts
    ids = records.data.vocabulary.encode(file.classes)
    data = task_baselines.BaselineData(
        file.kind,
        file.classes,
        file.edges_days,
        np.where(ids == UNK, -1, ids),
        *parts["train"],
        *parts["tuning"],
        records.evaluated,
        boosting_codes=config.boosting_codes,
        seed=config.seed,
    )
    return data, "", counts


def find_groups(file: PredictionFile, records: Records) -> dict[str, Mapping[str, np.ndarray]]:
    """``age``, and ``sex``, ``race`` and ``ethnicity`` where the data has them as static facts."""
    groups: dict[str, Mapping[str, np.ndarray]] = {"age": age_groups(records.evaluated.ages)}
    facts = pa.concat_tables([read_static(records.folder, name) for name in _splits(file.metadata)])
    known = fact_groups(file.subject_ids, facts["subject_id"].to_pylist(), facts["code"].to_pylist())
    return {**known, **groups}


def _splits(metadata: PredictionMetadata) -> Sequence[str]:
    split = metadata.get("split")
    return (split,) if split in SPLITS else SPLITS

"""From a file of predictions to what they are worth: figures, intervals, baselines, groups, a report."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from behrt_jax import __version__
from behrt_jax.config import EvaluateConfig
from behrt_jax.data.predictions import PredictionFile, read_predictions
from behrt_jax.data.work_folder import work_folder
from behrt_jax.errors import InputError
from behrt_jax.evaluation.baseline import Baseline
from behrt_jax.evaluation.performance import assess_predictions
from behrt_jax.evaluation.simple_baselines import run_baselines
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.tracking.evaluation_plots import plot_evaluation
from behrt_jax.tracking.evaluation_report import write_evaluation_report
from behrt_jax.tracking.evaluation_tables import evaluation_tables, heading, summary_text
from behrt_jax.tracking.evaluation_words import plain_words
from behrt_jax.tracking.run_folder import (
    PLOTS_FOLDER,
    REPORT_FILE,
    SUMMARY_TEXT_FILE,
    write_json,
    write_text,
)
from behrt_jax.workflows.baseline_data import baseline_data, find_groups, open_records

FIGURES_FILE = "metrics.json"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Judge ``config.predictions`` and write the folder ``config.output``, whole or not at all.

    Returns:
        What metrics.json holds: see `performance.assess_predictions`, with ``task`` (what the predictions
        say of themselves), ``baseline_examples``, ``without_baselines`` and ``without_groups`` (reasons).

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
        console.log(heading(record))
        for table in evaluation_tables(record):
            console.table(*table)
        for sentence in plain_words(record):
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} holds other files: give an --output that is new or empty.")
    return output


def _judge(config: EvaluateConfig, file: PredictionFile, console: Console) -> dict[str, Any]:
    records, missing = open_records(config, file)
    groups = {} if records is None else find_groups(file, records)
    reason, counts = missing, {}
    baselines: list[Baseline] = []
    if not config.baselines:
        reason = "--no_baselines was given."
    elif records is not None:
        data, reason, counts = baseline_data(config, file, records)
        if data is not None:
            left_out = "".join(
                f" ({counts[f'{split}_left_out']:,} of {split} left out)"
                for split in ("train", "tuning")
                if counts[f"{split}_left_out"]
            )
            console.log(
                f"Fitting baselines on {counts['train']:,} examples of train and {counts['tuning']:,} of "
                f"tuning{left_out}."
            )
            baselines = run_baselines(data)
    task = {key: value for key, value in file.metadata.items() if key != "classes"}
    return {
        "format_version": 1,
        "behrt_jax": __version__,
        "task": task,
        **assess_predictions(file, baselines, groups, config.draws, config.seed),
        "baseline_examples": counts or None,
        "without_baselines": reason or None,
        "without_groups": missing or None,
    }


def _write(output: Path, title: str, record: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(output.parent, f"evaluating-{output.name}") as work:
        folder = work / "evaluation"
        folder.mkdir()
        write_json(folder / FIGURES_FILE, record)
        write_text(folder / SUMMARY_TEXT_FILE, summary_text(record))
        pictures = plot_evaluation(record, folder / PLOTS_FOLDER)
        write_evaluation_report(folder / REPORT_FILE, f"Evaluation of {title}", record, pictures)
        folder.replace(output)

"""What a population leaves behind: an adapter folder for each member, and who predicts."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from behrt_jax.config import FinetuneConfig
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.run_folder import SUMMARY_FILE, SUMMARY_TEXT_FILE, write_json, write_text
from behrt_jax.training.task_scores import task_metrics
from behrt_jax.workflows.finetune_results import (
    MEMBERS_FOLDER,
    TASK_FILE,
    calibrate,
    loss_of_base_rate,
    task_record,
    try_write_adapter,
)
from behrt_jax.workflows.finetune_setup import Finetuning
from behrt_jax.workflows.population_training import Best
from behrt_jax.workflows.population_variation import SEARCHES, Variation
from behrt_jax.workflows.run_settings import settings


def write_population(
    console: Console,
    config: FinetuneConfig,
    run: Finetuning,
    variation: Variation,
    found: Sequence[Best],
    seconds: float,
) -> dict[str, Any]:
    """Write members/, task.json, summary.json and SUMMARY.txt; returns the summary."""
    rows = [_write_member(console, config, run, variation, k, best) for k, best in enumerate(found)]
    summary: dict[str, Any] = {
        "task": run.labelled.task.kind,
        "population": settings(config.population),
        "members": rows,
        "data": run.labelled.counts,
        "parameters": {key: value for key, value in run.parameters.items() if key != "adapters"},
        "wall_seconds": seconds,
    }
    if run.labelled.tasks:
        write_json(run.folder / TASK_FILE, {"tasks": variation.names})
        lines = [f"Each predicts its own task: predict.py --model {run.folder / MEMBERS_FOLDER / 'K'}."]
    else:
        together, lines = _predict_together(config, run, variation, found)
        summary |= together
    write_json(run.folder / SUMMARY_FILE, summary)

    columns = ("member", "best step", "tuning loss", "of the base rate", "tuning AUROC")
    table = [
        (row["member"], row["best_step"],
         *(_cell(row.get(name)) for name in ("loss", "base_rate_loss", "auroc")))
        for row in rows
    ]  # fmt: skip
    console.table(f"Members ({summary['task']}, vary {config.population.vary})", columns, table)
    for line in lines:
        console.log(line)
    rows_of_text = [
        ", ".join(f"{name} {cell}" for name, cell in zip(columns, row, strict=True)) for row in table
    ]
    write_text(run.folder / SUMMARY_TEXT_FILE, "\n".join([*rows_of_text, *lines]) + "\n")
    console.log(f"Written to {run.folder}: {', '.join(sorted(path.name for path in run.folder.iterdir()))}")
    return summary


def _write_member(
    console: Console, config: FinetuneConfig, run: Finetuning, variation: Variation, k: int, best: Best
) -> dict[str, Any]:
    """Write the adapter of a member; returns its part of the summary."""
    labelled, kind = variation.labelled[k], run.labelled.task.kind
    if best.outputs is None:
        return {"member": variation.names[k], "best_step": None, "tuning_losses": best.curve}
    calibration = calibrate(config.task, kind, best.outputs[None], labelled.tuning_targets)
    record = task_record(replace(config, lora=variation.adapters[k]), run, calibration)
    folder = run.folder / MEMBERS_FOLDER / str(k)
    try_write_adapter(console, folder, run, best.variables, {"name": variation.names[k], **record})
    return {
        "member": variation.names[k],
        "best_step": best.step,
        **task_metrics(kind, best.outputs, labelled.tuning_targets),
        "base_rate_loss": loss_of_base_rate(labelled),
        "calibration": asdict(calibration),
        "tuning_losses": best.curve,
    }


def _predict_together(
    config: FinetuneConfig, run: Finetuning, variation: Variation, found: Sequence[Best]
) -> tuple[dict[str, Any], list[str]]:
    """Choose who predicts, the best of a search or all, and calibrate it: what the summary says of it."""
    labelled, kind = run.labelled, run.labelled.task.kind
    searched = config.population.vary in SEARCHES
    chosen = [int(np.argmin([best.loss for best in found]))] if searched else list(range(variation.size))
    outputs = np.array([found[k].outputs for k in chosen])  # [K, N, O]
    calibration = calibrate(config.task, kind, outputs, labelled.tuning_targets)
    write_json(run.folder / TASK_FILE, {**task_record(config, run, calibration), "members": chosen})
    together: dict[str, Any] = {
        "predicting_members": chosen,
        "baselines": {"base rate": {"loss": loss_of_base_rate(labelled)}},
        "calibration": asdict(calibration),
    }
    lines = [f"Predicts: {', '.join(variation.names[k] for k in chosen)}."]
    if variation.weights is not None:  # each train example by the one member that did not learn from it
        unseen = np.zeros((len(labelled.train), labelled.task.outputs), np.float32)
        for weights, best in zip(variation.weights, found, strict=True):
            unseen[~weights] = best.of_unseen
        metrics = together["out_of_fold"] = task_metrics(kind, unseen, labelled.train_targets)
        auroc = f", AUROC {_cell(metrics['auroc'])}" if "auroc" in metrics else ""
        lines.insert(0, f"Cross-validated on the train split: loss {_cell(metrics['loss'])}{auroc}.")
    return together, lines


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

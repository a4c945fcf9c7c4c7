"""What a person reads on the console before and after training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from behrt_jax.config import PretrainConfig
from behrt_jax.data.batches import TrainingBatches
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.run_folder import append_metrics
from behrt_jax.tracking.summary import verdict
from behrt_jax.training.freezing import regime
from behrt_jax.training.parameter_report import report_rows


def data(console: Console, config: PretrainConfig, description: Mapping[str, Any]) -> None:
    """Say what went in, what was left out and why."""
    splits = description["splits"]
    console.table(
        f"Data: {config.data.source}, {description['vocabulary_rows']} vocabulary rows",
        ("split", "subjects", "events", "visits", "length p50", "p90", "p99", "max"),
        [
            (name, part["subjects"], part["events"], part["visits"],
             *(part["lengths"].get(key) for key in ("p50", "p90", "p99", "max")))
            for name, part in splits.items()
        ],
    )  # fmt: skip
    changed = [(f"changed: {rule}", events) for rule, events in description["events_changed"].items()]
    console.table(
        "Events",
        ("rule", "events"),
        [
            ("read", description["events_read"]),
            *((f"dropped: {rule}", events) for rule, events in description["events_dropped"].items()),
            ("kept", description["events_kept"]),
            *changed,
        ],
    )
    without = {name: count for name, count in description["subjects_without_events"].items() if count}
    if without:
        counts = ", ".join(f"{count} of {name}" for name, count in without.items())
        console.log(f"Subjects left without events, and so out: {counts}.")


def batches(console: Console, batches: TrainingBatches, mesh: Mesh, total_steps: int) -> None:
    """Say what a step holds."""
    tokens = batches.tokens_per_epoch / batches.steps_per_epoch
    devices = "1 device" if mesh.size == 1 else f"{mesh.size} devices"
    console.log(
        f"A step: {batches.windows_per_step:.1f} subjects{_cut(batches)} in {batches.rows_per_batch} rows of "
        f"{batches.row_length}, {tokens:,.0f} real tokens ({batches.fill:.1%} of the places). "
        f"An epoch: {batches.steps_per_epoch} steps. In all {total_steps:,} steps on {devices}."
    )


def _cut(batches: TrainingBatches) -> str:
    cut = batches.windows_per_epoch > len(batches.sequences)
    return " (long histories cut into several windows)" if cut else ""


def parameters(console: Console, report: Mapping[str, Any], product: str) -> None:
    """Show the parameter table, and each adapted layer."""
    console.table(
        f"Parameters (regime: {report['regime']})",
        ("group", "total", "trainable", "share"),
        report_rows(report),
    )
    if report["adapters"]:
        console.table(
            f"Adapted layers (product: {product})",
            ("name", "in", "out", "rank"),
            [(layer["name"], layer["in"], layer["out"], layer["rank"]) for layer in report["adapters"]],
        )


def warnings(console: Console, config: PretrainConfig, vocabulary_rows: int) -> list[str]:
    """Show and return what the user should know before it costs time."""
    found = []
    warning = None if config.freezing.groups else regime(config.freezing).warning
    if warning:
        found.append(warning)
    if config.train.static_masks:
        found.append(
            "train.static_masks: masks are drawn once and reused in each epoch, so the training loss falls "
            "by memorising them. For study only."
        )
    if config.data.source == "uniform":
        codes = vocabulary_rows - len(SPECIAL_TOKENS)
        found.append(
            "data.source uniform: codes are drawn at random, there is nothing to learn. The best possible "
            f"validation loss is ln({codes}) = {math.log(codes):.4f}."
        )
    for text in found:
        console.log(f"Warning: {text}")
    return found


def baseline(console: Console, unigram: Mapping[str, float]) -> None:
    """Say what must be beaten."""
    console.log(
        f"Unigram baseline on the {unigram['targets']:,} masked codes of the tuning split: loss "
        f"{unigram['loss']:.4f} nats, accuracy {unigram['accuracy']:.2%}."
    )


@dataclass(frozen=True)
class LoopReporter:
    """Passes the training loop's reports on to console and metrics.jsonl."""

    console: Console
    metrics_path: Path
    unigram_loss: float

    def step(self, step: int, tokens: int, loss: float | None) -> None:
        """A step was dispatched."""
        self.console.step(step, tokens, loss)

    def record(self, metrics: dict[str, Any]) -> None:
        """Append to metrics.jsonl; a validation is also shown."""
        append_metrics(self.metrics_path, metrics)
        if metrics["split"] != "train":
            self.console.log(
                f"epoch {metrics['epoch']:.1f}  step {metrics['step']:,}  validation loss "
                f"{metrics['loss']:.4f} (unigram {self.unigram_loss:.4f})  accuracy {metrics['accuracy']:.2%}"
                f"  top-5 {metrics['accuracy_top5']:.2%}  top-10 {metrics['accuracy_top10']:.2%}"
            )


def end(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    """Say how it ended and what was written."""
    console.log(f"Stopped: {summary['stop_reason']}.")
    console.log(verdict(summary["gain_over_unigram"]))
    console.log(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")

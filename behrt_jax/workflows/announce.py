"""Words and tables for a person on the console, before, during and after training."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from behrt_jax.config.training import InitConfig, PretrainConfig
from behrt_jax.data.batches import TrainingBatches
from behrt_jax.data.questions import QuestionBatches
from behrt_jax.evaluation.masked_codes import MaskedCodeResults, share_of_attainable_gain
from behrt_jax.files import JsonObject
from behrt_jax.run_folder import append_metrics, shown_files
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.summary import Summary, aurocs, headline, verdict
from behrt_jax.tracking.trackers import Send
from behrt_jax.training.freezing import report_rows


def data(console: Console, config: PretrainConfig, description: JsonObject) -> None:
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
    for name in (name for name, part in splits.items() if not part["subjects"]):
        console.log(f"Warning: the {name} split has no subject with events.")
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


def batches(
    console: Console, batches: TrainingBatches | QuestionBatches, mesh: Mesh, total_steps: int
) -> None:
    """Say what a step holds."""
    tokens = batches.tokens_per_epoch / batches.steps_per_epoch
    devices = "1 device" if mesh.size == 1 else f"{mesh.size} devices"
    console.log(
        f"A step: {batches.windows_per_step:.1f} {_segments(batches)} in {batches.rows_per_batch} rows of "
        f"{batches.row_length}, {tokens:,.0f} real tokens ({batches.fill:.1%} of the places). "
        f"An epoch: {batches.steps_per_epoch} steps. In all {total_steps:,} steps on {devices}."
    )


def _segments(batches: TrainingBatches | QuestionBatches) -> str:
    """What stands in the rows."""
    if isinstance(batches, QuestionBatches):
        return "histories up to the end of a visit"
    cut = batches.windows_per_epoch > len(batches.sequences)
    return f"subjects{' (long histories cut into several windows)' if cut else ''}"


def parameters(console: Console, report: JsonObject, product: str) -> None:
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


def baselines(console: Console, results: Mapping[str, MaskedCodeResults], unasked: int) -> None:
    """Say what must be beaten, and where it is known, what cannot be, and what is hidden besides."""
    metrics = {name: result.metrics() for name, result in results.items()}
    targets = metrics["unigram"]["targets"]
    console.table(
        f"Baselines on the {targets:,} masked codes of the tuning split",
        ("", "loss (nats)", "95 % interval", "top-1", "top-5", "top-10"),
        [
            (
                name,
                f"{figures['loss']:.4f}",
                "{:.3f} to {:.3f}".format(*figures["interval"]),
                *(f"{figures[field]:.1%}" for field in ("accuracy", "accuracy_top5", "accuracy_top10")),
            )
            for name, figures in metrics.items()
        ],
    )
    if unasked:
        console.log(
            f"{unasked:,} more codes are hidden with their visit but not predicted: rows have no slots left."
        )


def vectors(console: Console, init: InitConfig, coverage: JsonObject) -> None:
    """Say what of the vocabulary starts from vectors."""
    if coverage["projection"] == "none":
        fitted = f"{coverage['dimension']} numbers each, not projected"
    else:
        kept = f"{coverage['variance_share']:.1%} of the variance"
        fitted = f"{coverage['dimension']} numbers each, projected by PCA, which keeps {kept}"
    console.log(
        f"Code embedding from {init.vectors}: {coverage['codes']:,} codes, "
        f"{coverage['vocabulary_share']:.1%} of the vocabulary and {coverage['event_share']:.1%} of the "
        f"train events; {fitted}."
    )


def started_from(console: Console, init: InitConfig, step: int) -> None:
    """Say whose parameters the run starts from."""
    console.log(f"Starting from step {step:,} of {init.run}: {', '.join(init.groups)}.")


@dataclass(frozen=True)
class LoopReporter:
    """Lines of metrics.jsonl as they come, those of validations also on the console."""

    console: Console
    metrics_path: Path
    baselines: Mapping[str, JsonObject]
    """Name -> figures; ``unigram`` at least, of questions ``prevalence``."""
    examine: Callable[[int], None]
    """Called after each validation with the number of lines written so far."""
    send: Send = lambda metrics: None
    """Told each line that was written."""
    _lines: Counter[str] = field(default_factory=Counter)

    def record(self, metrics: JsonObject) -> None:
        """Append to metrics.jsonl; a validation is also shown."""
        simple = "unigram" if "unigram" in self.baselines else "prevalence"
        unigram, oracle = (self.baselines.get(name, {}).get("loss") for name in (simple, "oracle"))
        best = ""
        if metrics["split"] != "train" and oracle is not None and unigram is not None:
            share = share_of_attainable_gain(metrics["loss"], unigram, oracle)
            metrics = {**metrics, "share_of_attainable_gain": share}
            best = f", best possible {oracle:.4f}"
        append_metrics(self.metrics_path, metrics)
        self.send(metrics)
        self._lines["written"] += 1
        if metrics["split"] != "train":
            beside = [
                f"{name} {metrics[field]:.2%}"
                for field, name in (
                    ("accuracy", "accuracy"),
                    ("accuracy_top5", "top-5"),
                    ("accuracy_top10", "top-10"),
                )
                if field in metrics
            ]
            beside += [f"{name} {value:.3f}" for name, value in aurocs(metrics) if value is not None]
            self.console.log(
                f"epoch {metrics['epoch']:.1f}  step {metrics['step']:,}  validation loss "
                f"{metrics['loss']:.4f} ({simple} {unigram:.4f}{best})  {'  '.join(beside)}"
            )
            self.examine(self._lines["written"])


def end(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    """Say how it ended and what was written."""
    console.log(f"Stopped: {summary['stop_reason']}.")
    asked = "prevalence" in (summary.get("baselines") or {})
    console.log(headline(Summary(**summary)) if asked else verdict(summary["gain_over_unigram"]))
    console.log(f"Written to {folder}: {', '.join(shown_files(folder))}")

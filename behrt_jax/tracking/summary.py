"""Outcome of a run: as ``summary.json``, and as text and tables for a person."""

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import TypeAlias, TypedDict

from behrt_jax.files import JsonObject
from behrt_jax.run_folder import Records, is_number, of_split
from behrt_jax.tracking.console import format_cell, format_duration, table_text

SMALL_GAIN = 0.01
"""Nats; a gain this small is within what another seed would change."""

FIGURES = (
    ("loss", "loss (nats)"),
    ("perplexity", "perplexity"),
    ("accuracy", "top-1 accuracy"),
    ("accuracy_top5", "top-5 accuracy"),
    ("accuracy_top10", "top-10 accuracy"),
)
"""Figures of a record or a baseline, with their names for a person."""

BASELINES = {
    "unigram": "unigram baseline",
    "co-occurrence": "co-occurrence baseline",
    "oracle": "best possible",
}
"""Predictors that a run is compared with, with their names for a person."""

Baselines: TypeAlias = Mapping[str, JsonObject]
"""Figures by the name of the baseline: ``unigram`` predicts by train frequency, and others."""


class Summary(TypedDict, total=False):
    """Content of summary.json; a run of an older version, or one that was interrupted, has not all of it."""

    best_step: int | None
    """Step of the best validation; None where the run stopped before the first."""
    best: JsonObject | None
    """Validation record at the best step."""
    last: JsonObject | None
    """Validation record at the last validation."""
    last_train: JsonObject | None
    """The last training record."""
    epochs: float
    steps: int
    stop_reason: str
    """Why the run ended, as a clause for a person."""
    wall_seconds: float
    """Time that the run took, all its parts together."""
    baselines: Baselines
    gain_over_unigram: float | None
    """Unigram loss less best validation loss in nats (positive is good); None where either is unknown."""
    data: JsonObject
    """What went in, counted; nothing about single subjects."""
    parameters: JsonObject
    """The parameter report without its list of adapters."""
    findings: list[JsonObject]
    """Of the doctor."""
    init_vectors: JsonObject
    """Coverage of `init.vectors`, see `weights.code_vectors.FirstRows`."""
    interval: list[float]
    """This and the next four: see `evaluation.masked_codes.assess`."""
    bands: list[JsonObject]
    gaps: dict[str, dict[str, float]]
    oracle_gap: dict[str, float]
    share_of_attainable_gain: float | None
    first_step_seconds: float
    startup_seconds: dict[str, float]
    """Marks of `training.runtime.Startup`."""


def summarise(
    metrics: Records,
    baselines: Baselines,
    best_step: int | None,
    stop_reason: str,
    wall_seconds: float,
    data: JsonObject,
    parameters: JsonObject,
) -> Summary:
    """The figures of a run that ended, from the records of its ``metrics.jsonl``; no findings yet."""
    validations = [_without_split(record) for record in of_split(metrics, "tuning")]
    trainings = [_without_split(record) for record in of_split(metrics, "train")]
    best = next((record for record in validations if record["step"] == best_step), None)
    return {
        "best_step": best_step,
        "best": best,
        "last": validations[-1] if validations else None,
        "last_train": trainings[-1] if trainings else None,
        "epochs": max((record.get("epoch") or 0.0 for record in metrics), default=0.0),
        "steps": max((record["step"] for record in metrics), default=0),
        "stop_reason": stop_reason,
        "wall_seconds": wall_seconds,
        "baselines": baselines,
        "gain_over_unigram": gain_over_unigram(best, baselines),
        "data": data,
        "parameters": {key: value for key, value in parameters.items() if key != "adapters"},
        "findings": [],
    }


def _without_split(record: JsonObject) -> JsonObject:
    return {key: value for key, value in record.items() if key != "split"}


def gain_over_unigram(record: JsonObject | None, baselines: Baselines) -> float | None:
    """Unigram loss less the record's loss, in nats; None where either is missing or not finite."""
    unigram, loss = (baselines.get("unigram") or {}).get("loss"), (record or {}).get("loss")
    return unigram - loss if is_number(unigram) and is_number(loss) else None


def verdict(gain: float | None) -> str:
    """Meaning of the gain over the unigram baseline (nats), for a person."""
    if gain is None:
        return "There is no validation loss to compare with the unigram baseline yet."
    mend = (
        "Train longer, try another learning rate, and see that embeddings and head are trained and that the "
        "data has something to learn."
    )
    if gain <= 0:
        return (
            f"The validation loss is NOT below the unigram baseline: it is {abs(gain):.3f} nats above it. "
            f"The model predicts masked codes no better than their frequencies do: it is of no use yet. "
            f"{mend}"
        )
    if gain < SMALL_GAIN:
        return (
            f"The validation loss is only just below the unigram baseline, by {gain:.4f} nats: another "
            "seed could turn that around. The model has hardly learned more than how frequent each code "
            f"is. {mend}"
        )
    return (
        f"The validation loss is below the unigram baseline by {gain:.3f} nats: the model predicts masked "
        f"codes better than their frequencies do (perplexity {math.exp(min(gain, 700.0)):.3g} times lower)."
    )


def summary_text(summary: Summary, config_name: str) -> str:
    """``SUMMARY.txt``: the summary for a person, in plain ASCII, ending with a newline."""
    title = f"Pretraining run: {config_name}"
    ran = (
        f"{summary.get('epochs', 0):.1f} epochs, {summary.get('steps', 0):,} steps, "
        f"{format_duration(summary.get('wall_seconds', 0))}. "
        f"Stopped: {summary.get('stop_reason', 'unknown').rstrip('.')}."
    )
    parts = [f"{title}\n{'=' * len(title)}", ran, _wrap(verdict(summary.get("gain_over_unigram")))]
    if attained_text := attained(summary):
        parts.append(_wrap(attained_text))
    columns, rows = figure_table(summary, ("best", "last"))
    if rows:
        best = summary.get("best")
        where = f"best step {best['step']:,}, epoch {best['epoch']:.1f}" if best else "no validation yet"
        parts.append(table_text(f"Validation ({where})", columns, rows))
    columns, rows = band_table(summary)
    if rows:
        parts.append(table_text("By frequency of the code in the train split", columns, rows))
    parameters = summary.get("parameters") or {}
    if "total" in parameters and "trainable" in parameters:
        parts.append(
            f"Parameters: {parameters['trainable']:,} trained of {parameters['total']:,}"
            f" ({parameters.get('trainable_percent', math.nan):.1f} %)."
        )
    if data := list(flat(summary.get("data") or {})):
        parts.append("Data:\n" + "\n".join(f"  {name}: {format_cell(value)}" for name, value in data))
    if findings := summary.get("findings"):
        parts.append("Findings:\n" + "\n".join(_wrap(f"- {_finding_text(found)}") for found in findings))
    return "\n\n".join(parts).encode("ascii", "replace").decode("ascii") + "\n"


def _finding_text(found: JsonObject) -> str:
    parts = (str(found.get(key, "")) for key in ("seen", "why", "mend"))
    return f"{str(found.get('severity', '')).upper()} {found.get('id', '')}: {' '.join(parts)}"


def figure_table(summary: Summary, titles: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """Figures of the best and the last validation beside those of the baselines, as text.

    Returns:
        Column titles, those given for the best and the last, and the rows of figures that any column has.
    """
    baselines = summary.get("baselines") or {}
    columns, records = ["", *titles], [summary.get("best"), summary.get("last")]
    for name, title in BASELINES.items():
        figures = dict(baselines.get(name) or {})
        if name != "unigram" and not figures:
            continue
        if figures.get("loss") is not None:
            figures.setdefault("perplexity", math.exp(min(figures["loss"], 700.0)))
        columns.append(title)
        records.append(figures)
    rows = [
        [title, *(format_figure(field, (record or {}).get(field)) for record in records)]
        for field, title in FIGURES
    ]
    return columns, [row for row in rows if any(row[1:])]


def attained(summary: Summary) -> str:
    """Distance from the best possible loss, for a person; empty where that is not known."""
    share, gap = summary.get("share_of_attainable_gain"), summary.get("oracle_gap")
    if share is None or not gap:
        return ""
    return (
        f"Of the gain over the unigram baseline that is possible at all, {share:.1%} was attained: the "
        f"loss is {gap['nats']:.4f} nats above the best possible (95 % interval {gap['low']:.4f} to "
        f"{gap['high']:.4f})."
    )


def band_table(summary: Summary) -> tuple[tuple[str, ...], list[list[object]]]:
    """Columns and rows of loss and accuracy by how frequent a code is; no rows where they are unknown."""
    columns = ("rank of the code", "masked", "loss", "top-1", "top-10", "unigram loss", "unigram top-1")
    fields = ("loss", "accuracy", "accuracy_top10")
    rows = [
        [
            band["band"],
            band["targets"],
            *(format_figure(field, band[field]) for field in fields),
            *(format_figure(field, band[f"unigram_{field}"]) for field in fields[:2]),
        ]
        for band in summary.get("bands") or []
    ]
    return columns, rows


def format_figure(field: str, value: object) -> str:
    """A figure of :data:`FIGURES` as text: losses with 3 decimals, accuracies in percent."""
    if not is_number(value):
        return ""
    if field.startswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:.3f}" if field == "loss" else format_cell(float(value))


def flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every single value in a nested dict; lists are left out."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{key}", value


def _wrap(text: str, width: int = 88) -> str:
    return textwrap.fill(text, width, subsequent_indent="  " if text.startswith("- ") else "")

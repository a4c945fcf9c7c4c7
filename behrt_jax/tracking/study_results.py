"""Curves and figures of a study's runs, read from their folders and summarised over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.tracking.run_folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, read_json, read_metrics

BASELINES = ("ln_codes", "unigram", "oracle")
CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
FIGURES = (
    "train_loss_first",
    "train_loss_last",
    "validation_loss_best",
    "validation_loss_last",
    "validation_accuracy_best",
    "share_of_attainable_gain",
)


def read_run(folder: Path) -> dict[str, Any]:
    """Figures of a finished run, losses in nats.

    Returns:
        ``ln_codes``, ``unigram`` and ``oracle`` (validation losses of a guess, of the frequencies and of
        the best predictor there is; oracle None where unknown); ``curves``: name of `CURVES` -> value at
        the end of each epoch (training figures are means over the epoch, with dropout); the figures of
        `FIGURES`, of which ``best`` is at the least validation loss; ``interval``: 95 % interval of the
        best validation loss.
    """
    summary = read_json(folder / SUMMARY_FILE)
    metrics = read_metrics(folder / METRICS_FILE)
    source = read_json(folder / CONFIG_FILE)["settings"]["data"]["source"]
    ln_codes = math.log(len(Vocabulary.read(folder / "vocabulary.parquet")) - len(SPECIAL_TOKENS))
    train, tuning = (_by_epoch(metrics, split) for split in ("train", "tuning"))
    curves = {
        "train_loss": [record["loss"] for record in train],
        "train_accuracy": [record["accuracy"] for record in train],
        "validation_loss": [record["loss"] for record in tuning],
        "validation_accuracy": [record["accuracy"] for record in tuning],
    }
    baselines, best = summary["baselines"], summary["best"]
    unigram = baselines["unigram"]["loss"]
    # Codes at random: the best predictor guesses, and what it gains over the frequencies is noise.
    oracle = ln_codes if source == "uniform" else (baselines.get("oracle") or {}).get("loss")
    share = None if source == "uniform" else summary.get("share_of_attainable_gain")
    return {
        "ln_codes": ln_codes,
        "unigram": unigram,
        "oracle": oracle,
        "targets": best.get("targets"),
        "interval": summary["interval"],
        "curves": curves,
        "train_loss_first": curves["train_loss"][0],
        "train_loss_last": curves["train_loss"][-1],
        "validation_loss_best": best["loss"],
        "validation_loss_last": curves["validation_loss"][-1],
        "validation_accuracy_best": best["accuracy"],
        "share_of_attainable_gain": share,
    }


def summarise_cells(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, for each source, masks and regime in the order of `runs`.

    Returns:
        For each: ``source``, ``masks``, ``regime``, ``seeds``; ``ln_codes``, ``unigram``, ``oracle``
        (means); ``curves``: name -> ``{"mean": [...], "least": [...], "most": [...]}`` by epoch; and
        for each of `FIGURES` ``{"mean": ..., "sd": ...}`` (standard deviation over seeds; None where it
        is unknown).
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["source"], run["masks"], run["regime"]), []).append(run)
    return [
        {
            "source": source,
            "masks": masks,
            "regime": regime,
            "seeds": len(group),
            **{name: _spread([run[name] for run in group])["mean"] for name in BASELINES},
            "curves": {name: _curve([run["curves"][name] for run in group]) for name in CURVES},
            **{name: _spread([run[name] for run in group]) for name in FIGURES},
        }
        for (source, masks, regime), group in groups.items()
    ]


def _by_epoch(metrics: Sequence[dict[str, Any]], split: str) -> list[dict[str, float]]:
    """Loss and accuracy of each epoch, lines of one epoch weighted by their targets."""
    sums: dict[int, list[float]] = {}
    for record in metrics:
        if record["split"] == split:
            # A line's epoch is where it ends; the first epoch ends at 1.
            total = sums.setdefault(math.ceil(record["epoch"] - 1e-6), [0.0, 0.0, 0.0])
            for index, value in enumerate((1.0, record["loss"], record["accuracy"])):
                total[index] += value * record["targets"]
    return [
        {"loss": loss / targets, "accuracy": hits / targets}
        for _, (targets, loss, hits) in sorted(sums.items())
    ]


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else None,
    }


def _curve(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    by_epoch = list(zip(*curves, strict=True))
    return {
        "mean": [fmean(values) for values in by_epoch],
        "least": [min(values) for values in by_epoch],
        "most": [max(values) for values in by_epoch],
    }

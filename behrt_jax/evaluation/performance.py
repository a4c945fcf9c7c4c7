"""All that is said of a file of predictions: figures with intervals, baselines, groups, members; for JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from behrt_jax.data.predictions import PredictionFile
from behrt_jax.evaluation.baseline import Baseline
from behrt_jax.evaluation.binary import binary_scorer, curves, decision_curve
from behrt_jax.evaluation.bootstrap import Figures, Scorer, bootstrap, mean_figures, subject_draws
from behrt_jax.evaluation.calibration import regression_bins, reliability_bins
from behrt_jax.evaluation.groups import too_small
from behrt_jax.evaluation.measures import COMPARED, LESS_IS_BETTER, scorer_of, why_undefined
from behrt_jax.evaluation.multilabel import over_codes
from behrt_jax.evaluation.regression import regression_scorer
from behrt_jax.evaluation.survival import survival_by_edge


def assess_predictions(
    file: PredictionFile,
    baselines: Sequence[Baseline],
    groups: Mapping[str, Mapping[str, np.ndarray]],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Figures of the model and of baselines on the same examples, with 95 % intervals over subjects.

    Args:
        file: the predictions.
        baselines: theirs of the same examples.
        groups: such as ``age`` -> band -> which examples, bool ``[n]``.
        draws: of the bootstrap.
        seed: of the draws, which are the same for the model and the baselines.

    Returns:
        ``kind``, ``counts``, ``bootstrap``, ``model`` (``figures`` and what is drawn: curves, bins ...),
        ``baselines``, ``groups`` and ``ensemble`` (None where there are no members). A figure is ``value``,
        ``low``, ``high``, with ``reason`` where it has no value; no subject is named.
    """
    sample = subject_draws(file.subject_ids, draws, seed)
    model = bootstrap(scorer_of(file), sample)
    others = {
        baseline.name: bootstrap(scorer_of(file, baseline.predictions), sample)
        for baseline in baselines
        if baseline.predictions is not None
    }
    return {
        "kind": file.kind,
        "counts": _counts(file),
        "bootstrap": {"draws": draws, "seed": seed, "unit": "subject", "level": 0.95},
        "model": {"figures": _figures(file, model), **_details(file, file.predictions)},
        "baselines": [_baseline(file, model, baseline, others.get(baseline.name)) for baseline in baselines],
        "groups": {
            name: [_group(file, group, inside, draws, seed) for group, inside in members.items()]
            for name, members in groups.items()
        },
        "ensemble": None if file.members is None else _ensemble(file, model, sample),
    }


def _counts(file: PredictionFile, rows: np.ndarray | None = None) -> dict[str, Any]:
    chosen = np.ones(len(file), bool) if rows is None else rows
    ids, labels = file.subject_ids[chosen], file.labels[chosen]
    found: dict[str, Any] = {"examples": len(ids), "subjects": len(np.unique(ids))}
    if file.kind == "binary":
        found |= {"positives": int(labels.sum()), "positive_subjects": len(np.unique(ids[labels]))}
    if file.kind == "survival":
        events = labels[:, 1] > 0
        found |= {"events": int(events.sum()), "event_subjects": len(np.unique(ids[events]))}
        found["median_days"] = float(np.median(labels[:, 0])) if len(labels) else None
    if file.kind == "multilabel":
        found |= {"codes": len(file.classes), "codes_per_example": float(labels.sum(axis=1).mean())}
    if file.kind == "multiclass":
        unknown = len(file.classes) - len(file.metadata["classes"])
        found |= {"classes": len(file.classes), "classes_unknown_to_the_model": unknown}
    return found


def _figures(file: PredictionFile, figures: Figures, rows: np.ndarray | None = None) -> dict[str, Any]:
    labels = file.labels if rows is None else file.labels[rows]
    found = {}
    for name in figures.values:
        entry: dict[str, Any] = figures.entry(name)
        if entry["value"] is None:
            entry["reason"] = why_undefined(file.kind, labels, name)
        found[name] = entry
    return found


def _details(file: PredictionFile, predictions: np.ndarray) -> dict[str, Any]:
    """What pictures and tables show beside the figures."""
    if file.kind == "binary":
        return {
            "reliability": reliability_bins(file.labels, predictions),
            "curves": curves(file.labels, predictions),
            "decision_curve": decision_curve(file.labels, predictions),
        }
    if file.kind == "multilabel" and file.seen_before is not None:
        return {"over_codes": over_codes(file.labels, predictions, file.seen_before)}
    if file.kind == "regression":
        return {"reliability": regression_bins(file.labels, predictions)}
    if file.kind == "survival":
        return {"by_edge": survival_by_edge(file.labels, predictions, file.edges_days)}
    return {}


def _baseline(
    file: PredictionFile, model: Figures, baseline: Baseline, figures: Figures | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"name": baseline.name, "note": baseline.note}
    if figures is None or baseline.predictions is None:
        return {**found, "figures": None}
    return {
        **found,
        "figures": _figures(file, figures),
        "model_less_baseline": {
            name: _compared(model, figures, name)
            for name in COMPARED[file.kind]
            if np.isfinite(model.values[name]) and np.isfinite(figures.values[name])
        },
        **_details(file, baseline.predictions),
    }


def _compared(model: Figures, other: Figures, name: str) -> dict[str, Any]:
    """Difference with its interval, and who is ``ahead``: by more than chance, or not (``unclear``)."""
    found: dict[str, Any] = model.less(other, name)
    sign = -1 if name in LESS_IS_BETTER else 1
    found["ahead"] = "unclear"
    if found["low"] is not None and found["low"] > 0:
        found["ahead"] = "model" if sign > 0 else "baseline"
    if found["high"] is not None and found["high"] < 0:
        found["ahead"] = "baseline" if sign > 0 else "model"
    found["better"] = "model" if sign * found["value"] > 0 else "baseline" if found["value"] else "equal"
    return found


def _group(file: PredictionFile, name: str, inside: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"group": name, "counts": _counts(file, inside)}
    reason = too_small(file.kind, file.labels[inside])
    if reason is not None:
        return {**found, "figures": None, "reason": reason}
    figures = bootstrap(scorer_of(file, rows=inside), subject_draws(file.subject_ids[inside], draws, seed))
    return {**found, "figures": _figures(file, figures, inside)}


def _ensemble(file: PredictionFile, model: Figures, sample: Any) -> dict[str, Any] | None:
    """The ensemble beside its members: mean and spread of their figures, and what averaging gains."""
    assert file.members is not None
    if file.kind not in ("binary", "regression"):
        return None

    def scorer(column: np.ndarray) -> Scorer:
        if file.kind == "binary":
            return binary_scorer(file.labels, np.clip(column, 0, 1))
        return regression_scorer(file.labels, column)

    members = [bootstrap(scorer(column), sample) for column in file.members.T]
    mean = mean_figures(members)
    names = [name for name in mean.values if name not in ("prevalence", "mean_prediction")]
    found = {}
    for name in names:
        values = np.array([member.values[name] for member in members])
        if not np.isfinite(values).all() or not np.isfinite(model.values[name]):
            continue
        found[name] = {
            "ensemble": model.values[name],
            "mean_member": float(values.mean()),
            "spread": float(values.std(ddof=1)) if len(values) > 1 else None,
            "least": float(values.min()),
            "most": float(values.max()),
            "ensemble_less_mean_member": _compared(model, mean, name)
            if name in (*COMPARED[file.kind], "ece")
            else None,
        }
    return {"members": len(members), "figures": found}

"""All that is said of a file of predictions: figures with intervals, baselines, groups, members; for JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from behrt_jax.config import TaskKind
from behrt_jax.data.predictions import PredictionFile
from behrt_jax.evaluation.bootstrap import Figures, Scorer, bootstrap, mean_figures, subject_draws
from behrt_jax.evaluation.calibration import regression_bins, reliability_bins
from behrt_jax.evaluation.scores import (
    binary_scorer,
    curves,
    decision_curve,
    multiclass_scorer,
    multilabel_scorer,
    over_codes,
    regression_scorer,
)
from behrt_jax.evaluation.survival import survival_by_edge, survival_scorer
from behrt_jax.evaluation.task_baselines import Baseline

# Groups of examples for which figures are given apart: by sex and by age at the prediction time.

AGE_BANDS = ((0, 17), (18, 39), (40, 64), (65, 79), (80, None))
"""Completed years, both ends in."""
SEX_PREFIXES = ("GENDER//", "SEX//")
LEAST = 10
"""Fewer positives or negatives (binary), events (survival) or examples (else) are too few for figures."""


def age_groups(ages: np.ndarray) -> dict[str, np.ndarray]:
    """Band -> which examples are in it, bool ``[n]``; ages in years, ``[n]``. Empty bands are left out."""
    bands = {
        f"{low}-{high}" if high is not None else f"{low}+": (ages >= low)
        & (ages < (np.inf if high is None else high + 1))
        for low, high in AGE_BANDS
    }
    return {name: inside for name, inside in bands.items() if inside.any()}


def sex_groups(
    subject_ids: np.ndarray, fact_subjects: Sequence[int], fact_codes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Sex -> which examples are of it, bool ``[n]``; empty where no subject has such a code.

    Args:
        subject_ids: of the examples, int64 ``[n]``.
        fact_subjects: subjects of static facts.
        fact_codes: the facts; those that begin with GENDER// or SEX// count, by what follows.
    """
    found: dict[int, set[str]] = {}
    for subject, code in zip(fact_subjects, fact_codes, strict=True):
        if code.startswith(SEX_PREFIXES):
            found.setdefault(subject, set()).add(code.split("//", 1)[1] or "unknown")
    if not found:
        return {}
    names = np.array(
        [" and ".join(sorted(found.get(subject, {"unknown"}))) for subject in subject_ids.tolist()]
    )
    return {str(name): names == name for name in np.unique(names)}


def too_small(kind: str, labels: np.ndarray) -> str | None:
    """Why a group with these labels (as in `PredictionFile`) is too small; None where it is not."""
    counts: Mapping[str, int] = {"examples": len(labels)}
    if kind == "binary":
        counts = {"positives": int(labels.sum()), "negatives": int((~labels).sum())}
    if kind == "survival":
        counts = {"events": int(labels[:, 1].sum())}
    few = [f"{count} {name}" for name, count in counts.items() if count < LEAST]
    return f"too small: {' and '.join(few)} (fewer than {LEAST})" if few else None


# Which figures each kind of task has, which of them models are compared by, and which way is better.

COMPARED: dict[TaskKind, tuple[str, ...]] = {
    "binary": ("auroc", "average_precision", "brier", "log_loss"),
    "multiclass": ("macro_auroc", "accuracy", "log_loss", "brier"),
    "multilabel": ("average_precision", "auroc", "incident_average_precision", "repeat_average_precision"),
    "regression": ("mae", "rmse", "r2", "spearman"),
    "survival": ("c_index", "integrated_brier"),
}
"""By these a model is compared with baselines; the first is the main one."""
LESS_IS_BETTER = frozenset({"brier", "log_loss", "mae", "rmse", "integrated_brier", "ece"})


def scorer_of(
    file: PredictionFile, predictions: np.ndarray | None = None, rows: np.ndarray | None = None
) -> Scorer:
    """The scorer of the kind of task.

    Args:
        file: labels, and the model's predictions.
        predictions: a baseline's, in place of the model's; what a decision threshold gives is left out.
        rows: bool or int, some examples; all where not given.
    """
    chosen = slice(None) if rows is None else rows
    labels = file.labels[chosen]
    ours = predictions is None
    predicted = (file.predictions if predictions is None else predictions)[chosen]
    if file.kind == "binary":
        decisions = file.decisions[chosen] if ours and file.decisions is not None else None
        return binary_scorer(labels, predicted, decisions)
    if file.kind == "multiclass":
        return multiclass_scorer(labels, predicted)
    if file.kind == "multilabel":
        assert file.seen_before is not None
        return multilabel_scorer(labels, predicted, file.seen_before[chosen])
    if file.kind == "regression":
        return regression_scorer(labels, predicted)
    return survival_scorer(labels, predicted, file.edges_days)


def why_undefined(kind: TaskKind, labels: np.ndarray, name: str) -> str:
    """Why a figure has no value; labels as in `PredictionFile`."""
    count = len(labels)
    if kind == "binary":
        if labels.all() or not labels.any():
            return f"one class only: all {count:,} labels are {'positive' if labels.any() else 'negative'}"
        if name == "precision":
            return "nothing is predicted positive"
        return "all predictions are the same, or they separate the classes without error"
    if kind == "multiclass":
        return f"one class only: all {count:,} labels are the same"
    if kind == "multilabel":
        return "no example has both a code to find and one to tell it from"
    if kind == "regression":
        return "all labels, or all predictions, are the same"
    return "no pair can be compared" if name == "c_index" else "nobody is followed up to the first edge"


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

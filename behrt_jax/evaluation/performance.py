"""All that is said of a file of predictions: figures with intervals, baselines, groups, members.

Intervals come by resampling subjects: all examples of a subject come, or stay away, together. What is said is
a record of plain dictionaries, which metrics.json holds and the report is made of.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, Required, TypedDict

import numpy as np

from behrt_jax.data.predictions import PredictionFile, PredictionMetadata
from behrt_jax.data.tasks import KINDS, Predicts, TaskKind
from behrt_jax.evaluation import scores
from behrt_jax.evaluation.calibration import regression_bins, reliability_bins
from behrt_jax.evaluation.task_baselines import Baseline

LEVEL = 0.95
AGE_BANDS = ((0, 17), (18, 39), (40, 64), (65, 79), (80, None))
"""Completed years, both ends in."""
_GROUPED = {
    name: re.compile(rf"(?:{words})(?://|[/|:])(.*)", re.IGNORECASE)
    for name, words in {"sex": "gender|sex", "race": "race", "ethnicity": "ethnicity"}.items()
}
_CONCEPTS = {
    "0": "unknown", "8507": "male", "8532": "female",
    "8515": "Asian", "8516": "Black or African American", "8527": "White",
    "8557": "Native Hawaiian or Other Pacific Islander", "8657": "American Indian or Alaska Native",
    "38003563": "Hispanic or Latino", "38003564": "Not Hispanic or Latino",
}  # fmt: skip
"""https://athena.ohdsi.org, the vocabularies Gender, Race and Ethnicity."""
LEAST = 10
"""Fewer positives or negatives (binary), events (survival) or examples (else) are too few for figures."""
_PIECE = 1 << 22
"""Weights held at once."""

# The record of an evaluation, ready for JSON; no subject is named.


class FigureEntry(TypedDict):
    """A figure with its 95 % interval over subjects, None where not defined."""

    value: float | None
    low: float | None
    high: float | None
    undefined_draws: NotRequired[int]
    """Draws of subjects in which it has no value."""
    reason: NotRequired[str]
    """Why there is no value."""


class Difference(FigureEntry):
    """The model's figure less another's, paired draw by draw."""

    ahead: str
    """Who is, by more than chance: ``model``, ``baseline`` or ``unclear``."""
    better: str
    """Whose value is: ``model``, ``baseline`` or ``equal``."""


class Details(TypedDict, total=False):
    """What pictures and tables show beside the figures, by sort of prediction."""

    reliability: list[dict[str, float]]
    curves: dict[str, list[float]] | None
    decision_curve: list[dict[str, float]]
    over_codes: dict[str, dict[str, float | None]]
    by_edge: list[dict[str, float | None]]


class ModelRecord(Details):
    """Figures of the model."""

    figures: Required[dict[str, FigureEntry]]


class BaselineRecord(Details):
    """Figures of a baseline, None where it could not be fitted, and by how much the model is above it."""

    name: Required[str]
    note: Required[str]
    figures: Required[dict[str, FigureEntry] | None]
    model_less_baseline: NotRequired[dict[str, Difference]]


class GroupRecord(TypedDict):
    """Figures of a group of examples, None where it is too small for any."""

    group: str
    counts: dict[str, float]
    figures: dict[str, FigureEntry] | None
    reason: NotRequired[str]


class MemberFigure(TypedDict):
    """A figure of an ensemble beside those of its members: their mean, standard deviation and range."""

    ensemble: float
    mean_member: float
    spread: float | None
    least: float
    most: float
    ensemble_less_mean_member: Difference | None


class EnsembleRecord(TypedDict):
    """What averaging gains."""

    members: int
    figures: dict[str, MemberFigure]


class Assessed(TypedDict):
    """What :func:`assess_predictions` finds."""

    kind: TaskKind
    counts: dict[str, float]
    bootstrap: dict[str, str | float]
    model: ModelRecord
    baselines: list[BaselineRecord]
    groups: dict[str, list[GroupRecord]]
    ensemble: EnsembleRecord | None


class EvaluationRecord(Assessed):
    """What metrics.json holds; reasons are None where nothing is missing."""

    format_version: int
    behrt_jax: str
    task: PredictionMetadata
    baseline_examples: dict[str, int] | None
    without_baselines: str | None
    without_groups: str | None


# Confidence intervals over resampled subjects.


@dataclass(frozen=True, eq=False)
class SubjectDraws:
    """Resampled subjects (with replacement, as many as there are), the same ones each time it is asked."""

    subjects: np.ndarray
    """int64 ``[examples]``, place of each example's subject, from 0 without gaps."""
    draws: int
    seed: int

    def weights(self) -> Iterator[np.ndarray]:
        """How often each example is drawn: float64 ``[some draws, examples]``, piece by piece."""
        rng = np.random.default_rng(self.seed)
        count = int(self.subjects.max()) + 1
        step = max(1, min(_PIECE // len(self.subjects), _PIECE // count))
        for start in range(0, self.draws, step):
            rows = min(step, self.draws - start)
            drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
            counts = np.bincount(drawn.reshape(-1), minlength=rows * count).reshape(rows, count)
            yield counts[:, self.subjects].astype(np.float64)


def subject_draws(subject_ids: np.ndarray, draws: int, seed: int) -> SubjectDraws:
    """Draws over the subjects of examples, int64 ``[examples]``."""
    return SubjectDraws(np.unique(subject_ids, return_inverse=True)[1], draws, seed)


@dataclass(frozen=True, eq=False)
class Figures:
    """What a scorer says of the examples, and of each draw of their subjects."""

    values: dict[str, float]
    """NaN where not defined."""
    drawn: dict[str, np.ndarray]
    """float64 ``[draws]`` each."""

    def entry(self, name: str) -> FigureEntry:
        """``value``, ``low`` and ``high`` (None where not defined), ready for JSON; see :func:`interval`."""
        return _entry(self.values[name], self.drawn[name])

    def less(self, other: "Figures", name: str) -> FigureEntry:
        """The same for this figure less the other's, paired draw by draw."""
        return _entry(self.values[name] - other.values[name], self.drawn[name] - other.drawn[name])


def bootstrap(scorer: scores.Scorer, draws: SubjectDraws) -> Figures:
    """Score the examples as they are and under all draws."""
    values = {name: float(value[0]) for name, value in scorer(np.ones((1, len(draws.subjects)))).items()}
    pieces = [scorer(weights) for weights in draws.weights()] if draws.subjects.any() else []
    drawn = {
        name: np.concatenate([piece[name] for piece in pieces]) if pieces else np.zeros(0) for name in values
    }
    return Figures(values, drawn)


def mean_figures(members: list[Figures]) -> Figures:
    """Mean over several models of each figure and of each of its draws."""
    return Figures(
        {name: float(np.mean([member.values[name] for member in members])) for name in members[0].values},
        {name: np.mean([member.drawn[name] for member in members], axis=0) for name in members[0].drawn},
    )


def interval(drawn: np.ndarray) -> tuple[float, float] | None:
    """95 % percentile interval (Efron 1979) of the draws in which the figure is defined.

    None where fewer than half of the draws have one, or there is no draw (one subject cannot be resampled).
    """
    defined = drawn[np.isfinite(drawn)]
    if not len(defined) or 2 * len(defined) < len(drawn):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _entry(value: float, drawn: np.ndarray) -> FigureEntry:
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    low, high = interval(drawn) or (None, None)
    entry: FigureEntry = {"value": value, "low": low, "high": high}
    undefined = int(np.count_nonzero(~np.isfinite(drawn)))
    return {**entry, "undefined_draws": undefined} if undefined else entry


def side_of(entry: FigureEntry, value: float) -> int:
    """Side of a value on which the whole interval is: 1 above, -1 below, 0 where it holds it or is none."""
    if entry["low"] is None or entry["high"] is None:
        return 0
    return (entry["low"] > value) - (entry["high"] < value)


# Groups of examples for which figures are given apart: by sex and by age at the prediction time.


def age_groups(ages: np.ndarray) -> dict[str, np.ndarray]:
    """Band -> which examples are in it, bool ``[n]``; ages in years, ``[n]``. Empty bands are left out."""
    bands = {
        f"{low}-{high}" if high else f"{low}+": (ages >= low) & (ages < (high or np.inf) + 1)
        for low, high in AGE_BANDS
    }
    bands["unknown"] = np.isnan(ages)
    return {name: inside for name, inside in bands.items() if inside.any()}


def fact_groups(
    subject_ids: np.ndarray, fact_subjects: Sequence[int], fact_codes: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """``sex``, ``race`` and ``ethnicity`` -> value -> which examples have it, bool ``[n]``; a fact that no
    subject has is left out.

    Args:
        subject_ids: of the examples, int64 ``[n]``.
        fact_subjects: subjects of static facts.
        fact_codes: the facts; those that begin with GENDER// or SEX//, RACE// and ETHNICITY// (or one of / |
            : in place of //, in any case) count, by what follows. The concept ids of OMOP become words.
    """
    found: dict[str, dict[int, set[str]]] = {name: {} for name in _GROUPED}
    for subject, code in zip(fact_subjects, fact_codes, strict=True):
        for name, begins in _GROUPED.items():
            if value := begins.match(code):
                word = _CONCEPTS.get(value[1], value[1]) or "unknown"
                found[name].setdefault(subject, set()).add(word)
    groups = {}
    for name, values in found.items():
        if values:
            own = (values.get(one, {"unknown"}) for one in subject_ids.tolist())
            names = np.array([" and ".join(sorted(several)) for several in own])
            groups[name] = {str(value): names == value for value in np.unique(names)}
    return groups


def too_small(kind: TaskKind, labels: np.ndarray) -> str | None:
    """Why a group with these labels (as in `PredictionFile`) is too small; None where it is not."""
    counts = assessment_of(kind).cases(labels)
    few = [f"{count} {name}" for name, count in counts.items() if count < LEAST]
    return f"too small: {' and '.join(few)} (fewer than {LEAST})" if few else None


# How predictions are assessed, by what is predicted.


@dataclass(frozen=True)
class Assessment:
    """Figures of one sort of prediction, and what is said beside them."""

    compared: tuple[str, ...]
    """Figures by which a model is compared with baselines; the first is the main one."""
    of_groups: tuple[str, ...]
    """Figures that tables of groups show."""
    scorer: Callable[[PredictionFile], scores.Scorer]
    """Of all figures."""
    why_undefined: Callable[[np.ndarray, str], str]
    """Why a figure of some labels has no value."""
    cases: Callable[[np.ndarray], dict[str, int]] = lambda labels: {"examples": len(labels)}
    """Counts of labels of which each must be large enough for figures."""
    counts: Callable[[PredictionFile], dict[str, float]] = lambda file: {}
    """What is counted beside examples and subjects."""
    details: Callable[[PredictionFile], Details] = lambda file: {}
    member: Callable[[np.ndarray], np.ndarray] | None = None
    """From the numbers that a file has of an ensemble's member to predictions; None where it has none."""


def _seen(file: PredictionFile) -> np.ndarray:
    assert file.seen_before is not None
    return file.seen_before


def _why_undefined_probability(labels: np.ndarray, name: str) -> str:
    if labels.all() or not labels.any():
        return f"one class only: all {len(labels):,} labels are {'positive' if labels.any() else 'negative'}"
    if name == "precision":
        return "nothing is predicted positive"
    return "all predictions are the same, or they separate the classes without error"


def _count_events(file: PredictionFile) -> dict[str, float]:
    events = file.labels[:, 1] > 0
    return {
        "events": int(events.sum()),
        "event_subjects": len(np.unique(file.subject_ids[events])),
        "median_days": float(np.median(file.labels[:, 0])),
    }


ASSESSMENTS: dict[Predicts, Assessment] = {
    "probability": Assessment(
        compared=("auroc", "average_precision", "brier", "log_loss"),
        of_groups=("auroc", "average_precision", "prevalence", "mean_prediction", "recall", "specificity"),
        scorer=lambda file: scores.binary_scorer(file.labels, file.predictions, file.decisions),
        why_undefined=_why_undefined_probability,
        cases=lambda labels: {"positives": int(labels.sum()), "negatives": int((~labels).sum())},
        counts=lambda file: {
            "positives": int(file.labels.sum()),
            "positive_subjects": len(np.unique(file.subject_ids[file.labels])),
        },
        details=lambda file: {
            "reliability": reliability_bins(file.labels, file.predictions),
            "curves": scores.curves(file.labels, file.predictions),
            "decision_curve": scores.decision_curve(file.labels, file.predictions),
        },
        member=lambda predictions: np.clip(predictions, 0, 1),
    ),
    "class": Assessment(
        compared=("macro_auroc", "accuracy", "log_loss", "brier"),
        of_groups=("macro_auroc", "accuracy"),
        scorer=lambda file: scores.multiclass_scorer(file.labels, file.predictions),
        why_undefined=lambda labels, name: f"one class only: all {len(labels):,} labels are the same",
        counts=lambda file: {
            "classes": len(file.classes),
            "classes_unknown_to_the_model": len(file.classes) - len(file.metadata.get("classes", ())),
        },
    ),
    "codes": Assessment(
        compared=("average_precision", "auroc", "incident_average_precision", "repeat_average_precision"),
        of_groups=("auroc", "average_precision"),
        scorer=lambda file: scores.multilabel_scorer(file.labels, file.predictions, _seen(file)),
        why_undefined=lambda labels, name: "no example has both a code to find and one to tell it from",
        counts=lambda file: {
            "codes": len(file.classes),
            "codes_per_example": float(file.labels.sum(axis=1).mean()),
        },
        details=lambda file: {"over_codes": scores.over_codes(file.labels, file.predictions, _seen(file))},
    ),
    "number": Assessment(
        compared=("mae", "rmse", "r2", "spearman"),
        of_groups=("mae", "spearman"),
        scorer=lambda file: scores.regression_scorer(file.labels, file.predictions),
        why_undefined=lambda labels, name: "all labels, or all predictions, are the same",
        details=lambda file: {"reliability": regression_bins(file.labels, file.predictions)},
        member=lambda predictions: predictions,
    ),
    "survival curve": Assessment(
        compared=("c_index", "integrated_brier"),
        of_groups=("c_index", "integrated_brier"),
        scorer=lambda file: scores.survival_scorer(file.labels, file.predictions, file.edges_days),
        why_undefined=lambda labels, name: (
            "no pair can be compared" if name == "c_index" else "nobody is followed up to the first edge"
        ),
        cases=lambda labels: {"events": int(labels[:, 1].sum())},
        counts=_count_events,
        details=lambda f: {"by_edge": scores.survival_by_edge(f.labels, f.predictions, f.edges_days)},
    ),
}


def assessment_of(kind: TaskKind) -> Assessment:
    """How predictions of a kind of task are assessed."""
    return ASSESSMENTS[KINDS[kind].predicts]


def main_figure(kind: TaskKind) -> str:
    """The figure by which models of a kind of task are compared before all others."""
    return assessment_of(kind).compared[0]


# A file of predictions, assessed.


def assess_predictions(
    file: PredictionFile,
    baselines: Sequence[Baseline],
    groups: Mapping[str, Mapping[str, np.ndarray]],
    draws: int,
    seed: int,
) -> Assessed:
    """Figures of the model and of baselines on the same examples, with 95 % intervals over subjects.

    Args:
        file: the predictions.
        baselines: theirs of the same examples.
        groups: such as ``age`` -> band -> which examples, bool ``[n]``.
        draws: of the bootstrap.
        seed: of the draws, which are the same for the model and the baselines.
    """
    how, sample = assessment_of(file.kind), subject_draws(file.subject_ids, draws, seed)
    model = bootstrap(how.scorer(file), sample)
    return {
        "kind": file.kind,
        "counts": _counts(file),
        "bootstrap": {"draws": draws, "seed": seed, "unit": "subject", "level": LEVEL},
        "model": {"figures": _figures(file, model), **how.details(file)},
        "baselines": [_baseline(file, model, baseline, sample) for baseline in baselines],
        "groups": {
            name: [_group(file.take(inside), group, draws, seed) for group, inside in members.items()]
            for name, members in groups.items()
        },
        "ensemble": None if file.members is None else _ensemble(file, model, file.members, sample),
    }


def _counts(file: PredictionFile) -> dict[str, float]:
    subjects = len(np.unique(file.subject_ids))
    return {"examples": len(file), "subjects": subjects, **assessment_of(file.kind).counts(file)}


def _figures(file: PredictionFile, figures: Figures) -> dict[str, FigureEntry]:
    found = {name: figures.entry(name) for name in figures.values}
    for name, entry in found.items():
        if entry["value"] is None:
            entry["reason"] = assessment_of(file.kind).why_undefined(file.labels, name)
    return found


def _baseline(
    file: PredictionFile, model: Figures, baseline: Baseline, sample: SubjectDraws
) -> BaselineRecord:
    if baseline.predictions is None:
        return {"name": baseline.name, "note": baseline.note, "figures": None}
    how, predicted = assessment_of(file.kind), file.predicting(baseline.predictions)
    figures = bootstrap(how.scorer(predicted), sample)
    return {
        "name": baseline.name,
        "note": baseline.note,
        "figures": _figures(file, figures),
        "model_less_baseline": {
            name: _compared(model, figures, name)
            for name in how.compared
            if np.isfinite(model.values[name]) and np.isfinite(figures.values[name])
        },
        **how.details(predicted),
    }


def _compared(model: Figures, other: Figures, name: str) -> Difference:
    """Difference of two figures that are defined with its interval, and who is ahead."""
    entry, sign = model.less(other, name), -1 if name in scores.LESS_IS_BETTER else 1
    gain = sign * (model.values[name] - other.values[name])
    ahead = {1: "model", 0: "unclear", -1: "baseline"}[sign * side_of(entry, 0.0)]
    better = "model" if gain > 0 else "baseline" if gain else "equal"
    return {**entry, "ahead": ahead, "better": better}


def _group(file: PredictionFile, name: str, draws: int, seed: int) -> GroupRecord:
    found: GroupRecord = {"group": name, "counts": _counts(file), "figures": None}
    if reason := too_small(file.kind, file.labels):
        return {**found, "reason": reason}
    sample = subject_draws(file.subject_ids, draws, seed)
    return {**found, "figures": _figures(file, bootstrap(assessment_of(file.kind).scorer(file), sample))}


def _ensemble(
    file: PredictionFile, model: Figures, columns: np.ndarray, sample: SubjectDraws
) -> EnsembleRecord | None:
    """The ensemble beside its members: mean and spread of their figures, and what averaging gains."""
    how = assessment_of(file.kind)
    if how.member is None:
        return None
    members = [bootstrap(how.scorer(file.predicting(how.member(one))), sample) for one in columns.T]
    mean = mean_figures(members)
    found: dict[str, MemberFigure] = {}
    for name in mean.values:
        values = np.array([member.values[name] for member in members])
        known = np.isfinite(values).all() and np.isfinite(model.values[name])
        if name in ("prevalence", "mean_prediction") or not known:
            continue
        found[name] = {
            "ensemble": model.values[name],
            "mean_member": float(values.mean()),
            "spread": float(values.std(ddof=1)) if len(values) > 1 else None,
            "least": float(values.min()),
            "most": float(values.max()),
            "ensemble_less_mean_member": _compared(model, mean, name)
            if name in (*how.compared, "ece")
            else None,
        }
    return {"members": len(members), "figures": found}

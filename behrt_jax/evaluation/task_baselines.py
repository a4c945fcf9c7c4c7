"""Baselines of labelled tasks: what is true on average, what the history already has, and regression and
gradient boosting (by scikit-learn) on counts of codes of the same examples that a model reads.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from behrt_jax.data.examples import Examples
from behrt_jax.data.labels import Labels
from behrt_jax.data.sorting import ragged_indices
from behrt_jax.data.tasks import KINDS, Predicts, TaskKind
from behrt_jax.data.vocabulary import CLS, MASK, PAD, SEP
from behrt_jax.errors import InputError
from behrt_jax.evaluation.scores import kaplan_meier

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Model: TypeAlias = Any
"""An estimator of scikit-learn, which has no types."""
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of L2 regularisation that are tried."""
_WITHOUT_TUNING = 0.1
_MOST_CODES = 50
"""Multi-label tasks with more codes have no regression for each."""
_MOST_CLASSES = 10
"""Multi-class tasks with more classes have no boosting."""
_ROUNDS = 300
_PRIOR = 10.0
"""Examples that a rate of all codes together counts for in that of one code."""
_CELLS = 7
_PIECE = 1 << 22
"""Pairs of examples and codes looked at together."""


@dataclass(frozen=True, eq=False)
class HistoryCounts:
    """Counts of codes in the histories of n examples; V rows of the vocabulary."""

    counts: "csr_array"
    """float32 ``[n, V]``: how often each code occurs, padding and other marks left out; static facts, where
    the model reads them, once each."""
    last_visit: "csr_array"
    """float32 ``[n, V]``: the same for the last visit that is known."""
    ages: np.ndarray
    """float32 ``[n]``, years at the prediction time."""

    def __len__(self) -> int:
        return len(self.ages)

    def take(self, chosen: np.ndarray) -> "HistoryCounts":
        """The examples at some places, int ``[m]``."""
        return HistoryCounts(self.counts[chosen], self.last_visit[chosen], self.ages[chosen])


def count_codes(examples: Examples, vocabulary_rows: int, chosen: np.ndarray | None = None) -> HistoryCounts:
    """Counts of the examples, or of those at some places, int ``[n]``."""
    from scipy.sparse import csr_array

    chosen = np.arange(len(examples)) if chosen is None else chosen
    starts, lengths = examples.windows.starts[chosen], examples.windows.lengths[chosen]
    places = ragged_indices(starts, lengths)
    codes, visits = examples.sequences.codes[places], examples.sequences.visits[places]
    rows = np.repeat(np.arange(len(chosen)), lengths)
    last = np.repeat(examples.sequences.visits[starts + lengths - 1], lengths) == visits
    kept = ~np.isin(codes, (PAD, MASK, CLS, SEP))
    facts, of_facts = np.empty(0, np.int32), np.empty(0, np.int64)
    if examples.windows.facts is not None and examples.sequences.facts is not None:
        runs = examples.windows.facts.take(chosen)
        facts = examples.sequences.facts.codes[ragged_indices(*runs)]
        of_facts = np.repeat(np.arange(len(chosen)), runs.lengths)
    codes, rows = np.append(codes, facts), np.append(rows, of_facts)
    last = np.append(last & kept, np.zeros(len(facts), bool))
    kept = np.append(kept, np.ones(len(facts), bool))

    def counted(which: np.ndarray) -> "csr_array":
        ones = np.ones(np.count_nonzero(which), np.float32)
        return csr_array((ones, (rows[which], codes[which])), shape=(len(chosen), vocabulary_rows))

    return HistoryCounts(counted(kept), counted(last), examples.ages[chosen])


def join_histories(parts: Sequence[HistoryCounts], order: np.ndarray) -> HistoryCounts:
    """All parts end to end, then taken in an order: int ``[n]``."""
    from scipy.sparse import csr_array, vstack

    counts, last_visit = (
        csr_array(vstack([getattr(part, name) for part in parts], format="csr"))[order]
        for name in ("counts", "last_visit")
    )
    return HistoryCounts(counts, last_visit, np.concatenate([part.ages for part in parts])[order])


@dataclass(frozen=True, eq=False)
class BaselineData:
    """Counts of codes and targets; ``[n]`` or ``[n, K]`` as the labels of `PredictionFile` are."""

    kind: TaskKind
    classes: tuple[str, ...]
    """Multi-class and multi-label: those of the predictions."""
    edges_days: np.ndarray
    """Survival: those of the predictions."""
    class_ids: np.ndarray
    """Multi-label: row of each code in the vocabulary, int ``[K]``; -1 where it has none."""
    train: HistoryCounts
    train_targets: np.ndarray
    tuning: HistoryCounts
    """May have no example."""
    tuning_targets: np.ndarray
    evaluated: HistoryCounts
    """In the order of the predictions."""
    boosting_codes: int
    """Most codes that gradient boosting sees."""
    seed: int


@dataclass(frozen=True, eq=False)
class Baseline:
    """A baseline's predictions of the evaluated examples."""

    name: str
    predictions: np.ndarray | None
    """As those of `PredictionFile`; None where it could not be fitted."""
    note: str
    """How it was fitted, or why not."""


def targets_of(
    kind: TaskKind, classes: tuple[str, ...], labels: Labels, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Targets of labels at some rows, int ``[n]``, as `PredictionFile.labels` (``[m]`` or ``[m, K]``), and
    their places among the rows, int ``[m]``; rows of classes that the model does not know are left out.

    Raises:
        InputError: labels of another kind.
    """
    if not KINDS[kind].takes(labels):
        raise InputError(
            f"The labels are of the kind {labels.kind}, but the predictions are {kind}: give the label table "
            "that was predicted."
        )
    return KINDS[kind].truths(labels, rows, classes)


def run_baselines(data: BaselineData) -> list[Baseline]:
    """All baselines of the kind of task, the simplest first."""
    return [baseline(data) for baseline in BASELINES[KINDS[data.kind].predicts]]


# Baselines that need no model: the same for everyone, as it is on average in the train split.


def mean_baseline(data: BaselineData, name: str = "prevalence") -> Baseline:
    """The share of positives, or the mean of numbers."""
    mean = data.train_targets.mean(dtype=np.float64)
    return Baseline(name, np.full(len(data.evaluated), mean), f"{name} of the train split")


def class_baseline(data: BaselineData) -> Baseline:
    """The share of each class."""
    shares = np.bincount(data.train_targets, minlength=len(data.classes)) / len(data.train_targets)
    return Baseline("prevalence", _for_everyone(data, shares), "shares of the classes in train")


def code_baseline(data: BaselineData) -> Baseline:
    """The share of each code."""
    shares = data.train_targets.mean(axis=0, dtype=np.float64).astype(np.float32)
    return Baseline("prevalence", _for_everyone(data, shares), "share of each code in train")


def curve_baseline(data: BaselineData) -> Baseline:
    """The curve of Kaplan and Meier."""
    curve = kaplan_meier(data.train_targets[:, 0], data.train_targets[:, 1] > 0, data.edges_days)
    return Baseline("Kaplan-Meier", _for_everyone(data, curve), "the train split's curve for everyone")


def _for_everyone(data: BaselineData, values: np.ndarray) -> np.ndarray:
    return np.tile(values, (len(data.evaluated), 1))


def history_baseline(data: BaselineData) -> Baseline:
    """Codes come again: the rate, in train, at which a code is in the label after it was seen so often.

    A code is in one of seven cells: never seen; or seen once, two or three times, or more often, in the
    last visit or not. Each code has a rate of its own in each cell, drawn towards that of all codes.
    """
    seen, found = np.zeros((2, len(data.classes), _CELLS))
    for rows, cells in _cells(data.train, data.class_ids):
        for cell in range(_CELLS):
            inside = cells == cell
            seen[:, cell] += inside.sum(axis=0)
            found[:, cell] += (inside & data.train_targets[rows]).sum(axis=0)
    together = found.sum(axis=0) / np.maximum(seen.sum(axis=0), 1)  # [cells]
    rates = (found + _PRIOR * together) / (seen + _PRIOR)  # [K, cells]
    predictions = np.empty((len(data.evaluated), len(data.classes)), np.float32)
    for rows, cells in _cells(data.evaluated, data.class_ids):
        predictions[rows] = np.take_along_axis(rates.T, cells, axis=0)
    return Baseline("codes seen before", predictions, "rates by how often and how lately a code was seen")


def _cells(histories: HistoryCounts, class_ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Piece by piece, a slice of the examples and the cell of each of their codes, int64 ``[m, K]``."""
    known = class_ids >= 0
    step = max(1, _PIECE // max(len(class_ids), 1))
    for start in range(0, len(histories), step):
        rows = slice(start, min(start + step, len(histories)))
        counts, lately = (
            np.where(known, part[rows][:, np.maximum(class_ids, 0)].toarray(), 0)
            for part in (histories.counts, histories.last_visit)
        )
        # 0: never, 1: once, 2: two or three, 3: more.
        often = np.searchsorted((1, 2, 4), counts, side="right")
        yield rows, np.where(often > 0, often + 3 * (lately > 0), 0)


# Baselines on counts of codes: logistic (or linear) regression and gradient boosting.


def regression_baseline(data: BaselineData, numbers: bool = False) -> Baseline:
    """Logistic regression (ridge regression for numbers) on log1p counts of codes and age, standardised."""
    name = "linear regression" if numbers else "logistic regression"
    if not numbers and len(np.unique(data.train_targets)) < 2:
        return Baseline(name, None, "Not fitted: all train labels are the same.")
    train, tuning, evaluated = log_features((data.train, data.tuning, data.evaluated))
    model, strength = _chosen(train, data.train_targets, tuning, data.tuning_targets, numbers=numbers)
    return Baseline(name, _predict(data, model, evaluated), _note(data, f"C = {strength:g}"))


def code_regression_baseline(data: BaselineData) -> Baseline:
    """The same for each code."""
    name = "logistic regression"
    if len(data.classes) > _MOST_CODES:
        return Baseline(name, None, f"Not fitted: {len(data.classes):,} codes are more than {_MOST_CODES}.")
    train, tuning, evaluated = log_features((data.train, data.tuning, data.evaluated))
    predictions = np.empty((len(data.evaluated), len(data.classes)), np.float32)
    for k in range(len(data.classes)):
        targets, tuning_targets = data.train_targets[:, k], data.tuning_targets[:, k]
        predictions[:, k] = targets.mean()
        if targets.any() and not targets.all():
            model, _ = _chosen(train, targets, tuning, tuning_targets, STRENGTHS[1:4])
            predictions[:, k] = model.predict_proba(evaluated)[:, 1]
    return Baseline(name, predictions, _note(data, "one for each code"))


def boosting_baseline(data: BaselineData, numbers: bool = False) -> Baseline:
    """Gradient boosting of trees by histograms on counts of the most frequent codes and age."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    name, classes = "gradient boosting", len(data.classes)
    if classes > _MOST_CLASSES:
        return Baseline(name, None, f"Not fitted: {classes:,} classes are more than {_MOST_CLASSES}.")
    if not numbers and len(np.unique(data.train_targets)) < 2:
        return Baseline(name, None, "Not fitted: all train labels are the same.")
    having = np.bincount(data.train.counts.indices)  # [V] examples
    frequent = np.argsort(-having, kind="stable")[: min(data.boosting_codes, np.count_nonzero(having))]
    train, tuning, evaluated = (
        np.column_stack([part.counts[:, frequent].toarray(), part.ages])
        for part in (data.train, data.tuning, data.evaluated)
    )
    known = np.isin(data.tuning_targets, data.train_targets) | numbers
    watched = bool(known.any())
    make = HistGradientBoostingRegressor if numbers else HistGradientBoostingClassifier
    model = make(
        learning_rate=0.05,
        random_state=data.seed,
        early_stopping=watched,  # pyright: ignore[reportArgumentType]
        max_iter=_ROUNDS if watched else 100,
    )
    validation = {"X_val": tuning[known], "y_val": data.tuning_targets[known]} if watched else {}
    with threadpool_limits(limits=1):  # threads that wait for each other stall on a busy machine
        model.fit(train, data.train_targets, **validation)
        predicted = _predict(data, model, evaluated)
    note = f"{len(frequent):,} most frequent codes, {model.n_iter_} rounds"
    return Baseline(name, predicted, _note(data, note))


def mean_age(ages: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of the ages that are known."""
    known = ages[~np.isnan(ages)]
    return (float(known.mean()), float(known.std()) or 1.0) if len(known) else (0.0, 1.0)


def log_features(parts: Sequence[HistoryCounts]) -> "Iterator[csr_array]":
    """Of each part log1p counts, and the age less the mean of the first, train, over its deviation,
    ``[n, V + 1]``.
    """
    from scipy.sparse import csr_array, hstack

    mean, spread = mean_age(parts[0].ages)
    for part in parts:
        known = np.where(np.isnan(part.ages), mean, part.ages)  # an unknown age is that of the mean
        age = ((known - mean) / spread).astype(np.float64)[:, None]
        counts = part.counts
        logs = np.log1p(counts.data, dtype=np.float64)
        logs = csr_array((logs, counts.indices, counts.indptr), counts.shape)
        yield csr_array(hstack([logs, csr_array(age)], format="csr"))


def _chosen(
    train: "csr_array",
    targets: np.ndarray,
    tuning: "csr_array",
    on_tuning: np.ndarray,
    strengths: Sequence[float] = STRENGTHS,
    numbers: bool = False,
) -> tuple[Model, float]:
    """The model of the strength with the least loss on tuning, and that strength."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    if not len(on_tuning):
        strengths = (_WITHOUT_TUNING,)
    best, least, chosen = None, np.inf, strengths[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the least loss is good enough
        for strength in strengths:
            model = Ridge(alpha=1 / strength) if numbers else LogisticRegression(C=strength, max_iter=300)
            model.fit(train, targets)
            found = _loss(model, tuning, on_tuning) if len(on_tuning) else 0.0
            if best is None or found < least:
                best, least, chosen = model, found, strength
    return best, chosen


def _loss(model: Model, features: "csr_array", targets: np.ndarray) -> float:
    """Log loss, or mean square of the errors of numbers."""
    if not hasattr(model, "classes_"):
        return float(((model.predict(features) - targets) ** 2).mean())
    known = np.isin(targets, model.classes_)
    if not known.any():
        return 0.0
    places = np.searchsorted(model.classes_, targets[known])
    probabilities = model.predict_proba(features)[known, places]
    return float(-np.log(np.maximum(probabilities, 1e-15)).mean())


def _predict(data: BaselineData, model: Model, features: "csr_array | np.ndarray") -> np.ndarray:
    """Predictions as those of `PredictionFile`; a class that train lacks gets no probability."""
    if not hasattr(model, "classes_"):
        return model.predict(features)
    probabilities = model.predict_proba(features)
    if not data.classes:
        return probabilities[:, 1]
    spread = np.zeros((len(probabilities), len(data.classes)))
    spread[:, model.classes_] = probabilities
    return spread


def _note(data: BaselineData, how: str) -> str:
    tuned = "chosen on tuning" if len(data.tuning) else "not tuned, since no label is in the tuning split"
    return f"{how}, {tuned}"


BASELINES: dict[Predicts, tuple[Callable[[BaselineData], Baseline], ...]] = {
    "probability": (mean_baseline, regression_baseline, boosting_baseline),
    "class": (class_baseline, regression_baseline, boosting_baseline),
    "codes": (code_baseline, history_baseline, code_regression_baseline),
    "number": (
        partial(mean_baseline, name="mean"),
        partial(regression_baseline, numbers=True),
        partial(boosting_baseline, numbers=True),
    ),
    "survival curve": (curve_baseline,),
}
"""By what a kind of task predicts, the simplest first."""

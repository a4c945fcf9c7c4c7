"""What simple baselines learn from and give: the same examples, seen as counts of codes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from behrt_jax.config import TaskKind
from behrt_jax.data.examples import Examples
from behrt_jax.data.labels import Labels
from behrt_jax.data.sorting import ragged_indices
from behrt_jax.data.tasks import OF_LABELS, Task
from behrt_jax.data.vocabulary import CLS, MASK, PAD, SEP
from behrt_jax.errors import InputError
from behrt_jax.evaluation.survival import kaplan_meier

if TYPE_CHECKING:
    from scipy.sparse import csr_array


# Histories as counts of codes: what simple baselines see of the examples that a model reads.


@dataclass(frozen=True, eq=False)
class Histories:
    """Counts of codes in the histories of n examples; V rows of the vocabulary."""

    counts: "csr_array"
    """float32 ``[n, V]``: how often each code occurs, padding and other marks left out."""
    last_visit: "csr_array"
    """float32 ``[n, V]``: the same for the last visit that is known."""
    ages: np.ndarray
    """float32 ``[n]``, years at the prediction time."""

    def __len__(self) -> int:
        return len(self.ages)


def count_codes(examples: Examples, vocabulary_rows: int, chosen: np.ndarray | None = None) -> Histories:
    """Counts of the examples, or of those at some places, int ``[n]``."""
    from scipy.sparse import csr_array

    chosen = np.arange(len(examples)) if chosen is None else chosen
    starts, lengths = examples.windows.starts[chosen], examples.windows.lengths[chosen]
    places = ragged_indices(starts, lengths)
    codes, visits = examples.sequences.codes[places], examples.sequences.visits[places]
    rows = np.repeat(np.arange(len(chosen)), lengths)
    last = np.repeat(examples.sequences.visits[starts + lengths - 1], lengths) == visits
    kept = ~np.isin(codes, (PAD, MASK, CLS, SEP))

    def counted(which: np.ndarray) -> "csr_array":
        ones = np.ones(np.count_nonzero(which), np.float32)
        return csr_array((ones, (rows[which], codes[which])), shape=(len(chosen), vocabulary_rows))

    return Histories(counted(kept), counted(kept & last), examples.ages[chosen])


def join_histories(parts: Sequence[Histories], order: np.ndarray) -> Histories:
    """All parts end to end, then taken in an order: int ``[n]``."""
    from scipy.sparse import csr_array, vstack

    counts, last_visit = (
        csr_array(vstack([getattr(part, name) for part in parts], format="csr"))[order]
        for name in ("counts", "last_visit")
    )
    return Histories(counts, last_visit, np.concatenate([part.ages for part in parts])[order])


@dataclass(frozen=True, eq=False)
class BaselineData:
    """Histories and targets; ``[n]`` or ``[n, K]`` as the labels of `PredictionFile` are."""

    kind: TaskKind
    classes: tuple[str, ...]
    """Multi-class and multi-label: those of the predictions."""
    edges_days: np.ndarray
    """Survival: those of the predictions."""
    class_ids: np.ndarray
    """Multi-label: row of each code in the vocabulary, int ``[K]``; -1 where it has none."""
    train: Histories
    train_targets: np.ndarray
    tuning: Histories
    """May have no example."""
    tuning_targets: np.ndarray
    evaluated: Histories
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
    """Targets of some labels, and which of the rows have one.

    Args:
        kind: of the task.
        classes: of the predictions.
        labels: a label table.
        rows: int ``[n]``.

    Returns:
        The targets ``[m]`` or ``[m, K]`` as `PredictionFile.labels`, and places among ``rows``, int ``[m]``;
        rows of classes that the model does not know are left out.

    Raises:
        InputError: labels of another kind.
    """
    positive = labels.positive()
    if kind == "binary" and positive is not None:
        return positive[rows], np.arange(len(rows))
    if kind == "binary" or OF_LABELS[labels.kind] != kind:
        raise InputError(
            f"The labels are of the kind {labels.kind}, but the predictions are {kind}: give the label table "
            "that was predicted."
        )
    if kind == "multilabel":
        return Task(kind, classes=classes).targets(labels, rows) > 0, np.arange(len(rows))
    values = labels.values[rows]
    if kind == "multiclass":
        places = {name: place for place, name in enumerate(classes)}
        found = np.array([places.get(str(value), -1) for value in values], np.int64)
        return found[found >= 0], np.flatnonzero(found >= 0)
    return values, np.arange(len(rows))


# Baselines on counts of codes: logistic (or linear) regression and gradient boosting, by scikit-learn.

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of L2 regularisation that are tried."""
_WITHOUT_TUNING = 0.1
_MOST_CODES = 50
"""Multi-label tasks with more codes have no regression for each."""
_MOST_CLASSES = 10
"""Multi-class tasks with more classes have no boosting."""
_ROUNDS = 300


def regression_baseline(data: BaselineData) -> Baseline:
    """Logistic regression (ridge regression for numbers) on log1p counts of codes and age, standardised."""
    name = "linear regression" if data.kind == "regression" else "logistic regression"
    if data.kind == "multilabel" and len(data.classes) > _MOST_CODES:
        return Baseline(name, None, f"Not fitted: {len(data.classes):,} codes are more than {_MOST_CODES}.")
    train, tuning, evaluated = (
        _features(part, data.train) for part in (data.train, data.tuning, data.evaluated)
    )
    if data.kind != "multilabel":
        if data.kind != "regression" and len(np.unique(data.train_targets)) < 2:
            return Baseline(name, None, "Not fitted: all train labels are the same.")
        model, strength = _chosen(data, train, data.train_targets, tuning, data.tuning_targets)
        return Baseline(name, _predict(data, model, evaluated), _note(data, f"C = {strength:g}"))
    predictions = np.empty((len(data.evaluated), len(data.classes)), np.float32)
    for k in range(len(data.classes)):
        targets, tuning_targets = data.train_targets[:, k], data.tuning_targets[:, k]
        predictions[:, k] = targets.mean()
        if targets.any() and not targets.all():
            model, _ = _chosen(data, train, targets, tuning, tuning_targets)
            predictions[:, k] = model.predict_proba(evaluated)[:, 1]
    return Baseline(name, predictions, _note(data, "one for each code"))


def boosting_baseline(data: BaselineData) -> Baseline:
    """Gradient boosting of trees by histograms on counts of the most frequent codes and age."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    name = "gradient boosting"
    if len(data.classes) > _MOST_CLASSES:
        return Baseline(
            name, None, f"Not fitted: {len(data.classes):,} classes are more than {_MOST_CLASSES}."
        )
    if data.kind != "regression" and len(np.unique(data.train_targets)) < 2:
        return Baseline(name, None, "Not fitted: all train labels are the same.")
    having = np.bincount(data.train.counts.indices)  # [V] examples
    frequent = np.argsort(-having, kind="stable")[: min(data.boosting_codes, np.count_nonzero(having))]
    train, tuning, evaluated = (
        np.column_stack([part.counts[:, frequent].toarray(), part.ages])
        for part in (data.train, data.tuning, data.evaluated)
    )
    known = np.isin(data.tuning_targets, data.train_targets) | (data.kind == "regression")
    watched = bool(known.any())
    kind = HistGradientBoostingRegressor if data.kind == "regression" else HistGradientBoostingClassifier
    options: dict[str, Any] = {"early_stopping": watched, "max_iter": _ROUNDS if watched else 100}
    model = kind(learning_rate=0.05, random_state=data.seed, **options)
    validation = {"X_val": tuning[known], "y_val": data.tuning_targets[known]} if watched else {}
    with threadpool_limits(limits=1):  # threads that wait for each other stall on a busy machine
        model.fit(train, data.train_targets, **validation)
        predicted = _predict(data, model, evaluated)
    note = f"{len(frequent):,} most frequent codes, {model.n_iter_} rounds"
    return Baseline(name, predicted, _note(data, note))


def _features(part: Histories, train: Histories) -> "csr_array":
    """log1p counts and the age less the mean of train over its deviation: ``[n, V + 1]``."""
    from scipy.sparse import csr_array, hstack

    spread = float(train.ages.std()) or 1.0
    age = ((part.ages - train.ages.mean()) / spread).astype(np.float64)[:, None]
    counts = part.counts
    logs = csr_array((np.log1p(counts.data, dtype=np.float64), counts.indices, counts.indptr), counts.shape)
    return csr_array(hstack([logs, csr_array(age)], format="csr"))


def _chosen(
    data: BaselineData, train: "csr_array", targets: np.ndarray, tuning: "csr_array", on_tuning: np.ndarray
) -> tuple[Any, float]:
    """The model of the strength with the least loss on tuning, and that strength."""
    from sklearn.exceptions import ConvergenceWarning

    strengths: Sequence[float] = STRENGTHS if len(on_tuning) else (_WITHOUT_TUNING,)
    if data.kind == "multilabel":
        strengths = strengths[1:4] or strengths
    loss = _squares if data.kind == "regression" else _log_loss
    best, least, chosen = None, np.inf, strengths[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the least loss is good enough
        for strength in strengths:
            model = _new_model(data, strength).fit(train, targets)
            found = loss(model, tuning, on_tuning) if len(on_tuning) else 0.0
            if best is None or found < least:
                best, least, chosen = model, found, strength
    return best, chosen


def _new_model(data: BaselineData, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    if data.kind == "regression":
        return Ridge(alpha=1 / strength)
    return LogisticRegression(C=strength, max_iter=300)


def _log_loss(model: Any, features: "csr_array", targets: np.ndarray) -> float:
    known = np.isin(targets, model.classes_)
    if not known.any():
        return 0.0
    places = np.searchsorted(model.classes_, targets[known])
    probabilities = model.predict_proba(features)[known, places]
    return float(-np.log(np.maximum(probabilities, 1e-15)).mean())


def _squares(model: Any, features: "csr_array", targets: np.ndarray) -> float:
    return float(((model.predict(features) - targets) ** 2).mean())


def _predict(data: BaselineData, model: Any, features: Any) -> np.ndarray:
    if data.kind == "regression":
        return model.predict(features)
    probabilities = model.predict_proba(features)
    if data.kind == "binary":
        return probabilities[:, 1]
    spread = np.zeros((len(probabilities), len(data.classes)))
    spread[:, model.classes_] = probabilities
    return spread


def _note(data: BaselineData, how: str) -> str:
    tuned = "chosen on tuning" if len(data.tuning) else "not tuned, since no label is in the tuning split"
    return f"{how}, {tuned}"


# Baselines that need no model: how common an outcome is, and what the history already has.

_PRIOR = 10.0
"""Examples that a rate of all codes together counts for in that of one code."""
_CELLS = 7
_PIECE = 1 << 22
"""Pairs of examples and codes looked at together."""


def run_baselines(data: BaselineData) -> list[Baseline]:
    """All baselines of the kind of task, the simplest first."""
    if data.kind == "survival":
        return [prevalence_baseline(data)]
    found = [prevalence_baseline(data)]
    if data.kind == "multilabel":
        return [*found, history_baseline(data), regression_baseline(data)]
    return [*found, regression_baseline(data), boosting_baseline(data)]


def prevalence_baseline(data: BaselineData) -> Baseline:
    """The same for everyone, as it is on average in the train split (survival: Kaplan-Meier)."""
    targets, count = data.train_targets, len(data.evaluated)
    if data.kind == "survival":
        curve = kaplan_meier(targets[:, 0], targets[:, 1] > 0, data.edges_days)
        return Baseline("Kaplan-Meier", np.tile(curve, (count, 1)), "the train split's curve for everyone")
    if data.kind == "multiclass":
        shares = np.bincount(targets, minlength=len(data.classes)) / len(targets)
        return Baseline("prevalence", np.tile(shares, (count, 1)), "shares of the classes in train")
    if data.kind == "multilabel":
        shares = targets.mean(axis=0, dtype=np.float64).astype(np.float32)
        return Baseline("prevalence", np.tile(shares, (count, 1)), "share of each code in train")
    name = "mean" if data.kind == "regression" else "prevalence"
    return Baseline(name, np.full(count, targets.mean(dtype=np.float64)), f"{name} of the train split")


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


def _cells(histories: Histories, class_ids: np.ndarray):
    """Piece by piece, a slice of the examples and the cell of each of their codes, int64 ``[m, K]``."""
    known = class_ids >= 0
    step = max(1, _PIECE // max(len(class_ids), 1))
    for start in range(0, len(histories), step):
        rows = slice(start, min(start + step, len(histories)))
        counts, lately = (
            np.where(known, part[rows][:, np.maximum(class_ids, 0)].toarray(), 0)
            for part in (histories.counts, histories.last_visit)
        )
        often = np.searchsorted(
            (1, 2, 4), counts, side="right"
        )  # 0: never, 1: once, 2: two or three, 3: more
        yield rows, np.where(often > 0, often + 3 * (lately > 0), 0)

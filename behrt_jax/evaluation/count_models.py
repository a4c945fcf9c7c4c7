"""Baselines on counts of codes: logistic (or linear) regression and gradient boosting, by scikit-learn."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from behrt_jax.evaluation.baseline import Baseline, BaselineData
from behrt_jax.evaluation.histories import Histories

if TYPE_CHECKING:
    from scipy.sparse import csr_array

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

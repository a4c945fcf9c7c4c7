"""The count model: what counts of codes tell of a task of yes or no, for predictions to be blended with where
labels are few.

Logistic regression and gradient boosting (by scikit-learn) on the same histories that a model reads. How
strong the regularisation is, how many trees there are and how both are weighed is chosen by cross-validation,
by which each example also gets log odds of models that have not seen its subject. What is fitted is kept as
plain numbers.
"""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from behrt_jax.evaluation.task_baselines import HistoryCounts, log_features, mean_age
from behrt_jax.files import JsonObject

if TYPE_CHECKING:
    from sklearn.ensemble import GradientBoostingClassifier

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Inverse strengths of L2 regularisation that are tried."""
WEIGHTS = np.linspace(0, 1, 11)
"""Weights of the trees that are tried."""
FOLDS = 5
_MOST_BOOSTED = 5_000
"""Examples that trees are fitted on: there are enough labels beyond."""
_CODES = 300
"""Most frequent codes that trees see."""
_ROUNDS = 200


@dataclass(frozen=True, eq=False)
class BoostedTrees:
    """Trees on counts of some codes and the age; ``[nodes]`` of all trees end to end."""

    codes: np.ndarray
    """int ``[F]``, rows of the vocabulary; feature F is the age, in years."""
    start: float
    """Log odds before the first tree."""
    roots: np.ndarray
    """int ``[trees]``."""
    features: np.ndarray
    """int; -1 of a leaf."""
    thresholds: np.ndarray
    """float64: to the left up to this, else to the right."""
    left: np.ndarray
    """int, place of that node."""
    right: np.ndarray
    """int."""
    values: np.ndarray
    """float64, what a leaf adds."""

    def outputs(self, histories: HistoryCounts, mean_age: float) -> np.ndarray:
        """Log odds of yes, float64 ``[n]``; an unknown age is that of the mean."""
        features = _dense(histories, self.codes, mean_age)  # [n, F + 1]
        nodes = np.repeat(self.roots[:, None], len(features), axis=1)  # [trees, n]
        examples = np.arange(len(features))
        while (inner := self.features[nodes] >= 0).any():
            low = features[examples, self.features[nodes]] <= self.thresholds[nodes]
            nodes = np.where(inner, np.where(low, self.left[nodes], self.right[nodes]), nodes)
        return self.start + self.values[nodes].sum(axis=0)


@dataclass(frozen=True, eq=False)
class CountModel:
    """Logistic regression on log1p counts of codes and age, weighed with trees."""

    coefficients: np.ndarray
    """float64 ``[V]``, of the codes."""
    of_age: float
    """Coefficient of the age, less its mean over its deviation in the examples."""
    intercept: float
    mean_age: float
    spread: float
    weight: float = 0.0
    """Of the trees, 0 to 1."""
    trees: BoostedTrees | None = None

    def outputs(self, histories: HistoryCounts) -> np.ndarray:
        """Log odds of yes, float32 ``[n, 1]``."""
        logs = histories.counts.copy()
        logs.data = np.log1p(logs.data, dtype=np.float64)
        known = np.where(np.isnan(histories.ages), self.mean_age, histories.ages)
        ages = (known - self.mean_age) / self.spread
        found = logs @ self.coefficients + self.of_age * ages + self.intercept
        if self.trees is not None:
            found = (1 - self.weight) * found + self.weight * self.trees.outputs(histories, self.mean_age)
        return found.astype(np.float32)[:, None]

    def to_json(self) -> JsonObject:
        """As JSON."""
        found = {**asdict(self), "coefficients": self.coefficients.tolist()}
        if self.trees is not None:
            columns = asdict(self.trees)
            found["trees"] = {name: np.asarray(column).tolist() for name, column in columns.items()}
        return found

    @classmethod
    def from_json(cls, value: JsonObject) -> "CountModel":
        """Inverse of :meth:`to_json`; those of before there were trees have none."""
        trees = value.get("trees")
        if trees is not None:
            start = trees["start"]
            trees = BoostedTrees(
                **{**{name: np.array(column) for name, column in trees.items()}, "start": start}
            )
        return cls(**{**value, "coefficients": np.array(value["coefficients"]), "trees": trees})


def fit_count_model(
    histories: HistoryCounts, targets: np.ndarray, subjects: np.ndarray, boosted: bool, seed: int = 0
) -> tuple[CountModel, np.ndarray]:
    """The count model of all examples, and its log odds of each by models that have not seen its subject.

    Args:
        histories: of n examples.
        targets: bool ``[n]``; two subjects or more have each value.
        subjects: int ``[n]``, whose examples they are.
        boosted: whether there are trees.
        seed: of folds and trees.

    Returns:
        The model, and float32 ``[n, 1]``.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(limits=1):  # threads that wait for each other stall on a busy machine
        folds = list(_folds(targets, subjects, seed))
        by_strength = np.full((len(STRENGTHS), len(targets)), _rate(targets))  # log odds
        for seen, unseen in folds:
            train, test = histories.take(seen), histories.take(unseen)
            for place, strength in enumerate(STRENGTHS):
                by_strength[place, unseen] = _regression(train, targets[seen], strength).outputs(test)[:, 0]
        best = int(np.argmin(_losses(by_strength, targets).mean(axis=1)))
        model, own = _regression(histories, targets, STRENGTHS[best]), by_strength[best]
        if boosted:
            beside, rounds = _boosted_unseen(histories, targets, folds, seed)
            losses = _losses(
                (1 - WEIGHTS)[:, None] * own + WEIGHTS[:, None] * beside, targets
            )  # [weights, n]
            weight = _mean_of_the_best(losses)
            some = _most(np.arange(len(targets)), seed)
            trees = _boosting(histories.take(some), targets[some], rounds, model.mean_age, seed)[0]
            model = CountModel(**{**vars(model), "weight": weight, "trees": trees})
            own = (1 - weight) * own + weight * beside
    return model, own.astype(np.float32)[:, None]


def _mean_of_the_best(losses: np.ndarray) -> float:
    """Mean of the weights whose loss is within a standard error of the least: one of them would be chance."""
    more = losses - losses[np.argmin(losses.mean(axis=1))]  # [weights, n]
    error = more.std(axis=1) / np.sqrt(losses.shape[1])
    return float(WEIGHTS[more.mean(axis=1) <= error].mean())


def _folds(targets: np.ndarray, subjects: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of what is fitted, which has both values, and of what is not seen, by subject."""
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(FOLDS, *(len(np.unique(subjects[targets == value])) for value in (False, True)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer of a value than folds
        folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        for seen, unseen in folds.split(targets, targets, subjects):
            if len(np.unique(targets[seen])) == 2:  # else nothing can be fitted there
                yield seen, unseen


def _rate(targets: np.ndarray) -> float:
    """Log odds of yes, as they are on average."""
    rate = targets.mean(dtype=np.float64)
    return float(np.log(rate / (1 - rate)))


def _losses(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log loss of log odds, ``[..., n]``."""
    return np.logaddexp(0, np.where(targets, -outputs, outputs))


def _regression(histories: HistoryCounts, targets: np.ndarray, strength: float) -> CountModel:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the least loss is good enough
        model = LogisticRegression(C=strength, max_iter=300).fit(next(log_features((histories,))), targets)
    weights = model.coef_[0]
    return CountModel(weights[:-1], float(weights[-1]), float(model.intercept_[0]), *mean_age(histories.ages))


def _boosted_unseen(
    histories: HistoryCounts, targets: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], seed: int
) -> tuple[np.ndarray, int]:
    """Log odds ``[n]`` by trees that have not seen an example's subject, and how many trees are best."""
    by_round = np.full((_ROUNDS, len(targets)), _rate(targets))
    for seen, unseen in folds:
        some = _most(seen, seed)
        age = mean_age(histories.ages[some])[0]
        trees, fitted = _boosting(histories.take(some), targets[some], _ROUNDS, age, seed)
        features = _dense(histories.take(unseen), trees.codes, age)
        for place, outputs in enumerate(fitted.staged_decision_function(features)):
            by_round[place, unseen] = np.asarray(outputs).reshape(-1)
    best = int(np.argmin(_losses(by_round, targets).mean(axis=1)))
    return by_round[best], best + 1


def _most(places: np.ndarray, seed: int) -> np.ndarray:
    """As many of the places as trees are fitted on, drawn at random, in order."""
    if len(places) <= _MOST_BOOSTED:
        return places
    return np.sort(np.random.default_rng(seed).choice(places, _MOST_BOOSTED, replace=False))


def _boosting(
    histories: HistoryCounts, targets: np.ndarray, rounds: int, age: float, seed: int
) -> "tuple[BoostedTrees, GradientBoostingClassifier]":
    """Small trees of large leaves, each on half of the examples and of a share of the codes."""
    from sklearn.ensemble import GradientBoostingClassifier

    having = np.bincount(histories.counts.indices)  # [V] examples
    codes = np.argsort(-having, kind="stable")[: min(_CODES, np.count_nonzero(having))]
    fitted = GradientBoostingClassifier(
        n_estimators=rounds,
        learning_rate=0.05,
        min_samples_leaf=min(20, max(1, len(targets) // 10)),  # pyright: ignore[reportArgumentType]
        subsample=0.5,
        max_features=0.3,
        random_state=seed,
    ).fit(_dense(histories, codes, age), targets)
    trees = [one.tree_ for one in np.asarray(fitted.estimators_)[:, 0]]
    sizes = np.array([tree.node_count for tree in trees])
    roots = np.cumsum(sizes) - sizes

    def joined(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(tree, name)).reshape(-1) for tree in trees])

    shift, leaf = np.repeat(roots, sizes), joined("children_left") < 0
    return BoostedTrees(
        codes,
        _rate(targets),
        roots,
        np.where(leaf, -1, joined("feature")),
        joined("threshold"),
        joined("children_left") + shift,
        joined("children_right") + shift,
        0.05 * joined("value"),
    ), fitted


def _dense(histories: HistoryCounts, codes: np.ndarray, age: float) -> np.ndarray:
    """Counts of some codes, and the age, float32 ``[n, F + 1]``."""
    ages = np.where(np.isnan(histories.ages), age, histories.ages)
    return np.column_stack([histories.counts[:, codes].toarray(), ages]).astype(np.float32)

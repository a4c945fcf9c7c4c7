"""Confidence intervals by resampling subjects: all examples of a subject come, or stay away, together."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Scorer = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Figures under each set of weights: float64 ``[sets, examples]`` to name -> float64 ``[sets]``, NaN where
a figure is not defined."""
LEVEL = 0.95
_PIECE = 1 << 22
"""Weights held at once."""


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

    def entry(self, name: str) -> dict[str, float | int | None]:
        """``value``, ``low`` and ``high`` (None where not defined), ready for JSON; see :func:`interval`."""
        return _entry(self.values[name], self.drawn[name])

    def less(self, other: "Figures", name: str) -> dict[str, float | int | None]:
        """The same for this figure less the other's, paired draw by draw."""
        return _entry(self.values[name] - other.values[name], self.drawn[name] - other.drawn[name])


def bootstrap(scorer: Scorer, draws: SubjectDraws) -> Figures:
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


def _entry(value: float, drawn: np.ndarray) -> dict[str, float | int | None]:
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    low, high = interval(drawn) or (None, None)
    entry: dict[str, float | int | None] = {"value": value, "low": low, "high": high}
    undefined = int(np.count_nonzero(~np.isfinite(drawn)))
    return {**entry, "undefined_draws": undefined} if undefined else entry


def weighted_means(weights: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weighted mean of each column, float ``[n]``, over its entries that are not NaN: ``[sets]`` each."""
    values = np.stack(list(columns.values()), axis=1).astype(np.float64)  # [n, C]
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = (weights @ np.where(defined, values, 0.0)) / (weights @ defined)  # [sets, C]
    return dict(zip(columns, means.T, strict=True))

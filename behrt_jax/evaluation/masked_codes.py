"""Masked codes of a split, one by one: where they are, how well each was predicted, and summaries of that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from behrt_jax.data.sequences import Sequences
from behrt_jax.evaluation.metrics import TOP, mean_metrics

_BANDS = ((1, 10), (11, 100), (101, 1_000), (1_001, 10_000), (10_001, None))
# Ranks by frequency in the train split, both ends included.


@dataclass(frozen=True, eq=False)
class MaskedSplit:
    """A split as the model sees it with codes masked."""

    sequences: Sequences
    shown: np.ndarray
    """int32 ``[tokens]``: what stands in place of each token of ``sequences``; [PAD] where a token is in
    no window and so not seen."""
    windows: np.ndarray
    """int64 ``[tokens]``: number of the window that the token is read in, -1 for none. Tokens of different
    windows do not see each other."""
    targets: np.ndarray
    """int64 ``[targets]``: which tokens are to be predicted, each once."""

    @property
    def codes(self) -> np.ndarray:
        """The codes to predict, int32 ``[targets]``."""
        return self.sequences.codes[self.targets]

    @property
    def subjects(self) -> np.ndarray:
        """Index of each target's subject in ``sequences``, int64 ``[targets]``."""
        return np.searchsorted(self.sequences.offsets, self.targets, side="right") - 1


@dataclass(frozen=True, eq=False)
class MaskedCodeResults:
    """How well some predictor did on each masked code."""

    codes: np.ndarray
    """int32 ``[targets]``."""
    losses: np.ndarray
    """Minus the logarithm of the probability given to the code, nats, float ``[targets]``."""
    ranks: np.ndarray
    """Codes held more likely, int ``[targets]``; 0 is a hit."""
    subjects: np.ndarray
    """Index of the subject, int64 ``[targets]``."""

    def metrics(self) -> dict[str, Any]:
        """Figures of `metrics.mean_metrics`, with the 95 % interval of the loss over subjects."""
        hits = {f"top{k}": float(np.count_nonzero(self.ranks < k)) for k in TOP}
        sums = {"loss": float(np.sum(self.losses, dtype=np.float64)), **hits, "targets": len(self.codes)}
        return {**mean_metrics(sums), "interval": list(mean_interval(self.losses, self.subjects))}


def mean_interval(values: np.ndarray, subjects: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean over masked codes whose subjects, not codes, are independent.

    The mean is a ratio of sums over subjects; its variance is that of the linearised ratio (Cochran 1977,
    Sampling Techniques, section 6.4). NaN for both ends with fewer than two subjects.

    Args:
        values: float ``[targets]``.
        subjects: index of the subject, ``[targets]``.
    """
    if not len(values):
        return float("nan"), float("nan")
    values = np.asarray(values, np.float64)
    mean = values.mean()
    _, index = np.unique(subjects, return_inverse=True)
    deviations = np.bincount(index, values - mean)  # [subjects]
    count = len(deviations)
    if count < 2:
        return float("nan"), float("nan")
    error = np.sqrt(np.sum(deviations**2) * count / (count - 1)) / len(values)
    return float(mean - 1.96 * error), float(mean + 1.96 * error)


def frequency_bands(
    counts: np.ndarray, first_code: int, results: MaskedCodeResults, unigram: MaskedCodeResults
) -> list[dict[str, Any]]:
    """Loss and accuracy by how frequent the code to predict is in the train split.

    Args:
        counts: train events of each vocabulary row, int64 ``[vocabulary]``.
        first_code: lower ids are special tokens.
        results: of the model.
        unigram: of the unigram baseline on the same masked codes.

    Returns:
        For each band that holds a code: ``band`` (ranks by frequency), ``codes``, ``targets``, ``loss``
        (nats), ``accuracy``, ``accuracy_top10``, ``unigram_loss``, ``unigram_accuracy``; figures are None
        where the band has no target.
    """
    codes = len(counts) - first_code
    rank = np.zeros(len(counts), np.int64)
    rank[first_code + np.argsort(-counts[first_code:], kind="stable")] = np.arange(1, codes + 1)
    rank[:first_code] = len(counts) + 1  # [UNK] as a target, where it is one, is in no band
    bands = []
    for first, last in _BANDS:
        if first > codes:
            break
        last = codes if last is None else min(last, codes)
        of_band = (rank[results.codes] >= first) & (rank[results.codes] <= last)
        targets = int(np.count_nonzero(of_band))

        def mean(values: np.ndarray, of_band: np.ndarray = of_band, targets: int = targets) -> float | None:
            return float(values[of_band].mean()) if targets else None

        bands.append(
            {
                "band": f"{first}-{last}",
                "codes": last - first + 1,
                "targets": targets,
                "loss": mean(results.losses),
                "accuracy": mean(results.ranks == 0),
                "accuracy_top10": mean(results.ranks < 10),
                "unigram_loss": mean(unigram.losses),
                "unigram_accuracy": mean(unigram.ranks == 0),
            }
        )
    return bands


def results_of(split: MaskedSplit, losses: Sequence[float] | np.ndarray, ranks: Any) -> MaskedCodeResults:
    """Losses and ranks ``[targets]``, in the order of ``split.targets``, as results."""
    return MaskedCodeResults(split.codes, np.asarray(losses), np.asarray(ranks), split.subjects)

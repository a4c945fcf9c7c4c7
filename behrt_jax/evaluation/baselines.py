"""What a model must beat: predicting every masked code by its frequency in the train split."""

import numpy as np

from behrt_jax.evaluation.masked_codes import MaskedCodeResults, MaskedSplit, results_of


class Unigram:
    """Code frequencies of the train split as a predictor, each count raised by one.

    Args:
        counts: int64 `[vocabulary]`, how often each code occurs in the train split.
        first_code: id of the first code that can be a target; lower ids (special tokens) get no
            probability.
    """

    def __init__(self, counts: np.ndarray, first_code: int):
        smoothed = counts.astype(np.float64) + 1.0
        smoothed[:first_code] = 0.0
        self.probabilities = smoothed / smoothed.sum()  # [V]
        with np.errstate(divide="ignore"):
            self.losses = -np.log(self.probabilities)  # [V] nats
        self.ranks = np.empty(len(counts), np.int64)  # [V]
        self.ranks[np.argsort(self.losses, kind="stable")] = np.arange(len(counts))

    def predict(self, split: MaskedSplit) -> MaskedCodeResults:
        """Loss and rank of every masked code."""
        return results_of(split, self.losses[split.codes], self.ranks[split.codes])

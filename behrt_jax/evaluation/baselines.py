"""What a model must beat: predicting every masked code by its frequency in the train split."""

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.evaluation.metrics import totals


class Unigram:
    """Code frequencies of the train split as a predictor, each count raised by one.

    Args:
        counts: int64 `[vocabulary]`, how often each code occurs in the train split.
        first_code: id of the first code that can be a target; lower ids (special tokens) get no
            probability.
    """

    def __init__(self, counts: np.ndarray, first_code: int):
        smoothed = counts[first_code:].astype(np.float64) + 1.0
        losses = np.full(len(counts), np.inf)
        losses[first_code:] = -np.log(smoothed / smoothed.sum())
        self.losses = jnp.asarray(losses, jnp.float32)  # [V] nats
        ranks = np.empty(len(counts), np.int32)
        ranks[np.argsort(losses, kind="stable")] = np.arange(len(counts))
        self.ranks = jnp.asarray(ranks)  # [V]

    def totals(self, labels: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
        """Totals as of `metrics.prediction_totals` for labels and weights `[batch, targets]`."""
        return totals(self.losses[labels], self.ranks[labels], weights)

"""Figures of predicted probabilities of several classes, of which one is right."""

import numpy as np

from behrt_jax.evaluation.bootstrap import Scorer, weighted_means
from behrt_jax.evaluation.ranking import ranked, ranked_figures


def multiclass_scorer(labels: np.ndarray, probabilities: np.ndarray) -> Scorer:
    """Scorer of ``accuracy``, ``macro_auroc`` and ``weighted_auroc`` (one class against the rest; mean over
    classes, plain and by their frequency), ``log_loss`` (nats) and ``brier`` (summed over the classes).

    Classes that are absent, in the examples or in a draw, are left out of the means of AUROC.

    Args:
        labels: int64 ``[n]``, places of the classes.
        probabilities: float64 ``[n, K]``.
    """
    one_hot = labels[:, None] == np.arange(probabilities.shape[1])  # [n, K]
    least = np.finfo(np.float64).eps
    columns = {
        "accuracy": probabilities.argmax(axis=1) == labels,
        "log_loss": -np.log(np.clip(probabilities[one_hot], least, 1 - least)),
        "brier": ((probabilities - one_hot) ** 2).sum(axis=1),
    }
    rankings = [ranked(probabilities[:, k]) for k in range(probabilities.shape[1])]

    def score(weights: np.ndarray) -> dict[str, np.ndarray]:
        aurocs = []
        for k, (order, first, last) in enumerate(rankings):
            in_order, positive = weights[:, order], one_hot[order, k]
            aurocs.append(ranked_figures(in_order * positive, in_order * ~positive, first, last)[0])
        auroc = np.stack(aurocs, axis=1)  # [sets, K]
        defined = ~np.isnan(auroc)
        shares = np.where(defined, weights @ one_hot, 0.0)
        known = np.where(defined, auroc, 0.0)
        found = weighted_means(weights, columns)
        with np.errstate(invalid="ignore"):
            found["macro_auroc"] = known.sum(axis=1) / defined.sum(axis=1)
            found["weighted_auroc"] = (known * shares).sum(axis=1) / shares.sum(axis=1)
        return found

    return score

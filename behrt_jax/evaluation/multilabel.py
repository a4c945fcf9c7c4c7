"""Figures of predicted sets of codes, as those of the next visit.

Average precision and AUROC are averaged over samples, as in the BEHRT paper (Li et al. 2020, doi
10.1038/s41598-020-62922-y): each example ranks the codes. An example without a code to find, or without
one to tell it from, has no such figure and is left out. Incident codes are those that the history did not
have, repeats those that it had; each is ranked among its like.
"""

import numpy as np

from behrt_jax.evaluation.bootstrap import Scorer, weighted_means
from behrt_jax.evaluation.ranking import figures_of_rows, pooled_figures

SETS = ("", "incident_", "repeat_")


def multilabel_scorer(labels: np.ndarray, probabilities: np.ndarray, seen_before: np.ndarray) -> Scorer:
    """Scorer of ``average_precision`` and ``auroc``, also with ``incident_`` and ``repeat_`` before them, and
    of ``brier`` and ``log_loss`` (nats), means over examples and codes.

    Args:
        labels: bool ``[n, K]``.
        probabilities: float ``[n, K]``.
        seen_before: bool ``[n, K]``, the code occurs in the history.
    """
    columns = {}
    for name, counted in zip(SETS, _counted(seen_before), strict=True):
        auroc, average_precision = figures_of_rows(labels, probabilities, counted)
        columns |= {f"{name}average_precision": average_precision, f"{name}auroc": auroc}
    least = np.finfo(np.float32).eps
    of_label = np.clip(np.where(labels, probabilities, 1 - probabilities), least, 1 - least)
    columns["brier"] = ((probabilities - labels) ** 2).mean(axis=1, dtype=np.float64)
    columns["log_loss"] = -np.log(of_label).mean(axis=1, dtype=np.float64)
    return lambda weights: weighted_means(weights, columns)


def over_codes(labels: np.ndarray, probabilities: np.ndarray, seen_before: np.ndarray) -> dict[str, dict]:
    """AUROC and average precision over codes, for all, incident and repeated ones; arguments as above.

    Returns:
        ``all``, ``incident`` and ``repeat``, each with ``micro_auroc``, ``micro_average_precision`` (all
        pairs of example and code ranked together), ``macro_...`` (mean over codes, each ranking the
        examples), ``codes`` (how many have both positives and negatives) and ``examples`` (how many have
        a figure of their own, and so count in the averages over samples); None where not defined.
    """
    found = {}
    for name, counted in zip(("all", "incident", "repeat"), _counted(seen_before), strict=True):
        of_code = figures_of_rows(labels.T, probabilities.T, None if counted is None else counted.T)
        defined = np.isfinite(of_code[0])
        positive, negative = (labels, ~labels) if counted is None else (labels & counted, ~labels & counted)
        micro = pooled_figures(probabilities[positive], probabilities[negative])
        has_both = positive.any(axis=1) & negative.any(axis=1)
        found[name] = {
            "micro_auroc": _or_none(micro[0]),
            "micro_average_precision": _or_none(micro[1]),
            "macro_auroc": _or_none(of_code[0][defined].mean() if defined.any() else np.nan),
            "macro_average_precision": _or_none(of_code[1][defined].mean() if defined.any() else np.nan),
            "codes": int(defined.sum()),
            "examples": int(has_both.sum()),
        }
    return found


def _counted(seen_before: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    return None, ~seen_before, seen_before


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

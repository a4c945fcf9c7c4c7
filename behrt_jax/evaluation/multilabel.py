"""Figures of predicted sets of codes, as those of the next visit.

Average precision and AUROC are averaged over samples, as in the BEHRT paper (Li et al. 2020, doi
10.1038/s41598-020-62922-y): each example ranks the codes. An example without a code to find, or without
one to tell it from, has no such figure and is left out. Incident codes are those that the history did not
have, repeats those that it had; each is ranked among its like.
"""

import numpy as np

from behrt_jax.evaluation.bootstrap import Scorer, weighted_means
from behrt_jax.evaluation.ranking import figures_of_rows

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
        kept = slice(None) if counted is None else counted
        of_all = figures_of_rows(labels[kept].reshape(1, -1), probabilities[kept].reshape(1, -1))
        auroc, average_precision = (np.where(np.isfinite(value), value, np.nan) for value in of_code)
        defined = np.isfinite(auroc)
        inside = np.ones_like(labels) if counted is None else counted
        has_both = (labels & inside).any(axis=1) & (~labels & inside).any(axis=1)
        found[name] = {
            "micro_auroc": _or_none(of_all[0]),
            "micro_average_precision": _or_none(of_all[1]),
            "macro_auroc": _or_none(auroc[defined]),
            "macro_average_precision": _or_none(average_precision[defined]),
            "codes": int(defined.sum()),
            "examples": int(has_both.sum()),
        }
    return found


def _counted(seen_before: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    return None, ~seen_before, seen_before


def _or_none(values: np.ndarray) -> float | None:
    mean = float(values.mean()) if len(values) else np.nan
    return mean if np.isfinite(mean) else None

"""Groups of examples for which figures are given apart: by sex and by age at the prediction time."""

from collections.abc import Mapping, Sequence

import numpy as np

AGE_BANDS = ((0, 17), (18, 39), (40, 64), (65, 79), (80, None))
"""Completed years, both ends in."""
SEX_PREFIXES = ("GENDER//", "SEX//")
LEAST = 10
"""Fewer positives or negatives (binary), events (survival) or examples (else) are too few for figures."""


def age_groups(ages: np.ndarray) -> dict[str, np.ndarray]:
    """Band -> which examples are in it, bool ``[n]``; ages in years, ``[n]``. Empty bands are left out."""
    bands = {
        f"{low}-{high}" if high is not None else f"{low}+": (ages >= low)
        & (ages < (np.inf if high is None else high + 1))
        for low, high in AGE_BANDS
    }
    return {name: inside for name, inside in bands.items() if inside.any()}


def sex_groups(
    subject_ids: np.ndarray, fact_subjects: Sequence[int], fact_codes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Sex -> which examples are of it, bool ``[n]``; empty where no subject has such a code.

    Args:
        subject_ids: of the examples, int64 ``[n]``.
        fact_subjects: subjects of static facts.
        fact_codes: the facts; those that begin with GENDER// or SEX// count, by what follows.
    """
    found: dict[int, set[str]] = {}
    for subject, code in zip(fact_subjects, fact_codes, strict=True):
        if code.startswith(SEX_PREFIXES):
            found.setdefault(subject, set()).add(code.split("//", 1)[1] or "unknown")
    if not found:
        return {}
    names = np.array(
        [" and ".join(sorted(found.get(subject, {"unknown"}))) for subject in subject_ids.tolist()]
    )
    return {str(name): names == name for name in np.unique(names)}


def too_small(kind: str, labels: np.ndarray) -> str | None:
    """Why a group with these labels (as in `PredictionFile`) is too small; None where it is not."""
    counts: Mapping[str, int] = {"examples": len(labels)}
    if kind == "binary":
        counts = {"positives": int(labels.sum()), "negatives": int((~labels).sum())}
    if kind == "survival":
        counts = {"events": int(labels[:, 1].sum())}
    few = [f"{count} {name}" for name, count in counts.items() if count < LEAST]
    return f"too small: {' and '.join(few)} (fewer than {LEAST})" if few else None

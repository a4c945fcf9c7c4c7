"""What a model's single masked codes say beside its mean loss."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from behrt_jax.evaluation.masked_codes import MaskedCodeResults, frequency_bands, mean_interval


def assess(
    counts: np.ndarray, first_code: int, baselines: Mapping[str, MaskedCodeResults], model: MaskedCodeResults
) -> dict[str, Any]:
    """Compare a model with the baselines on the very same masked codes; ready for JSON.

    Args:
        counts: train events of each vocabulary row, int64 ``[vocabulary]``.
        first_code: lower ids are special tokens.
        baselines: ``unigram`` at least; ``oracle`` where the optimum is known.
        model: its results on those codes.

    Returns:
        ``interval``: 95 % interval of the model's loss over subjects; ``bands``: see
        `masked_codes.frequency_bands`; ``gaps``: for each baseline the mean of model loss less baseline
        loss (nats) with its 95 % interval, paired code by code, as ``nats``, ``low``, ``high``; and with
        an oracle ``oracle_gap`` (the same) and ``share_of_attainable_gain``, see
        :func:`share_of_attainable_gain`.
    """
    gaps = {name: _gap(model, baseline) for name, baseline in baselines.items()}
    found: dict[str, Any] = {
        "interval": list(mean_interval(model.losses, model.subjects)),
        "bands": frequency_bands(counts, first_code, model, baselines["unigram"]),
        "gaps": gaps,
    }
    if "oracle" in baselines:
        losses = [float(np.mean(r.losses)) for r in (model, baselines["unigram"], baselines["oracle"])]
        found["oracle_gap"] = gaps["oracle"]
        found["share_of_attainable_gain"] = share_of_attainable_gain(*losses)
    return found


def share_of_attainable_gain(loss: float, unigram: float, oracle: float) -> float | None:
    """``(unigram - loss) / (unigram - oracle)``: 0 for a model that knows frequencies alone, 1 for the best
    possible one; None where the oracle gains nothing over the unigram.
    """
    return (unigram - loss) / (unigram - oracle) if unigram > oracle else None


def _gap(model: MaskedCodeResults, baseline: MaskedCodeResults) -> dict[str, float]:
    differences = np.asarray(model.losses, np.float64) - baseline.losses
    low, high = mean_interval(differences, model.subjects)
    return {"nats": float(differences.mean()), "low": low, "high": high}

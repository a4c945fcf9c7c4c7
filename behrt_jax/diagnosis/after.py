"""Checks of what came out, on summary.json and the validations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from behrt_jax.diagnosis.during import MIN_STEPS
from behrt_jax.diagnosis.finding import Finding, is_number

Values = Mapping[str, Any]

SMALL_GAIN = 0.01
"""Nats; another seed could turn it around."""
SMALL_SHARE = 0.8
"""Of the gain over the unigram that could be attained."""
STILL_FALLING = 0.02
"""Share by which the loss fell in the last fifth of the validations."""
ENOUGH_TARGETS, SMALL_ACCURACY = 50, 0.02
"""Masked codes that a band needs to be judged, and a gain in accuracy there that counts as none."""


def check_after(settings: Values, summary: Values, records: Sequence[Values]) -> list[Finding]:
    """Every check of a run that ended; what is unknown is not checked.

    Args:
        settings: the configuration as nested dicts.
        summary: of summary.json.
        records: of metrics.jsonl, in order.
    """
    # A run of a few steps is a trial: how good it is says nothing.
    always = [*below_oracle(summary), *best_without_record(summary)]
    if (summary.get("steps") or 0) < MIN_STEPS:
        return always
    validations = [r for r in records if r.get("split") == "tuning" and is_number(r.get("loss"))]
    uniform = (settings.get("data") or {}).get("source") == "uniform"
    return [
        *always,
        *([] if uniform else gain_over_baselines(summary)),
        *common_codes_alone(summary),
        *best_epoch(summary, validations),
        *gap_to_oracle(summary),
    ]


def below_oracle(summary: Values) -> list[Finding]:
    """A loss that is better than can be."""
    gap = summary.get("oracle_gap") or {}
    if not is_number(gap.get("high")) or gap["high"] >= 0:
        return []
    return [
        Finding(
            "below-oracle",
            "error",
            f"The validation loss is {abs(gap.get('nats') or gap['high']):.4f} nats below the best that is "
            f"possible, more than its 95 % interval ({gap.get('low') or math.nan:.4f} to {gap['high']:.4f}) "
            "allows.",
            "What is masked reaches the model some other way: there is leakage.",
            "Look for targets in the input (masks, segment ids, subjects in two splits), and audit the "
            "data with experiments/doctor.py --data.",
        )
    ]


def best_without_record(summary: Values) -> list[Finding]:
    """A best checkpoint that the metrics do not know."""
    if summary.get("best") is not None or summary.get("best_step") is None:
        return []
    return [
        Finding(
            "best-without-record",
            "warning",
            f"The best step, {summary['best_step']:,}, has no validation record in the metrics.",
            "Its figures are unknown.",
            "See whether metrics.jsonl was cut or edited.",
        )
    ]


def gap_to_oracle(summary: Values) -> list[Finding]:
    """How much of what could be learnt was learnt."""
    share, gap = summary.get("share_of_attainable_gain"), summary.get("oracle_gap") or {}
    if not is_number(share):
        return []
    nats = f", {gap['nats']:.3f} nats above the optimum" if is_number(gap.get("nats")) else ""
    oracle = (summary.get("baselines") or {}).get("oracle") or {}
    best = (
        f" The best possible accuracy is {oracle['accuracy']:.1%}."
        if is_number(oracle.get("accuracy"))
        else ""
    )
    low = share < SMALL_SHARE
    return [
        Finding(
            "gap-to-oracle",
            "warning" if low else "info",
            f"{share:.1%} of the attainable gain over code frequencies was attained{nats}.{best}",
            "The data holds more than the model has learnt." if low else "The model is close to the optimum.",
            "Train longer, in full instead of with adapters, with a larger model or another learning rate."
            if low
            else "Nothing is to be done.",
        )
    ]


def gain_over_baselines(summary: Values) -> list[Finding]:
    """A model no better than code frequencies, or than counting which codes go together."""
    gain = summary.get("gain_over_unigram")
    loss = (summary.get("best") or {}).get("loss")
    pairs = ((summary.get("baselines") or {}).get("co-occurrence") or {}).get("loss")
    mend = "Train longer, try another learning rate, see that embeddings and head train."
    if is_number(gain) and gain < SMALL_GAIN:
        return [
            Finding(
                "no-gain-over-unigram",
                "error" if gain <= 0 else "warning",
                f"The best validation loss is {abs(gain):.4f} nats {'above' if gain <= 0 else 'below'} that "
                "of predicting by code frequency.",
                "The model is of no use yet." if gain <= 0 else "Another seed could turn that around.",
                mend,
            )
        ]
    if is_number(loss) and is_number(pairs) and loss >= pairs:
        return [
            Finding(
                "no-gain-over-co-occurrence",
                "warning",
                f"The best validation loss, {loss:.4f}, is not below the {pairs:.4f} nats of counting which "
                "codes occur together.",
                "A table of pairs does as well as the model.",
                mend,
            )
        ]
    return []


def common_codes_alone(summary: Values) -> list[Finding]:
    """Nothing but the most frequent codes predicted better than by frequency."""
    bands = [
        band
        for band in summary.get("bands") or []
        if (band.get("targets") or 0) >= ENOUGH_TARGETS
        and is_number(band.get("accuracy"))
        and is_number(band.get("unigram_accuracy"))
    ]
    common, *others = sorted(bands, key=_frequency, reverse=True) or [None]
    if common is None or not others or (summary.get("gain_over_unigram") or 0.0) < SMALL_GAIN:
        return []
    gained = [
        band
        for band in others
        if band["accuracy"] > band["unigram_accuracy"] + max(SMALL_ACCURACY, 2 * _error(band))
        or (is_number(band.get("unigram_loss")) and band["loss"] < band["unigram_loss"] - 0.1)
    ]
    if gained:
        return []
    listed = ", ".join(f"{band['band']}: {band['accuracy']:.1%}" for band in [common, *others])
    return [
        Finding(
            "common-codes-alone",
            "warning",
            "Only the most frequent codes are predicted better than by frequency (accuracy by rank of the "
            f"code: {listed}).",
            "The overall accuracy hides that nothing was learnt about the other codes.",
            "Train longer or on more subjects, map rare codes to a coarser level, or raise --data.min_count.",
        )
    ]


def best_epoch(summary: Values, validations: Sequence[Values]) -> list[Finding]:
    """A best validation that is the very first or the very last."""
    if len(validations) < 5:
        return []
    best = min(validations, key=lambda record: record["loss"])
    if best is validations[0]:
        return [
            Finding(
                "best-at-first",
                "warning",
                f"The first of {len(validations)} validations was the best (epoch {best['epoch']:.1f}); the "
                f"last is {validations[-1]['loss'] - best['loss']:.3f} nats above it.",
                "All training after it was in vain: the model overfits at once or is thrown off its course.",
                "Lower --optimizer.learning_rate, validate more often (--train.validate_every), or train "
                "fewer parameters.",
            )
        ]
    if best is not validations[-1]:
        return []
    earlier = validations[-1 - max(1, len(validations) // 5)]
    fall = earlier["loss"] - best["loss"]
    falling = fall > STILL_FALLING * earlier["loss"]
    return [
        Finding(
            "best-at-last",
            "warning" if falling else "info",
            f"The last of {len(validations)} validations was the best; the loss fell by {fall:.3f} nats "
            "over the last fifth.",
            "The run ended before the model had learnt what it can."
            if falling
            else "A longer run may gain a little more.",
            "Raise --train.epochs."
            if falling
            else "Nothing must be done; raise --train.epochs for the last bit.",
        )
    ]


def _frequency(band: Values) -> float:
    """Masked codes for each code of the band."""
    return band["targets"] / max(band.get("codes") or 1, 1)


def _error(band: Values) -> float:
    """Standard error of the band's accuracy."""
    share = max(band["accuracy"], 1.0 / band["targets"])
    return math.sqrt(max(share * (1 - share), 0.0) / band["targets"])

"""Checks of how long and how fast a run trains, and on which masks."""

import math
from collections.abc import Mapping
from typing import Any

from behrt_jax.diagnosis.finding import Finding

Values = Mapping[str, Any]


FEW_STEPS, FEW_WARMUP_STEPS, FEW_STEPS_PER_EPOCH = 200, 10, 5
HIGH_RATE, LOW_RATE = 10.0, 1 / 30
"""Learning rate relative to :func:`usual_rate`."""


def static_masks(settings: Values) -> list[Finding]:
    """Masks drawn once."""
    if not (settings.get("train") or {}).get("static_masks"):
        return []
    return [
        Finding(
            "static-masks",
            "warning",
            "train.static_masks: masks are drawn once and reused in each epoch.",
            "The training loss falls by memorising them.",
            "For study only; leave it out to draw new masks at each step.",
        )
    ]


def steps_for_schedule(settings: Values, facts: Values) -> list[Finding]:
    """Too few steps for a warm-up and a schedule."""
    total, per_epoch = facts.get("total_steps"), facts.get("steps_per_epoch")
    if not total or not per_epoch:
        return []
    optimizer, train = settings.get("optimizer") or {}, settings.get("train") or {}
    # A run that is cut short on purpose is no mistake.
    severity = "warning" if train.get("max_steps") is None else "info"
    findings = []
    if total < FEW_STEPS:
        findings.append(
            Finding(
                "few-steps",
                severity,
                f"The whole run has {total:,} steps.",
                "From scratch a model hardly gets beyond code frequencies in so few.",
                "Raise --train.epochs, or lower --train.batch_size or --train.batch_tokens.",
            )
        )
    warmup = round((optimizer.get("warmup_fraction") or 0.0) * total)
    if total >= FEW_STEPS and 0 < warmup < FEW_WARMUP_STEPS:
        findings.append(
            Finding(
                "few-warmup-steps",
                severity,
                f"The warm-up has {warmup} of {total:,} steps.",
                "The learning rate is at its peak before Adam's moments mean anything.",
                f"Raise --optimizer.warmup_fraction to {min(1.0, FEW_WARMUP_STEPS / total):.2g} or more, or "
                "set it to 0.",
            )
        )
    if per_epoch < FEW_STEPS_PER_EPOCH:
        findings.append(
            Finding(
                "few-steps-per-epoch",
                severity,
                f"An epoch has {per_epoch} steps.",
                "A batch holds most of the train split, and validations come after very few steps.",
                "Lower --train.batch_size or --train.batch_tokens.",
            )
        )
    return findings


def usual_rate(tokens_per_step: float, hidden_size: int) -> float:
    """A learning rate of AdamW that is known to work at this batch and width, within a factor of some five.

    Grows with the square root of the batch (Malladi et al. 2022, arXiv 2205.10287), at most by 4, and
    falls with the width (Yang et al. 2022, arXiv 2203.03466); 1e-3 at 2,000 tokens and width 256.
    """
    return 1e-3 * min(4.0, math.sqrt(tokens_per_step / 2000.0)) * 256.0 / hidden_size


def learning_rate_for_batch(settings: Values, parameters: Values, facts: Values) -> list[Finding]:
    """Learning rates far from what the effective batch and the width call for."""
    optimizer, model = settings.get("optimizer") or {}, settings.get("model") or {}
    tokens = facts.get("tokens_per_step")
    if not tokens or not model.get("hidden_size") or not optimizer.get("learning_rate"):
        return []
    usual = usual_rate(tokens, model["hidden_size"])
    own = optimizer.get("learning_rates") or {}
    rates = {
        group: own.get(group) or optimizer["learning_rate"]
        for group, counted in parameters.items()
        if isinstance(counted, Mapping) and counted.get("trainable")
    }
    high = {group: rate for group, rate in rates.items() if rate > HIGH_RATE * usual}
    low = {group: rate for group, rate in rates.items() if rate < LOW_RATE * usual}
    findings = []
    for name, odd, why, mend in (
        ("high", high, "Training tends to diverge, or never leaves the code frequencies.", "Lower"),
        ("low", low, "The model hardly moves in the steps that it has.", "Raise"),
    ):
        if odd:
            listed = ", ".join(f"{group} {rate:.2g}" for group, rate in odd.items())
            findings.append(
                Finding(
                    f"learning-rate-{name}",
                    "warning",
                    f"Learning rate {listed} at {tokens:,.0f} tokens a step and width "
                    f"{model['hidden_size']}; about {usual:.1g} is usual.",
                    why,
                    f"{mend} --optimizer.learning_rate, or change the batch.",
                )
            )
    return findings

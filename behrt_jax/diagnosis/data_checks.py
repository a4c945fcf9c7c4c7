"""Checks of the data that a run reads."""

import math
from collections.abc import Mapping
from typing import Any

from behrt_jax.diagnosis.finding import Finding, is_number

Values = Mapping[str, Any]


WIDE_INTERVAL, NOTED_INTERVAL = 0.15, 0.05
"""Half the width, in nats, of the 95 % interval of a validation loss."""
FEW_VALIDATION_SUBJECTS = 30
MUCH_UNSEEN, MUCH_BEYOND, MUCH_CUT = 0.02, 0.01, 0.10
"""Shares of events."""


def data_without_structure(settings: Values, facts: Values) -> list[Finding]:
    """Codes drawn at random."""
    if (settings.get("data") or {}).get("source") != "uniform":
        return []
    best = f" ln({facts['codes']}) = {math.log(facts['codes']):.4f}" if facts.get("codes") else " ln(codes)"
    return [
        Finding(
            "uniform-data",
            "warning",
            "data.source uniform: codes are drawn at random, there is nothing to learn.",
            f"The best possible validation loss is{best}.",
            "For study only; to see a model learn use --data.source clinical or latent.",
        )
    ]


def validation_size(baselines: Values, facts: Values) -> list[Finding]:
    """How well a validation loss can be known, from the interval of the unigram's on the same codes."""
    unigram = baselines.get("unigram") or {}
    low, high = unigram.get("interval") or (None, None)
    subjects = facts.get("validation_subjects")
    half = (high - low) / 2 if is_number(low) and is_number(high) else None
    few = subjects is not None and subjects < FEW_VALIDATION_SUBJECTS
    if not few and (half is None or half <= NOTED_INTERVAL):
        return []
    of = f" of {subjects:,} subjects" if subjects is not None else ""
    interval = (
        "its interval cannot be told" if half is None else f"95 % interval of their loss: +- {half:.3f} nats"
    )
    return [
        Finding(
            "validation-size",
            "warning" if few or half is None or half > WIDE_INTERVAL else "info",
            f"Validation is on {unigram.get('targets', 0):,} masked codes{of}; {interval}.",
            "Differences between runs on other data that are smaller than this say nothing, and the best "
            "epoch is chosen partly by chance.",
            "Put more subjects into the tuning split (--data.tuning_fraction), or compare runs on the same "
            "one.",
        )
    ]


def unseen_codes(facts: Values) -> list[Finding]:
    """Validation events whose code the train split does not know."""
    share = facts.get("unseen_share") or 0.0
    if share <= MUCH_UNSEEN:
        return []
    return [
        Finding(
            "unseen-codes",
            "warning",
            f"{share:.1%} of the validation events have a code that is rare in the train split, or not in "
            "it.",
            "They are read as [UNK] or through a row that was never trained; the validation is easier or "
            "harder than the data is.",
            "Lower --data.min_count, split by subject at random, or map codes to a coarser level.",
        )
    ]


def beyond_tables(settings: Values, facts: Values) -> list[Finding]:
    """Ages and visits that share the last row of their table, and events before birth."""
    model = settings.get("model") or {}
    beyond = facts.get("beyond_tables") or {}
    explained = {
        "ages": (
            "are older than the age table reaches "
            f"({model.get('age_rows', 0) * model.get('age_bin_years', 0):g} years)",
            "raise --model.age_rows",
        ),
        "before_birth": ("come before the subject's birth", "see that births and times are right"),
        "visits": (
            f"are in later visits than the visit table has rows ({model.get('visit_rows')})",
            "raise --model.visit_rows",
        ),
        "positions": (
            f"are in later visits than there are positions ({model.get('positions')}), which here count "
            "visits",
            "raise --model.positions",
        ),
    }
    return [
        Finding(
            f"beyond-tables-{name.replace('_', '-')}",
            "warning" if share > MUCH_BEYOND else "info",
            f"{share:.2%} of the events {explained[name][0]}.",
            "They share the embedding at the table's end, so the model cannot tell them apart.",
            f"If they matter, {explained[name][1]}.",
        )
        for name, share in beyond.items()
        if share > 0 and name in explained
    ]


def cut_histories(settings: Values, facts: Values) -> list[Finding]:
    """Events that the sequence length leaves out."""
    share = facts.get("cut_share") or 0.0
    if share <= MUCH_CUT:
        return []
    window = (settings.get("data") or {}).get("window", "all")
    length = facts.get("row_length")
    seen = f"{share:.1%} of the train events are past the first {length} tokens of their history"
    if window == "all":
        return [
            Finding(
                "cut-histories",
                "info",
                f"{seen}; such histories are read in several windows.",
                "Nothing is lost, but a window does not see what the others hold.",
                "For longer context raise --model.positions.",
            )
        ]
    left_out = "unread in each epoch" if window == "random" else "never read"
    return [
        Finding(
            "cut-histories",
            "warning",
            f"With data.window {window} {share:.1%} of the train events are {left_out}: histories are cut "
            f"to {length} tokens.",
            "The model learns nothing from what it does not read.",
            "Raise --model.positions, or read histories whole with --data.window all.",
        )
    ]

"""Checks of the times in prepared data: order, ages, life and death."""

from collections.abc import Iterator

import numpy as np

from behrt_jax.data.selection import matches
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.visits import DAY
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.diagnosis.leakage_data import FIRST_CODE

OLDEST = 120.0
"""Ages above, in years, are taken for mistakes."""
_MUCH = 0.01
"""Share of the events above which those outside of a life are a warning."""
_YEAR = 365.25 * DAY


def check_ages(data: SequenceSet) -> Iterator[Finding]:
    """Order of the events, ages out of range, and ages that do not fit the times."""
    tokens = unordered = below = above = off = subjects = 0
    for part in data.splits.values():
        if not len(part):
            continue
        steps = np.diff(part.times)
        steps[part.offsets[1:-1] - 1] = 0  # from one subject to the next
        unordered += int(np.count_nonzero(steps < 0))
        below += int(np.count_nonzero(part.ages < 0))
        above += int(np.count_nonzero(part.ages > OLDEST))
        births = part.times - part.ages.astype(np.float64) * _YEAR  # [T]
        starts = part.offsets[:-1]
        spread = np.maximum.reduceat(births, starts) - np.minimum.reduceat(births, starts)
        off += int(np.count_nonzero(spread > DAY))
        tokens += len(part.codes)
        subjects += len(part)
    if unordered:
        yield Finding(
            "events-out-of-order",
            "error",
            f"{unordered:,} of {tokens:,} events come before the one listed ahead of them.",
            "What lies before a prediction time cannot be told, and positions mean nothing.",
            "Run prepare again, which sorts each history by time.",
        )
    if below:
        yield Finding(
            "events-before-birth",
            "error",
            f"{below:,} of {tokens:,} events have a negative age.",
            "They belong to someone else, or the birth is wrong.",
            "Mend the births in the source, and run prepare again, which drops and counts such events.",
        )
    if above:
        yield Finding(
            "age-implausible",
            "warning",
            f"{above:,} of {tokens:,} events have an age above {OLDEST:.0f} years.",
            "A placeholder for an unknown birth is likely, and the age embedding learns it.",
            "Mend the births in the source, or leave such subjects out.",
        )
    if off:
        yield Finding(
            "ages-against-times",
            "error",
            f"In {off:,} of {subjects:,} subjects, age and time of the events give births more than a day "
            "apart.",
            "Ages or times were computed wrongly, as when months are added to years.",
            "Compute the age as time minus birth: run prepare again.",
        )


def check_deaths(data: SequenceSet, death_codes: tuple[str, ...]) -> Iterator[Finding]:
    """Events after a code of death, and what preparing dropped because it lay outside of a life."""
    is_death = matches(data.vocabulary.codes, death_codes, "--death_codes")
    is_death[:FIRST_CODE] = False
    late = dead = 0
    for part in data.splits.values():
        if not len(part):
            continue
        never = np.iinfo(np.int64).max
        at = np.where(is_death[part.codes], part.times // DAY, never)
        first = np.minimum.reduceat(at, part.offsets[:-1])  # [S]
        late += int(np.count_nonzero(part.times // DAY > np.repeat(first, part.lengths)))
        dead += int(np.count_nonzero(first < never))
    named = ", ".join(code for code, death in zip(data.vocabulary.codes, is_death, strict=True) if death)
    if late:
        yield Finding(
            "events-after-death",
            "error",
            f"{late:,} events lie on a later day than a code of death ({named}) of their subject.",
            "Records written after a death tell of it, and belong to no prediction.",
            "Write the death as MEDS_DEATH, so that prepare drops what follows it.",
        )
    elif dead:
        yield Finding(
            "death-among-codes",
            "info",
            f"{named} says of {dead:,} subjects that they died, and is among the inputs.",
            "Where the label is about death, it is the outcome in disguise.",
            "Leave it out with exclude_codes for such labels.",
        )
    dropped = {rule: data.counts.dropped.get(rule, 0) for rule in ("before birth", "after death", "no birth")}
    lost = sum(dropped.values())
    if lost:
        share = lost / (lost + sum(len(part.codes) for part in data.splits.values()))
        rules = ", ".join(f"{rule}: {count:,}" for rule, count in dropped.items() if count)
        yield Finding(
            "events-outside-life",
            "warning" if share > _MUCH else "info",
            f"Preparing dropped {lost:,} events ({share:.1%}) that lay outside of a known life ({rules}).",
            "Many of them mean that births, deaths or clocks are wrong, also where nothing was dropped.",
            "Look at the births and deaths of the source.",
        )

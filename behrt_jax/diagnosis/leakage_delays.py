"""Check of codes that are recorded before they are known: delays by pattern of codes."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from behrt_jax.data.delays import matching_codes, parse_delay
from behrt_jax.data.places import place_in
from behrt_jax.data.visits import DAY
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.diagnosis.label_inputs import PlacedLabels
from behrt_jax.errors import InputError


def check_delays(
    placed: Mapping[str, PlacedLabels],
    vocabulary: Vocabulary,
    delays: Sequence[str],
    recorded: Sequence[str] = (),
) -> Iterator[Finding]:
    """Events up to the prediction time that were not known yet then.

    Args:
        placed: the labels.
        vocabulary: of the data.
        delays: to check.
        recorded: those of the data's manifest, which prediction keeps to; they may match no code.
    """
    for option in delays:
        pattern, days = parse_delay(option)
        chosen = matching_codes(vocabulary, (pattern,), "--delays")
        if not chosen.any() and option not in recorded:
            raise InputError(f"--delays has {pattern!r}, but no code of the vocabulary matches: mend it.")
        early = total = affected = count = 0
        for labels in placed.values():
            known, unknown = _known(labels, chosen, days)
            total += int(known.sum() + unknown.sum())
            early += int(unknown.sum())
            affected += int(np.count_nonzero(unknown))
            count += len(labels)
        known_at = "at the end of the visit" if days is None else f"{days:g} days later"
        if early and option in recorded:
            yield Finding(
                "kept-until-known",
                "info",
                f"{early:,} of {total:,} events of {pattern} up to the prediction times of {affected:,} of "
                f"{count:,} labels are only known {known_at}, as the data's manifest says.",
                "Fine-tuning and prediction do not show them to the model.",
                "None needed; whatever else reads the events must leave them out too.",
            )
        elif early:
            yield Finding(
                "not-yet-known",
                "error",
                f"{early:,} of {total:,} events of {pattern} in the inputs of {affected:,} of {count:,} "
                f"labels are only known {known_at}, which is after the prediction time.",
                "In use the model will not have them.",
                "Predict later, or give the delay to prepare, so that predictions keep to it.",
            )


def _known(labels: PlacedLabels, chosen: np.ndarray, days: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Events of chosen codes in each input that are known, and that are not: int64 ``[labels]`` each."""
    part = labels.part
    if not len(part):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    subject = np.repeat(np.arange(len(part)), part.lengths)
    if days is None:
        per_subject = np.maximum.reduceat(part.visits, part.offsets[:-1]) + 1  # [S]
        visit = np.repeat(np.cumsum(per_subject) - per_subject, part.lengths) + part.visits  # [T]
        known_at = np.full(int(per_subject.sum()), np.iinfo(np.int64).min)
        np.maximum.at(known_at, visit, part.times)
        known_at = known_at[visit]
    else:
        known_at = part.times + int(days * DAY)
    rows = np.flatnonzero(chosen[part.codes])
    subject, time, known_at = subject[rows], part.times[rows], known_at[rows]
    known_at = known_at[np.lexsort([known_at, subject])]
    starts = np.searchsorted(subject, labels.subjects)
    stops = np.searchsorted(subject, labels.subjects, side="right")
    if not len(rows):
        return np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
    recorded = place_in(time, starts, stops, labels.times, inclusive=True) - starts
    known = place_in(known_at, starts, stops, labels.times, inclusive=True) - starts
    return known, recorded - known

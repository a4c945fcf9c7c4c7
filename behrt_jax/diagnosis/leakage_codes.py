"""Checks of codes against binary labels: codes and facts that tell the outcome, and the outcome's own codes.

:func:`check_codes` has the list, :func:`check_facts` is beside it. Findings hold figures and codes, no
subject ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from behrt_jax.config.commands import DoctorConfig
from behrt_jax.data.event_rules import matches
from behrt_jax.data.events import DAY
from behrt_jax.data.examples import parse_delay
from behrt_jax.data.facts import CodedFacts
from behrt_jax.data.sorting import ragged_indices, runs
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary, matching_codes
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.diagnosis.leakage_data import FIRST_CODE
from behrt_jax.diagnosis.leakage_labels import PlacedLabels


def check_codes(
    placed: Mapping[str, PlacedLabels],
    vocabulary: Vocabulary,
    config: DoctorConfig,
    delays: Sequence[str] = (),
) -> Iterator[Finding]:
    """Every check of codes before and after the prediction times of binary labels.

    Raises:
        InputError: one of the outcome codes is no regular expression.
    """
    yield from check_telling_codes(
        list(placed.values()), vocabulary, revealed_later(vocabulary, config, delays)
    )
    yield from check_outcome(placed, vocabulary, config.outcome_codes, config.horizon_days)


def revealed_later(vocabulary: Vocabulary, config: DoctorConfig, delays: Sequence[str]) -> np.ndarray:
    """Codes that are not known before the outcome, by what the user says of them: those of the outcome, those
    of death, and those that are known after a delay; bool ``[V]``.

    Raises:
        InputError: one of the patterns is no regular expression.
    """
    patterns = (*config.outcome_codes, *config.death_codes, *(parse_delay(delay)[0] for delay in delays))
    return matching_codes(vocabulary, patterns, "--outcome_codes")


TELLING = {
    "input": Finding.warning(
        "outcome-code-in-input",
        "The presence of one of {} codes in the input alone predicts a positive label: {}.",
        "Is it a cause or a sign that is known before the outcome, as a laboratory value may be, or the "
        "outcome under another name, or only written once the outcome is known?",
        "See what these codes mean and when they are written. Where that is after the prediction, say so "
        "with delays, or leave them out with exclude_codes; else nothing is to be done.",
    ),
    "prediction time": Finding.error(
        "label-revealed-at-prediction-time",
        "{} codes at exactly the prediction time predict a positive label: {}.",
        "The prediction time is inclusive, so the input holds the event that the label was made from.",
        "Set the prediction time before that event, a microsecond at least.",
    ),
    "day before": Finding.error(
        "label-revealed-just-before",
        "{} codes in the day before the prediction time predict a positive label: {}.",
        "The outcome is already under way, or was recorded, when it is to be predicted.",
        "Predict earlier: put a gap between the input and the outcome.",
    ),
    "input of few": Finding.info(
        "outcome-code-suspected",
        "{} codes in the input go with a positive label, but few subjects have them: {}.",
        "They may be strong predictors, or the outcome under another name.",
        "Look at what these codes mean.",
    ),
    "day after": Finding.info(
        "outcome-just-after-prediction",
        "{} codes in the day after the prediction time go with a positive label: {}.",
        "They are not in the input; but where clocks differ by hours or hold dates alone, such events slip "
        "into it.",
        "See that all times have the same clock, or predict earlier.",
    ),
}
"""By window of tokens; how many codes and which is filled in."""


def check_telling_codes(
    parts: Sequence[PlacedLabels], vocabulary: Vocabulary, late: np.ndarray
) -> Iterator[Finding]:
    """Single codes that tell the label: anywhere in the input, at its very end, and just after it.

    Anywhere in the input that is a question, and an error where the code is revealed at the prediction time
    or later: ``late`` are codes of which that is known, bool ``[V]``.
    """
    inputs = [labels.up_to() for labels in parts]
    before = [labels.up_to(inclusive=False) for labels in parts]
    windows = {
        "input": ([labels.starts for labels in parts], inputs),
        "prediction time": (before, inputs),
        "day before": ([labels.up_to(-DAY, inclusive=False) for labels in parts], before),
        "day after": (inputs, [labels.up_to(DAY) for labels in parts]),
    }
    counts = {name: count_codes(parts, *window, len(vocabulary)) for name, window in windows.items()}
    codes = {name: revealing_codes(counted) for name, counted in counts.items()}
    counts["input of few"] = counts["input"]
    codes["input of few"] = suspected_codes(counts["input"]) & ~codes["input"]
    revealed = codes["input"] & (late | codes["prediction time"])
    for window, finding in TELLING.items():
        if not codes[window].any():
            continue
        listed = _named(codes[window], counts[window], vocabulary.codes)
        seen = finding.seen.format(f"{codes[window].sum():,}", listed)
        if window == "input" and revealed.any():
            names = _named(revealed, counts[window], vocabulary.codes)
            seen += f" Revealed at the prediction time or later: {names}."
            finding = replace(
                finding,
                severity="error",
                why="The outcome is in the input under another name, or as it was written afterwards.",
                mend="Leave these codes out with exclude_codes, or predict only for subjects without them.",
            )
        yield replace(finding, seen=seen)


def check_facts(
    placed: Mapping[str, PlacedLabels], facts: Mapping[str, CodedFacts], config: DoctorConfig
) -> Iterator[Finding]:
    """Static facts that tell a binary label: a model with fact tokens reads them as known all along.

    Args:
        placed: the labels of each split.
        facts: those of each split's subjects.
        config: says which codes are of the outcome and of death.

    Raises:
        InputError: one of these codes is no regular expression.
    """
    names = (*SPECIAL_TOKENS, *sorted({name for own in facts.values() for name in own.names}))
    row = {name: number for number, name in enumerate(names)}
    counts, subjects = np.zeros((2, len(names)), np.int64), [0, 0]
    for split, labels in placed.items():
        for value in (0, 1):
            ids = labels.part.subject_ids[np.unique(labels.subjects[labels.values == value])]
            subjects[value] += len(ids)
            for name, count in facts[split].counts(ids).items():
                counts[value, row[name]] += count
    counted = CodeCounts(counts[1], counts[0], subjects[1], subjects[0])
    telling = revealing_codes(counted)
    if not telling.any():
        return
    late = matches(names, (*config.outcome_codes, *config.death_codes), "--outcome_codes")
    yield Finding(
        "outcome-fact",
        "error" if (telling & late).any() else "warning",
        f"{telling.sum():,} static facts alone predict a positive label: {_named(telling, counted, names)}.",
        "Facts are taken for known all along, and model.fact_tokens reads them before the first event: were "
        "they recorded once the outcome was known?",
        "Prepare without them (static_codes, table.static), or leave model.fact_tokens off.",
    )


# By how many subjects a code was seen, in windows of tokens that each label has.

_PIECE_TOKENS = 1 << 22
"""Tokens looked at together."""


@dataclass(frozen=True, eq=False)
class CodeCounts:
    """By how many subjects with positive and with negative labels each code was seen in some window."""

    positive: np.ndarray
    """int64 ``[V]``: subjects with the code in the window of one of their positive labels."""
    negative: np.ndarray
    """int64 ``[V]``: the same for negative labels. A subject may be in both."""
    positives: int
    negatives: int
    """Subjects with a positive, and with a negative label."""


def count_codes(
    placed: Sequence[PlacedLabels], begins: Sequence[np.ndarray], ends: Sequence[np.ndarray], rows: int
) -> CodeCounts:
    """Count subjects, not labels, so that one subject with many labels weighs no more than another.

    Args:
        placed: binary labels of each split.
        begins: first token of each label's window, int64 ``[labels]`` for each split; later labels of a
            subject have later windows.
        ends: one after its last token, likewise.
        rows: of the vocabulary (V).
    """
    counts, subjects = np.zeros((2, rows), np.int64), [0, 0]
    for labels, begin, end in zip(placed, begins, ends, strict=True):
        for value in (0, 1):
            own = labels.values == value
            subjects[value] += len(np.unique(labels.subjects[own]))
            counts[value] += _subjects_by_code(labels, own, begin, end, rows)
    return CodeCounts(counts[1], counts[0], subjects[1], subjects[0])


def _subjects_by_code(
    labels: PlacedLabels, own: np.ndarray, begin: np.ndarray, end: np.ndarray, rows: int
) -> np.ndarray:
    subject, begin, end = labels.subjects[own], begin[own], end[own]
    # Windows of one subject may overlap: each token is looked at once.
    begin = np.maximum(begin, np.concatenate([[0], np.maximum.accumulate(end)[:-1]])) if len(end) else begin
    length = np.maximum(end - begin, 0)
    counts = np.zeros(rows, np.int64)
    if not length.sum():
        return counts
    # A piece ends where a subject does.
    last = np.searchsorted(subject, subject, side="right") - 1
    piece = np.cumsum(length)[last] // _PIECE_TOKENS  # [labels]
    for start, stop in runs(piece):
        tokens = ragged_indices(begin[start:stop], length[start:stop])
        owner = np.repeat(subject[start:stop], length[start:stop])
        pairs = np.unique(owner * rows + labels.part.codes[tokens])
        counts += np.bincount(pairs % rows, minlength=rows)
    return counts


PRECISION = 0.95
"""Share of positives among the subjects with a code from which on it tells the outcome."""
LEAST_PRECISION = 0.8
"""Share that it must surely exceed; strong predictors that are no leakage come near it."""
LEAST_SUBJECTS = 5
"""Fewest positive subjects with the code."""
_ODDS = 10.0
_CHANCE = 0.01  # that any code of the vocabulary seems to tell the outcome though none does
_DOUBT = 0.05  # that a code's true share of positives is below LEAST_PRECISION
_NAMED = 5  # codes in a message


def suspected_codes(counts: CodeCounts) -> np.ndarray:
    """Codes whose presence alone seems to predict a positive label almost perfectly: bool ``[V]``.

    Of the subjects with such a code at least ``PRECISION`` are positive, their odds are ten times those
    of all, and by Chernoff's bound, corrected for the number of codes, it is not by chance.
    """
    seen = counts.positive + counts.negative  # [V]
    base = counts.positives / max(counts.positives + counts.negatives, 1)
    if not 0 < base < 1:
        return np.zeros(len(seen), bool)
    share = counts.positive / np.maximum(seen, 1)
    odds = (counts.positive + 0.5) / (counts.negative + 0.5)
    found = (share >= PRECISION) & (counts.positive >= LEAST_SUBJECTS)
    found &= odds >= _ODDS * base / (1 - base)
    found &= _evidence(share, seen, base) > np.log(len(seen) / _CHANCE)
    found[:FIRST_CODE] = False
    return found


def revealing_codes(counts: CodeCounts) -> np.ndarray:
    """Those of :func:`suspected_codes` that enough subjects have for their precision to be sure.

    By Chernoff's bound, the share of positives exceeds ``LEAST_PRECISION``: 14 positive subjects and no
    negative one will do.
    """
    seen = counts.positive + counts.negative  # [V]
    share = counts.positive / np.maximum(seen, 1)
    return suspected_codes(counts) & (_evidence(share, seen, LEAST_PRECISION) > np.log(1 / _DOUBT))


def _evidence(share: np.ndarray, seen: np.ndarray, expected: float) -> np.ndarray:
    """Nats by which ``share`` of ``seen``, ``[V]`` each, speaks for more than the expected share."""
    with np.errstate(divide="ignore", invalid="ignore"):
        other = np.where(share < 1, (1 - share) * np.log((1 - share) / (1 - expected)), 0)
        divergence = np.where(share > expected, share * np.log(share / expected) + other, 0)
    return seen * divergence


def _named(found: np.ndarray, counts: CodeCounts, names: tuple[str, ...]) -> str:
    """The codes with most positive subjects, with their figures."""
    rows = np.flatnonzero(found)
    rows = rows[np.argsort(-counts.positive[rows], kind="stable")]
    listed = [
        f"{names[row]} ({counts.positive[row]:,} positive and {counts.negative[row]:,} negative subjects "
        f"of {counts.positives:,} and {counts.negatives:,})"
        for row in rows[:_NAMED]
    ]
    return ", ".join(listed) + (f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else "")


def check_outcome(
    placed: Mapping[str, PlacedLabels],
    vocabulary: Vocabulary,
    outcome_codes: tuple[str, ...],
    horizon_days: float | None,
) -> Iterator[Finding]:
    """The codes that define the label: in the history, at the prediction time, and after a negative one."""
    if not outcome_codes:
        return
    is_outcome = matching_codes(vocabulary, outcome_codes, "--outcome_codes")
    if not is_outcome.any():
        yield Finding.info(
            "outcome-not-among-codes",
            f"No code of the vocabulary matches {', '.join(outcome_codes)}.",
            "The outcome itself is then no input, but repeats of it cannot be counted.",
            "None needed, unless a pattern is misspelt.",
        )
        return
    positives = history = exactly = negatives = contradicted = 0
    for labels in placed.values():
        if not len(labels):
            continue
        seen = np.concatenate([[0], np.cumsum(is_outcome[labels.part.codes])])  # [T + 1]
        positive = labels.values == 1
        end, before = labels.up_to(), labels.up_to(inclusive=False)
        positives += int(positive.sum())
        history += int(np.count_nonzero(positive & (seen[before] > seen[labels.starts])))
        exactly += int(np.count_nonzero(positive & (seen[end] > seen[before])))
        if horizon_days is not None:
            later = labels.up_to(int(horizon_days * DAY))
            negatives += int(np.count_nonzero(~positive))
            contradicted += int(np.count_nonzero(~positive & (seen[later] > seen[end])))
    if positives:
        yield Finding(
            "outcome-repeated",
            "warning" if history > positives / 2 else "info",
            f"In {history:,} of {positives:,} positive labels ({history / positives:.1%}) the subject had an "
            "outcome code before.",
            "Predicting a repeat is easy, and says little about new cases.",
            "Predict the first occurrence, or report new and repeated cases apart.",
        )
    if exactly:
        yield Finding.error(
            "outcome-at-prediction-time",
            f"{exactly:,} of {positives:,} positive labels have an outcome code at exactly the prediction "
            "time.",
            "The prediction time is inclusive, so the outcome is in the input.",
            "Set the prediction time before the outcome.",
        )
    if contradicted:
        yield Finding.error(
            "negative-with-outcome",
            f"{contradicted:,} of {negatives:,} negative labels are followed by an outcome code within "
            f"{horizon_days:g} days.",
            "The labels are wrong, or mean another horizon or other codes.",
            "Compute the labels again, or give the horizon and the codes that they were made with.",
        )

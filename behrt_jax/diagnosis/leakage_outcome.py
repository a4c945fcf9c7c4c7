"""Checks of the outcome: subjects that nobody followed, and the codes that define the label."""

from collections.abc import Iterator, Mapping

import numpy as np

from behrt_jax.data.visits import DAY
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.diagnosis.label_inputs import PlacedLabels
from behrt_jax.diagnosis.leakage_delays import matching_codes

MUCH_UNFOLLOWED = 0.1
"""Share of the negative labels without follow-up above which it is an error."""


def check_follow_up(
    placed: Mapping[str, PlacedLabels], horizon_days: float | None, stated: str | None = None
) -> Iterator[Finding]:
    """Negative labels of subjects who are not seen afterwards.

    Args:
        placed: binary labels.
        horizon_days: up to when they have to be seen; some time after the prediction where not given.
        stated: follow-up that the label table says it has, whatever is seen of a subject.
    """
    negatives = unfollowed = 0
    for labels in placed.values():
        negative = labels.values == 0
        if not negative.any():
            continue
        last = labels.part.times[labels.stops - 1]
        followed = last > labels.times
        if horizon_days is not None:
            followed = last >= labels.times + int(horizon_days * DAY)
        negatives += int(np.count_nonzero(negative))
        unfollowed += int(np.count_nonzero(negative & ~followed))
    if unfollowed:
        when = (
            "after the prediction time"
            if horizon_days is None
            else f"{horizon_days:g} days after the prediction time or later"
        )
        by_labels = "" if stated is None else f" (by the labels, follow-up goes on to {stated})"
        yield Finding(
            "negative-without-follow-up",
            "error" if unfollowed > MUCH_UNFOLLOWED * negatives and stated is None else "warning",
            f"{unfollowed:,} of {negatives:,} negative labels ({unfollowed / negatives:.1%}) are of subjects "
            f"without any event {when}{by_labels}.",
            "That nothing was recorded is no proof that nothing happened; the model learns who is not seen "
            "again. (Follow-up is seen by the selected codes alone, not by deaths or the end of the data.)",
            "Leave such labels out, or censor them; keep those where a death or discharge ends the follow-up "
            "by definition.",
        )


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
        yield Finding(
            "outcome-not-among-codes",
            "info",
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
        yield Finding(
            "outcome-at-prediction-time",
            "error",
            f"{exactly:,} of {positives:,} positive labels have an outcome code at exactly the prediction "
            "time.",
            "The prediction time is inclusive, so the outcome is in the input.",
            "Set the prediction time before the outcome.",
        )
    if contradicted:
        yield Finding(
            "negative-with-outcome",
            "error",
            f"{contradicted:,} of {negatives:,} negative labels are followed by an outcome code within "
            f"{horizon_days:g} days.",
            "The labels are wrong, or mean another horizon or other codes.",
            "Compute the labels again, or give the horizon and the codes that they were made with.",
        )

"""Checks of a label table beside prepared data: subjects, classes, times, delays and follow-up.

:func:`place_labels` finds each label's place in the history that it is predicted from; :func:`check_labels`
has the list of checks. Findings hold figures, no subject ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from behrt_jax.config.commands import DoctorConfig
from behrt_jax.data.events import DAY, SPLITS
from behrt_jax.data.examples import CodeDelays, code_delays, parse_delay
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.sorting import find_ids, place_in
from behrt_jax.data.vocabulary import Vocabulary, matching_codes
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject

NEVER = np.iinfo(np.int64).max
"""Time of a death that is not known."""


@dataclass(frozen=True, eq=False)
class Deaths:
    """Deaths of the subjects of all splits."""

    subject_ids: np.ndarray
    """int64 ``[deaths]``, ascending, none twice."""
    times: np.ndarray
    """int64 ``[deaths]``, microseconds since 1970; often the day alone."""

    def of(self, subject_ids: np.ndarray) -> np.ndarray:
        """The death of each subject, int64 like the ids; ``NEVER`` where none is known."""
        place = find_ids(self.subject_ids, subject_ids)
        found = np.full(len(subject_ids), NEVER)
        found[place >= 0] = self.times[place[place >= 0]]
        return found


NO_DEATHS = Deaths(np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True, eq=False)
class PlacedLabels:
    """The labels of one split's subjects, sorted by subject and prediction time."""

    part: Sequences
    """The split."""
    subjects: np.ndarray
    """int64 ``[labels]``, places in ``part``."""
    times: np.ndarray
    """int64 ``[labels]``, prediction times in microseconds since 1970."""
    values: np.ndarray
    """int64 ``[labels]``: 0 and 1 where the labels are binary, else a number of the value."""
    deaths: np.ndarray
    """int64 ``[labels]``, the subject's death in microseconds since 1970; ``NEVER`` where none is known."""

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def starts(self) -> np.ndarray:
        """First token of each label's subject, int64 ``[labels]``."""
        return self.part.offsets[self.subjects]

    @property
    def stops(self) -> np.ndarray:
        """One after the last token of each label's subject, int64 ``[labels]``."""
        return self.part.offsets[self.subjects + 1]

    def up_to(self, shift: int = 0, inclusive: bool = True) -> np.ndarray:
        """One after the last token at or before (or just before) prediction time + shift, ``[labels]``.

        From ``starts`` to ``up_to()`` is the input: the prediction time is inclusive. ``shift`` is in
        microseconds.
        """
        return place_in(self.part.times, self.starts, self.stops, self.times + shift, inclusive)


def place_labels(labels: Labels, data: SequenceSet, deaths: Deaths = NO_DEATHS) -> dict[str, PlacedLabels]:
    """Split name -> its labels; those of subjects without a sequence are left out."""
    positive = labels.positive()
    ids = labels.value_ids() if positive is None else positive
    died = deaths.of(labels.subject_ids)
    placed = {}
    for name in SPLITS:
        part = data.splits[name]
        place = find_ids(part.subject_ids, labels.subject_ids)
        known = place >= 0
        subjects = place[known]
        times, values = labels.times[known], ids[known].astype(np.int64)
        by_time = np.lexsort([values, times, subjects])
        placed[name] = PlacedLabels(
            part, subjects[by_time], times[by_time], values[by_time], died[known][by_time]
        )
    return placed


def check_labels(
    labels: Labels,
    data: SequenceSet,
    placed: Mapping[str, PlacedLabels],
    manifest: JsonObject,
    config: DoctorConfig,
    deaths: Deaths = NO_DEATHS,
) -> Iterator[Finding]:
    """Every check of labels, but those of the codes before and after them.

    The data are prepared, without separators, and the manifest is theirs.

    Raises:
        InputError: a delay whose pattern matches no code, or is no regular expression.
    """
    binary = labels.positive() is not None
    yield from check_subjects(labels, data)
    yield from check_rows(placed)
    yield from check_histories(labels, data, placed)
    yield from check_labels_after_death(labels, placed, deaths, data.vocabulary, config.death_codes)
    yield from check_classes(placed, binary)
    recorded = manifest.get("options", {}).get("delays", ())
    yield from check_delays(placed, data.vocabulary, config.delays or recorded, recorded)
    if binary:
        follow_up = labels.account.get("options", {}).get("follow_up")
        ends = {"subject": None, "data": "the last event of the data"}
        yield from check_follow_up(placed, config.horizon_days, ends.get(follow_up, follow_up))
    else:
        yield Finding.info(
            "labels-not-binary",
            f"The labels are {labels.kind}, so follow-up and codes that tell the outcome were not checked.",
            "These checks need a yes or no.",
            "Audit each class against the rest, as a table with boolean_value.",
        )


_SURE = 4.0
"""Standard errors between two prevalences that are not taken for chance."""


def check_subjects(labels: Labels, data: SequenceSet) -> Iterator[Finding]:
    """Subjects that the data do not know, and ids that went through a smaller type."""
    known = np.concatenate([data.subject_ids(name) for name in SPLITS])
    distinct = np.unique(labels.subject_ids)
    unknown = np.setdiff1d(distinct, known)
    if not len(unknown):
        return
    rounded = known.astype(np.float64)
    with np.errstate(invalid="ignore"):
        damaged = [rounded[rounded < 2.0**63].astype(np.int64), known.astype(np.int32).astype(np.int64)]
    corrupt = max(int(np.isin(unknown, np.setdiff1d(ids, known)).sum()) for ids in damaged)
    if corrupt:
        yield Finding.error(
            "label-ids-damaged",
            f"{corrupt:,} subjects of the labels are not in the data, but their ids are what ids of the "
            "data become as 64-bit floats or 32-bit integers.",
            "Such ids belong to nobody, or to somebody else.",
            "Write the labels again with ids as 64-bit integers all the way.",
        )
    without = sum(data.subjects_without_events.values())
    yield Finding(
        "label-subject-unknown",
        "error" if len(unknown) == len(distinct) else "warning",
        f"{len(unknown):,} of {len(distinct):,} subjects of the labels have neither a history nor a birth in "
        f"the data ({without:,} subjects of the data have none of the selected codes).",
        "Their labels are not used.",
        "Give the labels of this data set; select more codes where the histories are empty.",
    )


def check_rows(placed: Mapping[str, PlacedLabels]) -> Iterator[Finding]:
    """Labels that come twice, equal or contradictory."""
    equal = contradictory = 0
    for labels in placed.values():
        same = (np.diff(labels.subjects) == 0) & (np.diff(labels.times) == 0)
        alike = np.diff(labels.values) == 0
        equal += int(np.count_nonzero(same & alike))
        contradictory += int(np.count_nonzero(same & ~alike))
    if contradictory:
        yield Finding.error(
            "label-contradictory",
            f"{contradictory:,} labels have the subject and prediction time of another, but another value.",
            "No model can be right on both.",
            "Keep one label for each subject and prediction time.",
        )
    if equal:
        yield Finding.warning(
            "label-duplicate",
            f"{equal:,} labels repeat the subject, prediction time and value of another.",
            "They count twice in training and in the metrics.",
            "Leave the repeats out.",
        )


def check_histories(
    labels: Labels, data: SequenceSet, placed: Mapping[str, PlacedLabels]
) -> Iterator[Finding]:
    """Prediction times before birth, and labels without any event up to the prediction time."""
    total = unborn = empty = 0
    for of_split in placed.values():
        if not len(of_split):
            continue
        first = of_split.starts
        before = of_split.times < of_split.part.births(of_split.subjects) - DAY
        total += len(of_split)
        unborn += int(np.count_nonzero(before))
        empty += int(np.count_nonzero((of_split.up_to() == first) & ~before))
    for born in data.births.values():  # of subjects without any event
        place = find_ids(born.subject_ids, labels.subject_ids)
        own = place >= 0
        before = labels.times[own] < born.times[place[own]] - DAY
        total += len(before)
        unborn += int(np.count_nonzero(before))
        empty += int(np.count_nonzero(~before))
    if unborn:
        yield Finding.error(
            "label-before-birth",
            f"{unborn:,} of {total:,} labels have a prediction time before the subject's birth.",
            "The prediction times are wrong: another unit, clock or subject.",
            "Compute the prediction times from the events of the same data set.",
        )
    if empty:
        yield Finding.warning(
            "label-without-history",
            f"{empty:,} of {total:,} labels have no event at or before their prediction time.",
            "Nothing is known then, and the model sees an empty input.",
            "Leave these labels out, predict later, or select more codes.",
        )


def check_labels_after_death(
    labels: Labels,
    placed: Mapping[str, PlacedLabels],
    deaths: Deaths,
    vocabulary: Vocabulary,
    death_codes: tuple[str, ...],
) -> Iterator[Finding]:
    """Prediction times on a later day than the death, as the data know it or as a code of death says."""
    died = deaths.of(labels.subject_ids)
    # Of a subject whose death the data know, a code of death says nothing more.
    late = int(np.count_nonzero((died < NEVER) & (labels.times // DAY > died // DAY)))
    is_death = matching_codes(vocabulary, death_codes, "--death_codes")
    for of_split in placed.values():
        if not len(of_split):
            continue
        at = np.where(is_death[of_split.part.codes], of_split.part.times, NEVER)
        first = np.minimum.reduceat(at, of_split.part.offsets[:-1])[of_split.subjects]
        late += int(
            np.count_nonzero(
                (of_split.deaths == NEVER) & (first < NEVER) & (of_split.times // DAY > first // DAY)
            )
        )
    if late:
        yield Finding.error(
            "label-after-death",
            f"{late:,} of {len(labels):,} labels have a prediction time on a later day than the subject's "
            "death.",
            "Nothing can be predicted for the dead, and such labels are negative by their nature.",
            "Leave these labels out, or mend the deaths or the prediction times.",
        )


def check_classes(placed: Mapping[str, PlacedLabels], binary: bool) -> Iterator[Finding]:
    """Labels of one class, splits without labels, and prevalences that differ."""
    present = {name: labels for name, labels in placed.items() if len(labels)}
    figures = [f"{name}: {len(labels):,}" for name, labels in placed.items()]
    if binary:
        for place, labels in enumerate(placed.values()):
            figures[place] += f" labels of {len(np.unique(labels.subjects)):,} subjects"
            figures[place] += f", {labels.values.mean():.1%} positive" if len(labels) else ""
    yield Finding.info(
        "labels-by-split",
        f"Labels with a history in the data: {'; '.join(figures)}.",
        "Labels are trained and tested on by the split of their subject.",
        "None needed.",
    )
    missing = [name for name in SPLITS if not len(placed[name]) and len(placed[name].part)]
    if missing and present:
        yield Finding.warning(
            "split-without-labels",
            f"No label is of a subject of {' or '.join(missing)}; labels are only in {', '.join(present)}.",
            "Without them nothing can be trained, chosen or tested.",
            "Label subjects of all splits.",
        )
    classes = np.unique(np.concatenate([np.unique(labels.values) for labels in placed.values()]))
    if present and len(classes) == 1:
        yield Finding.error(
            "labels-of-one-class",
            "All labels have the same value.",
            "Nothing can be learned, and AUROC is not defined.",
            "Mend the definition of the label: both outcomes must occur.",
        )
        return
    for name, labels in present.items():
        if len(np.unique(labels.values)) == 1:
            yield Finding(
                "split-of-one-class",
                "error" if name == "train" else "warning",
                f"All {len(labels):,} labels of {name} have the same value.",
                "AUROC is not defined there." if name != "train" else "Nothing can be learned from them.",
                "Label more subjects of this split, or split the subjects anew.",
            )
    if binary:
        yield from _prevalences(present)


def _prevalences(placed: Mapping[str, PlacedLabels]) -> Iterator[Finding]:
    """Each split against train, by subject: several labels of one are not independent."""
    figures = {}
    for name, labels in placed.items():
        own = np.unique(labels.subjects, return_inverse=True)[1]
        shares = np.bincount(own, labels.values) / np.bincount(own)  # [subjects]
        figures[name] = (float(shares.mean()), len(shares))
    if "train" not in figures:
        return
    share, count = figures["train"]
    for name in ("tuning", "held_out"):
        if name not in figures:
            continue
        other, others = figures[name]
        pooled = (share * count + other * others) / (count + others)
        error = np.sqrt(pooled * (1 - pooled) * (1 / count + 1 / others))  # at most, for shares in [0, 1]
        if abs(other - share) > _SURE * error:
            yield Finding.warning(
                "prevalence-differs",
                f"{other:.1%} of the labels of a subject of {name} are positive on average, but {share:.1%} "
                "in train, which is more than chance.",
                "The splits were not drawn alike, so thresholds and calibration do not carry over.",
                "Split the subjects at random, or label all splits by the same rule.",
            )


def check_delays(
    placed: Mapping[str, PlacedLabels],
    vocabulary: Vocabulary,
    delays: Sequence[str],
    recorded: Sequence[str] = (),
) -> Iterator[Finding]:
    """Events up to the prediction time that were not known yet then, by the delays to check.

    Prediction keeps to the recorded ones, of the data's manifest; they may match no code.
    """
    for option in delays:
        pattern, days = parse_delay(option)
        chosen = matching_codes(vocabulary, (pattern,), "--delays")
        if not chosen.any() and option not in recorded:
            raise InputError(f"--delays has {pattern!r}, but no code of the vocabulary matches: mend it.")
        early = total = affected = count = 0
        for labels in placed.values():
            events, unknown = _unknown(labels, chosen, code_delays(vocabulary, (option,)))
            total += int(events.sum())
            early += int(unknown.sum())
            affected += int(np.count_nonzero(unknown))
            count += len(labels)
        known_at = "at the end of the visit" if days is None else f"{days:g} days later"
        if early and option in recorded:
            yield Finding.info(
                "kept-until-known",
                f"{early:,} of {total:,} events of {pattern} up to the prediction times of {affected:,} of "
                f"{count:,} labels are only known {known_at}, as the data's manifest says.",
                "Fine-tuning and prediction do not show them to the model.",
                "None needed; whatever else reads the events must leave them out too.",
            )
        elif early:
            yield Finding.error(
                "not-yet-known",
                f"{early:,} of {total:,} events of {pattern} in the inputs of {affected:,} of {count:,} "
                f"labels are only known {known_at}, which is after the prediction time.",
                "In use the model will not have them.",
                "Predict later, or give the delay to prepare, so that predictions keep to it.",
            )


def _unknown(labels: PlacedLabels, chosen: np.ndarray, delays: CodeDelays) -> tuple[np.ndarray, np.ndarray]:
    """Events of chosen codes in each input, and those that are not known yet: int64 ``[labels]`` each."""
    part = labels.part
    rows = np.flatnonzero(chosen[part.codes])
    if not len(rows):
        return np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
    subject = np.repeat(np.arange(len(part)), part.lengths)[rows]
    known_at = delays.known_at(part, np.arange(len(part)))[rows]
    known_at = known_at[np.lexsort([known_at, subject])]
    starts = np.searchsorted(subject, labels.subjects)
    stops = np.searchsorted(subject, labels.subjects, side="right")
    recorded = place_in(part.times[rows], starts, stops, labels.times, inclusive=True) - starts
    known = place_in(known_at, starts, stops, labels.times, inclusive=True) - starts
    return recorded, recorded - known


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
        after = 1 if horizon_days is None else int(horizon_days * DAY)
        # Nothing happens after a death: where one is known, all is known.
        followed = (last >= labels.times + after) | (labels.deaths < NEVER)
        negatives += int(np.count_nonzero(negative))
        unfollowed += int(np.count_nonzero(negative & ~followed))
    if unfollowed:
        when = "after the prediction time"
        if horizon_days is not None:
            when = f"{horizon_days:g} days {when} or later"
        by_labels = "" if stated is None else f" (by the labels, follow-up goes on to {stated})"
        yield Finding(
            "negative-without-follow-up",
            # A table that says until when its subjects are followed has been made by that rule.
            "info" if stated else "error" if unfollowed > MUCH_UNFOLLOWED * negatives else "warning",
            f"{unfollowed:,} of {negatives:,} negative labels ({unfollowed / negatives:.1%}) are of subjects "
            f"without any event or death {when}{by_labels}.",
            "That nothing was recorded is no proof that nothing happened; the model learns who is not seen "
            "again. (Follow-up is seen by the selected codes and by deaths, not by the end of the data, "
            "which says nothing where dates are shifted by subject.)",
            "Leave such labels out, or censor them; keep those where a discharge ends the follow-up by "
            "definition.",
        )

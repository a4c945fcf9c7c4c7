"""Checks of a label table beside prepared data: subjects, classes, times and follow-up."""

from collections.abc import Iterator, Mapping

import numpy as np

from behrt_jax.data.events import SPLITS
from behrt_jax.data.labels import Labels
from behrt_jax.data.places import find_subjects
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.visits import DAY
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.diagnosis.label_inputs import PlacedLabels

_SURE = 4.0
"""Standard errors between two prevalences that are not taken for chance."""
_YEAR = 365.25 * DAY


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
        yield Finding(
            "label-ids-damaged",
            "error",
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
        yield Finding(
            "label-contradictory",
            "error",
            f"{contradictory:,} labels have the subject and prediction time of another, but another value.",
            "No model can be right on both.",
            "Keep one label for each subject and prediction time.",
        )
    if equal:
        yield Finding(
            "label-duplicate",
            "warning",
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
        births = of_split.part.times[first] - of_split.part.ages[first].astype(np.float64) * _YEAR
        before = of_split.times < births - DAY
        total += len(of_split)
        unborn += int(np.count_nonzero(before))
        empty += int(np.count_nonzero((of_split.up_to() == first) & ~before))
    for born in data.births.values():  # of subjects without any event
        place = find_subjects(born.subject_ids, labels.subject_ids)
        own = place >= 0
        before = labels.times[own] < born.times[place[own]] - DAY
        total += len(before)
        unborn += int(np.count_nonzero(before))
        empty += int(np.count_nonzero(~before))
    if unborn:
        yield Finding(
            "label-before-birth",
            "error",
            f"{unborn:,} of {total:,} labels have a prediction time before the subject's birth.",
            "The prediction times are wrong: another unit, clock or subject.",
            "Compute the prediction times from the events of the same data set.",
        )
    if empty:
        yield Finding(
            "label-without-history",
            "warning",
            f"{empty:,} of {total:,} labels have no event at or before their prediction time.",
            "Nothing is known then, and the model sees an empty input.",
            "Leave these labels out, predict later, or select more codes.",
        )


def check_classes(placed: Mapping[str, PlacedLabels], binary: bool) -> Iterator[Finding]:
    """Labels of one class, splits without labels, and prevalences that differ."""
    present = {name: labels for name, labels in placed.items() if len(labels)}
    figures = [f"{name}: {len(labels):,}" for name, labels in placed.items()]
    if binary:
        figures = [
            f"{name}: {len(labels):,} labels of {len(np.unique(labels.subjects)):,} subjects"
            + (f", {labels.values.mean():.1%} positive" if len(labels) else "")
            for name, labels in placed.items()
        ]
    yield Finding(
        "labels-by-split",
        "info",
        f"Labels with a history in the data: {'; '.join(figures)}.",
        "Labels are trained and tested on by the split of their subject.",
        "None needed.",
    )
    missing = [name for name in SPLITS if not len(placed[name]) and len(placed[name].part)]
    if missing and present:
        yield Finding(
            "split-without-labels",
            "warning",
            f"No label is of a subject of {' or '.join(missing)}; labels are only in {', '.join(present)}.",
            "Without them nothing can be trained, chosen or tested.",
            "Label subjects of all splits.",
        )
    classes = np.unique(np.concatenate([np.unique(labels.values) for labels in placed.values()]))
    if present and len(classes) == 1:
        yield Finding(
            "labels-of-one-class",
            "error",
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
            yield Finding(
                "prevalence-differs",
                "warning",
                f"{other:.1%} of the labels of a subject of {name} are positive on average, but {share:.1%} "
                "in train, which is more than chance.",
                "The splits were not drawn alike, so thresholds and calibration do not carry over.",
                "Split the subjects at random, or label all splits by the same rule.",
            )

"""Checks of prepared data for leakage between splits: subjects, vocabulary and quantiles."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from behrt_jax.data.events import SPLITS
from behrt_jax.data.filtering import REPEATS
from behrt_jax.data.sequences import SequenceSet, set_fingerprint
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.diagnosis.finding import Finding

FIRST_CODE = len(SPECIAL_TOKENS)
_LEAST_PER_BIN = 20
"""Fewest events per quantile bin for which its share is judged."""
_UNIONS = (("train",), ("train", "tuning"), ("train", "held_out"), SPLITS)
"""What quantiles may have been fitted on; the first is right."""


def check_splits(data: SequenceSet, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Files changed after they were prepared, and subjects in two splits or twice in one."""
    if set_fingerprint(data.vocabulary, data.splits) != data.fingerprint:
        yield Finding(
            "changed-since-prepared",
            "error",
            "The sequences are not those whose fingerprint is in the manifest.",
            "Runs that name this fingerprint were trained on other data.",
            "Run prepare again, into a new folder.",
        )
    ids = {name: np.unique(part.subject_ids) for name, part in data.splits.items()}
    together = np.concatenate([ids[name] for name in SPLITS])
    shared = int(np.count_nonzero(np.unique(together, return_counts=True)[1] > 1))
    if shared:
        yield Finding(
            "subject-in-two-splits",
            "error",
            f"{shared:,} of {len(np.unique(together)):,} subjects are in more than one split.",
            "A model is tested on subjects that it was trained on.",
            "Split by subject, not by visit or by file, and run prepare again.",
        )
    twice = sum(len(part) - len(ids[name]) for name, part in data.splits.items())
    if twice:
        yield Finding(
            "subject-twice-in-split",
            "error",
            f"{twice:,} subjects come again in the same split, with a history of their own.",
            "Their events are counted several times, and each history lacks what the other knows.",
            "Join the records of a subject before preparing them.",
        )


def check_vocabulary(data: SequenceSet, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Recount the vocabulary in the train split."""
    vocabulary = data.vocabulary
    by_split = code_counts(data)
    train = by_split["train"]
    everywhere = np.sum(list(by_split.values()), axis=0)  # [V]
    codes = slice(FIRST_CODE, None)
    least = int(manifest.get("options", {}).get("min_count", 1))
    unseen = int(np.count_nonzero(train[codes] == 0))
    rare = int(np.count_nonzero(train[codes] < least)) - unseen
    wrong = int(np.count_nonzero(vocabulary.counts[FIRST_CODE - 3 :] != train[FIRST_CODE - 3 :]))
    beyond = wrong > 0 and np.array_equal(vocabulary.counts[codes], everywhere[codes])
    if unseen or rare or beyond:
        reasons = [
            *([f"{unseen:,} codes have a row but no event in the train split"] if unseen else []),
            *([f"{rare:,} have fewer than {least} events there, the least for a row"] if rare else []),
            *(["the counts kept with the codes are those of all splits together"] if beyond else []),
        ]
        yield Finding(
            "vocabulary-beyond-train",
            "error",
            f"Of {len(vocabulary) - FIRST_CODE:,} codes: {'; '.join(reasons)}.",
            "The choice of codes knows the tuning and held_out subjects, so results on them are too good.",
            "Fit the vocabulary on the train split alone: run prepare again.",
        )
    elif wrong:
        yield Finding(
            "vocabulary-counts-wrong",
            "error",
            f"The counts of {wrong:,} rows of the vocabulary are not those of the train split.",
            "The unigram baseline and the frequency bands are computed from them.",
            "Run prepare again, into a new folder.",
        )


def check_quantiles(data: SequenceSet, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether quantile bins are of equal size in the train split, rather than with other splits added.

    Bins fitted on the train split divide its events evenly but for rounding, and the events of more splits
    only about so; bins fitted on more the other way round. The distance from an even division is
    Pearson's chi-square. Where values are tied, drawn (see `values.SAMPLE`) or dropped as duplicates,
    no division is even, and nothing can be told.
    """
    edges: Mapping[str, list[float]] = manifest.get("value_edges", {})
    if not edges:
        return
    by_split = code_counts(data)
    fitted_on = np.array([sum(by_split[name] for name in names) for names in _UNIONS])  # [unions, V]
    options = manifest.get("options", {})
    least = int(options.get("min_count", 1))
    place = {code: row for row, code in enumerate(data.vocabulary.codes)}
    distances, rounding, judged, few = np.zeros(len(_UNIONS)), 0.0, 0, 0
    for code, ends in edges.items():
        bins = len(ends) + 1
        rows = [
            [place[name] for name in (base, *(f"{base}{again}" for again in REPEATS)) if name in place]
            for base in (f"{code}//Q{number + 1}" for number in range(bins))
        ]
        sizes = np.stack([fitted_on[:, row].sum(axis=1) for row in rows], axis=1)  # [unions, bins]
        lost = sum(not row for row in rows)  # bins too rare for a row
        if options.get("duplicates") == "keep":
            few += int(sizes[0].sum() + lost * (least - 1) < bins * least)
        if lost or sizes[0].sum() < _LEAST_PER_BIN * bins:
            continue
        even = sizes.sum(axis=1, keepdims=True) / bins
        distances += ((sizes - even) ** 2 / even).sum(axis=1)
        rounding += bins / float(even.min())  # each bin off by one
        judged += 1
    best = int(np.argmin(distances))
    if few or (judged and distances[best] <= rounding < distances[0] and distances[0] > 4 * distances[best]):
        seen = (
            f"{few:,} codes have bins but too few events in the train split to fit any."
            if few
            else f"The bins of {judged:,} codes divide the events of {' and '.join(_UNIONS[best])} evenly "
            f"(chi-square {distances[best]:.2f}), but not those of train alone ({distances[0]:.2f})."
        )
        yield Finding(
            "quantiles-beyond-train",
            "error",
            seen,
            "Values of tuning and held_out subjects decided what the codes mean.",
            "Fit the quantiles on the train split alone: run prepare again.",
        )
    elif not judged or distances[0] > rounding:
        yield Finding(
            "quantiles-not-recounted",
            "info",
            f"Where the bins of {len(edges):,} codes were fitted cannot be told: tied or repeated values, "
            "samples or too few events leave them uneven in every split.",
            "Bins must be fitted on the train split alone.",
            "None needed where prepare wrote the data.",
        )


def code_counts(data: SequenceSet) -> dict[str, np.ndarray]:
    """Split -> events of each vocabulary row, int64 ``[V]``."""
    return {
        name: np.bincount(part.codes, minlength=len(data.vocabulary)) for name, part in data.splits.items()
    }

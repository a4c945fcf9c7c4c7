"""From the events of one partition to the sequences of its subjects, by split."""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from behrt_jax.config import PrepareConfig
from behrt_jax.data.event_columns import EventColumns
from behrt_jax.data.events import SPLITS, EventCounts
from behrt_jax.data.filtering import Duplicates, apply_rules, count_repeated, select_columns
from behrt_jax.data.partitions import code_lookups, load_partition
from behrt_jax.data.selection import CodeChoice, matches
from behrt_jax.data.sequences import ages_in_years
from behrt_jax.data.spill import Spill
from behrt_jax.data.splits import split_index
from behrt_jax.data.subject_facts import SubjectFacts, subject_facts
from behrt_jax.data.values import ValueBins, ValueSample

ENCODERS = min(4, os.cpu_count() or 1)
"""Threads that encode partitions."""

SplitOf = Callable[[np.ndarray], np.ndarray]
"""From subjects, int64 ``[n]`` ascending, to the place of their split in `events.SPLITS`, int8 ``[n]``; -1
where a subject has none."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The sequences of one partition, with codes that are not vocabulary ids yet."""

    parts: dict[str, tuple[np.ndarray, ...]]
    """Split -> subject ids and lengths ``[subjects]``, codes, ages, visits and times ``[events]``, as in
    `Sequences`, but that codes are places in ``names``."""
    names: tuple[str, ...]
    """Codes; the same object in many partitions."""
    events: dict[str, np.ndarray]
    """Split -> events of each code, int64 ``[names]``."""
    counts: EventCounts
    facts: dict[str, SubjectFacts]
    """By split."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """A source's events on their way to sequences, partition by partition, subjects ascending.

    Everything but the bins is only known once the partitions are exhausted.
    """

    partitions: Iterator[Encoded]
    counts: EventCounts
    """Of the reading; the partitions have those of the rules."""
    prefixes: Callable[[], Mapping[str, int]]
    """Start of a code, up to the first ``//`` -> events read, markers aside."""
    splits: Callable[[], dict[str, np.ndarray]]
    """Split -> int64 ids of its subjects, ascending, those without events included."""
    bins: ValueBins | None = None


def add_counts(counts: EventCounts, more: EventCounts) -> None:
    """Add one account of events to another."""
    counts.read += more.read
    for rule, events in more.dropped.items():
        counts.drop(rule, events)
    for rule, events in more.changed.items():
        counts.change(rule, events)


def encode_events(
    events: EventColumns,
    values: np.ndarray | None,
    bins: ValueBins | None,
    split_of: SplitOf,
    choice: CodeChoice,
    duplicates: Duplicates,
) -> Encoded:
    """Apply the rules of `filtering.select_events` to whole subjects, and deal them out to the splits.

    Args:
        events: all events of these subjects.
        values: float32 ``[events]``, NaN where null, where they were kept.
        bins: of numeric values, if they are asked for.
        split_of: gives the subjects' splits.
        choice: which codes become tokens, and which are static facts.
        duplicates: what becomes of a code that comes again in a visit.
    """
    counts = EventCounts()
    recorded = events
    wanted = chosen_codes(choice.tokens, tuple(events.names))
    is_bin = None
    if bins is not None and values is not None:
        tokens = {name for name, chosen in zip(events.names, wanted.tolist(), strict=True) if chosen}
        events, is_bin = bins.apply(events, values)
        wanted = is_bin | np.array([name in tokens for name in events.names])
    selected = select_columns(events, wanted, duplicates, counts)
    ages = ages_in_years(selected)
    split = split_of(selected.subject_ids)  # [S]
    lengths = np.diff(selected.offsets)
    counts.drop("subject in no split", int(lengths[split < 0].sum()))
    parts, by_code = {}, {}
    columns = selected.codes, ages, selected.visits, selected.times
    for index, name in enumerate(SPLITS):
        chosen = split == index
        if chosen.all():
            parts[name] = (selected.subject_ids, lengths, *columns)
        else:
            tokens = np.repeat(chosen, lengths)  # [N]
            rows = (column[tokens] for column in columns)
            parts[name] = (selected.subject_ids[chosen], lengths[chosen], *rows)
        by_code[name] = np.bincount(parts[name][2], minlength=len(selected.names))
        if duplicates == "count":
            count_repeated(parts[name][2], len(events.names), counts)
    if is_bin is not None:
        binned = np.resize(is_bin, len(selected.names))  # names with a count come in the same order
        changed = sum(int(found[binned].sum()) for found in by_code.values())
        counts.change("value -> quantile bin", changed)
    static = chosen_codes(choice.static, tuple(recorded.names))
    facts = subject_facts(recorded, static, selected.without_events, split_of)
    return Encoded(parts, selected.names, by_code, counts, facts)


@functools.lru_cache(maxsize=4)  # the names are the same in many partitions
def chosen_codes(choose: Callable[[Sequence[str]], np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """Bool ``[names]``, as ``choose`` gives it; to be left as it is."""
    return choose(names)


def encode_all(encode: Callable[[Any], Encoded], partitions: Iterable[Any]) -> Iterator[Encoded]:
    """Encode partitions in threads, with one more of them in memory than there are threads."""
    with ThreadPoolExecutor(ENCODERS) as pool:
        waiting = deque()
        for partition in partitions:
            waiting.append(pool.submit(encode, partition))
            if len(waiting) == ENCODERS + 1:  # one more, while the caller takes the one that is done
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fit_values(
    spills: Sequence[Spill],
    partitions: Sequence[range],
    names: Sequence[str],
    train: np.ndarray,
    choice: CodeChoice,
    config: PrepareConfig,
) -> ValueBins:
    """Fit quantile bins on the events of train subjects that the rules keep, duplicates included.

    A code has bins if each of them can be expected to reach ``min_count``.

    Args:
        spills: all shards.
        partitions: buckets of each partition.
        names: all codes, ascending.
        train: int64 ids of the train split, ascending.
        choice: which codes become tokens.
        config: its ``value_codes``, ``value_bins`` and ``min_count`` are read.
    """
    lookups = code_lookups(spills, names)
    sample = ValueSample(names, choice.tokens(names) & matches(names, config.value_codes, "value_codes"))
    for buckets in partitions:
        events, values = load_partition(spills, buckets, names, lookups)
        if values is None:
            continue
        subjects, _, kept = apply_rules(events, None, EventCounts(), also=[values])
        subject, time, *_, code, value = kept
        own = split_listed({"train": train})(subjects) == 0  # [S]
        rows = own[subject]
        sample.add(subjects[subject[rows]], time[rows], code[rows], value[rows])
    return sample.fit(config.value_bins, config.value_bins * config.min_count)


def split_listed(splits: Mapping[str, np.ndarray]) -> SplitOf:
    """Splits as listed: name -> int64 ids, ascending."""

    def split_of(ids: np.ndarray) -> np.ndarray:
        if not len(ids):
            return np.empty(0, np.int8)
        near = {
            name: listed[np.searchsorted(listed, ids[0]) : np.searchsorted(listed, ids[-1], side="right")]
            for name, listed in splits.items()
        }
        return split_index(ids, near)

    return split_of

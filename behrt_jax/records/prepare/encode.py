"""From the events of one partition to the sequences of its subjects, by split.

Input in any order comes from spill files; input whose subjects ascend is encoded while it is read.
"""

import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa

from behrt_jax.config.data import PrepareConfig
from behrt_jax.data import event_rules
from behrt_jax.data.events import SPLITS, EventColumns, EventCounts
from behrt_jax.data.facts import SubjectFacts, subject_facts
from behrt_jax.data.lives import LifeRules
from behrt_jax.data.sequences import ages_in_years
from behrt_jax.data.sorting import ascending, distinct
from behrt_jax.data.splits import check_disjoint, hash_split_index, hash_splits, split_index
from behrt_jax.records.prepare import spill
from behrt_jax.records.sources.source import Source

ENCODERS = min(4, os.cpu_count() or 1)
"""Threads that encode partitions."""

P = TypeVar("P")
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
    """Start of a code, of `event_rules.code_prefix` -> events read, markers aside."""
    names: Callable[[], Sequence[str]]
    """All codes read."""
    splits: Callable[[], dict[str, np.ndarray]]
    """Split -> int64 ids of its subjects, ascending, those without events included."""
    bins: event_rules.ValueBins | None = None


@dataclass(frozen=True, eq=False)
class EncodingRules:
    """Rules by which the events of whole subjects become sequences."""

    choice: event_rules.CodeChoice
    """The codes that become tokens, and those that are static facts."""
    duplicates: event_rules.Duplicates
    """Treatment of a code that comes again in a visit."""
    life: LifeRules
    """Treatment of ages that are unknown or cannot be."""
    split_of: SplitOf
    """Gives the subjects' splits."""
    bins: event_rules.ValueBins | None = None
    """Of numeric values, if they are asked for."""

    def encode(self, events: EventColumns, values: np.ndarray | None) -> Encoded:
        """Apply the rules of `event_rules.select_events` to all events of some subjects, and deal them out
        to the splits; values are float32 ``[events]``, NaN where null, where they were kept.
        """
        counts = EventCounts()
        recorded = events
        wanted = tokens = chosen_codes(self.choice.tokens, tuple(events.names))
        is_bin = None
        if self.bins is not None and values is not None:
            named = {name for name, chosen in zip(events.names, wanted.tolist(), strict=True) if chosen}
            events, is_bin = self.bins.apply(events, values)
            wanted = is_bin | np.array([name in named for name in events.names])
        selected = event_rules.select_columns(events, wanted, self.duplicates, counts, self.life)
        ages = ages_in_years(selected)
        split = self.split_of(selected.subject_ids)  # [S]
        lengths = np.diff(selected.offsets)
        counts.drop("subject in no split", int(lengths[split < 0].sum()))
        parts, by_code = {}, {}
        columns = selected.codes, ages, selected.visits, selected.times
        for index, name in enumerate(SPLITS):
            chosen = split == index
            if chosen.all():
                parts[name] = (selected.subject_ids, lengths, *columns)
            else:
                of_chosen = np.repeat(chosen, lengths)  # [N]
                rows = (column[of_chosen] for column in columns)
                parts[name] = (selected.subject_ids[chosen], lengths[chosen], *rows)
            by_code[name] = np.bincount(parts[name][2], minlength=len(selected.names))
            if self.duplicates == "count":
                event_rules.count_repeated(parts[name][2], len(events.names), counts)
        if is_bin is not None:
            binned = np.resize(is_bin, len(selected.names))  # names with a count come in the same order
            changed = sum(int(found[binned].sum()) for found in by_code.values())
            counts.change("value -> quantile bin", changed)
        static = chosen_codes(self.choice.static, tuple(recorded.names))
        facts = subject_facts(recorded, static, selected, self.split_of, tokens, counts)
        return Encoded(parts, selected.names, by_code, counts, facts)


def life_rules(config: PrepareConfig) -> LifeRules:
    """As the options have them."""
    return LifeRules(config.without_birth, config.implausible_ages)


@functools.lru_cache(maxsize=4)  # the names are the same in many partitions
def chosen_codes(choose: Callable[[Sequence[str]], np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """Bool ``[names]``, as ``choose`` gives it; to be left as it is."""
    return choose(names)


def encode_all(encode: Callable[[P], Encoded], partitions: Iterable[P]) -> Iterator[Encoded]:
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
    partitions: spill.Partitions, train: np.ndarray, rules: EncodingRules, bins: int, min_count: int
) -> event_rules.ValueBins:
    """Fit quantile bins on the events of train subjects that the rules keep, duplicates included.

    A code has ``bins`` of them if each can be expected to reach ``min_count`` events. ``train`` are int64
    ids, ascending.
    """
    names, choice = partitions.names, rules.choice
    tokens = choice.tokens(names)
    sample = event_rules.ValueSample(
        names, tokens & event_rules.matches(names, choice.value_codes, "value_codes")
    )
    split_of = split_listed({"train": train})
    for buckets in partitions.buckets:
        events, values = partitions.load(buckets)
        if values is None:
            continue
        subjects, *_, kept = event_rules.apply_rules(events, tokens, EventCounts(), rules.life, [values])
        subject, time, *_, code, value = kept
        rows = (split_of(subjects) == 0)[subject]
        sample.add(subjects[subject[rows]], time[rows], code[rows], value[rows])
    return sample.fit(bins, bins * min_count)


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


# Encoding by way of spill files: for input in any order, of any number of shards.


def encode_spills(
    source: Source,
    spills: Sequence[spill.Spill],
    choice: event_rules.CodeChoice,
    config: PrepareConfig,
    most: int,
    told: spill.Told,
    bins: event_rules.ValueBins | None = None,
) -> Encoding:
    """Load the partitions of spill files, of ``most`` events, encode them, and tell how many are done.

    The source's splits are read, and it learns what other processes have read. Bins of values are fitted
    where none are given.

    Raises:
        InputError: splits that share subjects, or a split by hash with a train or tuning split without any.
    """
    counts, prefixes = EventCounts(), Counter()
    for shard in spills:
        spill.add_counts(counts, shard.counts)
        prefixes.update(shard.prefixes)
        source.learn(shard.learned)
    splits = own_splits(source)
    if splits is None:
        subjects = np.concatenate([shard.subjects() for shard in spills])
        splits = split_by_hash(subjects, config)
    partitions = spill.Partitions(spills, most)
    rules = EncodingRules(choice, config.duplicates, life_rules(config), split_listed(splits))
    if config.value_codes:
        if bins is None:
            bins = fit_values(partitions, splits["train"], rules, config.value_bins, config.min_count)
        rules = replace(rules, bins=bins)

    def encoded() -> Iterator[Encoded]:
        load_and_encode = lambda buckets: rules.encode(*partitions.load(buckets))  # noqa: E731
        for done, partition in enumerate(encode_all(load_and_encode, partitions.buckets), start=1):
            yield partition
            told(done, len(partitions.buckets))

    return Encoding(encoded(), counts, lambda: prefixes, lambda: partitions.names, lambda: splits, rules.bins)


def own_splits(source: Source) -> dict[str, np.ndarray] | None:
    """The source's splits, ascending, all three names; None where it has none of its own.

    Raises:
        InputError: a subject is in two of them.
    """
    splits: Mapping[str, np.ndarray] = source.splits()
    if not splits:
        return None
    check_disjoint(splits, f"The {source.name} source")
    return {name: distinct(np.asarray(splits.get(name, ()), np.int64)) for name in SPLITS}


def split_by_hash(subjects: np.ndarray, config: PrepareConfig) -> dict[str, np.ndarray]:
    """See `splits.hash_splits`."""
    # Of other subjects a split may be empty, and all go to one where no shares are given.
    like, exact = config.like is not None, config.splits.exact and config.shares != (0.0, 1.0)
    return hash_splits(subjects, *config.shares, config.seed, options="", exact=exact, may_be_empty=like)


# Encoding of input whose subjects ascend from unit to unit: while it is read, without spill files.


class OutOfOrder(Exception):
    """Subjects did not ascend from chunk to chunk after all; what was encoded so far is void."""


def ascending_units(source: Source) -> list[int] | None:
    """The source's units in the order of their subjects, if each ends where the next begins or before.

    None where the source does not know the ranges of its units' subjects, or they overlap.
    """
    ranges = source.subject_ranges()
    if ranges is None:
        return None
    order = np.lexsort((ranges[:, 1], ranges[:, 0]))
    first, last = ranges[order].T
    return order.tolist() if (first[1:] >= last[:-1]).all() else None


def encode_ascending(
    source: Source,
    units: list[int],
    choice: event_rules.CodeChoice,
    config: PrepareConfig,
    most: int,
    told: spill.Told,
) -> Encoding:
    """Encode whole subjects while the source is read, and tell how many units are done.

    Memory: two chunks of the source, a copy of one, and partitions of ``most`` events as in
    `encode_all`; a subject with more events than that is a partition of its own. The units are all of the
    source's, as `ascending_units` gives them; ``value_codes`` and exact splits by hash need spill files.

    Raises:
        InputError: splits that share subjects.
        OutOfOrder: from the partitions, where a chunk has smaller ids than the one before it.
    """
    counts, unselected = EventCounts(), EventCounts()  # one for each thread
    codes, seen = spill.CodeNumbers(choice.read), spill.SubjectSet()
    splits = own_splits(source)
    by_hash: SplitOf = lambda ids: hash_split_index(ids, *config.shares, config.seed)  # noqa: E731
    split_of = by_hash if splits is None else split_listed(splits)
    rules = EncodingRules(choice, config.duplicates, life_rules(config), split_of)

    def batches() -> Iterator[pa.RecordBatch]:
        with ThreadPoolExecutor(1) as pool:
            for done, unit in enumerate(units, start=1):
                for table in spill.read_ahead(source.read(unit, counts), pool):
                    if table.num_rows:
                        if splits is None:
                            seen.add(table["subject_id"].to_numpy())
                        yield spill.select_rows(table, codes, False, unselected)
                told(done, len(units))

    def partitions() -> Iterator[tuple[list[pa.RecordBatch], tuple[str, ...], np.ndarray]]:
        for group in whole_subjects(batches(), most):
            yield group, *codes.ascending()

    def encode(partition: tuple[list[pa.RecordBatch], tuple[str, ...], np.ndarray]) -> Encoded:
        group, names, places = partition
        tables = [(pa.Table.from_batches([batch]), places) for batch in group]
        return rules.encode(*spill.columns_of(tables, names))

    def encoded() -> Iterator[Encoded]:
        yield from encode_all(encode, partitions())
        spill.add_counts(counts, unselected)

    def all_splits() -> dict[str, np.ndarray]:
        return split_by_hash(seen.all(), config) if splits is None else splits

    return Encoding(encoded(), counts, codes.prefixes, lambda: codes.names, all_splits)


def whole_subjects(batches: Iterable[pa.RecordBatch], most: int) -> Iterator[list[pa.RecordBatch]]:
    """Cut batches into groups with all rows of their subjects, of ``most`` rows at most where it can be.

    Args:
        batches: with a column subject_id, in any order within a batch; no id is smaller than any in the
            batch before.
        most: rows of a group, but that a subject which would not fit stays with the rows held so far if it
            began among them, and a subject with more rows than that is a group of its own.

    Raises:
        OutOfOrder: an id is smaller than one in the batch before.
    """
    held: list[pa.RecordBatch] = []
    rows = 0
    last = None  # subject of the last row so far
    for batch in batches:
        if not batch.num_rows:
            continue
        subject = batch["subject_id"].to_numpy()
        if not ascending(subject):
            order = np.argsort(subject, kind="stable")
            batch, subject = batch.take(pa.array(order)), subject[order]
        if last is not None and subject[0] < last:
            raise OutOfOrder
        start = 0
        while rows + len(subject) - start > most:
            # Before the subject that does not fit, unless it is the group's only one: then after it.
            at = subject[start + max(most - rows, 0)]
            cut = max(start, int(np.searchsorted(subject, at)))
            if cut == start and (not held or last == at):
                cut = int(np.searchsorted(subject, at, side="right"))
                if cut == len(subject):
                    break  # it may go on in the next batch
            yield [*held, *([batch.slice(start, cut - start)] if cut > start else [])]
            held, rows, start = [], 0, cut
        if start < len(subject):
            held.append(batch.slice(start))
            rows += len(subject) - start
        last = subject[-1]
    if held:
        yield held

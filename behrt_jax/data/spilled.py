"""Encoding by way of spill files: for input in any order, of any number of shards."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from behrt_jax.config import PrepareConfig
from behrt_jax.data.encoding import (
    Encoded,
    Encoding,
    SplitOf,
    add_counts,
    encode_all,
    encode_events,
    fit_values,
    split_listed,
)
from behrt_jax.data.events import SPLITS, EventCounts
from behrt_jax.data.ordering import distinct
from behrt_jax.data.partitions import choose_partitions, code_lookups, load_partition
from behrt_jax.data.selection import CodeChoice
from behrt_jax.data.sources.source import Source
from behrt_jax.data.spill import Spill
from behrt_jax.data.splits import check_disjoint, hash_splits
from behrt_jax.data.values import ValueBins


def encode_spilled(
    source: Source,
    spills: Sequence[Spill],
    choice: CodeChoice,
    config: PrepareConfig,
    most: int,
    told: Callable[[int, int], None],
) -> Encoding:
    """Load the partitions of spill files, encode them, and tell how many are done.

    Args:
        source: its splits are read, and it learns what other processes have read.
        spills: all shards.
        choice: which codes are read, and what for.
        config: the options.
        most: events of a partition.
        told: called with the partitions done, and how many there are.

    Raises:
        InputError: splits that share subjects, or a split by hash with a train or tuning split without any.
    """
    counts, prefixes = EventCounts(), Counter()
    for spill in spills:
        add_counts(counts, spill.counts)
        prefixes.update(spill.prefixes)
        source.learn(spill.learned)
    splits = own_splits(source)
    if splits is None:
        subjects = np.concatenate([spill.subjects() for spill in spills])
        splits = split_by_hash(subjects, config)
    names = tuple(sorted({name for spill in spills for name in spill.codes}))
    partitions = choose_partitions(spills, most)
    bins = None
    if config.value_codes:
        bins = fit_values(spills, partitions, names, splits["train"], choice, config)
    encode = functools.partial(
        _encode_partition,
        spills,
        names=names,
        lookups=code_lookups(spills, names),
        bins=bins,
        split_of=split_listed(splits),
        choice=choice,
        config=config,
    )

    def encoded() -> Iterator[Encoded]:
        for done, partition in enumerate(encode_all(encode, partitions), start=1):
            yield partition
            told(done, len(partitions))

    return Encoding(encoded(), counts, lambda: prefixes, lambda: splits, bins)


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
    return hash_splits(subjects, config.tuning_fraction, config.held_out_fraction, config.seed, options="")


def _encode_partition(
    spills: Sequence[Spill],
    buckets: range,
    names: tuple[str, ...],
    lookups: Sequence[np.ndarray],
    bins: ValueBins | None,
    split_of: SplitOf,
    choice: CodeChoice,
    config: PrepareConfig,
) -> Encoded:
    events, values = load_partition(spills, buckets, names, lookups)
    return encode_events(events, values, bins, split_of, choice, config.duplicates)

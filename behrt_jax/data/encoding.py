"""From the events of one partition to the sequences of its subjects, by split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from behrt_jax.config import PrepareConfig
from behrt_jax.data.events import SPLITS, EventCounts
from behrt_jax.data.filtering import apply_rules, matches, select_columns
from behrt_jax.data.partitions import Spill, code_lookups, load_partition
from behrt_jax.data.sequences import ages_in_years
from behrt_jax.data.splits import split_index
from behrt_jax.data.values import ValueBins, ValueSample


@dataclass(frozen=True, eq=False)
class Encoded:
    """The sequences of one partition, with codes that are not vocabulary ids yet."""

    parts: dict[str, tuple[np.ndarray, ...]]
    """Split -> subject ids and lengths ``[subjects]``, codes, ages, visits and times ``[events]``, as in
    `Sequences`, but that codes are places in ``names``."""
    names: Sequence[str]
    """The same in all partitions."""
    events: dict[str, np.ndarray]
    """Split -> events of each code, int64 ``[names]``."""
    counts: EventCounts


def encode_partition(
    spills: Sequence[Spill],
    buckets: range,
    names: Sequence[str],
    lookups: Sequence[np.ndarray],
    bins: ValueBins | None,
    splits: Mapping[str, np.ndarray],
    config: PrepareConfig,
) -> Encoded:
    """Load a partition, apply the rules of `filtering.select_events`, and deal it out to the splits.

    Args:
        spills: all shards.
        buckets: those of the partition.
        names: all codes, ascending.
        lookups: see `partitions.code_lookups`.
        bins: of numeric values, if they are asked for.
        splits: split name -> int64 ids, ascending.
        config: its ``duplicates`` is read.
    """
    counts = EventCounts()
    events, values = load_partition(spills, buckets, names, lookups)
    is_bin = None
    if bins is not None and values is not None:
        events, is_bin = bins.apply(events, values)
    selected = select_columns(events, None, config.duplicates, counts)
    ages = ages_in_years(selected)
    split = split_index(selected.subject_ids, _between(splits, selected.subject_ids))  # [S]
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
    if is_bin is not None:
        binned = np.resize(is_bin, len(selected.names))  # names with a count come in the same order
        changed = sum(int(found[binned].sum()) for found in by_code.values())
        counts.change("value -> quantile bin", changed)
    return Encoded(parts, selected.names, by_code, counts)


def fit_values(
    spills: Sequence[Spill],
    partitions: Sequence[range],
    names: Sequence[str],
    train: np.ndarray,
    config: PrepareConfig,
) -> ValueBins:
    """Fit quantile bins on the events of train subjects that the rules keep, duplicates included.

    A code has bins if each of them can be expected to reach ``min_count``.

    Args:
        spills: all shards.
        partitions: buckets of each partition.
        names: all codes, ascending.
        train: int64 ids of the train split, ascending.
        config: its ``value_codes``, ``value_bins`` and ``min_count`` are read.
    """
    lookups = code_lookups(spills, names)
    sample = ValueSample(names, matches(names, config.value_codes, "value_codes"))
    for buckets in partitions:
        events, values = load_partition(spills, buckets, names, lookups)
        if values is None:
            continue
        subjects, _, kept = apply_rules(events, None, EventCounts(), also=[values])
        subject, time, *_, code, value = kept
        own = split_index(subjects, _between({"train": train}, subjects)) == 0  # [S]
        rows = own[subject]
        sample.add(subjects[subject[rows]], time[rows], code[rows], value[rows])
    return sample.fit(config.value_bins, config.value_bins * config.min_count)


def _between(splits: Mapping[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """The subjects of each split, both ascending, that lie in the range of ``ids``, ascending."""
    if not len(ids):
        return {}
    return {
        name: listed[np.searchsorted(listed, ids[0]) : np.searchsorted(listed, ids[-1], side="right")]
        for name, listed in splits.items()
    }

"""Encoding of input whose subjects ascend from unit to unit: while it is read, without spill files."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from behrt_jax.config import PrepareConfig
from behrt_jax.data.encoding import Encoded, Encoding, SplitOf, encode_all, encode_events, split_listed
from behrt_jax.data.events import EventCounts
from behrt_jax.data.ordering import ascending
from behrt_jax.data.partitions import columns_of
from behrt_jax.data.routing import CodeNumbers, SubjectSet, select_rows
from behrt_jax.data.selection import CodeChoice
from behrt_jax.data.sources.source import Source
from behrt_jax.data.spill import read_ahead
from behrt_jax.data.spilled import own_splits, split_by_hash
from behrt_jax.data.splits import hash_split_index


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
    choice: CodeChoice,
    config: PrepareConfig,
    most: int,
    told: Callable[[int, int], None],
) -> Encoding:
    """Encode whole subjects while the source is read, and tell how many units are done.

    Memory: two chunks of the source, a copy of one, and partitions of ``most`` events as in
    `encoding.encode_all`; a subject with more events than that is a partition of its own.

    Args:
        source: what to read.
        units: all of its units, as `ascending_units` gives them.
        choice: which codes are read, and what for.
        config: the options; ``value_codes`` need spill files.
        most: events of a partition.
        told: called with the units done, and how many there are.

    Raises:
        InputError: splits that share subjects.
        OutOfOrder: from the partitions, where a chunk has smaller ids than the one before it.
    """
    counts, unselected = EventCounts(), EventCounts()  # one for each thread
    codes, seen = CodeNumbers(choice.read), SubjectSet()
    splits = own_splits(source)
    fractions = config.tuning_fraction, config.held_out_fraction, config.seed
    split_of: SplitOf = lambda ids: hash_split_index(ids, *fractions)  # noqa: E731
    if splits is not None:
        split_of = split_listed(splits)

    def batches() -> Iterator[pa.RecordBatch]:
        with ThreadPoolExecutor(1) as pool:
            for done, unit in enumerate(units, start=1):
                for table in read_ahead(source.read(unit, counts), pool):
                    if table.num_rows:
                        if splits is None:
                            seen.add(table["subject_id"].to_numpy())
                        yield select_rows(table, codes, False, unselected)
                told(done, len(units))

    def partitions() -> Iterator[tuple[list[pa.RecordBatch], tuple[str, ...], np.ndarray]]:
        for group in whole_subjects(batches(), most):
            yield group, *codes.ascending()

    def encode(partition: tuple[list[pa.RecordBatch], tuple[str, ...], np.ndarray]) -> Encoded:
        group, names, places = partition
        tables = [(pa.Table.from_batches([batch]), places) for batch in group]
        return encode_events(*columns_of(tables, names), None, split_of, choice, config.duplicates)

    def encoded() -> Iterator[Encoded]:
        yield from encode_all(encode, partitions())
        for rule, dropped in unselected.dropped.items():
            counts.drop(rule, dropped)

    def all_splits() -> dict[str, np.ndarray]:
        return split_by_hash(seen.all(), config) if splits is None else splits

    return Encoding(encoded(), counts, codes.prefixes, all_splits)


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

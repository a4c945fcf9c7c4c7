"""From a source's records to a prepared data set on disk, in memory that does not grow with the events.

1. Read: each unit in chunks; events of selected codes go to spill files by range of subjects.
2. Encode: each range (partition) is loaded, filtered, sorted and appended to its subjects' splits.
3. Write: the vocabulary is fitted on the train split, and the whole is renamed into its place.

Memory at its peak is the larger of two: in each reading process, two chunks of the source
(`sources.source.CHUNK_ROWS` rows) and a copy; or one partition for each of `ENCODERS` threads
(`partitions.PARTITION_EVENTS` events, or those of one bucket of subjects where that is more) at about
150 bytes an event, and one more that waits to be written. Beside it are the ids and lengths of all
subjects, 16 bytes each, and of the source's splits; while reading, up to 64 MiB to tell which subjects
there are. The files that are written, and their temporary copies, are memory-mapped: pages
of them that the system keeps show in the resident size, but it takes them back when memory is short.
"""

import functools
import json
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from behrt_jax.config import PrepareConfig
from behrt_jax.data.encoding import Encoded, encode_partition, fit_values
from behrt_jax.data.events import SPLITS, EventCounts
from behrt_jax.data.filtering import REPEATS, matches, nothing_left, selects
from behrt_jax.data.manifest import TOP_CODES, content_options, describe_prepared, input_fingerprint
from behrt_jax.data.ordering import distinct
from behrt_jax.data.partitions import (
    PARTITION_EVENTS,
    Reading,
    Spill,
    choose_boundaries,
    choose_partitions,
    code_lookups,
)
from behrt_jax.data.sequences import set_fingerprint
from behrt_jax.data.shards import load_shards, read_shard, shards_folder, spill_in_parallel
from behrt_jax.data.sources.source import Source
from behrt_jax.data.splits import check_disjoint, hash_splits
from behrt_jax.data.store import MANIFEST, VOCABULARY, SplitWriter, read_manifest, write_json
from behrt_jax.data.vocabulary import UNK, vocabulary_of_counts
from behrt_jax.errors import InputError

ENCODERS = min(4, os.cpu_count() or 1)
"""Threads that encode partitions."""

Progress = Callable[[str, int, int], None]
"""Called with the stage (read, encode, write), the parts of it done, and how many there are."""


def prepare(
    source: Source,
    config: PrepareConfig,
    progress: Progress = lambda stage, done, total: None,
    *,
    default_codes: tuple[str, ...] = (),
    boundaries: np.ndarray | None = None,
    partition_events: int = PARTITION_EVENTS,
) -> dict[str, Any]:
    """Prepare a data set; see the module's docstring for how, and `store` for what is written.

    Args:
        source: the records, opened.
        config: the options.
        progress: told how far it is.
        default_codes: patterns where ``config.codes`` gives none; none of both selects all codes.
        boundaries: where to cut the subjects into buckets, int64 ascending; chosen where not given.
        partition_events: most events of a partition; neither this nor the cut changes the result.

    Returns:
        The manifest, with ``up_to_date``: the output was there already, prepared from the same input
        with the same options, and was left alone. With ``config.shard``: the counts of that shard.

    Raises:
        InputError: a wrong option or record, an output that holds something else, nothing left to train
            or tune on, or shards that are missing. Nothing is left at the output then.
    """
    _check(config)
    codes = config.codes or default_codes
    options = content_options(source, config, codes)
    select = functools.partial(_select, codes, config.exclude_codes, config.value_codes)
    select([])  # wrong patterns are told before anything is read

    def reading() -> Reading:
        cuts = choose_boundaries(source) if boundaries is None else boundaries
        return Reading(cuts, select, bool(config.value_codes), not source.splits())

    if config.shard is not None:
        return read_shard(source, config, reading(), options, functools.partial(progress, "read"))
    if not config.dry_run and (existing := _existing(source, config, options)) is not None:
        return existing

    beside = None if config.dry_run or config.output is None else config.output.parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".preparing-", dir=beside) as temporary,
        ThreadPoolExecutor(1) as background,
    ):
        work = Path(temporary)
        input_print = background.submit(input_fingerprint, source, config.input)
        if config.merge:
            spills = load_shards(source, config, reading(), options)
        else:
            told = functools.partial(progress, "read")
            units = range(source.units())
            spills = spill_in_parallel(source, units, reading(), work / "spill", config.workers, told)
        manifest = _finish(
            source, config, options, spills, work, input_print.result, partition_events, progress
        )
        if not config.dry_run and config.output is not None:
            (work / "prepared").replace(config.output)
    if config.merge and not config.dry_run and config.output is not None:
        shutil.rmtree(shards_folder(config.output))
    return manifest | {"up_to_date": False}


def _finish(
    source: Source,
    config: PrepareConfig,
    options: dict[str, Any],
    spills: list[Spill],
    work: Path,
    input_print: Callable[[], str],
    partition_events: int,
    progress: Progress,
) -> dict[str, Any]:
    """Encode the partitions and write the data set into ``work / "prepared"``."""
    counts = EventCounts()
    for spill in spills:
        _add(counts, spill.counts)
    splits = _splits(source, spills, config)
    names = sorted({name for spill in spills for name in spill.codes})
    partitions = choose_partitions(spills, partition_events)
    bins = None
    if config.value_codes:
        bins = fit_values(spills, partitions, names, splits["train"], config)

    with ExitStack() as stack:
        writers = {name: stack.enter_context(SplitWriter(work, name)) for name in SPLITS}
        encode = functools.partial(
            encode_partition,
            spills,
            names=names,
            lookups=code_lookups(spills, names),
            bins=bins,
            splits=splits,
            config=config,
        )
        events = {name: np.zeros(0, np.int64) for name in SPLITS}
        for done, encoded in enumerate(_in_order(encode, partitions), start=1):
            _add(counts, encoded.counts)
            names = encoded.names
            for name, part in encoded.parts.items():
                writers[name].append(*part)
                events[name] = encoded.events[name] + (events[name] if len(events[name]) else 0)
            progress("encode", done, len(partitions))
    _check_left(events, spills, counts)

    descriptions = _Descriptions(source.descriptions())
    train = {name: count for name, count in zip(names, events["train"].tolist(), strict=True) if count}
    texts = {name: text for name in train if (text := descriptions.of(name)) is not None}
    vocabulary = vocabulary_of_counts(
        train, config.min_count, config.vocabulary_size, None, texts, options=""
    )
    ids = vocabulary.encode(names)
    everywhere = sum(events.values(), np.zeros(len(names), np.int64))  # [names]
    counts.change("rare or unseen code -> [UNK]", int(everywhere[ids == UNK].sum()))
    folder = work / "prepared"
    folder.mkdir()
    sequences = {}
    for done, name in enumerate(SPLITS, start=1):
        sequences[name] = writers[name].finish(folder, ids)
        progress("write", done, len(SPLITS))
    vocabulary.write(folder / VOCABULARY)
    top = sorted(zip((-everywhere).tolist(), names, strict=True))[:TOP_CODES]
    manifest = describe_prepared(
        source,
        options,
        input_print(),
        set_fingerprint(vocabulary, sequences),
        vocabulary,
        sequences,
        {name: int(np.count_nonzero(events[name])) for name in SPLITS},
        [(name, descriptions.of(name), -count) for count, name in top if count],
        counts,
        {name: len(splits[name]) - len(sequences[name]) for name in SPLITS},
        None if bins is None else dict(zip(bins.codes, bins.edges.tolist(), strict=True)),
    )
    write_json(folder / MANIFEST, manifest)
    return manifest


def _add(counts: EventCounts, more: EventCounts) -> None:
    counts.read += more.read
    for rule, events in more.dropped.items():
        counts.drop(rule, events)
    for rule, events in more.changed.items():
        counts.change(rule, events)


def _in_order(encode: Callable[[range], Encoded], partitions: Sequence[range]) -> Iterator[Encoded]:
    """Encode partitions in threads, with one more of them in memory than there are threads."""
    with ThreadPoolExecutor(ENCODERS) as pool:
        waiting = deque()
        for partition in partitions:
            waiting.append(pool.submit(encode, partition))
            if len(waiting) == ENCODERS + 1:  # one more, while the caller writes the one that is done
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _select(
    codes: tuple[str, ...], exclude: tuple[str, ...], valued: tuple[str, ...], names: Sequence[str]
) -> np.ndarray:
    """Which codes are selected, bool ``[names]``."""
    wanted = selects(names, codes, exclude, options="")
    if not valued:
        return wanted
    return wanted | (matches(names, valued, "value_codes") & selects(names, (), exclude, options=""))


def _splits(source: Source, spills: Sequence[Spill], config: PrepareConfig) -> dict[str, np.ndarray]:
    splits = source.splits()
    if splits:
        check_disjoint(splits, f"The {source.name} source")
        return {name: distinct(np.asarray(splits.get(name, ()), np.int64)) for name in SPLITS}
    subjects = np.concatenate([spill.subjects() for spill in spills])
    return hash_splits(subjects, config.tuning_fraction, config.held_out_fraction, config.seed)


def _check(config: PrepareConfig) -> None:
    if config.workers < 1:
        raise InputError(f"workers is {config.workers}: give 1 or more.")
    if config.value_bins < 2:
        raise InputError(f"value_bins is {config.value_bins}: give 2 or more.")
    if config.min_count < 1:
        raise InputError(f"min_count is {config.min_count}: give 1 or more.")
    if config.shard is not None and config.merge:
        raise InputError("shard and merge are both given: merge once, after all shards.")
    if config.output is None and not config.dry_run:
        raise InputError("output is missing: give the folder to write, or dry_run.")


def _check_left(events: dict[str, np.ndarray], spills: Sequence[Spill], counts: EventCounts) -> None:
    if not any(found.any() for found in events.values()):
        prefixes = Counter()
        for spill in spills:
            prefixes.update(spill.prefixes)
        raise nothing_left(prefixes, counts, options="")
    for name in ("train", "tuning"):
        if not events[name].any():
            raise InputError(
                f"No event is left in the {name} split: put subjects with selected codes into it, or "
                "select more codes with codes."
            )


def _existing(source: Source, config: PrepareConfig, options: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the output, if it holds just what would be prepared; None if there is nothing."""
    output = config.output
    if output is None or not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST).is_file():
        raise InputError(f"{output} holds something else: give another --output.")
    manifest = read_manifest(output)
    same = manifest.get("options") == json.loads(json.dumps(options)) and manifest["source"] == source.name
    if not same:
        raise InputError(f"{output} was prepared with other options: give another --output.")
    if manifest.get("input_fingerprint") != input_fingerprint(source, config.input):
        raise InputError(f"{output} was prepared from another input: give another --output.")
    return manifest | {"up_to_date": True}


class _Descriptions:
    """Texts of codes, also of those with a quantile or a count behind them."""

    def __init__(self, texts: Mapping[str, str]):
        self._texts = texts

    def of(self, code: str) -> str | None:
        if code in self._texts or not self._texts:
            return self._texts.get(code)
        for count in REPEATS:
            if code.endswith(count) and (text := self.of(code.removesuffix(count))) is not None:
                return f"{text} ({count.removeprefix('//')})"
        base, _, place = code.rpartition("//Q")
        if base in self._texts and place.isdigit():
            return f"{self._texts[base]} (Q{place})"
        return None

"""From a source's records to a prepared data set on disk, in memory that does not grow with the events.

1. Read: where the source's units follow each other by subject, whole subjects go on at once
   (`encode.encode_ascending`); else events of selected codes go to spill files by range of subjects.
2. Encode: some hundred thousand events of whole subjects at a time (a partition) are filtered, sorted and
   appended to their subjects' splits.
3. Write: the vocabulary is fitted on the train split, and the whole is renamed into its place.

Memory at its peak is that of reading (in each process, two chunks of the source,
`data.parquet.CHUNK_ROWS` rows, and a copy) or of encoding (a partition for each of `ENCODERS` threads,
`spill.PARTITION_EVENTS` events, or those of one bucket of subjects where that is more, at about 150
bytes an event, and one more that waits), or of both where subjects ascend. Beside it are encoded events
(`HELD_BYTES` at most, the others wait in files), the ids and lengths of all subjects, 16 bytes
each, and of the source's splits; while reading, up to 64 MiB to tell which subjects there are. The files
that are written, and their temporary copies, are memory-mapped: pages of them that the system keeps show
in the resident size, but it takes them back when memory is short.
"""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from behrt_jax.config.data import PrepareConfig
from behrt_jax.data.event_rules import CodeChoice, matches, nothing_left
from behrt_jax.data.events import SPLITS, EventCounts
from behrt_jax.data.examples import parse_delay
from behrt_jax.data.facts import fact_rows, without_row
from behrt_jax.data.lives import check_ages
from behrt_jax.data.prepared import (
    MANIFEST,
    VOCABULARY,
    FactWriter,
    SplitWriter,
    check_prepared,
    read_manifest,
)
from behrt_jax.data.sequences import set_fingerprint
from behrt_jax.data.splits import check_fractions
from behrt_jax.data.vocabulary import UNK, Descriptions, fit_vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, digests_of, sealed, work_folder, write_json
from behrt_jax.records.prepare import spill
from behrt_jax.records.prepare.encode import (
    Encoded,
    Encoding,
    OutOfOrder,
    ascending_units,
    encode_ascending,
    encode_spills,
    life_rules,
)
from behrt_jax.records.prepare.manifest import (
    TOP_CODES,
    Like,
    Prepared,
    content_options,
    describe_prepared,
    input_fingerprint,
    read_like,
)
from behrt_jax.records.sources.source import Source

Progress = Callable[[str, int, int], None]
"""Called with the stage (read and encode, or read, then encode; write), the parts of it done, and how many
there are."""


def prepare(
    source: Source,
    config: PrepareConfig,
    progress: Progress = lambda stage, done, total: None,
    *,
    boundaries: np.ndarray | None = None,
    partition_events: int = spill.PARTITION_EVENTS,
) -> JsonObject:
    """Prepare a data set; see the module's docstring for how, and `data.prepared` for what is written.

    Args:
        source: the records, opened.
        config: the options; without ``codes``, the source's own default is selected.
        progress: told how far it is.
        boundaries: where to cut the subjects into buckets, int64 ascending; chosen where not given.
        partition_events: most events of a partition; neither this nor the cut changes the result.

    Returns:
        The manifest, with ``up_to_date``: the output was there already, prepared from the same input
        with the same options, and was left alone. With ``config.shard``: the counts of that shard.

    Raises:
        InputError: a wrong option or record, an output that holds something else, nothing left to train
            or tune on, or shards that are missing. Nothing is left at the output then.
    """
    config, like = read_like(config)
    _check(config)
    if not source.splits() and config.shares != (0.0, 1.0):
        check_fractions(*config.shares, options="")
    # A default that matches nothing is no slip.
    static = () if config.static_codes == PrepareConfig().static_codes else config.static_codes
    asked_for = (pattern for pattern in source.static_codes if pattern not in config.static_codes)
    config = replace(config, static_codes=(*config.static_codes, *asked_for))
    codes = config.codes or (source.default_codes if like is None else ())
    options = content_options(source, config, codes, like)
    choice = CodeChoice(codes, config.exclude_codes, config.value_codes, config.static_codes)
    choice.read([])  # wrong patterns are told before anything is read
    given = CodeChoice(config.codes, config.exclude_codes, config.value_codes, static)

    def reading() -> spill.Reading:
        cuts = spill.choose_boundaries(source) if boundaries is None else boundaries
        return spill.Reading(cuts, choice.read, bool(config.value_codes), not source.splits())

    if config.shard is not None:
        return spill.read_shard(source, config, reading(), options, functools.partial(progress, "read"))
    with _work_folder(config) as work, ThreadPoolExecutor(2) as background:
        if not config.dry_run and (existing := _existing(source, config, options)) is not None:
            return existing
        input_print = background.submit(input_fingerprint, source, config.input)
        read, encode, both, write = (
            functools.partial(progress, stage) for stage in ("read", "encode", "read and encode", "write")
        )

        def finished(encoding: Encoding) -> JsonObject:
            prepared, fingerprint = finish(source, encoding, config, like, work, background, write)
            manifest = describe_prepared(
                source.name, options, input_print.result, fingerprint.result, prepared
            )
            if like is None and (idle := given.without_effect(encoding.names())):
                manifest["without_effect"] = idle
            manifest = sealed(manifest | {"files": digests_of(work / "prepared")})
            write_json(work / "prepared" / MANIFEST, manifest, escaped=False)
            return manifest

        manifest = None
        at_once = not (config.merge or config.workers > 1 or config.value_codes)
        if config.splits.exact and not source.splits():
            at_once = False  # all subjects must be known first
        units = ascending_units(source) if at_once else None
        if units is not None:
            with contextlib.suppress(OutOfOrder):
                manifest = finished(encode_ascending(source, units, choice, config, partition_events, both))
        if manifest is None:
            if config.merge:
                spills = spill.load_shards(source, config, reading(), options)
            else:
                every = range(source.units())
                spills = spill.spill_in_parallel(
                    source, every, reading(), work / "spill", config.workers, read
                )
            bins = None if like is None else like.preparation.bins
            manifest = finished(encode_spills(source, spills, choice, config, partition_events, encode, bins))
        if not config.dry_run and config.output is not None:
            (work / "prepared").replace(config.output)
    if config.merge and not config.dry_run and config.output is not None:
        shutil.rmtree(spill.shards_folder(config.output))
    return manifest | {"up_to_date": False}


def _work_folder(config: PrepareConfig) -> AbstractContextManager[Path]:
    """Beside the output, so that the data set can be renamed into its place."""
    if config.dry_run or config.output is None:
        return work_folder(Path(tempfile.gettempdir()), f"preparing-{os.getpid()}")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    return work_folder(config.output.parent, f"preparing-{config.output.name}")


def _check(config: PrepareConfig) -> None:
    for option, least in {"workers": 1, "value_bins": 2, "min_count": 1}.items():
        if (value := getattr(config, option)) < least:
            raise InputError(f"{option} is {value}: give {least} or more.")
    if config.shard is not None and config.merge:
        raise InputError("shard and merge are both given: merge once, after all shards.")
    if config.output is None and not config.dry_run:
        raise InputError("output is missing: give the folder to write, or dry_run.")
    for option in config.delays:
        matches([], (parse_delay(option)[0],), "--delays")


def _existing(source: Source, config: PrepareConfig, options: JsonObject) -> JsonObject | None:
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
    check_prepared(output, manifest, None)
    return manifest | {"up_to_date": True}


# From encoded partitions to the files of the data set.

HELD_BYTES = 384 << 20
"""Events that are held in memory until the vocabulary is known, about 20 million; more go to files."""


def finish(
    source: Source,
    encoding: Encoding,
    config: PrepareConfig,
    like: Like | None,
    work: Path,
    background: Executor,
    told: spill.Told,
) -> tuple[Prepared, Future[str]]:
    """Fit the vocabulary, or take that of `like`, and write all of the data set but its manifest into
    ``work / "prepared"``.

    The encoding's partitions are exhausted. Threads of ``background`` write and hash; ``told`` is called with
    the splits that are written, and how many there are.

    Returns:
        What came of it, and the fingerprint of vocabulary and sequences, which is being computed.

    Raises:
        InputError: nothing is left, or no code is frequent enough.
    """
    counts = EventCounts()
    codes = _CodeEvents()
    folder = work / "prepared"
    with ExitStack() as stack:
        writers = {name: stack.enter_context(SplitWriter(work, name)) for name in SPLITS}
        facts = {name: stack.enter_context(FactWriter(folder / name)) for name in SPLITS}
        for encoded in encoding.partitions:
            spill.add_counts(counts, encoded.counts)
            number = codes.add(encoded)
            for name, (subjects, lengths, tokens, *columns) in encoded.parts.items():
                writers[name].append(subjects, lengths, number[tokens], *columns)
                facts[name].append(encoded.facts[name], subjects)
            if sum(writer.held for writer in writers.values()) > HELD_BYTES:
                for writer in writers.values():
                    writer.flush()
        spill.add_counts(counts, encoding.counts)
        check_ages(counts, life_rules(config))
        splits = encoding.splits()
        names, events = list(codes.number), codes.events
        read = encoding.prefixes()
        if not any(found.any() for found in events.values()) and (like is None or any(read.values())):
            own = "" if like is None else None
            raise nothing_left(read, counts, options=own, births_from=source.births_from)
        for name in ("train", "tuning"):
            if like is None and not events[name].any():
                raise InputError(
                    f"No event is left in the {name} split: put subjects with selected codes into it, or "
                    "select more codes with codes."
                )

        descriptions = Descriptions(source.descriptions())
        train = {name: count for name, count in zip(names, events["train"].tolist(), strict=True) if count}
        if like is None:
            texts = {name: text for name in train if (text := descriptions.of(name)) is not None}
            vocabulary = fit_vocabulary(
                train, config.min_count, config.vocabulary_size, None, texts, options=""
            )
        else:
            vocabulary = like.vocabulary.counted(train)
        with_events = facts["train"].static.with_events
        rows = fact_rows(with_events, config.min_count) if like is None else like.fact_rows
        static = {name: writer.static.by_code for name, writer in facts.items()}
        ids = vocabulary.encode(names)
        everywhere = sum(events.values(), np.zeros(len(names), np.int64))  # [names]
        counts.change("rare or unseen code -> [UNK]", int(everywhere[ids == UNK].sum()))
        ranked = sorted(zip((-everywhere).tolist(), names, (ids == UNK).tolist(), strict=True))

        writing = {name: background.submit(writers[name].finish, folder, ids) for name in SPLITS}
        sequences = {}
        for done, (name, split) in enumerate(writing.items(), start=1):
            sequences[name] = split.result()
            told(done, len(SPLITS))
    fingerprint = background.submit(set_fingerprint, vocabulary, sequences)
    vocabulary.write(folder / VOCABULARY)
    prepared = Prepared(
        vocabulary,
        sequences,
        counts,
        distinct_codes={name: int(np.count_nonzero(events[name])) for name in SPLITS},
        top_codes=[(name, descriptions.of(name), -count) for count, name, _ in ranked[:TOP_CODES] if count],
        unknown_codes=[(name, -count) for count, name, unknown in ranked if unknown and count],
        subjects_without_events={name: len(splits[name]) - len(sequences[name]) for name in SPLITS},
        facts={
            name: writer.counts() | {"unknown": without_row(static[name], vocabulary, rows)}
            for name, writer in facts.items()
        },
        fact_rows={code: with_events[code] for code in rows},
        fact_codes=sum(static.values(), Counter()),
        value_edges=encoding.bins
        and dict(zip(encoding.bins.codes, encoding.bins.edges.tolist(), strict=True)),
    )
    return prepared, fingerprint


class _CodeEvents:
    """Events of each code by split, with numbers of the codes that are the same in all partitions."""

    def __init__(self):
        self.number: dict[str, int] = {}
        """Code -> its number, in their order."""
        self.events = {name: np.zeros(0, np.int64) for name in SPLITS}
        """Split -> events of each number, int64 ``[codes]``."""
        self._names: tuple[str, ...] = ()
        self._of_names = np.empty(0, np.int32)

    def add(self, encoded: Encoded) -> np.ndarray:
        """Count a partition's events; gives the number of each of its own names, int32 ``[names]``."""
        if encoded.names is not self._names:
            known = self.number
            numbers = [known.setdefault(name, len(known)) for name in encoded.names]
            self._names, self._of_names = encoded.names, np.array(numbers, np.int32)
        for name, found in self.events.items():
            found = np.append(found, np.zeros(len(self.number) - len(found), np.int64))
            found[self._of_names] += encoded.events[name]
            self.events[name] = found
        return self._of_names

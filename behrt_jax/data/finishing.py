"""From encoded partitions to the whole data set: vocabulary, files and manifest."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from behrt_jax.config import PrepareConfig
from behrt_jax.data.descriptions import Descriptions
from behrt_jax.data.encoding import Encoding, add_counts
from behrt_jax.data.events import SPLITS, EventCounts
from behrt_jax.data.manifest import TOP_CODES, describe_prepared
from behrt_jax.data.selection import nothing_left
from behrt_jax.data.sequences import set_fingerprint
from behrt_jax.data.sources.source import Source
from behrt_jax.data.split_writer import SplitWriter
from behrt_jax.data.store import MANIFEST, VOCABULARY, write_json
from behrt_jax.data.subject_facts import FactWriter
from behrt_jax.data.vocabulary import UNK, vocabulary_of_counts
from behrt_jax.errors import InputError

HELD_BYTES = 384 << 20
"""Events that are held in memory until the vocabulary is known, about 20 million; more go to files."""


def finish(
    source: Source,
    encoding: Encoding,
    config: PrepareConfig,
    options: dict[str, Any],
    work: Path,
    input_print: Callable[[], str],
    background: Executor,
    told: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the data set into ``work / "prepared"`` and give its manifest.

    Args:
        source: gives name and descriptions.
        encoding: its partitions are exhausted.
        config: the options.
        options: as the manifest has them.
        work: folder for temporary files too.
        input_print: gives the input's fingerprint.
        background: threads that write and hash.
        told: called with the splits that are written, and how many there are.

    Raises:
        InputError: nothing is left, or no code is frequent enough.
    """
    counts = EventCounts()
    numbers = _Numbers()
    folder = work / "prepared"
    events = {name: np.zeros(0, np.int64) for name in SPLITS}  # of each number
    with ExitStack() as stack:
        writers = {name: stack.enter_context(SplitWriter(work, name)) for name in SPLITS}
        facts = {name: stack.enter_context(FactWriter(folder / name)) for name in SPLITS}
        for encoded in encoding.partitions:
            add_counts(counts, encoded.counts)
            number = numbers.of(encoded.names)
            for name, (subjects, lengths, codes, *columns) in encoded.parts.items():
                writers[name].append(subjects, lengths, number[codes], *columns)
                events[name] = _grown(events[name], len(numbers.names))
                events[name][number] += encoded.events[name]
                facts[name].append(encoded.facts[name])
            if sum(writer.held for writer in writers.values()) > HELD_BYTES:
                for writer in writers.values():
                    writer.flush()
        add_counts(counts, encoding.counts)
        splits = encoding.splits()
        _check_left(events, encoding.prefixes, counts)

        names = numbers.names
        descriptions = Descriptions(source.descriptions())
        train = {name: count for name, count in zip(names, events["train"].tolist(), strict=True) if count}
        texts = {name: text for name in train if (text := descriptions.of(name)) is not None}
        vocabulary = vocabulary_of_counts(
            train, config.min_count, config.vocabulary_size, None, texts, options=""
        )
        ids = vocabulary.encode(names)
        everywhere = sum(events.values(), np.zeros(len(names), np.int64))  # [names]
        counts.change("rare or unseen code -> [UNK]", int(everywhere[ids == UNK].sum()))
        top = sorted(zip((-everywhere).tolist(), names, strict=True))[:TOP_CODES]

        writing = {name: background.submit(writers[name].finish, folder, ids) for name in SPLITS}
        sequences = {}
        for done, (name, split) in enumerate(writing.items(), start=1):
            sequences[name] = split.result()
            told(done, len(SPLITS))
    fingerprint = background.submit(set_fingerprint, vocabulary, sequences)
    manifest = describe_prepared(
        source,
        options,
        input_print,
        fingerprint.result,
        vocabulary,
        sequences,
        {name: int(np.count_nonzero(events[name])) for name in SPLITS},
        [(name, descriptions.of(name), -count) for count, name in top if count],
        counts,
        {name: len(splits[name]) - len(sequences[name]) for name in SPLITS},
        encoding.bins and dict(zip(encoding.bins.codes, encoding.bins.edges.tolist(), strict=True)),
        {name: writer.counts() for name, writer in facts.items()},
    )
    vocabulary.write(folder / VOCABULARY)
    write_json(folder / MANIFEST, manifest)
    return manifest


class _Numbers:
    """Numbers of codes, the same in all partitions, whatever the partitions' own names."""

    def __init__(self):
        self._number: dict[str, int] = {}
        self._names: tuple[str, ...] = ()
        self._of_names = np.empty(0, np.int32)

    @property
    def names(self) -> list[str]:
        return list(self._number)

    def of(self, names: tuple[str, ...]) -> np.ndarray:
        """int32 ``[names]``."""
        if names is not self._names:
            known = self._number
            numbers = [known.setdefault(name, len(known)) for name in names]
            self._names, self._of_names = names, np.array(numbers, np.int32)
        return self._of_names


def _grown(counted: np.ndarray, size: int) -> np.ndarray:
    """With zeros at the end, so that there are ``size``."""
    if len(counted) >= size:
        return counted
    return np.concatenate([counted, np.zeros(size - len(counted), np.int64)])


def _check_left(
    events: Mapping[str, np.ndarray], prefixes: Callable[[], Mapping[str, int]], counts: EventCounts
) -> None:
    if not any(found.any() for found in events.values()):
        raise nothing_left(prefixes(), counts, options="")
    for name in ("train", "tuning"):
        if not events[name].any():
            raise InputError(
                f"No event is left in the {name} split: put subjects with selected codes into it, or "
                "select more codes with codes."
            )

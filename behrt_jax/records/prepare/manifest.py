"""What a prepared data set says about itself: options, input, counts; no subject ids, paths or times."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from behrt_jax import __version__
from behrt_jax.config import PrepareConfig
from behrt_jax.data.events import EventCounts
from behrt_jax.data.examples import parse_delay
from behrt_jax.data.packing import pack_lengths
from behrt_jax.data.prepared import FORMAT_VERSION
from behrt_jax.data.sequences import Sequences, describe_split
from behrt_jax.data.vocabulary import Vocabulary, matching_codes
from behrt_jax.records.sources.source import Source

ROW_LENGTHS = (50, 100, 200, 512)
"""Row lengths for which the padding is computed."""
TOP_CODES = 20


def content_options(source: Source, config: PrepareConfig, codes: tuple[str, ...]) -> dict[str, Any]:
    """The options that decide what is prepared, with the patterns of codes as they are applied."""
    names = ["exclude_codes", "static_codes", "min_count", "vocabulary_size", "duplicates", "delays"]
    if config.value_codes:
        names += ["value_codes", "value_bins"]
    if source.name == "meds":
        names.append("visit_column")
    if source.name == "omop":
        names.append("ancestors")
    if not source.splits():
        names += ["tuning_fraction", "held_out_fraction", "seed"]
    options: dict[str, Any] = {"codes": codes} | {name: getattr(config, name) for name in names}
    if source.name == "table":
        options["table"] = asdict(config.table)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def input_files(source: Source, folder: Path | None) -> list[tuple[str, int]]:
    """Name below ``folder`` (else its own name) and size in bytes of each input file."""
    files = []
    for file in source.files():
        inside = folder is not None and file != folder and file.is_relative_to(folder)
        name = file.relative_to(folder).as_posix() if inside and folder else file.name
        files.append((name, file.stat().st_size))
    return files


def input_fingerprint(source: Source, folder: Path | None) -> str:
    """SHA-256 of the names, sizes and contents of the input files."""
    digest = hashlib.sha256()
    for file, (name, size) in zip(source.files(), input_files(source, folder), strict=True):
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{name}\n{size}\n{content}\n".encode())
    return digest.hexdigest()


def describe_counts(counts: EventCounts) -> dict[str, Any]:
    """Events read, and dropped and changed by rule; rules in the order of their names."""
    return {
        "read": counts.read,
        "dropped": dict(sorted(counts.dropped.items())),
        "changed": dict(sorted(counts.changed.items())),
    }


def padding(lengths: np.ndarray) -> dict[str, dict[str, float]]:
    """Share of padding among all tokens by row length, with a sequence a row, and with packed rows.

    Histories longer than a row are cut into several windows, as training does by default.

    Args:
        lengths: tokens of each subject, int64 ``[subjects]``, 1 or more.
    """
    shares = {}
    for row in ROW_LENGTHS if len(lengths) else ():
        rest = lengths % row
        rest = rest[rest > 0]
        whole = int((lengths // row).sum())
        tokens = int(lengths.sum())
        shares[str(row)] = {
            "padded": round(1 - tokens / (row * (whole + len(rest))), 4),
            "packed": round(1 - tokens / (row * (whole + pack_lengths(rest, row).rows)), 4),
        }
    return shares


def describe_prepared(
    source: Source,
    options: Mapping[str, Any],
    input_print: Callable[[], str],
    fingerprint: Callable[[], str],
    vocabulary: Vocabulary,
    splits: Mapping[str, Sequences],
    distinct_codes: Mapping[str, int],
    top_codes: Sequence[tuple[str, str | None, int]],
    counts: EventCounts,
    subjects_without_events: Mapping[str, int],
    value_edges: Mapping[str, list[float]] | None,
    facts: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """The manifest.

    Args:
        source: gives its name.
        options: see `content_options`.
        input_print: gives what `input_fingerprint` does; called last.
        fingerprint: gives that of vocabulary and sequences, likewise.
        vocabulary: as fitted.
        splits: the sequences.
        distinct_codes: split -> codes that occur in it, before rare ones became [UNK].
        top_codes: code, description and events in all splits, most frequent first.
        counts: ``read`` is what the splits hold, plus all that was dropped.
        subjects_without_events: by split.
        value_edges: code -> the values that end its quantile bins, where there are bins.
        facts: split -> what `subject_facts.FactWriter.counts` gives.
    """
    described = {}
    for name, part in splits.items():
        figures = describe_split(part)
        described[name] = {
            "subjects": figures["subjects"],
            "events": figures["events"],
            "codes": distinct_codes[name],
            "visits": figures["visits"],
            "lengths": figures["lengths"],
            "padding": padding(part.lengths),
        }
    bins = {} if value_edges is None else {"value_edges": dict(value_edges)}
    return {
        "format_version": FORMAT_VERSION,
        "behrt_jax_version": __version__,
        "source": source.name,
        "options": dict(options),
        "input_fingerprint": input_print(),
        "fingerprint": fingerprint(),
        "vocabulary": {"rows": len(vocabulary), "fingerprint": vocabulary.fingerprint()},
        "events": describe_counts(counts),
        "subjects_without_events": dict(subjects_without_events),
        "subject_facts": {name: dict(counts) for name, counts in facts.items()},
        "delayed_codes": {
            delay: int(matching_codes(vocabulary, (parse_delay(delay)[0],), "--delays").sum())
            for delay in options["delays"]
        },
        "splits": described,
        "top_codes": [
            {"code": code, "description": text, "events": events} for code, text, events in top_codes
        ],
        **bins,
    }

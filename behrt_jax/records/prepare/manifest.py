"""The manifest of a prepared data set: options, input and counts, without subject ids, paths or times of
subjects.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from behrt_jax import __version__
from behrt_jax.config.data import PrepareConfig, SkippedTables, TableColumns
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.events import EventCounts
from behrt_jax.data.examples import parse_delay
from behrt_jax.data.packing import pack_lengths
from behrt_jax.data.prepared import FORMAT_VERSION, MANIFEST, read_fact_rows, read_rules
from behrt_jax.data.sequences import Sequences, describe_split, span_of_times
from behrt_jax.data.vocabulary import Vocabulary, matching_codes
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, from_stored
from behrt_jax.records.sources.source import Source

ROW_LENGTHS = (50, 100, 200, 512)
"""Row lengths for which the padding is computed."""
TOP_CODES = 20
UNKNOWN_CODES = 1000
"""Of those without a row in the vocabulary, how many are listed at most."""
LATER_OPTIONS = ("without_birth", "implausible_ages", "shifted_dates")


class Like(NamedTuple):
    """What other subjects are prepared like."""

    vocabulary: Vocabulary
    preparation: Preparation
    fact_rows: tuple[str, ...] = ()
    """Codes of static facts that have a row beside the vocabulary; it has those that a run reads itself."""

    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary and the bins of values, which options do not tell."""
        edges = json.dumps(self.preparation.to_json().get("value_edges"), sort_keys=True)
        return hashlib.sha256(f"{self.vocabulary.fingerprint()}\n{edges}".encode()).hexdigest()


_OF_RULES = (
    "codes", "exclude_codes", "static_codes", "value_codes", "value_bins", "duplicates", "delays",
    "min_count", "vocabulary_size", *LATER_OPTIONS,
)  # fmt: skip


def read_like(config: PrepareConfig, option: str = "--like") -> tuple[PrepareConfig, Like | None]:
    """The options with those of the folder that ``like`` names in their place, and what else it tells.

    Its own options where it names none. What depends on the form of the source (columns, and whether concepts
    are replaced by ancestors) is taken over where the source is of the same kind.

    Raises:
        InputError: the folder does not tell, or an option says something else.
    """
    if config.like is None:
        return config, None
    rules = read_rules(config.like, option)
    prepared = (config.like / MANIFEST).is_file()
    like = Like(*rules, read_fact_rows(config.like) if prepared else ())
    source, options = like.preparation.source, like.preparation.options
    taken = {}
    for name in _OF_RULES:
        given, default = getattr(config, name), getattr(PrepareConfig(), name)
        theirs = options.get(name, default)
        taken[name] = tuple(theirs) if isinstance(theirs, list) else theirs
        if given not in (default, taken[name]):
            raise InputError(
                f"--{name} has no effect with --like, which takes {name} from {config.like}: leave it out."
            )
    if config.source == source == "table" and config.table == TableColumns():
        taken["table"] = from_stored(TableColumns, options["table"])
    for kind, name in (("meds", "visit_column"), ("omop", "ancestors")):
        if config.source == source == kind:
            given, theirs = getattr(config, name), options.get(name)
            if given and not theirs:
                raise InputError(f"--{name}: {config.like} was prepared without it: leave it out.")
            taken[name] = given or theirs
    if not config.birth_codes:
        taken["birth_codes"] = tuple(options.get("birth_codes", ()))
    skipped = getattr(config, source, None) if config.source == source else None
    if isinstance(skipped, SkippedTables) and not skipped.skip:
        taken[source] = SkippedTables(tuple(options.get("skip", ())))
    return replace(config, **taken), like


def content_options(
    source: Source, config: PrepareConfig, codes: tuple[str, ...], like: Like | None = None
) -> JsonObject:
    """The options that decide what is prepared, with the patterns of codes as they are applied."""
    names = ["exclude_codes", "static_codes", "min_count", "vocabulary_size", "duplicates", "delays"]
    if config.value_codes:
        names += ["value_codes", "value_bins"]
    shares = zip(("tuning_fraction", "held_out_fraction"), config.shares, strict=True)
    # Of what came later, only what was asked for: the manifests of before stay equal.
    names += [name for name in LATER_OPTIONS if getattr(config, name) != getattr(PrepareConfig, name)]
    by_hash = not source.splits()
    options = {
        "codes": codes,
        **{name: getattr(config, name) for name in names},
        **source.options(),
        **({**dict(shares), "seed": config.seed} if by_hash else {}),
        **({"exact_splits": True} if by_hash and config.splits.exact else {}),
        **({} if like is None else {"like": like.fingerprint()}),
    }
    # Groups of options come last, as they always have.
    ordered = sorted(options.items(), key=lambda option: isinstance(option[1], dict))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in ordered}


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


def describe_counts(counts: EventCounts) -> JsonObject:
    """Events read, and dropped and changed by rule; rules in the order of their names."""
    return {
        "read": counts.read,
        "dropped": dict(sorted(counts.dropped.items())),
        "changed": dict(sorted(counts.changed.items())),
    }


def padding(lengths: np.ndarray) -> dict[str, dict[str, float]]:
    """Share of padding among all tokens by row length, with a sequence a row, and with packed rows.

    Histories, of lengths int64 ``[subjects]``, 1 or more, that are longer than a row are cut into several
    windows, as training does by default.
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


@dataclass(frozen=True, eq=False)
class Prepared:
    """The outcome of a preparation, beside its files."""

    vocabulary: Vocabulary
    """As fitted."""
    splits: Mapping[str, Sequences]
    """The sequences."""
    counts: EventCounts
    """``read`` is what the splits hold, plus all that was dropped."""
    distinct_codes: Mapping[str, int]
    """Split -> codes that occur in it, before rare ones became [UNK]."""
    top_codes: Sequence[tuple[str, str | None, int]]
    """Code, description and events in all splits, most frequent first."""
    unknown_codes: Sequence[tuple[str, int]]
    """Codes without a row in the vocabulary and their events in all splits, most frequent first."""
    subjects_without_events: Mapping[str, int]
    """By split."""
    facts: Mapping[str, Mapping[str, int]]
    """Split -> what `prepared.FactWriter.counts` gives, and ``unknown``: static facts without a row."""
    fact_rows: Mapping[str, int]
    """Static facts that have a row of the vocabulary of a model that reads them -> train subjects with events
    that have it."""
    fact_codes: Mapping[str, int]
    """Code of a static fact -> subjects of all splits."""
    value_edges: Mapping[str, list[float]] | None
    """Code -> the values that end its quantile bins, where there are bins."""


def _most(subjects: Mapping[str, int]) -> list[JsonObject]:
    ranked = sorted(subjects.items(), key=lambda item: (-item[1], item[0]))
    return [{"code": code, "subjects": count} for code, count in ranked[:TOP_CODES]]


def describe_prepared(
    source: str,
    options: JsonObject,
    input_print: Callable[[], str],
    fingerprint: Callable[[], str],
    prepared: Prepared,
) -> JsonObject:
    """The manifest, of the source's name, the options of `content_options` and the outcome.

    ``input_print`` gives what `input_fingerprint` does, ``fingerprint`` that of vocabulary and sequences;
    both are called last.
    """
    described = {}
    for name, part in prepared.splits.items():
        figures = describe_split(part) | {"codes": prepared.distinct_codes[name]}
        shown = ("subjects", "events", "codes", "visits", "lengths")
        described[name] = {key: figures[key] for key in shown} | {"padding": padding(part.lengths)}
    vocabulary, edges = prepared.vocabulary, prepared.value_edges
    bins = {} if edges is None else {"value_edges": dict(edges)}
    return {
        "format_version": FORMAT_VERSION,
        "behrt_jax_version": __version__,
        "source": source,
        "options": dict(options),
        "input_fingerprint": input_print(),
        "fingerprint": fingerprint(),
        "vocabulary": {"rows": len(vocabulary), "fingerprint": vocabulary.fingerprint()},
        "events": describe_counts(prepared.counts),
        "subjects_without_events": dict(prepared.subjects_without_events),
        "subject_facts": {name: dict(counts) for name, counts in prepared.facts.items()},
        "fact_rows": dict(prepared.fact_rows),
        "top_facts": _most(prepared.fact_codes),
        "delayed_codes": {
            delay: int(matching_codes(vocabulary, (parse_delay(delay)[0],), "--delays").sum())
            for delay in options["delays"]
        },
        "times": span_of_times(prepared.splits),
        "splits": described,
        "top_codes": [
            {"code": code, "description": text, "events": events} for code, text, events in prepared.top_codes
        ],
        "distinct_unknown_codes": len(prepared.unknown_codes),
        "unknown_codes": [
            {"code": code, "events": events} for code, events in prepared.unknown_codes[:UNKNOWN_CODES]
        ],
        **bins,
    }

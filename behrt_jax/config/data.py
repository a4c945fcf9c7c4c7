"""Where the events of a pretraining run come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where the events come from and how they become sequences."""

    source: Literal["clinical", "uniform", "latent", "meds", "prepared"] = "clinical"
    """clinical: generated, with structure to learn. uniform: generated, codes at random, nothing to
    learn. latent: generated from a model whose best possible loss is known and reported. meds: a Medical
    Event Data Standard folder at `path`. prepared: what prepare.py wrote to `path` (--data DIR for
    short); codes, vocabulary and splits are fixed there."""
    path: Path | None = None
    """Folder of the MEDS data set (holds data/ and metadata/), or of prepared data."""
    subjects: int = 5000
    """Generated sources: how many subjects."""
    vocabulary_size: int | None = None
    """Rows of the vocabulary, special tokens included. Generated sources have exactly this many, 1000
    where not given; of other sources the most frequent codes are kept, all where not given."""
    min_count: int | None = None
    """Codes seen fewer times in the train split become [UNK]. Default: 1 for generated sources, 5
    for meds."""
    events_mean: float = 15.0
    """Generated sources: mean number of events in a subject's history."""
    events_spread: float = 0.9
    """Generated sources: standard deviation of the logarithm of that number (long-tailed)."""
    codes: tuple[str, ...] = ()
    """Regular expressions; a code is kept if one matches at its start. Default for meds:
    DIAGNOSIS// PROCEDURE// MEDICATION//; for generated sources: all."""
    exclude_codes: tuple[str, ...] = ()
    """Regular expressions; a code is dropped if one matches at its start."""
    duplicates: Literal["keep", "drop"] | None = None
    """What to do with a code that comes again in the same visit. Default: drop; for latent, whose known
    optimum counts on them, keep."""
    difficulty: float = 0.5
    """latent: from 0 (each condition has codes of its own) to 1 (conditions share codes, more noise)."""
    visit_column: str | None = None
    """Column of visit ids (hadm_id in MIMIC). Where it is absent or null, a visit is a calendar day."""
    window: Literal["all", "random", "recent", "first"] = "all"
    """What is read of a history longer than `max_length`. all: the whole of it, in consecutive windows,
    each a sequence of its own. random: one window, drawn anew each epoch (validation reads all).
    recent, first: the last or the first events."""
    max_length: int | None = None
    """Longest sequence in tokens; the model's positions where not given."""
    packed: bool = True
    """Several subjects share a row. Off: one subject a row, padded."""
    tuning_fraction: float = 0.1
    """Share of subjects in the tuning split where the source has no splits of its own."""
    held_out_fraction: float = 0.1
    """Share of subjects in the held_out split, likewise."""
    seed: int = 0
    """Seed of the generator and of the split."""

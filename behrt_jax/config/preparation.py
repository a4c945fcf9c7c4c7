"""Preparation: records of any source to a data set on disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TableColumns:
    """Columns of a plain table (source `table`)."""

    subject: str = "subject_id"
    """Integer or text; text that is no integer becomes one by hashing (SHA-256)."""
    time: str = "time"
    """Timestamp, date, or ISO text."""
    code: str = "code"
    """Text or integer."""
    value: str | None = None
    """Number."""
    visit: str | None = None
    """Visit id; a visit is a calendar day where it is null or not given."""
    birth: str | None = None
    """Date of birth, the same in each of a subject's rows, where births are not events of their own."""


@dataclass(frozen=True)
class PrepareConfig:
    """Turn records of any source into a prepared data set, once."""

    source: Literal["meds", "omop", "synthea", "table"] = "meds"
    """meds: a Medical Event Data Standard folder. omop: OMOP CDM 5.3 or 5.4 as CSV, CSV.gz or Parquet.
    synthea: a Synthea CSV export. table: one CSV or Parquet file."""
    input: Path | None = None
    """Folder (or, for a table, file) to read."""
    output: Path | None = None
    """Folder to write; made anew, never overwritten with other options."""
    codes: tuple[str, ...] = ()
    """Regular expressions; a code is kept if one matches at its start. Default: diagnoses, medications
    and procedures, as the source names them."""
    exclude_codes: tuple[str, ...] = ()
    """Regular expressions; a code is dropped if one matches at its start."""
    min_count: int = 5
    """Codes seen fewer times in the train split become [UNK]."""
    vocabulary_size: int | None = None
    """Most rows of the vocabulary, special tokens included; the most frequent codes are kept."""
    duplicates: Literal["keep", "drop", "count"] = "drop"
    """A code that comes again in the same visit: keep each, drop the repeats, or count them (one event
    whose code ends in //x2, //x3-5 or //x6+)."""
    value_codes: tuple[str, ...] = ()
    """Regular expressions of codes whose numeric value becomes part of the code, as a quantile bin
    fitted on the train split (LAB//51006//Q3). They are selected in addition to `codes`."""
    value_bins: int = 5
    """How many quantile bins."""
    static_codes: tuple[str, ...] = ("GENDER//", "SEX//", "RACE//", "ETHNICITY//")
    """Regular expressions of codes that are kept as facts about the subject (static.parquet) where they have
    no time, for evaluation by group; no token is made of them."""
    delays: tuple[str, ...] = ()
    """REGEX=DAYS, how long after its time an event of such a code is known; REGEX=visit where it is known at
    the end of its visit, as diagnoses that are coded at discharge. Recorded alone: events stay as they are,
    and fine-tuning, prediction and the doctor keep them from predictions until they are known."""
    visit_column: str | None = None
    """meds: column of visit ids, such as hadm_id; without one a visit is a calendar day."""
    table: TableColumns = field(default_factory=TableColumns)
    ancestors: bool = False
    """omop: replace each concept by its most general ancestor in concept_ancestor that is in the same
    domain, at most two levels up."""
    tuning_fraction: float = 0.1
    """Share of subjects in the tuning split where the source has no splits."""
    held_out_fraction: float = 0.1
    """Share of subjects in the held_out split, likewise."""
    seed: int = 0
    """Seed of that split."""
    workers: int = 1
    """Processes that read units of the source side by side."""
    shard: str | None = None
    """i/n: do only the i-th of n parts of the reading (from 0), into a folder beside `output`; on a
    cluster, one job each. Afterwards run once with --merge."""
    merge: bool = False
    """Finish what jobs with --shard have read."""
    to_meds: Path | None = None
    """Also write all events, selected or not, as a MEDS 0.4 data set into this new folder."""
    dry_run: bool = False
    """Read and report, but write no data set."""

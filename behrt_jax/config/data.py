"""Records, prepared data and labels."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Source of the events, and how they become sequences."""

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
    covariates: tuple[Literal["sex", "year", "gaps"], ...] = ()
    """latent: what codes depend on beside age. sex: a static fact; conditions and codes differ. year:
    treatments come and go with the calendar. gaps: visits are closer the more ill a subject is, stages change
    with the days between them, and so does routine care. What knowing each is worth is reported."""
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
    train_fraction: float = 1.0
    """Share of the train split's subjects to train on. A smaller one is a part of a larger one; vocabulary
    and validation stay as they are."""
    seed: int = 0
    """Seed of the generator, of the split, and of which subjects are that share."""
    verify: bool = False
    """Prepared data: read all files through and compare them with what prepare wrote, however large they
    are. Off: up to 2 GiB of them, beside the sizes of all."""


# Preparation: records of any source to a data set on disk.

STATIC_CODES = ("GENDER//", "SEX//", "RACE//", "ETHNICITY//")
"""Patterns of codes that are facts about a subject where they have no time."""


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
    static: tuple[str, ...] = ()
    """Facts that do not change, such as sex race: of each value a subject gets a fact SEX//value, the name of
    the column in capitals, without a time. `static_codes` need not name them."""


@dataclass(frozen=True)
class SplitOptions:
    """Splits of the subjects."""

    names: tuple[str, ...] = ()
    """NAME=SPLIT, for a MEDS data set whose splits have other names, as folders or in its split file:
    test=held_out validation=tuning."""
    exact: bool = False
    """Where the source has no splits: shares exact to the subject, and no split empty where there are three.
    Without it each subject is dealt out by itself, so that it stays where it is when others join."""


@dataclass(frozen=True)
class SkippedTables:
    """Tables of a source that are not read."""

    skip: tuple[str, ...] = ()
    """Names of tables to pass over, not wanted or broken, such as observation."""


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
    like: Path | None = None
    """Folder of prepared data, a run or an adapter: prepare other subjects as it was, with its vocabulary,
    bins of values and rules. No split is needed, any may be empty, and one subject is enough."""
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
    static_codes: tuple[str, ...] = STATIC_CODES
    """Regular expressions of codes that are kept as facts about the subject (static.parquet) where they have
    no time, or that of birth: for evaluation by group, and for models with model.fact_tokens, in whose
    vocabulary those of min_count train subjects or more have a row. They are no events."""
    births: Path | None = None
    """Table (.csv, .csv.gz or .parquet) of births, with the columns subject_id and birth: of its subjects
    they count in place of those of the records."""
    birth_codes: tuple[str, ...] = ()
    """Regular expressions of codes that are births, beside MEDS_BIRTH: at their time, or, where they have
    none, in the year that is their value or stands at the end of the code (BIRTH_YEAR//1950)."""
    without_birth: Literal["drop", "first_event", "unknown"] = "drop"
    """Events of subjects without a birth: drop them, count the age from their first event, or keep them at an
    unknown age, which has the last row of the age table to itself (but for the oldest)."""
    implausible_ages: Literal["refuse", "drop", "keep"] = "refuse"
    """Events at an age above 150 years: refuse the data, drop them, or keep them. Ages of 300 to 330 years,
    by which MIMIC-III hides those over 89, are always kept."""
    shifted_dates: bool = False
    """The records' dates were shifted by subject, as is done to hide who they are. Recorded alone: the doctor
    warns of models that read the calendar. It sees by itself dates in the future and years that spread over
    more than a century."""
    delays: tuple[str, ...] = ()
    """REGEX=DAYS, how long after its time an event of such a code is known; REGEX=visit where it is known at
    the end of its visit, as diagnoses that are coded at discharge. Recorded alone: events stay as they are,
    and fine-tuning, prediction and the doctor keep them from predictions until they are known."""
    visit_column: str | None = None
    """meds: column of visit ids, such as hadm_id, integers or text; without one a visit is a calendar day."""
    table: TableColumns = field(default_factory=TableColumns)
    ancestors: bool = False
    """omop: replace each concept by its most general ancestor in concept_ancestor that is in the same
    domain, at most two levels up."""
    omop: SkippedTables = field(default_factory=SkippedTables)
    synthea: SkippedTables = field(default_factory=SkippedTables)
    splits: SplitOptions = field(default_factory=SplitOptions)
    tuning_fraction: float | None = None
    """Share of subjects in the tuning split where the source has no splits. Default: 0.1; with --like, where
    neither share is given, all subjects are held_out."""
    held_out_fraction: float | None = None
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

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the tuning and the held_out split, where the source has no splits."""
        given = self.tuning_fraction, self.held_out_fraction
        if self.like is not None and given == (None, None):
            return 0.0, 1.0
        tuning, held_out = (0.1 if share is None else share for share in given)
        return tuning, held_out


# Labels.


@dataclass(frozen=True)
class MakeLabelsConfig:
    """Make a label table of prepared data, for all of its splits.

    next_visit: the codes of the next visit (multi-label). first_occurrence: does a code of a set occur
    within a horizon, of subjects who have had none so far. readmission: does another visit begin within
    some days after the end of this one. death: does the subject die within a horizon. Labels are at ends of
    visits; what is not known up to the end of the horizon gets no label, and is counted.
    """

    task: Literal["next_visit", "first_occurrence", "readmission", "death"] | None = None
    """Which labels to make."""
    data: Path | None = None
    """Folder of prepared data."""
    output: Path | None = None
    """Parquet file to write, a MEDS label table sorted by subject and time."""
    codes: tuple[str, ...] = ()
    """Regular expressions; one matches at the start of a code. first_occurrence: the set, must be given.
    next_visit: the codes to predict, the whole vocabulary where not given. readmission: only visits with such
    a code count."""
    horizon_days: float | None = None
    """Length of the horizon, which begins after the gap. Default: 365, for readmission 30, with --survival
    all of the follow-up. Not of next_visit."""
    gap_days: float = 0.0
    """Days after the prediction time that do not count: who has it then gets no label. Not of next_visit."""
    survival: bool = False
    """Days until it happens or is not known any more (boolean_value tells which), in place of yes and no. Not
    of next_visit."""
    times: Literal["all", "last", "random"] = "all"
    """all: after each visit. last: one of each subject, the last that leaves room for the horizon before
    follow-up ends (for next_visit, for another visit). random: one of each subject, by seed."""
    index: Literal["positives"] | Path | None = None
    """first_occurrence and death: Parquet file of index dates (subject_id, prediction_time), which are
    labelled in place of ends of visits. positives: one label of each subject, drawn by seed: of those who
    have it, one of their positive ends of visits; of all others, the last up to a time drawn from these."""
    min_events: int = 1
    """Fewest events that a subject has at the prediction time."""
    follow_up: str | None = None
    """Until when it is known what happens to a subject. subject: the own last event, or death. data: the last
    event of the data set, or an earlier death (wrong where dates are shifted by subject, as in MIMIC). Or a
    date in place of that event, such as 2020-12-31. Default: subject, for readmission data. Not of
    next_visit."""
    seed: int = 0
    """Seed of --times random and --index positives."""

"""Labels made of prepared data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


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
    min_events: int = 1
    """Fewest events that a subject has at the prediction time."""
    follow_up: str | None = None
    """Until when it is known what happens to a subject. subject: the own last event, or death. data: the last
    event of the data set, or an earlier death (wrong where dates are shifted by subject, as in MIMIC). Or a
    date in place of that event, such as 2020-12-31. Default: subject, for readmission data. Not of
    next_visit."""
    seed: int = 0
    """Seed of --times random."""

"""Examination of runs and data for mistakes."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DoctorConfig:
    """Examine a run, or prepared data and its labels, for mistakes. The exit status is 1 where a finding
    is an error.
    """

    run: Path | None = None
    """Folder of a training run, finished or not."""
    data: Path | None = None
    """Folder of prepared data, audited for leakage."""
    labels: Path | None = None
    """With `data`: a Parquet file or folder of MEDS labels to audit with it."""
    output: Path | None = None
    """JSON file to write the findings to."""
    horizon_days: float | None = None
    """With `labels`: days after the prediction time that the label speaks of. A negative label needs
    events up to their end; without it, some event after the prediction time."""
    outcome_codes: tuple[str, ...] = ()
    """With `labels`: regular expressions of the codes that define the label; one matches at the start of
    a code."""
    delays: tuple[str, ...] = ()
    """With `labels`: REGEX=DAYS, how long after its time an event of such a code is known; REGEX=visit
    where it is known at the end of its visit, as diagnoses that are coded at discharge. Those that the data
    were prepared with where not given."""
    death_codes: tuple[str, ...] = (r"MEDS_DEATH", r"DOD$", r"DEATH\b", r".*//(DIED|EXPIRED)\b")
    """With `data`: regular expressions of codes that say that the subject died."""

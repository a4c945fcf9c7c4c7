"""Events from a folder of Synthea's CSV exporter, with the headers of 2017, 2023 and today.

Files and columns are found by name, in any case. Source: Walonoski et al. 2018, doi:10.1093/jamia/ocx079;
columns: https://github.com/synthetichealth/synthea/wiki/CSV-File-Data-Dictionary.

- **Codes**: ``DX//`` conditions, ``RX//`` medications, ``PX//`` procedures, ``OBS//`` observations,
  ``VAX//`` immunizations, ``ALLERGY//``, ``CAREPLAN//``, ``DEVICE//``, each with its CODE as it is written;
  ``ENCOUNTER//`` with the class where there is one, else with the CODE. ``GENDER//``, ``RACE//`` and
  ``ETHNICITY//`` are static (null time).
- **Ids**: Synthea's are UUIDs in text; subject and visit ids are `hashed_id` of them.
- **Times**: each event has the time of its own row: START, or DATE where there is no START. Timestamps are
  UTC; a date alone is the midnight that begins it, whatever the clock of the other files. So a condition of
  a day comes before the timed events of that day.
- **Visits**: an event is in the visit of its ENCOUNTER if its UTC day is within the encounter's days, or one
  day off (days are local, timestamps UTC); else it is in no visit, and so in that of its calendar day.
  Many exports record conditions decades before the encounter they point at.
"""

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EventCounts
from behrt_jax.data.sources.synthea_columns import (
    PREFIXES,
    codes_of,
    describe,
    events_table,
    prefixed,
    values_of,
    visits_of,
)
from behrt_jax.data.sources.synthea_files import (
    Encounters,
    SyntheaFile,
    encoded_ids,
    find_files,
    open_file,
    read_encounters,
    read_patient_ids,
)
from behrt_jax.data.sources.text_columns import encode_text, find, parse_times
from behrt_jax.errors import InputError

DEFAULT_CODES = ("DX//", "RX//", "PX//")
"""Diagnoses, medications and procedures."""


def open_synthea(path: Path) -> "SyntheaSource":
    """Open a folder of Synthea CSV files (.csv or .csv.gz).

    Needed are patients and one table of events at least (see the module's docstring for which are read).

    Raises:
        InputError: a file or a column is missing or there twice, or patients cannot be read, repeats an
            Id or leaves one empty.
    """
    path = Path(path)
    found = find_files(path, ("patients", *PREFIXES))
    if "patients" not in found or len(found) == 1:
        what = "table of events" if "patients" in found else "patients.csv"
        raise InputError(
            f"{path} has no {what}: give a Synthea CSV export with patients and one at least of "
            f"{', '.join(PREFIXES)}."
        )
    files = {name: open_file(name, found[name]) for name in ("patients", *PREFIXES) if name in found}
    return SyntheaSource(files, read_patient_ids(files["patients"]))


class SyntheaSource:
    """An opened Synthea export; each of its files is a unit. Implements `source.Source`.

    Held in memory are the ids of the patients (8 bytes each), and the ids and days of the encounters (24
    bytes each) once a table of events is read.
    """

    name = "synthea"

    def __init__(self, files: dict[str, SyntheaFile], patients: np.ndarray) -> None:
        self._files = files
        self._patients = patients  # int64 [patients], ascending
        self._texts: dict[str, dict[str, str]] = {}

    def files(self) -> list[Path]:
        """The files that are read."""
        return [file.path for file in self._files.values()]

    def units(self) -> int:
        """One for each file."""
        return len(self._files)

    def subject_ranges(self) -> None:
        """Not known: a subject is in several tables."""

    def splits(self) -> dict[str, np.ndarray]:
        """None: Synthea has no splits."""
        return {}

    def sample_subjects(self) -> np.ndarray:
        """All subjects, int64 ``[subjects]``."""
        return self._patients

    def descriptions(self) -> dict[str, str]:
        """Code -> DESCRIPTION, the first in the order of the text where a code has several.

        Files that this object has not read, nor learnt of, are read for it.
        """
        for name, file in self._files.items():
            if name != "patients" and name not in self._texts:
                texts = self._texts[name] = {}
                for piece in file.read("CODE", "DESCRIPTION", "ENCOUNTERCLASS"):
                    describe(piece, codes_of(name, piece), texts)
        tables = (self._texts[name] for name in self._files if name in self._texts)
        return {code: text for texts in tables for code, text in texts.items()}

    def learned(self) -> dict[str, Any]:
        """Table -> code -> its description there."""
        return dict(self._texts)

    def learn(self, learned: Mapping[str, Any]) -> None:
        """Take over the descriptions of other tables."""
        self._texts |= learned

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one file.

        A patient counts as up to five events (birth, death, gender, race, ethnicity), each row of another
        table as one. Dropped: ``unknown subject`` (not in patients), ``null code``, ``null time`` (an empty
        START or BIRTHDATE). Changed: ``unknown visit`` (no ENCOUNTER, or not in encounters), ``event outside
        its encounter`` (see the module's docstring), ``value is no number`` (an observation's VALUE, where
        TYPE is numeric).

        Raises:
            InputError: a file cannot be read, or a time cannot be parsed.
        """
        name = list(self._files)[unit]
        return self._read_patients(counts) if name == "patients" else self._read_events(name, counts)

    def _read_patients(self, counts: EventCounts) -> Iterator[pa.Table]:
        file = self._files["patients"]
        statics = ("GENDER", "RACE", "ETHNICITY")
        for piece in file.read("ID", "BIRTHDATE", "DEATHDATE", *statics):
            subject = encoded_ids(encode_text(piece.column("ID")))
            for column, code in (("BIRTHDATE", BIRTH_CODE), ("DEATHDATE", DEATH_CODE)):
                if column not in file.columns:
                    continue
                times = parse_times(piece, column)
                there = times.is_valid()
                known = there.true_count
                counts.read += known
                if code == BIRTH_CODE:
                    counts.read += len(times) - known
                    counts.drop("null time", len(times) - known)
                codes = pa.DictionaryArray.from_arrays(pa.array(np.zeros(known, np.int32)), pa.array([code]))
                yield events_table(pc.filter(subject, there), pc.filter(times, there), codes)
            for column in statics:
                if column in file.columns:
                    codes = prefixed(column, encode_text(piece.column(column)))
                    there = codes.is_valid()
                    codes = codes.filter(there)
                    counts.read += len(codes)
                    yield events_table(
                        pc.filter(subject, there), pa.nulls(len(codes), pa.timestamp("us")), codes
                    )

    def _read_events(self, name: str, counts: EventCounts) -> Iterator[pa.Table]:
        file, texts = self._files[name], dict[str, str]()
        columns = ("PATIENT", "CODE", "DESCRIPTION", file.start)
        visit_column = "ID" if name == "encounters" else "ENCOUNTER"
        looked_up = name != "encounters" and visit_column in file.columns
        encounters = self._encounters if looked_up else None
        more = {"encounters": ("ID", "ENCOUNTERCLASS"), "observations": ("ENCOUNTER", "VALUE", "TYPE")}
        for piece in file.read(*columns, *more.get(name, ("ENCOUNTER",))):
            subject = encoded_ids(encode_text(piece.column("PATIENT")))
            known = find(self._patients, subject.fill_null(0).to_numpy()) >= 0
            times, codes = parse_times(piece, file.start), codes_of(name, piece)
            describe(piece, codes, texts)
            keep = np.ones(len(times), dtype=bool)  # [N]
            counts.read += len(times)
            for rule, fits in (
                ("unknown subject", pc.and_(subject.is_valid(), pa.array(known))),
                ("null code", codes.is_valid()),
                ("null time", times.is_valid()),
            ):
                fits = fits.to_numpy(zero_copy_only=False)
                counts.drop(rule, int(np.count_nonzero(keep & ~fits)))
                keep &= fits
            kept = pa.array(keep)
            piece = piece._replace(table=piece.table.filter(kept))
            times, codes = times.filter(kept), codes.filter(kept)
            values = values_of(piece, counts) if name == "observations" else None
            visits = visits_of(piece, visit_column, times, encounters, counts)
            yield events_table(subject.filter(kept), times, codes, values, visits)
        self._texts[name] = texts

    @cached_property
    def _encounters(self) -> Encounters:
        return read_encounters(self._files.get("encounters"))

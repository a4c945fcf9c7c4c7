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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.events import BIRTH_CODE, DAY, DEATH_CODE, EventCounts
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject
from behrt_jax.records.sources.columns import (
    TextIds,
    cast_column,
    encode_text,
    extremes,
    find,
    hashed_ids,
    parse_numbers,
    prefixed,
)
from behrt_jax.records.sources.files import Piece, csv_columns, read_csv, refuse_absent, refuse_other_form
from behrt_jax.records.sources.source import Source, count, events_table, keep_rows, one_code, valid

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

PREFIXES = {
    "encounters": "ENCOUNTER",
    "conditions": "DX",
    "medications": "RX",
    "procedures": "PX",
    "observations": "OBS",
    "immunizations": "VAX",
    "allergies": "ALLERGY",
    "careplans": "CAREPLAN",
    "devices": "DEVICE",
}
"""Table of events -> first part of its codes."""


def open_synthea(path: Path, skip: Sequence[str] = ()) -> "SyntheaSource":
    """Open a folder of Synthea CSV files (.csv or .csv.gz).

    Needed are patients and one table of events at least (see the module's docstring for which are read).
    ``skip`` names tables of events to pass over, in any case; without encounters all visits are unknown.

    Raises:
        InputError: a file or a column is missing or there twice, or patients cannot be read, repeats an
            Id or leaves one empty; a table to skip is not there.
    """
    path = Path(path)
    skipped = sorted(name.lower() for name in skip)
    found = find_files(path, ("patients", *PREFIXES), skipped)
    refuse_absent("synthea.skip", path, skip, found.keys() - {"patients"})
    found = {name: file for name, file in found.items() if name not in skipped}
    if "patients" not in found or len(found) == 1:
        what = "table of events" if "patients" in found else "patients.csv"
        raise InputError(
            f"{path} has no {what}: give a Synthea CSV export with patients and one at least of "
            f"{', '.join(PREFIXES)}."
        )
    files = {name: open_file(name, found[name]) for name in ("patients", *PREFIXES) if name in found}
    return SyntheaSource(files, read_patient_ids(files["patients"]), skipped)


class SyntheaSource(Source):
    """An opened Synthea export; each of its files is a unit.

    Held in memory are the ids of the patients (8 bytes each), and the ids and days of the encounters (24
    bytes each) once a table of events is read.
    """

    name = "synthea"
    births_from = "BIRTHDATE in the file of patients"
    default_codes = ("DX//", "RX//", "PX//")

    def __init__(
        self, files: dict[str, "SyntheaFile"], patients: np.ndarray, skipped: Sequence[str] = ()
    ) -> None:
        self._files = files
        self._skipped = list(skipped)
        self._patients = patients  # int64 [patients], ascending
        self._texts: dict[str, dict[str, str]] = {}

    def files(self) -> list[Path]:
        """The files that are read."""
        return [file.path for file in self._files.values()]

    def options(self) -> JsonObject:
        """The tables that are passed over, if any."""
        return {"skip": self._skipped} if self._skipped else {}

    def units(self) -> int:
        """One for each file."""
        return len(self._files)

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
        tables = (self._texts[name] for name in self._files if name != "patients")
        return {code: text for texts in tables for code, text in texts.items()}

    def learned(self) -> JsonObject:
        """Table -> code -> its description there."""
        return dict(self._texts)

    def learn(self, learned: JsonObject) -> None:
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
                times = cast_column(piece, column, "time")
                there = times.is_valid()
                known = there.true_count
                counts.read += known
                if code == BIRTH_CODE:
                    counts.read += len(times) - known
                    counts.drop("null time", len(times) - known)
                yield events_table(subject.filter(there), times.filter(there), one_code(code, known))
            for column in statics:
                if column in file.columns:
                    codes = prefixed(column, encode_text(piece.column(column)))
                    there = codes.is_valid()
                    codes = codes.filter(there)
                    counts.read += len(codes)
                    yield events_table(subject.filter(there), pa.nulls(len(codes), pa.timestamp("us")), codes)

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
            times, codes = cast_column(piece, file.start, "time"), codes_of(name, piece)
            describe(piece, codes, texts)
            counts.read += len(times)
            rules = {"unknown subject": valid(subject) & known, "null code": valid(codes)}
            kept = pa.array(keep_rows(rules | {"null time": valid(times)}, counts))
            piece = piece._replace(table=piece.table.filter(kept))
            times, codes = times.filter(kept), codes.filter(kept)
            values = values_of(piece, counts) if name == "observations" else None
            visits = visits_of(piece, visit_column, times, encounters, counts)
            yield events_table(subject.filter(kept), times, codes, values, visits)
        self._texts[name] = texts

    @cached_property
    def _encounters(self) -> "Encounters":
        return read_encounters(self._files.get("encounters"))


# The files of a Synthea export: found, checked for their columns, and what of them is held in memory.


@dataclass(frozen=True)
class SyntheaFile:
    """A file of the export whose header is checked."""

    path: Path
    columns: dict[str, str]
    """Name in capitals -> name in the header."""

    def read(self, *names: str) -> Iterator[Piece]:
        """Pieces with those of these columns that are there, under their names in capitals."""
        present = [name for name in names if name in self.columns]
        for piece in read_csv(self.path, [self.columns[name] for name in present]):
            yield piece._replace(table=piece.table.rename_columns(present))

    @property
    def start(self) -> str:
        """The column of the time."""
        return "START" if "START" in self.columns else "DATE"


@dataclass(frozen=True, eq=False)
class Encounters:
    """The days that the encounters cover, as UTC has them."""

    ids: np.ndarray  # int64 [encounters], ascending
    first: np.ndarray  # int64 [encounters], days since 1970
    last: np.ndarray  # int64 [encounters]


def find_files(path: Path, names: Sequence[str], skipped: Sequence[str] = ()) -> dict[str, Path]:
    """The files of these tables, and what is called as one that is skipped: lower-case table name -> path.

    Raises:
        InputError: not a folder, or a table is there twice, is a folder or of another form.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the folder of a Synthea CSV export.")
    found: dict[str, Path] = {}
    others: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        name = file.name.lower().split(".")[0]
        if name in skipped:
            found[name] = file
        elif name not in names:
            continue
        elif file.is_dir():
            raise InputError(
                f"{file} is a folder: put its parts together into one CSV file, as Synthea writes it."
            )
        elif file.name.lower() not in (f"{name}.csv", f"{name}.csv.gz"):
            others[name] = file
        elif name in found:
            raise InputError(f"{path} has both {found[name].name} and {file.name}: keep one of them.")
        else:
            found[name] = file
    for name, file in others.items():
        if name not in found:
            refuse_other_form(file, (".csv", ".csv.gz"), f"synthea.skip {name}")
    return found


def open_file(name: str, path: Path) -> SyntheaFile:
    """Read the header of the file of a table and check that it has the columns it needs.

    Raises:
        InputError: a column is missing or there twice.
    """
    columns: dict[str, str] = {}
    for column in csv_columns(path):
        key = column.strip().upper()
        if key in columns:
            raise InputError(f"{path} has the column {key} twice: rename or drop one of them.")
        columns[key] = column
    needed = {"patients": ("ID", "BIRTHDATE"), "encounters": ("ID", "PATIENT", "CODE")}
    missing = [column for column in needed.get(name, ("PATIENT", "CODE")) if column not in columns]
    if name != "patients" and not {"START", "DATE"}.intersection(columns):
        missing.append("START or DATE")
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)}: export it again with Synthea; its columns are "
            f"{', '.join(columns)}."
        )
    return SyntheaFile(path, columns)


def read_patient_ids(file: SyntheaFile) -> np.ndarray:
    """Every subject id: int64 ``[patients]``, ascending.

    Raises:
        InputError: an id is empty or there twice, or two ids have the same hash.
    """
    ids = TextIds(file.path)
    for piece in file.read("ID"):
        texts = encode_text(piece.column("ID"))
        for row in np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False))[:1]:
            raise piece.error(file.columns["ID"], int(row), "no id: fill it in or leave the row out.")
        earlier = ids.ids
        subject = ids(texts.dictionary)[texts.indices.to_numpy()]  # [N]
        repeated = np.ones(len(subject), dtype=bool)
        repeated[np.unique(subject, return_index=True)[1]] = False
        repeated |= find(earlier, subject) >= 0
        for row in np.flatnonzero(repeated)[:1]:
            problem = "an id that an earlier row has too: keep one row for each patient."
            raise piece.error(file.columns["ID"], int(row), problem)
    return ids.ids


def read_encounters(file: SyntheaFile | None) -> Encounters:
    """Ids and days of the encounters of a file that may not be there."""
    parts = [(np.empty(0, np.int64),) * 3]
    if file is not None:
        for piece in file.read("ID", file.start, "STOP"):
            ids = encoded_ids(encode_text(piece.column("ID")))
            start = cast_column(piece, file.start, "time")
            stop = cast_column(piece, "STOP", "time") if "STOP" in piece.table.column_names else start
            stop = pc.max_element_wise(start, stop)  # an encounter without a STOP is its first day
            there = pc.and_(ids.is_valid(), start.is_valid())
            days = [times.filter(there).cast(pa.int64()).to_numpy() // DAY for times in (start, stop)]
            parts.append((ids.filter(there).to_numpy(), *days))
    ids, first, last = (np.concatenate(part) for part in zip(*parts, strict=True))  # [E]
    # An id that comes twice is one encounter, from its first day to its last.
    return Encounters(*extremes(ids, first, last))


def encoded_ids(texts: pa.DictionaryArray) -> pa.Array:
    """`hashed_id` of texts, int64 with nulls; each distinct text is hashed once."""
    return pc.take(pa.array(hashed_ids(texts.dictionary)), texts.indices)


# What the columns of Synthea's tables become: codes, values, visits and descriptions.


def codes_of(name: str, piece: Piece) -> pa.DictionaryArray:
    """Codes of the rows of the table ``name``, null where there is none."""
    codes = encode_text(piece.column("CODE"))
    if name == "encounters" and "ENCOUNTERCLASS" in piece.table.column_names:
        classes = encode_text(piece.column("ENCOUNTERCLASS"))
        if classes.null_count:
            merged = pc.coalesce(classes.cast(pa.string()), codes.cast(pa.string()))
            classes = merged.dictionary_encode()
        codes = classes
    return prefixed(PREFIXES[name], codes)


def values_of(piece: Piece, counts: EventCounts) -> pa.Array | None:
    """VALUE of observations, float32 with null where it is no number; None where there is no such column."""
    if "VALUE" not in piece.table.column_names:
        return None
    values, wrong = parse_numbers(piece, "VALUE")
    if "TYPE" in piece.table.column_names:
        numeric = pc.fill_null(pc.equal(pc.utf8_lower(piece.column("TYPE")), "numeric"), False)
        counts.change("value is no number", count(wrong & numeric.to_numpy(zero_copy_only=False)))
    return values


def visits_of(
    piece: Piece, column: str, times: pa.Array, encounters: Encounters | None, counts: EventCounts
) -> pa.Array:
    """Visit id of each event, int64 ``[rows]`` with nulls, from the column of the encounter's id, if any.

    The ids are looked up in the encounters; None to take every id as it is. Counted are the ids that are
    unknown, and the events outside their encounter.
    """
    if column not in piece.table.column_names:
        counts.change("unknown visit", len(times))
        return pa.nulls(len(times), pa.int64())
    visits = encoded_ids(encode_text(piece.column(column)))
    if encounters is None:
        counts.change("unknown visit", visits.null_count)
        return visits
    place = np.where(valid(visits), find(encounters.ids, visits.fill_null(0).to_numpy()), -1)
    known = place >= 0
    days = times.cast(pa.int64()).to_numpy() // DAY
    outside = np.zeros(len(days), dtype=bool)
    place, day = place[known], days[known]
    outside[known] = (day < encounters.first[place] - 1) | (day > encounters.last[place] + 1)
    counts.change("unknown visit", count(~known))
    counts.change("event outside its encounter", count(outside))
    return pc.if_else(pa.array(known & ~outside), visits, pa.scalar(None, pa.int64()))


def describe(piece: Piece, codes: pa.DictionaryArray, texts: dict[str, str]) -> None:
    """Add the descriptions of these codes; those of encounters are of the code, not of the class."""
    columns = piece.table.column_names
    if "DESCRIPTION" not in columns or "ENCOUNTERCLASS" in columns:
        return
    pairs = pa.table({"code": codes.indices, "text": piece.column("DESCRIPTION")})
    least = pairs.group_by("code", use_threads=False).aggregate([("text", "min")])
    names = codes.dictionary.to_pylist()
    for code, text in zip(least["code"].to_pylist(), least["text_min"].to_pylist(), strict=True):
        if code is not None and text is not None:
            name = str(names[code])
            texts[name] = min(texts.get(name, str(text)), str(text))

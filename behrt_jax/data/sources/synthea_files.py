"""The files of a Synthea export: found, checked for their columns, and what of them is held in memory."""

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.sources.csv_reading import Piece, csv_columns, is_csv, read_csv
from behrt_jax.data.sources.text_columns import TextIds, encode_text, find, hashed_ids, parse_times
from behrt_jax.errors import InputError

_DAY = 86_400_000_000


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
    """Which days the encounters cover, as UTC has them."""

    ids: np.ndarray  # int64 [encounters], ascending
    first: np.ndarray  # int64 [encounters], days since 1970
    last: np.ndarray  # int64 [encounters]


def find_files(path: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """The files of these tables: lower-case table name -> file.

    Raises:
        InputError: not a folder, or a table is there twice.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the folder of a Synthea CSV export.")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        name = file.name.lower().removesuffix(".gz").removesuffix(".csv")
        if not (is_csv(file) and file.is_file() and name in names):
            continue
        if name in found:
            raise InputError(f"{path} has both {found[name].name} and {file.name}: keep one of them.")
        found[name] = file
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
            start = parse_times(piece, file.start)
            stop = parse_times(piece, "STOP") if "STOP" in piece.table.column_names else start
            stop = pc.max_element_wise(start, stop)  # an encounter without a STOP is its first day
            there = pc.and_(ids.is_valid(), start.is_valid())
            days = [times.filter(there).cast(pa.int64()).to_numpy() // _DAY for times in (start, stop)]
            parts.append((ids.filter(there).to_numpy(), *days))
    ids, first, last = (np.concatenate(part) for part in zip(*parts, strict=True))  # [E]
    unique, place = np.unique(ids, return_inverse=True)
    # An id that comes twice is one encounter, from its first day to its last.
    earliest = np.full(len(unique), np.iinfo(np.int64).max)
    latest = np.full(len(unique), np.iinfo(np.int64).min)
    np.minimum.at(earliest, place, first)
    np.maximum.at(latest, place, last)
    return Encounters(unique, earliest, latest)


def encoded_ids(texts: pa.DictionaryArray) -> pa.Array:
    """`hashed_id` of texts, int64 with nulls; each distinct text is hashed once."""
    return pc.take(pa.array(hashed_ids(texts.dictionary)), texts.indices)

"""The tables of an OMOP folder: their columns, their files, read in bounded batches, and their concepts.

Tables are CSV, CSV.gz or Parquet, file and column names in any case. CDM 5.3 and 5.4 agree on all that is
named here. Source: the OMOP Common Data Model, https://ohdsi.github.io/CommonDataModel/.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.events import DEATH_CODE
from behrt_jax.data.parquet import CHUNK_ROWS
from behrt_jax.errors import InputError
from behrt_jax.files import data_files, is_hidden
from behrt_jax.records.sources.columns import ARROW_TYPES, Kind, cast_column, find
from behrt_jax.records.sources.files import (
    Part,
    Piece,
    csv_columns,
    csv_separator,
    cut_parts,
    is_empty,
    open_parquet,
    read_csv,
    read_part,
    refuse_absent,
    refuse_other_form,
)

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

PART_ROWS = 1 << 23
"""A Parquet file with more rows is cut, between row groups, into parts of about so many."""

Form = Literal[".csv", ".csv.gz", ".parquet"]
_FORMS: tuple[Form, ...] = (".csv.gz", ".csv", ".parquet")
_PART_OF = re.compile(r"(.+?)[_.-](?:part[_.-]?)?\d.*")
_BATCH_ROWS = min(CHUNK_ROWS, 1 << 18)

# Which columns of which table make which event.


@dataclass(frozen=True)
class ConceptColumns:
    """The columns that say what happened, best first, and the first part of the code made of them."""

    prefix: str
    concept: str
    source_concept: str
    source_value: str | None
    """None where the source's own value says who, not what (the number of a visit)."""

    def kinds(self) -> dict[str, Kind]:
        """Column -> what it holds."""
        kinds: dict[str, Kind] = {self.concept: "integer", self.source_concept: "integer"}
        if self.source_value:
            kinds[self.source_value] = "text"
        return kinds


@dataclass(frozen=True)
class EventTable:
    """A table of which every row is one event."""

    name: str
    what: ConceptColumns | str
    """Columns of the code, or the one code of all rows."""
    date: str
    datetime: str | None
    value: str | None = None
    in_visit: bool = True
    """Rows name the visit they belong to."""

    def kinds(self) -> dict[str, Kind]:
        """Column -> what it holds, for all columns that are read."""
        visit = "visit_occurrence_id" if self.in_visit else None
        times: dict[str | None, Kind] = {"person_id": "integer", self.date: "time", self.datetime: "time"}
        every: dict[str | None, Kind] = {**times, visit: "integer", self.value: "number"}
        kinds: dict[str, Kind] = {name: kind for name, kind in every.items() if name}
        return kinds | (self.what.kinds() if isinstance(self.what, ConceptColumns) else {})

    def required(self) -> list[tuple[str, ...]]:
        """Columns that must be there; of each tuple, at least one."""
        concept = [(self.what.concept,)] if isinstance(self.what, ConceptColumns) else []
        return [("person_id",), *concept, (self.date, self.datetime) if self.datetime else (self.date,)]


def _concepts(prefix: str, stem: str, source_value: bool = True) -> ConceptColumns:
    value = f"{stem}_source_value" if source_value else None
    return ConceptColumns(prefix, f"{stem}_concept_id", f"{stem}_source_concept_id", value)


def _events(name: str, stem: str, time: str, value: str | None = None) -> EventTable:
    return EventTable(name, _concepts(stem.upper(), stem), f"{time}_date", f"{time}_datetime", value)


DOMAIN_TABLES = (
    _events("condition_occurrence", "condition", "condition_start"),
    _events("drug_exposure", "drug", "drug_exposure_start"),
    _events("procedure_occurrence", "procedure", "procedure"),
    _events("measurement", "measurement", "measurement", "value_as_number"),
    _events("observation", "observation", "observation", "value_as_number"),
    _events("device_exposure", "device", "device_exposure_start"),
)
VISITS = EventTable(
    "visit_occurrence", _concepts("VISIT", "visit", False), "visit_start_date", "visit_start_datetime"
)
DEATHS = EventTable("death", DEATH_CODE, "death_date", "death_datetime", in_visit=False)
_PERIOD = "observation_period"
PERIODS = tuple(
    EventTable(_PERIOD, f"{_PERIOD.upper()}//{end.upper()}", f"{_PERIOD}_{end}_date", None, in_visit=False)
    for end in ("start", "end")
)
EVENT_TABLES = (*DOMAIN_TABLES, VISITS, DEATHS, *PERIODS)

PERSON_FACTS = tuple(_concepts(fact.upper(), fact) for fact in ("gender", "race", "ethnicity"))
BIRTH_KINDS: dict[str, Kind] = {
    "person_id": "integer",
    "birth_datetime": "time",
    "year_of_birth": "integer",
    "month_of_birth": "integer",
    "day_of_birth": "integer",
}


# The files of the tables, found, checked and read.


def omop_files(path: Path, ancestors: bool, skip: Sequence[str] = ()) -> dict[str, list[Path]]:
    """Lower-case table name -> files, of the tables that are read, with their columns checked.

    Raises:
        InputError: as `omop.open_omop`.
    """
    names = {"person", "concept", "concept_ancestor", *(table.name for table in EVENT_TABLES)}
    left_out, found = {name.lower() for name in skip} - {"person"}, set()

    def wanted(name: str) -> bool:
        found.add(name)
        return (name in names or name.endswith("_concept")) and name not in left_out

    tables = find_tables(path, wanted)
    refuse_absent("omop.skip", path, skip, found - {"person"})
    if "person" not in tables:
        raise InputError(f"{path} holds no table person (.csv, .csv.gz or .parquet): add it.")
    told = [table.name for table in (*DOMAIN_TABLES, VISITS)]
    if not tables.keys() & set(told):
        raise InputError(f"{path} holds no table of events: add at least one of {', '.join(told)}.")
    _require(tables["person"], [("person_id",), ("birth_datetime", "year_of_birth")])
    for table in EVENT_TABLES:
        _require(tables.get(table.name, []), table.required())
    _require(tables.get("visit_occurrence", []), [("visit_occurrence_id",)])
    concepts = [file for name in sorted(tables) if name.endswith("concept") for file in tables[name]]
    _require(concepts, [("concept_id",)])
    if not ancestors:
        tables.pop("concept_ancestor", None)
    columns = ("ancestor_concept_id", "descendant_concept_id", "min_levels_of_separation")
    _require(tables.get("concept_ancestor", []), [(column,) for column in columns])
    return tables


def _require(files: list[Path], required: list[tuple[str, ...]]) -> None:
    for file in files:
        present = columns_of(file)
        for choice in required:
            if not any(column in present for column in choice):
                raise InputError(
                    f"{file} has no column {' or '.join(choice)}: add or rename it; the columns are "
                    f"{', '.join(present)}."
                )


def find_tables(folder: Path, wanted: Callable[[str], bool]) -> dict[str, list[Path]]:
    """Lower-case table name -> its files, sorted.

    A table is one file (``person.csv``, ``PERSON.parquet``), files of parts (``person_0001.csv.gz``,
    ``person-part-0.parquet``) or a folder of parts (``person/*.parquet`` or, as Spark names it,
    ``person.parquet/*.parquet``, at any depth). Parts without rows are left out. ``wanted`` tells whether a
    table of a lower-case name is to be looked for.

    Raises:
        InputError: not a folder, a table is there twice (in two forms, or whole and in parts), or the folder
            of one cannot be searched (`files.data_files`) or holds no file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: set input to the folder that holds the tables.")
    found: dict[str, dict[str, list[Path]]] = {}
    others: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        if is_hidden(entry):
            continue
        if entry.is_dir():
            if wanted(name := entry.name.lower().removesuffix(_form(entry) or "")):
                files = data_files(entry, _FORMS)
                if not files:
                    raise InputError(
                        f"{entry} holds no file of {', '.join(_FORMS)}: add the table, remove the folder, or "
                        f"leave it out by --omop.skip {name}."
                    )
                for file in files:
                    found.setdefault(name, {}).setdefault(f"{entry.name}/*{_form(file)}", []).append(file)
        elif form := _form(entry):
            stem = entry.name.lower().removesuffix(form)
            part = _PART_OF.fullmatch(stem)
            if wanted(stem):
                found.setdefault(stem, {}).setdefault(entry.name, []).append(entry)
            elif part and wanted(part[1]):
                found.setdefault(part[1], {}).setdefault(f"{part[1]}_*{form}", []).append(entry)
        elif wanted(stem := entry.name.lower().split(".")[0]):
            others.setdefault(stem, entry)
    for name, entry in others.items():
        if name not in found:
            refuse_other_form(entry, _FORMS, f"omop.skip {name}")
    for name, ways in found.items():
        if len(ways) > 1:
            raise InputError(
                f"{folder} holds the table {name} more than once ({', '.join(sorted(ways))}): keep one."
            )
    tables = {name: files for name, ways in found.items() for files in ways.values()}
    for name, files in tables.items():
        if len(files) > 1:
            tables[name] = [file for file in files if not is_empty(file)] or files[:1]
    return tables


def _form(file: Path) -> Form | None:
    return next((form for form in _FORMS if file.name.lower().endswith(form)), None)


def parts_of(file: Path) -> list[Part]:
    """The parts of a file: one, or for a large Parquet file runs of row groups of about `PART_ROWS` rows."""
    if _form(file) != ".parquet":
        return [Part(file)]
    with open_parquet(file, damage=_damage) as opened:
        return cut_parts(file, opened.metadata, PART_ROWS) or [Part(file)]


def columns_of(file: Path) -> dict[str, str]:
    """Lower-case column name -> the name in the file.

    Raises:
        InputError: the file cannot be read, or has two columns of one name.
    """
    if _form(file) == ".parquet":
        with open_parquet(file, damage=_damage) as opened:
            names = opened.schema_arrow.names
    else:
        names = csv_columns(file, csv_separator(file))
    columns: dict[str, str] = {}
    for name in names:
        if columns.setdefault(name.strip().lower(), name) != name or names.count(name) > 1:
            raise InputError(f"{file} has two columns called {name.strip().lower()}: rename or drop one.")
    return columns


def read_chunks(part: Part, kinds: Mapping[str, Kind]) -> Iterator[pa.RecordBatch]:
    """Read some columns, lower-case name -> what it holds, in batches of at most `CHUNK_ROWS` rows.

    `integer` comes as int64, exactly; `number` as float64; `text` as string; `time` (timestamps, dates, ISO
    text or YYYYMMDD) as timestamp in microseconds without a zone. A column that the file has not is all null.

    Raises:
        InputError: the file is cut short, a row has too many or too few fields, text is not UTF-8, or a
            value is not what its column should hold; the message names file, column and row.
    """
    columns = columns_of(part.file)
    present = {name: columns[name] for name in kinds if name in columns}
    # Without any of the columns, some column tells how many rows there are.
    names = list(present.values()) or list(columns.values())[:1]
    for piece in _pieces(part, names):
        arrays = [
            cast_column(piece, present[name], kind)
            if name in present
            else pa.nulls(piece.table.num_rows, ARROW_TYPES[kind])
            for name, kind in kinds.items()
        ]
        yield pa.RecordBatch.from_arrays(arrays, names=list(kinds))


def _pieces(part: Part, columns: list[str]) -> Iterator[Piece]:
    if _form(part.file) != ".parquet":
        yield from read_csv(part.file, columns, separator=csv_separator(part.file))
        return
    with open_parquet(part.file, damage=_damage) as opened:
        yield from read_part(opened, part, columns, _BATCH_ROWS, _damage)


def _damage(file: Path, row: int | None) -> str:
    where = "" if row is None else f" after row {row}"
    return (
        f"{file} is no readable Parquet file{where} (cut short, or another format): write or copy it again."
    )


# Concepts of an OMOP vocabulary: the text of a concept id, its ancestor, and the codes of a table's rows.

MAX_LEVELS = 2
"""Most levels from a concept up to its ancestor."""


def integers(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """An int64 column ``[rows]`` with 0 for null."""
    return batch.column(column).fill_null(0).to_numpy(zero_copy_only=False)


@dataclass(frozen=True, eq=False)
class Concepts:
    """The part of the concept table that is needed while events are read; ids ascending, ``[concepts]``."""

    ids: np.ndarray  # int64
    codes: pa.Array  # string, null where unknown
    vocabularies: pa.DictionaryArray
    domains: np.ndarray  # int32, equal for concepts of the same domain; -1 where unknown, and once more last

    def texts(self, ids: np.ndarray) -> list[str]:
        """``vocabulary_id/concept_code`` of each id where known, else the id."""
        place = find(self.ids, ids)
        take = pa.array(place, mask=place < 0)
        codes = self.codes.take(take).to_pylist()
        vocabularies = self.vocabularies.take(take).to_pylist()
        rows = zip(ids.tolist(), vocabularies, codes, strict=True)
        return [f"{vocabulary}/{code}" if vocabulary and code else str(id_) for id_, vocabulary, code in rows]

    def domain_of(self, ids: np.ndarray) -> np.ndarray:
        """int32 domain of each id, -1 where unknown."""
        return self.domains[find(self.ids, ids)]


def load_concepts(files: Sequence[Path]) -> Concepts:
    """Read the concept table, without its names. Of a concept that is there twice the first row counts."""
    kinds: dict[str, Kind] = {
        "concept_id": "integer",
        "concept_code": "text",
        "vocabulary_id": "text",
        "domain_id": "text",
    }
    shared = ("vocabulary_id", "domain_id")  # few distinct texts
    columns: dict[str, list[pa.Array]] = {name: [] for name in kinds}
    for batch in _chunks(files, kinds):
        for name, column in zip(kinds, batch.columns, strict=True):
            columns[name].append(column.dictionary_encode() if name in shared else column)
    types = [pa.int64(), pa.string(), *[pa.dictionary(pa.int32(), pa.string())] * len(shared)]
    chunked = [pa.chunked_array(columns[name], kind) for name, kind in zip(kinds, types, strict=True)]
    rows = pa.table(chunked, names=list(kinds)).unify_dictionaries().combine_chunks()
    ids, first = np.unique(rows["concept_id"].fill_null(0).to_numpy(), return_index=True)
    vocabulary, domain = (rows[name].combine_chunks().take(pa.array(first)) for name in shared)
    codes = pc.utf8_trim_whitespace(rows["concept_code"].combine_chunks().take(pa.array(first)))
    domains = domain.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return Concepts(ids, codes, vocabulary, np.append(domains, np.int32(-1)))


def load_names(files: Sequence[Path], ids: Iterable[int]) -> dict[int, str]:
    """concept_name of some concepts, read in pieces."""
    wanted = np.unique(np.fromiter(ids, np.int64))
    names: dict[int, str] = {}
    for batch in _chunks(files, {"concept_id": "integer", "concept_name": "text"}):
        batch = batch.filter(pa.array(find(wanted, integers(batch, "concept_id")) >= 0))
        for concept, name in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if name and name.strip():
                names.setdefault(concept, name.strip())
    return names


def load_ancestors(files: Sequence[Path], concepts: Concepts) -> tuple[np.ndarray, np.ndarray]:
    """The concepts that have an ancestor to be replaced by, ascending, and that ancestor; int64 ``[n]``.

    Of a concept's ancestors that are 1 to `MAX_LEVELS` levels up (``min_levels_of_separation``) and in its
    own domain, the one furthest up; of several equally far, the one with the smallest id.

    Raises:
        InputError: there is no table, or it relates no two concepts.
    """
    best = np.empty((0, 3), np.int64)  # descendant, minus levels, ancestor
    rows = 0
    kinds: dict[str, Kind] = {
        "descendant_concept_id": "integer",
        "min_levels_of_separation": "integer",
        "ancestor_concept_id": "integer",
    }
    for batch in _chunks(files, kinds):
        rows += batch.num_rows
        down, levels, up = (integers(batch, column) for column in kinds)
        domain = concepts.domain_of(down)
        keep = (levels >= 1) & (levels <= MAX_LEVELS) & (domain >= 0) & (domain == concepts.domain_of(up))
        best = np.concatenate([best, np.stack([down, -levels, up], axis=1)[keep]])
        best = best[np.lexsort(best.T[::-1])]
        best = best[np.unique(best[:, 0], return_index=True)[1]]
    if not rows:
        raise InputError(
            "ancestors is set, but the table concept_ancestor is missing or empty: add it (OHDSI's "
            "vocabulary download has it) or leave the option out."
        )
    return best[:, 0], best[:, 2]


def _chunks(files: Sequence[Path], kinds: dict[str, Kind]) -> Iterator[pa.RecordBatch]:
    for file in files:
        for part in parts_of(file):
            yield from read_chunks(part, kinds)


@dataclass(frozen=True, eq=False)
class RowConcepts:
    """Concepts or values of the rows of a batch; all ``[rows]``."""

    prefix: str
    ids: np.ndarray  # int64 concept ids, 0 where there is none
    values: pa.Array  # source values, null where a concept id is there or no value is
    from_source: np.ndarray  # bool: the id is that of the source concept
    rolled_up: np.ndarray  # bool: the id is that of an ancestor

    def named(self) -> np.ndarray:
        """Bool: a row has a concept or a value to make its code of."""
        return (self.ids != 0) | self.valued()

    def valued(self) -> np.ndarray:
        """Bool: a row has nothing but a source value."""
        return self.values.is_valid().to_numpy(zero_copy_only=False)


def row_concepts(
    batch: pa.RecordBatch, columns: ConceptColumns, ancestors: tuple[np.ndarray, np.ndarray] | None
) -> RowConcepts:
    """The concept of each row, else its source concept, else its source value without blanks around it."""
    standard = integers(batch, columns.concept)
    ids = np.where(standard == 0, integers(batch, columns.source_concept), standard)
    rolled_up = np.zeros(len(ids), bool)
    if ancestors is not None:
        place = find(ancestors[0], ids)
        rolled_up = place >= 0
        ids[rolled_up] = ancestors[1][place[rolled_up]]
    values = pa.nulls(len(ids), pa.string())
    if columns.source_value:
        text = pc.utf8_trim_whitespace(batch.column(columns.source_value))
        use = pc.and_(pa.array(ids == 0), pc.fill_null(pc.not_equal(text, ""), False))
        values = pc.if_else(use, text, None)
    return RowConcepts(columns.prefix, ids, values, (standard == 0) & (ids != 0), rolled_up)


def encode_codes(rows: RowConcepts, keep: np.ndarray, concepts: Concepts) -> tuple[pa.Array, np.ndarray]:
    """Codes of the kept rows, as a dictionary array, and the distinct concept ids among them."""
    ids = rows.ids[keep]
    kept = pa.array(ids, mask=ids == 0).dictionary_encode()
    values = rows.values.filter(pa.array(keep)).dictionary_encode()
    used = kept.dictionary.to_numpy()
    texts = [*concepts.texts(used), *(f"SOURCE/{value}" for value in values.dictionary.to_pylist())]
    distinct = pa.array([f"{rows.prefix}//{text}" for text in texts], pa.string()).dictionary_encode()
    place = pc.coalesce(kept.indices, pc.add(values.indices, pa.scalar(len(used), pa.int32())))
    return pa.DictionaryArray.from_arrays(distinct.indices.take(place), distinct.dictionary), used

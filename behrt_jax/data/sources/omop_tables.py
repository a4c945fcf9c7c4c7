"""Which columns of which OMOP table make which event. CDM 5.3 and 5.4 agree on all that is named here.

Source: the OMOP Common Data Model, https://ohdsi.github.io/CommonDataModel/.
"""

from dataclasses import dataclass
from pathlib import Path

from behrt_jax.data.events import DEATH_CODE
from behrt_jax.data.sources.cdm_files import columns_of, find_tables
from behrt_jax.data.sources.cdm_values import Kind
from behrt_jax.errors import InputError


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
    """Whether rows name the visit they belong to."""

    def kinds(self) -> dict[str, Kind]:
        """Column -> what it holds, for all columns that are read."""
        kinds: dict[str, Kind] = {"person_id": "integer", self.date: "time"}
        if self.datetime:
            kinds[self.datetime] = "time"
        if self.in_visit:
            kinds["visit_occurrence_id"] = "integer"
        if self.value:
            kinds[self.value] = "number"
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
PERIODS = tuple(
    EventTable(
        "observation_period",
        f"OBSERVATION_PERIOD//{end.upper()}",
        f"observation_period_{end}_date",
        None,
        in_visit=False,
    )
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


def omop_files(path: Path, ancestors: bool) -> dict[str, list[Path]]:
    """Lower-case table name -> files, of the tables that are read, with their columns checked.

    Args:
        path: the folder.
        ancestors: whether concept_ancestor is read.

    Raises:
        InputError: as `omop.open_omop`.
    """
    names = {"person", "concept", "concept_ancestor", *(table.name for table in EVENT_TABLES)}
    tables = find_tables(path, lambda name: name in names or name.endswith("_concept"))
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

"""Miniature exports of Synthea, with the headers of three of its ages."""

import csv
import gzip
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

Era = Literal["2017", "2023", "today"]
ERAS: tuple[Era, ...] = ("2017", "2023", "today")
Line = Mapping[str, str]
"""Values by the name of the column in capitals; what is left out is empty."""

_REASON = "REASONCODE,REASONDESCRIPTION"
_EVENT_2023 = "START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION"
_EVENT_TODAY = "START,STOP,PATIENT,ENCOUNTER,SYSTEM,CODE,DESCRIPTION"
_PERSON = "SSN,DRIVERS,PASSPORT,PREFIX,FIRST"
_HOME = "MARITAL,RACE,ETHNICITY,GENDER,BIRTHPLACE,ADDRESS"
_PLACE = "CITY,STATE,COUNTY,FIPS,ZIP,LAT,LON,HEALTHCARE_EXPENSES,HEALTHCARE_COVERAGE,INCOME"
_ALLERGY = "TYPE,CATEGORY,REACTION1,DESCRIPTION1,SEVERITY1,REACTION2,DESCRIPTION2,SEVERITY2"
_COSTS = "BASE_COST,PAYER_COVERAGE,DISPENSES,TOTALCOST"
_VISIT = "Id,START,STOP,PATIENT,ORGANIZATION,PROVIDER,PAYER,ENCOUNTERCLASS,CODE,DESCRIPTION"
_VISIT_COSTS = "BASE_ENCOUNTER_COST,TOTAL_CLAIM_COST,PAYER_COVERAGE"
_MEDICATION = "START,STOP,PATIENT,PAYER,ENCOUNTER,CODE,DESCRIPTION"

HEADERS: dict[Era, dict[str, str]] = {
    "2017": {
        "patients": f"ID,BIRTHDATE,DEATHDATE,{_PERSON},LAST,SUFFIX,MAIDEN,{_HOME}",
        "encounters": f"ID,DATE,PATIENT,CODE,DESCRIPTION,{_REASON}",
        "conditions": _EVENT_2023,
        "medications": f"{_EVENT_2023},{_REASON}",
        "procedures": f"DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,{_REASON}",
        "observations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,VALUE,UNITS",
        "immunizations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION",
        "allergies": _EVENT_2023,
        "careplans": f"ID,{_EVENT_2023},{_REASON}",
        "claims": "ID,PATIENT,BILLABLEPERIOD,ORGANIZATION,ENCOUNTER,DIAGNOSIS, TOTAL",
    },
    "2023": {
        "patients": f"Id,BIRTHDATE,DEATHDATE,{_PERSON},LAST,SUFFIX,MAIDEN,{_HOME},{_PLACE}",
        "encounters": f"{_VISIT},{_VISIT_COSTS},{_REASON}",
        "conditions": _EVENT_2023,
        "medications": f"{_MEDICATION},{_COSTS},{_REASON}",
        "procedures": f"{_EVENT_2023},BASE_COST,{_REASON}",
        "observations": "DATE,PATIENT,ENCOUNTER,CATEGORY,CODE,DESCRIPTION,VALUE,UNITS,TYPE",
        "immunizations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,BASE_COST",
        "allergies": f"{_EVENT_TODAY.replace('SYSTEM,CODE', 'CODE,SYSTEM')},{_ALLERGY}",
        "careplans": f"Id,{_EVENT_2023},{_REASON}",
        "devices": f"{_EVENT_2023},UDI",
    },
    "today": {
        "patients": f"Id,BIRTHDATE,DEATHDATE,{_PERSON},MIDDLE,LAST,SUFFIX,MAIDEN,{_HOME},{_PLACE}",
        "encounters": f"{_VISIT},{_VISIT_COSTS},{_REASON}",
        "conditions": _EVENT_TODAY,
        "medications": f"{_MEDICATION},{_COSTS},{_REASON}",
        "procedures": f"{_EVENT_TODAY},BASE_COST,{_REASON}",
        "observations": "DATE,PATIENT,ENCOUNTER,CATEGORY,CODE,DESCRIPTION,VALUE,UNITS,TYPE",
        "immunizations": "DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,BASE_COST",
        "allergies": f"{_EVENT_TODAY.replace('SYSTEM,CODE', 'CODE,SYSTEM')},{_ALLERGY}",
        "careplans": f"Id,{_EVENT_2023},{_REASON}",
        "devices": f"{_EVENT_2023},UDI",
    },
}


def write_synthea(
    folder: Path,
    tables: Mapping[str, Iterable[Line]],
    era: Era = "today",
    *,
    name: Callable[[str], str] = "{}.csv".format,
) -> Path:
    """Write tables as an export of that age, and return the folder.

    A line's START goes to DATE where the age has no START, and values of columns that it has not are left
    out. Files whose ``name`` ends in .gz are compressed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for table, lines in tables.items():
        header = HEADERS[era][table].split(",")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for line in lines:
            values = {"DATE": line.get("START", ""), **line}
            writer.writerow([values.get(column.strip().upper(), "") for column in header])
        write_text(folder / name(table), text.getvalue())
    return folder


def write_text(file: Path, text: str | bytes) -> Path:
    """Write a file, compressed if its name says so, and return it."""
    data = text.encode() if isinstance(text, str) else text
    file.write_bytes(gzip.compress(data) if file.name.lower().endswith(".gz") else data)
    return file

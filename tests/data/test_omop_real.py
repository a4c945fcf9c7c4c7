"""The OMOP source on two public sets, where they are there."""

import os
from collections import Counter
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pytest

from behrt_jax.errors import InputError
from behrt_jax.records.sources.omop import open_omop
from tests.data.omop_folder import (
    read_all,
    rows_of,
)

REAL = Path(os.environ.get("EHR_TEST_DATA", ""))
needs_real = pytest.mark.skipif("EHR_TEST_DATA" not in os.environ, reason="EHR_TEST_DATA is not set")


@needs_real
def test_mimic_demo():
    source = open_omop(REAL / "mimic-iv-demo-omop")
    events, counts = read_all(source)
    codes = events["code"].cast(pa.string()).to_pylist()
    assert Counter(code.split("//")[0] for code in codes) == {
        **{"CONDITION": 16_441, "DRUG": 18_229, "PROCEDURE": 18_447, "DEVICE": 3_855, "VISIT": 852},
        **{"MEDS_BIRTH": 100, "MEDS_DEATH": 15, "OBSERVATION_PERIOD": 200},
        **{"GENDER": 100, "RACE": 95, "ETHNICITY": 5},
    }
    assert counts.dropped == {"no concept": 100}
    assert counts.changed["birth month or day filled in"] == 100
    assert counts.changed["concept 0, source value taken"] == 546
    assert "unknown visit" not in counts.changed
    subjects = pa.table({"id": events["subject_id"]})["id"].unique().to_pylist()
    assert len(subjects) == 100 and 3589912774911670296 in subjects and -3210373572193940939 in subjects
    births = {event[0]: event[1] for event in rows_of(events, "MEDS_BIRTH")}
    assert births[3589912774911670296] == datetime(2095, 1, 1)
    distinct = {
        prefix: len({c for c in codes if c.startswith(f"{prefix}//")}) for prefix in ("CONDITION", "DEVICE")
    }
    assert distinct == {"CONDITION": 979, "DEVICE": 4}
    assert len({event[4] for event in rows_of(events, "CONDITION")}) == 275
    assert source.descriptions()["PROCEDURE//mimiciv_proc_datetimeevents/225128"] == "Last dialysis"


@needs_real
def test_synthea27():
    source = open_omop(REAL / "synthea27nj-omop")
    events, counts = read_all(source)
    codes = events["code"].cast(pa.string()).to_pylist()
    assert Counter(code.split("//")[0] for code in codes) == {
        **{"CONDITION": 470, "DRUG": 883, "PROCEDURE": 1_649, "MEASUREMENT": 10_040, "OBSERVATION": 8_099},
        **{"DEVICE": 1, "VISIT": 1_791, "MEDS_BIRTH": 28, "MEDS_DEATH": 3, "OBSERVATION_PERIOD": 56},
        **{"GENDER": 28, "RACE": 28, "ETHNICITY": 28},
    }
    assert counts.dropped == {} and counts.changed["unknown visit"] == 1 + 4
    births = {event[0]: event[1] for event in rows_of(events, "MEDS_BIRTH")}
    assert births[1] == datetime(1998, 4, 9) and len(births) == 28
    assert source.descriptions()["CONDITION//SNOMED/43878008"] == "Streptococcal sore throat"
    assert len({code for code in codes if code.startswith("CONDITION//")}) == 70
    with pytest.raises(InputError, match="concept_ancestor is missing or empty"):
        read_all(open_omop(REAL / "synthea27nj-omop", ancestors=True))

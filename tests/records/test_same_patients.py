"""The MIMIC-IV demo as OMOP and as MEDS: the same subjects, births and (where both have them) deaths."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from behrt_jax.data.events import EventCounts
from behrt_jax.records.sources.meds import open_meds
from behrt_jax.records.sources.omop import open_omop

pytestmark = pytest.mark.skipif("EHR_TEST_DATA" not in os.environ, reason="needs the MIMIC-IV demo twice")


def times_of(source, code, names=None):
    """Subject -> times of its events with a code; subjects renamed where names are given."""
    counts = EventCounts()
    found = {}
    for unit in range(source.units()):
        for table in source.read(unit, counts):
            rows = table.filter(pa.compute.equal(table["code"].cast(pa.string()), code))
            for subject, time in zip(rows["subject_id"].to_pylist(), rows["time"].to_pylist(), strict=True):
                found[names[subject] if names else subject] = time
    return found


def test_both_forms_agree_on_subjects_births_and_deaths():
    root = Path(os.environ["EHR_TEST_DATA"])
    folder = root / "mimic-iv-demo-omop"
    types = {"person_id": pa.int64(), "person_source_value": pa.int64()}
    convert = pa.csv.ConvertOptions(column_types=types, include_columns=list(types))
    person = pa.csv.read_csv(folder / "person.csv.gz", convert_options=convert)
    names = dict(zip(*(person[column].to_pylist() for column in types), strict=True))
    assert min(names) < 0
    omop, meds = open_omop(folder), open_meds(root / "mimic-iv-demo-meds")
    births = times_of(omop, "MEDS_BIRTH", names)
    assert len(births) == 100
    assert births == times_of(meds, "MEDS_BIRTH")
    deaths, all_deaths = times_of(omop, "MEDS_DEATH", names), times_of(meds, "MEDS_DEATH")
    assert (len(deaths), len(all_deaths)) == (15, 31)
    days = [(deaths[subject].date(), all_deaths[subject].date()) for subject in deaths]
    assert all(np.equal(*pair) for pair in days)

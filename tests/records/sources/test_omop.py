"""The OMOP source on miniature folders: which events come of which rows."""

import json
import os
import pickle
from collections import Counter
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.errors import InputError
from behrt_jax.records.sources.omop import open_omop
from tests.records.omop_folder import (
    HISTORY,
    codes_of,
    concept,
    condition,
    person,
    read_all,
    row,
    rows_of,
    visit,
    write_omop,
    write_table,
)

MIDNIGHT = datetime(2000, 1, 1)


EXPECTED = [
    (-5, datetime(1950, 2, 3), "MEDS_BIRTH", None, None),
    (7, datetime(1960, 5, 6, 7, 8, 9), "MEDS_BIRTH", None, None),
    (-5, None, "GENDER//Gender/F", None, None),
    (7, None, "GENDER//Gender/F", None, None),
    (-5, None, "RACE//8527", None, None),
    (-5, datetime(2000, 1, 1, 11, 12, 13), "CONDITION//SNOMED/38341003", None, None),
    (7, datetime(2001, 1, 1), "DRUG//201", None, None),
    (7, datetime(2001, 1, 2), "PROCEDURE//301", None, None),
    (7, datetime(2001, 1, 3), "MEASUREMENT//401", 1.125, None),
    (7, datetime(2001, 1, 4), "OBSERVATION//501", None, None),
    (7, datetime(2001, 1, 5), "DEVICE//601", None, None),
    (-5, datetime(2000, 1, 1, 10), "VISIT//9201", None, -11),
    (7, datetime(2001, 1, 6, 12), "MEDS_DEATH", None, None),
    (7, datetime(1999, 1, 1), "OBSERVATION_PERIOD//START", None, None),
    (7, datetime(2001, 1, 6), "OBSERVATION_PERIOD//END", None, None),
]


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("upper", [False, True])
def test_every_table_in_every_form(tmp_path, form, upper):
    source = open_omop(write_omop(tmp_path, HISTORY, form=form, upper=upper, small_ids=True))
    events, counts = read_all(source)
    assert rows_of(events, "") == EXPECTED
    assert counts.dropped == {"no concept": 3}  # one race, two ethnicities
    assert counts.changed == {"unknown visit": 6}
    assert (source.name, source.splits()) == ("omop", {})
    assert {file.name.lower() for file in source.files()} == {f"{name}.{form}" for name in HISTORY}
    assert source.sample_subjects().tolist() == [-5, 7, -5]
    expected = {"CONDITION//SNOMED/38341003": "Name of 38341003", "GENDER//Gender/F": "Name of F"}
    assert open_omop(tmp_path).descriptions() == expected  # another process may have read the events
    merging = open_omop(tmp_path)
    merging.learn(json.loads(json.dumps(source.learned())))
    next(file for file in source.files() if "condition" in file.name.lower()).unlink()
    assert source.descriptions() == pickle.loads(pickle.dumps(source)).descriptions() == expected
    assert merging.descriptions() == expected


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_64_bit_ids_come_through_exactly(tmp_path, form):
    ids = [-(2**63), 2**63 - 1, 2**53 + 1, -(2**53) - 1, 2**31]
    tables = {
        "person": [person(id_) for id_ in ids],
        "visit_occurrence": [visit(id_, id_) for id_ in ids],
        "condition_occurrence": [condition(id_, 2_000_000_001, visit_occurrence_id=id_) for id_ in ids],
    }
    events, counts = read_all(open_omop(write_omop(tmp_path, tables, form=form)))
    assert [(event[0], event[4]) for event in rows_of(events)] == [(id_, id_) for id_ in ids]
    assert [event[0] for event in rows_of(events, "MEDS_BIRTH")] == ids
    assert "unknown visit" not in counts.changed


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_births_with_missing_parts_are_filled_in_and_counted(tmp_path, form):
    persons = [
        person(1, birth_datetime="1950-06-07 08:09:10", day_of_birth=None),
        person(2),
        person(3, day_of_birth=None),
        person(4, month_of_birth=None),
        person(5, month_of_birth=None, day_of_birth=None),
        person(6, month_of_birth=2, day_of_birth=30),
        person(7, month_of_birth=13),
        person(8, year_of_birth=2000, day_of_birth=29),
        person(9, year_of_birth=None),
        person(10, year_of_birth=1899, month_of_birth=12, day_of_birth=31),
        person(11, birth_datetime="1900-01-01"),
        person(12, birth_datetime="1951-01-01 03:00:00"),
        person(13, birth_datetime="9999-12-31", month_of_birth=None),
    ]
    folder = write_omop(tmp_path, {"person": persons, "visit_occurrence": []}, form=form)
    events, counts = read_all(open_omop(folder))
    assert [(event[0], event[1]) for event in rows_of(events, "MEDS_BIRTH")] == [
        (1, datetime(1950, 6, 7, 8, 9, 10)),
        (2, datetime(1950, 2, 3)),
        (3, datetime(1950, 2, 1)),
        (4, datetime(1950, 1, 1)),
        (5, datetime(1950, 1, 1)),
        (6, datetime(1950, 2, 1)),
        (7, datetime(1950, 1, 1)),
        (8, datetime(2000, 2, 29)),
        (10, datetime(1899, 12, 31)),
        (11, datetime(1950, 2, 3)),
        (12, datetime(1951, 1, 1, 3)),  # a day off, as a zone makes it
        (13, datetime(1950, 1, 1)),
    ]
    assert counts.changed["birth month or day filled in"] == 6
    assert counts.changed["birth_datetime outside of the year of birth, which was taken"] == 2
    assert counts.dropped["no year of birth"] == 1


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_concept_zero_falls_back_to_source_concept_then_value(tmp_path, form):
    conditions = [
        condition(1, 101),
        condition(1, 0, condition_source_concept_id=102, condition_source_value="x"),
        condition(1, None, condition_source_concept_id=103),
        condition(1, 0, condition_source_concept_id=0, condition_source_value="4019   "),
        condition(1, 0, condition_source_value=" 4019"),
        condition(1, 0, condition_source_concept_id=0, condition_source_value="   "),
        condition(1, None),
        condition(1, 101, condition_source_concept_id=102, condition_source_value="ignored"),
    ]
    tables = {
        "person": [person(1, gender_concept_id=0, gender_source_value="F ")],
        "condition_occurrence": conditions,
        "visit_occurrence": [visit(1, 1, visit_concept_id=0, visit_source_value="stay 77 of subject 1")],
        "concept": [concept(102, "401.9", vocabulary_id="ICD9CM")],
    }
    events, counts = read_all(open_omop(write_omop(tmp_path, tables, form=form)))
    assert codes_of(events, "CONDITION") == [
        "CONDITION//101",
        "CONDITION//ICD9CM/401.9",
        "CONDITION//103",
        "CONDITION//SOURCE/4019",
        "CONDITION//SOURCE/4019",
        "CONDITION//101",
    ]
    assert codes_of(events, "GENDER") == ["GENDER//SOURCE/F"]
    assert codes_of(events, "VISIT") == []  # a visit's own value names the stay, not its kind
    assert counts.changed["concept 0, source concept taken"] == 2
    assert counts.changed["concept 0, source value taken"] == 3
    assert counts.dropped == {"no concept": 2 + 2 + 1}  # conditions, race and ethnicity, the visit


def test_concepts_of_a_site_and_of_a_tab_separated_vocabulary(tmp_path):
    tables = {
        "person": [person(1)],
        "condition_occurrence": [condition(1, id_) for id_ in (101, 102, 103, 104)],
    }
    write_omop(tmp_path, tables)
    write_table(tmp_path / "2b_concept.csv", "concept", [concept(102, "site ", vocabulary_id="SITE")])
    # As OHDSI hands vocabularies out: tabs, no quoting, bare quotes in names.
    (tmp_path / "CONCEPT.csv").write_text(
        "concept_id\tconcept_name\tdomain_id\tvocabulary_id\tconcept_code\tvalid_start_date\n"
        '101\t"Severe" pain, left\tCondition\tSNOMED\t76948002\t20020131\n'
        "102\tnot this one\tCondition\t\t1\t20020131\n"
        "103\t\tCondition\tSNOMED\t5\t20020131\n"
    )
    source = open_omop(tmp_path)
    events, _ = read_all(source)
    # The standard's table comes before the site's; its concept 102 has no vocabulary.
    expected = ["SNOMED/76948002", "102", "SNOMED/5", "104"]
    assert codes_of(events, "CONDITION") == [f"CONDITION//{code}" for code in expected]
    named = {"CONDITION//SNOMED/76948002": '"Severe" pain, left', "CONDITION//102": "not this one"}
    assert {code: text for code, text in source.descriptions().items() if code in named} == named
    (tmp_path / "CONCEPT.csv").unlink()
    source = open_omop(tmp_path)
    assert codes_of(read_all(source)[0], "CONDITION")[1] == "CONDITION//SITE/site"
    assert source.descriptions() == {"CONDITION//SITE/site": "Name of site"}


ANCESTORS = [
    (101, 101, 0),
    (102, 101, 1),
    (103, 101, 2),
    (99, 101, 2),
    (98, 101, 3),
    (97, 101, 2),
    (103, 102, 1),
    (104, 104, 0),
]


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("reverse", [False, True])
def test_ancestors_at_most_two_levels_up_in_the_same_domain(tmp_path, form, reverse):
    related = [
        row(ancestor_concept_id=up, descendant_concept_id=down, min_levels_of_separation=levels)
        for up, down, levels in ANCESTORS
    ]
    tables = {
        "person": [person(1)],
        "condition_occurrence": [condition(1, id_) for id_ in (101, 102, 103, 104)],
        "concept": [concept(id_, str(id_), "Drug" if id_ == 97 else "Condition") for id_ in range(97, 105)],
        "concept_ancestor": related[::-1] if reverse else related,
    }
    source = open_omop(write_omop(tmp_path, tables, form=form), ancestors=True)
    events, counts = read_all(source)
    assert codes_of(events, "CONDITION") == [
        f"CONDITION//{code}" for code in ("SNOMED/99", "SNOMED/103", "SNOMED/103", "SNOMED/104")
    ]
    assert counts.changed["concept replaced by an ancestor"] == 2
    assert set(source.descriptions()) == {f"CONDITION//SNOMED/{concept}" for concept in (99, 103, 104)}
    assert any("ancestor" in file.name for file in source.files())
    plain = open_omop(tmp_path)
    assert codes_of(read_all(plain)[0], "CONDITION")[0] == "CONDITION//SNOMED/101"
    assert not any("ancestor" in file.name for file in plain.files())


@pytest.mark.parametrize("there", [False, True])
def test_ancestors_without_a_table_of_them(tmp_path, there):
    tables = HISTORY | ({"concept_ancestor": []} if there else {})
    with pytest.raises(InputError, match="concept_ancestor is missing or empty"):
        read_all(open_omop(write_omop(tmp_path, tables), ancestors=True))


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_events_known_by_the_day_never_precede_their_visit_or_birth(tmp_path, form):
    stay, start = {"visit_occurrence_id": 1}, "condition_start_datetime"
    conditions = [
        condition(1, 1, **stay),
        condition(1, 2, **stay, **{start: "2000-01-01 00:00:00"}),
        condition(1, 3, **stay, **{start: "2000-01-01 09:00:00"}),  # a true time stays, though too early
        condition(1, 4, "2000-01-02", **stay),
        condition(1, 5),
        condition(1, 6, "1999-12-31", **stay),
        condition(1, 7, "1990-05-05"),
        condition(1, 8, "1999-12-31", **stay, **{start: "2000-01-01 11:30:00"}),
        condition(1, 9, "1990-05-04"),
        condition(2, 10, visit_occurrence_id=2),  # born in the visit
    ]
    tables = {
        "person": [
            person(2, year_of_birth=2000, birth_datetime="2000-01-01 12:00:00"),
            person(1, year_of_birth=1990, birth_datetime="1990-05-05 06:00:00"),
        ],
        "visit_occurrence": [
            visit(2, 2, visit_start_datetime="2000-01-01 11:00:00"),
            visit(1, 1, visit_start_datetime="2000-01-01 10:00:00"),
        ],
        "condition_occurrence": conditions,
    }
    events, counts = read_all(open_omop(write_omop(tmp_path, tables, form=form)))
    assert [event[1] for event in rows_of(events)] == [
        datetime(2000, 1, 1, 10),
        datetime(2000, 1, 1, 10),
        datetime(2000, 1, 1, 9),
        datetime(2000, 1, 2),
        MIDNIGHT,
        datetime(1999, 12, 31),
        datetime(1990, 5, 5, 6),
        datetime(2000, 1, 1, 11, 30),
        datetime(1990, 5, 4),
        datetime(2000, 1, 1, 12),
    ]
    assert counts.changed["no time of day, put at the start of its visit or at birth"] == 4


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_unknown_visits_subjects_and_times_are_counted(tmp_path, form):
    conditions = [
        condition(1, 1, visit_occurrence_id=-10),
        condition(1, 2, visit_occurrence_id=10),  # points nowhere
        condition(1, 3),
        condition(1, 4, visit_occurrence_id=20),  # the visit of another person
        condition(3, 5),
        condition(None, 6),
        condition(1, 7, None),
        condition(3, None, None),  # each event is dropped once
    ]
    tables = {
        "person": [person(1), person(2), person(0)],
        "visit_occurrence": [visit(-10, 1), visit(20, 2), visit(0, 1)],
        "condition_occurrence": conditions,
        "death": [row(person_id=3, death_date="2001-01-01")],
    }
    events, counts = read_all(open_omop(write_omop(tmp_path, tables, form=form)))
    assert [(event[2], event[4]) for event in rows_of(events)] == [
        ("CONDITION//1", -10),
        ("CONDITION//2", None),
        ("CONDITION//3", None),
        ("CONDITION//4", None),
    ]
    assert counts.changed == {"unknown visit": 3}
    assert counts.dropped == {"unknown subject": 4, "null time": 1, "no concept": 6}


@pytest.mark.parametrize("discharge", ["discharge_to_concept_id", "discharged_to_concept_id"])
def test_visits_of_5_3_and_5_4(tmp_path, discharge):
    write_omop(tmp_path, {"person": [person(1)]})
    (tmp_path / "visit_occurrence.csv").write_text(
        f"visit_occurrence_id,person_id,visit_concept_id,visit_start_date,{discharge}\n5,1,9201,2000-01-01,8536\n"
    )
    events, _ = read_all(open_omop(tmp_path))
    assert rows_of(events, "VISIT") == [(1, MIDNIGHT, "VISIT//9201", None, 5)]


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2000-01-02", datetime(2000, 1, 2)),
        ("20000102", datetime(2000, 1, 2)),
        ("2000-01-02 03:04", datetime(2000, 1, 2, 3, 4)),
        ("2000-01-02T03:04:05Z", datetime(2000, 1, 2, 3, 4, 5)),
        ("2000-01-02 03:04:05+02:00", datetime(2000, 1, 2, 3, 4, 5)),  # as clocks there show it
        ("2000-01-01 21:00:00-04", datetime(2000, 1, 1, 21)),
        ("2000-01-01 21:00:00.25 -0430", datetime(2000, 1, 1, 21, 0, 0, 250_000)),
        ("2000-01-02 03:04:05 UTC", datetime(2000, 1, 2, 3, 4, 5)),
        ("2000-01-02 03:04:05.1234567", datetime(2000, 1, 2, 3, 4, 5, 123456)),
        (" 2000-01-02 03:04:05 ", datetime(2000, 1, 2, 3, 4, 5)),
        ("2201-01-02 03:04:05", MIDNIGHT),  # no zone explains it
        ("1999-12-30 23:59:59", MIDNIGHT),
        ("1999-12-31 00:00:01", datetime(1999, 12, 31, 0, 0, 1)),
        ("  ", MIDNIGHT),
        ("NULL", MIDNIGHT),
    ],
)
def test_spellings_of_times(tmp_path, text, time):
    write_omop(tmp_path, {"person": [person(1)]})
    (tmp_path / "procedure_occurrence.csv").write_text(
        "person_id,procedure_concept_id,procedure_date,procedure_datetime\n"
        f"1,1,2000-01-01,2000-01-01 00:00:01\n1,2,2000-01-01,{text}\n"
    )
    events, _ = read_all(open_omop(tmp_path))
    assert [event[1] for event in rows_of(events, "PROCEDURE")] == [datetime(2000, 1, 1, 0, 0, 1), time]


def test_a_day_that_a_zone_moves_keeps_events_within_life(tmp_path):
    start = "condition_start_datetime"
    conditions = [
        condition(1, 1, "2000-03-01", **{start: "2000-03-02 01:00:00"}),  # an evening of the day of death
        condition(1, 2, "2000-03-01", **{start: "2000-03-01 23:00:00"}),
        condition(1, 3, "2000-03-02", **{start: "2000-03-02 01:00:00"}),  # after death, also by its date
        condition(1, 4, "1950-02-03", **{start: "1950-02-02 20:00:00"}),
        condition(1, 5, "1950-02-02", **{start: "1950-02-02 20:00:00"}),
        condition(1, 6, "1990-01-01", **{start: "1989-12-31 20:00:00"}),
        condition(1, 7, "1990-01-01", **{start: "2020-12-31 20:00:00"}),
    ]
    tables = {
        "person": [person(1)],
        "visit_occurrence": [],
        "condition_occurrence": conditions,
        "death": [row(person_id=1, death_date="2000-03-01")],
    }
    events, counts = read_all(open_omop(write_omop(tmp_path, tables)))
    assert [event[1] for event in rows_of(events)] == [
        datetime(2000, 3, 1, 23, 59, 59, 999999),
        datetime(2000, 3, 1, 23),
        datetime(2000, 3, 2, 1),
        datetime(1950, 2, 3),
        datetime(1950, 2, 2, 20),
        datetime(1989, 12, 31, 20),
        datetime(1990, 1, 1),
    ]
    assert counts.changed["datetime outside of life on a date within, moved to that date"] == 2
    assert counts.changed["datetime far from its date, which was taken"] == 1


_conditions = st.builds(
    condition,
    st.sampled_from([-1, 2, 3, None]),
    st.sampled_from([0, 1, 2, None]),
    st.sampled_from(["1999-12-31", "2000-01-01", None]),
    condition_start_datetime=st.sampled_from([None, "2000-01-01 00:00:00", "2000-01-01 12:34:56"]),
    visit_occurrence_id=st.sampled_from([None, -9, 9, 10]),
    condition_source_concept_id=st.sampled_from([None, 0, 5]),
    condition_source_value=st.sampled_from([None, " ", "é, x", "5"]),
)


@given(rows=st.lists(_conditions, max_size=12), data=st.data())
def test_neither_order_nor_form_of_the_rows_matters(tmp_path_factory, rows, data):
    visits = [visit(-9, -1, visit_start_datetime="2000-01-01 08:00:00"), visit(9, 2), visit(9, 3)]
    tables = {"person": [person(-1), person(2)], "visit_occurrence": visits}
    folder = tmp_path_factory.mktemp("omop")
    found = []
    for form, order in (("csv", rows), ("parquet", data.draw(st.permutations(rows)))):
        write_omop(folder / form, tables | {"condition_occurrence": order}, form=form)
        events, counts = read_all(open_omop(folder / form))
        found.append((Counter(rows_of(events, "")), counts))
    assert found[0] == found[1]


# The OMOP source on two public sets, where they are there.


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

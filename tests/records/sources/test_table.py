import datetime as dt
import gzip
import random
from collections import Counter
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from behrt_jax.config.data import STATIC_CODES, PrepareConfig, SplitOptions, TableColumns
from behrt_jax.data.events import EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.errors import InputError
from behrt_jax.records.prepare.pipeline import prepare
from behrt_jax.records.sources import files as csv_reading
from behrt_jax.records.sources import table as table_source
from behrt_jax.records.sources.columns import hashed_id
from behrt_jax.records.sources.table import TableSource, WithBirths, open_table
from behrt_jax.workflows.prepare import open_source

ALL = TableColumns(value="value", visit="visit", birth="birth")
BIG = 2**62 + 1
ROWS = {
    "subject_id": [BIG, -5, BIG, 7],
    "time": ["2020-01-02", "2020-01-03T04:05:06Z", None, "1999-12-31 23:59:59"],
    "code": ["I10", "E11", "SEX//F", "250"],
    "value": [1.5, None, None, -3.0],
    "visit": [BIG + 2, None, None, -1],
    "birth": ["1950-01-01", "1960-01-01", "1950-01-01", None],
}
KINDS = {"subject_id": pa.int64(), "visit": pa.int64(), "value": pa.float64()}
EVENTS = [
    (-5, dt.datetime(1960, 1, 1), "MEDS_BIRTH", None, None),
    (BIG, dt.datetime(1950, 1, 1), "MEDS_BIRTH", None, None),
    (BIG, dt.datetime(2020, 1, 2), "I10", 1.5, BIG + 2),
    (-5, dt.datetime(2020, 1, 3, 4, 5, 6), "E11", None, None),
    (BIG, None, "SEX//F", None, None),
    (7, dt.datetime(1999, 12, 31, 23, 59, 59), "250", -3.0, -1),
]


def arrow(rows=ROWS, **kinds):
    kinds = KINDS | kinds
    return pa.table({name: pa.array(values, kinds.get(name)) for name, values in rows.items()})


def write(file, content):
    """Write a table as what the file's name says."""
    if isinstance(content, str | bytes):
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    elif file.suffix.lower() == ".parquet":
        pq.write_table(content, file, row_group_size=2)
    else:
        text = content.set_column(1, "time", content["time"].cast(pa.string()))
        pa_csv.write_csv(text, file)
        if file.name.endswith(".gz"):
            file.write_bytes(gzip.compress(file.read_bytes()))
    return file


def read_all(source):
    counts = EventCounts()
    tables = [table for unit in range(source.units()) for table in source.read(unit, counts)]
    assert all(table.schema.equals(pa.schema([*EVENT_SCHEMA, VISIT_FIELD])) for table in tables)
    rows = [tuple(row.values()) for table in tables for row in table.to_pylist()]
    assert len(rows) == counts.kept
    return rows, counts


def raised(action, *texts):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    for text in texts:
        assert text in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["t.csv", "T.CSV", "t.csv.gz", "t.parquet", "T.PARQUET"])
def test_the_same_from_every_form(tmp_path, name):
    file = write(tmp_path / name, arrow())
    source = open_table(file, ALL)
    rows, counts = read_all(source)
    assert rows == EVENTS
    assert (counts.read, counts.dropped, counts.changed) == (6, {}, {"unknown visit": 2})
    assert source.files() == [file]
    assert (source.splits(), source.descriptions(), source.name) == ({}, {}, "table")
    assert set(source.sample_subjects()) == {BIG, -5, 7}


def test_three_columns_are_enough(tmp_path):
    names = TableColumns(subject="pid", time="when", code="what")
    content = arrow().select(["subject_id", "time", "code"]).rename_columns(["pid", "when", "what"])
    rows, counts = read_all(open_table(write(tmp_path / "t.parquet", content), names))
    assert rows == [(*row[:3], None, None) for row in EVENTS[2:]]
    assert (counts.read, counts.changed) == (4, {})


@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("ns"),
        pa.timestamp("ms"),
        pa.timestamp("us", "Europe/Berlin"),
        pa.date32(),
        pa.date64(),
        pa.string(),
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_types_of_time(tmp_path, kind):
    moments = pa.array([dt.datetime(1961, 3, 4), None], pa.timestamp("us"))
    if pa.types.is_timestamp(kind) and kind.tz:
        moments = pc.assume_timezone(moments, kind.tz)  # what clocks there show
    if pa.types.is_dictionary(kind):
        times = moments.cast(pa.string()).dictionary_encode()
    else:
        times = moments.cast(kind)
    content = pa.table({"subject_id": [1, 1], "time": times, "code": ["a", "b"]})
    rows, _ = read_all(open_table(write(tmp_path / "t.parquet", content), TableColumns()))
    assert [row[1] for row in rows] == [dt.datetime(1961, 3, 4), None]


def test_nanoseconds_before_1970_go_down(tmp_path):
    times = pa.array([-1, 1999], pa.int64()).cast(pa.timestamp("ns"))
    content = pa.table({"subject_id": [1, 1], "time": times, "code": ["a", "b"]})
    source = open_table(write(tmp_path / "t.parquet", content), TableColumns())
    (events,) = source.read(0, EventCounts())
    assert events["time"].cast(pa.int64()).to_pylist() == [-1, 1]


def test_types_of_code_and_ids(tmp_path):
    content = pa.table(
        {
            "subject_id": pa.array([Decimal(2**53 + 1), Decimal(-3), None], pa.decimal128(20, 0)),
            "time": pa.array([0, 0, 0], pa.timestamp("us")),
            "code": pa.array([250, -1, 3], pa.int16()),
            "visit": pa.array(["12", "ward 7", "012"]).dictionary_encode(),
        }
    )
    source = open_table(write(tmp_path / "t.parquet", content), TableColumns(visit="visit"))
    rows, counts = read_all(source)
    assert [(row[0], row[2], row[4]) for row in rows] == [
        (2**53 + 1, "250", 12),
        (-3, "-1", hashed_id("ward 7")),
    ]
    assert (counts.read, counts.dropped) == (3, {"null subject": 1})


def test_decimal_codes(tmp_path):
    codes = pa.array([Decimal(250), Decimal(-10)], pa.decimal128(38, 0))
    content = pa.table({"subject_id": [1, 1], "time": ["2020-01-01"] * 2, "code": codes})
    rows, _ = read_all(open_table(write(tmp_path / "t.parquet", content), TableColumns()))
    assert [row[2] for row in rows] == ["250", "-10"]


def test_text_ids(tmp_path):
    texts = [
        "7",
        "-7",
        "007",
        "+7",
        "a b",
        " 7 ",
        str(2**63 - 1),
        str(2**63),
        str(-(2**63)),
        "0",
        "-0",
        "1.0",
        "1.5",
        "123456789012345.00",
        "9" * 18,
        "9" * 19,
    ]
    lines = "".join(f"{text},2020-01-01,x\n" for text in texts)
    rows, _ = read_all(
        open_table(write(tmp_path / "t.csv", "subject_id,time,code\n" + lines), TableColumns())
    )
    hashed = {text: hashed_id(text) for text in ("007", "+7", "a b", str(2**63), "-0", "1.5", "9" * 19)}
    assert [row[0] for row in rows] == [hashed[t] if t in hashed else int(t.split(".")[0]) for t in texts]


def test_nulls_are_counted(tmp_path):
    lines = ",2020-01-01,\n,2020-01-01,x\n1,2020-01-01, \n1,2020-01-01,NULL\n1, ,y\n1,\\N, z \n"
    rows, counts = read_all(
        open_table(write(tmp_path / "t.csv", "subject_id,time,code\n" + lines), TableColumns())
    )
    assert rows == [(1, None, "y", None, None), (1, None, "z", None, None)]
    assert (counts.read, counts.dropped) == (6, {"null subject": 2, "null code": 2})


def test_births_that_differ(tmp_path):
    lines = (
        "1,2020-01-01,x,1950-01-02\n1,2020-01-01,x,1950-01-01\n2,2020-01-01,x,\n1,2020-01-01,x,1900-01-01\n"
    )
    file = write(tmp_path / "t.csv", "subject_id,time,code,birth\n" + lines)
    rows, counts = read_all(open_table(file, TableColumns(birth="birth")))
    assert rows[0] == (1, dt.datetime(1950, 1, 1), "MEDS_BIRTH", None, None)
    assert (len(rows), counts.read, counts.changed) == (5, 5, {"births differ": 1})


def test_values_that_are_not_finite(tmp_path):
    values = pa.array([1.0, float("nan"), 1e300, None, float("-inf")])
    content = pa.table(
        {"subject_id": [1] * 5, "time": ["2020-01-01"] * 5, "code": ["x"] * 5, "value": values}
    )
    rows, counts = read_all(open_table(write(tmp_path / "t.parquet", content), TableColumns(value="value")))
    assert [row[3] for row in rows] == [1.0, None, None, None, None]
    assert counts.changed == {"value is not finite": 3}
    without = content.set_column(2, "code", pa.array([None, None, "x", "x", "x"]))
    rows, counts = read_all(open_table(write(tmp_path / "u.parquet", without), TableColumns(value="value")))
    assert (counts.dropped, counts.changed) == ({"null code": 2}, {"value is not finite": 2})


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_empty_table(tmp_path, name):
    source = open_table(write(tmp_path / name, arrow().slice(0, 0)), ALL)
    assert read_all(source) == ([], EventCounts())
    assert len(source.sample_subjects()) == 0


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), chunk=st.integers(1, 20), unit=st.integers(1, 40), group=st.integers(1, 50)
)
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_order_and_units_make_no_difference(tmp_path, monkeypatch, name, seed, chunk, unit, group):
    draw = random.Random(3)
    rows = [
        {
            "subject_id": draw.choice(["1", "22", "x", None]),
            "time": draw.choice(["2020-01-01", "2020-02-02", None]),
            "code": draw.choice(["a", "b", None]),
            "value": draw.choice([None, 0.5]),
            "visit": draw.choice([None, 3]),
            "birth": draw.choice(["1950-01-01", "1951-01-01", None]),
        }
        for _ in range(50)
    ]

    def outcome(rows, group):
        columns = {name: [row[name] for row in rows] for name in ROWS}
        content = arrow(columns, subject_id=pa.string(), birth=pa.string())
        file = tmp_path / name
        if name == "t.parquet":
            pq.write_table(content, file, row_group_size=group)
        else:
            write(file, content)
        source = open_table(file, ALL)
        events, counts = read_all(source)
        assert all(
            part.num_rows <= table_source.CHUNK_ROWS
            for part in source.read(source.units() - 1, EventCounts())
        )
        return Counter(events), counts, set(source.sample_subjects())

    expected = outcome(rows, 50)
    random.Random(seed).shuffle(rows)
    with monkeypatch.context() as patch:
        patch.setattr(table_source, "CHUNK_ROWS", chunk)
        patch.setattr(csv_reading, "CHUNK_ROWS", chunk)
        patch.setattr(table_source, "UNIT_ROWS", unit)
        assert outcome(rows, group) == expected


def test_units_are_runs_of_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(table_source, "UNIT_ROWS", 3)
    content = pa.table({"subject_id": list(range(9)), "time": ["2020-01-01"] * 9, "code": ["x"] * 9})
    source = open_table(write(tmp_path / "t.parquet", content), TableColumns())  # groups of 2, 2, 2, 2, 1
    parts = [
        [e["subject_id"].to_pylist() for e in source.read(i, EventCounts())] for i in range(source.units())
    ]
    assert parts == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8]]]


def test_samples_are_spread(tmp_path):
    content = pa.table({"subject_id": np.arange(20_000), "time": ["2020"] * 20_000, "code": ["x"] * 20_000})
    pq.write_table(content, tmp_path / "t.parquet", row_group_size=200)
    sample = open_table(tmp_path / "t.parquet", TableColumns()).sample_subjects()
    assert 300 <= len(sample) <= 7000
    assert sample.min() < 500
    assert sample.max() > 19_500


HEADER = "subject_id,time,code,value\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ("empty",)),
        (HEADER + "1,2020-01-01,x,1\n1,2020-01-01,x\n", ("3 values in data row 2", "4 columns")),
        (HEADER.encode() + b"1,2020-01-01,x,1\n1,2020-01-01,\xe9,1\n", ("column code, data row 2", "UTF-8")),
        (HEADER + "1,2020-01-01,x,1\n1,yesterday,x,1\n", ("column time, data row 2", "like 2019-07-08")),
        (
            HEADER + "1,2020-01-01,x,1\n1,2020-01-01,x,high\n",
            ("column value, data row 2", "no finite number"),
        ),
        ("subject_id,code,value\n", ("no column time", "table.time", "subject_id, code, value")),
        ("subject_id,time,code,code,value\n", ("more than one column code", "table.code")),
        ("subject_id,\0time,code,value\n", ("no text in UTF-8", "save it as CSV")),
        ("subject_id;time;code;value\n", ("one column, whose name holds ;", "by commas", "decimal point")),
        ("subject_id\ttime\tcode\tvalue\n", ("one column, whose name holds tabs", "by commas")),
        (
            "subject_id,time,code,value\nsubject_id,time,code,value\n",
            ("column time, data row 1", "header comes again"),
        ),
    ],
)
def test_broken_csv(tmp_path, text, says):
    file = write(tmp_path / "t.csv", text)
    raised(lambda: read_all(open_table(file, TableColumns(value="value"))), str(file), *says)


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("subject_id", [True, False], ("bool in the column subject_id", "table.subject", "integers or text")),
        ("subject_id", [1.0, 2.5], ("column subject_id", "signed 64-bit", "double")),
        ("subject_id", [2**63, 1], ("column subject_id", "signed 64-bit")),
        ("time", [1, 2], ("int64 in the column time", "table.time", "timestamps")),
        ("time", ["2020-01-01", "2020-13-01"], ("column time, data row 2", "like 2019-07-08")),
        ("code", [0.5, 1.5], ("double in the column code", "text or integers")),
        ("code", [["a"], ["b"]], ("in the column code", "text or integers")),
        ("value", ["1", "x"], ("string in the column value", "table.value", "numbers")),
        ("visit", [True, False], ("bool in the column visit", "integers or text")),
        ("birth", [1950, 1960], ("int64 in the column birth", "dates")),
    ],
)
def test_wrong_types(tmp_path, column, values, says):
    content = pa.table(
        {"subject_id": [1, 2], "time": ["2020-01-01"] * 2, "code": ["x", "y"]}
        | {"value": [1.0, 2.0], "visit": [1, 2], "birth": ["1950-01-01"] * 2}
        | {column: pa.array(values, pa.uint64() if values[0] == 2**63 else None)}
    )
    file = write(tmp_path / "t.parquet", content)
    raised(lambda: read_all(open_table(file, ALL)), str(file), *says)


@pytest.mark.parametrize("chunk", [1, 100])
def test_row_of_an_error_in_a_later_group(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(table_source, "CHUNK_ROWS", chunk)
    times = ["2020-01-01"] * 5 + ["never"] * 2
    content = pa.table({"subject_id": [1] * 7, "time": times, "code": ["x"] * 7})
    file = tmp_path / "t.parquet"
    pq.write_table(content, file, row_group_size=3)
    raised(lambda: read_all(open_table(file, TableColumns())), "data row 6")


@pytest.mark.parametrize("keep", [0, 3, 100, -10])
def test_cut_parquet(tmp_path, keep):
    file = write(tmp_path / "t.parquet", arrow())
    file.write_bytes(file.read_bytes()[:keep])
    raised(lambda: open_table(file, ALL), str(file), "Parquet", "cut short")


def test_damaged_parquet(tmp_path):
    content = pa.table({"subject_id": list(range(1000)), "time": ["2020-01-01"] * 1000, "code": ["x"] * 1000})
    file = write(tmp_path / "t.parquet", content)
    data = bytearray(file.read_bytes())
    data[4:4000] = bytes(3996)
    file.write_bytes(data)
    raised(lambda: read_all(open_table(file, TableColumns())), str(file), "Parquet")


def test_files_that_are_none(tmp_path):
    raised(lambda: open_table(tmp_path, TableColumns()), str(tmp_path), "no file")
    raised(lambda: open_table(tmp_path / "no.csv", TableColumns()), "no.csv", "no file")
    raised(lambda: open_table(write(tmp_path / "t.xlsx", "x"), TableColumns()), "t.xlsx", ".parquet")


# Columns of facts.

FACTS = {
    "subject_id": [4, 4, 2, 2, None, 9],
    "time": ["2020-01-02"] * 6,
    "code": ["I10"] * 6,
    "sex": ["F", " F ", "M", "M", "M", None],
    "district": [7, 8, 7, 7, 7, 7],
}


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize("birth", [None, "time"])
def test_columns_of_facts(tmp_path, name, birth):
    write(tmp_path / name, arrow(FACTS, subject_id=pa.int64()))
    columns = TableColumns(static=("sex", "district"), birth=birth)
    source, counts = open_table(tmp_path / name, columns), EventCounts()
    tables = [table for unit in range(source.units()) for table in source.read(unit, counts)]
    events = pa.concat_tables(tables).to_pylist()
    facts = [(row["subject_id"], row["code"]) for row in events if row["time"] is None]
    assert sorted(facts) == [
        (2, "DISTRICT//7"),
        (2, "SEX//M"),
        (4, "DISTRICT//7"),
        (4, "DISTRICT//8"),
        (4, "SEX//F"),
        (9, "DISTRICT//7"),
    ]
    assert counts.read == 6 + len(facts) + 3 * (birth is not None)
    assert source.static_codes == ("SEX//", "DISTRICT//")
    assert source.subject_ranges() is None
    assert WithBirths(source, None, ()).static_codes == source.static_codes
    assert "static" not in open_table(tmp_path / name, TableColumns()).options()["table"]


def test_columns_of_facts_that_cannot_be(tmp_path):
    write(tmp_path / "t.parquet", arrow(FACTS, subject_id=pa.int64()))
    with pytest.raises(InputError, match=r"has no column race, which table.static names: choose from"):
        open_table(tmp_path / "t.parquet", TableColumns(static=("sex", "race")))
    rows = FACTS | {"sex": [1.5, None, 2.0, 1.0, 1.0, 1.0]}
    write(tmp_path / "t.parquet", arrow(rows, subject_id=pa.int64()))
    with pytest.raises(InputError, match=r"has double in the column sex, which table.static names: write it"):
        open_table(tmp_path / "t.parquet", TableColumns(static=("sex",)))


def test_facts_of_columns_reach_the_prepared_data(tmp_path):
    rows = {
        "subject_id": [1, 1, 2, 3],
        "time": ["2020-01-02", "2020-02-02", "2020-01-02", "2020-01-02"],
        "code": ["I10"] * 4,
        "born": ["1950-01-01"] * 4,
        "insurance": ["a", "b", "a", "c"],
    }
    write(tmp_path / "t.csv", arrow(rows))
    config = PrepareConfig(
        source="table",
        input=tmp_path / "t.csv",
        output=tmp_path / "out",
        table=TableColumns(birth="born", static=("insurance",)),
        min_count=1,
        tuning_fraction=0.4,
        held_out_fraction=0.0,
        splits=SplitOptions(exact=True),
    )
    manifest = prepare(open_source(config), config)
    assert manifest["options"]["static_codes"] == [*STATIC_CODES, "INSURANCE//"]
    facts = {row["code"]: row["subjects"] for row in manifest["top_facts"]}
    assert facts == {"INSURANCE//a": 2, "INSURANCE//b": 1, "INSURANCE//c": 1}
    assert sum(split["several"] for split in manifest["subject_facts"].values()) == 1
    assert prepare(open_source(config), config)["up_to_date"]


def test_default_codes():
    assert TableSource.default_codes == ()


def with_births(tmp_path, births, codes=(), events=None):
    """Rows and counts of a table of events whose births are given apart."""
    lines = events or "1,2020-01-01,x,\n2,2020-01-02,x,\nward 7,2020-01-03,x,\n1,1950-01-01,MEDS_BIRTH,\n"
    source = open_table(
        write(tmp_path / "t.csv", "subject_id,time,code,value\n" + lines), TableColumns(value="value")
    )
    file = None if births is None else write(tmp_path / "births.csv", "subject_id,birth,note\n" + births)
    return read_all(WithBirths(source, file, codes))


def test_a_table_of_births_takes_the_place_of_those_of_the_records(tmp_path):
    births = "1,1960-05-06,a\nward 7,1970-01-01,b\n1,1900-01-01,c\n2,,d\n"
    rows, counts = with_births(tmp_path, births)
    moments = {row[0]: row[1] for row in rows if row[2] == "MEDS_BIRTH"}
    assert moments == {1: dt.datetime(1960, 5, 6), hashed_id("ward 7"): dt.datetime(1970, 1, 1)}
    assert (counts.read, counts.dropped) == (6, {"birth, another given by --births": 1})
    assert counts.changed == {"births differ": 1}
    rows, counts = with_births(tmp_path, "2,1960-05-06,a\n")  # the others keep their own
    assert sorted(row[0] for row in rows if row[2] == "MEDS_BIRTH") == [1, 2]
    with pytest.raises(InputError, match=r"^--births needs .*subject_id and birth.*other.csv has no"):
        write(tmp_path / "other.csv", "subject_id,dob\n")
        WithBirths(open_table(tmp_path / "t.csv", TableColumns()), tmp_path / "other.csv", ())


def test_births_of_other_codes(tmp_path):
    events = (
        "1,1960-05-06,SNOMED/3950001,\n2,,BIRTH_YEAR//1950,\n3,,YEAR_OF_BIRTH,1940\n4,,BIRTH_YEAR//old,\n"
        "5,2001-01-01,x,1\n"
    )
    rows, counts = with_births(tmp_path, None, ("SNOMED/3950001$", "BIRTH_YEAR", "YEAR_OF"), events)
    assert [row[:3] for row in rows] == [
        (1, dt.datetime(1960, 5, 6), "MEDS_BIRTH"),
        (2, dt.datetime(1950, 1, 1), "MEDS_BIRTH"),
        (3, dt.datetime(1940, 1, 1), "MEDS_BIRTH"),
        (4, None, "BIRTH_YEAR//old"),
        (5, dt.datetime(2001, 1, 1), "x"),
    ]
    assert counts.changed == {"code of births -> MEDS_BIRTH": 3}


@pytest.mark.parametrize("kind", [pa.date32(), pa.timestamp("ns"), pa.string()])
def test_births_in_parquet(tmp_path, kind):
    source = open_table(write(tmp_path / "t.csv", "subject_id,time,code\n1,2020-01-01,x\n"), TableColumns())
    births = pa.array([dt.date(1960, 5, 6)], pa.date32()).cast(pa.timestamp("s")).cast(kind)
    pq.write_table(pa.table({"subject_id": [1], "birth": births}), tmp_path / "births.parquet")
    rows, _ = read_all(WithBirths(source, tmp_path / "births.parquet", ()))
    assert (1, dt.datetime(1960, 5, 6), "MEDS_BIRTH", None, None) in rows


def test_times_of_spark_keep_their_century(tmp_path):
    far = [dt.datetime(9999, 12, 31, 23, 59, 59), dt.datetime(1600, 1, 1)]
    content = pa.table({"subject_id": [1, 1], "time": pa.array(far, pa.timestamp("us")), "code": ["a", "b"]})
    pq.write_table(content, tmp_path / "t.parquet", use_deprecated_int96_timestamps=True)
    rows, _ = read_all(open_table(tmp_path / "t.parquet", TableColumns()))
    assert [row[1] for row in rows] == far

"""The files of OMOP folders: forms, parts, types, and what happens where they are spoilt."""

import gzip
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.csv import write_csv

from behrt_jax.data.events import EventCounts
from behrt_jax.errors import InputError
from behrt_jax.records.sources import files as csv_reading
from behrt_jax.records.sources import omop_tables
from behrt_jax.records.sources.files import read_csv
from behrt_jax.records.sources.omop import open_omop
from tests.records.omop_folder import (
    HISTORY,
    codes_of,
    condition,
    person,
    read_all,
    row,
    rows_of,
    write_omop,
    write_table,
)


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet"])
def test_empty_tables_are_fine(tmp_path, form):
    tables = {name: [] for name in HISTORY if name != "person"} | {"person": [person(1)]}
    source = open_omop(write_omop(tmp_path, tables, form=form))
    assert codes_of(read_all(source)[0], "") == ["MEDS_BIRTH", "GENDER//8532"]
    assert source.descriptions() == {}


def test_header_without_line_end_and_byte_order_mark(tmp_path):
    write_omop(tmp_path, HISTORY)
    (tmp_path / "measurement.csv").write_text("person_id,measurement_concept_id,measurement_date")
    data = (tmp_path / "person.csv").read_bytes()
    (tmp_path / "person.csv").write_bytes(b"\xef\xbb\xbf" + data)  # before person_id
    events, _ = read_all(open_omop(tmp_path))
    assert codes_of(events, "MEASUREMENT") == []
    assert [event[0] for event in rows_of(events, "MEDS_BIRTH")] == [-5, 7]


def test_line_breaks_in_quotes_wherever_a_block_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(read_csv, "__defaults__", (400,))
    date = {"drug_exposure_start_date": "2001-01-01"}
    drugs = [row(person_id=1, drug_concept_id=i, sig="a day,\n" * i, **date) for i in range(1, 31)]
    source = open_omop(write_omop(tmp_path, {"person": [person(1)], "drug_exposure": drugs}))
    assert codes_of(read_all(source)[0], "DRUG") == [f"DRUG//{i}" for i in range(1, 31)]


def test_types_that_parquet_exports_have(tmp_path):
    write_omop(tmp_path, {"person": [person(1)]}, form="parquet")
    nanoseconds = pa.array([946_684_800_123_456_789], pa.timestamp("ns", "UTC"))
    columns = {
        "Person_ID": pa.array([1]).cast(pa.decimal128(38, 0)),
        "CONDITION_concept_id": pa.array([3], pa.uint64()),
        "condition_start_datetime": nanoseconds,
        "condition_source_value": pa.array(["a"]).dictionary_encode(),
        "visit_occurrence_id": pa.nulls(1),
    }
    pq.write_table(pa.table(columns), tmp_path / "condition_occurrence.parquet")
    events, _ = read_all(open_omop(tmp_path))
    assert rows_of(events) == [(1, datetime(2000, 1, 1, 0, 0, 0, 123456), "CONDITION//3", None, None)]


@pytest.mark.parametrize(
    "layout",
    [
        "condition_occurrence_000{}",
        "condition_occurrence/part-0-{}",
        "CONDITION_OCCURRENCE/a=1/{}",
        "condition_occurrence.parquet/{}",
        "condition_occurrence.CSV/{}",
    ],
)
@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet"])
def test_tables_in_parts(tmp_path, layout, form):
    write_omop(tmp_path, {"person": [person(1)]})
    for part in (0, 1):
        file = tmp_path / f"{layout.format(part)}.{form}"
        write_table(file, "condition_occurrence", [condition(1, 100 + part)])
    empty = tmp_path / f"{layout.format(2)}.{form}"  # a part without rows
    if form == "parquet":
        pq.write_table(pa.table({}), empty)
    else:
        empty.write_bytes(gzip.compress(b"\n") if form == "csv.gz" else b"")
    for name in ("_SUCCESS", f".0.{form}", f"_new/0.{form}"):
        hidden = file.parent / name
        hidden.parent.mkdir(exist_ok=True)
        hidden.touch()
    # Neither of these is a part of another table.
    write_table(tmp_path / "observation_period.csv", "observation_period", [])
    source = open_omop(tmp_path)
    assert source.units() == 1 + 2 + 2  # person, both parts, observation_period twice: starts and ends
    assert codes_of(read_all(source)[0], "CONDITION") == ["CONDITION//100", "CONDITION//101"]


def test_folders_of_parts_that_cannot_be_read_are_named(tmp_path):
    write_omop(tmp_path, {"person": [person(1)], "observation": []})
    folder = tmp_path / "condition_occurrence"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    with pytest.raises(InputError, match=r"condition_occurrence holds no file of \.csv\.gz, "):
        open_omop(tmp_path)
    write_table(folder / "0.parquet", "condition_occurrence", [condition(1, 100)])
    (folder / "_delta_log").mkdir()
    with pytest.raises(
        InputError, match=r"condition_occurrence is a table of Delta Lake, .*as plain Parquet"
    ):
        open_omop(tmp_path)
    assert open_omop(tmp_path, skip=["Condition_Occurrence"]).options()["skip"] == ["condition_occurrence"]


def test_a_table_that_is_broken_or_not_wanted_is_skipped(tmp_path):
    write_omop(tmp_path, HISTORY)
    plain, _ = read_all(open_omop(tmp_path))
    (tmp_path / "drug_exposure.csv").write_text("no table")
    (tmp_path / "._site_concept.csv").write_bytes(b"\x00\x05")  # what macOS leaves is no table of concepts
    with pytest.raises(InputError, match=r"drug_exposure\.csv has no column person_id"):
        open_omop(tmp_path)
    source = open_omop(tmp_path, skip=["DRUG_EXPOSURE"])
    rest = [row for row in rows_of(plain, "") if not row[2].startswith("DRUG//")]
    assert rows_of(read_all(source)[0], "") == rest
    assert tmp_path / "drug_exposure.csv" not in source.files()
    (tmp_path / "drug_exposure.csv").rename(tmp_path / "drug_exposure.csv.bz2")
    (tmp_path / "device_exposure.sql").touch()  # no data
    with pytest.raises(InputError, match=r"drug_exposure\.csv\.bz2 is not read.*--omop\.skip drug_exposure"):
        open_omop(tmp_path)
    assert rows_of(read_all(open_omop(tmp_path, skip=["drug_exposure"]))[0], "") == rest
    (tmp_path / "drug_exposure.csv.bz2").unlink()
    for wrong in ("drug", "person"):
        with pytest.raises(InputError, match=rf"--omop\.skip names {wrong}, which is no table of"):
            open_omop(tmp_path, skip=[wrong])


@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_text_that_is_not_utf8_is_named_by_row(tmp_path, text):
    write_omop(tmp_path, {"person": [person(1)]}, form="parquet")
    broken = pa.array([b"a", None, b"caf\xe9"]).view(pa.string())
    if pa.types.is_dictionary(text):
        broken = pa.DictionaryArray.from_arrays(pa.array([0, None, 1]), broken.drop_null())
    columns = {
        "person_id": [1] * 3,
        "condition_concept_id": [0] * 3,
        "condition_start_date": ["2000-01-01"] * 3,
    }
    table = pa.table(columns | {"condition_source_value": broken})
    if pa.types.is_large_string(text):
        large = pa.array([b"a", None, b"caf\xe9"], pa.large_binary()).view(pa.large_string())
        table = table.set_column(3, "condition_source_value", large)
    pq.write_table(table, tmp_path / "condition_occurrence.parquet")
    where = r"condition_occurrence\.parquet has in the column condition_source_value, row 3 .* not UTF-8"
    if pa.types.is_dictionary(text):  # which Arrow refuses without telling where
        where = r"condition_occurrence\.parquet holds text that is not UTF-8"
    with pytest.raises(InputError, match=where) as error:
        read_all(open_omop(tmp_path))
    assert "caf" not in str(error.value)


def test_whole_numbers_as_pandas_writes_a_column_with_gaps(tmp_path):
    write_omop(tmp_path, {"person": [person(1)]})
    dated = {
        "person_id": [1] * 3,
        "condition_concept_id": [5] * 3,
        "condition_start_date": ["2000-01-01"] * 3,
    }
    visits = [
        row(visit_occurrence_id=v, person_id=1, visit_concept_id=9, visit_start_date="2000-01-01")
        for v in (7, 8)
    ]
    write_table(tmp_path / "visit_occurrence.csv", "visit_occurrence", visits)
    for name, column in {"csv": ["7.0", "8.00", ""], "parquet": [7.0, 8.0, float("nan")]}.items():
        file = tmp_path / f"condition_occurrence.{name}"
        table = pa.table(dated | {"visit_occurrence_id": column})
        write_csv(table, file) if name == "csv" else pq.write_table(table, file)
        events, _ = read_all(open_omop(tmp_path))
        assert [event[4] for event in rows_of(events)] == [7, 8, None]
        file.unlink()


def test_large_parquet_files_are_cut_into_units(tmp_path, monkeypatch):
    conditions = [condition(1, 100 + i) for i in range(10)]  # row groups of three
    folder = write_omop(tmp_path, {"person": [person(1)], "condition_occurrence": conditions}, form="parquet")
    assert open_omop(folder).units() == 2
    monkeypatch.setattr(omop_tables, "PART_ROWS", 6)
    source = open_omop(folder)
    assert source.units() == 3
    assert codes_of(read_all(source)[0], "CONDITION") == [f"CONDITION//{100 + i}" for i in range(10)]
    assert [part.first_row for part in omop_tables.parts_of(folder / "condition_occurrence.parquet")] == [
        0,
        6,
    ]


def test_chunks_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_reading, "CHUNK_ROWS", 4)
    monkeypatch.setattr(omop_tables, "_BATCH_ROWS", 4)
    tables = {"person": [person(1)], "condition_occurrence": [condition(1, i) for i in range(1, 11)]}
    for form in ("csv", "parquet"):
        source = open_omop(write_omop(tmp_path / form, tables, form=form))
        assert [table.num_rows for table in source.read(1, EventCounts())] == [4, 4, 2]


def spoil(folder: Path, table: str, old: str, new: bytes) -> None:
    """Replace a piece of a CSV file."""
    file = folder / f"{table}.csv"
    data = file.read_bytes()
    assert data.count(old.encode()) == 1
    file.write_bytes(data.replace(old.encode(), new))


SPOILT = [
    ("condition_occurrence", "777001", b"777001.5", "column person_id, data row 3", "whole number"),
    ("condition_occurrence", "777001", b" Person_Id", "column person_id, data row 3", "header comes again"),
    ("condition_occurrence", "777001", b"seven", "person_id.*row 3", "whole number"),
    ("condition_occurrence", "777001", b"9223372036854775808", "person_id.*row 3", "whole number"),
    ("condition_occurrence", "777002", b"1.5", "visit_occurrence_id.*row 3", "whole number"),
    ("condition_occurrence", "2000-07-07", b"2000-13-07", "condition_start_date.*row 3", "2019-07-08"),
    ("condition_occurrence", "2000-07-07", b"soon", "condition_start_date.*row 3", "2019-07-08"),
    ("condition_occurrence", "2000-07-07", b"2000-07-07,1", "9 values in data row 3", "quotes"),
    ("condition_occurrence", ",secret", b"", "7 values in data row 3", "mend the row"),
    ("condition_occurrence", "secret", b"caf\xe9 secret", "condition_source_value.*row 3", "UTF-8"),
    ("condition_occurrence", "secret", b'"secret', "7 values in data row 3", "quotes"),
    (
        "condition_occurrence",
        "condition_concept_id",
        b"condition_concept",
        "no column condition_concept_id",
        "rename",
    ),
    ("condition_occurrence", "visit_occurrence_id", b"PERSON_ID", "two columns called person_id", "drop one"),
    ("condition_occurrence", "condition_concept_id", b"caf\xe9", "header", "UTF-8"),
    ("measurement", "1.125", b"high", "value_as_number.*row 1", "write numbers"),
    ("person", "1950,2", b"MCML,2", "year_of_birth.*row 1", "whole number"),
    ("concept", "101,", b"SNOMED-101,", "concept_id.*row 1", "whole number"),
]


@pytest.mark.parametrize(("table", "old", "new", "where", "mend"), SPOILT)
def test_a_spoilt_csv_is_one_error_that_names_file_column_and_row(tmp_path, table, old, new, where, mend):
    third = condition(777001, 1, "2000-07-07", visit_occurrence_id=777002, condition_source_value="secret")
    tables = HISTORY | {"condition_occurrence": [condition(7, 1), condition(7, 2), third, condition(7, 3)]}
    write_omop(tmp_path, tables | {"person": [person(-5), person(7, year_of_birth=1960)]})
    spoil(tmp_path, table, old, new)
    with pytest.raises(InputError, match=where) as caught:
        read_all(open_omop(tmp_path))
    message = str(caught.value)
    assert mend in message and f"{table}.csv" in message and "\n" not in message
    assert "secret" not in message and "777001" not in message


@pytest.mark.parametrize("form", ["csv", "csv.gz"])
def test_a_quote_that_is_never_closed(tmp_path, form):
    """In the last column, so that the rows it swallows leave no row with too few values."""
    rows = [condition(7, 1), condition(7, 2, condition_source_value="secret"), condition(7, 3)]
    write_omop(tmp_path, HISTORY)
    (tmp_path / "condition_occurrence.csv").unlink()
    columns = ["person_id", "condition_concept_id", "condition_start_date", "condition_source_value"]
    lines = [",".join(columns), *(",".join(str(row.get(name) or "") for name in columns) for row in rows)]
    text = "\n".join(lines).replace("secret", '"secret') + "\n"
    file = tmp_path / f"condition_occurrence.{form}"
    file.write_bytes(gzip.compress(text.encode()) if form == "csv.gz" else text.encode())
    with pytest.raises(InputError, match=r"occurrence\.csv\S* opens a quote in data row 2 .*close") as caught:
        read_all(open_omop(tmp_path))
    assert "secret" not in str(caught.value)


def test_tables_separated_by_tabs_have_no_quoting(tmp_path):
    """As OHDSI hands out vocabularies: quotes are characters like any other, open or not."""
    tables = {"person": [person(1)], "condition_occurrence": [condition(1, 7), condition(1, 8)]}
    write_omop(tmp_path, tables)
    lines = ['concept_id\t"a\tconcept_name\tconcept_code\tvocabulary_id\tdomain_id']
    lines += ['7\t\tA 5" tube, closed\tx,"y"\tSNOMED\tDevice', '8\t\t"Open\tNA\tSNOMED\tDevice']
    (tmp_path / "concept.csv").write_text("\n".join(lines) + "\n")
    source = open_omop(tmp_path)
    events, _ = read_all(source)
    assert codes_of(events, "CONDITION") == ['CONDITION//SNOMED/x,"y"', "CONDITION//SNOMED/NA"]
    assert source.descriptions() == {
        'CONDITION//SNOMED/x,"y"': 'A 5" tube, closed',
        "CONDITION//SNOMED/NA": '"Open',
    }
    (tmp_path / "concept.csv").write_text("\n".join([*lines, "9\tshort"]) + "\n")
    with pytest.raises(InputError, match=r"concept\.csv has 2 values in data row 3, but its header has 6"):
        read_all(open_omop(tmp_path))


@pytest.mark.parametrize("null", ["", "NULL", "null", "\\N", " ", "NA", " NA "])
def test_spellings_of_null(tmp_path, null):
    header = (
        "person_id,condition_concept_id,condition_start_date,condition_start_datetime,visit_occurrence_id\n"
    )
    write_omop(tmp_path, {"person": [person(1)]})
    text = f"1,3,2000-01-01,{null},{null}\n1,3,{null},2000-01-01 00:00:00,{null}\n"
    (tmp_path / "condition_occurrence.csv").write_text(header + text)
    events, _ = read_all(open_omop(tmp_path))
    assert rows_of(events, "CONDITION") == [(1, datetime(2000, 1, 1), "CONDITION//3", None, None)] * 2


@pytest.mark.parametrize("blank", ["", " "])
def test_ids_of_64_bits_come_exactly(tmp_path, blank):
    ids = [2**63 - 1, -(2**63), 2**53 + 1]
    write_omop(tmp_path, {"person": [person(id_) for id_ in ids]})
    lines = [f"{blank}{id_}{blank},3,2000-01-01,{blank}{2**62 + 1}" for id_ in ids]
    header = "person_id,condition_concept_id,condition_start_date,visit_occurrence_id"
    (tmp_path / "condition_occurrence.csv").write_text("\n".join([header, *lines]))
    header = "visit_occurrence_id,person_id,visit_concept_id,visit_start_date"
    (tmp_path / "visit_occurrence.csv").write_text(f"{header}\n{2**62 + 1},{ids[0]},9,2000-01-01\n")
    events, _ = read_all(open_omop(tmp_path))
    visit = {event[0]: event[-1] for event in rows_of(events, "CONDITION")}
    assert visit == {ids[0]: 2**62 + 1, ids[1]: None, ids[2]: None}


def test_a_table_without_any_of_the_columns_that_are_asked_for(tmp_path):
    for form in ("csv", "parquet"):
        write_table(tmp_path / f"person.{form}", "person", [person(1), person(2)])
        part = omop_tables.Part(tmp_path / f"person.{form}")
        batches = list(omop_tables.read_chunks(part, {"absent": "integer"}))
        assert [batch.column("absent").to_pylist() for batch in batches] == [[None, None]]


@pytest.mark.parametrize("kept", [0, 10, 300, -10])
def test_truncated_parquet(tmp_path, kept):
    file = write_omop(tmp_path, HISTORY, form="parquet") / "drug_exposure.parquet"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"drug_exposure\.parquet is no readable Parquet"):
        read_all(open_omop(tmp_path))


def test_parquet_with_damaged_pages(tmp_path):
    file = write_omop(tmp_path, HISTORY, form="parquet") / "person.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    with pytest.raises(InputError, match=r"person.parquet is no readable Parquet file after row 0"):
        read_all(open_omop(tmp_path))


def test_truncated_and_false_gzip(tmp_path):
    file = write_omop(tmp_path, HISTORY, form="csv.gz") / "drug_exposure.csv.gz"
    data = file.read_bytes()
    file.write_bytes(data[:-12])
    with pytest.raises(InputError, match=r"drug_exposure\.csv\.gz is no readable gzip file"):
        read_all(open_omop(tmp_path))
    file.write_bytes(gzip.decompress(data))
    with pytest.raises(InputError, match=r"drug_exposure\.csv\.gz is no readable gzip file"):
        read_all(open_omop(tmp_path))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("person_id", pa.array([7.5]), r"column person_id, data row 1, .*whole numbers"),
        ("person_id", pa.array([2.0**53]), r"column person_id, data row 1, .*whole numbers"),
        ("person_id", pa.array(["7.5"]), r"column person_id, data row 1, .*whole numbers"),
        ("person_id", pa.array([2**64 - 1], pa.uint64()), r"column person_id, data row 1, .*whole numbers"),
        ("condition_concept_id", pa.array([True]), "bool in the column condition_concept_id"),
        ("condition_start_date", pa.array([20000101]), "int64 in the column condition_start_date.*dates"),
        (
            "condition_start_date",
            pa.array(["2000-02-30"]),
            "column condition_start_date, data row 1, .*dates",
        ),
        ("condition_source_value", pa.array([[1]]), "list.* in the column condition_source_value.*text"),
    ],
)
def test_parquet_columns_of_the_wrong_type(tmp_path, column, values, message):
    file = write_omop(tmp_path, HISTORY, form="parquet") / "condition_occurrence.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), file)
    with pytest.raises(InputError, match=rf"condition_occurrence.parquet .*{message}"):
        read_all(open_omop(tmp_path))


def test_folders_that_are_no_omop(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        open_omop(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no table person"):
        open_omop(write_omop(tmp_path, {"condition_occurrence": []}))
    (tmp_path / "condition_occurrence.csv").unlink()
    with pytest.raises(InputError, match="no table of events"):
        open_omop(write_omop(tmp_path, {"person": [person(1)], "death": []}))
    (tmp_path / "measurement.csv").touch()
    with pytest.raises(InputError, match=r"measurement\.csv is empty"):
        open_omop(tmp_path)


def test_a_table_that_is_there_twice(tmp_path):
    write_omop(tmp_path, HISTORY)
    write_table(tmp_path / "Person.parquet", "person", [])
    with pytest.raises(InputError, match=r"table person more than once \(Person.parquet, person.csv\)"):
        open_omop(tmp_path)


def test_a_person_without_an_id(tmp_path):
    write_omop(tmp_path, HISTORY | {"person": [person(-5), row(person_id=None, year_of_birth=1950)]})
    with pytest.raises(InputError, match=r"person.csv has no person_id in row 2 "):
        read_all(open_omop(tmp_path))

import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from behrt_jax.data.events import EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.errors import InputError
from behrt_jax.records.sources import columns as text_columns
from behrt_jax.records.sources import files as csv_reading
from behrt_jax.records.sources.columns import TextIds, cast_column, hashed_id, parse_numbers
from behrt_jax.records.sources.files import Piece, read_csv
from behrt_jax.records.sources.synthea import SyntheaSource, open_synthea
from tests.records.synthea_folder import ERAS, write_synthea, write_text

ANN, BOB = "71949668-1c2e-43ae-ab0a-64654608defb", "c2caaace-9119-4b2d-a2c3-4040f5a9cf32"
PATIENTS = [
    {"ID": ANN, "BIRTHDATE": "1950-02-01", "GENDER": "F", "RACE": "white", "ETHNICITY": "irish"},
    {"ID": BOB, "BIRTHDATE": "1990-01-01", "DEATHDATE": "2015-03-04", "GENDER": "M", "RACE": "asian"},
]
VISITS = [
    {"ID": "e1", "PATIENT": ANN, "START": "2009-01-08", "STOP": "2009-01-10", "CODE": "185"},
    {"ID": "e2", "PATIENT": BOB, "START": "2012-05-05", "CODE": "186", "DESCRIPTION": "Check-up"},
]


def condition(**values):
    line = {"PATIENT": ANN, "ENCOUNTER": "e1", "START": "2009-01-08", "CODE": "38822007"}
    return line | {name.upper(): value for name, value in values.items()}


def read_all(source):
    counts = EventCounts()
    tables = [table for unit in range(source.units()) for table in source.read(unit, counts)]
    assert all(table.schema.equals(pa.schema([*EVENT_SCHEMA, VISIT_FIELD])) for table in tables)
    events = pa.concat_tables(
        [table.set_column(2, "code", table["code"].cast(pa.string())) for table in tables]
    )
    assert events.num_rows == counts.kept
    return events, counts


def read_folder(folder, tables, era="2023", **more):
    return read_all(open_synthea(write_synthea(folder, tables, era, **more)))


def conditions(folder, *lines, **more):
    """Events of the conditions alone, and what happened to them."""
    tables = {"patients": PATIENTS, "encounters": VISITS, "conditions": lines}
    source = open_synthea(write_synthea(folder, tables, "2023", **more))
    counts = EventCounts()
    return pa.concat_tables(source.read(2, counts)), counts


def times(events):
    return [None if time is None else time.isoformat(" ") for time in events["time"].to_pylist()]


@pytest.mark.parametrize("era", ERAS)
def test_every_table_of_every_age(tmp_path, era):
    kinds = ["conditions", "medications", "procedures", "observations", "immunizations", "allergies"]
    kinds += ["careplans"] + ["devices"] * (era != "2017")
    line = condition(description="some text", system="SNOMED-CT", id="x")
    visits = [VISITS[0] | {"ENCOUNTERCLASS": "wellness"}, VISITS[1]]
    tables = {"patients": PATIENTS, "encounters": visits} | {kind: [line] for kind in kinds}
    source = open_synthea(write_synthea(tmp_path, tables, era))
    events, counts = read_all(source)
    first = "ENCOUNTER//185" if era == "2017" else "ENCOUNTER//wellness"
    prefixes = ["DX", "RX", "PX", "OBS", "VAX", "ALLERGY", "CAREPLAN", "DEVICE"][: len(kinds)]
    statics = ["GENDER//F", "GENDER//M", "RACE//white", "RACE//asian", "ETHNICITY//irish"]
    expected = ["MEDS_BIRTH", "MEDS_BIRTH", "MEDS_DEATH", *statics, first, "ENCOUNTER//186"]
    assert events["code"].to_pylist() == expected + [f"{prefix}//38822007" for prefix in prefixes]
    assert times(events)[:4] == ["1950-02-01 00:00:00", "1990-01-01 00:00:00", "2015-03-04 00:00:00", None]
    assert times(events)[8:] == ["2009-01-08 00:00:00", "2012-05-05 00:00:00"] + [
        "2009-01-08 00:00:00"
    ] * len(kinds)
    ann, bob = hashed_id(ANN), hashed_id(BOB)
    assert events["subject_id"].to_pylist() == [ann, bob, bob, ann, bob, ann, bob, ann, ann, bob] + [
        ann
    ] * len(kinds)
    one, two = hashed_id("e1"), hashed_id("e2")
    assert events["visit_id"].to_pylist() == [None] * 8 + [one, two] + [one] * len(kinds)
    assert (counts.read, counts.dropped, counts.changed) == (10 + len(kinds), {}, {})
    texts = {f"{prefix}//38822007": "some text" for prefix in prefixes}
    assert source.descriptions() == texts | ({"ENCOUNTER//186": "Check-up"} if era == "2017" else {})
    assert source.splits() == {}
    assert source.name == "synthea"
    assert sorted(source.sample_subjects()) == sorted([ann, bob])
    assert [file.name for file in source.files()] == [
        "patients.csv",
        "encounters.csv",
        *(f"{k}.csv" for k in kinds),
    ]


def test_ids_are_the_hash_of_the_text():
    # sha256("abc") begins with ba7816bf8f01cfea.
    assert hashed_id("abc") == 0xBA7816BF8F01CFEA - 2**64


@pytest.mark.parametrize("form", ["{}.CSV", "{}.csv.gz", "{}.Csv.GZ"])
def test_names_in_any_case(tmp_path, form):
    tables = {"patients": PATIENTS, "encounters": VISITS, "conditions": [condition()], "claims": [{}]}
    plain = read_folder(tmp_path / "a", tables, "2017")
    other = read_folder(tmp_path / "b", tables, "2017", name=lambda table: form.format(table.upper()))
    assert plain[0].equals(other[0])
    assert plain[1] == other[1]


@pytest.mark.parametrize(
    ("day", "inside"),
    [
        ("2009-01-06", False),
        ("2009-01-07", True),
        ("2009-01-11", True),
        ("2009-01-12", False),
        ("2009-01-11T23:59:59Z", True),
        ("2009-01-12T00:00:00Z", False),
        ("1921-01-08", False),
    ],
)
def test_visit_of_an_event(tmp_path, day, inside):
    events, counts = conditions(tmp_path, condition(start=day))
    assert events["visit_id"].to_pylist() == [hashed_id("e1") if inside else None]
    assert counts.changed == ({} if inside else {"event outside its encounter": 1})


def test_encounter_without_stop_is_its_day(tmp_path):
    lines = [condition(patient=BOB, encounter="e2", start=f"2012-05-0{day}") for day in (4, 5, 6, 7)]
    events, counts = conditions(tmp_path, *lines)
    assert events["visit_id"].is_valid().to_pylist() == [True, True, True, False]
    assert counts.changed == {"event outside its encounter": 1}


def test_unknown_visits(tmp_path):
    events, counts = conditions(tmp_path, condition(encounter=""), condition(encounter="gone"), condition())
    assert events["visit_id"].to_pylist() == [None, None, hashed_id("e1")]
    assert counts.changed == {"unknown visit": 2}


def test_without_encounters_every_visit_is_unknown(tmp_path):
    events, counts = read_folder(tmp_path, {"patients": PATIENTS, "conditions": [condition()]})
    assert events["visit_id"].null_count == len(events)
    assert counts.changed == {"unknown visit": 1}


def test_dropped_rows_are_counted_once(tmp_path):
    lines = [condition(patient="", code=""), condition(patient="gone"), condition(code=" "), condition()]
    lines += [condition(code="", start=""), condition(start=" "), condition(start="", encounter="gone")]
    events, counts = conditions(tmp_path, *lines)
    assert len(events) == 1
    assert counts.read == 7
    assert counts.dropped == {"unknown subject": 2, "null code": 2, "null time": 2}
    assert counts.changed == {}


def test_patient_without_birth(tmp_path):
    tables = {"patients": [{"ID": ANN, "GENDER": "F"}], "conditions": []}
    events, counts = read_folder(tmp_path, tables)
    assert events["code"].to_pylist() == ["GENDER//F"]
    assert (counts.read, counts.dropped) == (2, {"null time": 1})


def test_observation_values(tmp_path):
    pairs = [("7.5", "numeric"), ("-1e2", "numeric"), ("3", "text"), ("yes", "text"), ("?", "numeric")]
    pairs += [("", "numeric"), ("NaN", "numeric"), ("1e300", ""), (" 5 ", "Numeric")]
    lines = [condition(value=value, type=kind) for value, kind in pairs]
    events, counts = read_folder(
        tmp_path, {"patients": PATIENTS, "encounters": VISITS, "observations": lines}
    )
    values = events["numeric_value"].to_pylist()[-len(lines) :]
    assert values == [7.5, -100.0, 3.0, None, None, None, None, None, 5.0]
    assert counts.changed == {"value is no number": 2}


def test_mixed_clocks(tmp_path):
    starts = [
        "2009-01-08T10:00:00Z",
        "2009-01-08",
        "2009-01-08 10:00:00+02:00",
        "2009-01-08T10:00:00.1234567",
    ]
    events, _ = conditions(
        tmp_path, *(condition(start=start) for start in [*starts, " 2009-01-08 07:30 UTC"])
    )
    day = "2009-01-08 "
    expected = ["10:00:00", "00:00:00", "10:00:00", "10:00:00.123456", "07:30:00"]
    assert times(events) == [day + time for time in expected]


def test_descriptions_do_not_depend_on_order_or_reader(tmp_path):
    lines = [condition(description=text) for text in ("b", "a", "", "c")] + [
        condition(code="", description="x")
    ]
    lines.append(condition(patient="gone", description="A"))
    tables = {"patients": PATIENTS, "encounters": VISITS, "conditions": lines}
    source = open_synthea(write_synthea(tmp_path, tables, "2023"))
    assert source.descriptions() == {"DX//38822007": "A"}  # read for it
    read_all(source)
    assert source.descriptions() == {"DX//38822007": "A"}
    merging = open_synthea(tmp_path)
    merging.learn(json.loads(json.dumps(source.learned())))
    for file in source.files():
        file.unlink()
    assert merging.descriptions() == {"DX//38822007": "A"}  # not read again


def test_header_alone_is_an_empty_table(tmp_path):
    events, counts = read_folder(tmp_path, {"patients": PATIENTS, "encounters": [], "conditions": []})
    assert len(events) == 8
    assert counts.changed == {}
    none = open_synthea(write_synthea(tmp_path / "none", {"patients": [], "conditions": [condition()]}))
    assert len(none.sample_subjects()) == 0
    assert read_all(none)[1].dropped == {"unknown subject": 1}


def test_blanks_around_ids(tmp_path):
    events, counts = conditions(tmp_path, condition(patient=f" {ANN} ", encounter="e1  "))
    assert events["visit_id"].to_pylist() == [hashed_id("e1")]
    assert (counts.dropped, counts.changed) == ({}, {})


def test_codes_keep_leading_zeros_and_lose_blanks(tmp_path):
    events, _ = conditions(tmp_path, condition(code="08"), condition(code=" 08 "), condition(code='a,"b"\nc'))
    assert events["code"].to_pylist() == ["DX//08", "DX//08", 'DX//a,"b"\nc']


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), block=st.integers(600, 3000))
def test_any_row_order_and_block_give_the_same_events(tmp_path, monkeypatch, seed, block):
    draw = random.Random(7)
    lines = [
        condition(
            patient=draw.choice([ANN, BOB, "gone"]),
            code=draw.choice(["1", "2", ""]),
            start=draw.choice(["2009-01-08", "2012-05-05T10:00:00Z", "2001-01-01", ""]),
            encounter=draw.choice(["e1", "e2", "e3", ""]),
            description=draw.choice(["one", "two"]),
        )
        for _ in range(60)
    ]
    tables = {"patients": PATIENTS, "encounters": VISITS, "conditions": lines}

    def outcome(source):
        events, counts = read_all(source)
        return Counter(map(str, events.to_pylist())), counts, source.descriptions()

    expected = outcome(open_synthea(write_synthea(tmp_path / "a", tables, "2023")))
    shuffled = {name: random.Random(seed).sample(rows, len(rows)) for name, rows in tables.items()}
    source = open_synthea(write_synthea(tmp_path / "b", shuffled, "2023"))
    with monkeypatch.context() as patch:
        patch.setattr(csv_reading, "CHUNK_ROWS", 7)
        patch.setattr(read_csv, "__defaults__", (block,))
        assert max(map(len, source.read(2, EventCounts()))) <= 7
        assert outcome(source) == expected


def raised(action, *texts):
    """The message of the one error, which holds these texts and no id."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    for text in texts:
        assert text in message
    assert ANN not in message
    assert "\n" not in message
    return message


def broken(folder, table, text, name=None):
    tables = {"patients": PATIENTS, "encounters": VISITS, "conditions": [condition()]}
    write_synthea(folder, tables, "2023")
    if name:
        (folder / f"{table}.csv").unlink()
    write_text(folder / (name or f"{table}.csv"), text)
    return folder


HEADER = "START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION\n"
ROW = f"2009-01-08,,{ANN},e1,1,x\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEADER + ROW + f"2009-01-08,,{ANN},e1,1\n", ("5 values in data row 2", "6 columns", "mend")),
        ((HEADER + ROW).encode() + b"caf\xe9,1\n", ("2 values in data row 2", "6 columns")),
        (HEADER + ROW * 2 + ROW.strip() + ",y\n", ("7 values in data row 3", "quotes")),
        (
            (HEADER + ROW).encode() + "2009-01-08,,p,e1,1,Ménière\n".encode("latin-1"),
            ("UTF-8", "DESCRIPTION", "row 2"),
        ),
        ((HEADER + ROW).encode("utf-16"), ("header", "UTF-8")),
        (HEADER + ROW * 3 + f"08/01/2009,,{ANN},e1,1,x\n" + ROW, ("column START, data row 4", "2019-07-08")),
        (HEADER + f"2009-02-30,,{ANN},e1,1,x\n", ("column START, data row 1",)),
        (HEADER + "12,,gone,e1,1,x\n", ("column START, data row 1",)),
        ("", ("empty",)),
        ("\n\n", ("empty",)),
        ("START,PATIENT\n", ("no column CODE", "START, PATIENT")),
        ("CODE,PATIENT\n", ("START or DATE",)),
        ("CODE,code,PATIENT,START\n", ("CODE twice",)),
        (HEADER + ROW + f'2009-01-08,,{ANN},e1,1,"x\n' + ROW * 9, ("data row 2", "never closes")),
        (HEADER + f'2009-01-08,,{ANN},e1,1,"x\n' + ROW * 3000, ("data row 1", "never closes")),
    ],
)
def test_broken_csv(tmp_path, text, says):
    folder = broken(tmp_path, "conditions", text)
    raised(lambda: read_all(open_synthea(folder)), str(tmp_path / "conditions.csv"), *says)


def test_quotes_that_are_part_of_a_value(tmp_path):
    text = HEADER + f'2009-01-08,,{ANN},e1,1,5" tube\n2009-01-08,,{ANN},e1,"1","a\n""b"""\n' + ROW
    events, _ = read_all(open_synthea(broken(tmp_path, "conditions", text)))
    assert events["code"].to_pylist()[-3:] == ["DX//1"] * 3


def test_row_without_end(tmp_path, monkeypatch):
    folder = broken(tmp_path, "conditions", HEADER + f'2009-01-08,,{ANN},e1,1,"x\n' + ROW * 99)
    monkeypatch.setattr(read_csv, "__defaults__", (1000,))
    raised(lambda: read_all(open_synthea(folder)), "conditions.csv", "quote")


@pytest.mark.parametrize(("block", "chunk"), [(300, 100), (1 << 20, 3)])
def test_row_of_an_error_in_a_later_piece(tmp_path, monkeypatch, block, chunk):
    folder = broken(tmp_path, "conditions", HEADER + ROW * 20 + f"May,,{ANN},e1,1,x\n" + ROW)
    source = open_synthea(folder)
    assert len(list(source.read(1, EventCounts()))) == 1
    monkeypatch.setattr(read_csv, "__defaults__", (block,))
    monkeypatch.setattr(csv_reading, "CHUNK_ROWS", chunk)
    raised(lambda: list(source.read(2, EventCounts())), "START, data row 21")


def test_cut_gzip(tmp_path):
    folder = broken(tmp_path, "conditions", HEADER + ROW * 999, "conditions.csv.gz")
    file = folder / "conditions.csv.gz"
    file.write_bytes(file.read_bytes()[:-20])
    raised(lambda: read_all(open_synthea(folder)), str(file), "cut short")
    file.write_text(HEADER)
    raised(lambda: open_synthea(folder), str(file), "gzip")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (f"{ANN},1950-01-01\nx,1950-01-01\n{ANN},1950-01-01\n", ("Id, data row 3", "earlier row")),
        (f"{ANN},1950-01-01\n,1950-01-01\n", ("Id, data row 2", "no id")),
        (f"{ANN},1950\n", ("BIRTHDATE, data row 1", "no date")),
    ],
)
def test_broken_patients(tmp_path, rows, says):
    folder = broken(tmp_path, "patients", "Id,BIRTHDATE\n" + rows)
    raised(lambda: read_all(open_synthea(folder)), str(folder / "patients.csv"), *says)


def test_repeated_patient_in_a_later_piece(tmp_path, monkeypatch):
    rows = "".join(f"p{i % 150},1950-01-01\n" for i in range(160))
    folder = broken(tmp_path, "patients", "Id,BIRTHDATE\n" + rows)
    monkeypatch.setattr(csv_reading, "CHUNK_ROWS", 20)
    raised(lambda: open_synthea(folder), "data row 151")


def test_folders_that_are_none(tmp_path):
    raised(lambda: open_synthea(tmp_path / "no"), str(tmp_path / "no"), "folder")
    raised(lambda: open_synthea(tmp_path), "patients.csv")
    write_synthea(tmp_path, {"patients": PATIENTS})
    raised(lambda: open_synthea(tmp_path), "table of events", "conditions")
    write_synthea(tmp_path, {"conditions": []})
    write_synthea(tmp_path, {"conditions": []}, name=lambda table: f"{table.upper()}.csv.gz")
    raised(lambda: open_synthea(tmp_path), "conditions.csv", "CONDITIONS.csv.gz", "keep one")


def test_tables_that_are_skipped(tmp_path):
    tables = {"patients": PATIENTS, "encounters": VISITS, "conditions": [condition()], "observations": []}
    folder = write_synthea(tmp_path, tables, "2023")
    (folder / "observations.csv").write_text("no table\n")
    raised(lambda: open_synthea(folder), "observations.csv has no column PATIENT")
    source = open_synthea(folder, skip=["Observations", "encounters"])
    assert source.options() == {"skip": ["encounters", "observations"]}
    events, counts = read_all(source)
    assert [code for code in events["code"].to_pylist() if "//38822007" in code] == ["DX//38822007"]
    assert counts.changed == {"unknown visit": 1}
    for wrong in ("patients", "claims"):
        raised(
            lambda wrong=wrong: open_synthea(folder, [wrong]),
            f"--synthea.skip names {wrong}, which is no table",
        )
    (folder / "observations.csv").unlink()
    (folder / "observations.csv").mkdir()
    raised(lambda: open_synthea(folder), "observations.csv is a folder", "one CSV file")
    assert open_synthea(folder, ["observations"]).units() == 3
    (folder / "observations.csv").rmdir()
    (folder / "observations.csv.zip").touch()
    (folder / "devices.txt").touch()  # no data
    raised(lambda: open_synthea(folder), "observations.csv.zip is not read", "--synthea.skip observations")


def test_a_header_that_comes_again_is_named(tmp_path):
    folder = write_synthea(tmp_path, {"patients": PATIENTS, "conditions": [condition()]}, "2023")
    text = (folder / "conditions.csv").read_text()
    (folder / "conditions.csv").write_text(text + text.splitlines()[0] + "\n")
    raised(lambda: read_all(open_synthea(folder)), "conditions.csv", "data row 2", "header comes again")


def test_colliding_ids(tmp_path, monkeypatch):
    def lengths(texts):
        return np.array([len(text) for text in texts.to_pylist()], dtype=np.int64)

    def of(*texts):
        return ids(pa.array(texts)).tolist()

    ids = TextIds(tmp_path, lengths)
    assert of("a", "bb") == [1, 2]
    assert of("bb", "ccc") == [2, 3]
    assert ids.ids.tolist() == [1, 2, 3]
    raised(lambda: of("dd"), "same 64-bit number")
    raised(lambda: of("eeee", "ffff"), "same 64-bit number")
    monkeypatch.setattr(text_columns.TextIds.__init__, "__defaults__", (lengths,))
    folder = write_synthea(tmp_path, {"patients": PATIENTS, "conditions": []})
    raised(lambda: open_synthea(folder), str(folder / "patients.csv"), "same 64-bit number")


@settings(deadline=None)
@given(
    st.lists(st.datetimes().map(lambda time: time.replace(tzinfo=None)), max_size=5),
    st.sampled_from(["", "Z", "+00:00", "UTC"]),
)
def test_times_come_back(moments, zone):
    texts = [moment.isoformat(" ") + zone for moment in moments if moment.year >= 1000]
    piece = Piece(Path("f"), 1, pa.table({"t": pa.array(texts, pa.string())}))
    assert cast_column(piece, "t", "time").to_pylist() == [
        moment for moment in moments if moment.year >= 1000
    ]


@given(st.lists(st.floats(width=32) | st.text(max_size=5), max_size=5))
def test_numbers_come_back(values):
    piece = Piece(Path("f"), 1, pa.table({"v": pa.array([str(value) for value in values], pa.string())}))
    numbers, wrong = parse_numbers(piece, "v")
    for value, number, is_wrong in zip(values, numbers.to_pylist(), wrong, strict=True):
        if isinstance(value, float):
            assert number == (value if np.isfinite(value) else None)
        assert is_wrong == (number is None and str(value).strip() != "")


def test_default_codes():
    assert SyntheaSource.default_codes == ("DX//", "RX//", "PX//")


REAL = os.environ.get("EHR_TEST_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="EHR_TEST_DATA is not set")


def by_prefix(events):
    return dict(Counter(code.split("//")[0] for code in events["code"].to_pylist()))


@needs_real
def test_real_export_of_2017():
    events, counts = read_all(open_synthea(Path(REAL or "") / "synthea-csv-1462"))
    found = by_prefix(events)
    assert found == {
        "MEDS_BIRTH": 1462,
        "MEDS_DEATH": 457,
        "GENDER": 1462,
        "RACE": 1462,
        "ETHNICITY": 1462,
        "ENCOUNTER": 20524,
        "DX": 7040,
        "RX": 6048,
        "PX": 10184,
        "VAX": 13189,
        "ALLERGY": 572,
        "CAREPLAN": 12125,
    }
    assert Counter(events["code"].to_pylist())["GENDER//F"] == 721
    assert len({code for code in events["code"].to_pylist() if code.startswith("DX//")}) == 118
    assert counts.dropped == {}
    assert counts.changed == {"event outside its encounter": 4664 + 2601 + 498 + 401 + 404 + 7002}


@needs_real
def test_real_export_of_2023():
    source = open_synthea(Path(REAL or "") / "synthea-csv-nebraska-111")
    events, counts = read_all(source)
    found = by_prefix(events)
    statics = {"MEDS_BIRTH": 111, "MEDS_DEATH": 11, "GENDER": 111, "RACE": 111, "ETHNICITY": 111}
    tables = {"ENCOUNTER": 7584, "DX": 4428, "RX": 6124, "PX": 11742, "VAX": 1774, "ALLERGY": 90}
    assert found == statics | tables | {"CAREPLAN": 387, "DEVICE": 155}
    codes = pc.value_counts(events["code"])
    assert {"values": "ENCOUNTER//ambulatory", "counts": 3171} in codes.to_pylist()
    assert counts.dropped == {}
    assert counts.changed == {"event outside its encounter": 21 + 65 + 1 + 1 + 2}
    assert source.descriptions()["DX//314529007"] == "Medication review due (situation)"

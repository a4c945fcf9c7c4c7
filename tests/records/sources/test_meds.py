import os
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.config.data import DataConfig
from behrt_jax.data import parquet as columns_files
from behrt_jax.data.events import EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.data.sequences import MEDS_CODES, build_sequences, describe
from behrt_jax.errors import InputError
from behrt_jax.records.sources import meds as meds_source
from behrt_jax.records.sources.columns import hashed_id
from behrt_jax.records.sources.meds import open_meds, read_meds
from tests.records.meds_folder import (
    DAY,
    HOUR,
    Layout,
    Row,
    born,
    by_remainder,
    history_rows,
    write_meds,
    write_splits,
)

ROWS = history_rows(subjects=20)
SPLITS = by_remainder(ROWS)


def as_rows(events: pa.Table) -> Counter:
    """The events as a bag of rows, since shards come in any order."""
    columns = [events["subject_id"], events["time"].cast(pa.int64()), events["code"].cast(pa.string())]
    columns += [events["visit_id"]] if "visit_id" in events.column_names else []
    return Counter(zip(*(column.to_pylist() for column in columns), strict=True))


def bag(rows, visits=False) -> Counter:
    return Counter(tuple(row[: 4 if visits else 3]) for row in rows)


def as_lists(splits):
    return {name: ids.tolist() for name, ids in splits.items()}


@pytest.mark.parametrize("layout", ["nested", "flat", "deep"])
@pytest.mark.parametrize("version", ["0.3.3", "0.4.1"])
def test_layouts(tmp_path, layout, version):
    events = read_meds(write_meds(tmp_path, ROWS, SPLITS, layout=layout, extra=True, version=version))
    assert as_rows(events.events) == bag(ROWS)
    assert events.events.schema.names == EVENT_SCHEMA.names
    assert events.events.schema.types == EVENT_SCHEMA.types
    assert as_lists(events.splits) == SPLITS
    assert events.counts.read == len(ROWS)
    assert events.counts.dropped == {}
    assert events.source == "meds"
    assert events.declared_codes is None


@pytest.mark.parametrize(
    "types",
    [
        {"time": pa.timestamp("ns")},
        {"time": pa.timestamp("ms")},
        {"time": pa.timestamp("s")},
        {"time": pa.timestamp("us", "America/New_York")},
        {"code": pa.large_string()},
        {"code": pa.string_view()},
        {"code": pa.dictionary(pa.int8(), pa.large_string())},
        {"subject_id": pa.uint8()},
        {"subject_id": pa.int16()},
        {"subject_id": pa.uint64()},
        {"numeric_value": pa.float64()},
        {"numeric_value": pa.int32()},
    ],
    ids=lambda types: " ".join(f"{name} {kind}" for name, kind in types.items()),
)
def test_types_of_columns(tmp_path, types):
    events = read_meds(write_meds(tmp_path, ROWS, SPLITS, types=types)).events
    assert as_rows(events) == bag(ROWS)
    assert events.schema.types == EVENT_SCHEMA.types


def test_dates_are_midnights(tmp_path):
    rows = [born(1, -3 * DAY), Row(1, 2 * DAY, "A"), Row(1, None, "B")]
    events = read_meds(write_meds(tmp_path, rows, {"train": [1]}, types={"time": pa.date32()}))
    assert as_rows(events.events) == bag(rows)


def test_nanoseconds_beyond_microseconds_are_cut_off(tmp_path):
    folder = write_meds(tmp_path, [Row(1, 7, "A")], {"train": [1]})
    times = pa.array([7_999], pa.timestamp("ns"))
    pq.write_table(pa.table({"subject_id": [1], "time": times, "code": ["A"]}), folder / "data/1.parquet")
    assert read_meds(folder).events["time"].cast(pa.int64()).to_pylist() == [7]


def test_large_ids_are_exact(tmp_path):
    ids = [2**63 - 1, 2**53 + 1, -(2**63), 0]
    rows = [Row(subject, DAY, "A", visit=subject) for subject in ids]
    splits = {"train": ids[:2], "tuning": ids[2:]}
    events = read_meds(write_meds(tmp_path, rows, splits), visit_column="hadm_id")
    assert as_rows(events.events) == bag(rows, visits=True)
    assert as_lists(events.splits) == {"train": sorted(ids[:2]), "tuning": sorted(ids[2:]), "held_out": []}


def test_values_are_kept_and_may_be_absent(tmp_path):
    rows = [Row(2, DAY, "A", value=0.5), Row(2, DAY, "B")]
    folder = write_meds(tmp_path, rows, {"train": [1, 2]})
    pq.write_table(pa.table({"subject_id": [1], "time": [None], "code": ["C"]}), folder / "data/1.parquet")
    events = read_meds(folder).events
    values = dict(zip(events["code"].to_pylist(), events["numeric_value"].to_pylist(), strict=True))
    assert values == {"A": 0.5, "B": None, "C": None}
    assert events["time"].null_count == 1


@pytest.mark.parametrize("values", [pa.array([0.1, 1e300]), pa.array([2**24 + 1, -(2**60)])])
def test_values_are_rounded_to_float32(tmp_path, values):
    folder = write_meds(tmp_path, [Row(1, DAY, "A"), Row(1, DAY, "B")], {"train": [1]})
    table = pq.read_table(folder / "data/1.parquet").set_column(3, "numeric_value", values)
    pq.write_table(table, folder / "data/1.parquet")
    with np.errstate(over="ignore"):
        expected = values.to_numpy().astype(np.float32)
    assert np.array_equal(read_meds(folder).events["numeric_value"].to_numpy(), expected)


def test_visit_column(tmp_path):
    folder = write_meds(tmp_path, ROWS, SPLITS, types={"hadm_id": pa.int32()})
    events = read_meds(folder, visit_column="hadm_id").events
    assert as_rows(events) == bag(ROWS, visits=True)
    assert events.schema.field("visit_id").type == VISIT_FIELD.type
    assert "visit_id" not in read_meds(folder).events.column_names


def test_a_shard_without_the_visit_column_has_no_visit_ids(tmp_path):
    folder = write_meds(tmp_path, [Row(2, DAY, "A", visit=5)], {"train": [1, 2]})
    other = pa.table({"subject_id": [1], "time": pa.array([0], pa.timestamp("us")), "code": ["B"]})
    pq.write_table(other, folder / "data/1.parquet")
    rows = [Row(2, DAY, "A", visit=5), Row(1, 0, "B")]
    assert as_rows(read_meds(folder, "hadm_id").events) == bag(rows, visits=True)


def test_an_unknown_visit_column_shows_what_there_is(tmp_path):
    folder = write_meds(tmp_path, ROWS, SPLITS)
    with pytest.raises(
        InputError, match=r"option visit_column is encounter.*subject_id, time, code, .*hadm_id"
    ):
        read_meds(folder, visit_column="encounter")
    with pytest.raises(InputError, match="has values in the column numeric_value that do not fit"):
        read_meds(folder, visit_column="numeric_value")


def test_dictionaries_of_shards_are_one(tmp_path):
    rows = [Row(1, DAY, "B"), Row(1, DAY, "A"), Row(2, DAY, "C"), Row(2, DAY, "A")]
    code = read_meds(write_meds(tmp_path, rows, {"train": [1, 2]})).events["code"]
    assert code.num_chunks == 1
    assert sorted(code.chunk(0).dictionary.to_pylist()) == ["A", "B", "C"]


def test_null_codes_are_dropped_and_counted(tmp_path):
    rows = [born(1), Row(1, DAY, None), Row(1, DAY, "A"), Row(2, DAY, None)]
    events = read_meds(write_meds(tmp_path, rows, {"train": [1], "tuning": [2]}))
    assert events.counts.read == 4
    assert events.counts.dropped == {"null code": 2}
    assert as_rows(events.events) == bag([rows[0], rows[2]])


def test_subjects_in_no_split_are_dropped_and_counted(tmp_path):
    rows = [born(1), Row(1, DAY, "A"), Row(2, DAY, "A"), Row(3, DAY, "A")]
    events = read_meds(write_meds(tmp_path, rows, {"train": [1, 77], "held_out": [3, 78]}))
    assert events.counts.dropped == {"subject in no split": 1}
    assert events.counts.kept == events.events.num_rows == 3
    assert as_lists(events.splits) == {"train": [1, 77], "tuning": [], "held_out": [3, 78]}


def test_folders_are_splits_where_no_file_says_so(tmp_path):
    events = read_meds(write_meds(tmp_path, ROWS, SPLITS, layout="nested", split_file=False))
    assert as_lists(events.splits) == SPLITS
    assert events.counts.dropped == {}


def renamed(folder: Path, names: dict[str, str]) -> Path:
    """Rename folders or files below data/."""
    for old, new in names.items():
        (folder / "data" / old).rename(folder / "data" / new)
    return folder


@pytest.mark.parametrize(
    ("names", "stray"),
    [
        ({"held_out": "test"}, "test, .*held_out: .*--splits.names test=held_out"),
        ({"tuning": "validation"}, "validation, .*--splits.names validation=tuning"),
        ({"held_out": "rest"}, "rest, .*--splits.names rest=SPLIT"),
        (
            {"train": "TRAIN", "tuning": "Val", "held_out": "TEST"},
            "TEST, TRAIN, Val, .*TRAIN=train Val=tuning",
        ),
        ({name: f"split={name}" for name in SPLITS}, "split=held_out, split=train, split=tuning, "),
        ({"held_out": ".x", "tuning/0.parquet": "0.parquet", "tuning": ".y"}, "0, which is no split"),
        ({"held_out": "train/test"}, "test, .*--splits.names test=held_out"),
        ({"train": "a", "held_out": "test_1", "tuning": "b"}, "a, b, test_1, which is no split"),
    ],
)
def test_folders_that_may_be_splits_by_another_name_are_refused(tmp_path, names, stray):
    folder = write_meds(tmp_path, ROWS, SPLITS, layout="nested", split_file=False)
    with pytest.raises(InputError, match=f"data holds {stray}"):
        read_meds(renamed(folder, names))


def test_splits_by_other_names_are_read_as_the_option_says(tmp_path):
    folder = write_meds(tmp_path / "a", ROWS, SPLITS, layout="nested", split_file=False)
    renamed(folder, {"tuning": "split=val", "held_out": "test"})
    options = ["split=val=tuning", "test=held_out"]
    assert as_lists(open_meds(folder, split_names=options).splits()) == SPLITS
    with pytest.raises(InputError, match=r"--splits\.names gives dev, but .*data has no folder of that name"):
        open_meds(folder, split_names=[*options, "dev=tuning"])
    with pytest.raises(InputError, match=r"--splits\.names has 'test=other': give NAME=SPLIT"):
        open_meds(folder, split_names=["test=other"])
    folder = write_meds(tmp_path / "b", ROWS)
    write_splits(folder, [(1, "train"), (2, "test"), (3, "held_out")])
    with pytest.raises(InputError, match=r"names the splits test: .*--splits\.names test=SPLIT"):
        open_meds(folder)
    found = open_meds(folder, split_names=["test=held_out"]).splits()
    assert as_lists(found) == {"train": [1], "tuning": [], "held_out": [2, 3]}
    with pytest.raises(InputError, match=r"subject_splits\.parquet has no split of that name"):
        open_meds(folder, split_names=["test=held_out", "dev=tuning"])


def test_files_and_deeper_folders_name_splits_too(tmp_path):
    folder = write_meds(tmp_path / "a", ROWS, SPLITS, layout="nested", split_file=False)
    for name in SPLITS:
        (folder / "data" / name / "0.parquet").rename(folder / "data" / f"{name}-00000-of-00001.parquet")
    assert as_lists(read_meds(folder).splits) == SPLITS
    folder = write_meds(tmp_path / "b", ROWS, SPLITS, layout="nested", split_file=False)
    renamed(folder, {name: f"{name}.parquet" for name in SPLITS})
    assert as_lists(read_meds(folder).splits) == SPLITS
    folder = write_meds(tmp_path / "c", ROWS, SPLITS, layout="nested", split_file=False)
    (folder / "data" / "cohort").mkdir()
    renamed(folder, {name: f"cohort/{name}" for name in SPLITS})
    assert as_lists(read_meds(folder).splits) == SPLITS


def test_what_is_hidden_is_no_data_and_links_are_followed(tmp_path):
    folder = write_meds(tmp_path / "meds", ROWS, SPLITS, layout="nested", split_file=False)
    plain = as_rows(read_meds(folder).events)
    for hidden in (".ipynb_checkpoints", "_temporary/0"):
        (folder / "data/train" / hidden).mkdir(parents=True)
        pq.write_table(pa.table({"x": [1]}), folder / "data/train" / hidden / "0.parquet")
    (folder / "data/held_out").rename(tmp_path / "disk")
    (folder / "data/held_out").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/loop").symlink_to(folder / "data/held_out")
    events = read_meds(folder)
    assert (as_rows(events.events), as_lists(events.splits)) == (plain, SPLITS)
    (tmp_path / "disk").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="held_out is a link to what is not there"):
        read_meds(folder)
    folder = write_meds(tmp_path / "splits", ROWS, SPLITS)
    file = folder / "metadata/subject_splits.parquet"
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"subject_splits\.parquet is a link to what is not there"):
        read_meds(folder)


def test_shards_without_the_folder_data_around_them(tmp_path):
    folder = write_meds(tmp_path / "meds", ROWS, SPLITS, layout="nested")
    bare = open_meds(folder / "data")
    assert as_lists(bare.splits()) == SPLITS
    assert folder / "metadata/subject_splits.parquet" in bare.files()
    for name in SPLITS:
        (folder / "data" / name).rename(folder / name)
    (folder / "data").rmdir()
    assert as_lists(read_meds(folder).splits) == SPLITS
    (folder / "metadata/subject_splits.parquet").unlink()
    assert as_lists(read_meds(folder).splits) == SPLITS
    flat = write_meds(tmp_path / "flat", ROWS)
    assert read_meds(flat / "data").events.num_rows == len(ROWS)
    with pytest.raises(InputError, match=r"has no folder data/ in it.*, as flat in it does\."):
        open_meds(tmp_path)


def test_tables_in_versions_are_refused(tmp_path):
    for kind, mark in {
        "Delta Lake": "data/_delta_log/0.json",
        "Hudi": "data/.hoodie/hoodie.properties",
        "Iceberg": "metadata/v1.metadata.json",
    }.items():
        folder = write_meds(tmp_path / kind, ROWS)
        (folder / mark).parent.mkdir(exist_ok=True)
        (folder / mark).touch()
        with pytest.raises(
            InputError, match=rf"is a table of {kind}, .*export the current one as plain Parquet"
        ):
            open_meds(folder)


@pytest.mark.parametrize("kind", [pa.float64(), pa.decimal128(38, 0), pa.decimal128(24, 2)], ids=str)
def test_whole_numbers_of_other_types_are_ids(tmp_path, kind):
    types = {"subject_id": kind, "hadm_id": kind}
    events = read_meds(write_meds(tmp_path, ROWS, SPLITS, types=types), "hadm_id")
    assert as_rows(events.events) == bag(ROWS, visits=True)
    for wrong in (1.5, 2.0**53, float("inf")):
        table = pq.read_table(tmp_path / "data/0.parquet")
        table = table.set_column(0, "subject_id", pa.array([wrong] * len(table)))
        pq.write_table(table, tmp_path / "data/0.parquet")
        with pytest.raises(
            InputError, match=r"0\.parquet has values in the column subject_id that do not fit"
        ):
            read_meds(tmp_path, "hadm_id")


def test_visit_ids_in_text(tmp_path):
    folder = write_meds(tmp_path, ROWS, SPLITS, types={"hadm_id": pa.string()})
    assert as_rows(read_meds(folder, "hadm_id").events) == bag(ROWS, visits=True)
    rows = [Row(1, DAY, "A"), *[Row(1, DAY, "B")] * 4]
    folder = write_meds(tmp_path / "words", rows)
    shard = folder / "data/1.parquet"
    table = pq.read_table(shard).drop_columns(["hadm_id"])
    pq.write_table(table.append_column("visit", pa.array(["V-7", " V-7", "7.0", " ", None])), shard)
    visits = read_meds(folder, "visit").events["visit_id"].to_pylist()
    assert visits == [hashed_id("V-7"), hashed_id("V-7"), 7, None, None]


def test_the_split_file_wins_over_folders(tmp_path):
    folder = write_meds(tmp_path, ROWS, SPLITS, layout="nested")
    write_splits(folder, [(subject, "train") for subject in range(1, 21)])
    assert as_lists(read_meds(folder).splits) == {"train": list(range(1, 21)), "tuning": [], "held_out": []}


def test_without_any_splits_there_are_none(tmp_path):
    events = read_meds(write_meds(tmp_path, ROWS, layout="deep"))
    assert events.splits == {}
    assert events.events.num_rows == len(ROWS)


def test_descriptions_of_the_codes_that_occur(tmp_path):
    texts = {"DIAGNOSIS//0": "zero", "DIAGNOSIS//1": None, "absent": "text"}
    assert read_meds(write_meds(tmp_path / "a", ROWS, SPLITS, descriptions=texts)).descriptions == {
        "DIAGNOSIS//0": "zero"
    }
    folder = write_meds(tmp_path / "b", ROWS, SPLITS)
    assert read_meds(folder).descriptions == {}
    pq.write_table(pa.table({"code": ["DIAGNOSIS//0"]}), folder / "metadata/codes.parquet")
    assert read_meds(folder).descriptions == {}


def test_folder_mistakes(tmp_path):
    with pytest.raises(InputError, match=r"absent is not a folder: set data\.path"):
        read_meds(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no folder data/ in it: set data\.path"):
        read_meds(tmp_path)
    (tmp_path / "data" / "directory.parquet").mkdir(parents=True)
    (tmp_path / "data" / ".hidden.parquet").write_text("")
    with pytest.raises(InputError, match=r"data holds no \.parquet file"):
        read_meds(tmp_path)
    (tmp_path / "data" / "0.csv").write_text("subject_id,time,code")
    with pytest.raises(InputError, match=r"0\.csv is among the shards, but is not called \.parquet"):
        read_meds(tmp_path)


@pytest.mark.parametrize("column", ["subject_id", "time", "code"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, column):
    folder = write_meds(tmp_path, ROWS, SPLITS, leave_out=[column])
    with pytest.raises(InputError, match=rf"0\.parquet has no column {column}, .*numeric_value, hadm_id\.$"):
        read_meds(folder)


@pytest.mark.parametrize(
    ("column", "kind", "meant"),
    [
        ("subject_id", pa.string(), "integers"),
        ("subject_id", pa.bool_(), "integers"),
        ("time", pa.string(), "timestamps or dates"),
        ("time", pa.int64(), "timestamps or dates"),
        ("code", pa.list_(pa.string()), "strings"),
        ("code", pa.binary(), "strings"),
        ("numeric_value", pa.string(), "numbers"),
    ],
    ids=str,
)
def test_a_wrong_type_is_named(tmp_path, column, kind, meant):
    folder = write_meds(tmp_path, [Row(1, DAY, "A")], {"train": [1]})
    table = pq.read_table(folder / "data/1.parquet")
    wrong = pa.nulls(1, kind)
    table = table.set_column(table.column_names.index(column), column, wrong)
    pq.write_table(table, folder / "data/1.parquet")
    with pytest.raises(InputError, match=rf"1\.parquet has .* in the column {column}: write it as {meant}"):
        read_meds(folder)


def test_ids_out_of_range_are_refused(tmp_path):
    folder = write_meds(tmp_path, [Row(1, DAY, "A")], {"train": [1]})
    table = pq.read_table(folder / "data/1.parquet")
    table = table.set_column(0, "subject_id", pa.array([2**63], pa.uint64()))
    pq.write_table(table, folder / "data/1.parquet")
    with pytest.raises(InputError, match=r"column subject_id that do not fit into int64") as error:
        read_meds(folder)
    assert str(2**63) not in str(error.value)


def test_a_null_subject_is_found_by_its_row(tmp_path):
    rows = [Row(2, DAY, "A"), Row(2, DAY, "B"), Row(None, DAY, "C"), Row(None, DAY, "D")]
    folder = write_meds(tmp_path, rows)
    with pytest.raises(InputError, match=r"0\.parquet has no subject_id in row 3 \(the first of 2 such"):
        read_meds(folder)


@pytest.mark.parametrize(
    "name", ["data/0.parquet", "metadata/subject_splits.parquet", "metadata/codes.parquet"]
)
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "inside"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    folder = write_meds(tmp_path, ROWS, SPLITS, descriptions={"DIAGNOSIS//0": "zero"})
    content = (folder / name).read_bytes()
    broken = {
        "cut": content[: len(content) // 2],
        "text": b"subject_id,time,code\n1,2020-01-01,A\n" * 9,
        "empty": b"",
        "inside": content[:4] + b"\xff" * 40 + content[44:],
    }[damage]
    (folder / name).write_bytes(broken)
    with pytest.raises(InputError, match=rf"{Path(name).name} is no readable Parquet file"):
        read_meds(folder)


def test_an_empty_data_set(tmp_path):
    with pytest.raises(InputError, match="data holds no event with a code"):
        read_meds(write_meds(tmp_path / "nulls", [Row(1, DAY, None)], {"train": [1]}))
    folder = write_meds(tmp_path / "none", [Row(1, DAY, "A")], {"train": [1]})
    pq.write_table(pq.read_table(folder / "data/1.parquet").slice(0, 0), folder / "data/1.parquet")
    with pytest.raises(InputError, match="data holds no event with a code"):
        read_meds(folder)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [(1, "train"), (2, "validation"), (3, "test")],
            r"names the splits test, validation: use train, tun",
        ),
        ([(1, "train"), (2, "train"), (2, "tuning")], "puts 1 subjects into more than one split"),
        ([(1, "tuning"), (2, "held_out")], "has no train split"),
        ([], "has no train split"),
        ([(1, "train"), (None, "train")], "has no subject_id in row 2"),
        ([(1, "train"), (2, None)], "has no split in row 2"),
    ],
)
def test_wrong_splits(tmp_path, pairs, message):
    folder = write_meds(tmp_path, [Row(1, DAY, "A"), Row(2, DAY, "A")])
    write_splits(folder, pairs)
    with pytest.raises(InputError, match=rf"subject_splits\.parquet {message}"):
        read_meds(folder)


def test_wrong_columns_of_the_split_file(tmp_path):
    folder = write_meds(tmp_path, ROWS)
    file = folder / "metadata/subject_splits.parquet"
    pq.write_table(pa.table({"subject_id": [1], "fold": ["train"]}), file)
    with pytest.raises(InputError, match=r"subject_splits\.parquet has no column split.*subject_id, fold"):
        read_meds(folder)
    pq.write_table(pa.table({"subject_id": ["1"], "split": ["train"]}), file)
    with pytest.raises(InputError, match=r"string in the column subject_id: write it as integers"):
        read_meds(folder)


def test_no_subject_in_any_split(tmp_path):
    with pytest.raises(InputError, match=r"No subject in .*data is in a split"):
        read_meds(write_meds(tmp_path, [Row(1, DAY, "A")], {"train": [2]}))


def test_wrong_split_folders(tmp_path):
    rows = [Row(1, DAY, "A"), Row(2, DAY, "A")]
    no_train = write_meds(
        tmp_path / "a", rows, {"tuning": [1], "held_out": [2]}, layout="nested", split_file=False
    )
    with pytest.raises(InputError, match="data has no train split"):
        read_meds(no_train)
    twice = write_meds(tmp_path / "b", rows, {"train": [1], "tuning": [2]}, layout="nested", split_file=False)
    write_meds(twice, [Row(1, DAY, "A")], {"tuning": [1]}, layout="nested", split_file=False)
    with pytest.raises(InputError, match="data puts 1 subjects into more than one split"):
        read_meds(twice)


def test_the_folder_gives_the_same_sequences_however_it_is_written(tmp_path):
    prints = set()
    units: dict[Layout, str] = {"nested": "ns", "flat": "us", "deep": "s"}
    for layout, unit in units.items():
        kind = pa.timestamp(unit)
        folder = write_meds(tmp_path / layout, ROWS, SPLITS, layout=layout, types={"time": kind})
        events = read_meds(folder, visit_column="hadm_id")
        prints.add(build_sequences(events, DataConfig(source="meds", min_count=1), True).fingerprint)
    assert len(prints) == 1


def test_a_data_set_of_awkward_events(tmp_path):
    rows = [
        *[born(subject) for subject in (1, 2)],
        Row(1, None, "GENDER//F"),
        Row(1, DAY, "DIAGNOSIS//a b, c//d"),
        Row(1, DAY + HOUR, "DIAGNOSIS//a b, c//d"),
        Row(1, DAY, "LAB//x//mg/dL", value=1.0),
        Row(1, DAY, None),
        Row(1, 2 * DAY, "MEDS_DEATH"),
        Row(1, 2 * DAY + HOUR, "PROCEDURE//p"),
        Row(1, 3 * DAY, "PROCEDURE//p"),
        Row(2, DAY, "DIAGNOSIS//a b, c//d"),
        Row(9, DAY, "DIAGNOSIS//a b, c//d"),
    ]
    folder = write_meds(tmp_path, rows, {"train": [1], "tuning": [2]})
    built = build_sequences(read_meds(folder), DataConfig(source="meds", min_count=1), False)
    summary = describe(built)
    assert summary["events_dropped"] == {
        "null code": 1,
        "subject in no split": 1,
        "birth or death marker": 3,
        "code not selected": 2,
        "after death": 1,
        "duplicate in visit": 1,
    }
    assert (summary["events_read"], summary["events_kept"]) == (12, 3)


@pytest.fixture
def small_chunks(monkeypatch):
    """A source that reads at most 40 rows at once."""
    monkeypatch.setattr(columns_files, "CHUNK_ROWS", 40)


def read_units(source):
    """Every table of each unit, with the counts."""
    counts = EventCounts()
    return [list(source.read(unit, counts)) for unit in range(source.units())], counts


@pytest.mark.parametrize(
    ("group_rows", "units"),
    [(10, [40] * 5), (25, [25] * 8), (30, [30] * 6 + [20]), (40, [40] * 5), (100, [100] * 2), (200, [200])],
)
def test_units_are_runs_of_row_groups(tmp_path, small_chunks, group_rows, units):
    rows = [born(1), *(Row(1, day * DAY, f"DIAGNOSIS//{day % 7}") for day in range(199))]
    folder = write_meds(tmp_path, rows, {"train": [1]})
    file = folder / "data/1.parquet"
    pq.write_table(pq.ParquetFile(file).read(), file, row_group_size=group_rows)
    read, counts = read_units(pickle.loads(pickle.dumps(open_meds(folder))))
    assert [sum(table.num_rows for table in tables) for tables in read] == units
    assert all(0 < table.num_rows <= 40 for tables in read for table in tables)
    assert as_rows(pa.concat_tables([table for tables in read for table in tables])) == bag(rows)
    assert (counts.read, counts.kept) == (200, 200)
    for tables in read:
        for table in tables:
            assert table.schema.types == EVENT_SCHEMA.types
            dictionaries = [chunk.dictionary.to_pylist() for chunk in table["code"].chunks]
            assert dictionaries == dictionaries[:1] * len(dictionaries)
    assert as_rows(read_meds(folder).events) == bag(rows)


def test_a_unit_reads_alone_and_again(tmp_path, small_chunks):
    source = open_meds(write_meds(tmp_path, ROWS, SPLITS, layout="nested"), "hadm_id")
    assert source.units() >= 3
    read, counts = read_units(source)
    last = EventCounts()
    again = pa.concat_tables(source.read(source.units() - 1, last))
    assert again.equals(pa.concat_tables(read[-1]))
    assert last.read == again.num_rows < counts.read == len(ROWS)


def test_an_opened_source(tmp_path):
    texts = {"DIAGNOSIS//0": "zero", "absent": "text"}
    source = open_meds(write_meds(tmp_path, ROWS, SPLITS, layout="nested", descriptions=texts))
    assert source.name == "meds"
    assert [str(file.relative_to(tmp_path)) for file in source.files()] == [
        "data/held_out/0.parquet",
        "data/train/0.parquet",
        "data/tuning/0.parquet",
        "metadata/codes.parquet",
        "metadata/subject_splits.parquet",
    ]
    assert source.descriptions() == texts
    assert as_lists(source.splits()) == SPLITS
    assert source.default_codes == MEDS_CODES


def test_the_sample_is_spread_as_the_events_are(tmp_path, monkeypatch):
    rows = history_rows(subjects=60)
    folder = write_meds(tmp_path, rows)
    sample = open_meds(folder).sample_subjects()
    assert Counter(sample.tolist()) == Counter(row.subject for row in rows)
    monkeypatch.setattr(meds_source, "_SAMPLED_ROWS", len(rows) // 4)
    sample = open_meds(folder).sample_subjects()
    assert len(rows) / 6 < len(sample) < len(rows) / 3
    assert sample.dtype == np.int64
    assert set(sample.tolist()) <= set(range(1, 61))
    assert 25 < np.median(sample) < 36


def test_other_names_of_birth_and_death_become_the_standards(tmp_path):
    rows = [
        Row(1, 0, "DOB"),
        Row(2, 1, "MEDS_BIRTH//2001"),
        Row(2, 1, "MEDS_BIRTH"),
        Row(1, 9, "DOD"),
        Row(2, 8, "MEDS_DEATH//in hospital//x"),
        Row(2, 9, "MEDS_DEATH//in hospital//x"),
        Row(2, 9, "MEDS_DEATH"),
        Row(2, 9, None),
        Row(2, 5, "DOBUTAMINE"),
        Row(2, 5, "MEDS_BIRTHDAY"),
        Row(2, 5, "dod"),
    ]
    read = read_meds(write_meds(tmp_path, rows))
    standard = {"DOB": "MEDS_BIRTH", "MEDS_BIRTH//2001": "MEDS_BIRTH", "DOD": "MEDS_DEATH"}
    standard["MEDS_DEATH//in hospital//x"] = "MEDS_DEATH"
    expected = [row._replace(code=standard.get(row.code, row.code)) for row in rows if row.code]
    assert as_rows(read.events) == bag(expected)
    assert read.counts.changed == {
        "other code of birth or death -> MEDS_BIRTH": 2,
        "other code of birth or death -> MEDS_DEATH": 3,
    }
    assert read.counts.dropped == {"null code": 1}
    names = read.events["code"].chunk(0).dictionary.to_pylist()
    assert len(names) == len(set(names))


def test_a_subject_in_two_shards_and_unsorted_rows_change_nothing(tmp_path):
    data = DataConfig(source="meds", min_count=1)
    whole = build_sequences(read_meds(write_meds(tmp_path / "a", ROWS, SPLITS)), data, False)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    folder = write_meds(tmp_path / "b", shuffled, SPLITS)
    (folder / "data/0.parquet").unlink()
    (folder / "data/1.parquet").unlink()
    for shard in range(3):
        part = write_meds(tmp_path / f"part{shard}", shuffled[shard::3], layout="deep")
        (part / "data/part=0/cohort/0.parquet").rename(folder / f"data/{shard}.parquet")
    events = read_meds(folder)
    assert build_sequences(events, data, False).fingerprint == whole.fingerprint
    assert (events.counts.read, events.counts.dropped) == (len(ROWS), {})


@pytest.mark.parametrize("empty", [pa.table({}), pa.table({"subject_id": pa.nulls(0), "code": pa.nulls(0)})])
def test_an_empty_shard_beside_full_ones(tmp_path, empty):
    folder = write_meds(tmp_path, ROWS, SPLITS)
    pq.write_table(empty, folder / "data/2.parquet")
    source = open_meds(folder, "hadm_id")
    assert source.units() == 2
    assert folder / "data/2.parquet" in source.files()
    assert as_rows(read_meds(folder, "hadm_id").events) == bag(ROWS, visits=True)


def test_no_metadata_at_all(tmp_path):
    folder = write_meds(tmp_path, ROWS)
    (folder / "metadata/dataset.json").unlink()
    (folder / "metadata").rmdir()
    source = open_meds(folder)
    assert (source.splits(), source.descriptions()) == ({}, {})
    assert as_rows(read_meds(folder).events) == bag(ROWS)


def test_mistakes_show_when_opening(tmp_path):
    for name in ("data/0.parquet", "metadata/codes.parquet", "metadata/subject_splits.parquet"):
        folder = write_meds(tmp_path / name, ROWS, SPLITS, descriptions={"DIAGNOSIS//0": "zero"})
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        with pytest.raises(InputError, match=rf"{Path(name).name} is no readable Parquet file"):
            open_meds(folder)
    folder = write_meds(tmp_path / "type", ROWS, types={"time": pa.int64()})
    with pytest.raises(InputError, match="in the column time: write it as timestamps"):
        open_meds(folder)
    folder = write_meds(tmp_path / "column", ROWS, leave_out=["code"])
    with pytest.raises(InputError, match="has no column code"):
        open_meds(folder)
    folder = write_meds(tmp_path / "splits", ROWS)
    write_splits(folder, [(1, "train"), (1, "tuning")])
    with pytest.raises(InputError, match="puts 1 subjects into more than one split"):
        open_meds(folder)


def test_a_null_subject_late_in_a_shard_is_found_by_its_row(tmp_path, small_chunks):
    rows = [Row(2, day * DAY, "A") for day in range(90)] + [
        Row(None, 0, "A"),
        Row(2, 0, "A"),
        Row(None, 0, "A"),
    ]
    folder = write_meds(tmp_path, rows)
    file = folder / "data/0.parquet"
    pq.write_table(pq.ParquetFile(file).read(), file, row_group_size=10)
    with pytest.raises(InputError, match=r"0\.parquet has no subject_id in row 91 \(the first of 2 such"):
        read_meds(folder)


def test_a_null_subject_in_a_split_folder_is_found_by_its_row(tmp_path):
    rows = [Row(2**53 + 1, DAY, "A"), Row(None, DAY, "B")]
    folder = write_meds(tmp_path, rows, {"train": [2**53 + 1, 0]}, layout="nested", split_file=False)
    assert as_lists(open_meds(folder).splits())["train"] == [2**53 + 1]
    with pytest.raises(InputError, match=r"0\.parquet has no subject_id in row 2 \(the first of 1 such"):
        read_meds(folder)


def test_codes_that_are_no_text_are_refused(tmp_path):
    folder = write_meds(tmp_path, [Row(1, DAY, "A")])
    file = folder / "data/1.parquet"
    code = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pq.ParquetFile(file).read().set_column(2, "code", code), file)
    with pytest.raises(InputError, match=r"1\.parquet has in the column code, row 1 .* not UTF-8") as error:
        read_meds(folder)
    assert "caf" not in str(error.value)


REAL = os.environ.get("EHR_TEST_DATA")


@pytest.mark.skipif(not REAL, reason="EHR_TEST_DATA does not name a folder of real data sets")
def test_the_mimic_iv_demo():
    events = read_meds(Path(REAL or "") / "mimic-iv-demo-meds", visit_column="hadm_id")
    assert events.counts.read == events.events.num_rows == 916_166
    assert {name: len(ids) for name, ids in events.splits.items()} == {
        "train": 80,
        "tuning": 10,
        "held_out": 10,
    }
    assert len(events.events["code"].unique()) == 7_035
    assert events.events["time"].null_count == 100
    assert events.events["visit_id"].null_count == 72_463
    assert events.events["numeric_value"].is_valid().to_numpy().sum() == 405_236
    codes = Counter(events.events["code"].to_pylist())
    assert (codes["MEDS_BIRTH"], codes["MEDS_DEATH"]) == (100, 31)
    assert len(events.descriptions) == 2_661

    data = DataConfig(source="meds", codes=(".*",), vocabulary_size=None, duplicates="keep")
    built = build_sequences(events, data, False)
    summary = describe(built)
    assert summary["events_dropped"].keys() == {"birth or death marker", "null time (static)", "after death"}
    assert summary["events_dropped"]["null time (static)"] == 100
    assert summary["events_kept"] == 916_166 - sum(summary["events_dropped"].values())
    assert sum(split["events"] for split in summary["splits"].values()) == summary["events_kept"]
    assert 18 <= summary["ages"]["min"] < summary["ages"]["max"] < 100
    assert all(np.all(np.diff(part.subject_ids) > 0) for part in built.splits.values())


@pytest.mark.skipif(not REAL, reason="EHR_TEST_DATA does not name a folder of real data sets")
def test_the_mimic_iv_demo_in_pieces(monkeypatch):
    source = open_meds(Path(REAL or "") / "mimic-iv-demo-meds", "hadm_id")
    assert source.units() == 3
    assert len(np.unique(source.sample_subjects())) == 100
    assert len(source.descriptions()) == 2_661
    whole = as_rows(pa.concat_tables([table for tables in read_units(source)[0] for table in tables]))
    monkeypatch.setattr(columns_files, "CHUNK_ROWS", 100_000)
    read, counts = read_units(source)
    assert [len(tables) for tables in read] == [1, 9, 1]
    assert as_rows(pa.concat_tables([table for tables in read for table in tables])) == whole
    assert (counts.read, counts.dropped, counts.changed) == (916_166, {}, {})


def test_times_of_spark_keep_their_century(tmp_path):
    far = pa.array([253_402_300_799_000_000, -11_676_096_000_000_000, None], pa.timestamp("us"))  # 9999, 1600
    folder = write_meds(tmp_path, [Row(1, DAY, "A"), Row(1, DAY, "B"), Row(1, DAY, "C")], {"train": [1]})
    file = next((folder / "data").rglob("*.parquet"))
    table = pq.ParquetFile(file).read()
    pq.write_table(table.set_column(1, "time", far), file, use_deprecated_int96_timestamps=True)
    assert pq.ParquetFile(file).schema.column(1).physical_type == "INT96"
    assert read_meds(folder).events["time"].combine_chunks().equals(far)

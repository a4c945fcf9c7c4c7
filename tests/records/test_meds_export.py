import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.errors import InputError
from behrt_jax.records.meds_export import write_meds
from behrt_jax.records.sources.meds import read_meds
from tests.records.meds_check import check_meds
from tests.records.meds_folder import DAY, Row, born, by_remainder, events_table, history_rows

ROWS = [
    *history_rows(subjects=20),
    Row(3, None, "GENDER//F", value=1.5),
    Row(-(2**63), DAY, "DIAGNOSIS//a b, c"),
    Row(2**53 + 1, -DAY, "DIAGNOSIS//é"),
]
SPLITS = {name: np.array(ids, np.int64) for name, ids in by_remainder(ROWS).items()}
TEXTS = {"DIAGNOSIS//0": "zero", "DIAGNOSIS//absent": "never"}
OPTIONS = {"descriptions": TEXTS, "dataset_name": "made up"}


def tables(rows, parts=3, visits=True):
    """Events tables of subjects by remainder."""
    return [
        events_table([row for row in rows if (row.subject or 0) % parts == part], visits)
        for part in range(parts)
    ]


def as_rows(events: pa.Table) -> Counter:
    columns = [events["subject_id"], events["time"].cast(pa.int64()), events["code"], events["visit_id"]]
    values = events["numeric_value"]
    return Counter(zip(*(column.to_pylist() for column in [*columns, values]), strict=True))


def bag(rows) -> Counter:
    return Counter((*row[:4], None if row.value is None else float(np.float32(row.value))) for row in rows)


def content(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("splits", [SPLITS, {}], ids=["splits", "no splits"])
def test_what_is_written_is_read_back(tmp_path, splits):
    folder = tmp_path / "deeper" / "set"
    files = write_meds(tables(ROWS), folder, splits=splits, **OPTIONS)
    read = read_meds(folder, visit_column="visit_id")
    assert as_rows(read.events) == bag(ROWS)
    assert {name: ids.tolist() for name, ids in read.splits.items()} == {
        name: ids.tolist() for name, ids in splits.items()
    }
    assert read.counts.read == len(ROWS)
    assert (read.counts.dropped, read.counts.changed) == ({}, {})
    assert read.descriptions == {"DIAGNOSIS//0": "zero"}
    assert sorted(files) == sorted(
        content_file for content_file in folder.rglob("*") if content_file.is_file()
    )
    assert [file.name for file in folder.parent.iterdir()] == ["set"]


def test_it_is_valid_meds(tmp_path):
    meds = pytest.importorskip("meds")
    write_meds(tables(ROWS), tmp_path / "set", splits=SPLITS, **OPTIONS)
    check_meds(tmp_path / "set")
    shards = sorted((tmp_path / "set" / "data").rglob("*.parquet"))
    assert {shard.parent.name for shard in shards} == {"train", "tuning", "held_out"}
    for shard in shards:
        table = pq.ParquetFile(shard).read()
        assert meds.DataSchema.align(table).num_rows == table.num_rows > 0
        assert table.schema.field("code").type == pa.string()
    codes = meds.CodeMetadataSchema.align(pq.read_table(tmp_path / "set" / meds.code_metadata_filepath))
    assert set(codes["code"].to_pylist()) == {row.code for row in ROWS}
    splits = meds.SubjectSplitSchema.align(pq.read_table(tmp_path / "set" / meds.subject_splits_filepath))
    assert splits.num_rows == len({row.subject for row in ROWS})
    about = json.loads((tmp_path / "set" / meds.dataset_metadata_filepath).read_text())
    assert about["dataset_name"] == "made up"
    assert about["meds_version"].startswith("0.4")
    assert about["raw_source_id_columns"] == ["visit_id"]


def test_shards_are_sorted_with_static_facts_first(tmp_path):
    rows = [Row(2, 5, "B"), Row(1, 9, "A"), Row(1, -3, "C"), Row(2, None, "S"), Row(1, -3, "A"), born(2, 5)]
    write_meds([events_table(rows, visits=False)], tmp_path / "set", splits={}, **OPTIONS)
    table = pq.ParquetFile(tmp_path / "set/data/0.parquet").read()
    assert table.column_names == ["subject_id", "time", "code", "numeric_value"]
    assert table["subject_id"].to_pylist() == [1, 1, 1, 2, 2, 2]
    assert table["time"].cast(pa.int64()).to_pylist() == [-3, -3, 9, None, 5, 5]
    assert table["code"].to_pylist() == ["A", "C", "A", "S", "B", "MEDS_BIRTH"]
    about = json.loads((tmp_path / "set/metadata/dataset.json").read_text())
    assert "raw_source_id_columns" not in about


row = st.builds(
    Row,
    st.sampled_from([-(2**63), -1, 0, 5, 2**63 - 1]),
    st.none() | st.integers(-(2**40), 2**40),
    st.sampled_from(["A", "B//x", "ü", ""]),
    st.none() | st.integers(-2, 2),
    st.none() | st.floats(width=32, allow_nan=False),
)


@given(rows=st.lists(row, min_size=1), seed=st.integers(0, 9))
def test_any_events_in_any_order(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp("any")
    shuffled = random.Random(seed).sample(rows, len(rows))
    for name, order in (("a", rows), ("b", shuffled)):
        write_meds(tables(order, parts=2), folder / name, splits={}, **OPTIONS)
    assert as_rows(read_meds(folder / "a", "visit_id").events) == bag(rows)
    check_meds(folder / "a")
    assert content(folder / "a") == content(folder / "b")


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "set").mkdir()
    write_meds(tables(ROWS), tmp_path / "set", splits={}, **OPTIONS)
    before = content(tmp_path / "set")
    with pytest.raises(InputError, match="set holds other files: give an --to_meds that is new"):
        write_meds(tables(ROWS[:5]), tmp_path / "set", splits={}, **OPTIONS)
    assert content(tmp_path / "set") == before
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="file holds other files"):
        write_meds(tables(ROWS), tmp_path / "file", splits={}, **OPTIONS)


def failing_tables():
    yield tables(ROWS)[0]
    raise OSError("disk is full")


@pytest.mark.parametrize(
    ("given_tables", "splits", "error", "message"),
    [
        (failing_tables(), {}, OSError, "disk is full"),
        ([], {}, InputError, "no event to write"),
        ([events_table([])], SPLITS, InputError, "no event to write"),
        (tables(ROWS) + tables(ROWS[:1]), {}, InputError, "have 1 subjects in more than one table"),
        (tables(ROWS), {"train": np.array([1])}, InputError, "subjects to write as MEDS are in no split"),
        (
            tables(ROWS),
            {**SPLITS, "tuning": SPLITS["train"][:2]},
            InputError,
            "puts? 2 subjects into more than one",
        ),
    ],
    ids=["broken off", "no table", "empty table", "two tables", "no split", "two splits"],
)
def test_after_a_mistake_nothing_is_left(tmp_path, given_tables, splits, error, message):
    with pytest.raises(error, match=message):
        write_meds(given_tables, tmp_path / "set", splits=splits, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def damage(folder, name, change):
    file = folder / name
    table = change(pq.ParquetFile(file).read())
    pq.write_table(table, file)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data/0.parquet", lambda table: table.slice(1).take([1, 0]), r"0\.parquet is not sorted"),
        ("data/0.parquet", lambda table: table.drop_columns(["time"]), r"0\.parquet breaks DataSchema"),
        ("metadata/codes.parquet", lambda table: table.slice(2), r"codes\.parquet lacks 2 codes"),
        (
            "metadata/codes.parquet",
            lambda table: table.rename_columns(["name", "description", "parent_codes"]),
            r"codes\.parquet breaks CodeMetadataSchema",
        ),
    ],
)
def test_the_check_sees_what_is_wrong(tmp_path, name, change, message):
    folder = tmp_path / "set"
    write_meds(tables(ROWS), folder, splits={}, **OPTIONS)
    damage(folder, name, change)
    with pytest.raises(InputError, match=message):
        check_meds(folder)


def test_the_check_sees_a_subject_in_two_shards(tmp_path):
    folder = tmp_path / "set"
    write_meds(tables(ROWS), folder, splits={}, **OPTIONS)
    pq.write_table(pq.ParquetFile(folder / "data/0.parquet").read(), folder / "data/9.parquet")
    with pytest.raises(InputError, match=r"data has \d+ subjects in more than one shard"):
        check_meds(folder)


def test_the_check_names_the_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "meds", None)
    with pytest.raises(InputError, match="needs the package meds: pip install meds"):
        check_meds(tmp_path)


def in_order(events: pa.Table) -> pa.Table:
    plain = events.set_column(2, "code", events["code"].cast(pa.string())).combine_chunks()
    return plain.sort_by([(column, "ascending") for column in plain.column_names])


REAL = os.environ.get("EHR_TEST_DATA")


@pytest.mark.skipif(not REAL, reason="EHR_TEST_DATA does not name a folder of real data sets")
def test_the_mimic_iv_demo_comes_back(tmp_path):
    first = read_meds(Path(REAL or "") / "mimic-iv-demo-meds", "hadm_id")
    options = {"descriptions": first.descriptions, "dataset_name": "MIMIC-IV demo"}
    write_meds([first.events], tmp_path / "set", splits=first.splits, **options)
    check_meds(tmp_path / "set")
    again = read_meds(tmp_path / "set", "visit_id")
    assert again.counts.kept == again.counts.read == 916_166
    assert again.descriptions == first.descriptions
    assert in_order(again.events).equals(in_order(first.events))

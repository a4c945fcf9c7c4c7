"""Input whose subjects ascend: encoded while it is read, with the same outcome as by spill files."""

from itertools import groupby, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.config.data import PrepareConfig, TableColumns
from behrt_jax.records.prepare import pipeline as finishing
from behrt_jax.records.prepare import pipeline as preparation
from behrt_jax.records.prepare.encode import OutOfOrder, ascending_units, whole_subjects
from behrt_jax.records.prepare.pipeline import prepare
from behrt_jax.records.sources.meds import open_meds
from behrt_jax.records.sources.table import open_table
from tests.records.meds_folder import (
    DAY,
    Row,
    born,
    by_remainder,
    events_table,
    history_rows,
    write_meds,
)
from tests.records.memory_source import MemorySource
from tests.records.prepare.test_pipeline import ALWAYS, contents, options, row_lists


def cut(rows: list[Row], units: int, chunk: int) -> MemorySource:
    """Rows with ascending subjects as units of about equal size, in chunks."""
    visits = any(row.visit is not None for row in rows)
    edges = [len(rows) * unit // units for unit in range(units + 1)]
    parts = [part for start, end in pairwise(edges) if (part := rows[start:end])]
    tables = [
        [events_table(part[start : start + chunk], visits) for start in range(0, len(part), chunk)]
        for part in parts
    ]
    ranges = [[min(row.subject for row in part), max(row.subject for row in part)] for part in parts]
    return MemorySource(tables, ranges=np.array(ranges, np.int64))


def refuse(*_, **__):
    raise AssertionError("spill files were written")


@settings(max_examples=25)
@given(
    rows=row_lists,
    units=st.integers(1, 4),
    chunk=st.integers(1, 40),
    partition_events=st.integers(1, 60),
    duplicates=st.sampled_from(["keep", "drop", "count"]),
    own_splits=st.booleans(),
    held_bytes=st.sampled_from([0, 200, 1 << 20]),
)
def test_the_same_as_by_spill_files(
    tmp_path_factory, rows, units, chunk, partition_events, duplicates, own_splits, held_bytes
):
    folder = tmp_path_factory.mktemp("prepared")
    rows = sorted(rows + ALWAYS, key=lambda row: row.subject)
    source = cut(rows, units, chunk)
    if own_splits:
        source.given_splits = {"train": np.array([1, -2, 5]), "tuning": np.array([3])}
    config = {"codes": ("DX//",), "duplicates": duplicates, "tuning_fraction": 0.4, "held_out_fraction": 0.0}
    message = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finishing, "HELD_BYTES", held_bytes)
        patch.setattr(preparation.spill, "spill_in_parallel", refuse)
        try:
            manifest = prepare(source, options(folder / "a", **config), partition_events=partition_events)
        except ValueError as error:
            manifest, message = None, str(error)
    source.ranges = None
    if manifest is None:
        with pytest.raises(ValueError) as raised:
            prepare(source, options(folder / "b", **config))
        assert str(raised.value) == message
        assert not list(folder.iterdir())
        return
    assert prepare(source, options(folder / "b", **config)) == manifest
    assert contents(folder / "a") == contents(folder / "b")


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=12), max_size=8),
    st.integers(1, 9),
)
def test_groups_hold_whole_subjects(chunks, most):
    chunks = [sorted(chunk) for chunk in chunks]
    subjects = sorted(subject for chunk in chunks for subject in chunk)
    sizes = iter([len(chunk) for chunk in chunks])
    cut, start = [], 0
    for size in sizes:
        cut.append(np.array(subjects[start : start + size], np.int64)[::-1].copy())  # no order within a chunk
        start += size
    batches = [pa.RecordBatch.from_pydict({"subject_id": pa.array(part)}) for part in cut]
    groups = [
        np.concatenate([batch["subject_id"].to_numpy() for batch in group]).tolist()
        for group in whole_subjects(batches, most)
    ]
    assert [subject for group in groups for subject in group] == subjects
    assert all(groups)
    members = [set(group) for group in groups]
    assert sum(map(len, members)) == len(set(subjects))
    # A group is larger only where its last subject came on top.
    runs = {subject: len(list(run)) for subject, run in groupby(subjects)}
    assert all(len(group) - runs[group[-1]] <= most for group in groups)


def test_a_subject_larger_than_a_group_ends_with_it():
    batches = [
        pa.RecordBatch.from_pydict({"subject_id": np.array(ids)}) for ids in ([1, 2, 2], [2, 2, 3], [3, 4])
    ]
    sizes = [sum(batch.num_rows for batch in group) for group in whole_subjects(batches, 2)]
    assert sizes == [1, 4, 2, 1]


def test_smaller_ids_than_before_are_told():
    batches = [pa.RecordBatch.from_pydict({"subject_id": np.array(ids)}) for ids in ([1, 2], [2, 1])]
    with pytest.raises(OutOfOrder):
        list(whole_subjects(batches, 10))


def test_ranges_that_are_not_true(tmp_path):
    """Whatever was encoded by then is void, and spill files are written after all."""
    rows = history_rows(20)
    source = cut(rows, 1, 30)
    source.tables[0].reverse()
    prepare(source, options(tmp_path / "a"), partition_events=40)
    source.ranges = None
    prepare(source, options(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list(tmp_path.iterdir())) == 2


def test_units_are_read_in_the_order_of_their_subjects(tmp_path, monkeypatch):
    source = cut(history_rows(20), 4, 1000)
    prepare(source, options(tmp_path / "a"))
    order = [2, 0, 3, 1]
    source.tables = [source.tables[unit] for unit in order]
    source.ranges = source.ranges[order]
    assert ascending_units(source) == [1, 3, 0, 2]
    monkeypatch.setattr(preparation.spill, "spill_in_parallel", refuse)
    told = []
    prepare(source, options(tmp_path / "b"), lambda *what: told.append(what))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert told == [
        *(("read and encode", done, 4) for done in range(1, 5)),
        *(("write", done, 3) for done in range(1, 4)),
    ]


@pytest.mark.parametrize(
    ("ranges", "units"),
    [
        (None, None),
        ([[1, 5], [5, 9]], [0, 1]),  # the one subject in both is carried over
        ([[1, 5], [4, 9]], None),
        ([[1, 9], [2, 3]], None),
        ([[5, 5], [1, 5], [5, 7]], [1, 0, 2]),
    ],
)
def test_which_units_ascend(ranges, units):
    source = MemorySource([], ranges=None if ranges is None else np.array(ranges))
    assert ascending_units(source) == units


@pytest.mark.parametrize("change", [{"workers": 2}, {"value_codes": ("LAB//",)}])
def test_options_that_need_spill_files(tmp_path, monkeypatch, change):
    monkeypatch.setattr(preparation.spill, "spill_in_parallel", refuse)
    with pytest.raises(AssertionError, match="spill files were written"):
        prepare(cut(history_rows(20), 2, 100), options(tmp_path / "out", **change))


def test_meds_footers_tell_the_ranges(tmp_path, monkeypatch):
    rows = sorted(history_rows(20), key=lambda row: row.subject)
    half = next(place for place, row in enumerate(rows) if row.subject == rows[len(rows) // 2].subject)
    folder = write_meds(tmp_path / "meds", [], splits=by_remainder(rows))
    (folder / "data").mkdir()
    for name, part in {"b": rows[:half], "a": rows[half:]}.items():
        pq.write_table(events_table(part), folder / "data" / f"{name}.parquet")
    source = open_meds(folder)
    first, last = rows[0].subject, rows[-1].subject
    middle = rows[half].subject
    assert np.array_equal(source.subject_ranges(), [[middle, last], [first, rows[half - 1].subject]])
    with monkeypatch.context() as patch:
        patch.setattr(preparation.spill, "spill_in_parallel", refuse)
        prepare(source, PrepareConfig(input=folder, output=tmp_path / "a", min_count=1))
    table = pq.ParquetFile(folder / "data" / "a.parquet").read()
    pq.write_table(table, folder / "data" / "a.parquet", write_statistics=False)
    source = open_meds(folder)
    assert source.subject_ranges() is None
    prepare(source, PrepareConfig(input=folder, output=tmp_path / "b", min_count=1))
    for name in ("train", "tuning", "held_out"):
        assert contents(tmp_path / "a" / name) == contents(tmp_path / "b" / name)


def test_table_footers_tell_the_ranges(tmp_path):
    rows = [born(1), born(2), Row(1, DAY, "A"), Row(2, DAY, "A")]
    events = events_table(rows)
    pq.write_table(events, tmp_path / "t.parquet", row_group_size=3)
    assert np.array_equal(open_table(tmp_path / "t.parquet", TableColumns()).subject_ranges(), [[1, 2]])
    births = TableColumns(birth="time")
    assert open_table(tmp_path / "t.parquet", births).subject_ranges() is None
    texts = events.set_column(0, "subject_id", pa.array(["1", "2", "1", "2"]))
    pq.write_table(texts, tmp_path / "t.parquet")
    assert open_table(tmp_path / "t.parquet", TableColumns()).subject_ranges() is None

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax import files
from behrt_jax.config.data import DataConfig, PrepareConfig
from behrt_jax.data import prepared as arrow_columns
from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, SPLITS
from behrt_jax.data.prepared import (
    read_births,
    read_columns,
    read_deaths,
    read_manifest,
    read_prepared,
    read_static,
    write_columns,
)
from behrt_jax.data.sequences import build_sequences
from behrt_jax.data.vocabulary import SEP, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.records.load import load_sequences
from behrt_jax.records.prepare.pipeline import prepare
from tests.records.meds_folder import DAY, Row, born, by_remainder, event_set, events_table, history_rows
from tests.records.memory_source import MemorySource
from tests.records.prepare.test_pipeline import (
    ALWAYS,
    SPLIT_IDS,
    assert_same,
    contents,
    row_lists,
    source_of,
    without_digests,
)


@pytest.fixture
def rows():
    return history_rows(20)


@pytest.fixture
def folder(tmp_path, rows):
    splits = {name: np.array(ids) for name, ids in by_remainder(rows).items()}
    prepare(MemorySource([[events_table(rows)]], splits), PrepareConfig(output=tmp_path / "out", min_count=1))
    return tmp_path / "out"


def test_the_folder_holds_these_files(folder):
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "held_out/births.parquet",
        "held_out/deaths.parquet",
        "held_out/events.arrow",
        "held_out/static.parquet",
        "held_out/subjects.arrow",
        "manifest.json",
        "train/births.parquet",
        "train/deaths.parquet",
        "train/events.arrow",
        "train/static.parquet",
        "train/subjects.arrow",
        "tuning/births.parquet",
        "tuning/deaths.parquet",
        "tuning/events.arrow",
        "tuning/static.parquet",
        "tuning/subjects.arrow",
        "vocabulary.parquet",
    ]


def test_arrays_are_views_of_the_files(folder):
    train = read_prepared(folder).splits["train"]
    for name in ("subject_ids", "codes", "ages", "visits", "times"):
        array = getattr(train, name)
        assert not array.flags.owndata, name
        assert not array.flags.writeable, name
    # A byte changed in the file shows in the array: nothing was copied.
    first = int(train.times[0])
    file = folder / "train" / "events.arrow"
    content = bytearray(file.read_bytes())
    place = content.index(train.times[:3].tobytes())
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write((first + 1).to_bytes(8, "little", signed=True))
    assert int(train.times[0]) == first + 1


def test_separators_are_added_on_reading(folder, rows):
    built = build_sequences(event_set(rows, by_remainder(rows)), DataConfig(min_count=1), True)
    plain, separated = read_prepared(folder), read_prepared(folder, sep_token=True)
    assert separated.fingerprint == built.fingerprint != plain.fingerprint
    for name in SPLITS:
        assert separated.splits[name].codes.tolist() == built.splits[name].codes.tolist()
        assert SEP not in plain.splits[name].codes


def test_an_empty_split_is_read(tmp_path):
    rows = [born(1), born(2), Row(1, DAY, "A"), Row(2, DAY, "A")]
    splits = {"train": np.array([1]), "tuning": np.array([2])}
    config = PrepareConfig(output=tmp_path / "out", min_count=1)
    manifest = prepare(MemorySource([[events_table(rows)]], splits), config)
    held_out = read_prepared(tmp_path / "out", sep_token=True).splits["held_out"]
    assert len(held_out) == 0
    assert held_out.offsets.tolist() == [0]
    assert manifest["splits"]["held_out"]["padding"] == {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "manifest.json").unlink(), r"out is no prepared data set \(it has no manifest"),
        (lambda out: (out / "manifest.json").write_text("{"), r"manifest\.json is not the manifest"),
        (lambda out: (out / "manifest.json").write_text("[]"), r"manifest\.json is not the manifest"),
    ],
)
def test_a_damaged_folder(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        read_prepared(folder)


OF_THE_DATA = [
    "vocabulary.parquet",
    *(f"train/{name}" for name in ("events.arrow", "subjects.arrow")),
    *(f"train/{name}.parquet" for name in ("births", "deaths", "static")),
]


@pytest.mark.parametrize("name", OF_THE_DATA)
def test_a_file_that_is_not_what_was_written(folder, name):
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content, what in [
        (flipped, "damaged, its SHA-256"),
        (whole[:-40], "damaged, it has"),
        (None, "miss"),
    ]:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} is {what}.* run prepare again, with another output"):
            read_prepared(folder)
    (folder / name).write_bytes(whole)
    read_prepared(folder)


@pytest.mark.parametrize("read", [read_static, read_deaths, read_births])
def test_facts_that_are_gone_are_not_none(folder, read):
    name = read.__name__.removeprefix("read_")
    read(folder, "train")
    (folder / "train" / f"{name}.parquet").unlink()
    with pytest.raises(InputError, match=rf"{name}\.parquet is missing"):
        read(folder, "train")
    without_digests(folder)  # its counts of facts tell that there was a file
    with pytest.raises(InputError, match=rf"{name}\.parquet is missing"):
        read(folder, "train")


def test_large_files_are_read_through_where_it_is_asked(folder, monkeypatch):
    monkeypatch.setattr(arrow_columns, "READ_THROUGH", (folder / "train" / "events.arrow").stat().st_size)
    content = bytearray((folder / "train" / "events.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "train" / "events.arrow").write_bytes(content)
    read_prepared(folder)
    with pytest.raises(InputError, match=r"train/events\.arrow is damaged"):
        read_prepared(folder, verify=True)
    with pytest.raises(InputError, match=r"train/events\.arrow is damaged"):
        load_sequences(DataConfig(source="prepared", path=folder, verify=True), sep_token=False)


def test_a_share_of_its_train_subjects_can_be_trained_on(folder):
    whole = read_prepared(folder)
    config = DataConfig(source="prepared", path=folder, train_fraction=0.5)
    found = load_sequences(config, sep_token=False)
    assert 0 < len(found.splits["train"]) == round(len(whole.splits["train"]) / 2)
    assert set(found.splits["train"].subject_ids) < set(whole.splits["train"].subject_ids)
    assert found.vocabulary.codes == whole.vocabulary.codes
    assert found.fingerprint != whole.fingerprint


def test_files_are_read_through_once_in_a_process(folder, monkeypatch):
    read = []
    sha256 = files._sha256
    monkeypatch.setattr(files, "_sha256", lambda file: read.append(file.name) or sha256(file))
    for _ in range(2):  # just written: another change could have the same time
        read.clear()
        read_prepared(folder)
        assert set(read) == {file.name for file in folder.rglob("*.*")} - {"manifest.json"}
    monkeypatch.setattr(files.time, "time_ns", lambda: 1 << 62)
    read_prepared(folder)
    read.clear()
    read_prepared(folder)
    assert not read
    content = bytearray((folder / "vocabulary.parquet").read_bytes())
    content[-40] ^= 1
    (folder / "new").write_bytes(content)
    (folder / "new").replace(folder / "vocabulary.parquet")
    with pytest.raises(InputError, match=r"vocabulary\.parquet is damaged"):
        read_prepared(folder)
    assert read == ["vocabulary.parquet"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "vocabulary.parquet").unlink(), r"vocabulary\.parquet cannot be read"),
        (lambda out: (out / "train" / "events.arrow").unlink(), r"events\.arrow is missing, cut short"),
        (
            lambda out: (out / "tuning" / "subjects.arrow").write_bytes(
                (out / "tuning" / "events.arrow").read_bytes()
            ),
            r"tuning/subjects\.arrow is missing, cut short or of another format",
        ),
        (
            lambda out: (out / "tuning" / "events.arrow").write_bytes(
                (out / "train" / "events.arrow").read_bytes()
            ),
            r"out holds a vocabulary or events that are not those of its manifest",
        ),
    ],
)
def test_a_damaged_folder_of_an_older_version(folder, spoil, message):
    without_digests(folder)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        read_prepared(folder)


def test_another_vocabulary_in_a_folder_of_an_older_version(folder):
    without_digests(folder)
    vocabulary = read_prepared(folder).vocabulary
    codes = (*vocabulary.codes[:-2], *vocabulary.codes[:-3:-1])
    Vocabulary(codes, vocabulary.counts, vocabulary.descriptions).write(folder / "vocabulary.parquet")
    with pytest.raises(InputError, match="vocabulary or events that are not those of its manifest"):
        read_prepared(folder)


def test_another_version(folder):
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(InputError, match="was prepared in format 99, but this version reads 1"):
        read_prepared(folder)


@pytest.mark.parametrize("entry", ["files", "sha256", "subject_facts", "splits"])
def test_a_damaged_manifest(folder, entry):
    manifest = read_manifest(folder)
    for changed in ({name: manifest[name] for name in manifest if name != entry}, {**manifest, entry: {}}):
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=r"manifest\.json is damaged"):
            read_prepared(folder)


def test_a_damaged_manifest_of_an_older_version(folder):
    manifest = read_manifest(folder)
    del manifest["splits"]["tuning"]["events"]
    without_digests(folder, splits=manifest["splits"])
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_prepared(folder)


def test_no_folder(tmp_path):
    with pytest.raises(
        InputError, match=r"none is no prepared data set \(it is not a folder\): give the folder"
    ):
        read_prepared(tmp_path / "none")


SCHEMA = pa.schema([("small", pa.int32()), ("large", pa.int64()), ("real", pa.float32())])


def columns(rows: int) -> list[np.ndarray]:
    random = np.random.default_rng(rows)
    kinds = [field.type.to_pandas_dtype() for field in SCHEMA]
    return [random.integers(0, 10**6, rows).astype(kind) for kind in kinds]


@pytest.mark.parametrize("rows", [0, 1, 7, 2000])
def test_parts_make_the_same_file_as_the_whole(tmp_path, monkeypatch, rows):
    whole = columns(rows)
    with pa.OSFile(str(tmp_path / "arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(column) for column in whole], schema=SCHEMA))
    write_columns(tmp_path / "few", SCHEMA, rows, [np.array_split(column, 3) for column in whole])
    monkeypatch.setattr(arrow_columns, "_FEW_ROWS", 1000)
    write_columns(tmp_path / "many", SCHEMA, rows, [iter(np.array_split(column, 3)) for column in whole])
    prints = [hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("arrow", "few", "many")]
    assert prints[0] == prints[1] == prints[2]
    for column, read in zip(whole, read_columns(tmp_path / "many", SCHEMA), strict=True):
        assert read.dtype == column.dtype
        assert read.tolist() == column.tolist()


def test_parts_that_are_too_few(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_columns, "_FEW_ROWS", 1000)
    whole = columns(2000)
    with pytest.raises(ValueError, match="not as long as the column"):
        write_columns(tmp_path / "short", SCHEMA, 2000, [[whole[0]], [whole[1][1:]], [whole[2]]])


# What prepare tells of subjects beside their events, and the delays that it records.


STATIC = ("DX//a", "LAB//")


def facts_of(rows, names, present):
    """Static facts and deaths of a split's subjects, and births of those not present, by loops."""
    own = [row for row in rows if row.subject in names]
    first = {BIRTH_CODE: {}, DEATH_CODE: {}}
    for row in sorted(own, key=lambda row: row.code or ""):  # births before deaths
        if row.code in first and row.time is not None:
            times = first[row.code]
            if (
                row.code == DEATH_CODE
                and row.time // DAY < first[BIRTH_CODE].get(row.subject, -9 * DAY) // DAY
            ):
                continue
            times[row.subject] = min(row.time, times.get(row.subject, row.time))
    static = {
        (row.subject, row.code)
        for row in own
        if row.code in ("DX//a", "LAB//d") and row.time in (None, first[BIRTH_CODE].get(row.subject))
    }
    births = {subject: time for subject, time in first[BIRTH_CODE].items() if subject not in present}
    return sorted(static), sorted(first[DEATH_CODE].items()), sorted(births.items())


def several_values(static):
    """Subjects with two codes of one beginning, by loops."""
    found = Counter((subject, code.partition("//")[0]) for subject, code in static)
    return len({subject for (subject, _), count in found.items() if count > 1})


def stored_facts(folder, split):
    static, deaths = read_static(folder, split), read_deaths(folder, split)
    assert deaths is not None
    pairs = zip(deaths["subject_id"].to_pylist(), deaths["time"].cast(pa.int64()).to_pylist(), strict=True)
    births = read_births(folder, split)
    return (
        list(zip(*(static[name].to_pylist() for name in ("subject_id", "code")), strict=True)),
        list(pairs),
        list(zip(births.subject_ids.tolist(), births.times.tolist(), strict=True)),
    )


@settings(max_examples=30)
@given(
    rows=row_lists,
    boundaries=st.sets(st.integers(-3, 7)),
    units=st.integers(1, 4),
    partition_events=st.integers(1, 100),
    ascending=st.booleans(),
    bins=st.booleans(),
    seed=st.integers(0, 99),
)
def test_facts_are_kept_and_change_no_event(
    tmp_path_factory, rows, boundaries, units, partition_events, ascending, bins, seed
):
    folder = tmp_path_factory.mktemp("facts")
    rows = random.Random(seed).sample(rows + ALWAYS, len(rows) + len(ALWAYS))
    source = source_of(
        sorted(rows, key=lambda row: row.subject or 0) if ascending else rows, SPLIT_IDS, units
    )
    if ascending:
        units, ranges = 1, [min(row.subject for row in rows), max(row.subject for row in rows)]
        source = source_of(sorted(rows, key=lambda row: row.subject or 0), SPLIT_IDS, 1)
        source = replace(source, ranges=np.array([ranges], np.int64))
    config = PrepareConfig(output=folder / "with", codes=("DX//",), min_count=1, static_codes=STATIC)
    if bins:
        config = replace(config, value_codes=("DX//[bc]",), value_bins=2)
    cut = {"boundaries": np.array(sorted(boundaries), np.int64), "partition_events": partition_events}
    manifest = prepare(source, config, **cut)
    prepare(source, replace(config, output=folder / "without", static_codes=()), **cut)
    for shard in range(3):
        prepare(source, replace(config, output=folder / "parts", shard=f"{shard}/3"), **cut)
    prepare(source, replace(config, output=folder / "parts", merge=True), **cut)
    one, other = contents(folder / "with"), contents(folder / "without")
    assert one == contents(folder / "parts")
    assert {name: one[name] for name in one if not name.endswith(("static.parquet", "manifest.json"))} == {
        name: other[name] for name in other if not name.endswith(("static.parquet", "manifest.json"))
    }
    if not bins:
        data = DataConfig(codes=("DX//",), min_count=1, duplicates="drop")
        built = build_sequences(event_set(rows, SPLIT_IDS), data, False)
        assert_same(read_prepared(folder / "without"), built)
    prepared = read_prepared(folder / "with")
    in_train = prepared.splits["train"].subject_ids.tolist()
    trained = Counter(
        code for subject, code in facts_of(rows, SPLIT_IDS["train"], ())[0] if subject in in_train
    )
    assert manifest["fact_rows"] == trained
    trained = {*trained, *prepared.vocabulary.codes}
    for split in SPLITS:
        present = prepared.splits[split].subject_ids.tolist()
        static, deaths, births = facts_of(rows, SPLIT_IDS[split], present)
        assert stored_facts(folder / "with", split) == (static, deaths, births)
        assert prepared.subject_ids(split).tolist() == [*present, *(subject for subject, _ in births)]
        assert read_static(folder / "without", split).num_rows == 0
        counts = {
            "facts": len(static),
            "subjects": len({subject for subject, _ in static}),
            "several": several_values(static),
            "unknown": sum(code not in trained for _, code in static),
            "deaths": len(deaths),
            "births_without_events": len(births),
        }
        assert manifest["subject_facts"][split] == counts
    kept = sum(split["events"] for split in manifest["splits"].values())
    assert manifest["events"]["read"] == kept + sum(manifest["events"]["dropped"].values()) == len(rows)
    dropped = manifest["events"]["dropped"]
    plain = read_manifest(folder / "without")["events"]
    other = dropped.pop("fact with a time", 0)
    if other:
        dropped["code not selected"] = dropped.get("code not selected", 0) + other
    assert manifest["events"] | {"dropped": dropped} == plain


def test_a_static_code_with_a_time_is_no_fact(tmp_path):
    rows = [*ALWAYS, Row(1, None, "GENDER//F"), Row(3, DAY, "GENDER//M"), Row(7, None, "GENDER//M")]
    manifest = prepare(
        source_of(rows, SPLIT_IDS), PrepareConfig(output=tmp_path / "out", codes=("DX//",), min_count=1)
    )
    assert read_static(tmp_path / "out", "train").to_pydict() == {"subject_id": [1], "code": ["GENDER//F"]}
    assert read_static(tmp_path / "out", "tuning").num_rows == 0
    assert manifest["events"]["dropped"] == {
        "birth or death marker": 2,
        "code not selected": 2,
        "fact with a time": 1,
    }


def test_what_is_timed_at_birth_is_a_static_fact(tmp_path):
    birth = 3 * DAY
    rows = [
        *ALWAYS,
        born(7, birth),
        Row(7, birth, "Gender/M"),
        Row(7, birth + 1, "Gender/F"),
        Row(7, 9 * DAY, "DX//a"),
    ]
    rows += [born(8, birth), Row(8, birth, "Gender/F")]  # without an event
    splits = SPLIT_IDS | {"train": [*SPLIT_IDS["train"], 7, 8]}
    config = PrepareConfig(output=tmp_path / "out", codes=("DX//",), static_codes=("Gender/",), min_count=1)
    prepare(source_of(rows, splits), config)
    facts = read_static(tmp_path / "out", "train").to_pydict()
    assert facts == {"subject_id": [7, 8], "code": ["Gender/M", "Gender/F"]}


def test_the_earliest_death_of_each_subject(tmp_path):
    deaths = [Row(5, 900 * DAY, DEATH_CODE), Row(1, 800 * DAY, DEATH_CODE), Row(5, 700 * DAY, DEATH_CODE)]
    prepare(source_of([*ALWAYS, *deaths], SPLIT_IDS), PrepareConfig(output=tmp_path / "out", min_count=1))
    assert stored_facts(tmp_path / "out", "train")[1] == [(1, 800 * DAY), (5, 700 * DAY)]


def test_births_of_subjects_without_events_follow_the_split_by_hash(tmp_path):
    """They are in the split in which their events would have been, and only the events' fate decides."""
    ids = range(1, 60)
    rows = [row for subject in ids for row in (born(subject, subject * DAY), Row(subject, 99 * DAY, "DX//a"))]
    fate = [
        *(row for row in rows if row.subject % 3 or row.code == BIRTH_CODE),
        *(Row(subject, -9 * DAY, "DX//a") for subject in ids if subject % 6 == 0),  # before birth
        *(Row(subject, 99 * DAY, "LAB//b") for subject in ids if subject % 6 == 3),  # not selected
        Row(777, 99 * DAY, "DX//a"),  # no birth
    ]
    options = {"codes": ("DX//",), "min_count": 1, "tuning_fraction": 0.3, "held_out_fraction": 0.3}
    for name, events in (("whole", rows), ("some", fate)):
        prepare(source_of(events), PrepareConfig(output=tmp_path / name, **options))
    whole, some = (read_prepared(tmp_path / name) for name in ("whole", "some"))
    for split in SPLITS:
        expected = whole.splits[split].subject_ids
        births = some.births[split]
        assert births.subject_ids.tolist() == expected[expected % 3 == 0].tolist() != []
        assert births.times.tolist() == (births.subject_ids * DAY).tolist()
        assert len(whole.births[split]) == 0


def test_row_groups_do_not_depend_on_the_pieces(tmp_path, monkeypatch):
    from behrt_jax.data import prepared as subject_facts

    monkeypatch.setattr(subject_facts, "_ROWS", 4)
    splits = {"train": list(range(1, 12)), "tuning": [12], "held_out": []}
    rows = [born(subject) for subject in range(1, 13)]
    rows += [Row(subject, DAY, "DX//a") for subject in range(1, 13)]
    rows += [Row(subject, None, f"SEX//{subject % 2}") for subject in range(1, 13)]
    for name, events in (("whole", 1000), ("pieces", 1)):
        config = PrepareConfig(output=tmp_path / name, min_count=1)
        prepare(source_of(rows, splits), config, boundaries=np.arange(2, 12), partition_events=events)
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")
    assert read_static(tmp_path / "whole", "train")["subject_id"].to_pylist() == list(range(1, 12))


def test_a_folder_of_an_older_version(tmp_path, caplog):
    prepare(source_of(ALWAYS, SPLIT_IDS), PrepareConfig(output=tmp_path / "out", min_count=1))
    for file in (tmp_path / "out").rglob("*.parquet"):
        if file.parent != tmp_path / "out":
            file.unlink()
    without_digests(tmp_path / "out", subject_facts={})
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert len(read_prepared(tmp_path / "out").splits["train"]) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'out'} was written without digests of its files: damage to them is not noticed."
    ]
    assert read_static(tmp_path / "out", "train").schema.names == ["subject_id", "code"]
    assert read_static(tmp_path / "out", "train").num_rows == 0
    assert read_deaths(tmp_path / "out", "train") is None
    assert len(read_births(tmp_path / "out", "train")) == 0
    (tmp_path / "out" / "train" / "static.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"static\.parquet is damaged"):
        read_static(tmp_path / "out", "train")


def test_delays_are_recorded_and_change_no_event(tmp_path):
    config = PrepareConfig(output=tmp_path / "plain", min_count=1)
    source = source_of(ALWAYS, SPLIT_IDS)
    assert prepare(source, config)["options"]["delays"] == []
    delays = ("DX//=2.5", "NOTHING=visit")
    manifest = prepare(source, replace(config, output=tmp_path / "delayed", delays=delays))
    assert manifest["options"]["delays"] == list(delays)
    assert manifest["delayed_codes"] == {"DX//=2.5": 1, "NOTHING=visit": 0}
    one, other = contents(tmp_path / "plain"), contents(tmp_path / "delayed")
    assert one.pop("manifest.json") != other.pop("manifest.json")
    assert one == other
    prints = [read_manifest(tmp_path / name)["fingerprint"] for name in ("plain", "delayed")]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("delay", ["DX//", "DX//=-1", "DX//=soon", "=1", "X(=1"])
def test_a_wrong_delay_is_told_before_anything_is_read(tmp_path, delay):
    source = source_of(ALWAYS, SPLIT_IDS)
    source.tables = [None]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="--delays has"):
        prepare(source, PrepareConfig(output=tmp_path / "out", delays=(delay,)))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_pattern_of_static_codes(tmp_path):
    with pytest.raises(InputError, match="static_codes has"):
        prepare(source_of(ALWAYS), PrepareConfig(output=tmp_path / "out", static_codes=("X(",)))

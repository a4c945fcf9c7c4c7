import json

import numpy as np
import pytest

from behrt_jax.config import DataConfig, PrepareConfig
from behrt_jax.data.events import SPLITS
from behrt_jax.data.prepared import read_manifest, read_prepared
from behrt_jax.data.sequences import build_sequences
from behrt_jax.data.vocabulary import SEP, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.records.prepare.pipeline import prepare
from tests.data.meds_folder import DAY, Row, born, by_remainder, event_set, events_table, history_rows
from tests.data.memory_source import MemorySource


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
        (lambda out: (out / "vocabulary.parquet").unlink(), r"vocabulary\.parquet cannot be read"),
        (lambda out: (out / "train" / "events.arrow").unlink(), r"events\.arrow is missing, cut short"),
        (
            lambda out: (out / "train" / "events.arrow").write_bytes(
                (out / "train" / "events.arrow").read_bytes()[:-40]
            ),
            r"train/events\.arrow is missing, cut short",
        ),
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
def test_a_damaged_folder(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        read_prepared(folder)


def test_another_vocabulary(folder):
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


def test_a_damaged_manifest(folder):
    manifest = read_manifest(folder)
    del manifest["splits"]["tuning"]["events"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_prepared(folder)


def test_no_folder(tmp_path):
    with pytest.raises(
        InputError, match=r"none is no prepared data set \(it is not a folder\): give the folder"
    ):
        read_prepared(tmp_path / "none")

import hashlib
import json
import platform
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.config.data import DataConfig, PrepareConfig
from behrt_jax.data.event_rules import select_events
from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, SPLITS
from behrt_jax.data.prepared import read_births, read_prepared, read_rules
from behrt_jax.data.sequences import build_sequences
from behrt_jax.data.vocabulary import UNK
from behrt_jax.errors import InputError
from behrt_jax.records.patient import encode_events
from behrt_jax.records.prepare.pipeline import prepare
from tests.records.meds_folder import (
    DAY,
    HOUR,
    Row,
    born,
    by_remainder,
    event_set,
    events_table,
    history_rows,
    tokens,
    tokens_of,
)
from tests.records.memory_source import MemorySource

SPLIT_IDS = {"train": [1, -2, 5], "tuning": [3], "held_out": [4]}
ALWAYS = [born(1), born(3)]  # with these the train and tuning splits are never empty
ALWAYS += [Row(subject, day * DAY, "DX//common") for subject in (1, 3) for day in (0, 2, 200)]

row_lists = st.lists(
    st.builds(
        Row,
        subject=st.sampled_from([1, -2, 3, 4, 5, 6, 2**62, -(2**62)]),
        time=st.none() | st.integers(-4 * 4, 300 * 4).map(lambda quarter: quarter * 6 * HOUR + quarter % 2),
        code=st.sampled_from(["DX//a", "DX//b", "DX//c", "LAB//d", BIRTH_CODE, BIRTH_CODE, DEATH_CODE]),
        visit=st.none() | st.integers(-1, 2) | st.just(2**63 - 1),
        value=st.none() | st.sampled_from([0.0, 1.0, 2.5]),
    ),
    max_size=60,
)


def source_of(rows, splits=None, units=1, chunk=1000, visits=None, **more) -> MemorySource:
    """Rows as a source: every n-th row to the same unit, cut into chunks."""
    if visits is None:
        visits = any(row.visit is not None for row in rows)
    parts = [rows[unit::units] for unit in range(units)]
    tables = [
        [events_table(part[start : start + chunk], visits) for start in range(0, len(part), chunk)]
        for part in parts
    ]
    arrays = {name: np.array(ids, np.int64) for name, ids in (splits or {}).items()}
    return MemorySource(tables, arrays, **more)


def contents(folder: Path) -> dict[str, str]:
    """Name of each file below a folder -> hash of what is in it."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def without_digests(folder: Path, **manifest: Any) -> None:
    """Make a folder one of an older version, whose manifest knew nothing of the files' contents."""
    stored = json.loads((folder / "manifest.json").read_text()) | manifest
    older = {name: value for name, value in stored.items() if name not in ("files", "sha256")}
    (folder / "manifest.json").write_text(json.dumps(older))


def assert_same(prepared, built):
    assert prepared.vocabulary.codes == built.vocabulary.codes
    assert prepared.vocabulary.counts.tolist() == built.vocabulary.counts.tolist()
    assert prepared.vocabulary.descriptions == built.vocabulary.descriptions
    for name in SPLITS:
        for column in ("subject_ids", "offsets", "codes", "ages", "visits", "times"):
            array = getattr(built.splits[name], column)
            ours = getattr(prepared.splits[name], column)
            assert ours.dtype == array.dtype, column
            assert ours.tolist() == array.tolist(), (name, column)
    assert prepared.counts == built.counts
    assert prepared.fingerprint == built.fingerprint
    assert prepared.subjects_without_events == built.subjects_without_events


@settings(max_examples=40)
@given(
    rows=row_lists,
    boundaries=st.sets(st.integers(-3, 7)),
    units=st.integers(1, 4),
    chunk=st.integers(1, 50),
    partition_events=st.integers(1, 100),
    shards=st.sampled_from([None, 1, 3]),
    sep_token=st.booleans(),
    duplicates=st.sampled_from(["keep", "drop"]),
    min_count=st.integers(1, 3),
    own_splits=st.booleans(),
    seed=st.integers(0, 99),
)
def test_prepared_data_equals_sequences_built_in_memory(
    tmp_path_factory,
    rows,
    boundaries,
    units,
    chunk,
    partition_events,
    shards,
    sep_token,
    duplicates,
    min_count,
    own_splits,
    seed,
):
    output = tmp_path_factory.mktemp("prepared") / "out"
    rows = random.Random(seed).sample(rows + ALWAYS, len(rows) + len(ALWAYS))
    splits = SPLIT_IDS if own_splits else None
    options = {"codes": ("DX//",), "duplicates": duplicates, "min_count": min_count, "tuning_fraction": 0.5}
    options["held_out_fraction"] = 0.1
    try:
        built = build_sequences(event_set(rows, splits), DataConfig(**options), sep_token)
    except InputError:
        built = None
    source = source_of(rows, splits, units, chunk)
    config = PrepareConfig(output=output, **options)
    cut = {"boundaries": np.array(sorted(boundaries), np.int64), "partition_events": partition_events}
    if shards is not None:
        for index in range(shards):
            prepare(source, replace(config, shard=f"{index}/{shards}"), **cut)
        config = replace(config, merge=True)
    if built is None:
        with pytest.raises(InputError):
            prepare(source, config, **cut)
        assert not output.exists()
        return
    manifest = prepare(source, config, **cut)
    assert_same(read_prepared(output, sep_token), built)
    kept = sum(split["events"] for split in manifest["splits"].values())
    assert manifest["events"]["read"] == kept + sum(manifest["events"]["dropped"].values()) == len(rows)
    assert [file.name for file in output.parent.iterdir()] == ["out"]


def options(output, **more) -> PrepareConfig:
    return PrepareConfig(output=output, **({"min_count": 1} | more))


@settings(max_examples=8)
@given(seed=st.integers(0, 99), units=st.integers(1, 3), partition_events=st.integers(1, 200))
def test_the_files_do_not_depend_on_order_or_cut(tmp_path_factory, seed, units, partition_events):
    rows = [*history_rows(20), *(born(subject, -subject * DAY) for subject in range(21, 31))]
    splits = by_remainder(rows)
    folder = tmp_path_factory.mktemp("prepared")
    shuffled = random.Random(seed).sample(rows, len(rows))
    prepare(source_of(rows, splits), options(folder / "one"))
    prepare(
        source_of(shuffled, splits, units, chunk=7),
        options(folder / "two"),
        boundaries=np.array([3, 9]),
        partition_events=partition_events,
    )
    one = contents(folder / "one")
    assert one == contents(folder / "two")
    assert len(one) == 17
    assert read_births(folder / "one", "train").subject_ids.tolist() == [*range(21, 29)]


def test_processes_read_side_by_side(tmp_path):
    rows = history_rows(20)
    source = source_of(rows, units=3)
    told = []
    prepare(source, options(tmp_path / "one"))
    prepare(source, options(tmp_path / "two", workers=2), lambda *what: told.append(what))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert told[-1] == ("write", 3, 3)
    assert ("read", 3, 3) in told


def test_input_larger_than_a_bucket_is_cut_by_the_sample(tmp_path, monkeypatch):
    rows = history_rows(20)
    file = tmp_path / "input.parquet"
    file.write_bytes(bytes(1000))
    monkeypatch.setattr("behrt_jax.records.prepare.spill._BUCKET_BYTES", 100)
    told = []
    source = source_of(rows, input_files=[file], sample=np.arange(1, 21))
    prepare(source, options(tmp_path / "out"), lambda *what: told.append(what), partition_events=60)
    encoded = [what for what in told if what[0] == "encode"]
    assert len(encoded) > 4
    built = build_sequences(event_set(rows), DataConfig(min_count=1), False)
    assert_same(read_prepared(tmp_path / "out"), built)


@pytest.mark.parametrize("visits", [True, False])
@given(rows=row_lists)
def test_counted_duplicates(visits, rows):
    rows = [row._replace(visit=row.visit if visits else None) for row in rows]
    rows += [born(7), *[Row(7, DAY + minute, "DX//a", 9 if visits else None) for minute in range(4)]]
    kept = select_events(event_set(rows), (), (), "keep")
    expected = defaultdict(list)
    for subject, start, end in zip(kept.subject_ids.tolist(), kept.offsets, kept.offsets[1:], strict=False):
        visits_codes = zip(kept.visits[start:end].tolist(), kept.codes[start:end].tolist(), strict=True)
        times_seen = Counter(visits_codes)
        for (visit, code), count in times_seen.items():
            suffix = {1: "", 2: "//x2"}.get(count, "//x3-5" if count < 6 else "//x6+")
            expected[subject].append((visit, kept.names[code] + suffix))
    source = event_set(rows)
    counted = select_events(source, (), (), "count")
    found = {}
    for subject, start, end in zip(
        counted.subject_ids.tolist(), counted.offsets, counted.offsets[1:], strict=False
    ):
        names = [counted.names[code] for code in counted.codes[start:end]]
        found[subject] = sorted(zip(counted.visits[start:end].tolist(), names, strict=True))
        assert np.all(np.diff(counted.times[start:end]) >= 0)
    assert found == {subject: sorted(pairs) for subject, pairs in expected.items()}
    assert source.counts.kept == len(counted.codes)
    repeated = sum("//x" in name for pairs in expected.values() for _, name in pairs)
    assert source.counts.changed["repeated in visit -> code with a count"] == repeated


def test_counted_duplicates_have_rows_and_descriptions(tmp_path):
    rows = [born(1), born(2), Row(2, DAY, "A"), *[Row(1, DAY + place, "A") for place in range(7)]]
    rows += [Row(1, 2 * DAY, "A"), Row(1, 2 * DAY + 1, "A")]
    source = source_of(rows, {"train": [1], "tuning": [2]}, texts={"A": "an illness"})
    manifest = prepare(source, options(tmp_path / "out", duplicates="count"))
    prepared = read_prepared(tmp_path / "out")
    assert prepared.vocabulary.codes[5:] == ("A//x2", "A//x6+")
    assert prepared.vocabulary.descriptions[5:] == ("an illness (x2)", "an illness (x6+)")
    assert prepared.splits["tuning"].codes.tolist() == [UNK]
    assert manifest["events"]["dropped"] == {"birth or death marker": 2, "duplicate in visit": 7}
    assert manifest["events"]["changed"]["repeated in visit -> code with a count"] == 2
    source = source_of([*rows, born(3), *[Row(3, DAY, "A")] * 2], {"train": [1], "tuning": [2]})
    manifest = prepare(source, options(tmp_path / "more", duplicates="count"))
    assert manifest["events"]["dropped"]["subject in no split"] == 1  # and is not counted as changed
    assert manifest["events"]["changed"]["repeated in visit -> code with a count"] == 2


def test_values_become_bins_fitted_on_train(tmp_path):
    values = [float(value) for value in range(100)]
    rows = [born(1), born(2), Row(1, DAY, "DX//a"), Row(2, DAY, "DX//a")]
    rows += [Row(1, day * DAY, "LAB//x", value=value) for day, value in enumerate(values)]
    rows += [Row(1, 900 * DAY, "LAB//x"), Row(1, 901 * DAY, "LAB//x", value=float("nan"))]
    rows += [Row(2, day * DAY, "LAB//x", value=value * 1000) for day, value in enumerate(values)]
    rows += [Row(1, day * DAY, "LAB//rare", value=1.0) for day in range(3)]
    rows += [Row(1, DAY, "LAB//y", value=1.0), Row(1, -DAY, "LAB//x", value=-1e9)]
    source = source_of(
        random.Random(0).sample(rows, len(rows)), {"train": [1], "tuning": [2]}, texts={"LAB//x": "lab"}
    )
    config = options(tmp_path / "out", codes=("DX//",), value_codes=("LAB//(x|rare)",), value_bins=4)
    manifest = prepare(source, config)
    prepared = read_prepared(tmp_path / "out")
    counts = dict(zip(prepared.vocabulary.codes, prepared.vocabulary.counts.tolist(), strict=True))
    texts = dict(zip(prepared.vocabulary.codes, prepared.vocabulary.descriptions, strict=True))
    assert {code: count for code, count in counts.items() if code.startswith("LAB")} == {
        **{f"LAB//x//Q{place}": 25 for place in range(1, 5)},
        "LAB//x": 2,
        "LAB//rare": 3,
    }
    assert texts["LAB//x//Q4"] == "lab (Q4)"
    tuning = [prepared.vocabulary.codes[code] for code in prepared.splits["tuning"].codes]
    assert Counter(tuning) == {"LAB//x//Q1": 1, "LAB//x//Q4": 99, "DX//a": 1}
    assert manifest["events"]["changed"]["value -> quantile bin"] == 200
    assert manifest["value_edges"] == {"LAB//x": [24.0, 49.0, 74.0]}


@settings(max_examples=8)
@given(seed=st.integers(0, 99))
def test_bins_of_a_sample_do_not_depend_on_order_or_cut(tmp_path_factory, seed):
    draw = random.Random(0)
    rows = [born(subject) for subject in range(1, 11)]
    for place in range(400):
        code = f"LAB//{place % 3}"
        rows.append(Row(draw.randrange(1, 11), draw.randrange(99) * DAY, code, value=draw.gauss(0, 1)))
    splits = by_remainder(rows)
    folder = tmp_path_factory.mktemp("prepared")
    shuffled = random.Random(seed).sample(rows, len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("behrt_jax.data.event_rules.SAMPLE", 40)
        more = {"value_codes": ("LAB//",), "value_bins": 3, "duplicates": "keep"}
        prepare(source_of(rows, splits), options(folder / "one", **more))
        cut = {"boundaries": np.array([4, 8]), "partition_events": 1}
        prepare(source_of(shuffled, splits, 2), options(folder / "two", **more), **cut)
    assert contents(folder / "one") == contents(folder / "two")
    counts = read_prepared(folder / "one").vocabulary.counts[5:]
    assert len(counts) == 9
    assert counts.min() > 0.15 * counts.sum() / 3


def test_the_manifest_tells_what_happened(tmp_path):
    rows = [*history_rows(20), Row(99, DAY, "DIAGNOSIS//0"), Row(1, None, "GENDER//F"), Row(1, DAY, "LAB//1")]
    source = source_of(rows, by_remainder(rows[:-3]), texts={"DIAGNOSIS//0": "an illness"})
    config = options(tmp_path / "out", codes=("DIAGNOSIS//", "GENDER//"))
    manifest = prepare(source, config)
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == stored | {"up_to_date": False}
    assert stored["events"]["dropped"]["code not selected"] == 1
    assert stored["events"]["dropped"]["no birth"] == 1
    assert stored["events"]["dropped"]["null time (static)"] == 1
    assert stored["options"]["codes"] == ["DIAGNOSIS//", "GENDER//"]
    prepared = read_prepared(tmp_path / "out")
    everywhere = Counter()
    for name in SPLITS:
        part = prepared.splits[name]
        figures = stored["splits"][name]
        assert figures["subjects"] == len(part)
        assert figures["events"] == len(part.codes)
        assert figures["codes"] == len(set(part.codes.tolist()))
        everywhere.update(prepared.vocabulary.codes[code] for code in part.codes)
        for length, shares in figures["padding"].items():
            cut = [min(int(length), n - start) for n in part.lengths for start in range(0, n, int(length))]
            assert shares["padded"] == round(1 - sum(cut) / (int(length) * len(cut)), 4)
            assert shares["packed"] <= shares["padded"]
    top = {row["code"]: row["events"] for row in stored["top_codes"]}
    assert top == dict(everywhere)
    assert list(top.values()) == sorted(top.values(), reverse=True)
    described = {row["code"]: row["description"] for row in stored["top_codes"]}
    assert described["DIAGNOSIS//0"] == "an illness"
    assert described["DIAGNOSIS//1"] is None
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in text


def test_the_same_again_is_left_alone(tmp_path):
    file = tmp_path / "records.csv"
    file.write_text("one")
    source = source_of(history_rows(20), input_files=[file])
    config = options(tmp_path / "out", input=tmp_path)
    first = prepare(source, config)
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*"))]
    again = prepare(source, replace(config, workers=3))
    assert again == first | {"up_to_date": True}
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*"))]
    with pytest.raises(InputError, match=r"out was prepared with other options: give another --output"):
        prepare(source, replace(config, min_count=2))
    file.write_text("two")
    with pytest.raises(InputError, match=r"out was prepared from another input: give another --output"):
        prepare(source, config)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"else holds something else: give another --output"):
        prepare(source, replace(config, output=tmp_path / "else"))
    assert (tmp_path / "else" / "notes.txt").read_text() == "mine"


def test_a_dry_run_leaves_nothing(tmp_path):
    rows = history_rows(20)
    source = source_of(rows)
    dry = prepare(source, options(tmp_path / "new" / "out", dry_run=True))
    assert list(tmp_path.iterdir()) == []
    assert dry == prepare(source, options(tmp_path / "out"))
    assert dry == prepare(source, options(None, dry_run=True))


def test_what_a_killed_run_left_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    left = tmp_path / f".preparing-out.{platform.node().replace('.', '-')}.{process.pid}.abc"
    (left / "spill").mkdir(parents=True)
    prepare(source_of(history_rows(20)), options(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_other_processes_learned_describes_codes(tmp_path):
    class Learning(MemorySource):
        def read(self, unit, counts):
            yield from super().read(unit, counts)
            self.texts["DIAGNOSIS//0"] = "an illness"

        def learned(self):
            return dict(self.texts)

        def learn(self, learned):
            self.texts |= learned

    source = Learning(source_of(history_rows(20), units=2).tables)
    for shard in ("0/2", "1/2"):
        prepare(replace(source, texts={}), options(tmp_path / "out", shard=shard))
    prepare(source, options(tmp_path / "out", merge=True))
    assert "an illness" in read_prepared(tmp_path / "out").vocabulary.descriptions


def test_a_failure_leaves_nothing(tmp_path):
    class Broken(MemorySource):
        def read(self, unit, counts):
            yield from super().read(unit, counts)
            raise InputError("records.csv is cut short: write it again.")

    source = Broken(source_of(history_rows(20)).tables)
    for config in (options(tmp_path / "out"), options(tmp_path / "out", shard="0/1")):
        with pytest.raises(InputError, match="cut short"):
            prepare(source, config)
    assert [path.name for path in tmp_path.rglob("*")] == ["out.shards"]


def test_shards_are_merged_once_all_are_there(tmp_path):
    source = source_of(history_rows(20), units=5)
    config = options(tmp_path / "out")
    prepare(source, options(tmp_path / "whole"))
    with pytest.raises(InputError, match=r"out\.shards holds no shards"):
        prepare(source, replace(config, merge=True))
    first = prepare(source, replace(config, shard="0/2"))
    assert first["units"] == 3
    with pytest.raises(InputError, match=r"has no shard 1 of 2: run prepare with shard 1/2"):
        prepare(source, replace(config, merge=True))
    with pytest.raises(InputError, match=r"0-of-2 is there already"):
        prepare(source, replace(config, shard="0/2"))
    prepare(source, replace(config, shard="1/2", workers=1))
    with pytest.raises(InputError, match=r"0-of-2 was read with other options"):
        prepare(source, replace(config, merge=True, codes=("DIAGNOSIS//1",)))
    for name in ("0/spill.json", "reading.json"):
        file = tmp_path / "out.shards" / "1-of-2" / name
        whole = file.read_text()
        file.write_text(whole.replace("1", "2", 1))
        with pytest.raises(InputError, match=rf"{name} is damaged.* read this shard again"):
            prepare(source, replace(config, merge=True))
        file.write_text(whole)
    prepare(source, replace(config, merge=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": ("[",)}, r"^codes has '\[', which is no regular expression"),
        ({"value_codes": ("[",)}, r"^value_codes has '\['"),
        ({"codes": ("LAB",)}, r"code not selected.*most frequent prefixes: DIAGNOSIS"),
        ({"min_count": 10**6}, r"lower min_count, select more codes with codes"),
        ({"min_count": 0}, "min_count is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"value_bins": 1}, "value_bins is 1"),
        ({"tuning_fraction": 1.5}, r"^tuning_fraction is 1\.5"),
        (
            {"tuning_fraction": 1e-9},
            r"another seed, splits\.exact, or other values of tuning_fraction and held_out_fraction",
        ),
        ({"shard": "2/2"}, r"shard is '2/2': give i/n"),
        ({"shard": "x"}, r"shard is 'x': give i/n"),
        ({"shard": "0/1", "merge": True}, "shard and merge are both given"),
        ({"output": None}, "output is missing"),
    ],
)
def test_wrong_options(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        prepare(source_of(history_rows(20)), replace(options(tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


def test_an_empty_tuning_split(tmp_path):
    rows = [born(1), born(2), Row(1, DAY, "A"), Row(2, None, "A")]
    with pytest.raises(InputError, match="No event is left in the tuning split"):
        prepare(source_of(rows, {"train": [1], "tuning": [2]}), options(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_splits_that_share_subjects(tmp_path):
    with pytest.raises(InputError, match="memory source puts 1 subjects into more than one split"):
        source = source_of(history_rows(3), {"train": [1, 2], "tuning": [2, 3]})
        prepare(source, options(tmp_path / "out"))


def test_a_subject_on_a_boundary_stays_whole(tmp_path):
    rows = [born(1), *[Row(1, day * DAY, "A") for day in range(3)], born(2), Row(2, DAY, "A")]
    tables = [events_table(rows), events_table([Row(2, 2 * DAY, "A"), Row(1, 9 * DAY, "A")])]
    splits = {"train": np.array([1]), "tuning": np.array([2])}
    source = MemorySource([tables], splits)  # the first chunk is sorted by subject, the second is not
    prepare(source, options(tmp_path / "out"), boundaries=np.array([2]), partition_events=1)
    prepared = read_prepared(tmp_path / "out")
    assert prepared.splits["tuning"].times.tolist() == [DAY, 2 * DAY]
    assert prepared.splits["train"].lengths.tolist() == [4]
    assert prepared.counts.dropped == {"birth or death marker": 2}


def test_visits_interrupted_again_and_again():
    ids = [7, 8, 7, 9, 7, 5, 8]
    rows = [born(1), *[Row(1, DAY + place, "A", visit) for place, visit in enumerate(ids)]]
    assert select_events(event_set(rows), (), (), "keep").visits.tolist() == [0, 1, 0, 2, 0, 3, 1]


# Other subjects, prepared like a data set that is there.

LIKE_ROWS = [
    row._replace(value=None if row.code == "DIAGNOSIS//7" else row.value)
    for row in history_rows(subjects=40, days=5, seed=3)
]


@settings(max_examples=6)
@given(
    duplicates=st.sampled_from(["keep", "drop", "count"]),
    values=st.sampled_from([(), ("DIAGNOSIS//[0-3]",), (r"DIAGNOSIS",)]),
    exclude=st.sampled_from([(), ("DIAGNOSIS//5",)]),
    own_splits=st.booleans(),
    chosen=st.sets(st.integers(1, 40), min_size=1, max_size=5),
)
def test_like_gives_the_tokens_that_training_gave(
    tmp_path_factory, duplicates, values, exclude, own_splits, chosen
):
    folder = tmp_path_factory.mktemp("like")
    splits = by_remainder(LIKE_ROWS) if own_splits else None
    rules = {"duplicates": duplicates, "value_codes": values, "exclude_codes": exclude, "value_bins": 3}
    first = options(folder / "first", min_count=3, vocabulary_size=16, delays=("DIAGNOSIS//1=2",), **rules)
    manifest = prepare(source_of(LIKE_ROWS, splits), first)
    trained = tokens(folder / "first")
    again = PrepareConfig(output=folder / "again", like=folder / "first")
    prepare(source_of(LIKE_ROWS, splits), again)
    assert tokens(folder / "again") == trained
    assert contents(folder / "again").keys() == contents(folder / "first").keys()
    if own_splits:  # the same split files too, the vocabulary with its counts included
        same = {name for name in contents(folder / "first") if name != "manifest.json"}
        first_files, again_files = contents(folder / "first"), contents(folder / "again")
        assert {name: first_files[name] for name in same} == {name: again_files[name] for name in same}
    some = [row for row in LIKE_ROWS if row.subject in chosen]
    new = prepare(
        source_of(some, units=2, chunk=7), PrepareConfig(output=folder / "some", like=folder / "again")
    )
    assert tokens(folder / "some") == {subject: trained[subject] for subject in chosen}
    one = [row for row in some if row.subject == min(chosen)]
    in_memory = encode_events(events_table(one), *read_rules(folder / "again", "--like"))
    assert tokens_of(in_memory) == {min(chosen): trained[min(chosen)]}
    assert in_memory.counts.kept == sum(len(part.codes) for part in in_memory.splits.values())
    assert new["options"]["delays"] == ["DIAGNOSIS//1=2"]
    assert new["vocabulary"] == manifest["vocabulary"]
    assert new.get("value_edges") == manifest.get("value_edges")
    assert new["splits"]["held_out"]["subjects"] == len(chosen)


def test_like_counts_what_the_vocabulary_does_not_know_by_code(tmp_path):
    prepare(source_of(LIKE_ROWS, by_remainder(LIKE_ROWS)), options(tmp_path / "first"))
    rows = [born(7), *(Row(7, day * DAY, f"NEW//{day % 3}") for day in range(8)), Row(7, DAY, "DIAGNOSIS//1")]
    manifest = prepare(source_of(rows), options(tmp_path / "new", like=tmp_path / "first"))
    assert manifest["unknown_codes"] == [
        {"code": "NEW//0", "events": 3},
        {"code": "NEW//1", "events": 3},
        {"code": "NEW//2", "events": 2},
    ]
    assert manifest["distinct_unknown_codes"] == 3
    assert manifest["events"]["changed"]["rare or unseen code -> [UNK]"] == 8
    data = read_prepared(tmp_path / "new")
    assert dict(data.unknown_codes) == {"NEW//0": 3, "NEW//1": 3, "NEW//2": 2}
    assert np.count_nonzero(data.splits["held_out"].codes == UNK) == 8
    # Shares that are given deal the subjects out as usual, and a split without any is no error.
    shares = options(tmp_path / "dealt", like=tmp_path / "first", tuning_fraction=0.2)
    assert prepare(source_of(rows), shares)["options"]["held_out_fraction"] == 0.1


def test_like_refuses_rules_of_its_own_and_what_it_knows_nothing_of(tmp_path):
    first = options(tmp_path / "first", value_codes=("DIAGNOSIS//1",))
    prepare(source_of(LIKE_ROWS, by_remainder(LIKE_ROWS)), first)
    given = options(tmp_path / "new", like=tmp_path / "first")
    for change in ({"codes": ("DX",)}, {"duplicates": "count"}, {"min_count": 2}, {"value_bins": 7}):
        with pytest.raises(InputError, match=f"--{next(iter(change))} has no effect with --like"):
            prepare(source_of(LIKE_ROWS), replace(given, **change))
    prepare(source_of(LIKE_ROWS), replace(given, value_codes=("DIAGNOSIS//1",)))  # it says the same
    with pytest.raises(InputError, match=f"--like: {tmp_path} does not tell how its data were prepared"):
        prepare(source_of(LIKE_ROWS), replace(given, like=tmp_path))
    others = options(tmp_path / "selected", codes=("DIAGNOSIS//",))
    prepare(source_of(LIKE_ROWS, by_remainder(LIKE_ROWS)), others)
    strangers = [born(1), Row(1, DAY, "I10"), Row(1, DAY, "E11")]
    with pytest.raises(InputError, match=r"No event is left .*write the codes as in the data that the model"):
        prepare(source_of(strangers), options(tmp_path / "strangers", like=tmp_path / "selected"))
    assert not (tmp_path / "strangers").exists()
    # A subject with nothing but a birth can be predicted from the age.
    prepare(source_of([born(1)]), options(tmp_path / "newborn", like=tmp_path / "selected"))
    assert len(read_prepared(tmp_path / "newborn").subject_ids("held_out")) == 1

"""Static facts: from codes of subjects to tokens before the events of each segment."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config.data import DataConfig, PrepareConfig, TableColumns
from behrt_jax.config.model import ModelConfig
from behrt_jax.data.batches import RowShape, task_batches, training_batches, validation_batches
from behrt_jax.data.events import BIRTH_CODE, DAY, DEATH_CODE
from behrt_jax.data.examples import find_examples
from behrt_jax.data.facts import CodedFacts, FactTable, StaticFacts, fact_rows
from behrt_jax.data.prepared import read_fact_rows, read_manifest, read_prepared
from behrt_jax.data.questions import Catalogue, question_batches
from behrt_jax.data.sequences import build_sequences, set_fingerprint, told_facts
from behrt_jax.data.vocabulary import CLS, SPECIAL_TOKENS, UNK
from behrt_jax.errors import InputError
from behrt_jax.records.load import load_sequences
from behrt_jax.records.prepare.pipeline import prepare
from behrt_jax.workflows.labelled_data import in_vocabulary
from behrt_jax.workflows.prepare import open_source
from tests.data.histories import Event, labels_at, sequence_set
from tests.data.test_batches import FIRST_CODE, assert_equal, epoch, histories, history_lengths, segments
from tests.data.test_questions import CONFIG as QUERIES
from tests.data.test_questions import random_set
from tests.records.meds_folder import Row, born, event_set
from tests.records.prepare.test_pipeline import ALWAYS, SPLIT_IDS, source_of, without_digests

FIRST_FACT = 10**6


def with_facts(sequences, seed=0, most=3):
    """0 to 3 facts of each subject, whose codes tell whose they are."""
    counts = np.random.default_rng(seed).integers(0, most + 1, len(sequences))
    codes = [FIRST_FACT + 10 * subject + i for subject, count in enumerate(counts) for i in range(count)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return replace(sequences, facts=StaticFacts(offsets, np.array(codes, np.int32)))


def facts_of(sequences, subject):
    assert sequences.facts is not None
    return sequences.facts.codes[slice(*sequences.facts.offsets[subject : subject + 2])].tolist()


@given(
    history_lengths,
    st.integers(6, 20),
    st.sampled_from(["all", "random", "recent", "first"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
)
def test_every_segment_has_the_facts_of_its_subject_before_its_events(
    lengths, row_length, window, packed, cls_token, seed
):
    sequences = with_facts(histories(lengths), seed)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    shape = RowShape(row_length, packed=packed, cls_token=cls_token)
    batches = training_batches(sequences, shape, batch_size=5, window=window, seed=seed)
    shown, windows = Counter(), Counter()
    found = epoch(batches, 1)
    for batch in found:
        for codes, ages, visits, days, positions in segments(batch):
            assert positions.tolist() == list(range(len(codes)))
            tokens = codes[visits >= 0][cls_token:] - FIRST_CODE
            subject = owner[tokens[0]]
            facts = facts_of(sequences, subject)
            before = cls_token + len(facts)
            assert codes.tolist() == [CLS] * cls_token + facts + (tokens + FIRST_CODE).tolist()
            assert (np.diff(tokens) == 1).all()
            assert visits.tolist() == (
                sequences.visits[tokens[:1]].tolist() * cls_token
                + [-1] * len(facts)
                + sequences.visits[tokens].tolist()
            )
            assert (ages[: before + 1] == sequences.ages[tokens[0]]).all()
            assert (days[: before + 1] == sequences.times[tokens[0]] // DAY).all()
            shown.update(tokens.tolist())
            windows[subject] += 1
    room = [row_length - cls_token - len(facts_of(sequences, i)) for i in range(len(lengths))]
    if window == "all":
        assert shown == Counter(range(sum(lengths)))
        assert windows == {i: -(-length // room[i]) for i, length in enumerate(lengths)}
    else:
        assert set(windows.values()) == {1} and sum(shown.values()) == sum(map(min, lengths, room))
    assert sum(np.count_nonzero(batch.segment_ids) for batch in found) == batches.tokens_per_epoch


@given(history_lengths, st.booleans(), st.booleans())
def test_nobody_with_a_fact_gives_the_batches_of_no_facts(lengths, packed, cls_token):
    none = histories(lengths)
    empty = with_facts(none, most=0)
    shape = RowShape(12, packed=packed, cls_token=cls_token)
    for make in (
        lambda part: training_batches(part, shape, batch_size=5).batch(1),
        lambda part: validation_batches(part, shape, rows_per_batch=2)[0],
    ):
        assert_equal(make(none), make(empty))


def test_facts_that_leave_no_room_for_an_event():
    sequences = with_facts(histories([4, 9, 2, 3]), most=3)
    assert max(len(facts_of(sequences, i)) for i in range(4)) == 3
    training_batches(sequences, RowShape(5, cls_token=True), batch_size=2)
    with pytest.raises(
        InputError, match="a sequence 3 codes, but a subject has 3 static facts: give it more"
    ):
        training_batches(sequences, RowShape(4, cls_token=True), batch_size=2)


# Examples of labels.

EVENTS = {
    1: [Event(day * DAY, code, day) for day, code in enumerate(["A//1", "B//1", "A//2", "B//2", "A//1"], 1)],
    2: [Event(3 * DAY, "A//1", 1)],
    4: [],  # a birth alone
}


def facts_data():
    data = sequence_set({"train": EVENTS})
    coded = {
        "train": CodedFacts.of(np.array([1, 1, 3, 4]), pa.array(["RACE//x", "SEX//F", "SEX//M", "SEX//F"])),
        "tuning": CodedFacts(np.empty(0, np.int64), np.empty(0, np.int32), ()),
    }
    coded["held_out"] = coded["tuning"]
    return replace(data, static=FactTable(lambda: coded, lambda: ("SEX//F",))).with_facts()


@pytest.mark.parametrize("delays", [(), ("B//=1",)])
@pytest.mark.parametrize("sep_token", [False, True])
def test_examples_have_the_facts_of_their_subject_and_room_is_left_for_them(delays, sep_token):
    data = facts_data()
    pairs = [(1, 5 * DAY), (2, 9 * DAY), (4, 7 * DAY), (1, 0), (1, 2 * DAY)]
    found = find_examples(data, "train", labels_at(pairs), max_tokens=5, delays=delays, sep_token=sep_token)
    batches = task_batches(found, np.ones((5, 1), np.float32), RowShape(5), batch_size=5, seed=None)
    female = data.vocabulary.codes.index("SEX//F")
    plain = find_examples(
        sequence_set({"train": EVENTS}),
        "train",
        labels_at(pairs),
        max_tokens=5,
        delays=delays,
        sep_token=sep_token,
    )
    seen = {}
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        for row, slot in np.argwhere(batch.examples >= 0):
            cells = batch.rows.segment_ids[row] == slot + 1
            seen[int(batch.examples[row, slot])] = batch.rows.codes[row][cells].tolist()
            facts = batch.rows.visits[row][cells] == -1
            assert facts.tolist() == sorted(facts, reverse=True)
    # RACE//x has no row, so it is [UNK].
    own = {0: [UNK, female], 1: [], 2: [female], 3: [UNK, female], 4: [UNK, female]}
    for example, codes in seen.items():
        start, length = plain.windows.starts[example], plain.windows.lengths[example]
        events = plain.sequences.codes[start : start + length].tolist()
        assert codes == own[example] + events[-(5 - len(own[example])) :]
    assert len(seen) == 5
    assert found.empty.tolist() == [False, False, True, True, False]


def test_questions_are_asked_of_histories_with_their_facts():
    data = random_set(seed=3, subjects=12)
    parts = {name: with_facts(part, seed=5) for name, part in data.splits.items()}
    counts = data.event_counts
    data = replace(data, splits=parts)
    catalogue = Catalogue.of(replace(data.vocabulary, counts=counts), QUERIES)
    shape = RowShape(12, cls_token=True)
    batches = question_batches(data, "train", catalogue, QUERIES, shape, batch_size=4)
    times, shown = batches.examples, 0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        for row, slot in np.argwhere(batch.examples >= 0):
            cells = batch.rows.segment_ids[row] == slot + 1
            codes = batch.rows.codes[row][cells].tolist()
            example = batch.examples[row, slot]
            facts = facts_of(parts["train"], times.subjects[example])
            assert codes[: 1 + len(facts)] == [CLS, *facts]
            events = codes[1 + len(facts) :]
            end = times.up_to[example]
            assert events == parts["train"].codes[end - len(events) : end].tolist()
            begin = parts["train"].offsets[times.subjects[example]]
            assert len(events) == min(end - begin, 12 - 1 - len(facts))
            shown += len(codes)
    assert 0 < shown <= batches.steps_per_epoch * batches.batch_rows * 12


def test_codes_of_data_are_read_as_those_of_a_model():
    data = facts_data()
    names = ("SEX//F", "B//1", "A//1")
    model = replace(data.vocabulary, codes=(*SPECIAL_TOKENS, *names), counts=np.zeros(8, np.int64))
    found, _ = in_vocabulary(data, model, ModelConfig(fact_tokens=True))
    facts = found.splits["train"].facts
    assert facts is not None and facts.codes.tolist() == [UNK, 5]
    assert found.facts_without_events["train"].codes.tolist() == [5]
    with pytest.raises(InputError, match="do not tell of static facts"):
        in_vocabulary(sequence_set({"train": EVENTS}), model, ModelConfig(fact_tokens=True))


# Rows of the vocabulary, fitted on the train split.

ROWS = [
    *ALWAYS,
    *(Row(1, None, code) for code in ("GENDER//F", "GENDER//M", "RACE//x")),
    Row(3, DAY, "GENDER//M"),
    Row(3, None, "DX//a"),
    born(9, 0),
    *(Row(9, None, code) for code in ("GENDER//F", "RACE//z")),
    *(Row(7, None, code) for code in ("GENDER//F", "RACE//y")),
]
IDS = SPLIT_IDS | {"train": [*SPLIT_IDS["train"], 9]}


def prepared(folder, **options):
    config = PrepareConfig(output=folder / "out", codes=("DX//",), min_count=1, **options)
    return prepare(source_of(ROWS, IDS), config), read_prepared(folder / "out")


def codes_of(data, split="train"):
    """Subject -> codes of its facts."""
    part, names = data.splits[split], data.vocabulary.codes
    return {
        int(subject): [names[code] for code in facts_of(part, place)]
        for place, subject in enumerate(part.subject_ids)
    }


def test_facts_of_prepared_data(tmp_path):
    manifest, plain = prepared(tmp_path)
    assert manifest["fact_rows"] == {"GENDER//F": 1, "GENDER//M": 1, "RACE//x": 1}
    counts = manifest["subject_facts"]["train"]
    assert (counts["facts"], counts["subjects"], counts["several"], counts["unknown"]) == (5, 2, 1, 1)
    assert manifest["events"]["dropped"]["fact with a time"] == 1
    assert manifest["top_facts"][0] == {"code": "GENDER//F", "subjects": 2}
    data = plain.with_facts()
    size = len(plain.vocabulary)
    assert data.vocabulary.codes == (*plain.vocabulary.codes, *manifest["fact_rows"])
    assert data.vocabulary.counts[size:].tolist() == [1, 1, 1]
    assert data.event_counts.tolist() == [*plain.vocabulary.counts, 0, 0, 0]
    found = codes_of(data)
    assert found.pop(1) == ["GENDER//F", "GENDER//M", "RACE//x"] and not any(found.values())
    alone = data.births["train"].subject_ids.tolist()
    assert alone == [9] and data.facts_without_events["train"].codes.tolist() == [size, UNK]
    for name, part in plain.splits.items():
        for column in ("codes", "ages", "visits", "times", "offsets"):
            np.testing.assert_array_equal(getattr(part, column), getattr(data.splits[name], column))
    assert plain.fingerprint == set_fingerprint(plain.vocabulary, data.splits) != data.fingerprint
    assert data.with_facts() is data
    assert told_facts(plain, ["train"]) == []
    (line,) = told_facts(data, ["train", "tuning"])
    assert line.startswith("Static facts: 1 of 2 subjects have any; 0 of 3 facts have no row")


def test_a_code_with_a_time_that_is_selected_is_an_event(tmp_path):
    """It is left out by no rule, so that none of those may count it."""
    config = PrepareConfig(output=tmp_path / "out", codes=("DX//", "GENDER//"), min_count=1)
    dropped = prepare(source_of(ROWS, IDS), config)["events"]["dropped"]
    assert "fact with a time" not in dropped
    assert dropped["code not selected"] == sum(str(row.code).startswith("RACE//") for row in ROWS)


def test_birth_and_death_are_no_facts(tmp_path):
    """A fact is read before the first event: of a death, that would be the outcome."""
    dead = [Row(1, time, DEATH_CODE) for time in (None, 0)]
    options: dict[str, Any] = {"codes": ("DX//",), "static_codes": (".*",), "min_count": 1}
    manifest = prepare(source_of([*ROWS, *dead], IDS), PrepareConfig(output=tmp_path / "out", **options))
    codes = {row["code"] for row in manifest["top_facts"]} | {*manifest["fact_rows"]}
    assert {"GENDER//F", "RACE//x"} < codes and not {BIRTH_CODE, DEATH_CODE} & codes


def test_a_folder_of_before_fits_its_rows_when_read(tmp_path):
    manifest, data = prepared(tmp_path)
    whole = data.with_facts()
    without_digests(tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    older = json.loads(file.read_text())
    del older["fact_rows"], older["top_facts"]
    file.write_text(json.dumps(older))
    assert "fact_rows" not in read_manifest(tmp_path / "out")
    assert read_fact_rows(tmp_path / "out") == tuple(manifest["fact_rows"])
    again = read_prepared(tmp_path / "out").with_facts()
    assert (again.vocabulary.codes, again.fingerprint) == (whole.vocabulary.codes, whole.fingerprint)


def test_others_prepared_alike_read_facts_by_the_same_rows(tmp_path):
    prepared(tmp_path)
    rows = [born(5, 0), Row(5, DAY, "DX//a"), *(Row(5, None, code) for code in ("GENDER//F", "RACE//new"))]
    config = PrepareConfig(like=tmp_path / "out", output=tmp_path / "other")
    manifest = prepare(source_of(rows, {}), config)
    assert manifest["fact_rows"] == {"GENDER//F": 0, "GENDER//M": 0, "RACE//x": 0}
    assert manifest["subject_facts"]["held_out"]["unknown"] == 1
    found = read_prepared(tmp_path / "other").with_facts()
    assert codes_of(found, "held_out") == {5: ["GENDER//F", "[UNK]"]}
    whole = read_prepared(tmp_path / "out").with_facts()
    assert found.vocabulary.codes == whole.vocabulary.codes


def test_events_in_memory_have_the_facts_of_prepared_ones(tmp_path):
    _, data = prepared(tmp_path)
    built = build_sequences(event_set(ROWS, IDS), DataConfig(codes=("DX//",), min_count=1), False)
    assert built.counts.dropped["fact with a time"] == 1
    ours, theirs = built.with_facts(), data.with_facts()
    assert ours.vocabulary.codes == theirs.vocabulary.codes
    assert ours.vocabulary.counts.tolist() == theirs.vocabulary.counts.tolist()
    assert [codes_of(ours, name) for name in ours.splits] == [codes_of(theirs, name) for name in ours.splits]


def test_generated_subjects_have_a_sex():
    config = DataConfig(subjects=60, vocabulary_size=200)
    plain, data = (load_sequences(config, True, facts) for facts in (False, True))
    assert plain.splits["train"].facts is None and plain.fingerprint != data.fingerprint
    assert data.vocabulary.codes[:200] == plain.vocabulary.codes
    assert sorted(data.vocabulary.codes[200:]) == ["SEX//F", "SEX//M"]
    assert all(len(codes) == 1 for name in data.splits for codes in codes_of(data, name).values())
    some = load_sequences(replace(config, train_fraction=0.5), True, True)
    everyone = codes_of(data)
    assert codes_of(some) == {subject: everyone[subject] for subject in codes_of(some)}
    assert some.vocabulary.counts[200:].sum() == len(some.splits["train"]) < len(everyone)
    with pytest.raises(InputError, match="fact_tokens is on, but no subject of the train split"):
        load_sequences(replace(config, source="uniform"), True, True)


def test_rows_are_of_frequent_facts_the_most_frequent_first():
    assert fact_rows({"a": 4, "b": 5, "c": 6, "d": 5}, 5) == ("c", "b", "d")


# Facts of published data sets, from each kind of source; their READMEs tell how many subjects they have.

REAL = os.environ.get("EHR_TEST_DATA")
PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, int]]] = {
    "mimic-iv-demo-meds": ({"source": "meds"}, 100, {"GENDER//M": 57, "GENDER//F": 43}),
    "mimic-iv-demo-omop": (
        {"source": "omop"},
        200,
        {"GENDER//8507": 57, "GENDER//8532": 43, "RACE//8527": 64, "ETHNICITY//38003563": 5},
    ),
    "synthea-csv-1462": ({"source": "synthea"}, 3 * 1462, {"GENDER//F": 721, "GENDER//M": 741}),
    "synthea-csv-nebraska-111": ({"source": "synthea"}, 3 * 111, {"GENDER//F": 69, "GENDER//M": 42}),
    "synthea27nj-omop": ({"source": "omop"}, 3 * 28, {"GENDER//8507": 15, "GENDER//8532": 13}),
    # One shard of 80 subjects as a plain table; 7 have several races, insurances or languages.
    "mimic-iv-demo-meds/data/train/0.parquet": (
        {
            "source": "table",
            "codes": ("DIAG",),
            "table": TableColumns(visit="hadm_id", static=("race", "insurance", "language")),
        },
        327,
        {"LANGUAGE//ENGLISH": 74, "RACE//WHITE": 51, "INSURANCE//Medicare": 34, "GENDER//M": 45},
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="EHR_TEST_DATA does not name a folder of real data sets")
@pytest.mark.parametrize("name", PUBLISHED)
def test_facts_of_published_data(name, tmp_path):
    options, facts, subjects = PUBLISHED[name]
    config = PrepareConfig(input=Path(REAL or "") / name, output=tmp_path / "out", min_count=2, **options)
    manifest = prepare(open_source(config), config)
    counts = manifest["subject_facts"]
    assert sum(split["facts"] for split in counts.values()) == facts
    assert sum(split["several"] for split in counts.values()) == 7 * (config.source == "table")
    found = {row["code"]: row["subjects"] for row in manifest["top_facts"]}
    assert found | subjects == found
    data = read_prepared(tmp_path / "out").with_facts()
    ids, train = data.vocabulary.encode(list(manifest["fact_rows"])), data.splits["train"]
    assert (ids >= len(data.vocabulary) - len(ids)).all()
    assert data.vocabulary.counts[ids].tolist() == [*manifest["fact_rows"].values()]
    window = 64
    batches = training_batches(train, RowShape(window), batch_size=8)
    assert train.facts is not None
    shown = sum(int((batches.batch(step).visits == -1).sum()) for step in range(batches.steps_per_epoch))
    counted = np.diff(train.facts.offsets)
    assert shown == sum(counted * -(-train.lengths // (window - counted)))

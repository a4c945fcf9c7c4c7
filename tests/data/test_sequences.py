import itertools
import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from behrt_jax.config.data import DataConfig
from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, SPLITS
from behrt_jax.data.sequences import Sequences, SequenceSet, build_sequences, describe, map_vocabulary
from behrt_jax.data.vocabulary import SEP, SPECIAL_TOKENS, UNK, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.records.load import load_sequences
from tests.records.meds_folder import DAY, HOUR, Row, born, by_remainder, event_set, history_rows

SPLIT_OF = {1: "train", 2: "train", 3: "tuning", 4: "held_out", 5: "train"}  # 6 and more: none
TWO = {"train": [1], "tuning": [2]}
ALWAYS = [born(1), born(3)]  # with these the train and tuning splits are hardly ever empty
ALWAYS += [Row(subject, day * DAY, "DX//common") for subject in (1, 3) for day in (0, 2, 200)]

row_lists = st.lists(
    st.builds(
        Row,
        subject=st.integers(1, 7),
        time=st.none() | st.integers(-4 * 4, 300 * 4).map(lambda quarter: quarter * 6 * HOUR),
        code=st.sampled_from(["DX//a", "DX//b", "DX//c", "LAB//d", BIRTH_CODE, BIRTH_CODE, DEATH_CODE]),
        visit=st.none() | st.integers(0, 2),
    ),
    max_size=40,
)


def death_of(own, birth, data):
    """The first death, or the last one where there was care in between: more than 60 days after the first."""
    deaths = [row.time for row in own if row.code == DEATH_CODE and row.time is not None]
    deaths = [time for time in deaths if birth is None or time // DAY >= birth // DAY]
    if not deaths or birth is None:
        return min(deaths, default=None)
    first, last = min(deaths), max(deaths)
    care = [
        row.time
        for row in own
        if row.code.startswith(data.codes) and row.time is not None and row.time >= birth
    ]
    alive = any(time > first + 60 * DAY and time // DAY <= last // DAY for time in care)
    return last if alive and first // DAY != last // DAY else first


def reference(rows, data, sep_token):
    """The same by plain loops: subject -> tokens (code, age, visit, time), and events by rule."""
    dropped, tokens = Counter(), {}
    for subject in {row.subject for row in rows}:
        own = [row for row in rows if row.subject == subject]
        birth = min(
            (row.time for row in own if row.code == BIRTH_CODE and row.time is not None), default=None
        )
        death = death_of(own, birth, data)
        events = []
        for row in own:
            if row.code in (BIRTH_CODE, DEATH_CODE):
                dropped["birth or death marker"] += 1
            elif not any(row.code.startswith(prefix) for prefix in data.codes):
                dropped["code not selected"] += 1
            elif row.time is None:
                dropped["null time (static)"] += 1
            elif birth is None:
                dropped["no birth"] += 1
            elif row.time < birth:
                dropped["before birth"] += 1
            elif death is not None and row.time // DAY > death // DAY:
                dropped["after death"] += 1
            else:
                visit = (0, row.time // DAY) if row.visit is None else (1, row.visit)
                events.append((row.time, visit, row.code))
        seen, visits, kept = set(), [], []
        for time, visit, code in sorted(events):
            if visit not in visits:
                visits.append(visit)
            if data.duplicates == "drop" and (visit, code) in seen:
                dropped["duplicate in visit"] += 1
                continue
            seen.add((visit, code))
            kept.append((code, (time - birth) / (365.25 * DAY), visits.index(visit), time))
        if subject not in SPLIT_OF:
            dropped["subject in no split"] += len(kept)
        elif kept:
            tokens[subject] = kept
    train = Counter(
        token[0] for subject, kept in tokens.items() if SPLIT_OF[subject] == "train" for token in kept
    )
    common = {code for code, count in train.items() if count >= data.min_count}
    for subject, kept in tokens.items():
        tokens[subject] = []
        for visit, run in itertools.groupby(kept, key=lambda token: token[2]):
            run = [(code if code in common else "[UNK]", *rest) for code, *rest in run]
            tokens[subject] += [*run, ("[SEP]", run[-1][1], visit, run[-1][3])] if sep_token else run
    return tokens, +dropped


def as_tokens(sequence_set: SequenceSet):
    tokens = {}
    for name, part in sequence_set.splits.items():
        for place, subject in enumerate(part.subject_ids.tolist()):
            assert SPLIT_OF.get(subject, name) == name
            own = slice(part.offsets[place], part.offsets[place + 1])
            codes = [sequence_set.vocabulary.codes[code] for code in part.codes[own]]
            rest = (part.ages[own].tolist(), part.visits[own].tolist(), part.times[own].tolist())
            tokens[subject] = list(zip(codes, *rest, strict=True))
    return tokens


def split_of_rows():
    return {name: [subject for subject, split in SPLIT_OF.items() if split == name] for name in SPLITS}


@settings(max_examples=100)
@given(
    rows=row_lists,
    sep_token=st.booleans(),
    duplicates=st.sampled_from(["keep", "drop"]),
    min_count=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_sequences_equal_those_of_plain_loops(rows, sep_token, duplicates, min_count, seed):
    rows = random.Random(seed).sample(rows + ALWAYS, len(rows) + len(ALWAYS))
    data = DataConfig(codes=("DX//",), duplicates=duplicates, min_count=min_count)
    tokens, dropped = reference(rows, data, sep_token)
    names = [token[0] for subject in (1, 2, 5) for token in tokens.get(subject, [])]
    assume(3 in tokens and set(names) - {"[UNK]", "[SEP]"})
    source = event_set(rows, split_of_rows())
    built = build_sequences(source, data, sep_token)
    ours = as_tokens(built)
    assert ours.keys() == tokens.keys()
    for subject, expected in tokens.items():
        for ours_token, token in zip(ours[subject], expected, strict=True):
            assert ours_token == (token[0], float(np.float32(token[1])), *token[2:])
    assert built.counts.dropped == dropped
    kept = sum(int((part.codes != SEP).sum()) for part in built.splits.values())
    assert built.counts.kept == kept
    assert built.counts.read == len(rows)
    unknown = sum(int((part.codes == UNK).sum()) for part in built.splits.values())
    assert built.counts.changed.get("rare or unseen code -> [UNK]", 0) == unknown
    assert source.counts.dropped == {}
    listed = {name: sum(split == name for split in SPLIT_OF.values()) for name in SPLITS}
    assert built.subjects_without_events == {name: listed[name] - len(built.splits[name]) for name in SPLITS}


@given(st.integers(0, 1000))
def test_row_order_does_not_matter(seed):
    rows = history_rows(subjects=10, days=3)
    shuffled = random.Random(seed).sample(rows, len(rows))
    data = DataConfig(min_count=2)
    one, two = (build_sequences(event_set(some, by_remainder(rows)), data, True) for some in (rows, shuffled))
    assert one.fingerprint == two.fingerprint
    assert one.counts == two.counts
    assert describe(one) == describe(two)


def test_birth_day_has_age_0_and_visit_0():
    rows = [born(1, 5 * DAY), Row(1, 5 * DAY, "A"), Row(1, 5 * DAY + 365 * DAY + 6 * HOUR, "A")]
    rows += [born(2, 0), Row(2, 3 * DAY, "A")]
    train = build_sequences(event_set(rows, TWO), DataConfig(min_count=1), False).splits["train"]
    assert train.ages.tolist() == [0.0, 1.0]
    assert train.visits.tolist() == [0, 1]
    assert train.codes.tolist() == [5, 5]
    assert train.lengths.tolist() == [2]
    kinds = {name: str(array.dtype) for name, array in vars(train).items() if name != "facts"}
    assert kinds == {
        "subject_ids": "int64",
        "offsets": "int64",
        "codes": "int32",
        "ages": "float32",
        "visits": "int32",
        "times": "int64",
    }


def test_separators_end_each_run_of_a_visit():
    rows = [
        born(1),
        Row(1, DAY, "A", visit=9),
        Row(1, DAY + 1, "B", visit=9),
        Row(1, DAY + 2, "A"),
        Row(1, DAY + 3, "C", visit=9),
        born(2),
        Row(2, DAY, "A"),
    ]
    built = build_sequences(event_set(rows, TWO), DataConfig(min_count=1), True)
    train = built.splits["train"]
    names = [built.vocabulary.codes[code] for code in train.codes]
    assert names == ["A", "B", "[SEP]", "A", "[SEP]", "C", "[SEP]"]
    assert train.visits.tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert (train.times - DAY).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert train.ages[2] == train.ages[1]
    assert built.counts.kept == 5
    assert describe(built)["splits"]["train"] == {
        "subjects": 1,
        "events": 4,
        "tokens": 7,
        "visits": 2,
        "lengths": {"p50": 7.0, "p90": 7.0, "p99": 7.0, "max": 7},
    }


def test_the_vocabulary_knows_the_train_split_alone():
    rows = history_rows(20)
    rows += [Row(9, 1, "TUNING//only"), *(Row(9, 2, "DIAGNOSIS//0") for _ in range(50))]
    splits = by_remainder(rows)
    assert splits["tuning"] == [9, 19]
    data = DataConfig(min_count=1, duplicates="keep")
    built = build_sequences(event_set(rows, splits), data, False)
    train = set(splits["train"])
    alone = [row for row in rows if row.subject in train] + [born(9), Row(9, 1, "DIAGNOSIS//0")]
    fitted = build_sequences(event_set(alone, splits), data, False)
    assert built.vocabulary.codes == fitted.vocabulary.codes
    assert np.array_equal(built.vocabulary.counts, fitted.vocabulary.counts)
    assert UNK in built.splits["tuning"].codes
    assert UNK not in built.splits["train"].codes


def test_min_count_by_default():
    rows = [born(1), born(2), Row(2, DAY, "often")]
    rows += [Row(1, day * DAY, "often") for day in range(5)] + [Row(1, day * DAY, "rare") for day in range(4)]
    found = build_sequences(event_set(rows, TWO), DataConfig(), False)
    assert found.vocabulary.codes == (*SPECIAL_TOKENS, "often")
    assert found.vocabulary.counts[UNK] == 4
    declared = build_sequences(event_set(rows, TWO, declared_codes=("never",)), DataConfig(), False)
    assert declared.vocabulary.codes == (*SPECIAL_TOKENS, "often", "rare", "never")


def test_vocabulary_size_caps_the_rows():
    rows = history_rows(20)
    built = build_sequences(event_set(rows, by_remainder(rows)), DataConfig(vocabulary_size=8), False)
    assert len(built.vocabulary) == 8
    assert built.counts.changed["rare or unseen code -> [UNK]"] > 0


def test_meds_has_code_patterns_by_default():
    rows = [born(1), born(2), Row(2, DAY, "DIAGNOSIS//a"), Row(1, DAY, "LAB//x")]
    rows += [Row(1, DAY, f"{kind}//a") for kind in ("DIAGNOSIS", "PROCEDURE", "MEDICATION")]
    meds = DataConfig(source="meds", min_count=1)
    assert build_sequences(event_set(rows, TWO), meds, False).counts.dropped["code not selected"] == 1
    labs = replace(meds, codes=("LAB//", "DIAGNOSIS//"))
    assert build_sequences(event_set(rows, TWO), labs, False).counts.dropped["code not selected"] == 2


def test_subjects_are_split_by_hash_where_there_are_no_splits():
    rows = history_rows(60)
    built = build_sequences(event_set(rows), DataConfig(tuning_fraction=0.3), False)
    sizes = {name: len(part) for name, part in built.splits.items()}
    assert sum(sizes.values()) == 60
    assert min(sizes.values()) > 0
    # The split does not move when filters change.
    fewer = build_sequences(
        event_set(rows), DataConfig(tuning_fraction=0.3, codes=("DIAGNOSIS//[0-3]",)), False
    )
    for name in SPLITS:
        assert np.isin(fewer.splits[name].subject_ids, built.splits[name].subject_ids).all()
    other = build_sequences(event_set(rows), DataConfig(tuning_fraction=0.3, seed=1), False)
    assert other.fingerprint != built.fingerprint


def test_a_split_by_hash_and_patterns_without_effect_are_noted():
    rows = history_rows(subjects=40)
    data = DataConfig(
        source="meds", codes=("DIAGNOSIS//", "DX//"), exclude_codes=("LAB//",), min_count=1, seed=3
    )
    assert list(build_sequences(event_set(rows), data, False).notes) == [
        "The source has no splits of its own: its subjects were dealt out by a hash of their ids (about 10% "
        "tuning, 10% held_out, seed 3).",
        "Warning: --data.codes DX// matches no code of the data, so it has no effect.",
        "Warning: --data.exclude_codes LAB// matches no code of the data, so it has no effect.",
    ]
    data = replace(data, codes=(), exclude_codes=())
    assert not build_sequences(event_set(rows, by_remainder(rows)), data, False).notes


def test_held_out_may_be_empty():
    rows = [born(1), born(2), Row(1, DAY, "A"), Row(2, DAY, "A")]
    built = build_sequences(event_set(rows, TWO), DataConfig(min_count=1), True)
    held_out = built.splits["held_out"]
    assert len(held_out) == 0
    assert held_out.offsets.tolist() == [0]
    assert describe(built)["splits"]["held_out"]["lengths"] == {}


@pytest.mark.parametrize("empty", ["train", "tuning"])
def test_an_empty_split_is_an_error(empty):
    other = {"train": "tuning", "tuning": "train"}[empty]
    rows = [born(1), born(2), Row(1, DAY, "A"), Row(2, None, "A")]
    with pytest.raises(InputError, match=f"No event is left in the {empty} split: .*data.codes"):
        build_sequences(event_set(rows, {other: [1], empty: [2]}), DataConfig(min_count=1), False)


def test_splits_that_share_subjects_are_refused():
    rows = [born(1), Row(1, DAY, "A")]
    with pytest.raises(InputError, match="test source puts 1 subjects into more than one split"):
        build_sequences(event_set(rows, {"train": [1], "tuning": [1]}), DataConfig(), False)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [row._replace(time=row.time + 1) if row.code == "B" else row for row in rows],
        lambda rows: [row._replace(code="C") if row.code == "B" else row for row in rows],
        lambda rows: [row._replace(time=-DAY) if row.code == BIRTH_CODE else row for row in rows],
        lambda rows: [row._replace(subject=11) if row.subject == 1 else row for row in rows],
        lambda rows: [*rows, Row(2, 9 * DAY, "A")],
    ],
)
def test_the_fingerprint_sees_any_change(change):
    rows = [born(1), born(2), Row(1, DAY, "A"), Row(1, 2 * DAY, "B"), Row(2, DAY, "A")]
    splits = {"train": [1, 11], "tuning": [2]}
    prints = [
        build_sequences(event_set(some, splits), DataConfig(min_count=1), False).fingerprint
        for some in (rows, change(rows))
    ]
    assert len(prints[0]) == 64
    assert prints[0] != prints[1]


def test_describe_is_json_and_adds_up():
    rows = [*history_rows(20), Row(99, DAY, "DIAGNOSIS//0"), Row(1, None, "GENDER//F")]
    built = build_sequences(event_set(rows, by_remainder(rows[:-2])), DataConfig(), False)
    summary = json.loads(json.dumps(describe(built), allow_nan=False))
    kept = sum(split["events"] for split in summary["splits"].values())
    assert summary["events_kept"] == kept
    assert summary["events_read"] == kept + sum(summary["events_dropped"].values()) == len(rows)
    assert summary["events_dropped"]["no birth"] == 1
    visits = Counter()
    for name, part in built.splits.items():
        for start, end in itertools.pairwise(part.offsets):
            visits[name] += len(set(part.visits[start:end].tolist()))
    assert {name: split["visits"] for name, split in summary["splits"].items()} == dict(visits)
    assert 0 <= summary["ages"]["min"] < summary["ages"]["max"] < 70
    assert summary["vocabulary_rows"] == 13


# Data prepared with one vocabulary, read by another.


def vocabulary(codes, counts=None):
    counts = range(1, len(codes) + 1) if counts is None else counts
    return Vocabulary(
        (*SPECIAL_TOKENS, *codes),
        np.array([0] * len(SPECIAL_TOKENS) + list(counts), np.int64),
        (None,) * len(SPECIAL_TOKENS) + tuple(f"text of {code}" for code in codes),
    )


def sequences(codes):
    codes = np.asarray(codes, np.int32)
    tokens = len(codes)
    return Sequences(
        np.array([7]), np.array([0, tokens]), codes, np.zeros(tokens, np.float32),
        np.zeros(tokens, np.int32), np.arange(tokens),
    )  # fmt: skip


names = st.lists(st.text("abcd", min_size=1, max_size=2), unique=True, max_size=8)


@given(of_data=names, of_base=names, extend=st.booleans(), data=st.data())
def test_every_code_keeps_its_name_or_becomes_unknown(of_data, of_base, extend, data):
    counts = data.draw(st.lists(st.integers(0, 9), min_size=len(of_data), max_size=len(of_data)))
    ours, theirs = vocabulary(of_data, counts), vocabulary(of_base)
    found = map_vocabulary(ours, theirs, extend)
    codes = np.arange(len(ours), dtype=np.int32)
    given_sequences = sequences(codes)
    after = found.apply(given_sequences)
    seen = {code for code, count in zip(of_data, counts, strict=True) if count}
    for before, now in zip(ours.codes, after.codes, strict=True):
        name = found.vocabulary.codes[now]
        known = before in theirs.codes or (extend and before in seen)
        assert name == (before if known else "[UNK]")
    assert after.codes.dtype == np.int32
    assert after.times is given_sequences.times
    np.testing.assert_array_equal(given_sequences.codes, codes)
    # The base's own ids stay; new ones come after, each with its count and text.
    assert found.vocabulary.codes[: len(theirs)] == theirs.codes
    unknown = set(of_data) - set(of_base)
    assert set(found.new_codes) == (unknown & seen if extend else unknown)
    assert found.new_events == sum(
        count for code, count in zip(of_data, counts, strict=True) if code in unknown
    )
    if extend:
        assert found.vocabulary.codes[len(theirs) :] == found.new_codes
        for row in range(len(theirs), len(found.vocabulary)):
            code = found.vocabulary.codes[row]
            assert found.vocabulary.counts[row] == counts[of_data.index(code)]
            assert found.vocabulary.descriptions[row] == f"text of {code}"
    else:
        assert found.vocabulary is theirs


def test_new_codes_come_most_frequent_first():
    found = map_vocabulary(vocabulary(["A", "B", "C", "D"], [1, 5, 3, 0]), vocabulary(["B"]), extend=True)
    assert found.new_codes == ("C", "A")
    first = len(SPECIAL_TOKENS)
    assert found.ids[first:].tolist() == [first + 2, first, first + 1, UNK]
    assert found.new_events == 4


def test_equal_ids_are_not_copied():
    ours, theirs = vocabulary(["A", "B"]), vocabulary(["A", "B", "C"])
    for extend in (False, True):
        found = map_vocabulary(ours, theirs, extend)
        assert found.identical and found.vocabulary is theirs and found.new_codes == ()
        given_sequences = sequences([5, 6, 5])
        assert found.apply(given_sequences) is given_sequences
        assert found.apply_to({"train": given_sequences})["train"] is given_sequences
    other = map_vocabulary(vocabulary(["B", "A"]), theirs, extend=False)
    assert not other.identical
    assert other.apply(sequences([5, 6, 5])).codes.tolist() == [6, 5, 6]


def test_a_share_of_the_train_subjects_is_a_part_of_a_larger_one():
    config = DataConfig(subjects=300, vocabulary_size=60, source="uniform")
    whole = load_sequences(config, sep_token=True)
    sets = {share: load_sequences(replace(config, train_fraction=share), True) for share in (0.001, 0.1, 0.5)}
    sizes = {share: len(one.splits["train"]) for share, one in sets.items()}
    total = len(whole.splits["train"])
    assert sizes == {0.001: 1, 0.1: round(0.1 * total), 0.5: round(0.5 * total)}
    for smaller, larger in itertools.pairwise([*sets.values(), whole]):
        few, many = smaller.splits["train"], larger.splits["train"]
        assert set(few.subject_ids) < set(many.subject_ids)
        for subject, start, stop in zip(few.subject_ids, few.offsets[:-1], few.offsets[1:], strict=True):
            place = np.searchsorted(many.subject_ids, subject)
            theirs = many.codes[many.offsets[place] : many.offsets[place + 1]]
            np.testing.assert_array_equal(few.codes[start:stop], theirs)
    for one in sets.values():
        assert one.splits["tuning"] is not None and one.vocabulary.codes == whole.vocabulary.codes
        np.testing.assert_array_equal(one.splits["tuning"].codes, whole.splits["tuning"].codes)
        train = one.splits["train"].codes
        expected = Counter(train[train >= len(SPECIAL_TOKENS)].tolist())
        counts = one.vocabulary.counts[len(SPECIAL_TOKENS) :]
        assert counts.tolist() == [expected[code] for code in range(len(SPECIAL_TOKENS), 60)]
        assert one.vocabulary.counts[SEP] == 0
        told = describe(one)
        assert told["events_kept"] == sum(part["events"] for part in told["splits"].values())
    assert len({one.fingerprint for one in [*sets.values(), whole]}) == 4
    other = load_sequences(replace(config, train_fraction=0.5, seed=0), True)
    assert other.fingerprint == sets[0.5].fingerprint

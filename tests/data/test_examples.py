from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data import examples as hidden_tokens
from behrt_jax.data.batches import RowShape, task_batches
from behrt_jax.data.events import DAY, YEAR, SubjectTimes
from behrt_jax.data.examples import find_examples
from behrt_jax.data.sorting import ragged_indices
from behrt_jax.data.vocabulary import CLS, SEP, UNK
from behrt_jax.errors import InputError
from tests.data.histories import CODES, Event, known_at, labels_at, sequence_set

HOUR = DAY // 24
UNKNOWN = "[UNK]"
DELAYS = ("A//=1", "A//1=2.5", "B//=visit", "A//2=visit", "C//=3")


def seen(examples):
    """Codes, ages, visits and times of each example, as its window shows them."""
    tokens = ragged_indices(examples.windows.starts, examples.windows.lengths)
    cuts = np.cumsum(examples.windows.lengths)[:-1]
    columns = (getattr(examples.sequences, name)[tokens] for name in ("codes", "ages", "visits", "times"))
    return list(zip(*(np.split(column, cuts) for column in columns), strict=True)) if len(examples) else []


def test_the_prediction_time_itself_is_known():
    data = sequence_set({"train": {1: [Event(DAY, "A//1", 0), Event(2 * DAY, "A//2", 1)]}})
    codes = [
        [data.vocabulary.codes[code] for code in example[0]]
        for example in seen(
            find_examples(
                data, "train", labels_at([(1, 2 * DAY), (1, 2 * DAY - 1), (1, DAY - 1)]), max_tokens=9
            )
        )
    ]
    assert codes == [["A//1", "A//2"], ["A//1"], [UNKNOWN]]


def test_the_split_itself_is_indexed_where_nothing_is_hidden():
    data = sequence_set({"train": {1: [Event(DAY * day, "A//1", day) for day in range(1, 6)]}})
    examples = find_examples(
        data, "train", labels_at([(1, 4 * DAY)]), max_tokens=3, delays=["A//=0", "B//=9"]
    )
    assert examples.sequences is data.splits["train"]
    assert (examples.windows.starts.tolist(), examples.windows.lengths.tolist()) == ([1], [3])
    assert (examples.windows.starts.dtype, examples.windows.lengths.dtype) == (np.int64, np.int32)


def test_a_delay_hides_a_code_until_it_is_known():
    events = [Event(DAY, "A//1", 0), Event(2 * DAY, "B//1", 1), Event(4 * DAY, "B//2", 1)]
    data = sequence_set({"held_out": {7: events}})

    def codes(day, *delays):
        found = find_examples(data, "held_out", labels_at([(7, day * DAY)]), max_tokens=9, delays=delays)
        return [data.vocabulary.codes[code] for code in seen(found)[0][0]], seen(found)[0][2].tolist()

    assert codes(3) == (["A//1", "B//1"], [0, 1])
    assert codes(3, "B//=1") == (["A//1", "B//1"], [0, 1])  # known at that very time
    assert codes(3, "B//=1.5") == (["A//1"], [0])
    assert codes(3, "B//=visit") == (["A//1"], [0])
    assert codes(4, "B//=visit") == (["A//1", "B//1", "B//2"], [0, 1, 1])
    assert codes(3, "A//=2.5") == (["B//1"], [0])  # no visit number is skipped
    assert codes(3, "B//=0", "B//1=9", "B//=1") == (["A//1"], [0])  # the longest of several


def test_an_unknown_code_waits_as_long_as_any():
    data = sequence_set({"train": {1: [Event(DAY, "A//1", 0), Event(DAY, UNKNOWN, 0)]}})
    found = find_examples(data, "train", labels_at([(1, 2 * DAY)]), max_tokens=9, delays=["B//=5"])
    assert [code.tolist() for code, *_ in seen(found)] == [[data.vocabulary.codes.index("A//1")]]


def test_an_empty_history_is_one_unknown_code_with_the_age():
    birth = -20 * 365 * DAY + 5 * HOUR
    events = {1: [Event(10 * DAY, "A//1", 0)], 2: [Event(10 * DAY, "A//1", 0)]}
    data = sequence_set({"train": events}, births={1: birth, 2: birth})
    for sep in (False, True):
        found = find_examples(
            data, "train", labels_at([(1, 3 * DAY), (2, 11 * DAY)]), max_tokens=1, sep_token=sep
        )
        assert found.empty.tolist() == [True, False]
        codes, ages, visits, times = seen(found)[0]
        assert (codes.tolist(), visits.tolist(), times.tolist()) == ([UNK], [0], [3 * DAY])
        assert ages.tolist() == [np.float32((3 * DAY - birth) / YEAR)]
        np.testing.assert_array_equal(
            found.ages, np.float32([(3 * DAY - birth) / YEAR, (11 * DAY - birth) / YEAR])
        )


def test_order_other_splits_and_subjects_that_are_in_none():
    events = [Event(DAY, "A//1", 0)]
    data = sequence_set({"train": {5: events, 1: events}, "tuning": {3: events}})
    pairs = [(5, DAY), (9, DAY), (3, DAY), (1, 2 * DAY), (5, 3 * DAY), (9, 2 * DAY), (8, 0)]
    found = find_examples(data, "train", labels_at(pairs), max_tokens=9)
    assert found.rows.tolist() == [0, 3, 4]
    assert found.subject_ids.tolist() == [5, 1, 5]
    assert found.times.tolist() == [DAY, 2 * DAY, 3 * DAY]
    assert found.unknown_subjects == 3
    none = find_examples(data, "held_out", labels_at(pairs), max_tokens=9, delays=["A//=1"], sep_token=True)
    assert (len(none), none.unknown_subjects) == (0, 3)


def test_a_subject_without_events_is_one_whose_first_event_comes_later():
    births = {subject: -subject * 9000 * DAY + subject * HOUR for subject in range(1, 7)}
    events = {1: [Event(DAY, "A//1", 0)], 2: [Event(DAY, "B//1", 0), Event(9 * DAY, "A//2", 1)], 4: []}
    pairs = [(5, 3 * DAY), (1, 2 * DAY), (3, 4 * DAY), (2, 0), (5, 4 * DAY), (6, DAY), (4, 0)]
    later = {3: [Event(5 * DAY, "A//1", 0)], 4: [Event(1, "B//2", 0)], 5: [Event(6 * DAY, "B//1", 0)]}
    for delays in ((), ("B//=2",)):
        found, other = (
            find_examples(
                sequence_set({"train": events | more, "tuning": {6: []}}, births),
                "train", labels_at(pairs), max_tokens=9, delays=delays,
            )
            for more in ({3: [], 5: []}, later)
        )  # fmt: skip
        assert found.rows.tolist() == [0, 1, 2, 3, 4, 6]
        assert found.empty.tolist() == [True, False, True, True, True, True]
        assert (found.unknown_subjects, other.unknown_subjects) == (0, 0)
        for one, two in zip(seen(found), seen(other), strict=True):
            for column, same in zip(one, two, strict=True):
                np.testing.assert_array_equal(column, same)
        assert found.ages[0] == seen(found)[0][1][0] == np.float32((3 * DAY - births[5]) / YEAR)
        np.testing.assert_array_equal(found.ages, other.ages)


def test_one_clear_error():
    data = sequence_set(
        {"train": {1: [Event(DAY, "A//1", 0)], 2: [Event(DAY, "A//1", 0)]}}, {2: -90 * 365 * DAY}
    )
    early = labels_at([(1, -2 * DAY), (1, -DAY // 2), (2, -2 * DAY), (1, -3 * DAY)])
    with pytest.raises(InputError, match=r"2 of 4 labels of train have a prediction time before .* birth"):
        find_examples(data, "train", early, max_tokens=9)
    alone = sequence_set({"train": {7: []}, "tuning": {8: []}}, {8: DAY})
    with pytest.raises(InputError, match=r"1 of 2 labels of tuning have a prediction time before .* birth"):
        find_examples(alone, "tuning", labels_at([(8, -DAY), (8, 0), (7, -9 * DAY)]), max_tokens=9)
    late = labels_at([(1, DAY)])
    with pytest.raises(InputError, match=r"no split 'test': choose one of train, tuning, held_out"):
        find_examples(data, "test", late, max_tokens=9)
    with pytest.raises(InputError, match=r"data\.max_length"):
        find_examples(data, "train", late, max_tokens=0)
    with pytest.raises(InputError, match="write REGEX=DAYS"):
        find_examples(data, "train", late, max_tokens=9, delays=["A//"])


events = st.builds(
    Event,
    time=st.integers(0, 12).map(lambda quarters: quarters * DAY // 4),
    code=st.sampled_from([*CODES, UNKNOWN]),
    visit=st.integers(0, 3),
)
histories = st.dictionaries(st.integers(1, 6), st.lists(events, max_size=9), min_size=1)
birth_days = st.lists(st.integers(-36_000, 0), min_size=7, max_size=7)
pairs = st.lists(
    st.tuples(st.integers(1, 7), st.integers(0, 14).map(lambda quarters: quarters * DAY // 4)), max_size=12
)
delay_lists = st.lists(st.sampled_from(DELAYS), max_size=3)


def expected(subject, time, subjects, births, delays, max_tokens, sep):
    """One example, by slow loops: rows of code, age, visit, time."""
    history = sorted(subjects[subject])
    rows, number = [], {}
    for event in history:
        if known_at(event, history, delays) <= time:
            visit = number.setdefault(event.visit, len(number))
            rows.append((event.code, (event.time - births[subject]) / YEAR, visit, event.time))
    if not rows:
        return [(UNKNOWN, (time - births[subject]) / YEAR, 0, time)], True
    if sep:
        ends = [place + 1 == len(rows) or rows[place + 1][2] != row[2] for place, row in enumerate(rows)]
        pairs = zip(rows, ends, strict=True)
        rows = [one for row, end in pairs for one in ([row, ("[SEP]", *row[1:])] if end else [row])]
    return rows[-max_tokens:], False


@given(
    histories, birth_days, pairs, delay_lists, st.integers(1, 6), st.booleans(), st.sampled_from([1, 6, 99])
)
def test_examples_are_those_of_slow_loops(subjects, days, pairs, delays, max_tokens, sep, piece):
    births = {subject: day * DAY for subject, day in enumerate(days)}
    data = sequence_set({"train": subjects}, births)
    saved, hidden_tokens._PIECE_TOKENS = hidden_tokens._PIECE_TOKENS, piece
    try:
        found = find_examples(
            data, "train", labels_at(pairs), max_tokens=max_tokens, delays=delays, sep_token=sep
        )
    finally:
        hidden_tokens._PIECE_TOKENS = saved
    inside = [row for row, (subject, _) in enumerate(pairs) if subject in subjects]
    assert found.rows.tolist() == inside
    assert found.unknown_subjects == len(pairs) - len(inside)
    for place, (row, (codes, ages, visits, times)) in enumerate(zip(inside, seen(found), strict=True)):
        subject, time = pairs[row]
        rows, empty = expected(subject, time, subjects, births, delays, max_tokens, sep)
        assert [data.vocabulary.codes[code] for code in codes] == [row[0] for row in rows]
        np.testing.assert_array_equal(ages, np.array([row[1] for row in rows], np.float32))
        assert visits.tolist() == [row[2] for row in rows]
        assert times.tolist() == [row[3] for row in rows]
        assert found.empty[place] == empty
        np.testing.assert_allclose(found.ages[place], (time - births[subject]) / YEAR, atol=1e-5)
        assert (SEP in codes) == (sep and not empty)


@st.composite
def with_another_future(draw):
    """One label of each subject, and histories that differ only in what is not known at its time."""
    subjects, delays = draw(histories), draw(delay_lists)
    times = {subject: draw(st.integers(0, 12)) * DAY // 4 for subject in subjects}
    others = {}
    for subject, history in subjects.items():
        time = times[subject]
        # Whether a visit goes on is known.
        going_on = {event.visit for event in history if event.time > time}
        later = st.integers(1, 9).map(lambda quarters, time=time: time + quarters * DAY // 4)
        any_code = st.sampled_from([*CODES, UNKNOWN])
        kept = [event for event in history if known_at(event, history, delays) <= time]
        kept += [Event(draw(later), draw(any_code), visit) for visit in sorted(going_on)]
        visits = st.sampled_from([*sorted(going_on), 10, 11])
        kept += draw(st.lists(st.builds(Event, later, any_code, visits), max_size=4))
        for event in draw(
            st.lists(st.builds(Event, events.map(lambda e: e.time), any_code, st.integers(0, 9)))
        ):
            if event.time <= time < known_at(event, [event], [d for d in delays if "visit" not in d]):
                kept.append(event)
        others[subject] = kept
    return subjects, others, times, delays


@given(with_another_future(), birth_days, st.integers(1, 6), st.booleans())
def test_what_is_not_known_yet_changes_nothing(drawn, days, max_tokens, sep):
    *both, times, delays = drawn
    births = {subject: day * DAY for subject, day in enumerate(days)}
    labels = labels_at(list(times.items()))
    first, second = (
        find_examples(
            sequence_set({"train": subjects}, births),
            "train", labels, max_tokens=max_tokens, delays=delays, sep_token=sep,
        )
        for subjects in both
    )  # fmt: skip
    for one, other in zip(seen(first), seen(second), strict=True):
        for column, changed in zip(one, other, strict=True):
            np.testing.assert_array_equal(column, changed)
    np.testing.assert_array_equal(first.ages, second.ages)
    np.testing.assert_array_equal(first.empty, second.empty)


# Batches of labelled examples.


LENGTH = 12


def drawn(seed, subjects=30, max_tokens=LENGTH):
    """Examples of random histories, some with two prediction times, and targets that number them."""
    rng = np.random.default_rng(seed)
    histories = {
        subject: [
            Event((day + 1) * DAY, CODES[rng.integers(len(CODES))], day) for day in range(rng.integers(1, 15))
        ]
        for subject in range(subjects)
    }
    pairs = [(int(rng.integers(subjects)), int(rng.integers(16)) * DAY) for _ in range(40)]
    data = sequence_set({"train": histories})
    examples = find_examples(data, "train", labels_at(pairs), max_tokens=max_tokens)
    numbers = np.arange(len(examples))
    return examples, np.stack([numbers + 1, -numbers], axis=1).astype(np.float32)


def shown(batches, steps):
    """Of each example in some batches, in order: its number, targets, codes and ages without [CLS]."""
    for step in steps:
        batch = batches.batch(step)
        assert batch.examples.shape == batch.weights.shape == batch.targets.shape[:2]
        np.testing.assert_array_equal(batch.weights, batch.examples >= 0)
        assert (batch.targets[batch.examples < 0] == 0).all()
        # A segment of the rows for each example, and no other.
        np.testing.assert_array_equal(batch.segment_ids.max(axis=1), (batch.examples >= 0).sum(axis=1))
        for row, segment in np.argwhere(batch.examples >= 0):
            cells = batch.segment_ids[row] == segment + 1
            columns = batch.rows.codes[row, cells], batch.rows.ages[row, cells]
            if batches.cls_token:
                assert columns[0][0] == CLS
                columns = [column[1:] for column in columns]
            yield batch.examples[row, segment], batch.targets[row, segment], *columns


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@given(seed=st.integers(0, 2**32 - 1), batch_size=st.integers(1, 50), multiple_of=st.integers(1, 4))
def test_every_example_once_an_epoch_with_its_own_targets_and_tokens(
    packed, cls_token, seed, batch_size, multiple_of
):
    examples, targets = drawn(seed, max_tokens=LENGTH - cls_token)
    batches = task_batches(
        examples,
        targets,
        RowShape(LENGTH, packed=packed, cls_token=cls_token, multiple_of=multiple_of),
        batch_size=batch_size,
        seed=seed,
    )
    for epoch in (0, 3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        found = list(shown(batches, steps))
        assert sorted(number for number, *_ in found) == list(range(len(examples)))
        for number, numbers, codes, ages in found:
            np.testing.assert_array_equal(numbers, targets[number])
            start, length = examples.windows.starts[number], examples.windows.lengths[number]
            np.testing.assert_array_equal(codes, examples.sequences.codes[start : start + length])
            np.testing.assert_array_equal(ages, examples.sequences.ages[start : start + length])
        shapes = {batches.batch(step).rows.codes.shape for step in steps}
        assert shapes == {(batches.batch_rows, LENGTH)}
        assert batches.batch_rows % multiple_of == 0
    # About as many examples a step as asked for: never so many steps that a batch is half as large.
    assert batches.steps_per_epoch <= -(-len(examples) // batch_size)
    if not packed:
        assert batches.segments == 1


def equal(ours, theirs):
    return all(
        np.array_equal(a, b)
        for a, b in zip((*ours.rows, *ours[1:]), (*theirs.rows, *theirs[1:]), strict=True)
    )


def test_a_batch_depends_on_seed_and_step_alone():
    examples, targets = drawn(0)

    def batches(seed):
        return task_batches(examples, targets, RowShape(LENGTH), batch_size=8, seed=seed)

    first, second = batches(5), batches(5)
    steps = range(3 * first.steps_per_epoch)
    ahead = {step: first.batch(step) for step in steps}
    for step in reversed(steps):
        assert equal(second.batch(step), ahead[step])
    epochs = [first.steps_per_epoch * epoch for epoch in range(3)]
    assert not any(equal(ahead[0], ahead[step]) for step in epochs[1:])  # each epoch anew
    assert not equal(batches(6).batch(0), ahead[0])
    fixed = batches(None)
    assert all(equal(fixed.batch(0), fixed.batch(step)) for step in epochs)


def test_batches_of_a_fixed_number_of_rows_show_the_same_rows():
    examples, targets = drawn(1)
    batches = task_batches(examples, targets, RowShape(LENGTH), batch_size=len(examples), seed=None)
    assert batches.steps_per_epoch == 1
    few = batches.of_rows(3, multiple_of=2)
    assert (few.rows_per_batch, few.batch_rows) == (3, 4)
    assert few.steps_per_epoch == -(-batches.rows // 3) > 2
    assert all(few.batch(step).rows.codes.shape == (4, LENGTH) for step in range(few.steps_per_epoch))
    numbers = [
        [int(number) for number, *_ in shown(part, range(part.steps_per_epoch))] for part in (batches, few)
    ]
    assert numbers[0] == numbers[1]


def test_segments_have_room_for_as_many_as_asked():
    examples, targets = drawn(2)
    shape, common = RowShape(LENGTH), {"batch_size": 8, "seed": None}
    least = task_batches(examples, targets, shape, **common).segments
    assert least > 1
    wide = task_batches(examples, targets, shape, **common, least_segments=least + 3)
    assert wide.batch(0).targets.shape[1] == least + 3
    assert task_batches(examples, targets, shape, **common, least_segments=1).segments == least


def test_wrong_sizes_are_refused():
    examples, targets = drawn(3)
    with pytest.raises(InputError, match=r"train.batch_size is 0"):
        task_batches(examples, targets, RowShape(LENGTH), batch_size=0, seed=None)
    nobody = find_examples(sequence_set({}), "train", labels_at([(1, DAY)]), max_tokens=3)
    with pytest.raises(InputError, match="no example"):
        task_batches(nobody, targets[:0], RowShape(LENGTH), batch_size=8, seed=None)


def test_labels_outside_of_a_life_are_left_out_or_kept():
    data = sequence_set({"train": {1: [Event(0, "A//1", 0)], 2: [Event(0, "A//1", 0)], 3: []}})
    deaths = SubjectTimes(np.array([1, 3]), np.array([5 * DAY + HOUR, 9 * DAY]))
    data = replace(data, deaths={**data.deaths, "train": deaths})
    times = [(1, 6 * DAY - 1), (1, 6 * DAY), (2, 99 * DAY), (3, 10 * DAY), (3, 9 * DAY), (2, -2 * DAY)]
    labels = labels_at(times)
    found = find_examples(data, "train", labels, max_tokens=9, outside_life="leave_out")
    assert found.rows.tolist() == [0, 2, 4]
    assert found.outside_life == {"before_birth": 1, "after_death": 2}
    assert len(found.ages) == len(found.windows) == 3
    found = find_examples(data, "train", labels, max_tokens=9, outside_life="keep")
    assert found.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.ages[5] == 0
    assert not found.outside_life
    with pytest.raises(InputError, match=r"1 of 6 labels of train .* before .*birth.*outside_life leave_out"):
        find_examples(data, "train", labels, max_tokens=9)
    found = find_examples(data, "train", labels_at(times[:-1]), max_tokens=9)
    assert found.outside_life == {"before_birth": 0, "after_death": 2}

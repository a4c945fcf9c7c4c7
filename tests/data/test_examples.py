import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data import examples as hidden_tokens
from behrt_jax.data.event_rules import DAY
from behrt_jax.data.examples import find_examples
from behrt_jax.data.ragged import ragged_indices
from behrt_jax.data.sequences import YEAR
from behrt_jax.data.vocabulary import SEP, UNK
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

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config.data import MakeLabelsConfig
from behrt_jax.data.events import DAY
from behrt_jax.data.labels import Labels
from behrt_jax.records.label_makers import (
    NEVER,
    SplitHistory,
    label_death,
    label_first_occurrence,
    label_next_visit,
    label_readmission,
)
from tests.data.histories import CODES, Event, sequence_set

MAKERS = {
    "first_occurrence": label_first_occurrence,
    "death": label_death,
    "readmission": label_readmission,
    "next_visit": label_next_visit,
}
DEFAULT = MakeLabelsConfig(codes=("B//",), horizon_days=100.0, follow_up="subject")


def history(subjects, deaths=None, follow_up=None):
    """Subject -> events as (day, code) or (day, code, visit); a visit is a day where none is given."""
    splits = {
        subject: [Event(int(day * DAY), code, *(visit or [int(day)])) for day, code, *visit in events]
        for subject, events in subjects.items()
    }
    data = sequence_set({"train": splits})
    part = data.splits["train"]
    died = np.array([int((deaths or {}).get(subject, NEVER // DAY) * DAY) for subject in part.subject_ids])
    died = np.where(np.isin(part.subject_ids, list(deaths or {})), died, NEVER)
    until = None if follow_up is None else int(follow_up * DAY)
    return SplitHistory.followed(part, data.vocabulary, died, until)


def made(task, of, config=DEFAULT, **options):
    """(Subject, day) -> value, and the account, which must add up."""
    labels = MAKERS[task](of, replace(config, **options))
    left_out = sum(count for key, count in labels.counts.items() if key.startswith("left out"))
    assert labels.counts["candidates"] == labels.counts["labels"] + left_out
    assert labels.counts["labels"] == len(labels.times) == len(labels.subject_ids)
    days = [time / DAY for time in labels.times.tolist()]
    columns = [column.to_pylist() for column in labels.values.values()]
    assert all(len(column) == len(days) for column in columns)
    values = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    keys = list(zip(labels.subject_ids.tolist(), days, strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, values, strict=True)), dict(labels.counts)


def test_a_first_occurrence_after_the_gap_and_within_the_horizon():
    days = [(0, "A//1"), (10, "A//1"), (100, "B//1"), (150, "B//2"), (500, "A//1")]
    for gap, horizon, expected in (
        (0, 90, {0: False, 10: True}),
        (0, 89, {0: False, 10: False}),
        (89, 11, {0: True, 10: True}),
        (90, 11, {0: True}),  # day 10: just in the gap
        (100, 400, {}),
        (0, 400, {0: True, 10: True}),
    ):
        found, counts = made("first_occurrence", history({1: days}), gap_days=gap, horizon_days=horizon)
        assert found == {(1, day): value for day, value in expected.items()}
        assert counts["left out: it has happened already"] == 3
        assert counts["positive"] == sum(expected.values())
        assert counts.get("left out: it happens in the gap", 0) == 2 - len(expected)


def test_silence_is_no_negative():
    quiet = {1: [(0, "A//1"), (50, "A//1"), (99, "A//1")], 2: [(0, "A//1"), (100, "A//1")]}
    found, counts = made("first_occurrence", history(quiet))
    assert found == {(2, 0): False}
    assert counts["left out: follow-up ends before the horizon does"] == 4
    assert made("first_occurrence", history(quiet, follow_up=150))[0] == dict.fromkeys(
        [(1, 0), (1, 50), (2, 0)], False
    )
    # What is seen needs no more follow-up.
    assert made("first_occurrence", history({1: [(0, "A//1"), (9, "B//1")]}))[0] == {(1, 0): True}


def test_death_before_the_end_of_the_horizon_is_no_answer():
    events = {1: [(0, "A//1"), (60, "A//1")], 2: [(0, "A//1"), (60, "B//1")]}
    found, counts = made("first_occurrence", history(events, deaths={1: 100, 2: 100}))
    assert found == {(2, 0): True}
    assert counts["left out: death before the end of the horizon"] == 2
    # Up to the death all is known.
    assert made("first_occurrence", history(events, deaths={1: 101}), horizon_days=100)[0] == {
        (1, 0): False,
        (2, 0): True,
    }
    counts = made("first_occurrence", history(events, deaths={1: 60}))[1]
    assert counts["left out: the subject has died"] == 1


def test_an_unknown_code_is_no_occurrence():
    events = {1: [(0, "[UNK]"), (50, "[UNK]"), (200, "A//1")]}
    for codes in (("B//",), ("B//", r"\[UNK\]"), (".",)):
        found, counts = made("first_occurrence", history(events), codes=codes)
        assert counts["positive"] == 0
        assert counts.get("left out: it has happened already", 0) == int(codes == (".",))
        assert set(found.values()) <= {False}


def test_survival_ends_with_the_event_or_with_what_is_known():
    events = {1: [(0, "A//1"), (40, "B//1")], 2: [(0, "A//1"), (70, "A//1")], 3: [(0, "A//1")]}
    of = history(events, deaths={3: 90})
    found, counts = made("first_occurrence", of, survival=True, horizon_days=None)
    assert found == {(1, 0): (True, 40.0), (2, 0): (False, 70.0), (3, 0): (False, 90.0)}
    assert counts["left out: follow-up ends before the gap does"] == 1  # subject 2 on day 70
    assert (counts["positive"], counts["censored"]) == (1, 2)
    found, _ = made("first_occurrence", of, survival=True, horizon_days=30, gap_days=20)
    assert found == {(1, 0): (True, 40.0), (2, 0): (False, 50.0), (3, 0): (False, 50.0)}
    found, counts = made("first_occurrence", of, survival=True, horizon_days=30, gap_days=40)
    assert (1, 0) not in found
    assert counts["left out: it happens in the gap"] == 1
    long = history(events, deaths={3: 90}, follow_up=200)
    found, _ = made("first_occurrence", long, survival=True, horizon_days=None)
    assert (found[(2, 0)], found[(3, 0)]) == ((False, 200.0), (False, 90.0))
    found, _ = made("death", of, survival=True, horizon_days=None)
    assert found == {(1, 0): (False, 40.0), (2, 0): (False, 70.0), (3, 0): (True, 90.0)}


def test_death_within_a_horizon():
    events = {
        1: [(0, "A//1"), (200, "A//1"), (300, "A//1")],
        2: [(0, "A//1"), (99, "A//1")],
        3: [(0, "A//1")],
    }
    found, counts = made("death", history(events, deaths={1: 299.5}))
    assert found == {(1, 0): False, (1, 200): True}
    assert counts["left out: the subject has died"] == 1
    assert counts["left out: follow-up ends before the horizon does"] == 3
    # Nothing has to be recorded to know that a subject lived up to a later death.
    assert made("death", history(events, deaths={2: 101}))[0][(2, 0)] is False
    assert made("death", history(events, deaths={2: 101}, follow_up=50))[0] == {(2, 0): False, (2, 99): True}
    assert made("death", history(events, deaths={2: 100}))[0][(2, 0)] is True
    assert (
        made("death", history(events, deaths={2: 100}), gap_days=1)[1]["left out: it happens in the gap"] == 1
    )


def test_readmission():
    stays = [(0, "A//1", 1), (4, "A//2", 1), (34, "A//1", 2), (35, "A//1", 2), (90, "A//1", 3)]
    of = history({1: stays}, follow_up=120)
    options = {"codes": (), "horizon_days": 30}
    found, counts = made("readmission", of, **options)
    assert found == {(1, 4): True, (1, 35): False, (1, 90): False}
    assert counts["positive"] == 1
    found, counts = made("readmission", history({1: stays}, follow_up=119), **options)
    assert (1, 90) not in found
    assert counts["left out: follow-up ends before the horizon does"] == 1
    assert made("readmission", of, **(options | {"horizon_days": 29}))[0][(1, 4)] is False
    found, counts = made("readmission", of, gap_days=30, **options)
    assert (1, 4) not in found
    assert counts["left out: it happens in the gap"] == 1
    # Visits with such a code alone: the second one is none.
    found, _ = made(
        "readmission",
        history({1: [*stays, (91, "A//2", 3)]}, follow_up=200),
        **(options | {"codes": ("A//2",)}),
    )
    assert found == {(1, 4): False, (1, 91): False}


def test_death_and_readmission():
    stays = {
        1: [(0, "A//1"), (20, "A//1")],
        2: [(0, "A//1")],
        3: [(0.5, "A//1")],
        4: [(0, "A//1")],
        5: [(0.5, "A//1")],
    }
    of = history(stays, deaths={1: 25, 2: 30, 3: 0, 4: 31, 5: 0.75}, follow_up=100)
    found, counts = made("readmission", of, codes=(), horizon_days=30)
    assert found == {(1, 0): True, (4, 0): False}
    assert counts["left out: death in the visit, or on the day of its end"] == 2
    assert counts["left out: death before the end of the horizon"] == 2


def test_nobody_is_readmitted_who_is_still_there():
    stays = [(0, "A//1", 1), (5, "A//1", 2), (6, "A//1", 2), (9, "A//1", 1), (12, "A//1", 3)]
    found, counts = made("readmission", history({1: stays}, follow_up=100), codes=(), horizon_days=30)
    assert found == {(1, 9): True, (1, 12): False}
    assert counts["left out: another visit goes on"] == 1


def test_the_codes_of_the_next_visit():
    events = [(0, "A//1"), (3, "B//2"), (3, "B//1"), (3, "[UNK]"), (8, "[UNK]"), (9, "A//2")]
    found, counts = made("next_visit", history({1: events}), codes=())
    assert found == {(1, 0): ["B//1", "B//2"], (1, 3): [], (1, 8): ["A//2"]}
    assert counts["left out: no visit begins later"] == 1
    assert (counts["without_code"], counts["codes"]) == (1, 3)
    assert made("next_visit", history({1: events}))[0] == {(1, 0): ["B//1", "B//2"], (1, 3): [], (1, 8): []}


def test_one_prediction_of_each_subject():
    events = {subject: [(day, "A//1") for day in range(0, 400, 10)] for subject in range(1, 60)}
    of = history(events)
    assert len(made("first_occurrence", of)[0]) == 59 * 30
    last, counts = made("first_occurrence", of, times="last")
    assert last == {(subject, 290): False for subject in events}
    assert counts["left out: not the one that is chosen of the subject"] == 59 * 29
    assert counts["left out: follow-up ends before the horizon does"] == 59 * 10
    assert {day for _, day in made("next_visit", of, times="last")[0]} == {380}
    first, second, other = (
        list(made("first_occurrence", of, times="random", seed=seed)[0]) for seed in (0, 0, 1)
    )
    assert first == second != other
    assert [subject for subject, _ in first] == list(events)
    assert len({day for _, day in first}) > 10
    # Who else is there does not matter.
    some = {subject: events[subject] for subject in (3, 7, 50)}
    assert set(made("first_occurrence", history(some), times="random")[0]) <= set(first)


def test_the_last_prediction_does_not_depend_on_the_outcome():
    days = [(day, "A//1") for day in range(0, 400, 10)]
    with_it = [(day, "B//1" if day == 350 else code) for day, code in days]
    found, _ = made("first_occurrence", history({1: days, 2: with_it}), times="last")
    assert found == {(1, 290): False, (2, 290): True}


def test_enough_history():
    events = {1: [(0, "A//1"), (1, "A//1"), (1, "A//2"), (200, "A//1")]}
    found, counts = made("first_occurrence", history(events), min_events=3)
    assert found == {(1, 1): False}
    assert counts["left out: fewer than 3 events of history"] == 1


EVENTS = st.tuples(
    st.integers(0, 40).map(lambda quarters: quarters / 4),
    st.sampled_from([*CODES, "[UNK]"]),
    st.integers(0, 5),
)
SUBJECTS = st.dictionaries(st.integers(1, 4), st.lists(EVENTS, min_size=1, max_size=12), min_size=1)
DEATHS = st.dictionaries(st.integers(1, 4), st.integers(0, 60).map(lambda quarters: quarters / 4))
OPTIONS = st.fixed_dictionaries(
    {
        "gap_days": st.sampled_from([0, 0.25, 1]),
        "horizon_days": st.sampled_from([0.5, 2, 5]),
        "min_events": st.integers(1, 3),
    }
)


def slow_labels(task, events, death, follow_up, gap_days, horizon_days, min_events):
    """Day -> label of one subject, by loops over its events."""
    visits = {}
    for event in sorted(events):
        visits.setdefault(event[2], []).append(event)
    spans = [(min(own)[0], max(own)[0], own) for own in visits.values()]
    last = max(event[0] for event in events)
    never = float("inf")
    death = never if death is None else death
    known = min(follow_up or never, death)
    if follow_up is None:
        known = last if death == never else max(last, death)
    labels = {}
    for day in {end for _, end, _ in spans}:
        if sum(event[0] <= day for event in events) < min_events:
            continue
        later = [span for span in spans if span[0] > day]
        goes_on = any(start <= day < end for start, end, _ in spans)
        if task == "next_visit":
            if later and not goes_on:
                codes = {event[1] for event in min(later, key=lambda span: span[0])[2]}
                labels[day] = sorted(code for code in codes if code.startswith("B//"))
            continue
        if task == "readmission":
            if goes_on or int(death // 1 if death < never else 10**9) <= int(day // 1):
                continue
            happens = min((start for start, _, _ in later), default=never)
        else:
            if death <= day:
                continue
            happens = death
            if task == "first_occurrence":
                happens = min((event[0] for event in events if event[1].startswith("B//")), default=never)
        begin, end = day + gap_days, day + gap_days + horizon_days
        if happens <= begin:
            continue
        if happens > end and not (task == "death" and death < never) and (known < end or death <= end):
            continue
        labels[day] = happens <= end
    return labels


@pytest.mark.parametrize("task", MAKERS)
@given(subjects=SUBJECTS, deaths=DEATHS, options=OPTIONS, follow_up=st.sampled_from([None, 9, 12]))
def test_labels_are_those_of_slow_loops(task, subjects, deaths, options, follow_up):
    codes = () if task == "readmission" else ("B//",)
    found, _ = made(task, history(subjects, deaths, follow_up), codes=codes, **options)
    expected = {
        (subject, day): label
        for subject, events in subjects.items()
        for day, label in slow_labels(task, events, deaths.get(subject), follow_up, **options).items()
    }
    assert found == expected


@pytest.mark.parametrize("survival", [False, True])
@pytest.mark.parametrize("task", MAKERS)
@given(data=st.data(), subjects=SUBJECTS, deaths=DEATHS, options=OPTIONS)
def test_no_label_is_made_of_the_past(task, survival, data, subjects, deaths, options):
    if survival and task == "next_visit":
        return
    options = {"codes": () if task == "readmission" else ("B//",), "survival": survival, **options}
    found, _ = made(task, history(subjects, deaths), **options)
    for (subject, day), label in found.items():
        events = subjects[subject]
        kept = [event for event in events if event[0] >= day or data.draw(st.booleans())]
        kept = [
            (when, data.draw(st.sampled_from(CODES)) if when < day else code, visit)
            for when, code, visit in kept
        ]
        changed, _ = made(task, history({subject: kept}, deaths), **options)
        assert changed.get((subject, day), label) == label


def indexed(of, *dates):
    """With index dates as (subject, day)."""
    times = [int(day * DAY) for _, day in dates]
    labels = Labels(np.array([s for s, _ in dates]), np.array(times), np.zeros(len(dates), bool), "boolean")
    return replace(of, index=labels)


def test_index_dates_are_labelled_in_place_of_ends_of_visits():
    subjects = {
        1: [(0, "A//1"), (100, "B//1")],
        2: [(0, "A//1"), (300, "A//1")],
        3: [(5, "A//1"), (300, "A//1")],
    }
    dates = [(2, 50.5), (9, 7), (1, 20), (1, 120), (3, 1), (2, 250)]
    found, counts = made("first_occurrence", indexed(history(subjects), *dates))
    assert found == {(1, 20): True, (2, 50.5): False}
    assert counts["candidates"] == 5
    assert counts["left out: fewer than 1 events of history"] == 1
    assert counts["left out: follow-up ends before the horizon does"] == 1
    found, _ = made("death", indexed(history(subjects, {1: 110}), *dates), codes=())
    assert found == {(1, 20): True, (2, 50.5): False}


def test_index_dates_drawn_from_those_of_the_positives():
    case = [(0, "A//1"), (150, "A//1"), (200, "B//1"), (900, "A//1")]
    controls = {s: [(day, "A//1") for day in range(s, 900, 100)] for s in range(2, 60)}
    of = history({1: case, **controls, 99: [(160, "A//1"), (900, "A//1")]})
    config = {"index": "positives"}
    found, counts = made("first_occurrence", of, **config)
    assert found.pop((1, 150)) is True  # day 0 is more than 100 days before
    assert set(found.values()) == {False}
    # All are asked at their last end of a visit up to day 150.
    assert sorted(found) == sorted((s, 100 + s if s <= 50 else s) for s in controls)
    assert counts["left out: no end of a visit up to the index date that was drawn"] > 0
    again, _ = made("first_occurrence", of, **config, seed=1)
    assert again.keys() == {(1, 150), *found}
    many = history(
        {s: [(s, "A//1"), (s + 50, "B//1"), (900, "A//1")] for s in range(40)}
        | {s + 1000: events for s, events in controls.items()}
    )
    one, other = (made("first_occurrence", many, **config, seed=seed)[0] for seed in (0, 1))
    assert one.keys() != other.keys()
    assert len({s for s, _ in one}) == len(one)
    assert sum(one.values()) == sum(other.values()) == 40


def test_index_dates_of_positives_without_any_positive():
    found, counts = made("first_occurrence", history({1: [(0, "A//1"), (500, "A//1")]}), index="positives")
    assert found == {}
    assert counts["left out: not the one that is chosen of the subject"] == 1

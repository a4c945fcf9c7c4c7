import random
from collections import Counter
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.event_rules import Selected, first_in_visit, select_columns, select_events
from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EventCounts, event_columns
from behrt_jax.data.lives import LifeRules
from behrt_jax.data.sequences import ages_in_years
from behrt_jax.errors import InputError
from tests.records.meds_folder import DAY, HOUR, Row, born, event_set, history_rows


def select(rows, codes=(), exclude=(), duplicates: Literal["keep", "drop"] = "keep"):
    """Select, and give the kept events as (subject, time, code, visit) with what was dropped."""
    source = event_set(rows)
    selected = select_events(source, codes, exclude, duplicates)
    return as_rows(selected), source.counts.dropped


def as_rows(selected: Selected):
    subjects = np.repeat(selected.subject_ids, np.diff(selected.offsets)).tolist()
    codes = [selected.names[code] for code in selected.codes]
    return list(zip(subjects, selected.times.tolist(), codes, selected.visits.tolist(), strict=True))


def test_events_are_sorted_and_days_are_visits():
    big, negative = 2**63 - 1, -5
    rows = [
        Row(big, 3 * DAY, "A"),
        Row(negative, 2 * DAY, "C"),
        Row(big, DAY + HOUR, "B"),
        Row(big, DAY, "C"),
        Row(negative, 2 * DAY, "B"),
        born(big),
        born(negative),
    ]
    kept, dropped = select(rows)
    assert kept == [
        (negative, 2 * DAY, "B", 0),
        (negative, 2 * DAY, "C", 0),
        (big, DAY, "C", 0),
        (big, DAY + HOUR, "B", 0),
        (big, 3 * DAY, "A", 1),
    ]
    assert dropped == {"birth or death marker": 2}


def test_the_arrays_have_their_types():
    selected = select_events(event_set([born(1, -DAY), Row(1, DAY, "A")]), (), (), "keep")
    arrays = {**vars(selected)}
    for of_subjects in ("without_events", "deaths"):
        own = vars(arrays.pop(of_subjects))
        arrays |= {f"{of_subjects}.{name}": array for name, array in own.items()}
    kinds = {name: str(a.dtype) for name, a in arrays.items() if name != "names"}
    assert kinds == {
        "subject_ids": "int64",
        "births": "int64",
        "offsets": "int64",
        "codes": "int32",
        "times": "int64",
        "visits": "int32",
        "without_events.subject_ids": "int64",
        "without_events.times": "int64",
        "deaths.subject_ids": "int64",
        "deaths.times": "int64",
    }
    assert selected.births.tolist() == [-DAY]


def test_birth_and_death_are_the_earliest_and_no_tokens():
    rows = [
        born(1, DAY),
        born(1, 5 * DAY),
        Row(1, None, "MEDS_BIRTH"),
        Row(1, 9 * DAY, DEATH_CODE),
        Row(1, 3 * DAY, DEATH_CODE),
        Row(1, None, DEATH_CODE),
        Row(1, DAY - 1, "A"),
        Row(1, DAY, "B"),
        Row(1, 3 * DAY + 23 * HOUR, "C"),
        Row(1, 4 * DAY, "D"),
    ]
    kept, dropped = select(rows)
    assert kept == [(1, DAY, "B", 0), (1, 3 * DAY + 23 * HOUR, "C", 1)]
    assert dropped == {"birth or death marker": 6, "before birth": 1, "after death": 1}


def dated(subject, day, code="DX//a"):
    """A row at midnight of a day."""
    return Row(subject, int(np.datetime64(day, "us").astype(np.int64)), code)


def selected_with_counts(rows, life=None):
    counts = EventCounts()
    selected = select_columns(
        event_columns(event_set(rows).events), None, "keep", counts, life or LifeRules()
    )
    return selected, counts


def days_of(times):
    return times.astype("datetime64[us]").astype("datetime64[D]").astype(str).tolist()


def test_a_placeholder_birth_gives_way_to_another():
    rows = [dated(1, "1900-01-01", BIRTH_CODE), dated(1, "1950-03-04", BIRTH_CODE), dated(1, "2010-01-01")]
    rows += [dated(2, "1900-01-01", BIRTH_CODE), dated(2, "1900-01-01", BIRTH_CODE), dated(2, "1990-01-01")]
    rows += [dated(3, "1949-03-04", BIRTH_CODE), dated(3, "1950-03-04", BIRTH_CODE), dated(3, "1990-01-01")]
    rows += [dated(4, "1900-01-01", BIRTH_CODE), dated(4, "1899-12-31", BIRTH_CODE), dated(4, "1950-01-01")]
    selected, counts = selected_with_counts(rows)
    assert days_of(selected.births) == ["1950-03-04", "1900-01-01", "1949-03-04", "1899-12-31"]
    assert counts.changed == {"births differ": 3, "birth on a placeholder's day, kept": 2}


def test_deaths_that_cannot_be_are_none():
    rows = [dated(subject, "1950-03-04", BIRTH_CODE) for subject in (1, 2, 3, 4)]
    rows += [dated(subject, "2010-01-01") for subject in (1, 2, 3, 4)]
    rows += [dated(1, "1900-01-01", DEATH_CODE), dated(2, "9999-12-31", DEATH_CODE)]
    rows += [dated(3, "1950-03-04", DEATH_CODE)]  # on the day of birth
    rows += [dated(4, "1900-01-01", DEATH_CODE), dated(4, "2011-01-01", DEATH_CODE)]
    selected, counts = selected_with_counts(rows)
    assert selected.subject_ids.tolist() == [1, 2, 4]
    assert selected.deaths.subject_ids.tolist() == [3, 4]
    assert counts.dropped == {"birth or death marker": 9, "after death": 1}
    assert counts.changed == {
        "death before birth, passed over": 2,
        "death at an age above 150 years, passed over": 1,
    }


def test_care_after_the_first_of_several_deaths_shows_that_it_is_false():
    rows = [dated(subject, "1950-03-04", BIRTH_CODE) for subject in (1, 2, 3)]
    rows += [dated(subject, "2010-01-20", DEATH_CODE) for subject in (1, 2, 3)]
    rows += [dated(subject, "2012-02-02", DEATH_CODE) for subject in (1, 2)]
    rows += [dated(1, "2010-06-01"), dated(1, "2012-02-02"), dated(1, "2012-02-03")]
    rows += [dated(2, "2010-03-21"), dated(2, "2012-02-03")]  # 60 days later, and after both
    rows += [dated(3, "2010-06-01"), dated(3, "2010-01-20", DEATH_CODE)]  # twice the same
    selected, counts = selected_with_counts(rows)
    assert (selected.subject_ids.tolist(), days_of(selected.times)) == ([1], ["2010-06-01", "2012-02-02"])
    assert days_of(selected.deaths.times) == ["2012-02-02", "2010-01-20", "2010-01-20"]
    assert counts.dropped["after death"] == 4
    assert counts.changed == {"deaths differ": 2, "care between deaths, the last taken": 1}


def test_ages_that_cannot_be():
    rows = [dated(1, "1850-01-01", BIRTH_CODE), dated(1, "1999-12-31"), dated(1, "2000-01-03")]
    rows += [dated(1, "2149-12-30"), dated(1, "2160-01-05"), dated(1, "2180-01-05")]
    for choice, years in (("drop", [149, 310]), ("refuse", [149, 310]), ("keep", [149, 150, 299, 310, 330])):
        selected, counts = selected_with_counts(rows, LifeRules(implausible_ages=choice))
        assert ages_in_years(selected).astype(int).tolist() == years
        assert counts.dropped.get("age above 150 years", 0) == 5 - len(years)
    with pytest.raises(InputError, match=r"^3 events are at an age above 150 years.*--implausible_ages"):
        select(rows)


def test_subjects_without_a_birth():
    rows = [Row(1, 3 * DAY, "A"), Row(1, 2 * DAY, "B"), Row(1, 10 * DAY, DEATH_CODE), Row(1, 11 * DAY, "C")]
    rows += [born(2, DAY), Row(2, 0, "A"), Row(2, DAY, "A"), Row(3, None, "A")]
    kept = [(1, 2 * DAY, "B"), (1, 3 * DAY, "A"), (2, DAY, "A")]
    dropped = {"birth or death marker": 2, "null time (static)": 1, "before birth": 1, "after death": 1}
    selected, counts = selected_with_counts(rows, LifeRules("first_event"))
    assert [row[:3] for row in as_rows(selected)] == kept
    assert selected.births.tolist() == [2 * DAY, DAY]
    assert (counts.dropped, counts.changed) == (dropped, {"no birth, age from the first event": 3})
    selected, counts = selected_with_counts(rows, LifeRules("unknown"))
    assert [row[:3] for row in as_rows(selected)] == kept
    assert np.isnan(ages_in_years(selected)).tolist() == [True, True, False]
    assert (counts.dropped, counts.changed) == (dropped, {"no birth, age unknown": 3})


def test_the_day_of_death_before_1970_is_a_calendar_day():
    rows = [born(1, -10 * DAY), Row(1, -3 * DAY + HOUR, DEATH_CODE)]
    rows += [Row(1, -2 * DAY - 1, "A"), Row(1, -2 * DAY, "B")]
    kept, dropped = select(rows)
    assert kept == [(1, -2 * DAY - 1, "A", 0)]
    assert dropped["after death"] == 1


def test_patterns_match_at_the_start():
    rows = [born(1), *(Row(1, DAY, code) for code in ("DX//A", "DX//AB", "LAB//DX//A", "LAB//B"))]
    assert [row[2] for row in select(rows, codes=("DX//",))[0]] == ["DX//A", "DX//AB"]
    assert [row[2] for row in select(rows, codes=("DX//A$", ".*B$"))[0]] == ["DX//A", "DX//AB", "LAB//B"]
    kept, dropped = select(rows, codes=("DX//",), exclude=(".*AB",))
    assert [row[2] for row in kept] == ["DX//A"]
    assert dropped["code not selected"] == 3


def test_each_event_is_counted_under_the_first_rule_that_drops_it():
    rows = [
        born(1, DAY),
        Row(1, None, "LAB//x"),
        Row(1, None, "DX//x"),
        Row(2, None, "DX//x"),
        Row(2, 2 * DAY, "DX//x"),
        Row(1, 0, "DX//x"),
        Row(1, 9 * DAY, "DX//x"),
        Row(1, 3 * DAY, "DX//x"),
        Row(1, 3 * DAY + 1, "DX//x"),
        Row(1, 4 * DAY, DEATH_CODE),
    ]
    kept, dropped = select(rows, codes=("DX//",), duplicates="drop")
    assert kept == [(1, 3 * DAY, "DX//x", 0)]
    assert dropped == {
        "birth or death marker": 2,
        "code not selected": 1,
        "null time (static)": 2,
        "no birth": 1,
        "before birth": 1,
        "after death": 1,
        "duplicate in visit": 1,
    }


def test_visit_ids_hold_a_visit_together_over_days_and_interruptions():
    rows = [
        born(1),
        Row(1, DAY, "A", visit=70),
        Row(1, DAY + HOUR, "B"),
        Row(1, 2 * DAY, "C", visit=70),
        Row(1, 2 * DAY, "C", visit=3),
        Row(1, 2 * DAY + HOUR, "B"),
        Row(1, 2 * DAY + HOUR, "A", visit=70),
    ]
    kept, dropped = select(rows, duplicates="drop")
    assert [row[2:] for row in kept] == [("A", 0), ("B", 1), ("C", 2), ("C", 0), ("B", 3)]
    assert dropped["duplicate in visit"] == 1


def test_a_visit_id_is_not_a_day_and_not_shared_by_subjects():
    rows = [born(1), born(2), Row(1, DAY, "A", visit=1), Row(1, DAY, "A"), Row(2, DAY, "A", visit=1)]
    kept, _ = select(rows, duplicates="drop")
    assert [(row[0], row[3]) for row in kept] == [(1, 0), (1, 1), (2, 0)]


def test_subjects_without_events_are_left_out():
    kept, _ = select([born(1), born(2), born(3), Row(2, DAY, "A")])
    assert kept == [(2, DAY, "A", 0)]


@given(seed=st.integers(0, 1000), duplicates=st.sampled_from(["keep", "drop"]))
def test_row_order_does_not_matter(seed, duplicates):
    rows = history_rows(subjects=4, days=4)
    rows = [row._replace(visit=row.visit if row.time and row.time % 2 == 0 else None) for row in rows] + [
        Row(1, None, "DIAGNOSIS//0"),
        *[Row(2, DAY, code, visit) for code in "AB" for visit in (None, 0, 1)] * 2,
    ]
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert select(shuffled, duplicates=duplicates) == select(rows, duplicates=duplicates)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [({"codes": ("DX//", "DX(")}, r"data\.codes"), ({"exclude": ("[",)}, r"data\.exclude_codes")],
)
def test_a_pattern_that_is_none(arguments, option):
    with pytest.raises(InputError, match=rf"{option} has '.*', which is no regular expression"):
        select([born(1), Row(1, DAY, "A")], **arguments)


def test_nothing_left_shows_what_codes_there_are():
    rows = [born(1), *(Row(1, DAY, f"LAB//{value}") for value in range(3)), Row(1, DAY, "DX//1")]
    rows += [Row(1, DAY, f"P{place:02}//x") for place in range(12)]
    with pytest.raises(InputError, match=r"code not selected: 16") as error:
        select(rows, codes=("MEDICATION",))
    shown = str(error.value).split("prefixes: ")[1].split(")")[0].split(", ")
    assert shown == ["LAB//", "DX//", *(f"P{place:02}//" for place in range(8))]


def test_prefixes_are_shown_by_the_separators_that_the_codes_have_and_as_patterns():
    codes = [*["ICD10CM/E11.9", "ICD10CM/I10"] * 2, *["SNOMED|1", "SNOMED|2/3", "SNOMED|4"], "A/b//c", "x.y"]
    with pytest.raises(InputError) as error:
        select([born(1), *(Row(1, DAY, code) for code in codes)], codes=("MEDICATION",))
    assert r"prefixes: ICD10CM/, SNOMED\|, A/b//, x\.y)" in str(error.value)


def test_nothing_left_names_the_rule():
    with pytest.raises(
        InputError, match=r"\(no birth: 1\).*MEDS_BIRTH events with a time.*--births FILE.*--without_birth"
    ):
        select([Row(1, DAY, "A")])


def check(visit, code):
    visit, code = np.array(visit, np.int32), np.array(code, np.int32)
    times = Counter(zip(visit.tolist(), code.tolist(), strict=True))
    firsts = list(dict.fromkeys(zip(visit.tolist(), code.tolist(), strict=True)))
    first, repeated, seen = first_in_visit(visit, code)
    assert [(int(visit[at]), int(code[at])) for at in np.flatnonzero(first)] == firsts
    assert first[repeated].all()
    found = {
        (int(visit[at]), int(code[at])): count for at, count in zip(repeated, seen.tolist(), strict=True)
    }
    assert found == {key: count for key, count in times.items() if count > 1}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=80), st.booleans())
def test_first_of_each_code_in_each_visit(events, interrupted):
    """Visits shorter and longer than those compared one by one, in a row or interrupted by others."""
    if not interrupted:
        events = sorted(events, key=lambda event: event[0])
    check([visit // 6 if visit < 18 else visit for visit, _ in events], [code for _, code in events])


def test_repeats_at_every_distance():
    for distance in range(1, 30):
        codes = [*range(distance), 0]  # the first code comes again at the end
        check([0, *[1] * len(codes), 2], [0, *codes, 0])


def test_no_repeat_leaves_all():
    first, repeated, seen = first_in_visit(np.array([0, 0, 1], np.int32), np.array([1, 2, 1], np.int32))
    assert first.tolist() == [True, True, True]
    assert len(repeated) == len(seen) == 0


def test_a_visit_interrupted_by_another():
    check([0, 1, 0, 1], [5, 5, 5, 6])

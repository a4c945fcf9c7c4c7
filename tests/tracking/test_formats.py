"""Figures have the digits worth reading, tables are aligned, and no text acts on a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.tracking.console import (
    format_cell,
    format_count,
    format_duration,
    format_rate,
    printable,
    progress_text,
    table_text,
)


def test_table_text_aligns_numbers_right_and_text_left():
    rows = [["lora", 393216, 8.5, "9.5 %"], ["head", 776680, None, "100 %"]]
    assert table_text("Parameters", ["group", "total", "share", "part"], rows).splitlines() == [
        "Parameters",
        "group    total  share   part",
        "-----  -------  -----  -----",
        "lora   393,216    8.5  9.5 %",
        "head   776,680         100 %",
    ]


def test_table_without_rows_and_with_a_ragged_row():
    assert table_text("T", ["a", "bc"], []).splitlines() == ["T", "a  bc", "-  --"]
    with pytest.raises((ValueError, IndexError)):
        table_text("T", ["a", "b"], [["only one"]])


def test_progress_text_leaves_out_what_is_not_known():
    assert progress_text(3, 10, None, None, None, None) == "step 3/10"
    assert progress_text(10, 10, None, 2.0, None, 1.0) == "step 10/10  2.0 steps/s  loss 1.000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (214, "3 min 34 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86399, "1 d 00 h"),
        (100 * 3600, "4 d 04 h"),
    ],
)
def test_durations_never_say_60(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0, "0"), (0.534, "0.53"), (4.13, "4.1"), (41.24, "41.2"), (60987.0, "61,000"), (412.4, "412")],
)
def test_rates_have_the_digits_worth_reading(rate, text):
    assert format_rate(rate) == text


@given(st.integers())
def test_counts_are_exact(value):
    assert int(format_count(value).replace(",", "")) == value
    assert format_cell(value) == format_count(value)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_float_is_a_cell_and_a_rate(value):
    assert format_cell(value)
    assert format_rate(value)


@given(st.text())
def test_printable_text_keeps_its_length_and_holds_nothing_a_terminal_acts_on(text):
    shown = printable(text)
    assert len(shown) == len(text)
    assert all(char.isprintable() or char == "\n" for char in shown)

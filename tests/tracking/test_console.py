"""The console says the same on a terminal and in a log file, and a log file gets no control characters."""

import builtins
import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.tracking.console import (
    Pace,
    PlainConsole,
    RichConsole,
    format_cell,
    format_count,
    format_duration,
    format_rate,
    open_console,
    printable,
    progress_text,
    table_text,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Loss:
    """A value on a device: reading it waits for the device, so the reads are counted."""

    def __init__(self) -> None:
        self.reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 4.312


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_steps(console, clock, loss, steps):
    for step in range(1, steps + 1):
        clock.now += 0.25
        console.step(step, 15250, loss)


def test_plain_progress_is_a_line_at_most_every_30_seconds_and_reads_the_loss_only_then():
    stream, clock, loss = io.StringIO(), Clock(), Loss()
    with PlainConsole(stream, clock) as console:
        console.start(1200, steps_per_epoch=100)
        run_steps(console, clock, loss, 320)  # 80 seconds
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/1,200  epoch 0.0  loss 4.312"
    assert lines[-1] == "step 241/1,200  epoch 2.4  4.0 steps/s  61,000 tokens/s  loss 4.312  4 min 00 s left"
    assert len(lines) == loss.reads == 3


def test_plain_output_has_no_control_characters_and_takes_brackets_literally():
    stream = io.StringIO()
    with PlainConsole(stream) as console:
        console.start(2)
        console.step(0, 0)
        console.log("codes [MASK] [red] \x1b[31m\r\x07")
        console.table("Codes\x1b", ["code\t", "n"], [["DX//E11\x1b[2J", 1], ["a\nb", 2]])
    assert stream.getvalue().startswith("step 0/2\n")
    assert "[MASK] [red] ?[31m??" in stream.getvalue()
    assert all(char.isprintable() or char == "\n" for char in stream.getvalue())
    assert "a b" in stream.getvalue()


def test_plain_output_survives_a_narrow_encoding():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainConsole(stream).log("Ménière's disease")
    assert raw.getvalue() == b"M?ni?re's disease\n"


def rich_console(stream, width=140):
    console = pytest.importorskip("rich.console")
    return console.Console(file=stream, force_terminal=True, width=width, color_system=None)


def test_rich_shows_the_progress_and_gives_the_cursor_back():
    stream, clock, loss = io.StringIO(), Clock(), Loss()
    with RichConsole(rich_console(stream), clock) as console:
        console.start(320, steps_per_epoch=32)
        run_steps(console, clock, loss, 320)
    drawn = stream.getvalue()
    assert "step 320/320  epoch 10.0  4.0 steps/s  61,000 tokens/s  loss 4.312" in drawn
    assert "━" in drawn
    assert drawn.rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_rich_close_shows_steps_since_the_last_redrawing_without_reading_the_loss():
    stream, clock, loss = io.StringIO(), Clock(), Loss()
    console = RichConsole(rich_console(stream), clock)
    console.start(10)
    console.step(1, 5, loss)
    clock.now += 0.3
    console.step(2, 5, loss)
    clock.now += 0.1
    console.step(3, 5, loss)
    console.close()
    console.close()
    assert "step 3/10" in stream.getvalue()
    assert loss.reads == 2


def test_rich_gives_the_terminal_back_after_an_error():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), RichConsole(rich_console(stream)) as console:
        console.start(10)
        raise RuntimeError
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_rich_on_80_columns_wraps_and_cuts_nothing_off():
    stream, clock = io.StringIO(), Clock()
    with RichConsole(rich_console(stream, width=80), clock) as console:
        console.start(1200, steps_per_epoch=38)
        run_steps(console, clock, 4.312, 320)
    last = " ".join(stream.getvalue().split("step 320/1,200")[-1].split())
    assert "…" not in stream.getvalue()
    assert "epoch 8.4 4.0 steps/s 61,000 tokens/s" in last
    assert "left" in last


def test_rich_prints_messages_and_tables_verbatim():
    stream = io.StringIO()
    with RichConsole(rich_console(stream)) as console:
        console.start(10)
        console.log("codes [MASK] [red] \x1b[31m")
        console.table("[bold]", ["[i]", "n"], [["[blue]", 20366312]])
    for text in ("[MASK] [red] ?[31m", "[bold]", "[i]", "[blue]", "20,366,312"):
        assert text in stream.getvalue()


def test_rich_draws_no_bar_before_the_start():
    stream = io.StringIO()
    with RichConsole(rich_console(stream)) as console:
        console.log("reading the data")
    assert stream.getvalue().strip() == "reading the data"


def test_a_resumed_run_starts_the_bar_where_it_stopped():
    with RichConsole(rich_console(io.StringIO())) as console:
        console.start(100, start_step=40)
        assert console._bar.tasks[0].completed == 40


def test_open_console_is_plain_where_the_output_is_no_terminal(monkeypatch, capsys):
    with open_console() as console:
        assert isinstance(console, PlainConsole)
        console.log("here")
    assert capsys.readouterr().out == "here\n"


def test_open_console_is_live_on_a_terminal_and_plain_on_a_dumb_one(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with open_console() as console:
        assert isinstance(console, RichConsole)
    monkeypatch.setenv("TERM", "dumb")
    with open_console() as console:
        assert isinstance(console, PlainConsole)


def test_open_console_is_plain_where_rich_is_missing(monkeypatch):
    real_import = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(builtins, "__import__", without_rich)
    with open_console() as console:
        assert isinstance(console, PlainConsole)


def test_pace_leaves_the_first_step_out_and_forgets_what_is_older_than_a_minute():
    clock = Clock()
    pace = Pace(clock)
    assert pace.per_second() == (None, None)
    clock.now += 500  # compilation
    pace.add(1, 100)
    assert pace.per_second() == (None, None)
    for step in range(2, 12):
        clock.now += 10
        pace.add(step, 100)
    assert pace.per_second() == (pytest.approx(0.1), pytest.approx(10))
    for step in range(1012, 8012, 1000):
        clock.now += 10
        pace.add(step, 50_000)
    assert pace.per_second() == (pytest.approx(100), pytest.approx(5000))


# Figures have the digits worth reading, tables are aligned, and no text acts on a terminal.


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

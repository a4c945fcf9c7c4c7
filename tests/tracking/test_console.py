"""The console says the same on a terminal and in a log file, and a log file gets no control characters."""

import builtins
import io
import sys

import pytest

from behrt_jax.tracking.console import Pace, PlainConsole, RichConsole, open_console


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

"""Console of a command: a live bar and tables on a terminal, quiet plain lines elsewhere."""

import io
import math
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Self, SupportsFloat, TextIO

from behrt_jax.errors import explain

if TYPE_CHECKING:
    import rich.console


PLAIN_INTERVAL = 30.0  # seconds between progress lines where the output is not a terminal
LIVE_INTERVAL = 0.25  # seconds between redrawings of the bar
PACE_WINDOW = 60.0  # seconds over which steps and tokens per second are averaged


class Console(ABC):
    """Messages, tables and progress of one run; a context manager that closes itself."""

    interval: float
    """Least number of seconds between two showings of the progress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self.total_steps = 0
        self.steps_per_epoch: float | None = None
        self._clock = clock
        self._pace = Pace(clock)
        self._step = 0
        self._loss: float | None = None
        self._shown_at = -math.inf

    def start(self, total_steps: int, start_step: int = 0, steps_per_epoch: float | None = None) -> None:
        """Show progress from now on: `start_step` steps of `total_steps` are done."""
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self._step = start_step

    @abstractmethod
    def log(self, text: str) -> None:
        """Show a message above the progress, verbatim (no markup is read)."""

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show a table; columns of numbers stand flush right, integers with thousands separators."""
        self.log(table_text(title, columns, rows))

    def step(self, step: int, tokens: int, loss: SupportsFloat | None = None) -> None:
        """Say that `step` steps are done and that `tokens` real tokens went in since the last call.

        `loss` (nats) may still be on its way on a device: it is read only when it is shown.
        """
        self._step = step
        self._pace.add(step, tokens)
        now = self._clock()
        if now - self._shown_at >= self.interval:
            self._shown_at = now
            self._loss = None if loss is None else float(loss)
            self._show_progress(self._progress())

    def close(self) -> None:  # noqa: B027
        """End the progress display; messages and tables can still follow."""

    def _show_progress(self, text: str) -> None:
        self.log(text)

    def _progress(self) -> str:
        steps, tokens = self._pace.per_second()
        epoch = None if self.steps_per_epoch is None else self._step / self.steps_per_epoch
        return progress_text(self._step, self.total_steps, epoch, steps, tokens, self._loss)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainConsole(Console):
    """Lines of text without control characters: for files, pipes and logs of a scheduler."""

    interval = PLAIN_INTERVAL

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream

    def log(self, text: str) -> None:
        # A stream with a narrow encoding (ASCII under LANG=C) must not end a run.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = printable(text).encode(encoding, "replace").decode(encoding)
        self._stream.write(line + "\n")
        self._stream.flush()


class SilentConsole(Console):
    """Says nothing: for a process beside one that says it all."""

    interval = math.inf

    def log(self, text: str) -> None:
        pass


class RichConsole(Console):
    """A live progress bar with messages and tables above it, drawn by rich."""

    interval = LIVE_INTERVAL

    def __init__(self, console: "rich.console.Console", clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        super().__init__(clock)
        self._console = console
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=False))
        self._bar = Progress(BarColumn(bar_width=20), text, console=console, refresh_per_second=4)

    def start(self, total_steps: int, start_step: int = 0, steps_per_epoch: float | None = None) -> None:
        super().start(total_steps, start_step, steps_per_epoch)
        self._task = self._bar.add_task("first step (compiling)", total=total_steps, completed=start_step)
        self._bar.start()

    def log(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        from rich.table import Table
        from rich.text import Text

        cells, right = table_cells(columns, rows)
        drawn = Table(title=Text(printable(title)), title_justify="left")
        for name, numeric in zip(columns, right, strict=True):
            drawn.add_column(Text(printable(name)), justify="right" if numeric else "left")
        for row in cells:
            drawn.add_row(*map(Text, row))
        self._console.print(drawn)

    def close(self) -> None:
        if self._pace.per_second()[0] is not None:
            self._show_progress(self._progress())  # steps since the last redrawing
        self._bar.stop()

    def _show_progress(self, text: str) -> None:
        self._bar.update(self._task, completed=self._step, description=text)


def open_console() -> Console:
    """The console for standard output: live where that is a terminal and rich is installed, else plain."""
    if sys.stdout.isatty():
        try:
            import rich.console
        except ImportError:
            pass
        else:
            terminal = rich.console.Console()
            if not terminal.is_dumb_terminal:
                return RichConsole(terminal)
    return PlainConsole(sys.stdout)


def tell(error: BaseException, output: Path | None = None) -> int:
    """Say on standard error, in one line, what ended a command; returns its exit status.

    Arguments of `errors.explain`.
    """
    line, status = explain(error, output)
    print(f"error: {' '.join(printable(line).splitlines())}", file=sys.stderr, flush=True)
    return status


class _Sink(io.FileIO):
    """A file descriptor that takes everything, also when nobody reads it any more."""

    def write(self, data) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except OSError:  # a pipe whose reader is gone, a terminal that was closed, a full disk under a log
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Standard output and error that never end a command: a run outlives whoever reads what it says.

    A sign that the encoding lacks is shown as ``?`` or by its number. Streams that a caller has put in place
    of the process's own stay.
    """
    with ExitStack() as stack:
        for stream, own, redirect, errors in (
            (sys.stdout, sys.__stdout__, redirect_stdout, "replace"),
            (sys.stderr, sys.__stderr__, redirect_stderr, "backslashreplace"),
        ):
            if stream is None:  # closed by the shell
                stack.enter_context(redirect(stack.enter_context(Path(os.devnull).open("w"))))
            elif stream is own and isinstance(stream, io.TextIOWrapper):
                stream.flush()
                buffer = io.BufferedWriter(_Sink(stream.fileno(), "w", closefd=False))
                lasting = io.TextIOWrapper(
                    buffer, stream.encoding, errors, write_through=True, line_buffering=True
                )
                stack.enter_context(redirect(lasting))
                stack.callback(lasting.flush)
        yield


class Pace:
    """Steps and tokens per second over the last minute.

    Counting starts at the end of the first call, so that compilation is not in the figures.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = 0
        self._now = (0.0, 0, 0)
        self._marks: deque[tuple[float, int, int]] = deque()  # (seconds, steps done, tokens so far)

    def add(self, step: int, tokens: int) -> None:
        """`step` steps are done, with `tokens` tokens since the last call."""
        self._tokens += tokens
        self._now = (self._clock(), step, self._tokens)
        # One mark a second is enough, however fast the steps are.
        if not self._marks or self._now[0] - self._marks[-1][0] >= 1.0:
            self._marks.append(self._now)
        while len(self._marks) > 1 and self._now[0] - self._marks[1][0] >= PACE_WINDOW:
            self._marks.popleft()

    def per_second(self) -> tuple[float | None, float | None]:
        """(steps, tokens) per second; None before there is anything to measure."""
        if not self._marks:
            return None, None
        (then, step, tokens), (now, last_step, last_tokens) = self._marks[0], self._now
        if now <= then or last_step <= step:
            return None, None
        return (last_step - step) / (now - then), (last_tokens - tokens) / (now - then)


# Figures, tables and progress as text.

_NUMERIC = re.compile(r"-?[\d,]*\.?\d*(e-?\d+)? ?%?")


def progress_text(
    step: int,
    total_steps: int,
    epoch: float | None,
    steps_per_second: float | None,
    tokens_per_second: float | None,
    loss: float | None,
) -> str:
    """One line of progress; parts that are not known yet are left out."""
    parts = [
        f"step {step:,}/{total_steps:,}",
        "" if epoch is None else f"epoch {epoch:.1f}",
        "" if steps_per_second is None else f"{format_rate(steps_per_second)} steps/s",
        "" if tokens_per_second is None else f"{format_rate(tokens_per_second)} tokens/s",
        "" if loss is None else f"loss {loss:.3f}",
    ]
    if steps_per_second and step < total_steps:
        parts.append(f"{format_duration((total_steps - step) / steps_per_second)} left")
    return "  ".join(filter(None, parts))


def table_text(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as lines of text: title, column names, a rule, rows."""
    cells, right = table_cells(columns, rows)
    head = [printable(name) for name in columns]
    widths = [max(len(row[index]) for row in [head, *cells]) for index in range(len(head))]

    def line(row: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join(
        [printable(title), line(head), line(["-" * width for width in widths]), *map(line, cells)]
    )


def table_cells(
    columns: Sequence[str], rows: Iterable[Sequence[object]]
) -> tuple[list[list[str]], list[bool]]:
    """Cells of a table as text, and of each column whether it stands flush right.

    Those do of which every filled cell is a number, and one is filled.
    """
    cells = [[format_cell(value) for value in row] for row in rows]
    filled = [[row[index] for row in cells if row[index]] for index in range(len(columns))]
    return cells, [bool(column) and all(map(_NUMERIC.fullmatch, column)) for column in filled]


def format_cell(value: object) -> str:
    """A table cell: integers as 20,366,312, floats with four significant digits, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, str | bool):
        return printable(str(value)).replace("\n", " ")
    if callable(item := getattr(value, "item", None)):  # numpy scalar
        value = item()
    if isinstance(value, int):
        return format_count(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
    return format_cell(str(value))


def format_count(value: int) -> str:
    """An exact count with thousands separators: 20,366,312."""
    return f"{value:,}"


def format_rate(value: float) -> str:
    """A rate to the precision worth reading: 0.53, 4.1, 41.2, 61,000."""
    if not 1e-3 <= abs(value) < 1e15:
        return f"{value:.2g}"
    digits = (1 if abs(value) < 10 else 2) - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def format_duration(seconds: float) -> str:
    """A time span for a person: 0.4 s, 45 s, 3 min 34 s, 2 h 05 min, 3 d 04 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def printable(text: str) -> str:
    """`text` with control characters shown as ``?``: data may hold what a terminal would act on."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)

"""What a person sees during a run: a live bar and tables on a terminal, quiet plain lines elsewhere."""

import math
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self, SupportsFloat, TextIO

from behrt_jax.tracking.formats import format_cell, is_numeric, printable, progress_text, table_text

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

    @abstractmethod
    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Show a table; columns of numbers stand flush right, integers with thousands separators."""

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

    @abstractmethod
    def close(self) -> None:
        """End the progress display; messages and tables can still follow."""

    @abstractmethod
    def _show_progress(self, text: str) -> None: ...

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
        """Write to `stream`; `clock` gives seconds."""
        super().__init__(clock)
        self._stream = stream

    def log(self, text: str) -> None:
        """Write the text as a line."""
        # A stream with a narrow encoding (ASCII under LANG=C) must not end a run.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = printable(text).encode(encoding, "replace").decode(encoding)
        self._stream.write(line + "\n")
        self._stream.flush()

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write the table in aligned columns, two spaces apart."""
        self.log(table_text(title, columns, rows))

    def close(self) -> None:
        """Nothing to take down."""

    def _show_progress(self, text: str) -> None:
        self.log(text)


class RichConsole(Console):
    """A live progress bar with messages and tables above it, drawn by rich."""

    interval = LIVE_INTERVAL

    def __init__(self, console: "rich.console.Console", clock: Callable[[], float] = time.monotonic) -> None:
        """Draw on `console`; `clock` gives seconds."""
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        super().__init__(clock)
        self._console = console
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=False))
        self._bar = Progress(BarColumn(bar_width=20), text, console=console, refresh_per_second=4)

    def start(self, total_steps: int, start_step: int = 0, steps_per_epoch: float | None = None) -> None:
        """Draw the bar from now on; arguments as in :meth:`Console.start`."""
        super().start(total_steps, start_step, steps_per_epoch)
        self._task = self._bar.add_task("first step (compiling)", total=total_steps, completed=start_step)
        self._bar.start()

    def log(self, text: str) -> None:
        """Print the text above the bar."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print a rich table above the bar."""
        from rich.table import Table
        from rich.text import Text

        cells = [[format_cell(value) for value in row] for row in rows]
        drawn = Table(title=Text(printable(title)), title_justify="left")
        for index, name in enumerate(columns):
            drawn.add_column(Text(printable(name)), justify="right" if is_numeric(cells, index) else "left")
        for row in cells:
            drawn.add_row(*map(Text, row))
        self._console.print(drawn)

    def close(self) -> None:
        """Take the bar's last state and give the terminal back."""
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


class Pace:
    """Steps and tokens per second over the last minute.

    Counting starts at the end of the first call, so that compilation is not in the figures.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
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

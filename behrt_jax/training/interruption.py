"""Stop politely when the user or a scheduler asks for it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interruption:
    """Set by a signal, read between two steps."""

    number: int = 0
    """Number of the signal that came, 0 before."""

    def __bool__(self) -> bool:
        return self.number != 0

    @property
    def name(self) -> str:
        """Name of the signal that came."""
        return signal.Signals(self.number).name if self.number else ""


@contextmanager
def catching_signals() -> Iterator[Interruption]:
    """Turn the first SIGINT or SIGTERM into a flag; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no handlers, the flag is never set.
    """
    interruption = Interruption()

    def remember(number, frame):
        if interruption and number == signal.SIGINT:
            raise KeyboardInterrupt
        interruption.number = number

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, remember)
    except ValueError:
        pass
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

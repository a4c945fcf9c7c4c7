"""How long a run takes from the start of its process to its first finished step."""

import os
import time
from pathlib import Path

_IMPORTED = time.perf_counter()


def process_seconds() -> float:
    """Seconds since this process was started; where the system does not tell, since this import."""
    try:
        # Field 22 of proc(5): clock ticks after boot. The name in parentheses may hold blanks.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.perf_counter() - _IMPORTED


class Startup:
    """Marks on the way to the first step, in seconds since the start of the process."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Note that this is done; the first time counts."""
        self.marks.setdefault(name, round(process_seconds(), 3))

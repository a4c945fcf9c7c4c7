"""How figures, tables and progress read as text."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

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
    parts = [f"step {step:,}/{total_steps:,}"]
    if epoch is not None:
        parts.append(f"epoch {epoch:.1f}")
    if steps_per_second is not None:
        parts.append(f"{format_rate(steps_per_second)} steps/s")
    if tokens_per_second is not None:
        parts.append(f"{format_rate(tokens_per_second)} tokens/s")
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if steps_per_second and step < total_steps:
        parts.append(f"{format_duration((total_steps - step) / steps_per_second)} left")
    return "  ".join(parts)


def table_text(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as lines of text: title, column names, a rule, rows."""
    cells = [[format_cell(value) for value in row] for row in rows]
    head = [printable(name) for name in columns]
    widths = [max(len(row[index]) for row in [head, *cells]) for index in range(len(head))]
    right = [is_numeric(cells, index) for index in range(len(head))]

    def line(row: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join(
        [printable(title), line(head), line(["-" * width for width in widths]), *map(line, cells)]
    )


def format_cell(value: Any) -> str:
    """A table cell: integers as 20,366,312, floats with four significant digits, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, str | bool):
        return printable(str(value)).replace("\n", " ")
    if hasattr(value, "item"):
        value = value.item()  # numpy scalar
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


def is_numeric(cells: Sequence[Sequence[str]], column: int) -> bool:
    """Whether every filled cell of a column is a number, and one is filled."""
    filled = [row[column] for row in cells if row[column]]
    return bool(filled) and all(_NUMERIC.fullmatch(cell) for cell in filled)


def printable(text: str) -> str:
    """`text` with control characters shown as ``?``: data may hold what a terminal would act on."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)

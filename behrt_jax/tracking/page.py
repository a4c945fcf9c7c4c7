"""One HTML page with nothing to load from anywhere else: its tables, pictures and frame."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from behrt_jax.tracking.formats import format_cell, is_numeric

# A browser refuses everything but this page's own pictures and style, whatever the data holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: #555; }
p.verdict { background: #f3f6f9; border-left: 4px solid #0072b2; padding: .7rem 1rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd;
       text-align: left; vertical-align: top; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; height: auto; } details { margin-top: 1rem; } summary { cursor: pointer; }
"""


def html_page(title: str, note: str, sections: Iterable[str]) -> str:
    """The page around its sections, which are HTML; title and note are escaped."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f'<h1>{escape(title)}</h1>\n<p class="note">{escape(note)}</p>',
            *sections,
            "</body>\n</html>\n",
        ]
    )


def html_picture(path: Path, label: str) -> str:
    """A PNG file as an image within the page."""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(label, quote=True)}" src="data:image/png;base64,{content}">'


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table, escaped; columns of numbers stand flush right."""
    cells = [[format_cell(value) for value in row] for row in rows]
    right = [is_numeric(cells, index) for index in range(len(columns))]
    lines = ["<table>"]
    if any(columns):
        lines.append(_row("th", columns, right))
    lines += [_row("td", row, right) for row in cells]
    return "\n".join([*lines, "</table>"])


def _row(tag: str, cells: Sequence[str], right: Sequence[bool]) -> str:
    content = "".join(
        f'<{tag} class="number">{escape(cell)}</{tag}>' if number else f"<{tag}>{escape(cell)}</{tag}>"
        for cell, number in zip(cells, right, strict=True)
    )
    return f"<tr>{content}</tr>"

"""The frame of every report: one HTML page with its own style, which loads nothing and runs no script.

It reads on a screen of any width, light or dark, and on paper: a table that is wider than a phone becomes a
list of its rows there. All text is escaped here; what these functions return is HTML.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from behrt_jax.files import JsonObject
from behrt_jax.tracking.console import format_cell, table_cells

# A browser refuses everything but this page's own pictures and style, whatever the data holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LIGHT = """--ink: #1b2228; --soft: #57636e; --paper: #ffffff; --card: #f5f7f9; --line: #dce2e7;
  --good: #0b7a4b; --doubt: #8a5a00; --bad: #b3261e; --info: #0064a0;"""
_DARK = """--ink: #e4e9ed; --soft: #a2aeb8; --paper: #14191d; --card: #1d2429; --line: #37424b;
  --good: #5bc894; --doubt: #e3ac54; --bad: #ff8f85; --info: #6cbcf0;"""
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ {_DARK} }}
  figure img {{ filter: invert(0.9) hue-rotate(180deg); }}
}}
* {{ box-sizing: border-box; min-width: 0; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 64rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 3rem;
  overflow-wrap: anywhere; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .5rem; }}
p {{ margin: .5rem 0; max-width: 46rem; }} p.note {{ color: var(--soft); white-space: pre-line; }}
ul {{ padding-left: 1.2rem; max-width: 46rem; }}
.verdict {{ font-size: 1.1rem; max-width: none; margin: 1.2rem 0; padding: .9rem 1.1rem; border-radius: 8px;
  background: var(--card); border-left: 6px solid var(--tone); }}
.good {{ --tone: var(--good); }} .doubt, .warning {{ --tone: var(--doubt); }}
.bad, .error {{ --tone: var(--bad); }} .info, .plain {{ --tone: var(--info); }}
dl.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .7rem;
  margin: 0; }}
dl.tiles div {{ background: var(--card); border-radius: 8px; padding: .6rem .8rem; }}
dt {{ color: var(--soft); font-size: .82rem; }} dd {{ margin: 0; font-size: 1.25rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }}
dd small {{ font-size: .82rem; font-weight: 400; color: var(--soft); }}
.pictures {{ display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }}
figure {{ margin: 0; max-width: 46rem; border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }}
img {{ display: block; width: 100%; height: auto; background: #ffffff; }}
article {{ border: 1px solid var(--line); border-left: 6px solid var(--tone); border-radius: 8px;
  padding: .6rem .9rem; margin: .7rem 0; }}
article p {{ max-width: none; margin: .3rem 0; }} article header {{ color: var(--soft); font-size: .88rem; }}
article header b {{ color: var(--tone); text-transform: capitalize; }}
table {{ border-collapse: collapse; max-width: 100%; margin: .5rem 0; }}
th, td {{ padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }}
th {{ color: var(--soft); font-weight: 600; font-size: .88rem; vertical-align: bottom;
  overflow-wrap: break-word; }}
td {{ min-width: 6rem; }} .number {{ text-align: right; font-variant-numeric: tabular-nums; }}
td.number, td.short {{ white-space: nowrap; min-width: 0; }}
code, pre {{ font: .88em/1.5 ui-monospace, monospace; }}
pre {{ white-space: pre-wrap; background: var(--card); border-radius: 8px; padding: .7rem .9rem;
  margin: .5rem 0; }}
details {{ margin: .7rem 0; }} summary {{ cursor: pointer; color: var(--info); }}
@media screen and (max-width: 42rem) {{
  thead {{ display: none; }} table, tbody {{ display: block; }}
  tr {{ display: block; padding: .45rem 0; border-bottom: 1px solid var(--line); }}
  td, td.number, td.short {{ display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: .8rem;
    padding: .1rem 0; border: 0; text-align: right; white-space: normal; }}
  td::before {{ content: attr(data-label); color: var(--soft); text-align: left; }}
  td.long {{ display: block; text-align: left; }} td.long::before {{ content: attr(data-label) ": "; }}
  td:first-child {{ display: block; text-align: left; font-weight: 600; }}
  td:first-child::before {{ content: none; }} td:empty {{ display: none; }}
}}
@media print {{
  body {{ font-size: 10.5pt; max-width: none; padding: 0; }} h2, h3 {{ break-after: avoid; }}
  article, figure, tr, .verdict, dl {{ break-inside: avoid; }}
  .pictures {{ grid-template-columns: 1fr 1fr; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  details table {{ font-size: 8pt; }} details td {{ padding: 0 .8rem 0 0; }}
}}
"""


def html_page(title: str, note: str, parts: Iterable[str]) -> str:
    """The page around its parts, which are HTML; title and note are escaped."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f'<h1>{escape(title)}</h1>\n<p class="note">{escape(note)}</p>',
            *filter(None, parts),
            "</body>\n</html>\n",
        ]
    )


def section(title: str, *parts: str) -> str:
    """Parts under a heading; nothing where all are empty."""
    filled = list(filter(None, parts))
    return "\n".join([f"<h2>{escape(title)}</h2>", *filled]) if filled else ""


def part(title: str, content: str) -> str:
    """Content under a smaller heading; nothing where it is empty."""
    return f"<h3>{escape(title)}</h3>\n{content}" if content else ""


def fold(title: str, content: str) -> str:
    """Content that is hidden until its title is clicked, and printed; nothing where it is empty."""
    return f"<details><summary>{escape(title)}</summary>\n{content}</details>" if content else ""


def text(sentence: str, kind: str = "") -> str:
    """A paragraph; nothing where it is empty. `kind` is a class of the style: ``note``."""
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{escape(sentence)}</p>" if sentence else ""


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences."""
    return "\n".join(["<ul>", *(f"<li>{escape(sentence)}</li>" for sentence in sentences), "</ul>"])


def verbatim(words: str) -> str:
    """Text as it is typed, such as a command; nothing where it is empty."""
    return f"<pre>{escape(words)}</pre>" if words else ""


def verdict_card(sentence: str, tone: str) -> str:
    """What the page says above all, in the colour of a tone: good, doubt, bad or plain."""
    return f'<p class="verdict {tone}">{escape(sentence)}</p>'


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """A few large figures, each a name, a value and its unit; those without a value are left out."""
    shown = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(unit)}</small></dd></div>"
        for name, value, unit in figures
        if value
    ]
    return "\n".join(['<dl class="tiles">', *shown, "</dl>"]) if shown else ""


def cards(findings: Iterable[JsonObject]) -> str:
    """Findings of the doctor (`diagnosis.finding.to_json`) as cards, in the order given."""
    found = []
    for one in findings:
        severity, name, when, seen, why, mend = (
            escape(str(one.get(key, ""))) for key in ("severity", "id", "when", "seen", "why", "mend")
        )
        tone = severity if severity in ("error", "warning") else "info"
        about = " ".join(filter(None, (f"<code>{name}</code>", f"{when} training" if when else "")))
        found.append(
            f'<article class="{tone}"><header><b>{severity}</b> {about}</header>\n<p>{seen}</p>\n'
            f"<p>{why}</p>\n<p><strong>What to do:</strong> {mend}</p></article>"
        )
    return "\n".join(found)


def html_pictures(pictures: Iterable[tuple[str, bytes]]) -> str:
    """PNG pictures, each with a text for who cannot see it, side by side where there is room."""
    shown = []
    for label, content in pictures:
        data = base64.b64encode(content).decode("ascii")
        shown.append(
            f'<figure><img alt="{escape(label, quote=True)}" src="data:image/png;base64,{data}"></figure>'
        )
    return "\n".join(['<div class="pictures">', *shown, "</div>"]) if shown else ""


_SHORT, _LONG = 14, 40
"""Characters up to which the cells of a column are never broken, and from which on each has a line of its own
on a phone."""


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; columns of numbers stand flush right. Nothing where it has no row."""
    cells, right = table_cells(columns, rows)
    if not cells:
        return ""
    longest = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    kinds = [
        "number" if number else "short" if most <= _SHORT else "long" if most > _LONG else ""
        for number, most in zip(right, longest, strict=True)
    ]
    marks = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(columns, marks, strict=True))
    labels = [f' data-label="{escape(name, quote=True)}"' for name in columns]
    lines = ["<table>", f"<thead><tr>{head}</tr></thead>" if any(columns) else "", "<tbody>"]
    for row in cells:
        line = zip(marks, labels, row, strict=True)
        lines.append(
            f"<tr>{''.join(f'<td{mark}{label}>{escape(cell)}</td>' for mark, label, cell in line)}</tr>"
        )
    return "\n".join([*filter(None, lines), "</tbody>", "</table>"])


def setting_text(value: object) -> str:
    """A setting as the text it was written as; of a list, its values one after the other."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "not set" if value is None else format_cell(str(value))

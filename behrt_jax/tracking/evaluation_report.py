"""``report.html`` of an evaluation: words, tables and pictures on one page that loads nothing."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from behrt_jax.tracking.evaluation_tables import evaluation_tables, heading
from behrt_jax.tracking.evaluation_words import plain_words
from behrt_jax.tracking.page import html_page, html_picture, html_table
from behrt_jax.tracking.run_folder import write_text


def write_evaluation_report(
    path: Path, title: str, record: Mapping[str, Any], pictures: Sequence[Path]
) -> None:
    """Write the page; `record` as in metrics.json, `pictures` as they were drawn."""
    first, *words = plain_words(record)
    listed = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in words)
    images = "\n".join(html_picture(picture, picture.stem.replace("_", " ")) for picture in pictures)
    missing = '<p class="note">No pictures were drawn.</p>'
    sections = [
        f'<p class="verdict">{escape(first)}</p>\n<ul>\n{listed}\n</ul>',
        *(f"<h2>{escape(t.title)}</h2>\n{html_table(t.columns, t.rows)}" for t in evaluation_tables(record)),
        f"<h2>Pictures</h2>\n{images or missing}",
    ]
    write_text(path, html_page(title, heading(record), sections))

"""``report.html``: a run folder on one page, with nothing to load from anywhere else."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from behrt_jax import run_folder
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, write_text
from behrt_jax.tracking import summary as outcome
from behrt_jax.tracking.console import format_duration, table_cells
from behrt_jax.tracking.plots import best_validation

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


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table, escaped; columns of numbers stand flush right."""
    cells, right = table_cells(columns, rows)
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


# More rows than this are thinned out in the page; metrics.jsonl has them all.
_HISTORY_ROWS = 100


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from the files of a run folder; returns its path.

    A part whose file is missing, as in a run that is going on or was interrupted, is left out, and
    the page says so.

    Raises:
        InputError: the folder is missing, or one of its files is there but broken.
    """
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}: give the --output of a run.")
    config = _read(folder, run_folder.CONFIG_FILE)
    summary = outcome.Summary(**_read(folder, run_folder.SUMMARY_FILE))
    metrics = run_folder.read_metrics(folder / run_folder.METRICS_FILE)
    parameters = _read(folder, run_folder.PARAMETERS_FILE)
    made_with = config.get("settings", {}).get("name")
    what = f"Pretraining run with the configuration {made_with}" if made_with else "Pretraining run"
    sections = [
        _outcome(summary, metrics),
        _pictures(folder / run_folder.PLOTS_FOLDER),
        _parameters(parameters),
        _history(metrics),
        _settings(config),
    ]
    path = folder / run_folder.REPORT_FILE
    write_text(path, html_page(folder.resolve().name, f"{what}, written by behrt_jax", sections))
    return path


def _read(folder: Path, name: str) -> JsonObject:
    """The object in a JSON file; empty where the run has written none."""
    return run_folder.read_document(folder, name) if run_folder.checked(folder, name).exists() else {}


def _outcome(summary: outcome.Summary, metrics: run_folder.Records) -> str:
    if not summary:
        best = best_validation(metrics)
        reached = f" It got to step {metrics[-1]['step']:,}." if metrics else " It has no metrics yet."
        text = f"This run has no summary: it is going on or was interrupted.{reached}"
        if best:
            text += f" Best validation loss so far: {best['loss']:.3f} nats at step {best['step']:,}."
        return f'<p class="verdict">{text}</p>'
    facts = [f"{summary.get('epochs') or 0:.1f} epochs", f"{summary.get('steps') or 0:,} steps"]
    if (seconds := summary.get("wall_seconds")) is not None:
        facts.append(format_duration(seconds))
    facts.append(f"stopped: {summary.get('stop_reason', 'unknown')}")
    parts = [
        f'<p class="verdict">{escape(outcome.verdict(summary.get("gain_over_unigram")))}</p>',
        f"<p>{escape(', '.join(facts))}</p>",
    ]
    if findings := summary.get("findings"):
        columns = ("severity", "id", "when", "seen", "why", "mend")
        rows = [[str(found.get(column, "")) for column in columns] for found in findings]
        parts.append("<h2>Findings</h2>\n" + html_table(columns, rows))
    if text := outcome.attained(summary):
        parts.append(f"<p>{escape(text)}</p>")
    titles = _at("best", summary.get("best")), _at("last", summary.get("last"))
    parts.append("<h2>Validation</h2>\n" + html_table(*outcome.figure_table(summary, titles)))
    columns, rows = outcome.band_table(summary)
    if rows:
        parts.append("<h3>By frequency of the code in the train split</h3>\n" + html_table(columns, rows))
    if data := summary.get("data"):
        parts.append("<h2>Data</h2>\n" + html_table(("", ""), outcome.flat(data)))
    return "\n".join(parts)


def _at(name: str, record: JsonObject | None) -> str:
    return f"{name} (step {record['step']:,})" if record else name


def _pictures(folder: Path) -> str:
    pictures = sorted(folder.glob("*.png"), key=lambda path: (path.stem != "loss", path.name))
    if not pictures:
        return '<h2>Curves</h2>\n<p class="note">No pictures were drawn.</p>'
    images = [html_picture(path, f"{path.stem} over the epochs") for path in pictures]
    return "<h2>Curves</h2>\n" + "\n".join(images)


def _parameters(parameters: JsonObject) -> str:
    if not parameters:
        return ""
    groups = [(name, count) for name, count in parameters.items() if isinstance(count, dict)]
    rows = [(name, count.get("total"), count.get("trainable")) for name, count in groups]
    rows.append(("all", parameters.get("total"), parameters.get("trainable")))
    shares = [
        f"{name}: {parameters[field]:.1f} %"
        for field, name in (("trainable_percent", "trained"), ("lora_percent", "in adapters"))
        if isinstance(parameters.get(field), int | float)
    ]
    regime = [f"regime: {parameters['regime']}"] if parameters.get("regime") else []
    parts = [
        "<h2>Parameters</h2>",
        f"<p>{escape(', '.join([*regime, *shares]))}</p>",
        html_table(("group", "total", "trained"), rows),
    ]
    if adapters := parameters.get("adapters"):
        columns = ("name", "in", "out", "rank")
        table = html_table(columns, [[adapter.get(column) for column in columns] for adapter in adapters])
        parts.append(f"<details><summary>{len(adapters)} adapters</summary>\n{table}</details>")
    return "\n".join(parts)


def _history(metrics: run_folder.Records) -> str:
    validations = run_folder.of_split(metrics, "tuning")
    if not validations:
        return ""
    every = -(-len(validations) // _HISTORY_ROWS)
    # Counted from the end, so that the last validation is always there.
    shown = validations[::-1][::every][::-1]
    rows = []
    for record in shown:
        figures = [outcome.format_figure(field, record.get(field)) for field, _ in outcome.FIGURES]
        rows.append([f"{record['step']:,}", f"{record.get('epoch') or 0:.2f}", *figures])
    note = f", one in {every} shown" if every > 1 else ""
    table = html_table(("step", "epoch", *(title for _, title in outcome.FIGURES)), rows)
    return f"<details><summary>{len(validations)} validations{note}</summary>\n{table}</details>"


def _settings(config: JsonObject) -> str:
    if not config:
        return '<p class="note">The configuration is missing (config.json).</p>'
    table = html_table(("setting", "value"), outcome.flat(_as_text(config)))
    title = "All settings, versions and devices"
    return f"<h2>Configuration</h2>\n<details><summary>{title}</summary>\n{table}</details>"


def _as_text(settings: Mapping[str, object]) -> dict[str, object]:
    """Nested settings with each value, and each list of values, as the text it was written as."""

    def text(value: object) -> object:
        if isinstance(value, dict):
            return _as_text(value)
        if isinstance(value, list):
            return " ".join(map(str, value)) or "none"
        return "not set" if value is None else str(value)

    return {name: text(value) for name, value in settings.items()}

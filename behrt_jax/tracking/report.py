"""``report.html``: a run folder on one page, with nothing to load from anywhere else."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from behrt_jax import run_folder
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, write_text
from behrt_jax.run_folder import is_number
from behrt_jax.tracking import page
from behrt_jax.tracking import summary as outcome
from behrt_jax.tracking.console import format_duration
from behrt_jax.tracking.page import fold, html_table, section, setting_text
from behrt_jax.tracking.plots import best_validation

# More rows than this are thinned out in the page; metrics.jsonl has them all.
_HISTORY_ROWS = 100


def write_report(folder: Path, plots: Path | None = None, output: Path | None = None) -> Path:
    """Write the report of a run, of pretraining or fine-tuning, from its folder's files; returns its path.

    A part whose file is missing, as in a run that is going on or was interrupted, is left out, and
    the page says so.

    Args:
        folder: of the run.
        plots: folder with its pictures (`plots.plot_curves`); ``plots`` in the folder where not given.
        output: file to write; ``report.html`` in the folder where not given.

    Raises:
        InputError: the folder is missing, or one of its files is there but broken.
    """
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}: give the --output of a run.")
    config = read(folder, run_folder.CONFIG_FILE)
    summary = outcome.Summary(**read(folder, run_folder.SUMMARY_FILE))
    metrics = run_folder.read_metrics(folder / run_folder.METRICS_FILE)
    parameters = read(folder, run_folder.PARAMETERS_FILE)
    settings = config.get("settings", {})
    finetunes = "task" in summary or "task" in settings
    parts = [
        *_outcome(summary, metrics),
        _curves(plots or folder / run_folder.PLOTS_FOLDER, metrics, summary),
        _findings(summary),
        _bands(summary),
        *_learnt(summary),
        _parameters(parameters),
        *_data(summary.get("data") or config.get("data") or {}),
        _history(metrics),
        _settings(config),
        _command(config),
    ]
    kind = "Fine-tuning run" if finetunes else "Pretraining run"
    name = f" with the configuration {settings['name']}" if settings.get("name") else ""
    path = output or folder / run_folder.REPORT_FILE
    note = f"{kind}{name}, written by behrt_jax"
    write_text(path, page.html_page(folder.resolve().name, note, parts))
    return path


def read(folder: Path, name: str) -> JsonObject:
    """The object in a JSON file of a run; empty where the run has written none."""
    return run_folder.read_document(folder, name) if run_folder.checked(folder, name).exists() else {}


def _outcome(summary: outcome.Summary, metrics: run_folder.Records) -> list[str]:
    """The verdict, the main figures, and what explains them."""
    if not summary:
        reached = f" It got to step {metrics[-1]['step']:,}." if metrics else " It has no metrics yet."
        said = f"This run has no summary: it is going on or was interrupted.{reached}"
        if best := best_validation(metrics):
            said += f" Best validation loss so far: {best['loss']:.3f} nats at step {best['step']:,}."
        return [page.verdict_card(said, "plain")]
    best, parameters = summary.get("best") or {}, summary.get("parameters") or {}
    finetunes, seconds = "task" in summary, summary.get("wall_seconds")
    figures = [
        (
            title,
            outcome.figure_text(field, best.get(field), finetunes),
            "nats" if "nats" in full and not finetunes else "",
        )
        for field, full in outcome.FIGURES
        for title in (full.removesuffix(" (nats)").replace("loss", "validation loss"),)
        if field != "accuracy_top5"
    ]
    share = parameters.get("trainable_percent")
    trained = f"{share:.1f} %" if is_number(share) else ""
    took = format_duration(seconds) if is_number(seconds) else ""
    figures += [("parameters trained", trained, ""), ("time", took, "")]
    return [
        page.verdict_card(outcome.headline(summary), outcome.tone(summary)),
        page.tiles(figures),
        page.text(outcome.course(summary) if "stop_reason" in summary else "", "note"),
        *map(page.text, outcome.advice(summary)),
    ]


def _curves(plots: Path, metrics: run_folder.Records, summary: outcome.Summary) -> str:
    files = sorted(plots.glob("*.png"), key=lambda path: (path.stem != "loss", path.name))
    shown = page.html_pictures((f"{file.stem} over the epochs", file.read_bytes()) for file in files)
    missing = "" if shown else page.text("No pictures were drawn.", "note")
    titles = _at("best", summary.get("best")), _at("last", summary.get("last"))
    table = html_table(*outcome.figure_table(summary, titles)) if summary else ""
    members = html_table(*outcome.member_table(summary))
    return section(
        "Curves",
        shown or missing,
        page.part("Baselines" if members else "Validation, beside the baselines", table),
        page.part("Members", members),
    )


def _at(name: str, record: JsonObject | None) -> str:
    return f"{name} (step {record['step']:,})" if record else name


def _findings(summary: outcome.Summary) -> str:
    if "findings" not in summary:
        return ""
    found = page.cards(summary["findings"])
    return section("Findings of the doctor", found or page.text("None.", "note"))


def _bands(summary: outcome.Summary) -> str:
    title = "Accuracy by frequency of the code"
    return section(title, html_table(*outcome.band_table(summary)))


def _learnt(summary: outcome.Summary) -> list[str]:
    """What the model takes for what, which codes lie near one another, and how far adapters went."""
    confusions = [
        (
            _code(one),
            one["masked"],
            f"{one['found']:.0%}",
            _code(one, "instead_"),
            f"{one['instead_share']:.0%}",
        )
        for one in summary.get("confusions") or []
    ]
    columns = ("masked code", "masked", "found", "most often taken for", "how often")
    neighbours = [
        (
            _code(one),
            one["events"],
            "; ".join(
                f"{near.get('description') or near['code']} ({near['cosine']:.2f})" for near in one["near"]
            ),
        )
        for one in summary.get("neighbours") or []
    ]
    norms = [
        (one["name"], one["norm"], f"{one['share']:.1%}" if is_number(one["share"]) else "")
        for one in summary.get("adapter_norms") or []
    ]
    return [
        section(
            "What is taken for what",
            html_table(columns, confusions),
            page.text("Codes of the tuning split that fewer than ten subjects have are left out.", "note")
            if confusions
            else "",
        ),
        section(
            "Neighbours of frequent codes",
            html_table(("code", "train events", "nearest by cosine of the learnt embeddings"), neighbours),
        ),
        section(
            "Size of the adapters",
            html_table(("adapted layer", "norm of what it adds", "of the kernel's norm"), norms),
        ),
    ]


def _code(entry: JsonObject, prefix: str = "") -> str:
    """A code as a person calls it: its description and, beside it, its name."""
    name, description = entry[f"{prefix}code"], entry.get(f"{prefix}description")
    return f"{description} [{name}]" if description else str(name)


def _parameters(parameters: JsonObject) -> str:
    if not parameters:
        return ""
    groups = [(name, count) for name, count in parameters.items() if isinstance(count, dict)]
    rows = [(name, count.get("total"), count.get("trainable")) for name, count in groups]
    rows.append(("all", parameters.get("total"), parameters.get("trainable")))
    shares = [
        f"{name}: {parameters[field]:.1f} %"
        for field, name in (("trainable_percent", "trained"), ("lora_percent", "in adapters"))
        if is_number(parameters.get(field))
    ]
    regime = [f"regime: {parameters['regime']}"] if parameters.get("regime") else []
    adapters, columns = parameters.get("adapters") or [], ("name", "in", "out", "rank")
    table = html_table(columns, [[adapter.get(column) for column in columns] for adapter in adapters])
    return section(
        "Parameters",
        page.text(", ".join([*regime, *shares])),
        html_table(("group", "total", "trained"), rows),
        fold(f"{len(adapters)} adapters", table),
    )


def _data(data: JsonObject) -> list[str]:
    """What went in, and what was left out by which rule."""
    rest = html_table(("count", "value"), outcome.other_counts(data))
    return [
        section("Data", html_table(*outcome.split_table(data)), fold("More counts", rest)),
        section("Kept and left out", html_table(*outcome.rule_table(data))),
    ]


def _history(metrics: run_folder.Records) -> str:
    validations = run_folder.of_split(metrics, "tuning")
    if not validations:
        return ""
    every = -(-len(validations) // _HISTORY_ROWS)
    # Counted from the end, so that the last validation is always there.
    shown = validations[::-1][::every][::-1]
    fields = [
        (field, title)
        for field, title in outcome.FIGURES
        if any(is_number(record.get(field)) for record in shown)
    ]
    rows = []
    for record in shown:
        figures = [outcome.format_figure(field, record.get(field)) for field, _ in fields]
        rows.append([f"{record['step']:,}", f"{record.get('epoch') or 0:.2f}", *figures])
    note = f", one in {every} shown" if every > 1 else ""
    table = html_table(("step", "epoch", *(title for _, title in fields)), rows)
    return section("Course", fold(f"{len(validations)} validations{note}", table))


def _settings(config: JsonObject) -> str:
    """Settings and environment, folded away."""
    if not config:
        return page.text("The configuration is missing (config.json).", "note")
    settings = dict(outcome.flat(as_text(config.get("settings") or {})))
    rest = {name: value for name, value in config.items() if name not in ("settings", "command", "data")}
    return section(
        "Settings and environment",
        fold("All settings", html_table(("setting", "value"), settings.items())),
        fold("Versions, devices and what the doctor goes by", _rows(rest)),
    )


def _rows(values: JsonObject) -> str:
    return html_table(("name", "value"), outcome.flat(as_text(values)))


def as_text(settings: Mapping[str, object]) -> JsonObject:
    """Nested settings with each value, and each list of values, as the text it was written as."""
    return {
        name: as_text(value) if isinstance(value, Mapping) else setting_text(value)
        for name, value in settings.items()
    }


def _command(config: JsonObject) -> str:
    """The command that repeats the run."""
    name, *arguments = config.get("command") or [""]
    if not name:
        return ""
    program = {"__main__.py": ["python", "-m", "behrt_jax"]}.get(name, [name])
    if name.endswith(".py") and name != "__main__.py":
        program = ["python", f"experiments/{name}"]
    return section(
        "To repeat it",
        page.verbatim(shlex.join([*program, *map(str, arguments)])),
        page.text("Give another --output: a folder that holds a run is not written over.", "note"),
    )

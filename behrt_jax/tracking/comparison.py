"""Several runs on one page: their curves in one picture, and where their figures and settings differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from behrt_jax import run_folder
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, write_text
from behrt_jax.run_folder import is_number
from behrt_jax.tracking import page
from behrt_jax.tracking import summary as outcome
from behrt_jax.tracking.console import format_duration
from behrt_jax.tracking.page import html_table, section
from behrt_jax.tracking.plots import best_validation, plot_together
from behrt_jax.tracking.report import as_text, read

_COLUMNS = 5
"""Runs that a table has a column for, each; of more, the values are listed."""
_NOT_COMPARED = ("output", "resume", "name", "tracking", "compilation_cache")
_ABSENT = "not there"


class ComparedRun(NamedTuple):
    """A run beside others."""

    name: str
    config: JsonObject
    summary: outcome.Summary
    metrics: run_folder.Records

    @property
    def best(self) -> JsonObject:
        """The validation of least loss; empty before the first."""
        return self.summary.get("best") or best_validation(self.metrics) or {}

    @property
    def kind(self) -> str:
        """Of the task, empty for pretraining."""
        return str(
            self.summary.get("task") or ("labels" if "task" in self.config.get("settings", {}) else "")
        )


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Read runs, finished or not, under names that tell them apart.

    Raises:
        InputError: a folder holds no run, is named twice, or a file in it is broken.
    """
    runs = []
    whole = [folder.resolve() for folder in folders]
    names = [folder.name for folder in whole]
    for folder, name in zip(whole, names, strict=True):
        if not (folder / run_folder.CONFIG_FILE).is_file():
            raise InputError(
                f"{folder} holds no run ({run_folder.CONFIG_FILE} is not there): give the --output of "
                "pretrain or finetune."
            )
        if whole.count(folder) > 1:
            raise InputError(f"{folder} is named twice: give each run once.")
        longer = f"{folder.parent.name}/{name}" if names.count(name) > 1 else name
        runs.append(
            ComparedRun(
                longer if longer not in [run.name for run in runs] else str(folder),
                read(folder, run_folder.CONFIG_FILE),
                outcome.Summary(**read(folder, run_folder.SUMMARY_FILE)),
                run_folder.read_metrics(folder / run_folder.METRICS_FILE),
            )
        )
    return runs


def write_comparison(runs: Sequence[ComparedRun], plots: Path, output: Path) -> None:
    """Write the page that compares two runs or more.

    Args:
        runs: as they were read.
        plots: folder in which their picture is drawn.
        output: file to write.
    """
    pictures = plot_together({run.name: run.metrics for run in runs}, plots)
    shown = page.html_pictures((f"{path.stem} of each run", path.read_bytes()) for path in pictures)
    columns, rows = figure_table(runs)
    differing = differences(runs)
    parts = [
        page.verdict_card(headline(runs), "plain"),
        *map(page.text, warnings(runs)),
        section("Curves", shown or page.text("No pictures were drawn.", "note")),
        section("Figures", html_table(columns, rows)),
        section(
            "Settings that differ",
            html_table(*setting_table(runs, differing)) or page.text("None.", "note"),
        ),
    ]
    title = f"Comparison of {len(runs)} runs"
    write_text(output, page.html_page(title, ", ".join(run.name for run in runs), parts))


def headline(runs: Sequence[ComparedRun]) -> str:
    """Which run has the least validation loss, where that can be said."""
    if len({run.kind for run in runs}) > 1:
        return "These runs learn different things (masked codes, or labels): their losses cannot be compared."
    known = sorted((run for run in runs if is_number(run.best.get("loss"))), key=lambda run: run.best["loss"])
    if len(known) < 2:
        return "Fewer than two of these runs have a validation: there is nothing to compare yet."
    (first, second), unit = known[:2], "" if known[0].kind else " nats"
    by = second.best["loss"] - first.best["loss"]
    said = f"{first.name} has the least validation loss, {first.best['loss']:.4f}{unit}"
    if by == 0:
        return f"{said}, and so has {second.name}."
    return f"{said}, {by:.4f} below that of {second.name}, the next."


def warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """What to mind when the losses of these runs are compared."""
    said = []
    if len({(run.config.get("data") or {}).get("fingerprint") for run in runs}) > 1:
        said.append(
            "The runs were made on different data: a difference of their losses may come from the data alone."
        )
    validated = {
        (str(settings.get("masking")), (settings.get("train") or {}).get("seed"))
        for settings in (run.config.get("settings") or {} for run in runs)
    }
    if len(validated) > 1 and not any(run.kind for run in runs):
        said.append("The runs are validated on other masked codes each: their seed or their masking differs.")
    widths = [
        (high - low) / 2
        for low, high in (run.summary.get("interval") or (None, None) for run in runs)
        if is_number(low) and is_number(high)
    ]
    if widths:
        said.append(
            f"Chance alone, in who is in the tuning split, moves a loss by up to {max(widths):.3f} nats "
            "(half of a 95 % interval); differences on the same masked codes are surer than that."
        )
    return said


def figure_table(runs: Sequence[ComparedRun]) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of the figures at the best validation, the least loss first."""
    fields = [
        (field, title)
        for field, title in outcome.FIGURES
        if any(is_number(run.best.get(field)) for run in runs)
    ]
    columns = ["run", *(title for _, title in fields), "below the baseline", "best step", "trained", "time"]
    rows = []
    for run in sorted(runs, key=lambda run: run.best.get("loss", float("inf"))):
        gain, seconds = outcome.gain_over_baseline(run.summary), run.summary.get("wall_seconds")
        rows.append(
            [
                run.name,
                *(outcome.figure_text(field, run.best.get(field), bool(run.kind)) for field, _ in fields),
                f"{gain:.4f}" if is_number(gain) else "",
                run.best.get("step"),
                (run.summary.get("parameters") or {}).get("trainable"),
                format_duration(seconds) if is_number(seconds) else "",
            ]
        )
    return columns, rows


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Settings, versions and devices that are not the same in all runs: name -> value in each."""
    known = []
    for run in runs:
        settings = {
            name: value
            for name, value in (run.config.get("settings") or {}).items()
            if name not in _NOT_COMPARED
        }
        environment = {
            "versions": run.config.get("versions") or {},
            "devices": run.config.get("devices"),
            "data fingerprint": str((run.config.get("data") or {}).get("fingerprint"))[:12],
        }
        known.append(dict(outcome.flat(as_text({**settings, **environment}))))
    names = dict.fromkeys(name for values in known for name in values)
    rows = {name: [str(values.get(name, _ABSENT)) for values in known] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def setting_table(
    runs: Sequence[ComparedRun], differing: dict[str, list[str]]
) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of :func:`differences`: a column for each run or, of many, the runs by their value."""
    if len(runs) <= _COLUMNS:
        return ["setting", *(run.name for run in runs)], [
            [name, *values] for name, values in differing.items()
        ]
    rows: list[list[object]] = []
    for name, values in differing.items():
        for value in dict.fromkeys(values):
            having = [run.name for run, own in zip(runs, values, strict=True) if own == value]
            rows.append([name, value, ", ".join(having)])
    return ["setting", "value", "runs"], rows

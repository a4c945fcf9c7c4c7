"""An evaluation as tables, for SUMMARY.txt and the report, and SUMMARY.txt itself."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from behrt_jax.tracking.evaluation_words import MAIN, TITLES, figure_text, plain_words
from behrt_jax.tracking.formats import printable, table_text


class Table(NamedTuple):
    """Title, names of columns, rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def evaluation_tables(record: Mapping[str, Any]) -> list[Table]:
    """All tables of an evaluation, those without a row left out; `record` as in metrics.json."""
    tables = [_figures(record), _over_codes(record), _baselines(record), _differences(record)]
    tables += [_groups(record, name) for name in record["groups"]]
    tables.append(_ensemble(record))
    return [table for table in tables if table.rows]


def summary_text(record: Mapping[str, Any]) -> str:
    """The text of SUMMARY.txt."""
    words = [f"- {sentence}" for sentence in plain_words(record)]
    tables = [table_text(*table) for table in evaluation_tables(record)]
    return printable("\n\n".join([heading(record), "\n".join(words), *tables])) + "\n"


def heading(record: Mapping[str, Any]) -> str:
    """What was evaluated, in two lines or so."""
    counts, task = record["counts"], record["task"]
    size = f"{counts['examples']:,} examples of {counts['subjects']:,} subjects"
    if record["kind"] == "binary":
        share = counts["positives"] / counts["examples"]
        size += (
            f", {counts['positives']:,} positive ({share:.1%}) of {counts['positive_subjects']:,} subjects"
        )
    if record["kind"] == "survival":
        size += f", {counts['events']:,} with an event; median follow-up {counts['median_days']:,.0f} days"
    if record["kind"] == "multilabel":
        size += f", {counts['codes']:,} codes, {counts['codes_per_example']:.2f} an example"
    named = [f"{name} {task[name]}" for name in ("model", "data", "labels", "split") if task.get(name)]
    bootstrap = record["bootstrap"]
    return "\n".join(
        [
            f"Evaluation of {record['kind']} predictions: {size}.",
            *([f"From {', '.join(named)}."] if named else []),
            f"Intervals: 95 %, percentiles of {bootstrap['draws']:,} bootstrap draws of whole subjects (seed "
            f"{bootstrap['seed']}).",
        ]
    )


def _figures(record: Mapping[str, Any]) -> Table:
    rows = [
        (TITLES[name], *(_text(entry[end]) for end in ("value", "low", "high")), entry.get("reason", ""))
        for name, entry in record["model"]["figures"].items()
    ]
    columns = ["figure of the model", "value", "low", "high", "remark"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("Figures", columns, rows)


def _over_codes(record: Mapping[str, Any]) -> Table:
    found = record["model"].get("over_codes") or {}
    names = ("micro_auroc", "micro_average_precision", "macro_auroc", "macro_average_precision")
    rows = [
        (which, *(_text(part[name]) for name in names), part["codes"], part["examples"])
        for which, part in found.items()
    ]
    return Table(
        "Over codes: all pairs together (micro), mean over codes (macro); without intervals",
        ("codes", "micro AUROC", "micro av. precision", "macro AUROC", "macro av. precision",
         "codes with both", "examples with both"),
        rows,
    )  # fmt: skip


def _baselines(record: Mapping[str, Any]) -> Table:
    ran = [baseline for baseline in record["baselines"] if baseline["figures"] is not None]
    if not ran:
        return Table("", (), ())
    names = list(dict.fromkeys(name for b in ran for name in b["model_less_baseline"]))
    names = names or [MAIN[record["kind"]]]
    parts = [("model", record["model"], ""), *((b["name"], b, b["note"]) for b in ran)]
    rows = [(name, *(figure_text(part["figures"][key]) for key in names), note) for name, part, note in parts]
    columns = ("", *(TITLES[name] for name in names), "how")
    return Table("Model and baselines on the same examples", columns, rows)


def _differences(record: Mapping[str, Any]) -> Table:
    rows = [
        (baseline["name"], TITLES[name], figure_text(found), _AHEAD[found["ahead"]])
        for baseline in record["baselines"]
        for name, found in baseline.get("model_less_baseline", {}).items()
    ]
    return Table("Model less baseline, paired", ("baseline", "figure", "difference", "better"), rows)


_AHEAD = {"model": "model", "baseline": "BASELINE", "unclear": "not told apart"}


def _groups(record: Mapping[str, Any], name: str) -> Table:
    groups = record["groups"][name]
    figures = next((group["figures"] for group in groups if group["figures"] is not None), None)
    shown = [key for key in _OF_GROUPS if figures and key in figures] or [MAIN[record["kind"]]]
    cases = {"binary": "positives", "survival": "events"}.get(record["kind"])
    rows = []
    for group in groups:
        counts = group["counts"]
        sizes = (counts["examples"], counts["subjects"], *([counts[cases]] if cases else []))
        texts = [figure_text(group["figures"][key]) if group["figures"] else "" for key in shown]
        rows.append((group["group"], *sizes, *texts, group.get("reason", "")))
    columns = (name, "examples", "subjects", *([cases] if cases else []), *(TITLES[key] for key in shown), "")
    return Table(f"By {name}", columns, rows)


_OF_GROUPS = (
    "auroc",
    "macro_auroc",
    "average_precision",
    "accuracy",
    "mae",
    "spearman",
    "c_index",
    "integrated_brier",
    "prevalence",
    "mean_prediction",
    "recall",
    "specificity",
)


def _ensemble(record: Mapping[str, Any]) -> Table:
    ensemble = record["ensemble"]
    if ensemble is None:
        return Table("", (), ())
    rows = [
        (
            TITLES[name],
            *(_text(part[key]) for key in ("ensemble", "mean_member", "spread", "least", "most")),
            figure_text(part["ensemble_less_mean_member"]) if part["ensemble_less_mean_member"] else "",
        )
        for name, part in ensemble["figures"].items()
    ]
    return Table(
        f"Ensemble of {ensemble['members']} members",
        ("figure", "ensemble", "mean member", "spread (sd)", "least", "most", "ensemble less mean member"),
        rows,
    )


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"

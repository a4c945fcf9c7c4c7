"""``report.html`` of an evaluation: words, tables and pictures on one page that loads nothing."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from behrt_jax.files import write_text
from behrt_jax.tracking.console import printable, table_text
from behrt_jax.tracking.report import html_page, html_picture, html_table

# What an evaluation says, in plain words: how sure, against which baseline, and for whom.

TITLES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "brier": "Brier score",
    "log_loss": "log loss",
    "ece": "calibration error",
    "calibration_slope": "calibration slope",
    "calibration_intercept": "calibration intercept",
    "prevalence": "share of positives",
    "mean_prediction": "mean prediction",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "specificity": "specificity",
    "accuracy": "accuracy",
    "macro_auroc": "AUROC, mean over classes",
    "weighted_auroc": "AUROC, mean by class size",
    "incident_average_precision": "average precision, new codes",
    "incident_auroc": "AUROC, new codes",
    "repeat_average_precision": "average precision, repeats",
    "repeat_auroc": "AUROC, repeats",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "r2": "R2",
    "spearman": "Spearman correlation",
    "c_index": "time-dependent C-index",
    "integrated_brier": "integrated Brier score",
}
MAIN = {
    "binary": "auroc",
    "multiclass": "macro_auroc",
    "multilabel": "average_precision",
    "regression": "mae",
    "survival": "c_index",
}
_WANTED = 100
"""Positives, and negatives, that an evaluation should have at least (Vergouwe et al. 2005, doi
10.1016/j.jclinepi.2004.06.017)."""


def figure_text(entry: Mapping[str, Any] | None) -> str:
    """``0.812 (0.790 to 0.833)``; what is missing is said."""
    if entry is None or entry.get("value") is None:
        return "none"
    if entry.get("low") is None:
        return f"{_number(entry['value'])} (no interval)"
    return f"{_number(entry['value'])} ({_number(entry['low'])} to {_number(entry['high'])})"


def plain_words(record: Mapping[str, Any]) -> list[str]:
    """Sentences on an evaluation, the most important first; `record` is what metrics.json holds."""
    figures = record["model"]["figures"]
    main = figures[MAIN[record["kind"]]]
    title = TITLES[MAIN[record["kind"]]]
    if main["value"] is None:
        said = [f"There is no {title}: {main['reason']}."]
    else:
        said = [f"The model's {title} is {figure_text(main)}; in brackets the 95 % interval."]
    said += [*_size(record), *_against_baselines(record), *_calibration(record), *_benefit(record)]
    return said + _circumstances(record)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _size(record: Mapping[str, Any]) -> list[str]:
    counts = record["counts"]
    if record["kind"] == "binary":
        rest = counts["examples"] - counts["positives"]
        few, name = counts["positives"], f"positive labels of {counts['positive_subjects']:,} subjects"
        if rest < few:
            few, name = rest, "negative labels"
    elif record["kind"] == "survival":
        few, name = counts["events"], f"events of {counts['event_subjects']:,} subjects"
    else:
        few, name = counts["subjects"], "subjects"
    if few >= _WANTED:
        return []
    return [
        f"With {few:,} {name} the intervals are wide, and uncertain themselves: an evaluation should have at "
        f"least {_WANTED}. Take these figures as a check that all works, not as a result."
    ]


def _against_baselines(record: Mapping[str, Any]) -> list[str]:
    if record.get("without_baselines"):
        return [f"No baseline was run: {record['without_baselines']}"]
    main, said = MAIN[record["kind"]], []
    for baseline in record["baselines"]:
        name, differences = baseline["name"], baseline.get("model_less_baseline") or {}
        if baseline["figures"] is None:
            said.append(f"Baseline {name}: {baseline['note']}")
            continue
        if main not in differences:  # nothing is told apart by calibration alone
            continue
        wins = [
            _both(record, baseline, key) for key, found in differences.items() if found["ahead"] == "baseline"
        ]
        found = differences[main]
        if wins:
            said.append(f"THE BASELINE WINS: {name} is better than the model by {'; by '.join(wins)}.")
        if found["ahead"] == "model":
            said.append(f"The model is better than {name} by {_both(record, baseline, main)}.")
        elif found["ahead"] == "unclear":
            leads = {"model": "the model leads", "baseline": "the baseline leads", "equal": "both are equal"}
            why = "no interval" if found["low"] is None else leads[found["better"]]
            both = _both(record, baseline, main)
            said.append(f"The model and {name} are not told apart ({why}) by {both}.")
    return said


def _both(record: Mapping[str, Any], baseline: Mapping[str, Any], name: str) -> str:
    values = (_number(part["figures"][name]["value"]) for part in (record["model"], baseline))
    difference = figure_text(baseline["model_less_baseline"][name])
    return f"{TITLES[name]} (model {' and baseline '.join(values)}, difference {difference})"


def _calibration(record: Mapping[str, Any]) -> list[str]:
    figures = record["model"]["figures"]
    said = []
    slope, intercept = figures.get("calibration_slope"), figures.get("calibration_intercept")
    if slope and slope["low"] is not None and (slope["high"] < 1 or slope["low"] > 1):
        how = "too extreme: risks lie nearer to the mean" if slope["high"] < 1 else "too timid"
        said.append(f"The predictions are {how} (calibration slope {figure_text(slope)}, right is 1).")
    if intercept and intercept["low"] is not None and (intercept["high"] < 0 or intercept["low"] > 0):
        how = "too high" if intercept["high"] < 0 else "too low"
        shares = (
            f"{figures['mean_prediction']['value']:.1%} predicted, {figures['prevalence']['value']:.1%} found"
        )
        said.append(f"On average the predicted risk is {how}: {shares}.")
    return said


def _benefit(record: Mapping[str, Any]) -> list[str]:
    curve = record["model"].get("decision_curve")
    if not curve or record["model"]["curves"] is None:
        return []
    useful = [row["threshold"] for row in curve if row["model"] > max(0.0, row["treat_all"]) + 1e-12]
    if not useful:
        return ["At no threshold is acting on the model better than treating all or nobody (decision curve)."]
    return [
        f"Acting on the model has more net benefit than treating all or nobody at {len(useful)} of the 99 "
        f"thresholds from 1 % to 99 %, between {useful[0]:.0%} and {useful[-1]:.0%} (decision curve)."
    ]


def _circumstances(record: Mapping[str, Any]) -> list[str]:
    task, said = record["task"], []
    split = task.get("split")
    if split in ("train", "tuning", "all"):
        said.append(
            f"These are predictions of the split {split}, which model and baselines were made with: the "
            "figures flatter them. Judge by held_out."
        )
    if task.get("threshold") is not None and record["kind"] == "binary":
        said.append(
            f"F1, precision, recall and specificity are those of the threshold {task['threshold']:.3g}, "
            "settled before."
        )
    counts = task.get("counts") or {}
    for name, text in (
        ("unknown_subjects", "labels are of subjects that the data does not have, and were left out"),
        ("duplicates", "labels came twice and were taken once"),
        ("empty_histories", "examples had no known event and were predicted from the age alone"),
    ):
        if counts.get(name):
            said.append(f"{counts[name]:,} {text}.")
    if record["counts"].get("classes_unknown_to_the_model"):
        unknown = record["counts"]["classes_unknown_to_the_model"]
        said.append(f"{unknown} classes of the labels are unknown to the model: it is always wrong there.")
    if record.get("without_groups"):
        said.append(f"No figures by group: {record['without_groups']}")
    said.append("The figures hold for subjects and records like these; another hospital needs its own.")
    return said


# An evaluation as tables, for SUMMARY.txt and the report, and SUMMARY.txt itself.


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

"""``report.html`` of an evaluation: words, tables and pictures on one page that loads nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from behrt_jax.evaluation import performance
from behrt_jax.evaluation.performance import (
    BaselineRecord,
    EvaluationRecord,
    FigureEntry,
    main_figure,
)
from behrt_jax.evaluation.scores import LEAKAGE_AUROC, LEAKAGE_WORDS, TITLES
from behrt_jax.files import write_text
from behrt_jax.tracking import page
from behrt_jax.tracking.console import printable, table_text

# What an evaluation says, in plain words: how sure, against which baseline, and for whom.

_WANTED = 100
"""Positives, and negatives, that an evaluation should have at least (Vergouwe et al. 2005, doi
10.1016/j.jclinepi.2004.06.017)."""


def figure_text(entry: FigureEntry | None) -> str:
    """``0.812 (0.790 to 0.833)``; what is missing is said."""
    if entry is None or entry["value"] is None:
        return "none"
    if entry["low"] is None:
        return f"{_number(entry['value'])} (no interval)"
    return f"{_number(entry['value'])} ({_number(entry['low'])} to {_number(entry['high'])})"


def plain_words(record: EvaluationRecord) -> list[str]:
    """Sentences on an evaluation, the most important first; `record` is what metrics.json holds."""
    figures = record["model"]["figures"]
    name = main_figure(record["kind"])
    main, title = figures[name], TITLES[name]
    first = f"The model's {title} is {figure_text(main)}; in brackets the 95 % interval."
    if main["value"] is None:
        first = f"There is no {title}: {main.get('reason')}."
    parts = (_leakage, _size, _against_baselines, _calibration, _benefit, _circumstances)
    return [first, *(sentence for part in parts for sentence in part(record))]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if 0 < abs(value) < 0.0005:  # not 0.000, which says that there is none
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _leakage(record: EvaluationRecord) -> list[str]:
    auroc = (record["model"]["figures"].get("auroc") or {}).get("value")
    if auroc is None or auroc < LEAKAGE_AUROC:
        return []
    return [f"SUSPECT LEAKAGE: an AUROC of {auroc:.4f}. {' '.join(LEAKAGE_WORDS)}"]


def _size(record: EvaluationRecord) -> list[str]:
    counts = record["counts"]
    if "positives" in counts:
        rest = counts["examples"] - counts["positives"]
        few, name = counts["positives"], f"positive labels of {counts['positive_subjects']:,} subjects"
        if rest < few:
            few, name = rest, "negative labels"
    elif "events" in counts:
        few, name = counts["events"], f"events of {counts['event_subjects']:,} subjects"
    else:
        few, name = counts["subjects"], "subjects"
    if few >= _WANTED:
        return []
    return [
        f"With {few:,} {name} the intervals are wide, and uncertain themselves: an evaluation should have at "
        f"least {_WANTED}. Take these figures as a check that all works, not as a result."
    ]


def _against_baselines(record: EvaluationRecord) -> list[str]:
    if record["without_baselines"]:
        return [f"No baseline was run: {record['without_baselines']}"]
    main, said = main_figure(record["kind"]), []
    for baseline in record["baselines"]:
        name, differences = baseline["name"], baseline.get("model_less_baseline", {})
        if baseline["figures"] is None:
            said.append(f"Baseline {name}: {baseline['note']}")
            continue
        if main not in differences:  # nothing is told apart by calibration alone
            continue
        lost = [key for key in differences if _ahead(record, baseline, key) == "baseline"]
        if lost:
            by = "; by ".join(_both(record, baseline, key) for key in lost)
            said.append(f"THE BASELINE WINS: {name} is better than the model by {by}.")
        found, by = differences[main], _both(record, baseline, main)
        ahead = _ahead(record, baseline, main)
        if ahead == "model":
            said.append(f"The model is better than {name} by {by}.")
        elif ahead == "unclear":
            leads = {"model": "the model leads", "baseline": "the baseline leads", "equal": "both are equal"}
            why = "no interval" if found["low"] is None else leads[found["better"]]
            said.append(f"The model and {name} are not told apart ({why}) by {by}.")
    return said


_SEEN = 0.0005
"""A difference below it, of errors in units of their own as a share of them, is no victory, however sure."""


def _ahead(record: EvaluationRecord, baseline: BaselineRecord, name: str) -> str:
    """Who is ahead by more than chance, and by more than nothing."""
    difference = baseline.get("model_less_baseline", {})[name]
    values = difference["value"], record["model"]["figures"][name]["value"]
    least = _SEEN * abs(values[1] or 0.0) if name in ("mae", "rmse") else _SEEN
    return difference["ahead"] if values[0] is not None and abs(values[0]) >= least else "unclear"


def _both(record: EvaluationRecord, baseline: BaselineRecord, name: str) -> str:
    of_model, of_baseline = record["model"]["figures"][name], (baseline["figures"] or {})[name]
    difference = figure_text(baseline.get("model_less_baseline", {})[name])
    values = f"model {_number(of_model['value'])} and baseline {_number(of_baseline['value'])}"
    return f"{TITLES[name]} ({values}, difference {difference})"


def _calibration(record: EvaluationRecord) -> list[str]:
    figures, said = record["model"]["figures"], []
    if "calibration_slope" not in figures:
        return []
    slope, intercept = figures["calibration_slope"], figures["calibration_intercept"]
    if side := performance.side_of(slope, 1.0):
        how = "too extreme: risks lie nearer to the mean" if side < 0 else "too timid"
        said.append(f"The predictions are {how} (calibration slope {figure_text(slope)}, right is 1).")
    if side := performance.side_of(intercept, 0.0):
        how = "too high" if side < 0 else "too low"
        predicted, found = (figures[name]["value"] for name in ("mean_prediction", "prevalence"))
        said.append(f"On average the predicted risk is {how}: {predicted:.1%} predicted, {found:.1%} found.")
    return said


def _benefit(record: EvaluationRecord) -> list[str]:
    curve = record["model"].get("decision_curve")
    if not curve or record["model"].get("curves") is None:
        return []
    useful = [row["threshold"] for row in curve if row["model"] > max(0.0, row["treat_all"]) + 1e-12]
    if not useful:
        return ["At no threshold is acting on the model better than treating all or nobody (decision curve)."]
    return [
        f"Acting on the model has more net benefit than treating all or nobody at {len(useful)} of the 99 "
        f"thresholds from 1 % to 99 %, between {useful[0]:.0%} and {useful[-1]:.0%} (decision curve)."
    ]


def _circumstances(record: EvaluationRecord) -> list[str]:
    task, said = record["task"], []
    if (split := task.get("split")) in ("train", "tuning", "all"):
        said.append(
            f"These are predictions of the split {split}, which model and baselines were made with: the "
            "figures flatter them. Judge by held_out."
        )
    threshold = task.get("threshold")
    if threshold is not None and "positives" in record["counts"]:
        said.append(
            f"F1, precision, recall and specificity are those of the threshold {threshold:.3g}, "
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
    if unknown := record["counts"].get("classes_unknown_to_the_model"):
        said.append(f"{unknown} classes of the labels are unknown to the model: it is always wrong there.")
    if record["without_groups"]:
        said.append(f"No figures by group: {record['without_groups']}")
    said.append("The figures hold for subjects and records like these; another hospital needs its own.")
    return said


# An evaluation as tables, for SUMMARY.txt and the report, and SUMMARY.txt itself.


class Table(NamedTuple):
    """Title, names of columns, rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def evaluation_tables(record: EvaluationRecord) -> list[Table]:
    """All tables of an evaluation, those without a row left out; `record` as in metrics.json."""
    tables = [_figures(record), _over_codes(record), _baselines(record), _differences(record)]
    tables += [_groups(record, name) for name in record["groups"]]
    tables.append(_ensemble(record))
    return [table for table in tables if table.rows]


def summary_text(record: EvaluationRecord) -> str:
    """The text of SUMMARY.txt."""
    words = [f"- {sentence}" for sentence in plain_words(record)]
    tables = [table_text(*table) for table in evaluation_tables(record)]
    return printable("\n\n".join([heading(record), "\n".join(words), *tables])) + "\n"


def heading(record: EvaluationRecord) -> str:
    """What was evaluated, in two lines or so."""
    counts, task = record["counts"], record["task"]
    size = f"{counts['examples']:,} examples of {counts['subjects']:,} subjects"
    if "positives" in counts:
        share, subjects = counts["positives"] / counts["examples"], counts["positive_subjects"]
        size += f", {counts['positives']:,} positive ({share:.1%}) of {subjects:,} subjects"
    if "events" in counts:
        size += f", {counts['events']:,} with an event; median follow-up {counts['median_days']:,.0f} days"
    if "codes" in counts:
        size += f", {counts['codes']:,} codes, {counts['codes_per_example']:.2f} an example"
    named = [f"{name} {task.get(name)}" for name in ("model", "data", "labels", "split") if task.get(name)]
    draws, seed = record["bootstrap"]["draws"], record["bootstrap"]["seed"]
    lines = [f"Evaluation of {record['kind']} predictions: {size}."]
    lines += [f"From {', '.join(named)}."] if named else []
    lines.append(
        f"Intervals: 95 %, percentiles of {draws:,} bootstrap draws of whole subjects (seed {seed})."
    )
    return "\n".join(lines)


def _figures(record: EvaluationRecord) -> Table:
    rows = [
        (TITLES[name], *(_number(entry[end]) for end in ("value", "low", "high")), entry.get("reason", ""))
        for name, entry in record["model"]["figures"].items()
    ]
    columns = ["figure of the model", "value", "low", "high", "remark"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("Figures", columns, rows)


def _over_codes(record: EvaluationRecord) -> Table:
    found = record["model"].get("over_codes") or {}
    names = ("micro_auroc", "micro_average_precision", "macro_auroc", "macro_average_precision")
    rows = [
        (which, *(_number(part[name]) for name in names), part["codes"], part["examples"])
        for which, part in found.items()
    ]
    columns = ("codes", "micro AUROC", "micro av. precision", "macro AUROC", "macro av. precision")
    title = "Over codes: all pairs together (micro), mean over codes (macro); without intervals"
    return Table(title, (*columns, "codes with both", "examples with both"), rows)


def _baselines(record: EvaluationRecord) -> Table:
    ran = [baseline for baseline in record["baselines"] if baseline["figures"] is not None]
    if not ran:
        return Table("", (), ())
    names = list(dict.fromkeys(name for b in ran for name in b.get("model_less_baseline", ())))
    names = names or [main_figure(record["kind"])]
    parts = [("model", record["model"], ""), *((b["name"], b, b["note"]) for b in ran)]
    rows = [(name, *(figure_text(part["figures"][key]) for key in names), note) for name, part, note in parts]
    columns = ("", *(TITLES[name] for name in names), "how")
    return Table("Model and baselines on the same examples", columns, rows)


def _differences(record: EvaluationRecord) -> Table:
    rows = [
        (baseline["name"], TITLES[name], figure_text(found), _AHEAD[_ahead(record, baseline, name)])
        for baseline in record["baselines"]
        for name, found in baseline.get("model_less_baseline", {}).items()
    ]
    return Table("Model less baseline, paired", ("baseline", "figure", "difference", "better"), rows)


_AHEAD = {"model": "model", "baseline": "BASELINE", "unclear": "not told apart"}


def _groups(record: EvaluationRecord, name: str) -> Table:
    groups = record["groups"][name]
    figures = next((group["figures"] for group in groups if group["figures"] is not None), None)
    of_groups = performance.assessment_of(record["kind"]).of_groups
    shown = [key for key in of_groups if figures and key in figures] or [main_figure(record["kind"])]
    cases = next((key for key in ("positives", "events") if key in record["counts"]), None)
    rows = []
    for group in groups:
        counts = group["counts"]
        sizes = (counts["examples"], counts["subjects"], *([counts[cases]] if cases else []))
        texts = [figure_text(group["figures"][key]) if group["figures"] else "" for key in shown]
        rows.append((group["group"], *sizes, *texts, group.get("reason", "")))
    columns = (name, "examples", "subjects", *([cases] if cases else []), *(TITLES[key] for key in shown), "")
    return Table(f"By {name}", columns, rows)


def _ensemble(record: EvaluationRecord) -> Table:
    ensemble = record["ensemble"]
    if ensemble is None:
        return Table("", (), ())
    rows = [
        (
            TITLES[name],
            *(_number(part[key]) for key in ("ensemble", "mean_member", "spread", "least", "most")),
            figure_text(part["ensemble_less_mean_member"]) if part["ensemble_less_mean_member"] else "",
        )
        for name, part in ensemble["figures"].items()
    ]
    columns = (
        "figure",
        "ensemble",
        "mean member",
        "spread (sd)",
        "least",
        "most",
        "ensemble less mean member",
    )
    return Table(f"Ensemble of {ensemble['members']} members", columns, rows)


def write_evaluation_report(
    path: Path, title: str, record: EvaluationRecord, pictures: Sequence[Path]
) -> None:
    """Write the page; `record` as in metrics.json, `pictures` as they were drawn."""
    words = plain_words(record)[1:]
    pictures_of = ((picture.stem.replace("_", " "), picture.read_bytes()) for picture in pictures)
    missing = "" if pictures else page.text("No pictures were drawn.", "note")
    parts = [
        page.verdict_card(*verdict(record)),
        page.bullets(words),
        page.section("Pictures", page.html_pictures(pictures_of), missing),
        *(page.section(t.title, page.html_table(t.columns, t.rows)) for t in evaluation_tables(record)),
    ]
    write_text(path, page.html_page(title, heading(record), parts))


def verdict(record: EvaluationRecord) -> tuple[str, str]:
    """The main figure, and how the model stands beside the baselines by it; and the tone of that: ``good``
    where it is better than each, and there are enough labels to tell.
    """
    first, main = plain_words(record)[0], main_figure(record["kind"])
    if record["model"]["figures"][main]["value"] is None or _leakage(record):
        return first, "bad"
    compared = [one for one in record["baselines"] if main in one.get("model_less_baseline", {})]
    ahead = {one["name"]: _ahead(record, one, main) for one in compared}
    if not ahead:
        return f"{first} No baseline was run beside it.", "plain"
    better, alike = ([name for name in ahead if ahead[name] == word] for word in ("baseline", "unclear"))
    if better:
        return f"{first} By it THE BASELINE WINS: {', '.join(better)}.", "doubt"
    if alike:
        return f"{first} By it the model is not told apart from {', '.join(alike)}.", "doubt"
    return f"{first} By it the model is better than each baseline.", "plain" if _size(record) else "good"

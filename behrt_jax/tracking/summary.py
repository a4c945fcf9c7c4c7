"""Outcome of a run: as ``summary.json``, and as text and tables for a person."""

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import TypeAlias, TypedDict

from behrt_jax.data.events import SPLITS
from behrt_jax.files import JsonObject
from behrt_jax.run_folder import Records, is_number, of_split
from behrt_jax.tracking.console import format_cell, format_duration, table_text

SMALL_GAIN = 0.01
"""Nats; a gain this small is within what another seed would change."""

FIGURES = (
    ("loss", "loss (nats)"),
    ("perplexity", "perplexity"),
    ("accuracy", "top-1 accuracy"),
    ("accuracy_top5", "top-5 accuracy"),
    ("accuracy_top10", "top-10 accuracy"),
    ("auroc", "AUROC"),
)
"""Figures of a record or a baseline, with their names for a person."""

BASELINES = {
    "unigram": "unigram baseline",
    "co-occurrence": "co-occurrence baseline",
    "oracle": "best possible",
    "oracle without sex": "best without sex",
    "oracle without year": "best without year",
    "oracle without gaps": "best without gaps",
    "prevalence": "prevalence",
    "base rate": "base rate",
    "count model": "count model",
}
"""Predictors that a run is compared with, with their names for a person."""


def aurocs(figures: JsonObject) -> list[tuple[str, float | None]]:
    """AUROC of questions by horizon, in the order of the figures: ``AUROC 365 days`` and its value."""
    named = (name for name in figures if name.startswith("auroc_") and name.endswith("_days"))
    return [(f"AUROC {name.split('_')[1]} days", figures[name]) for name in named]


Baselines: TypeAlias = Mapping[str, JsonObject]
"""Figures by the name of the baseline: ``unigram`` predicts by train frequency, and others."""


class Summary(TypedDict, total=False):
    """Content of summary.json; a run of an older version, or one that was interrupted, has not all of it."""

    best_step: int | None
    """Step of the best validation; None where the run stopped before the first."""
    best: JsonObject | None
    """Validation record at the best step."""
    last: JsonObject | None
    """Validation record at the last validation."""
    last_train: JsonObject | None
    """The last training record."""
    epochs: float
    steps: int
    stop_reason: str
    """Why the run ended, as a clause for a person."""
    wall_seconds: float
    """Time that the run took, all its parts together."""
    baselines: Baselines
    gain_over_unigram: float | None
    """Unigram loss less best validation loss in nats (positive is good); None where either is unknown, as in
    a run on questions: theirs is ``gain_over_prevalence``."""
    gain_over_prevalence: float | None
    data: JsonObject
    """What went in, counted; nothing about single subjects."""
    parameters: JsonObject
    """The parameter report without its list of adapters."""
    findings: list[JsonObject]
    """Of the doctor."""
    init_vectors: JsonObject
    """Coverage of `init.vectors`, see `weights.code_vectors.FirstRows`."""
    interval: list[float]
    """This and the next four: see `evaluation.masked_codes.assess`."""
    bands: list[JsonObject]
    gaps: dict[str, dict[str, float]]
    oracle_gap: dict[str, float]
    share_of_attainable_gain: float | None
    confusions: list[JsonObject]
    """This and the next: see `evaluation.learned`."""
    neighbours: list[JsonObject]
    adapter_norms: list[JsonObject]
    """See `training.telemetry.adapter_norms`."""
    task: str
    """Of a fine-tuning run, as the next ones: the kind of its task."""
    calibration: JsonObject | None
    blend: JsonObject
    """Share of the count model in the predictions, and their figures on tuning."""
    population: JsonObject
    members: list[JsonObject]
    predicting_members: list[int]
    out_of_fold: JsonObject
    first_step_seconds: float
    startup_seconds: dict[str, float]
    startup_processor_seconds: dict[str, float]
    startup_programs: dict[str, dict[str, float]]
    """Marks of `training.runtime.Startup`."""


def summarise(
    metrics: Records,
    baselines: Baselines,
    best_step: int | None,
    stop_reason: str,
    wall_seconds: float,
    data: JsonObject,
    parameters: JsonObject,
) -> Summary:
    """The figures of a run that ended, from the records of its ``metrics.jsonl``; no findings yet."""
    validations = [_without_split(record) for record in of_split(metrics, "tuning")]
    trainings = [_without_split(record) for record in of_split(metrics, "train")]
    best = next((record for record in validations if record["step"] == best_step), None)
    found: Summary = {
        "best_step": best_step,
        "best": best,
        "last": validations[-1] if validations else None,
        "last_train": trainings[-1] if trainings else None,
        "epochs": max((record.get("epoch") or 0.0 for record in metrics), default=0.0),
        "steps": max((record["step"] for record in metrics), default=0),
        "stop_reason": stop_reason,
        "wall_seconds": wall_seconds,
        "baselines": baselines,
        "gain_over_unigram": gain_over("unigram", best, baselines),
        "data": data,
        "parameters": {key: value for key, value in parameters.items() if key != "adapters"},
        "findings": [],
    }
    if "prevalence" in baselines:
        found["gain_over_prevalence"] = gain_over("prevalence", best, baselines)
    return found


def _without_split(record: JsonObject) -> JsonObject:
    return {key: value for key, value in record.items() if key != "split"}


def gain_over(baseline: str, record: JsonObject | None, baselines: Baselines) -> float | None:
    """The baseline's loss less the record's, in nats; None where either is missing or not finite."""
    theirs, loss = (baselines.get(baseline) or {}).get("loss"), (record or {}).get("loss")
    return theirs - loss if is_number(theirs) and is_number(loss) else None


def verdict(gain: float | None) -> str:
    """Meaning of the gain over the unigram baseline (nats), for a person."""
    if gain is None:
        return "There is no validation loss to compare with the unigram baseline yet."
    mend = (
        "Train longer, try another learning rate, and see that embeddings and head are trained and that the "
        "data has something to learn."
    )
    if gain <= 0:
        return (
            f"The validation loss is NOT below the unigram baseline: it is {abs(gain):.3f} nats above it. "
            f"The model predicts masked codes no better than their frequencies do: it is of no use yet. "
            f"{mend}"
        )
    if gain < SMALL_GAIN:
        return (
            f"The validation loss is only just below the unigram baseline, by {gain:.4f} nats: another "
            "seed could turn that around. The model has hardly learned more than how frequent each code "
            f"is. {mend}"
        )
    return (
        f"The validation loss is below the unigram baseline by {gain:.3f} nats: the model predicts masked "
        f"codes better than their frequencies do (perplexity {math.exp(min(gain, 700.0)):.3g} times lower)."
    )


def headline(summary: Summary) -> str:
    """What a run has learnt beside its baselines, and whether the doctor found errors, in one sentence."""
    findings = summary.get("findings") or []
    counts = dict.fromkeys(("error", "warning"), 0)
    for found in findings:
        if found.get("severity") in counts:
            counts[found["severity"]] += 1
    told = [f"{count or 'no'} {name}{'' if count == 1 else 's'}" for name, count in counts.items()]
    learnt = _learnt_labels(summary) if "task" in summary else _learnt_codes(summary)
    if "gain_over_prevalence" in summary:
        learnt = _learnt_answers(summary)
    return f"{learnt}; the doctor found {' and '.join(told)}."


def tone(summary: Summary) -> str:
    """``good``, ``doubt`` or ``bad``: how a run turned out, the word for its headline's colour."""
    severities = {found.get("severity") for found in summary.get("findings") or []}
    gain = gain_over_baseline(summary)
    if "error" in severities or gain is None or gain <= 0:
        return "bad"
    return "doubt" if "warning" in severities or gain < SMALL_GAIN else "good"


def gain_over_baseline(summary: Summary) -> float | None:
    """Nats by which the best validation loss is below that of the simplest baseline; None where unknown.

    That is the unigram baseline, of questions the prevalence, and of a fine-tuning run the base rate. Of
    several members the best counts.
    """
    if "gain_over_prevalence" in summary:
        return summary["gain_over_prevalence"]
    if "task" not in summary:
        return summary.get("gain_over_unigram")
    gains = [
        row["base_rate_loss"] - row["loss"]
        for row in summary.get("members") or []
        if is_number(row.get("loss")) and is_number(row.get("base_rate_loss"))
    ]
    base, best = _loss_of(summary, "base rate"), (summary.get("best") or {}).get("loss")
    if is_number(base) and is_number(best):
        gains.append(base - best)
    return max(gains, default=None)


def _loss_of(summary: Summary, baseline: str) -> object:
    return ((summary.get("baselines") or {}).get(baseline) or {}).get("loss")


def _learnt_codes(summary: Summary) -> str:
    gain, best = summary.get("gain_over_unigram"), summary.get("best")
    if gain is None or best is None:
        return "There is no validation loss to compare with the unigram baseline yet"
    loss, by = best["loss"], f"{abs(gain):.3f} nats"
    if gain <= 0:
        return (
            f"The model has learnt nothing of use yet: its validation loss, {loss:.3f} nats, is NOT below "
            f"the unigram baseline, which knows only how frequent each code is, but {by} above it"
        )
    if gain < SMALL_GAIN:
        return (
            f"The model has hardly learnt more than how frequent each code is: its validation loss, "
            f"{loss:.3f} nats, is only just below the unigram baseline, by {gain:.4f} nats"
        )
    said = (
        f"The model predicts masked codes better than their frequencies do: its validation loss, {loss:.3f} "
        f"nats, is below the unigram baseline by {by}"
    )
    share = summary.get("share_of_attainable_gain")
    if share is not None:
        said += f", {share:.1%} of what is possible"
    return said + _beside(summary, "co-occurrence", "a table of codes that occur together")


def _learnt_answers(summary: Summary) -> str:
    gain, best = summary.get("gain_over_prevalence"), summary.get("best")
    if gain is None or best is None:
        return "There is no validation loss to compare with the prevalence of the answers yet"
    loss, by = best["loss"], f"{abs(gain):.4f} nats"
    common = "the prevalence, which knows only how common each code is,"
    if gain <= 0:
        return (
            f"The model has learnt nothing of use yet: its validation loss, {loss:.4f} nats, is NOT below "
            f"that of {common} but {by} above it"
        )
    told = ", ".join(f"{value:.3f} ({name[6:]})" for name, value in aurocs(best) if is_number(value))
    return (
        f"The model answers questions about the future better than {common} does: its validation loss, "
        f"{loss:.4f} nats, is {by} below{f'; AUROC {told}' if told else ''}"
    )


def _learnt_labels(summary: Summary) -> str:
    if members := summary.get("members"):
        losses = [row for row in members if is_number(row.get("loss"))]
        ahead = sum(row["loss"] < row["base_rate_loss"] for row in losses)
        said = f"{ahead} of {len(members)} members have learnt more than the base rate"
        if losses:
            best = min(losses, key=lambda row: row["loss"])
            said += f", {best['member']} has the least validation loss, {best['loss']:.4f}"
        return said
    best, base = summary.get("best"), _loss_of(summary, "base rate")
    if best is None or not is_number(base):
        return "There is no validation yet"
    loss = best["loss"]
    if loss >= base:
        return (
            f"The model has learnt nothing of use: its validation loss, {loss:.4f}, is NOT below that of the "
            f"base rate, {base:.4f}"
        )
    auroc = f" (AUROC {best['auroc']:.3f})" if is_number(best.get("auroc")) else ""
    return (
        f"The model has learnt from the labels: its validation loss, {loss:.4f}{auroc}, is below that of the "
        f"base rate, {base:.4f}" + _beside(summary, "count model", "a model on counts of codes")
    )


def _beside(summary: Summary, baseline: str, name: str) -> str:
    """A clause that says how the model stands beside a baseline whose loss was compared in pairs."""
    gap, loss = (summary.get("gaps") or {}).get(baseline), _loss_of(summary, baseline)
    if not gap or not is_number(loss) or not (is_number(gap["low"]) and is_number(gap["high"])):
        return ""
    if gap["high"] < 0:
        return f", and below that of {name} ({loss:.3f})"
    if gap["low"] > 0:
        return f", but above that of {name} ({loss:.3f})"
    return f", and not told apart from that of {name} ({loss:.3f})"


def course(summary: Summary) -> str:
    """How long a run went on, and why it stopped."""
    facts = []
    if "epochs" in summary or "steps" in summary:
        facts = [f"{summary.get('epochs') or 0:.1f} epochs", f"{summary.get('steps') or 0:,} steps"]
    if is_number(seconds := summary.get("wall_seconds")):
        facts.append(format_duration(seconds))
    reason = summary.get("stop_reason")
    stopped = f" Stopped: {reason.rstrip('.')}." if reason else ""
    return f"{', '.join(facts)}.{stopped}" if facts else stopped.strip()


def summary_text(summary: Summary, config_name: str) -> str:
    """``SUMMARY.txt``: the summary for a person, in plain ASCII, ending with a newline."""
    task = f" ({summary['task']})" if "task" in summary else ""
    title = f"{'Fine-tuning' if task else 'Pretraining'} run: {config_name}{task}"
    parts = [f"{title}\n{'=' * len(title)}", _wrap(headline(summary)), course(summary)]
    parts += [_wrap(sentence) for sentence in advice(summary)]
    columns, rows = figure_table(summary, ("best", "last"))
    if rows:
        best = summary.get("best")
        where = f" (best step {best['step']:,}, epoch {best['epoch']:.1f})" if best else ""
        parts.append(
            table_text(f"{'Baselines' if 'members' in summary else 'Validation'}{where}", columns, rows)
        )
    columns, rows = member_table(summary)
    if rows:
        parts.append(table_text("Members", columns, rows))
    if findings := summary.get("findings"):
        parts.append("Findings:\n" + "\n".join(_wrap(f"- {_finding_text(found)}") for found in findings))
    columns, rows = band_table(summary)
    if rows:
        parts.append(table_text("By frequency of the code in the train split", columns, rows))
    parameters = summary.get("parameters") or {}
    if "total" in parameters and "trainable" in parameters:
        parts.append(
            f"Parameters: {parameters['trainable']:,} trained of {parameters['total']:,}"
            f" ({parameters.get('trainable_percent', math.nan):.1f} %)."
        )
    data = summary.get("data") or {}
    for name, (columns, rows) in (("Data", split_table(data)), ("Kept and left out", rule_table(data))):
        if rows:
            parts.append(table_text(name, columns, rows))
    if rest := other_counts(data):
        parts.append("Counts\n" + "\n".join(f"  {name}: {format_cell(value)}" for name, value in rest))
    return "\n\n".join(filter(None, parts)).encode("ascii", "replace").decode("ascii") + "\n"


def advice(summary: Summary) -> list[str]:
    """Sentences that explain the headline, or say what comes next."""
    if "task" not in summary:
        gain = summary.get("gain_over_unigram")
        poor = verdict(gain) if gain is not None and gain < SMALL_GAIN else ""
        return [sentence for sentence in (poor, attained(summary)) if sentence]
    said = []
    if calibration := summary.get("calibration"):
        fitted = [f"{name} {value:.4g}" for name, value in calibration.items() if is_number(value)]
        said.append(f"Fitted on the tuning split: {', '.join(fitted)}.")
    if blend := summary.get("blend"):
        said.append(f"Predictions are blended with {blend['share']:.0%} of the count model: {_two(blend)}.")
    if crossed := summary.get("out_of_fold"):
        said.append(f"Cross-validated on the train split: {_two(crossed)}.")
    chosen, members = summary.get("predicting_members"), summary.get("members") or []
    if chosen is not None and members:
        said.append(f"Predicts: {', '.join(members[place]['member'] for place in chosen)}.")
    if (summary.get("population") or {}).get("vary") == "task":
        said.append("Each member predicts its own task: give behrt-jax predict its folder in members/.")
    best, base = gain_over_baseline(summary), summary.get("findings") or ()
    if best is not None and best > 0 and not any(found.get("severity") == "error" for found in base):
        said.append(
            "How good the model is, behrt-jax predict and evaluate tell on the held_out split, beside simple "
            "baselines."
        )
    elif best is not None and best <= 0:
        said.append("Try another learning rate, more epochs or more labels.")
    return said


def _two(figures: JsonObject) -> str:
    shown = [f"{name} {figures[name]:.4f}" for name in ("loss", "auroc") if is_number(figures.get(name))]
    return ", ".join(shown)


def _finding_text(found: JsonObject) -> str:
    parts = (str(found.get(key, "")) for key in ("seen", "why", "mend"))
    return f"{str(found.get('severity', '')).upper()} {found.get('id', '')}: {' '.join(parts)}"


def figure_table(summary: Summary, titles: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """Figures of the best and the last validation beside those of the baselines, as text.

    Returns:
        Column titles, those given for the best and the last, and the rows of figures that any column has.
    """
    baselines, finetunes = summary.get("baselines") or {}, "task" in summary
    columns, records = ["", *titles], [summary.get("best"), summary.get("last")]
    if summary.get("members"):  # each has its own
        columns, records = [""], []
    for name, title in BASELINES.items():
        figures = dict(baselines.get(name) or {})
        if not figures and (finetunes or name != "unigram" or "prevalence" in baselines):
            continue
        if figures.get("loss") is not None and not finetunes and "prevalence" not in baselines:
            figures.setdefault("perplexity", math.exp(min(figures["loss"], 700.0)))
        columns.append(title)
        records.append(figures)
    rows = [
        [
            "loss" if finetunes and field == "loss" else title,
            *(figure_text(field, (record or {}).get(field), finetunes) for record in records),
        ]
        for field, title in (*FIGURES, *_of_horizons(summary))
    ]
    return columns, [row for row in rows if any(row[1:])]


def _of_horizons(summary: Summary) -> list[tuple[str, str]]:
    """Figures of questions, with their names for a person."""
    horizons = [(f"auroc_{name.split()[1]}_days", name) for name, _ in aurocs(summary.get("best") or {})]
    return [("question_loss", "loss of questions"), ("mlm_loss", "loss of masked codes"), *horizons]


def figure_text(field: str, value: object, finetunes: bool) -> str:
    """A figure of a run as text: of fine-tuning, with four decimals where it is a loss or an AUROC."""
    return _four(value) if finetunes and field in ("loss", "auroc") else format_figure(field, value)


def attained(summary: Summary) -> str:
    """Distance from the best possible loss, for a person; empty where that is not known."""
    share, gap = summary.get("share_of_attainable_gain"), summary.get("oracle_gap")
    if share is None or not gap:
        return ""
    return (
        f"Of the gain over the unigram baseline that is possible at all, {share:.1%} was attained: the "
        f"loss is {gap['nats']:.4f} nats above the best possible (95 % interval {gap['low']:.4f} to "
        f"{gap['high']:.4f})."
    )


def band_table(summary: Summary) -> tuple[tuple[str, ...], list[list[object]]]:
    """Columns and rows of loss and accuracy by how frequent a code is; no rows where they are unknown."""
    columns = ("rank of the code", "masked", "loss", "top-1", "top-10", "unigram loss", "unigram top-1")
    fields = ("loss", "accuracy", "accuracy_top10")
    rows = [
        [
            band["band"],
            band["targets"],
            *(format_figure(field, band[field]) for field in fields),
            *(format_figure(field, band[f"unigram_{field}"]) for field in fields[:2]),
        ]
        for band in summary.get("bands") or []
    ]
    return columns, rows


def member_table(summary: Summary) -> tuple[tuple[str, ...], list[list[object]]]:
    """Columns and rows of the members of a population; no rows where a run has none."""
    fields = ("loss", "base_rate_loss", "auroc")
    columns = ("member", "best step", "tuning loss", "of the base rate", "tuning AUROC")
    members = summary.get("members") or []
    return columns, [
        [row["member"], row["best_step"], *(_four(row.get(field)) for field in fields)] for row in members
    ]


def _four(value: object) -> str:
    return f"{value:.4f}" if is_number(value) else ""


# What went in: of a pretraining run `data.sequences.describe`, of fine-tuning the counts of its labels.

_SPLIT_COLUMNS = {
    "positive": "positive labels",
    "empty_histories": "empty histories",
    "lengths.p50": "median length",
    "lengths.p90": "90 % length",
    "lengths.p99": "99 % length",
    "lengths.max": "longest",
}
_RULES = {"events_dropped": "dropped", "events_changed": "changed"}
_WHOLE = {"events_read": "read", "events_kept": "kept"}


def split_table(data: JsonObject) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of the counts of each split; no rows where they are unknown."""
    found = data.get("splits")
    found = found if isinstance(found, dict) else {name: data.get(name) for name in SPLITS}
    splits = {name: dict(flat(part)) for name, part in found.items() if isinstance(part, dict)}
    fields = list(dict.fromkeys(name for part in splits.values() for name in part))
    if all(part.get("tokens") == part.get("events") for part in splits.values()):
        fields = [field for field in fields if field != "tokens"]
    columns = ["split", *(_SPLIT_COLUMNS.get(field, field) for field in fields)]
    return columns, [[name, *(part.get(field) for field in fields)] for name, part in splits.items()]


def rule_table(data: JsonObject) -> tuple[tuple[str, ...], list[list[object]]]:
    """Columns and rows of the events that were read, kept, dropped or changed, and by which rule."""
    rows: list[list[object]] = []
    if "events_read" in data:
        rows.append(["read", data["events_read"]])
    for name, said in _RULES.items():
        if isinstance(data.get(name), dict):
            rows += [[f"{said}: {rule}", count] for rule, count in data[name].items()]
    if "events_kept" in data:
        rows.append(["kept", data["events_kept"]])
    without = data.get("subjects_without_events")
    if isinstance(without, dict):
        rows += [[f"subjects of {name} left without events", n] for name, n in without.items() if n]
    return ("rule", "events"), rows


def other_counts(data: JsonObject) -> list[tuple[str, object]]:
    """(dotted name, value) of what is in neither table; counts of nothing, and lists, are left out."""
    told = {*_RULES, *_WHOLE, "splits", "subjects_without_events"}
    told |= {name for name in SPLITS if isinstance(data.get(name), dict)}
    rest = {name: value for name, value in data.items() if name not in told}
    return [(name, value) for name, value in flat(rest) if value not in (0, None) or name.startswith("ages")]


def format_figure(field: str, value: object) -> str:
    """A figure of :data:`FIGURES` as text: losses and AUROC with 3 decimals, accuracies in percent."""
    if not is_number(value):
        return ""
    if field.startswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:.3f}" if field in ("loss", "auroc") else format_cell(float(value))


def flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every single value in a nested dict; lists are left out."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{key}", value


def _wrap(text: str, width: int = 88) -> str:
    return textwrap.fill(text, width, subsequent_indent="  " if text.startswith("- ") else "")

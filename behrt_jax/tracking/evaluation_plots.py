"""Pictures of an evaluation: reliability, ROC, precision and recall, decision curve, survival, comparison."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from behrt_jax.evaluation.performance import BaselineRecord, EvaluationRecord, ModelRecord, main_figure
from behrt_jax.evaluation.scores import TITLES
from behrt_jax.tracking.plots import draw_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/).
MODEL_COLOUR = "#0072B2"
GROUP_COLOUR = "#56B4E9"
_BASELINE_COLOURS = {
    "prevalence": "#999999",
    "mean": "#999999",
    "Kaplan-Meier": "#999999",
    "logistic regression": "#D55E00",
    "linear regression": "#D55E00",
    "gradient boosting": "#009E73",
    "codes seen before": "#E69F00",
}
GREY = "#555555"
RECALL = "recall (sensitivity)"


def colour_of(baseline: str) -> str:
    """The colour of a baseline, by its name."""
    return _BASELINE_COLOURS.get(baseline, "#CC79A7")


def plot_evaluation(record: EvaluationRecord, folder: Path) -> list[Path]:
    """Draw what the record of metrics.json has into `folder`, which is made where it is missing.

    Returns the pictures drawn; none where matplotlib is not installed.
    """
    sizes = {name: size for name, (size, _) in _PICTURES.items()}
    sizes["comparison"] = (6.8, 1.2 + 0.28 * len(_compared(record)))
    return draw_pictures(folder, sizes, lambda axes, name: _PICTURES[name][1](axes, record))


def draw_roc(axes: "Axes", record: EvaluationRecord) -> bool:
    """Recall against false positive rate, model and baselines."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="chance (0.500)")
    if not _draw_curves(axes, record, "false_positive_rate", "recall", "auroc"):
        return False
    _name(axes, "ROC curve (area in brackets)", "false positive rate (1 - specificity)", RECALL)
    axes.legend(frameon=False, fontsize=8, loc="lower right", reverse=True)
    return True


def draw_precision_recall(axes: "Axes", record: EvaluationRecord) -> bool:
    """Precision against recall, model and baselines."""
    share = _share(record)
    axes.axhline(share, color=GREY, linestyle="--", linewidth=1, label=f"share of positives ({share:.3f})")
    if not _draw_curves(axes, record, "recall", "precision", "average_precision", steps=True):
        return False
    axes.set_ylim(0, 1.02)
    title = "Precision and recall (average precision in brackets)"
    _name(axes, title, RECALL, "precision (positive predictive value)")
    axes.legend(frameon=False, fontsize=8, loc="best", reverse=True)
    return True


def _draw_curves(
    axes: "Axes", record: EvaluationRecord, x: str, y: str, figure: str, steps: bool = False
) -> bool:
    drawn, style = _with_curves(record), "steps-pre" if steps else "default"
    for name, part, colour in reversed(drawn):
        curves, width = part.get("curves") or {}, 1.8 if name == "model" else 1.2
        label = f"{name} ({(part['figures'] or {})[figure]['value']:.3f})"
        axes.plot(curves[x], curves[y], color=colour, linewidth=width, label=label, drawstyle=style)
    axes.set_xlim(-0.01, 1.01)
    return bool(drawn)


def draw_reliability(axes: "Axes", record: EvaluationRecord) -> bool:
    """Mean prediction against share of positives (or mean label) in each bin."""
    bins = record["model"].get("reliability")
    if not bins:
        return False
    predicted, observed = [row["predicted"] for row in bins], [row["observed"] for row in bins]
    below = [max(0.0, row["observed"] - row["low"]) for row in bins]
    above = [max(0.0, row["high"] - row["observed"]) for row in bins]
    ends = predicted + [row["low"] for row in bins] + [row["high"] for row in bins]
    low, high = min(ends), max(ends)
    names = "mean prediction", "mean label"
    if "positives" in record["counts"]:
        low, high = 0.0, min(1.0, 1.05 * high)
        names = "mean predicted probability", "share of positives"
    axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1, label="perfect")
    axes.errorbar(
        predicted, observed, yerr=[below, above], color=MODEL_COLOUR, marker="o", markersize=5, capsize=2,
        linewidth=1.2, label="model, ten bins of (nearly) equal size, 95 % interval",
    )  # fmt: skip
    _name(axes, "Reliability", *names)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return True


def draw_decision_curve(axes: "Axes", record: EvaluationRecord) -> bool:
    """Net benefit against threshold probability, model and baselines."""
    curve, drawn = record["model"].get("decision_curve"), _with_curves(record)
    if not curve or not drawn:
        return False
    thresholds = [row["threshold"] for row in curve]
    axes.axhline(0, color=GREY, linestyle=":", linewidth=1.2, label="treat nobody")
    everyone = [row["treat_all"] for row in curve]
    axes.plot(thresholds, everyone, color=GREY, linestyle="--", linewidth=1, label="treat all")
    for name, part, colour in reversed(drawn):
        benefit = [row["model"] for row in part.get("decision_curve", ())]
        axes.plot(thresholds, benefit, color=colour, linewidth=1.8 if name == "model" else 1.2, label=name)
    share = _share(record)
    axes.set_ylim(-0.25 * share, 1.1 * share)
    useful = [row["threshold"] for row in curve if abs(row["model"]) > 1e-4]
    axes.set_xlim(0, min(1.0, max([*useful, share]) + 0.05))
    _name(axes, "Decision curve", "threshold probability", "net benefit (true positives an example)")
    axes.legend(frameon=False, fontsize=8, loc="upper right", reverse=True)
    return True


def _share(record: EvaluationRecord) -> float:
    entry = record["model"]["figures"].get("prevalence")
    return (entry["value"] if entry else None) or 0.0


def _with_curves(record: EvaluationRecord) -> list[tuple[str, ModelRecord | BaselineRecord, str]]:
    """Name, record and colour of the model and of baselines that tell subjects apart; none without curves."""
    if not record["model"].get("curves"):
        return []
    found: list[tuple[str, ModelRecord | BaselineRecord, str]] = [("model", record["model"], MODEL_COLOUR)]
    for one in record["baselines"]:
        if one.get("curves") and one["name"] != "prevalence":
            found.append((one["name"], one, colour_of(one["name"])))
    return found


def draw_survival(axes: "Axes", record: EvaluationRecord) -> bool:
    """Predicted and observed survival over days."""
    rows = record["model"].get("by_edge")
    if not rows:
        return False
    days, predicted = [0.0, *(row["days"] for row in rows)], [1.0, *(row["predicted"] for row in rows)]
    axes.plot(days, predicted, color=MODEL_COLOUR, marker="o", label="mean prediction")
    known = [(row["days"], row["observed"]) for row in rows if row["observed"] is not None]
    days, observed = zip((0.0, 1.0), *known, strict=True)
    label = "observed (Kaplan-Meier)"
    axes.plot(days, observed, color=GREY, linestyle="--", marker="s", label=label)
    axes.set_ylim(0, 1.02)
    _name(axes, "Survival", "days from the prediction time", "share without an event")
    axes.legend(frameon=False, fontsize=8)
    return True


def draw_comparison(axes: "Axes", record: EvaluationRecord) -> bool:
    """The main figure of the model, the baselines and the groups."""
    rows = _compared(record)
    if len(rows) < 2:
        return False
    for place, (_, value, ends, colour) in enumerate(rows):
        if ends:
            axes.plot(ends, [place, place], color=colour, linewidth=2)
        axes.plot(value, place, "o", color=colour, markersize=6)
    axes.axvline(rows[0][1], color=MODEL_COLOUR, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    title = TITLES[main_figure(record["kind"])]
    heading = f"{title[0].upper()}{title[1:]} of model, baselines and groups"
    _name(axes, heading, f"{title}, with 95 % interval")
    return True


def _compared(record: EvaluationRecord) -> list[tuple[str, float, list[float], str]]:
    """Name, main figure, its interval and colour of the model, the baselines and the groups that have one."""
    parts = [("model", record["model"]["figures"], MODEL_COLOUR)]
    parts += [(b["name"], b["figures"], colour_of(b["name"])) for b in record["baselines"]]
    parts += [
        (f"{which} {group['group']}", group["figures"], GROUP_COLOUR)
        for which, groups in record["groups"].items()
        for group in groups
    ]
    name = main_figure(record["kind"])
    entries = [(label, figures[name], colour) for label, figures, colour in parts if figures]
    found = [
        (label, entry["value"], [end for end in (entry["low"], entry["high"]) if end is not None], colour)
        for label, entry, colour in entries
        if entry["value"] is not None
    ]
    return found if found and found[0][0] == "model" else []


def _name(axes: "Axes", title: str, x: str, y: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


_PICTURES: dict[str, tuple[tuple[float, float], Callable[["Axes", EvaluationRecord], bool]]] = {
    "roc": ((5.4, 5.0), draw_roc),
    "precision_recall": ((5.4, 5.0), draw_precision_recall),
    "reliability": ((5.4, 5.0), draw_reliability),
    "decision_curve": ((6.4, 4.4), draw_decision_curve),
    "survival": ((6.4, 4.4), draw_survival),
    "comparison": ((6.8, 1.2), draw_comparison),
}
"""Width and height in inches, and what draws the picture where there is anything to draw."""

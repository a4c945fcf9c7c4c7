"""Pictures of an evaluation: reliability, ROC, precision and recall, decision curve, comparison."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behrt_jax.tracking.evaluation_report import MAIN, TITLES
from behrt_jax.tracking.plots import DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Curves of predicted probabilities: reliability, ROC, precision and recall, net benefit.

MODEL_COLOUR = "#0072B2"
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/).
_OTHERS = {
    "prevalence": "#999999",
    "mean": "#999999",
    "Kaplan-Meier": "#999999",
    "logistic regression": "#D55E00",
    "linear regression": "#D55E00",
    "gradient boosting": "#009E73",
    "codes seen before": "#E69F00",
}
GREY = "#555555"


def colour_of(baseline: str) -> str:
    """The colour of a baseline, by its name."""
    return _OTHERS.get(baseline, "#CC79A7")


def draw_reliability(axes: "Axes", record: Mapping[str, Any]) -> bool:
    """Mean prediction against share of positives (or mean label) in each bin."""
    bins = record["model"].get("reliability")
    if not bins:
        return False
    predicted, observed = ([row[key] for row in bins] for key in ("predicted", "observed"))
    below = [max(0.0, row["observed"] - row["low"]) for row in bins]
    above = [max(0.0, row["high"] - row["observed"]) for row in bins]
    ends = predicted + [row["low"] for row in bins] + [row["high"] for row in bins]
    low, high = min(ends), max(ends)
    if record["kind"] == "binary":
        low, high = 0.0, min(1.0, 1.05 * high)
    axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1, label="perfect")
    axes.errorbar(
        predicted, observed, yerr=[below, above], color=MODEL_COLOUR, marker="o", markersize=5, capsize=2,
        linewidth=1.2, label="model, ten bins of (nearly) equal size, 95 % interval",
    )  # fmt: skip
    binary = record["kind"] == "binary"
    axes.set_xlabel("mean predicted probability" if binary else "mean prediction")
    axes.set_ylabel("share of positives" if binary else "mean label")
    axes.set_title("Reliability", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return True


def draw_roc(axes: "Axes", record: Mapping[str, Any]) -> bool:
    """Recall against false positive rate, model and baselines."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="chance (0.500)")
    if not _curves(axes, record, "false_positive_rate", "recall", "auroc"):
        return False
    axes.set_xlabel("false positive rate (1 - specificity)")
    axes.set_ylabel("recall (sensitivity)")
    axes.set_title("ROC curve (area in brackets)", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="lower right", reverse=True)
    return True


def draw_precision_recall(axes: "Axes", record: Mapping[str, Any]) -> bool:
    """Precision against recall, model and baselines."""
    if record["kind"] != "binary":
        return False
    share = record["model"]["figures"]["prevalence"]["value"]
    axes.axhline(share, color=GREY, linestyle="--", linewidth=1, label=f"share of positives ({share:.3f})")
    if not _curves(axes, record, "recall", "precision", "average_precision", drawstyle="steps-pre"):
        return False
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("recall (sensitivity)")
    axes.set_ylabel("precision (positive predictive value)")
    axes.set_title("Precision and recall (average precision in brackets)", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="best", reverse=True)
    return True


def _curves(axes: "Axes", record: Mapping[str, Any], x: str, y: str, figure: str, **options: Any) -> bool:
    if not record["model"].get("curves"):
        return False
    parts = [("model", record["model"], MODEL_COLOUR), *_drawn_baselines(record)]
    for name, part, colour in reversed(parts):
        label = f"{name} ({part['figures'][figure]['value']:.3f})"
        width = 1.8 if name == "model" else 1.2
        axes.plot(part["curves"][x], part["curves"][y], color=colour, linewidth=width, label=label, **options)
    axes.set_xlim(-0.01, 1.01)
    return True


def draw_decision_curve(axes: "Axes", record: Mapping[str, Any]) -> bool:
    """Net benefit against threshold probability, model and baselines."""
    curve = record["model"].get("decision_curve")
    if not curve or not record["model"].get("curves"):
        return False
    thresholds = [row["threshold"] for row in curve]
    axes.axhline(0, color=GREY, linestyle=":", linewidth=1.2, label="treat nobody")
    everyone = [row["treat_all"] for row in curve]
    axes.plot(thresholds, everyone, color=GREY, linestyle="--", linewidth=1, label="treat all")
    parts = [("model", record["model"], MODEL_COLOUR), *_drawn_baselines(record)]
    for name, part, colour in reversed(parts):
        benefit = [row["model"] for row in part["decision_curve"]]
        axes.plot(thresholds, benefit, color=colour, linewidth=1.8 if name == "model" else 1.2, label=name)
    share = record["model"]["figures"]["prevalence"]["value"]
    axes.set_ylim(-0.25 * share, 1.1 * share)
    useful = [row["threshold"] for row in curve if abs(row["model"]) > 1e-4]
    axes.set_xlim(0, min(1.0, max([*useful, share]) + 0.05))
    axes.set_xlabel("threshold probability")
    axes.set_ylabel("net benefit (true positives an example)")
    axes.set_title("Decision curve", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper right", reverse=True)
    return True


def _drawn_baselines(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """Those whose predictions differ between subjects."""
    return [
        (baseline["name"], baseline, colour_of(baseline["name"]))
        for baseline in record["baselines"]
        if baseline.get("curves") and baseline["name"] != "prevalence"
    ]


def plot_evaluation(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the record of metrics.json has into `folder`, which is made where it is missing.

    Returns the pictures drawn; none where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []

    drawn = []
    for name, (size, draw) in _PICTURES.items():
        rows = len(_compared(record)) if name == "comparison" else 0
        figure = Figure(figsize=(size[0], size[1] + 0.28 * rows), layout="constrained")
        FigureCanvasAgg(figure)  # no display and no global state
        axes = figure.add_subplot()
        if not draw(axes, record):
            continue
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        drawn.append(path)
    return drawn


def _draw_survival(axes: "Axes", record: Mapping[str, Any]) -> bool:
    rows = record["model"].get("by_edge")
    if not rows:
        return False
    days = [0.0, *(row["days"] for row in rows)]
    axes.plot(
        days,
        [1.0, *(row["predicted"] for row in rows)],
        color=MODEL_COLOUR,
        marker="o",
        label="mean prediction",
    )
    known = [row for row in rows if row["observed"] is not None]
    observed = [1.0, *(row["observed"] for row in known)]
    label = "observed (Kaplan-Meier)"
    axes.plot(
        [0.0, *(row["days"] for row in known)], observed, color=GREY, linestyle="--", marker="s", label=label
    )
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("days from the prediction time")
    axes.set_ylabel("share without an event")
    axes.set_title("Survival", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    return True


def _draw_comparison(axes: "Axes", record: Mapping[str, Any]) -> bool:
    rows = _compared(record)
    if len(rows) < 2:
        return False
    for place, (_, entry, colour) in enumerate(rows):
        if entry["low"] is not None:
            axes.plot([entry["low"], entry["high"]], [place, place], color=colour, linewidth=2)
        axes.plot(entry["value"], place, "o", color=colour, markersize=6)
    axes.axvline(rows[0][1]["value"], color=MODEL_COLOUR, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    title = TITLES[MAIN[record["kind"]]]
    axes.set_xlabel(f"{title}, with 95 % interval")
    axes.set_title(f"{title[0].upper()}{title[1:]} of model, baselines and groups", loc="left", fontsize=11)
    return True


def _compared(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """Name, main figure and colour of the model, the baselines and the groups that have one."""
    name = MAIN[record["kind"]]
    parts = [("model", record["model"], MODEL_COLOUR)]
    parts += [(b["name"], b, colour_of(b["name"])) for b in record["baselines"]]
    parts += [
        (f"{which} {group['group']}", group, "#56B4E9")
        for which, groups in record["groups"].items()
        for group in groups
    ]
    found = [(label, part["figures"][name], colour) for label, part, colour in parts if part["figures"]]
    found = [row for row in found if row[1]["value"] is not None]
    return found if found and found[0][0] == "model" else []


_PICTURES: dict[str, tuple[tuple[float, float], Callable[["Axes", Mapping[str, Any]], bool]]] = {
    "roc": ((5.4, 5.0), draw_roc),
    "precision_recall": ((5.4, 5.0), draw_precision_recall),
    "reliability": ((5.4, 5.0), draw_reliability),
    "decision_curve": ((6.4, 4.4), draw_decision_curve),
    "survival": ((6.4, 4.4), _draw_survival),
    "comparison": ((6.8, 1.2), _draw_comparison),
}

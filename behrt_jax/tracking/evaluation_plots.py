"""Pictures of an evaluation: reliability, ROC, precision and recall, decision curve, comparison."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behrt_jax.tracking.evaluation_curves import (
    GREY,
    MODEL_COLOUR,
    colour_of,
    draw_decision_curve,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
)
from behrt_jax.tracking.evaluation_words import MAIN, TITLES
from behrt_jax.tracking.plots import DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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

"""Pictures of a run: loss and accuracy over the epochs, beside the baselines and the known optimum."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from behrt_jax.files import JsonObject
from behrt_jax.run_folder import Records, is_number, of_split
from behrt_jax.tracking.summary import BASELINES, Baselines

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Okabe and Ito's colours, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/).
TRAIN_COLOUR = "#0072B2"
VALIDATION_COLOUR = "#D55E00"
BASELINE_COLOUR = "#555555"
ORACLE_COLOUR = "#009E73"
CURVES = {"train": ("train", TRAIN_COLOUR, 1.2), "tuning": ("validation", VALIDATION_COLOUR, 1.8)}
"""Label, colour and width of the curves of each split."""
DPI = 150


def plot_curves(metrics: Records, baselines: Baselines, folder: Path) -> list[Path]:
    """Draw ``loss.png`` and ``accuracy.png`` into `folder`, which is made where it is missing.

    `metrics` are the records of ``metrics.jsonl``: `split` is ``train`` or ``tuning``, losses are in
    nats, accuracies are shares in [0, 1]. `baselines` maps ``unigram``, ``co-occurrence`` and, where the
    optimum is known, ``oracle`` to the same figures. The best epoch is the one of least validation
    loss. Figures that are missing or null leave a gap, and a picture without any is not drawn.

    Returns the pictures drawn; none where matplotlib is not installed.
    """
    best = best_validation(metrics)

    def draw(axes: "Axes", name: str) -> bool:
        if not (_draw_loss if name == "loss" else _draw_accuracy)(axes, metrics, baselines, best):
            return False
        axes.set_xlabel("epoch (passes over the training subjects)")
        axes.set_xlim(left=0)
        # Below the axes, where it hides no curve.
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        return True

    return draw_pictures(folder, dict.fromkeys(("loss", "accuracy"), (7.2, 4.8)), draw)


def draw_pictures(
    folder: Path, sizes: Mapping[str, tuple[float, float]], draw: Callable[["Axes", str], bool]
) -> list[Path]:
    """Draw pictures of some names and sizes (inches) into `folder`, which is made where it is missing.

    `draw` is given axes and a name; where it says False there is nothing to draw. Returns the pictures
    drawn; none where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []

    drawn = []
    for name, size in sizes.items():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # no display and no global state
        axes = figure.add_subplot()
        if draw(axes, name):
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            folder.mkdir(parents=True, exist_ok=True)
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=DPI, metadata={"Software": None})
    return drawn


def best_validation(metrics: Records) -> JsonObject | None:
    """The validation record of least loss, the earliest of equals; None where no loss is finite."""
    found = [record for record in _with_epoch(metrics, "tuning") if is_number(record.get("loss"))]
    return min(found, key=lambda record: record["loss"], default=None)


def _draw_loss(axes: "Axes", metrics: Records, baselines: Baselines, best: JsonObject | None) -> bool:
    curves = [_curve(axes, metrics, split, "loss") for split in CURVES]
    for which, style in (("unigram", "--"), ("co-occurrence", ":"), ("oracle", "-.")):
        _baseline(axes, baselines, which, "loss", style)
    if best is not None:
        _mark_best(axes, best, "loss", f"best validation: {best['loss']:.3f} at epoch {best['epoch']:.4g}")
    axes.set_ylabel("loss (nats per masked code)")
    axes.set_title("Masked-code loss", loc="left", fontsize=11)
    return any(curves)


def _draw_accuracy(axes: "Axes", metrics: Records, baselines: Baselines, best: JsonObject | None) -> bool:
    from matplotlib.ticker import PercentFormatter

    curves = []
    # The legend has two columns: first all of top-1, then all of top-10.
    for field, name, alpha, style in (
        ("accuracy", ", top-1", 1.0, "--"),
        ("accuracy_top10", ", top-10", 0.45, ":"),
    ):
        curves += [_curve(axes, metrics, split, field, name, alpha) for split in CURVES]
        for which in ("unigram", "oracle"):
            _baseline(axes, baselines, which, field, style, name)
        if best is not None and is_number(best.get(field)):
            label = f"{best[field]:.1%} at epoch {best['epoch']:.4g} (least validation loss)"
            _mark_best(axes, best, field, label)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("masked codes found (%)")
    axes.set_title("Masked-code accuracy", loc="left", fontsize=11)
    return any(curves)


def _curve(
    axes: "Axes", metrics: Records, split: str, field: str, name: str = "", alpha: float | None = None
) -> bool:
    """Draw one figure of one split over the epochs; False where there is nothing to draw."""
    points = [(record["epoch"], record.get(field)) for record in _with_epoch(metrics, split)]
    heights = [value if is_number(value) else math.nan for _, value in points]
    if all(map(math.isnan, heights)):
        return False
    label, colour, width = CURVES[split]
    marker = "." if len(points) <= 30 else None  # a lone point has no line
    style = {"marker": marker, "color": colour, "linewidth": width, "alpha": alpha}
    axes.plot([epoch for epoch, _ in points], heights, label=label + name, **style)
    return True


def _baseline(axes: "Axes", baselines: Baselines, which: str, field: str, style: str, name: str = "") -> None:
    value = (baselines.get(which) or {}).get(field)
    if is_number(value):
        colour = ORACLE_COLOUR if which == "oracle" else BASELINE_COLOUR
        axes.axhline(value, color=colour, linestyle=style, linewidth=1.2, label=BASELINES[which] + name)


def _mark_best(axes: "Axes", best: JsonObject, field: str, label: str) -> None:
    style = {"markersize": 8, "markerfacecolor": "none", "markeredgecolor": VALIDATION_COLOUR}
    axes.plot(best["epoch"], best[field], "o", markeredgewidth=1.8, label=label, zorder=5, **style)


def _with_epoch(metrics: Records, split: str) -> list[JsonObject]:
    return [record for record in of_split(metrics, split) if is_number(record.get("epoch"))]

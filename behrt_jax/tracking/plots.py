"""Pictures of a run: loss and accuracy over the epochs, beside the baselines and the known optimum."""

import math
from collections.abc import Callable, Mapping, Sequence
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
# The rest of that palette, for curves of one kind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
STYLES = ("-", "--", ":", "-.")
DPI = 180
SIZE = (5.6, 4.3)
"""Inches; two stand side by side on a wide page, and letters can still be read where one fills a phone."""


def plot_curves(
    metrics: Records, baselines: Baselines, folder: Path, members: Sequence[str] = ()
) -> list[Path]:
    """Draw ``loss.png`` and ``accuracy.png`` (of labels ``auroc.png``) into `folder`, which is made where it
    is missing.

    `metrics` are the records of ``metrics.jsonl``: `split` is ``train`` or ``tuning``, losses are in
    nats, accuracies are shares in [0, 1]. `baselines` maps names in `summary.BASELINES` to the same figures;
    of fine-tuning, ``base rate`` is one of them. The best epoch is the one of least validation loss.
    `members` are the names of a population's, whose losses the records have beside their mean. Figures that
    are missing or null leave a gap, and a picture without any is not drawn.

    Returns the pictures drawn; none where matplotlib is not installed.
    """
    best = best_validation(metrics)
    pictures = {"loss": _draw_loss, "accuracy": _draw_accuracy}
    if "base rate" in baselines:
        pictures = {"loss": _draw_task_loss, "auroc": _draw_auroc}

    def draw(axes: "Axes", name: str) -> bool:
        drawn = pictures[name](axes, metrics, baselines, best)
        if name == "loss" and members:
            drawn = _draw_members(axes, metrics, members) or drawn
        if not drawn:
            return False
        axes.set_xlabel("epoch (passes over the training subjects)")
        axes.set_xlim(left=0)
        # Below the axes, where it hides no curve.
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return True

    return draw_pictures(folder, dict.fromkeys(pictures, SIZE), draw)


def plot_together(runs: Mapping[str, Records], folder: Path) -> list[Path]:
    """Draw the validation losses of several runs, by their names, as ``loss.png`` in `folder`."""

    def draw(axes: "Axes", name: str) -> bool:
        drawn = False
        for number, (run, metrics) in enumerate(runs.items()):
            points = _with_epoch(metrics, "tuning")
            heights = [one["loss"] if is_number(one.get("loss")) else math.nan for one in points]
            if all(map(math.isnan, heights)):
                continue
            colour, line = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
            style = {"color": colour, "linestyle": line, "marker": "." if len(points) <= 30 else None}
            axes.plot([one["epoch"] for one in points], heights, label=run, **style)
            drawn = True
        if not drawn:
            return False
        axes.set_xlabel("epoch (passes over the training subjects)")
        axes.set_ylabel("validation loss")
        axes.set_title("Validation loss of each run", loc="left", fontsize=11)
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return True

    return draw_pictures(folder, {"loss": SIZE}, draw)


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
    for which, style in (("unigram", "--"), ("prevalence", "--"), ("co-occurrence", ":"), ("oracle", "-.")):
        _baseline(axes, baselines, which, "loss", style)
    if best is not None:
        _mark_best(axes, best, "loss", f"best validation: {best['loss']:.3f} at epoch {best['epoch']:.4g}")
    asked = "prevalence" in baselines
    axes.set_ylabel("loss (nats per question)" if asked else "loss (nats per masked code)")
    axes.set_title("Loss of questions" if asked else "Masked-code loss", loc="left", fontsize=11)
    return any(curves)


def _draw_task_loss(axes: "Axes", metrics: Records, baselines: Baselines, best: JsonObject | None) -> bool:
    members = any("members" in record for record in metrics)  # of which the records have the mean
    curves = [_curve(axes, metrics, split, "loss", ", mean" if members else "") for split in CURVES]
    for which, style in (("base rate", "--"), ("count model", ":")):
        _baseline(axes, baselines, which, "loss", style)
    if best is not None and not members:
        _mark_best(axes, best, "loss", f"best validation: {best['loss']:.3f} at epoch {best['epoch']:.4g}")
    axes.set_ylabel("loss per example")
    axes.set_title("Loss on the labels", loc="left", fontsize=11)
    return any(curves)


def _draw_auroc(axes: "Axes", metrics: Records, baselines: Baselines, best: JsonObject | None) -> bool:
    drawn = _curve(axes, metrics, "tuning", "auroc")
    axes.axhline(0.5, color=BASELINE_COLOUR, linestyle="--", linewidth=1.2, label="chance")
    _baseline(axes, baselines, "count model", "auroc", ":")
    if best is not None and is_number(best.get("auroc")):
        label = f"{best['auroc']:.3f} at epoch {best['epoch']:.4g} (least validation loss)"
        _mark_best(axes, best, "auroc", label)
    axes.set_ylabel("AUROC on the tuning split")
    axes.set_title("AUROC", loc="left", fontsize=11)
    return drawn


def _draw_members(axes: "Axes", metrics: Records, names: Sequence[str]) -> bool:
    """Validation losses of a population's members."""
    colours = [colour for colour in COLOURS if colour != VALIDATION_COLOUR]  # which their mean has
    records = [one for one in _with_epoch(metrics, "tuning") if len(one.get("members") or ()) == len(names)]
    for number, name in enumerate(names):
        losses = [record["members"][number].get("loss") for record in records]
        heights = [loss if is_number(loss) else math.nan for loss in losses]
        label = name if number < len(colours) else None  # a legend of dozens would fill the picture
        colour = colours[number % len(colours)]
        epochs = [record["epoch"] for record in records]
        axes.plot(epochs, heights, color=colour, linewidth=0.9, alpha=0.8, label=label)
    return bool(records)


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

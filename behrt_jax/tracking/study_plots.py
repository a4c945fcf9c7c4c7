"""Pictures of the freezing study: loss against epoch under each regime."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behrt_jax.tracking.plots import BASELINE_COLOUR, DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), with a marker each for printing in grey.
STYLES = {
    "full": ("#000000", "o"),
    "lora": ("#0072B2", "s"),
    "lora_head": ("#56B4E9", "^"),
    "lora_only": ("#D55E00", "X"),
    "all_but_adapted": ("#009E73", "D"),
    "lora_pretrained": ("#CC79A7", "v"),
}
LINES = (
    ("ln_codes", "a guess, ln(codes)", "-"),
    ("unigram", "code frequencies", "--"),
    ("oracle", "best possible", ":"),
)


def plot_study(study: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw ``loss-<source>-<masks>.png`` for each kind of data and masks in a study.

    Train and validation stand side by side on one scale; a band spans the seeds.

    Args:
        study: content of ``study.json``.
        folder: made where it is missing.

    Returns:
        The pictures drawn; none where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in study["cells"]:
        groups.setdefault((cell["source"], cell["masks"]), []).append(cell)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for (source, masks), cells in groups.items():
        figure = Figure(figsize=(10.0, 5.0), layout="constrained")
        FigureCanvasAgg(figure)  # no display and no global state
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, split in zip(panels, ("train", "validation"), strict=True):
            _draw(axes, cells, split, masks)
        panels[0].set_ylabel("loss (nats per masked code)")
        handles, names = panels[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        path = folder / f"loss-{source}-{masks}.png"
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        drawn.append(path)
    return drawn


def _draw(axes: "Axes", cells: list[dict[str, Any]], split: str, masks: str) -> None:
    for cell in cells:
        colour, marker = STYLES[cell["regime"]]
        curve = cell["curves"][f"{split}_loss"]
        epochs = range(1, len(curve["mean"]) + 1)
        options = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.5}
        axes.plot(epochs, curve["mean"], label=cell["regime"], **options)
        if cell["seeds"] > 1:
            axes.fill_between(epochs, curve["least"], curve["most"], color=colour, alpha=0.15, linewidth=0)
    for field, label, style in LINES:
        value = cells[0][field]
        # On uniform data a guess is the best there is: one line for both.
        if value is not None and (field != "oracle" or cells[0]["source"] != "uniform"):
            axes.axhline(value, color=BASELINE_COLOUR, linestyle=style, linewidth=1.2, label=label, zorder=1)
    where = "training subjects" if split == "train" else "other subjects"
    drawn = "masks drawn once" if masks == "once" else "fresh masks each epoch"
    axes.set_title(f"{split}: {where}, {cells[0]['source']} data, {drawn}", loc="left", fontsize=10)
    axes.set_xlabel("epoch")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

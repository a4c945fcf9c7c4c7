"""Picture of the training benchmark: events per second of each contender."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from behrt_jax.tracking.plots import DPI

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/): ours blue and sky blue, PyTorch's warm.
OURS = ("#0072B2", "#56B4E9", "#009E73")
THEIRS = ("#D55E00", "#E69F00", "#CC79A7", "#999999")
WIDE_RANGE = 30
"""The fastest by the slowest, from which on the scale is logarithmic."""


def plot_speeds(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw bars of events per second for each size and regime; where they differ by far, on a log scale.

    Args:
        results: of the training benchmark: ``size``, ``regime``, ``contender``, ``tokens_per_second``.
        file: PNG to write. Nothing is drawn where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    groups = list(dict.fromkeys((r["size"], r["regime"]) for r in results))
    names = list(dict.fromkeys(r["contender"] for r in results))
    kinds = list(dict.fromkeys(map(_kind, names)))
    ours = [kind for kind in kinds if kind.startswith("ours")]
    theirs = [kind for kind in kinds if kind not in ours]
    colours = dict(zip(ours, OURS * len(ours), strict=False)) | dict(
        zip(theirs, THEIRS * len(theirs), strict=False)
    )
    speeds = {(r["size"], r["regime"], r["contender"]): r["tokens_per_second"] for r in results}
    figure = Figure(figsize=(2 + 1.8 * len(groups), 4.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    place, ticks = 0.0, []
    for group in groups:
        present = [name for name in names if (*group, name) in speeds]
        ticks.append(place + (len(present) - 1) / 2)
        for name in present:
            value = speeds[(*group, name)]
            kind = _kind(name)
            label = kind if kind not in axes.get_legend_handles_labels()[1] else None
            axes.bar(place, value, width=0.9, color=colours[kind], label=label)
            axes.annotate(f"{value:,.0f}", (place, value), ha="center", va="bottom", fontsize=7, rotation=45)
            place += 1
        place += 0.8
    if max(speeds.values()) > WIDE_RANGE * min(speeds.values()):
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.12)
    axes.set_xticks(ticks, [" ".join(group) for group in groups])
    axes.set_ylabel("events per second (padding not counted)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(file)


def _kind(name: str) -> str:
    """Name of a contender without the size of its batch."""
    return name.rstrip("0123456789").rstrip()

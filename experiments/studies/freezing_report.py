"""Curves and figures of a study's runs, read from their folders and summarised over seeds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.files import read_json
from behrt_jax.run_folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, read_metrics
from behrt_jax.tracking.console import format_count
from behrt_jax.tracking.plots import BASELINE_COLOUR, DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Pictures of the freezing study: loss against epoch under each regime.

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


BASELINES = ("ln_codes", "unigram", "oracle")
CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
FIGURES = (
    "train_loss_first",
    "train_loss_last",
    "validation_loss_best",
    "validation_loss_last",
    "validation_accuracy_best",
    "share_of_attainable_gain",
)


def read_run(folder: Path) -> dict[str, Any]:
    """Figures of a finished run, losses in nats.

    Returns:
        ``ln_codes``, ``unigram`` and ``oracle`` (validation losses of a guess, of the frequencies and of
        the best predictor there is; oracle None where unknown); ``curves``: name of `CURVES` -> value at
        the end of each epoch (training figures are means over the epoch, with dropout); the figures of
        `FIGURES`, of which ``best`` is at the least validation loss; ``interval``: 95 % interval of the
        best validation loss.
    """
    summary = read_json(folder / SUMMARY_FILE)
    metrics = read_metrics(folder / METRICS_FILE)
    source = read_json(folder / CONFIG_FILE)["settings"]["data"]["source"]
    ln_codes = math.log(len(Vocabulary.read(folder / "vocabulary.parquet")) - len(SPECIAL_TOKENS))
    train, tuning = (_by_epoch(metrics, split) for split in ("train", "tuning"))
    curves = {
        "train_loss": [record["loss"] for record in train],
        "train_accuracy": [record["accuracy"] for record in train],
        "validation_loss": [record["loss"] for record in tuning],
        "validation_accuracy": [record["accuracy"] for record in tuning],
    }
    baselines, best = summary["baselines"], summary["best"]
    unigram = baselines["unigram"]["loss"]
    # Codes at random: the best predictor guesses, and what it gains over the frequencies is noise.
    oracle = ln_codes if source == "uniform" else (baselines.get("oracle") or {}).get("loss")
    share = None if source == "uniform" else summary.get("share_of_attainable_gain")
    return {
        "ln_codes": ln_codes,
        "unigram": unigram,
        "oracle": oracle,
        "targets": best.get("targets"),
        "interval": summary["interval"],
        "curves": curves,
        "train_loss_first": curves["train_loss"][0],
        "train_loss_last": curves["train_loss"][-1],
        "validation_loss_best": best["loss"],
        "validation_loss_last": curves["validation_loss"][-1],
        "validation_accuracy_best": best["accuracy"],
        "share_of_attainable_gain": share,
    }


def summarise_cells(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, for each source, masks and regime in the order of `runs`.

    Returns:
        For each: ``source``, ``masks``, ``regime``, ``seeds``; ``ln_codes``, ``unigram``, ``oracle``
        (means); ``curves``: name -> ``{"mean": [...], "least": [...], "most": [...]}`` by epoch; and
        for each of `FIGURES` ``{"mean": ..., "sd": ...}`` (standard deviation over seeds; None where it
        is unknown).
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["source"], run["masks"], run["regime"]), []).append(run)
    return [
        {
            "source": source,
            "masks": masks,
            "regime": regime,
            "seeds": len(group),
            **{name: _spread([run[name] for run in group])["mean"] for name in BASELINES},
            "curves": {name: _curve([run["curves"][name] for run in group]) for name in CURVES},
            **{name: _spread([run[name] for run in group]) for name in FIGURES},
        }
        for (source, masks, regime), group in groups.items()
    ]


def _by_epoch(metrics: Sequence[dict[str, Any]], split: str) -> list[dict[str, float]]:
    """Loss and accuracy of each epoch, lines of one epoch weighted by their targets."""
    sums: dict[int, list[float]] = {}
    for record in metrics:
        if record["split"] == split:
            # A line's epoch is where it ends; the first epoch ends at 1.
            total = sums.setdefault(math.ceil(record["epoch"] - 1e-6), [0.0, 0.0, 0.0])
            for index, value in enumerate((1.0, record["loss"], record["accuracy"])):
                total[index] += value * record["targets"]
    return [
        {"loss": loss / targets, "accuracy": hits / targets}
        for _, (targets, loss, hits) in sorted(sums.items())
    ]


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else None,
    }


def _curve(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    by_epoch = list(zip(*curves, strict=True))
    return {
        "mean": [fmean(values) for values in by_epoch],
        "least": [min(values) for values in by_epoch],
        "most": [max(values) for values in by_epoch],
    }


# The freezing study as a page of Markdown.

EXPLAINED = {
    "full": "all parameters train",
    "lora": "adapters, embeddings and head",
    "lora_head": "adapters and head; embeddings frozen at random values",
    "lora_only": "adapters; embeddings and head frozen at random values",
    "all_but_adapted": "all but the adapted layers, `out` (the first mistake)",
    "lora_pretrained": "adapters and head; embeddings frozen as the full run left them",
}
FIRST_MISTAKE = (
    "The first mistake was recorded with 92.3 % trainable: 18,790,376 of 20,366,312 parameters, which is "
    "all_but_adapted at the size of `large`, with adapters of rank 16 and 1,000 vocabulary rows. The share "
    "depends on the size: embeddings and head weigh more in a small model."
)


def study_text(study: Mapping[str, Any]) -> str:
    """Tables and verdicts of a study (the content of ``study.json``)."""
    settings = study["settings"]
    data, train = settings["data"], settings["train"]
    parts = [
        f"# The freezing study: {study['model']}",
        f"{format_count(data['subjects'])} subjects, {train['epochs']} epochs, "
        + (f"{train['batch_tokens']} tokens" if train["batch_tokens"] else f"{train['batch_size']} subjects")
        + f" a step, learning rate {settings['optimizer']['learning_rate']:g} "
        f"({settings['optimizer']['schedule']}), dropout {settings['model']['dropout']:g}, rank "
        f"{settings['lora']['rank']}, {study['seeds']} seed{'s' if study['seeds'] > 1 else ''}. Losses in "
        "nats per masked code; training figures are means over the epoch, with dropout. +- is the standard "
        "deviation over seeds.",
        "## What a step costs\n\n" + _costs(study["costs"]),
    ]
    for source, masks in dict.fromkeys((cell["source"], cell["masks"]) for cell in study["cells"]):
        cells = [cell for cell in study["cells"] if (cell["source"], cell["masks"]) == (source, masks)]
        first = cells[0]
        lines = (
            f"A guess, ln(codes), loses {first['ln_codes']:.3f}; the code frequencies {first['unigram']:.3f}"
        )
        if first["oracle"] is not None:
            lines += f"; the best predictor that there is {first['oracle']:.3f}"
        title = f"## {source} data, masks {'drawn once' if masks == 'once' else 'fresh in each epoch'}"
        parts += [
            title,
            f"{lines}.",
            _figures(cells),
            "Loss at each epoch, train / validation:",
            _curves(cells),
        ]
    parts.append("## What it shows\n\n" + _verdicts(study["verdicts"]))
    return "\n\n".join(parts) + "\n"


def _costs(costs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{name}: {EXPLAINED[name]}",
            format_count(cost["trainable"]),
            f"{cost['trainable_percent']:.1f} %",
            _number(cost["flops_of_full"], 2),
            _number(cost["time_of_full"], 2),
        ]
        for name, cost in costs.items()
    ]
    table = _table(["regime", "trainable", "share", "FLOPs / full", "step time / full"], rows)
    return f"{table}\n\n{FIRST_MISTAKE}" if "all_but_adapted" in costs else table


def _figures(cells: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            cell["regime"],
            _with_spread(cell["train_loss_first"], 3),
            _with_spread(cell["train_loss_last"], 3),
            _with_spread(cell["validation_loss_best"], 3),
            _with_spread(cell["validation_loss_last"], 3),
            _with_spread(cell["validation_accuracy_best"], 1, 100.0, " %"),
            _with_spread(cell["share_of_attainable_gain"], 1, 100.0, " %"),
        ]
        for cell in cells
    ]
    names = ["train, epoch 1", "train, last", "validation, best", "validation, last", "accuracy"]
    return _table(["regime", *names, "of attainable gain"], rows)


def _curves(cells: Sequence[Mapping[str, Any]]) -> str:
    epochs = len(cells[0]["curves"]["train_loss"]["mean"])
    rows = []
    for epoch in range(epochs):
        pairs = [
            " / ".join(
                f"{cell['curves'][f'{split}_loss']['mean'][epoch]:.2f}" for split in ("train", "validation")
            )
            for cell in cells
        ]
        rows.append([str(epoch + 1), *pairs])
    return _table(["epoch", *(cell["regime"] for cell in cells)], rows)


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    if not verdicts:
        return "Too few kinds of runs to check anything."
    return "\n".join(
        f"- {'holds' if verdict['holds'] else 'DOES NOT HOLD'}: {verdict['claim']} Seen: {verdict['seen']}."
        for verdict in verdicts
    )


def _with_spread(figure: Mapping[str, float | None], digits: int, factor: float = 1.0, unit: str = "") -> str:
    mean, spread = figure["mean"], figure["sd"]
    if mean is None:
        return ""
    text = f"{factor * mean:.{digits}f}"
    return f"{text}{unit}" if spread is None else f"{text} +- {factor * spread:.{digits}f}{unit}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# What the freezing study must show, each claim checked on its runs.

FROZEN_SHARE = 0.25
"""Most that a frozen model may gain, of what the full one gains, to count as one that hardly learns."""
FRESH_SHARE = 0.25
"""Most that the training loss may fall with fresh masks, of its fall with masks drawn once."""
LEAST_FALL = 0.3
"""Nats by which a loss must fall to count as falling."""

Run = dict[str, Any]


def judge(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Check the claims for which there are runs.

    Args:
        runs: ``source``, ``masks``, ``regime``, ``seed`` and the figures of
            :func:`experiments.studies.freezing_report.read_run`.

    Returns:
        For each claim and kind of data: ``id``, ``claim``, ``seen`` (figures, as text) and ``holds``.
    """
    found = []
    for source in dict.fromkeys(run["source"] for run in runs if run["source"] != "uniform"):
        found += _learnable(source, [run for run in runs if run["source"] == source])
    uniform = [run for run in runs if run["source"] == "uniform"]
    return found + _memorising(uniform) + _no_leak(uniform)


def _learnable(source: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Data with something to learn: only a model whose embeddings and head fit learns it."""

    def gain(regime: str) -> float | None:
        return _mean(runs, regime, lambda run: run["ln_codes"] - run["validation_loss_best"])

    def over_unigram(regime: str) -> float | None:
        return _mean(runs, regime, lambda run: run["unigram"] - run["validation_loss_best"])

    found = []
    full, frozen = gain("full"), gain("lora_only")
    if full is not None and frozen is not None:
        found.append(
            _verdict(
                f"frozen-{source}",
                f"{source}: with embeddings and head frozen at random values the loss stays near ln(codes).",
                f"best validation loss {frozen:.3f} nats below ln(codes), of the full model {full:.3f}",
                frozen < FROZEN_SHARE * full,
            )
        )
    for regime in ("full", "lora", "all_but_adapted", "lora_pretrained"):
        value, least = over_unigram(regime), 0.0
        if value is not None:
            found.append(
                _verdict(
                    f"learns-{source}-{regime}",
                    f"{source}: {regime} learns more than how frequent each code is.",
                    f"best validation loss {value:.3f} nats below the unigram baseline",
                    value > least,
                )
            )
    return found


def _memorising(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Uniform data: a training loss that falls has learnt the masks by heart."""

    def fall(masks: str, regime: str) -> float | None:
        chosen = [run for run in runs if run["masks"] == masks]
        return _mean(chosen, regime, lambda run: run["ln_codes"] - run["train_loss_last"])

    found = []
    for regime in ("full", "lora"):
        once, fresh, frozen = fall("once", regime), fall("fresh", regime), fall("once", "lora_only")
        if once is None:
            continue
        found.append(
            _verdict(
                f"once-memorises-{regime}",
                f"uniform: with masks drawn once, {regime} falls below ln(codes) on its training subjects.",
                f"training loss ends {once:.3f} nats below ln(codes)",
                once > LEAST_FALL,
            )
        )
        if frozen is not None:
            found.append(
                _verdict(
                    f"once-frozen-{regime}",
                    f"uniform: with embeddings and head frozen it falls far less than under {regime}.",
                    f"training loss ends {frozen:.3f} nats below ln(codes), under {regime} {once:.3f}",
                    frozen < FROZEN_SHARE * once,
                )
            )
        if fresh is not None:
            found.append(
                _verdict(
                    f"fresh-forgets-{regime}",
                    f"uniform: with fresh masks {regime} hardly memorises.",
                    f"training loss ends {fresh:.3f} nats below ln(codes), with masks drawn once {once:.3f}",
                    fresh < FRESH_SHARE * once,
                )
            )
    return found


def _no_leak(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Uniform data: on subjects that were not trained on nobody can beat a guess."""
    if not runs:
        return []
    beyond = [run["ln_codes"] - run["validation_loss_best"] - half_width(run) for run in runs]
    deepest = min(runs, key=lambda run: run["validation_loss_best"] - run["ln_codes"])
    difference = deepest["validation_loss_best"] - deepest["ln_codes"]
    return [
        _verdict(
            "no-leak",
            "uniform: the validation loss never drops below ln(codes) by more than its 95 % interval.",
            f"least of {len(runs)} runs and all epochs: {difference:+.4f} nats from ln(codes), "
            f"interval +-{half_width(deepest):.4f}",
            max(beyond) <= 0,
        )
    ]


def half_width(run: Run) -> float:
    """Half the 95 % interval of a run's best validation loss, nats."""
    low, high = run["interval"]
    return (high - low) / 2


def _mean(runs: Sequence[Run], regime: str, value: Any) -> float | None:
    values = [value(run) for run in runs if run["regime"] == regime]
    return fmean(values) if values else None


def _verdict(name: str, claim: str, seen: str, holds: bool) -> dict[str, Any]:
    return {"id": name, "claim": claim, "seen": seen, "holds": holds}

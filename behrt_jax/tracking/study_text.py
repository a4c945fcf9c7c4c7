"""The freezing study as a page of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from behrt_jax.tracking.formats import format_count

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

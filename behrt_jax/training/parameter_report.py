"""How many parameters there are and how many of them train, by group."""

from collections.abc import Mapping
from typing import Any

import jax

from behrt_jax.adapters.groups import GROUPS, labels


def count_parameters(variables: Mapping[str, Any], mask: Any) -> dict[str, Any]:
    """Count elements of the leaves of `variables`.

    Args:
        variables: ``{"params": ..., "lora": ...}`` of arrays or ``jax.ShapeDtypeStruct``.
        mask: tree of booleans, True where a leaf trains.

    Returns:
        ``total``, ``trainable``, ``frozen``, ``trainable_percent`` and ``lora_percent`` (both of the
        total), and for each group ``{"total": ..., "trainable": ..., "trainable_percent": ...}``.
    """
    groups = {group: {"total": 0, "trainable": 0} for group in GROUPS}
    leaves = zip(
        jax.tree.leaves(labels(variables)), jax.tree.leaves(variables), jax.tree.leaves(mask), strict=True
    )
    for group, leaf, trains in leaves:
        groups[group]["total"] += leaf.size
        groups[group]["trainable"] += leaf.size if trains else 0
    total = sum(group["total"] for group in groups.values())
    trainable = sum(group["trainable"] for group in groups.values())
    return {
        "total": total,
        "trainable": trainable,
        "frozen": total - trainable,
        "trainable_percent": _percent(trainable, total),
        "lora_percent": _percent(groups["lora"]["total"], total),
        **{
            name: {**group, "trainable_percent": _percent(group["trainable"], group["total"])}
            for name, group in groups.items()
        },
    }


def report_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (group, total, trainable, percent) of the printed table, the sum last."""
    rows = [(group, report[group]) for group in GROUPS if report[group]["total"]]
    rows.append(("all", report))
    return [
        (name, f"{part['total']:,}", f"{part['trainable']:,}", f"{part['trainable_percent']:.1f} %")
        for name, part in rows
    ]


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0

"""Freezing: the parameters that train, by regimes and masks; gradients that stop at the others; counts."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import tree_map_with_path

from behrt_jax.adapters.lora import GROUPS, label, labels, path_names
from behrt_jax.config.model import FreezingConfig
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject
from behrt_jax.models.stacked_layers import Tree

Variables = dict[str, Any]
"""``{"params": ..., "lora": ...}``, a tree of arrays."""
FROZEN = "frozen"


@dataclass(frozen=True)
class Regime:
    """A named choice of what trains."""

    groups: frozenset[str]
    freeze_adapted: bool = False
    """Freeze kernel and bias of each adapted layer even where its group trains."""


REGIMES = {
    "full": Regime(frozenset(GROUPS)),
    "lora": Regime(frozenset({"lora", "embedding", "head"})),
    "lora_pretrained": Regime(frozenset({"lora", "head"})),
    "lora_only": Regime(frozenset({"lora"})),
    "all_but_adapted": Regime(frozenset(GROUPS), freeze_adapted=True),
}
"""By name; what is wrong with two of them, `diagnosis.parameter_checks` says."""


def regime(config: FreezingConfig) -> Regime:
    """The regime that `config` names, or the explicit set of groups in it."""
    return Regime(frozenset(config.groups)) if config.groups else REGIMES[config.regime]


def trainable(variables: Tree, chosen: Regime) -> Tree:
    """Tree of booleans with the structure of `variables`: True where a leaf trains.

    Raises:
        InputError: nothing at all would train.
    """
    adapted = {path[:-1] for path in _paths(variables.get("lora", {}))}

    def trains(path: tuple[Any, ...], _: Any) -> bool:
        names = path_names(path)
        if names[0] == "lora" and names[-1] in ("a0", "b0"):  # what a and b began with
            return False
        frozen_as_adapted = chosen.freeze_adapted and names[0] == "params" and names[1:-1] in adapted
        return label(names) in chosen.groups and not frozen_as_adapted

    mask = tree_map_with_path(trains, variables)
    if not any(jax.tree.leaves(mask)):
        raise InputError(
            f"freezing: nothing would train, since the model has no parameters in {sorted(chosen.groups)}. "
            "Choose another regime or add adapters (a configuration whose name ends in _lora)."
        )
    return mask


def optimizer_labels(variables: Tree, mask: Tree) -> Tree:
    """Tree of labels for ``optax.multi_transform``: the group's name, or `FROZEN`."""
    return jax.tree.map(lambda group, trains: group if trains else FROZEN, labels(variables), mask)


def stop_frozen(variables: Tree, mask: Tree) -> Variables:
    """`variables` with the gradient stopped at every frozen leaf.

    Only so is a frozen gradient never computed: ``set_to_zero`` alone lets the compiler drop it only
    while nothing else (clipping, a logged norm) reads it.
    """
    return jax.tree.map(lambda leaf, trains: leaf if trains else jax.lax.stop_gradient(leaf), variables, mask)


def trainable_leaves(tree: Tree, mask: Tree) -> list[jax.Array]:
    """Leaves of `tree` where `mask` is True, in tree order."""
    return [leaf for leaf, trains in zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True) if trains]


def part(variables: Tree, mask: Tree, *, trains: bool) -> Variables:
    """`variables` with None at the frozen leaves, or, without `trains`, at those that train."""
    return jax.tree.map(lambda leaf, flag: leaf if flag == trains else None, variables, mask)


def whole(one: Tree, other: Tree) -> Variables:
    """Put together what :func:`part` took apart."""
    return jax.tree.map(lambda x, y: y if x is None else x, one, other, is_leaf=lambda leaf: leaf is None)


def adapted_kernels_frozen(variables: Tree, mask: Tree) -> bool:
    """Tell whether all kernels that carry an adapter are frozen."""
    adapted = {path[:-1] for path in _paths(variables.get("lora", {}))}
    flags = dict(_flat(mask["params"]))
    return not any(flags[(*path, "kernel")] for path in adapted)


def _flat(tree: Tree) -> list[tuple[tuple[str, ...], Any]]:
    return [(path_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _paths(tree: Tree) -> list[tuple[str, ...]]:
    return [path for path, _ in _flat(tree)]


def count_parameters(variables: Tree, mask: Tree) -> JsonObject:
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


def report_rows(report: JsonObject) -> list[tuple[str, str, str, str]]:
    """Rows (group, total, trainable, percent) of the printed table, the sum last."""
    rows = [(group, report[group]) for group in GROUPS if report[group]["total"]]
    rows.append(("all", report))
    return [
        (name, f"{part['total']:,}", f"{part['trainable']:,}", f"{part['trainable_percent']:.1f} %")
        for name, part in rows
    ]


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0

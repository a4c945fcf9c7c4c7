"""The Dense layers that adapters are put on, and the rank and scale of each.

Layers are named by patterns: one without a slash is compared with the layer's own name, one with a slash
with its whole path; both may hold the wildcards ``*``, ``?`` and ``[]``. A path has ``layer_0``, ``layer_1``,
... in it also where layers are stacked (`models.stacked_layers`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeVar

import jax
from flax.traverse_util import flatten_dict

from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.stacked_layers import Path, Tree, is_stacked, unstacked_path

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class AdaptedLayer:
    """A Dense layer with an adapter."""

    path: Path
    """Where its kernel is; the same for all layers of a stack."""
    inputs: int
    outputs: int
    rank: int
    alpha: float
    layer: int | None = None
    """Index into the leading axis of its kernel where layers are stacked."""

    @property
    def name(self) -> str:
        """Path of the layer, joined by slashes; the same whether or not layers are stacked."""
        return _name(self.path, self.layer or 0)


def leaves_by_path(tree: Tree) -> dict[Path, jax.Array]:
    """Every leaf of nested dicts, in the order of the tree."""
    return flatten_dict(tree)  # pyright: ignore[reportReturnType, reportArgumentType]


def rank_of(config: LoRAConfig, path: Path = (), layer: int = 0) -> int:
    """Rank of the adapter on the Dense layer at `path`; the common one without a path.

    Args:
        config: with `rank_pattern`, or without.
        path: of the layer in the tree of parameters.
        layer: which of a stack, all of which have the same rank.
    """
    return _by_pattern("rank_pattern", config.rank_pattern, int, config.rank, path, layer)


def alpha_of(config: LoRAConfig, path: Path = (), layer: int = 0) -> float:
    """Alpha of the adapter at `path`, as :func:`rank_of`: twice its rank where none is given."""
    common = 2.0 * rank_of(config, path, layer) if config.alpha is None else config.alpha
    return _by_pattern("alpha_pattern", config.alpha_pattern, float, common, path, layer)


def with_alphas(config: LoRAConfig) -> LoRAConfig:
    """The same settings with every alpha a number: that of the default is written out."""
    if config.alpha is not None:
        return config
    twice = (f"{pattern}={2 * rank}" for pattern, rank in _pairs("rank_pattern", config.rank_pattern, int))
    return replace(config, alpha=2.0 * config.rank, alpha_pattern=(*config.alpha_pattern, *twice))


def scale(config: LoRAConfig, path: Path = ()) -> float:
    """Factor on ``a @ b`` of the adapter at `path`, as :func:`rank_of`: alpha / rank, or alpha / sqrt(rank)
    when rank-stabilised.
    """
    rank, alpha = rank_of(config, path), alpha_of(config, path)
    return alpha / rank**0.5 if config.rank_stabilised else alpha / rank


def adapted_layers(params: Tree, config: LoRAConfig) -> list[AdaptedLayer]:
    """Dense layers of `params` that the targets of `config` match and its exclusions do not, in the order of
    the tree.

    Raises:
        InputError: rank, alpha or dropout out of range; a pattern that matches nothing (the message
            lists what could match); patterns that differ for the layers of a stack; a rank above the width of
            its layer.
    """
    _check(config)
    layers = [
        AdaptedLayer(
            path[:-1],
            leaf.shape[-2],
            leaf.shape[-1],
            rank_of(config, path[:-1], layer or 0),
            alpha_of(config, path[:-1], layer or 0),
            layer,
        )
        for path, leaf in leaves_by_path(params).items()
        if path[-1] == "kernel" and leaf.ndim == 2 + is_stacked(path)
        for layer in (range(leaf.shape[0]) if is_stacked(path) else (None,))
    ]
    _check_matched("targets", config.targets, layers, "matches no Dense layer")
    targeted = [layer for layer in layers if _is_among(config.targets, layer)]
    _check_matched("exclude", config.exclude, targeted, "matches no layer among the targets")
    adapted = [layer for layer in targeted if not _is_among(config.exclude, layer)]
    if not adapted:
        raise InputError("lora.exclude leaves out every layer that lora.targets names: name fewer.")
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = [pattern for pattern, _ in _pairs(option, getattr(config, option), float)]
        _check_matched(option, patterns, adapted, "matches no adapted layer")
    _check_stacks(layers, adapted)
    for layer in adapted:
        if layer.rank > (width := min(layer.inputs, layer.outputs)):
            raise InputError(
                f"lora.rank: {layer.name} is of {layer.inputs} to {layer.outputs}, but its adapter has rank "
                f"{layer.rank}: give {width} or less, for this layer alone by lora.rank_pattern "
                f"{layer.path[-1]}={width}, or leave it out of the targets."
            )
    return adapted


def _check(config: LoRAConfig) -> None:
    ranks = _pairs("rank_pattern", config.rank_pattern, int)
    for option, rank in [("rank", config.rank), *(("rank_pattern", rank) for _, rank in ranks)]:
        if rank < 1:
            raise InputError(f"lora.{option} is {rank}: an adapter needs a rank of 1 or more.")
    if not 0.0 <= config.dropout < 1.0:
        raise InputError(f"lora.dropout is {config.dropout}: give a rate from 0 up to, but not, 1.")
    alphas = _pairs("alpha_pattern", config.alpha_pattern, float)
    for option, alpha in [("alpha", config.alpha), *(("alpha_pattern", alpha) for _, alpha in alphas)]:
        if alpha is not None and not 0.0 < alpha < math.inf:
            raise InputError(f"lora.{option} is {alpha}: give a number above 0.")
    if not config.targets:
        raise InputError("lora.targets is empty: name layers to adapt, such as query key value out.")


def _check_matched(option: str, patterns: Sequence[str], layers: Sequence[AdaptedLayer], reason: str) -> None:
    for pattern in patterns:
        if not any(_matches(pattern, layer.name) for layer in layers):
            names = ", ".join(sorted({layer.path[-1] for layer in layers}))
            example = layers[0].name if layers else "(none)"
            raise InputError(
                f"lora.{option}: {pattern!r} {reason}. Names that could match: {names}; "
                f"or give a pattern over whole paths such as {example!r}."
            )


def _check_stacks(layers: Sequence[AdaptedLayer], adapted: Sequence[AdaptedLayer]) -> None:
    """Of stacked layers all or none are adapted, and all alike."""
    first = {layer.path: layer for layer in reversed(adapted)}
    for layer in layers:
        one = first.get(layer.path)
        if one is not None and (layer not in adapted or (layer.rank, layer.alpha) != (one.rank, one.alpha)):
            wrong, are = "has another rank or alpha", "have not"
            if layer not in adapted:
                wrong, are = "is not among the targets", "are"
            raise InputError(
                "lora.targets: layers are stacked (model.scan_layers), so all or none must be adapted, and "
                f"alike, but {layer.name} {wrong} and other layers {are}. Name them all (with layer_* in "
                "the pattern), or turn model.scan_layers off."
            )


def _name(path: Path, layer: int) -> str:
    return "/".join(unstacked_path(path, layer))


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern)


def _is_among(patterns: Sequence[str], layer: AdaptedLayer) -> bool:
    return any(_matches(pattern, layer.name) for pattern in patterns)


def _by_pattern(
    option: str, given: Sequence[str], kind: Callable[[str], N], common: N, path: Path, layer: int
) -> N:
    """The number of the first pattern that matches the layer, else the common one."""
    name = _name(path, layer)
    found = (number for pattern, number in _pairs(option, given, kind) if path and _matches(pattern, name))
    return next(found, common)


def _pairs(option: str, given: Sequence[str], kind: Callable[[str], N]) -> list[tuple[str, N]]:
    """Pattern and number of each ``PATTERN=NUMBER``.

    Raises:
        InputError: one is not of that form.
    """
    pairs = []
    for entry in given:
        pattern, _, number = entry.rpartition("=")
        try:
            pairs.append((pattern, kind(number)))
        except ValueError:
            pattern = ""
        if not pattern:
            raise InputError(f"lora.{option} has {entry!r}: give PATTERN=NUMBER, such as out=4.")
    return pairs

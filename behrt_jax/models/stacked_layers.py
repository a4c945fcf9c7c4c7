"""Two layouts of the encoder's layers in a tree, and the way from one to the other.

Layer by layer, as `layer_0`, `layer_1`, ... with a subtree each, or stacked, as one subtree `layers` whose
leaves have a leading axis over layers (``ModelConfig.scan_layers``). Parameters and adapters alike.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from behrt_jax.errors import InputError

STACKED = "layers"
_LAYER = re.compile(r"layer_(\d+)")

Path: TypeAlias = tuple[str, ...]
"""Names on the way from the root of a tree to a leaf."""
Tree: TypeAlias = Mapping[str, Any]
"""Nested dicts of arrays: ``params``, ``lora`` or both, and what mirrors them (shapes, masks, labels)."""


def layer_name(layer: int) -> str:
    """Name of a single layer, counted from 0."""
    return f"layer_{layer}"


def is_stacked(path: Sequence[str]) -> bool:
    """Tell whether the leaf or module at `path` has a leading axis over layers."""
    return STACKED in path


def count_stacked_layers(tree: Tree) -> int:
    """Number of layers that are stacked in nested dicts; 0 where none are."""
    return next((leaf.shape[0] for path, leaf in _flatten(tree).items() if is_stacked(path)), 0)


def unstacked_path(path: Path, layer: int) -> Path:
    """Path, in the other layout, of one layer of the leaf or module at the stacked `path`."""
    return tuple(layer_name(layer) if name == STACKED else name for name in path)


def unstack_layers(tree: Tree) -> dict[str, Any]:
    """The same tree layer by layer; without stacked layers, as it is.

    Args:
        tree: nested dicts of arrays, stacked ones `[layers, ...]`. For abstract leaves use
            ``jax.eval_shape``.

    Returns:
        Nested dicts; numpy arrays give views.
    """
    leaves = {}
    for path, leaf in _flatten(tree).items():
        if is_stacked(path):
            leaves |= {unstacked_path(path, layer): leaf[layer] for layer in range(leaf.shape[0])}
        else:
            leaves[path] = leaf
    return unflatten_dict(leaves)


def stack_layers(tree: Tree, layers: int | None = None) -> dict[str, Any]:
    """The same tree with its layers stacked: the inverse of :func:`unstack_layers`.

    Args:
        tree: nested dicts of arrays.
        layers: how many there must be; as many as the highest number says where not given.

    Raises:
        InputError: a leaf is not there in each layer, as with adapters on some of them, or not everywhere of
            the same shape.
    """
    leaves: dict[Path, Any] = {}
    groups: dict[Path, dict[int, Any]] = {}
    for path, leaf in _flatten(tree).items():
        numbers = [int(match[1]) for match in map(_LAYER.fullmatch, path) if match]
        if numbers:
            groups.setdefault(_stacked_path(path), {})[numbers[0]] = leaf
        else:
            leaves[path] = leaf
    if layers is None:
        layers = 1 + max((number for group in groups.values() for number in group), default=-1)
    for path, group in groups.items():
        missing = sorted(set(range(layers)) - group.keys())
        if missing:
            raise InputError(
                f"{'/'.join(path)} cannot be stacked: {layer_name(missing[0])} has no such leaf. Use a model "
                "with scan_layers off, or adapters on every layer."
            )
        parts = [group[layer] for layer in range(layers)]
        shapes = sorted({part.shape for part in parts})
        if len(shapes) > 1:
            raise InputError(f"{'/'.join(path)} cannot be stacked: the shapes {shapes} differ.")
        on_host = all(isinstance(part, np.ndarray) for part in parts)
        leaves[path] = np.stack(parts) if on_host else jnp.stack(parts)
    return unflatten_dict(leaves)


def with_layout_of(scan_layers: bool, tree: Tree) -> dict[str, Any]:
    """The tree as a model with this `scan_layers` has it, whichever layout it is in."""
    unstacked = unstack_layers(tree)
    return stack_layers(unstacked) if scan_layers else unstacked


def _stacked_path(path: Path) -> Path:
    return tuple(STACKED if _LAYER.fullmatch(name) else name for name in path)


def _flatten(tree: Tree) -> dict[Path, Any]:
    return flatten_dict(tree, keep_empty_nodes=True)  # pyright: ignore[reportReturnType, reportArgumentType]

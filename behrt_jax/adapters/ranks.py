"""Adapters of several ranks in one shape, so that they can be stacked and trained together.

Those of smaller rank are filled up with zeros to the largest. A zero column of ``a`` against a zero row of
``b`` has no gradient on either side, so AdamW leaves both at zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map_with_path


def pad(adapters: Any, rank: int) -> Any:
    """Adapters (see `adapters.lora`) filled up with zeros to `rank`."""

    def longer(path, leaf):
        axis = leaf.ndim - 1 if _is_a(path) else leaf.ndim - 2
        widths = [(0, rank - leaf.shape[axis] if place == axis else 0) for place in range(leaf.ndim)]
        return jnp.pad(leaf, widths)

    return tree_map_with_path(longer, adapters)


def cut(adapters: Any, rank: int) -> Any:
    """The first `rank` ranks: undoes :func:`pad`."""
    return tree_map_with_path(
        lambda path, leaf: leaf[..., :rank] if _is_a(path) else leaf[..., :rank, :], adapters
    )


def scaled(adapters: Any, factor: jax.Array | float) -> Any:
    """Adapters whose product ``a @ b`` is `factor`, a scalar, times as large."""
    return tree_map_with_path(lambda path, leaf: leaf if _is_a(path) else factor * leaf, adapters)


def _is_a(path: Any) -> bool:
    return path[-1].key == "a"

"""Which part of a train state each device holds: FSDP (Zhao et al. 2023, arXiv 2304.11277).

Large leaves are split over the mesh axis `fsdp`; what is small is not worth a message and is held whole,
and so are adapters. A parameter's moments lie where the parameter lies. The batch is split over
all devices, so every device needs every parameter: it is gathered just before its use.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from behrt_jax.training.mesh import AXES, replicated

if TYPE_CHECKING:
    from behrt_jax.training.update import TrainState

LARGE = 2**16
"""Elements from which on a leaf is split."""


def state_shardings(state: "TrainState", mesh: Mesh, large: int = LARGE) -> "TrainState":
    """Sharding of each leaf of a train state.

    Args:
        state: arrays, or ``jax.ShapeDtypeStruct``.
        mesh: with the axis `fsdp`; where that is 1, every leaf is replicated.
        large: elements from which on a leaf is split, along its largest axis that `fsdp` divides.

    Returns:
        The same tree with a ``NamedSharding`` for each leaf.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        adapter = _names(path)[0] == "lora"
        return replicated(mesh) if adapter else _split(leaf.shape, mesh, large)

    variables = tree_map_with_path(sharding, state.variables)
    leaves = {_names(path): leaf for path, leaf in tree_leaves_with_path(state.variables)}
    shardings = {_names(path): leaf for path, leaf in tree_leaves_with_path(variables)}

    def like_its_parameter(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        """A moment has the path of its parameter at the end of its own, and the same shape."""
        names = _names(path)
        for start in range(len(names)):
            own = names[start:]
            if own in leaves and leaves[own].shape == leaf.shape:
                return shardings[own]
        return replicated(mesh)

    opt_state = tree_map_with_path(like_its_parameter, state.opt_state)
    return state._replace(step=replicated(mesh), variables=variables, opt_state=opt_state)


def shardings_of(tree: Any) -> Any:
    """Sharding of each array in a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def gather(variables: Any, mesh: Mesh | None) -> Any:
    """All parameters whole on each device, for a computation on this device's rows.

    Left to itself, the compiler would use a split table or output layer in pieces, for which it gathers the
    whole batch on each device.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return variables
    return jax.lax.with_sharding_constraint(variables, replicated(mesh))


def sum_over_devices(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`function` on each device's own rows, and its results summed over devices in one go.

    Left to itself, the compiler would sum the gradient of each micro-batch over devices, and gather
    whatever it cannot split, such as ``top_k``. Here nothing is sent but parameters that are split, before,
    and the sums, after.

    Args:
        function: from (variables, keys, rows) to a tree of sums over the rows; `rows` is a tree of arrays
            `[batch, ...]`.
        mesh: the devices; where there is one, or none is given, `function` comes back as it is.
    """
    if mesh is None or mesh.size == 1:
        return function
    whole, split = PartitionSpec(), PartitionSpec(AXES)
    return jax.shard_map(
        lambda *arguments: jax.lax.psum(function(*arguments), AXES),
        mesh=mesh,
        in_specs=(whole, whole, split),
        out_specs=whole,
        # The check would sum each gradient of a whole parameter by itself, in each micro-batch.
        check_vma=False,
    )


def _split(shape: tuple[int, ...], mesh: Mesh, large: int) -> NamedSharding:
    parts = mesh.shape["fsdp"]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or np.prod(shape) < large or not axes:
        return replicated(mesh)
    axis = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)

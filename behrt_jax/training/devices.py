"""Devices in a mesh of two axes: both split the batch, `fsdp` splits large parameters too."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from behrt_jax.config.training import MeshConfig
from behrt_jax.errors import InputError

Devices = Sequence[Any]
"""Of ``jax.devices()``, whose class differs between versions of JAX."""
AXES = ("data", "fsdp")


def make_mesh(devices: Devices | None = None, config: MeshConfig | None = None) -> Mesh:
    """Mesh over the given devices, by default all, and by default data-parallel.

    Raises:
        InputError: see :func:`mesh_shape`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(len(devices), config or MeshConfig())
    # Auto: under Explicit axes, the default, an embedding lookup of Linen is an error.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def mesh_shape(devices: int, config: MeshConfig) -> tuple[int, int]:
    """Sizes of the axes `AXES`.

    Raises:
        InputError: a size below 1, or sizes that do not make up the number of devices; names the option.
    """
    for name, size in (("data", config.data), ("fsdp", config.fsdp)):
        if size is not None and size < 1:
            raise InputError(f"mesh.{name} is {size}: give 1 or more.")
    if devices % config.fsdp:
        raise InputError(
            f"mesh.fsdp is {config.fsdp}, which does not divide the {devices} devices: give a divisor."
        )
    data = devices // config.fsdp
    if config.data not in (None, data):
        raise InputError(
            f"mesh.data is {config.data} and mesh.fsdp {config.fsdp}: together {config.data * config.fsdp} "
            f"devices, but there are {devices}. Give mesh.data {data}, or leave it out."
        )
    return data, config.fsdp


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shapes_of(tree: Any) -> Any:
    """Shape, dtype and sharding of each array of a tree, for compiling ahead."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def replicated_shapes(tree: Any, mesh: Mesh) -> Any:
    """Shape and dtype of each array or ``jax.ShapeDtypeStruct`` of a tree, whole on each device."""
    whole = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)


def own_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Places of those rows of a batch that lie on devices of this process, int64 ``[own]``, ascending.

    Args:
        rows: of the whole batch, a multiple of the devices.
        mesh: all devices that share the batch.
    """
    of_devices = split_rows(mesh).addressable_devices_indices_map((rows,)).values()
    return np.sort(np.concatenate([np.arange(rows)[index] for index in of_devices]))


def put_rows(batch: Any, mesh: Mesh, rows: int | None = None) -> Any:
    """Copy a batch of host arrays to the devices, rows split; returns before the copy is done.

    Where several processes share the mesh, each copies the rows of its own devices.

    Args:
        batch: the whole of it, the same in all processes; or with `rows`, of each its :func:`own_rows`.
        mesh: all devices that share the batch.
        rows: of the whole batch.
    """
    sharding = split_rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    total = len(jax.tree.leaves(batch)[0]) if rows is None else rows
    held = np.arange(total) if rows is None else own_rows(total, mesh)
    places = np.searchsorted(held, np.arange(total))  # in `batch`, of the rows that are there

    def put(x: np.ndarray) -> jax.Array:
        def of_device(index: Any) -> np.ndarray:
            return x[places[index[0]]]

        # device_put would first compare the batches of all processes.
        return jax.make_array_from_callback((total, *x.shape[1:]), sharding, of_device)

    return jax.tree.map(put, batch)


# FSDP (Zhao et al. 2023, arXiv 2304.11277): each device holds a part of the train state.


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

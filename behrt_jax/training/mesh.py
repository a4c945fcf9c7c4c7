"""Devices in a mesh of two axes: both split the batch, `fsdp` splits large parameters too."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from behrt_jax.config import MeshConfig
from behrt_jax.errors import InputError

AXES = ("data", "fsdp")


def make_mesh(devices: Sequence[Any] | None = None, config: MeshConfig | None = None) -> Mesh:
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


def put_rows(batch: Any, mesh: Mesh) -> Any:
    """Copy a batch of host arrays to the devices, rows split; returns before the copy is done.

    Where several processes share the mesh, each gives the same batch and copies the rows of its own devices.
    """
    sharding = split_rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    # device_put would first compare the batches of all processes.
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), batch)

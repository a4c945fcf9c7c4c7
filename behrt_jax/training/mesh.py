"""Devices in a mesh of two axes: both split the batch, `fsdp` is there to split parameters too."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Data-parallel mesh over the given devices, by default all."""
    devices = jax.devices() if devices is None else list(devices)
    # Auto: under Explicit axes, the default, an embedding lookup of Linen is an error.
    return jax.make_mesh((len(devices), 1), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def put_rows(batch: Any, mesh: Mesh) -> Any:
    """Copy a batch of host arrays to the devices, rows split; returns before the copy is done."""
    return jax.device_put(batch, split_rows(mesh))

"""The work is truly divided among devices."""

import jax
import pytest

from behrt_jax.config import MeshConfig
from behrt_jax.errors import InputError
from behrt_jax.training.devices import make_mesh, put_rows, replicated
from tests.models.rows import random_batch
from tests.training.test_step import TINY, start


@pytest.mark.slow
def test_each_device_holds_its_share_of_the_rows_and_all_parameters():
    _, state, _, mesh = start(TINY, devices=jax.devices())
    batch = put_rows(random_batch(0, rows=16), mesh)
    assert {shard.data.shape for shard in batch.codes.addressable_shards} == {(2, 24)}
    kernel = state.variables["params"]["mlm_head"]["dense"]["kernel"]
    assert kernel.sharding == replicated(mesh)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {kernel.shape}


@pytest.mark.slow
def test_a_device_of_eight_computes_about_an_eighth():
    flops = []
    for devices in (jax.devices()[:1], jax.devices()):
        _, state, step, mesh = start(TINY, devices=devices)
        compiled = step.lower(state, put_rows(random_batch(0, rows=32), mesh)).compile()
        flops.append(compiled.cost_analysis()["flops"])
    # The optimiser's share is not divided.
    assert flops[1] / flops[0] == pytest.approx(1 / 8, abs=0.1)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1)),
        (MeshConfig(fsdp=4), (2, 4)),
        (MeshConfig(data=1, fsdp=8), (1, 8)),
        (MeshConfig(data=8), (8, 1)),
    ],
)
def test_mesh_axes(config, shape):
    mesh = make_mesh(jax.devices(), config)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp"), shape, strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=3), "mesh.fsdp is 3, which does not divide the 8 devices"),
        (MeshConfig(fsdp=16), "mesh.fsdp is 16"),
        (MeshConfig(data=2), "mesh.data is 2 and mesh.fsdp 1: together 2 devices, but there are 8"),
        (MeshConfig(data=2, fsdp=2), "Give mesh.data 4"),
        (MeshConfig(data=0), "mesh.data is 0"),
        (MeshConfig(fsdp=0), "mesh.fsdp is 0"),
        (MeshConfig(fsdp=-2), "mesh.fsdp is -2"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_names_the_option(config, message):
    with pytest.raises(InputError, match=message):
        make_mesh(jax.devices(), config)

"""The work is truly divided among devices."""

import jax
import pytest

from behrt_jax.training.mesh import make_mesh, put_rows, replicated
from tests.models.rows import random_batch
from tests.training.test_step import TINY, start


def test_each_device_holds_its_share_of_the_rows_and_all_parameters():
    _, state, _, mesh = start(TINY, devices=jax.devices())
    batch = put_rows(random_batch(0, rows=16), mesh)
    assert {shard.data.shape for shard in batch.codes.addressable_shards} == {(2, 24)}
    kernel = state.variables["params"]["mlm_head"]["dense"]["kernel"]
    assert kernel.sharding == replicated(mesh)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {kernel.shape}


def test_a_device_of_eight_computes_about_an_eighth():
    flops = []
    for devices in (jax.devices()[:1], jax.devices()):
        _, state, step, mesh = start(TINY, devices=devices)
        compiled = step.lower(state, put_rows(random_batch(0, rows=32), mesh)).compile()
        flops.append(compiled.cost_analysis()["flops"])
    # The optimiser's share is not divided.
    assert flops[1] / flops[0] == pytest.approx(1 / 8, abs=0.1)


def test_mesh_axes():
    mesh = make_mesh(jax.devices())
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1}

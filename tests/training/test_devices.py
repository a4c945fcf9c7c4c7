"""The work is truly divided among devices."""

from dataclasses import replace
from functools import cache

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import MeshConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import make_mesh, put_rows, replicated, shardings_of
from behrt_jax.training.state import init_state, optimizer_for, set_up, state_shardings
from behrt_jax.training.step import TrainState
from behrt_jax.training.validation import make_validation_step
from tests.models.rows import VOCABULARY, random_batch
from tests.training.test_step import ALL_LINEARS, SHALLOW, TINY, sgd, start


@pytest.mark.slow
def test_each_device_holds_its_share_of_the_rows_and_all_parameters():
    _, state, _, mesh = start(SHALLOW, devices=jax.devices())
    batch = put_rows(random_batch(0, rows=16), mesh)
    assert {shard.data.shape for shard in batch.codes.addressable_shards} == {(2, 24)}
    kernel = state.variables["params"]["mlm_head"]["dense"]["kernel"]
    assert kernel.sharding == replicated(mesh)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {kernel.shape}


@pytest.mark.slow
def test_a_device_of_eight_computes_about_an_eighth():
    flops = []
    for devices in (jax.devices()[:1], jax.devices()):
        _, state, step, mesh = start(SHALLOW, devices=devices)
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


# FSDP: who holds what, and results that do not depend on it.


MESHES = {"1": None, "8x1": 1, "2x4": 4, "1x8": 8}
SPLIT_FROM = 128
CONFIGS = {
    "full": PretrainConfig(model=SHALLOW.model, optimizer=TINY.optimizer),
    **{
        product: replace(SHALLOW, lora=LoRAConfig(rank=2, targets=ALL_LINEARS, product=product))
        for product in ("merged", "activations")
    },
}


def mesh_of(name):
    fsdp = MESHES[name]
    return make_mesh(jax.devices()[:1]) if fsdp is None else make_mesh(None, MeshConfig(fsdp=fsdp))


def fresh(config, mesh, large=SPLIT_FROM):
    setup = set_up(config, VOCABULARY, mesh)
    optimizer = optimizer_for(config.optimizer, setup, total_steps=100)
    return init_state(setup, optimizer, jax.random.key(0), mesh, large)


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((16, 64), 8, PartitionSpec(None, "fsdp")),
        ((64, 16), 8, PartitionSpec("fsdp")),
        ((16, 16), 8, PartitionSpec("fsdp")),
        ((20, 16), 8, PartitionSpec(None, "fsdp")),  # the larger axis is not divisible
        ((20, 12), 8, PartitionSpec()),
        ((16, 4), 8, PartitionSpec()),  # small
        ((16, 64), 1, PartitionSpec()),
        ((128,), 4, PartitionSpec("fsdp")),
    ],
)
def test_a_large_leaf_is_split_along_its_largest_divisible_axis(shape, fsdp, spec):
    mesh, leaf = make_mesh(None, MeshConfig(fsdp=fsdp)), jax.ShapeDtypeStruct(shape, np.float32)
    moments = {"mu": {"params": {"w": leaf}}, "count": jax.ShapeDtypeStruct((), np.int32)}
    state = TrainState(leaf, {"params": {"w": leaf}, "lora": {"w": {"a": leaf}}}, moments)
    found = state_shardings(state, mesh, SPLIT_FROM)
    expected = NamedSharding(mesh, spec)
    assert found.variables == {"params": {"w": expected}, "lora": {"w": {"a": replicated(mesh)}}}
    assert found.opt_state == {"mu": {"params": {"w": expected}}, "count": replicated(mesh)}
    assert found.step == replicated(mesh)


def test_moments_of_the_real_optimizer_lie_with_their_parameters():
    state = fresh(CONFIGS["full"], mesh_of("1x8"))
    leaves = flatten_dict(state.variables)
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = tuple(str(getattr(key, "key", key)) for key in path)
        if "params" in names:
            own = names[names.index("params") :]
            assert leaf.sharding == leaves[own].sharding, own
            seen.add(own)
    assert seen == leaves.keys()
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert share < 0.35 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_initialisation_does_not_depend_on_the_mesh():
    one, split = (jax.device_get(fresh(SHALLOW, mesh_of(name))) for name in ("1", "1x8"))
    chex.assert_trees_all_equal(one, split)


@cache
def one_device(name):
    return sgd(CONFIGS[name], 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("full", "8x1"), ("full", "2x4"), ("full", "1x8"), ("merged", "2x4"), ("activations", "1x8")],
)
def test_every_mesh_gives_the_results_of_one_device(name, mesh):
    one, one_metrics = one_device(name)
    many, many_metrics = sgd(CONFIGS[name], 3, mesh=mesh_of(mesh), large=SPLIT_FROM)
    chex.assert_trees_all_close(one_metrics, many_metrics, rtol=1e-5)
    chex.assert_trees_all_close(one.variables, many.variables, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "merged"])
def test_micro_batches_of_a_split_model_equal_one_batch_of_one_device(name):
    batches = [random_batch(seed, rows=16) for seed in range(2)]
    one, one_metrics = sgd(CONFIGS[name], 2, batches)
    many, many_metrics = sgd(
        CONFIGS[name], 2, batches, mesh=mesh_of("2x4"), large=SPLIT_FROM, micro_batches=2
    )
    chex.assert_trees_all_close(one_metrics, many_metrics, rtol=1e-5)
    chex.assert_trees_all_close(one.variables, many.variables, atol=1e-6, rtol=1e-5)


def test_the_state_stays_split_and_the_steps_compile_once():
    setup, state, step, mesh = start(SHALLOW, mesh=mesh_of("2x4"), large=SPLIT_FROM)
    step.clear_cache()
    validation = jax.jit(make_validation_step(setup.predictor, TINY.masking, jax.random.key(1)))
    shardings = shardings_of(state)
    kernel = state.variables["params"]["behrt"]["encoder"]["layer_0"]["intermediate"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 16)}
    for index in range(3):
        batch = put_rows(random_batch(index, rows=8), mesh)
        state, _ = step(state, batch)
        assert shardings_of(state) == shardings
        validation(state.variables, batch)
    assert step._cache_size() == validation._cache_size() == 1


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
    config = replace(SHALLOW, freezing=FreezingConfig("full"))
    _, state, step, mesh = start(config, mesh=mesh_of("1x8"), large=SPLIT_FROM)
    for index in range(2):
        state, _ = step(state, put_rows(random_batch(index, rows=8), mesh))
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, *_trees(state), {}, {}, {"loss": 1.0})
    saved = jax.device_get(state)
    for name in ("1", "2x4"):
        template = fresh(config, mesh_of(name))
        with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
            params, lora, opt_state = _trees(template)
            restored = checkpoints.restore(2, params=params, lora=lora, opt_state=opt_state)
        chex.assert_trees_all_equal(tuple(restored), _trees(saved))
        assert shardings_of(tuple(restored)) == shardings_of(_trees(template)), name


def _trees(state):
    return state.variables["params"], state.variables["lora"], state.opt_state

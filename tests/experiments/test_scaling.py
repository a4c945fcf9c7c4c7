"""What a step costs each device, as counted by the benchmark."""

import json
import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import MeshConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.training import state as state_module
from behrt_jax.training.devices import make_mesh, replicated, shardings_of, split_rows
from behrt_jax.training.freezing import trainable_leaves
from behrt_jax.training.state import abstract_state, optimizer_for, set_up
from behrt_jax.training.step import make_update_step, masked_code_objective
from experiments.benchmark import main
from experiments.benchmarks.scaling import (
    Array,
    Collective,
    ScalingBenchmark,
    as_table,
    benchmark_scaling,
    bytes_by_kind,
    collectives,
    step_cost,
)
from tests.models.rows import VOCABULARY, random_batch, tiny_model
from tests.workflows.small_run import SMALL_RUN, changed

TWO_LAYERS = changed(SMALL_RUN, "model", layers=2)
CONFIGURATIONS = {"small_lora": TWO_LAYERS}
PARAMETERS = state_module.set_up(TWO_LAYERS, 200).shapes


@pytest.mark.slow
def test_the_cost_of_a_step_is_of_one_device():
    total = 4 * sum(leaf.size for leaf in jax.tree.leaves(PARAMETERS))
    whole = step_cost(TWO_LAYERS, rows=2, vocabulary=200)
    assert whole["parameter_bytes"] == total
    assert 0 < whole["bytes"]["all-reduce"] < total
    assert whole["bytes"]["all-gather"] == 0
    large = changed(TWO_LAYERS, "model", hidden_size=128, embedding_size=128)  # 4 h by h is large
    whole = step_cost(large, rows=2, vocabulary=200)
    split = step_cost(replace(large, mesh=MeshConfig(fsdp=8)), rows=2, vocabulary=200)
    kernels = 2 * 2 * 4 * 128 * 128 * 4 + 512 * 128 * 4  # feed-forward kernels, visit table
    assert whole["parameter_bytes"] - split["parameter_bytes"] == kernels * 7 // 8
    assert split["bytes"]["all-gather"] == kernels


@pytest.mark.slow
def test_one_run_in_a_process_of_its_own(tmp_path, capsys):
    config = ScalingBenchmark(
        regimes=("lora",),
        devices=(2,),
        split=("data",),
        rows=2,
        vocabulary=200,
        output=tmp_path / "a" / "b.json",
    )
    report = benchmark_scaling(config, CONFIGURATIONS)
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == json.loads(json.dumps(report))
    (run,) = report["runs"]
    assert (run["size"], run["regime"], run["split"], run["devices"]) == ("small", "lora", "data", 2)
    here = step_cost(TWO_LAYERS, rows=2, vocabulary=200)
    # Of eight devices, each with as many rows, a device computes and sends the same.
    assert run["bytes"] == here["bytes"]
    assert run["parameter_bytes"] == here["parameter_bytes"]
    assert run["flops"] == pytest.approx(here["flops"], rel=0.01)
    assert capsys.readouterr().out.splitlines() == as_table(report).splitlines()


def test_numbers_below_one_are_refused():
    with pytest.raises(InputError, match="--devices is 2 0"):
        benchmark_scaling(ScalingBenchmark(devices=(2, 0)), CONFIGURATIONS)
    with pytest.raises(InputError, match="--rows is 0"):
        benchmark_scaling(ScalingBenchmark(rows=0), CONFIGURATIONS)


def test_the_command_names_its_benchmarks(capsys):
    assert main(["scaling", "--devices", "0"]) == 2
    assert "--devices is 0" in capsys.readouterr().err
    assert main(["nothing"]) == 2
    assert "benchmark.py scaling" in capsys.readouterr().err


# What the devices send each other: the parameters that train, and nothing else.


SPLIT_FROM = 128
SCALARS = 400
"""Bytes: losses and hits, and the sum of squares of each leaf's gradient."""
FULL = PretrainConfig(model=tiny_model(layers=1))
CONFIGS = {
    "full": FULL,
    **{
        product: replace(
            FULL, lora=LoRAConfig(rank=2, product=product), freezing=FreezingConfig(regime="lora")
        )
        for product in ("merged", "activations")
    },
}


class Compiled(NamedTuple):
    found: list[Collective]
    trainable: list[tuple[int, ...]]
    frozen: list[tuple[int, ...]]
    split: list[tuple[int, ...]]
    """Shapes of the leaves that are split."""


@cache
def compiled(name: str, fsdp: int, micro_batches: int = 1) -> Compiled:
    config, mesh = CONFIGS[name], make_mesh(None, MeshConfig(fsdp=fsdp))
    setup = set_up(config, VOCABULARY, mesh)
    optimizer = optimizer_for(config.optimizer, setup, total_steps=100)
    state = abstract_state(setup.shapes, optimizer, mesh, SPLIT_FROM)
    objective = masked_code_objective(setup.predictor, config.masking)
    step = make_update_step(
        objective, optimizer, setup.mask, jax.random.key(0), clip_norm=1.0, micro_batches=micro_batches
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split_rows(mesh)), random_batch(0, rows=16)
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(state), replicated(mesh)))
    text = jitted.lower(state, batch).compile().as_text()
    frozen = jax.tree.map(lambda trains: not trains, setup.mask)
    return Compiled(
        collectives(text),
        *([leaf.shape for leaf in trainable_leaves(setup.shapes, mask)] for mask in (setup.mask, frozen)),
        [leaf.shape for leaf in jax.tree.leaves(state.variables) if not leaf.sharding.is_fully_replicated],
    )


def size(shapes) -> int:
    """Bytes of float32 leaves."""
    return 4 * sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("name", CONFIGS)
def test_data_parallel_devices_send_the_gradients_of_what_trains_and_nothing_else(name):
    step = compiled(name, fsdp=1)
    assert {one.kind for one in step.found} == {"all-reduce"}
    assert {one.group for one in step.found} == {8}
    sent = bytes_by_kind(step.found)["all-reduce"]
    assert size(step.trainable) <= sent < size(step.trainable) + SCALARS
    assert len(step.found) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_split_parameters_are_gathered_and_frozen_ones_have_no_gradient_to_send(name):
    step = compiled(name, fsdp=8)
    assert {one.kind for one in step.found} <= {"all-reduce", "all-gather", "reduce-scatter"}
    sent = bytes_by_kind(step.found)
    # Once for both passes; the batch and its activations are never gathered.
    assert sent["all-gather"] == size(step.split)
    assert (
        size(step.trainable) <= sent["reduce-scatter"] + sent["all-reduce"] < size(step.trainable) + SCALARS
    )
    shapes = [array.shape for one in step.found if one.kind != "all-gather" for array in one.arrays]
    for shape in set(step.frozen) - set(step.trainable):
        assert shape not in shapes
    assert max(map(size, ([shape] for shape in shapes))) <= max(size([shape]) for shape in step.trainable)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 8])
def test_micro_batches_send_no_more_than_one_batch(fsdp):
    one, parts = compiled("merged", fsdp), compiled("merged", fsdp, micro_batches=2)
    assert bytes_by_kind(parts.found) == bytes_by_kind(one.found)
    assert {found.times for found in parts.found} == {1}


@pytest.mark.slow
def test_a_gradient_that_is_not_stopped_is_found(monkeypatch):
    """The measure can tell: with the frozen leaves' gradient in the norm, it is sent."""
    from behrt_jax.training import step as module

    monkeypatch.setattr(module, "stop_frozen", lambda variables, mask: variables)
    honest = module.trainable_leaves

    def all_leaves(tree, mask):
        return honest(tree, mask) + honest(tree, jax.tree.map(lambda trains: not trains, mask))

    monkeypatch.setattr(module, "trainable_leaves", all_leaves)
    compiled.cache_clear()
    try:
        step = compiled("activations", fsdp=1)
    finally:
        compiled.cache_clear()
    assert bytes_by_kind(step.found)["all-reduce"] > 1.2 * size(step.trainable)


def text_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_kind_shape_group_and_bytes():
    mesh = make_mesh(None, MeshConfig(fsdp=4))
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    gathered = text_of(lambda x: jax.lax.with_sharding_constraint(x, replicated(mesh)), x)
    array = Array("f32", (8, 6), 192)
    assert collectives(gathered) == [Collective("all-gather", (array,), 4, 1)]
    summed = collectives(text_of(lambda x: x.sum(0), x))
    assert summed == [Collective("all-reduce", (Array("f32", (6,), 24),), 4, 1)]
    assert bytes_by_kind(summed) == {
        "all-reduce": 24,
        "all-gather": 0,
        "reduce-scatter": 0,
        "all-to-all": 0,
        "collective-permute": 0,
    }
    assert collectives(text_of(lambda x: x * 2, x)) == []


def test_a_loop_counts_each_turn():
    mesh = make_mesh()

    def function(x):
        def turn(carry, _):
            return carry + (x * carry).sum(), None

        return jax.lax.scan(turn, jnp.float32(1), length=5)[0]

    x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=split_rows(mesh))
    assert [(one.times, one.bytes) for one in collectives(text_of(function, x))] == [(5, 20)]


LINES = """HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {
  %s = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[8,4]{1,0} all-gather-done(%s)
  %r = bf16[4]{0} all-reduce-start(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
  %t = bf16[4]{0} all-reduce-done(%r)
  %c = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %e = f32[3]{0} collective-permute-done(%c)
  %x = (s32[1,3]{1,0}, s32[1,3]{1,0}) all-to-all(%p, %p), replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}
  %q = pred[16]{0} reduce-scatter(%p), replica_groups={{0},{1}}, dimensions={0}
  ROOT %z = s8[16]{0} reduce-scatter(%p), replica_groups={{0,1,2}}, dimensions={0}, to_apply=%add
}
"""


def test_forms_that_other_backends_print():
    assert collectives(LINES) == [
        Collective("all-gather", (Array("f32", (8, 4), 128),), 4, 1),
        Collective("all-reduce", (Array("bf16", (4,), 8),), 2, 1),
        Collective("collective-permute", (Array("f32", (3,), 12),), 0, 1),
        Collective("all-to-all", (Array("s32", (1, 3), 12),) * 2, 4, 1),
        Collective("reduce-scatter", (Array("s8", (16,), 16),), 3, 1),
    ]


def test_every_type_has_its_width():
    types = {"f32": 4, "bf16": 2, "f64": 8, "s8": 1, "u32": 4, "pred": 1, "f8e4m3fn": 1}
    for dtype, width in types.items():
        line = f"ENTRY %m () -> f32[] {{\n  %r = {dtype}[3]{{0}} all-reduce(%p), replica_groups={{{{0,1}}}}\n"
        assert collectives(line)[0].bytes == 3 * width == int(np.prod([3, width])), dtype

"""How far a train step is from the floor of its operations, one after the other, on the device at hand.

The floor is the sum over the step's operations of the longer of FLOPs by the device's rate and bytes by its
bandwidth, both measured here first. Assumptions, each on the side of a floor
(`experiments.benchmarks.operations`): elementwise work is free, and moves nothing; products read and write
what cannot stay in the last cache, once; attention moves nothing between its two products; an optimizer reads
and writes its state once. The algorithm is that of the step without parts (which would move less where arrays
of the whole batch outgrow the cache), attention tiles or recomputation; attention counts between all tokens
of a row, of whatever patients. Beside the floor each product runs alone,
as often as in the step: what the compiler's products take, without all that lies between them.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import example_batch
from behrt_jax.presets import PRETRAIN
from behrt_jax.tracking.console import table_text
from behrt_jax.training.devices import make_mesh, put_rows
from behrt_jax.training.memory import keep_freed_memory
from behrt_jax.training.micro_batches import likely_parts
from behrt_jax.training.state import Assembly, assemble_pretraining
from experiments.benchmarks.operations import Group, Operation, operations
from experiments.benchmarks.ours import ceiling
from experiments.benchmarks.train import ALL_LINEARS

GPU_CACHE = 64 * 2**20
"""Bytes of the last cache of an accelerator, which JAX does not tell: no less than that of an H200."""
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class RooflineBenchmark:
    """Compare a train step with the floor of its operations, one after the other."""

    sizes: tuple[str, ...] = ("small", "medium", "large")
    """Named configurations, without _lora."""
    regimes: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    """full: all parameters train. lora: adapters on all six linear layers, embeddings and head."""
    tokens: int | None = None
    """Tokens a step; 4,096 on a CPU and 65,536 on an accelerator where not given."""
    rank: int = 16
    """Of the adapters."""
    vocabulary_size: int = 1000
    """Codes and special tokens."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products."""
    cache_bytes: int | None = None
    """Of the last cache; as the system tells, or 64 MiB, where not given."""
    rounds: int = 5
    """Steps and products that are timed; medians count."""
    output: Path | None = None
    """JSON file for the figures."""


def benchmark_roofline(
    config: RooflineBenchmark, configurations: Mapping[str, PretrainConfig] = PRETRAIN
) -> dict[str, Any]:
    """Measure, print a table for each size and regime, and return the figures.

    Returns:
        ``settings``, ``machine`` (with ``flops_per_second``, ``bytes_per_second`` and ``cache_bytes``) and
        ``results``: a dict for each size and regime, see :func:`of_step`, with ``size`` and ``regime``.

    Raises:
        InputError: an unknown size, or no rounds.
    """
    for size in config.sizes:
        if size not in configurations:
            raise InputError(f"--sizes: {size!r} is unknown, choose from {', '.join(configurations)}.")
    if config.rounds < 1:
        raise InputError(f"--rounds is {config.rounds}: give 1 or more.")
    keep_freed_memory()
    cache = _cache_bytes() if config.cache_bytes is None else config.cache_bytes
    machine = {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flops_per_second": _rate(config.precision),
        "bytes_per_second": _bandwidth(cache),
        "cache_bytes": cache,
    }
    results = []
    for size in config.sizes:
        for regime in config.regimes:
            found = {
                "size": size,
                "regime": regime,
                **_measured(config, configurations[size], regime, machine),
            }
            print(as_table(found))
            results.append(found)
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    report = {"settings": settings, "machine": machine, "results": results}
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"Wrote {config.output}.")
    return report


def floor_seconds(one: Operation, machine: Mapping[str, Any]) -> float:
    """The least time of all runs of an operation."""
    computing, moving = one.flops / machine["flops_per_second"], one.bytes / machine["bytes_per_second"]
    return one.times * max(computing, moving)


def of_step(
    found: Sequence[Operation],
    machine: Mapping[str, Any],
    step_seconds: float,
    alone_seconds: Mapping[Group, float],
) -> dict[str, Any]:
    """A step beside its floor.

    Args:
        found: its operations.
        machine: with ``flops_per_second`` and ``bytes_per_second``.
        step_seconds: that it takes.
        alone_seconds: that the operations of each group take by themselves.

    Returns:
        ``step_seconds``, ``floor_seconds``, ``multiple`` (step by floor), ``overlapped_seconds`` (the floor
        of a device that computes and moves at the same time, whatever the order), ``flops_per_second`` that
        they were worked out with, and ``groups``: name -> ``flops``, ``bytes``, ``floor_seconds``,
        ``alone_seconds``; the rest of the step is elementwise work, which the floor has for nothing.
    """
    groups = {}
    for group in GROUPS:
        own = [one for one in found if one.group == group]
        groups[group] = {
            "flops": sum(one.flops * one.times for one in own),
            "bytes": sum(one.bytes * one.times for one in own),
            "floor_seconds": sum(floor_seconds(one, machine) for one in own),
            "alone_seconds": alone_seconds.get(group, 0.0),
        }
    floor = sum(one["floor_seconds"] for one in groups.values())
    computing = sum(one["flops"] for one in groups.values()) / machine["flops_per_second"]
    moving = sum(one["bytes"] for one in groups.values()) / machine["bytes_per_second"]
    return {
        "step_seconds": step_seconds,
        "floor_seconds": floor,
        "multiple": step_seconds / floor,
        "overlapped_seconds": max(computing, moving),
        "flops_per_second": machine["flops_per_second"],
        "groups": groups,
    }


def as_table(found: Mapping[str, Any]) -> str:
    """A step beside its floor, as aligned text."""

    def row(name: str, flops: float | None, moved: float | None, floor: float, seconds: float) -> list[str]:
        counts = [
            "" if flops is None else f"{flops / 1e9:.1f}",
            "" if moved is None else f"{moved / 1e6:.1f}",
        ]
        multiple = f"{seconds / floor:.2f}" if floor else ""
        return [name, *counts, f"{1e3 * floor:.2f}", f"{1e3 * seconds:.2f}", multiple]

    groups, step, floor = found["groups"], found["step_seconds"], found["floor_seconds"]
    rows = [
        row(name, one["flops"], one["bytes"], one["floor_seconds"], one["alone_seconds"])
        for name, one in groups.items()
    ]
    between = step - sum(one["alone_seconds"] for one in groups.values())
    rows.append(row("elementwise", None, None, 0.0, between))
    rows.append(row("the step", None, None, floor, step))
    title = (
        f"{found['size']} {found['regime']}, {found['rows']} rows of {found['length']} tokens, "
        f"{found['parts']} parts: groups alone, and the step"
    )
    return table_text(title, ["group", "GFLOP", "MB", "floor ms", "ms", "multiple"], rows)


def _measured(
    config: RooflineBenchmark, pretrain: PretrainConfig, regime: str, machine: dict[str, Any]
) -> dict[str, Any]:
    """Time a step and its groups; a product that beats the machine's rate raises it."""
    model = replace(pretrain.model, compute_dtype=config.precision)
    adapters = None
    if regime == "lora":
        adapters = LoRAConfig(rank=config.rank, targets=ALL_LINEARS)
    own = replace(
        pretrain, model=model, lora=adapters, freezing=FreezingConfig(regime="lora" if adapters else "full")
    )
    platform = jax.default_backend()
    tokens = config.tokens or (4096 if platform == "cpu" else 65_536)
    wanted = max(1, tokens // model.positions)
    parts = likely_parts(wanted, model.positions, model.inner_size, platform)
    rows = -(-wanted // parts) * parts
    mesh = make_mesh(jax.devices()[:1])
    batch = example_batch(model, rows)
    codes = np.random.default_rng(0).integers(5, config.vocabulary_size, batch.codes.shape, np.int32)
    batch = put_rows(batch._replace(codes=codes, row_ids=np.arange(rows, dtype=np.int32)), mesh)

    plain = replace(model, attention="dense", rematerialise=False, scan_layers=False)
    plain = replace(plain, head_chunk=config.vocabulary_size)
    whole = assemble_pretraining(replace(own, model=plain), config.vocabulary_size, mesh)
    found = operations(
        whole.step(),
        whole.state_shapes,
        batch,
        cache_bytes=machine["cache_bytes"],
        rank=config.rank if adapters else 0,
    )
    assembly = assemble_pretraining(own, config.vocabulary_size, mesh)
    step = assembly.jit(assembly.step(parts))
    state = assembly.first_state()

    def run() -> Any:
        nonlocal state
        state, totals = step(state, batch)
        return totals

    step_seconds = _seconds(run, config.rounds)
    alone: dict[Group, float] = dict.fromkeys(GROUPS, 0.0)
    known: dict[Any, float] = {}
    for one in found:
        if one.equation is None:
            continue
        form = _form(one)
        if form not in known:
            known[form] = _product_seconds(one, config.rounds)
            fastest = one.flops / known[form]
            machine["flops_per_second"] = max(machine["flops_per_second"], fastest)
        alone[one.group] += one.times * known[form]
    alone["optimiser"] += _update_seconds(assembly, config.rounds)
    figures = of_step(found, machine, step_seconds, alone)
    return {"rows": rows, "length": model.positions, "parts": parts, **figures}


_PARAMS = ("dimension_numbers", "preferred_element_type")


def _form(one: Operation) -> Any:
    """Whatever a product's time depends on."""
    assert one.equation is not None
    avals: list[Any] = [var.aval for var in one.equation.invars]
    shapes = tuple((aval.shape, str(aval.dtype)) for aval in avals)
    return shapes, *(str(one.equation.params[name]) for name in _PARAMS)


def _product_seconds(one: Operation, rounds: int) -> float:
    """The time of a product of the step by itself."""
    assert one.equation is not None
    avals: list[Any] = [var.aval for var in one.equation.invars]
    params = {name: one.equation.params[name] for name in _PARAMS}
    product = jax.jit(lambda left, right: jax.lax.dot_general(left, right, **params))
    random = np.random.default_rng(0)
    operands = [jnp.asarray(random.standard_normal(aval.shape, np.float32), aval.dtype) for aval in avals]
    return _seconds(lambda: product(*operands), rounds)


def _update_seconds(assembly: Assembly, rounds: int) -> float:
    """The time of the optimizer's update by itself."""
    mask, optimizer = assembly.setup.mask, assembly.optimizer

    def update(variables: Any, opt_state: Any) -> Any:
        gradient = jax.tree.map(lambda leaf: 1e-3 * leaf, variables)
        updates, opt_state = optimizer.update(gradient, opt_state, variables)
        return jax.tree.map(lambda x, u, trains: x + u if trains else x, variables, updates, mask), opt_state

    program = jax.jit(update, donate_argnums=(0, 1))
    _, *state = assembly.first_state()

    def run() -> Any:
        nonlocal state
        state = program(*state)
        return state

    return _seconds(run, rounds)


def _seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median time of a call; the first ones compile and warm up."""
    for _ in range(2):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def _rate(precision: str) -> float:
    """FLOP/s of a large square product, the best of ten turns."""
    turn, facts = ceiling({"precision": precision})
    return facts["flops"] / min(_seconds(lambda: turn(0), 1) for _ in range(10))


def _bandwidth(cache_bytes: int) -> float:
    """Bytes a second of arrays larger than the cache: summed, or doubled, the best of ten turns."""
    size = max(2**26 if jax.default_backend() == "cpu" else 2**29, cache_bytes // 2)
    x = jnp.ones(size, jnp.float32)
    read, copy = jax.jit(jnp.sum), jax.jit(lambda x: x * 2.0)
    summed = 4 * size / min(_seconds(lambda: read(x), 1) for _ in range(10))
    doubled = 8 * size / min(_seconds(lambda: copy(x), 1) for _ in range(10))
    return max(summed, doubled)


def _cache_bytes() -> int:
    """Bytes of the last cache."""
    if jax.default_backend() != "cpu":
        return GPU_CACHE
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes]
    return max(found, default=GPU_CACHE)

"""What a training step costs each device as devices are added, each with the same number of rows.

Nothing is trained or timed: a step is compiled for so many devices, made up on the CPU, and what it
computes, sends and keeps is read from the compiled program.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from behrt_jax.config.model import FreezingConfig
from behrt_jax.config.training import MeshConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import example_batch
from behrt_jax.presets import PRETRAIN
from behrt_jax.training.devices import make_mesh, split_rows
from behrt_jax.training.state import assemble_pretraining

# What devices send each other in a compiled program, read from its text (HLO, as XLA prints it).

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]+(?P<bits>\d*)\w*)\[(?P<shape>[\d,]*)\]")
_WHILE = re.compile(r" while\(.*body=%?(?P<body>[\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(?P<n>\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Groups are written out, {{0,1},{2,3}}; as an iota, [2,2]<=[4]; or by axes of a mesh,
# mesh['a'=2,'b'=2] {'b'}.
_LISTED = re.compile(r"replica_groups=\{\{(?P<first>[\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(?P<size>\d+)\]")
_AXES = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\][^{]*\{(?P<axes>[^}]*)\}")


class Array(NamedTuple):
    """Type and shape of an array on one device."""

    dtype: str
    """As in HLO: f32, s32, pred ..."""
    shape: tuple[int, ...]
    bytes: int


class Collective(NamedTuple):
    """One instruction; several arrays where the compiler sends them together."""

    kind: str
    """One of `KINDS`; an asynchronous pair counts once."""
    arrays: tuple[Array, ...]
    """What a device holds after it; after a reduce-scatter its share, after an all-gather the whole."""
    group: int
    """How many devices take part together; 0 where the text does not say."""
    times: int
    """Runs in one call of the program: inside loops, the product of their trip counts."""

    @property
    def bytes(self) -> int:
        """Of all arrays together, over all runs."""
        return self.times * sum(array.bytes for array in self.arrays)


def collectives(text: str) -> list[Collective]:
    """Every collective of a program, in the order of its text.

    An instruction that moves nothing, since its groups are of one device, is left out. What is meant to be a
    reduce-scatter is found as an all-reduce of the whole where the backend has no pass that turns an
    all-reduce with a slice after it into one: XLA's CPU backend has not.

    Args:
        text: of ``jax.jit(f).lower(...).compile().as_text()``.
    """
    bodies = _computations(text)
    runs = _runs(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            group = _group_size(line) if match else 0
            if match and group != 1:
                arrays = _arrays(match["result"])
                if match["start"] and match["kind"] != "all-reduce":
                    # Its result is (operands, results), and for some kinds words of context, u32[].
                    arrays = [array for array in arrays if array.shape or array.dtype != "u32"]
                    arrays = arrays[len(arrays) // 2 :]
                found.append(Collective(match["kind"], tuple(arrays), group, runs.get(name, 1)))
    return found


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes of the results of all collectives of a kind, on one device; every kind of `KINDS` is there."""
    sums: dict[str, int] = dict.fromkeys(KINDS, 0)
    for collective in found:
        sums[collective.kind] += collective.bytes
    return sums


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start and " = " not in line.split("{")[0]:
            lines = bodies.setdefault(start["name"], [])
        lines.append(line)
    return bodies


def _runs(bodies: dict[str, list[str]]) -> dict[str, int]:
    """Computation -> how often it runs in one call; a loop of unknown length counts as one turn."""
    callers: dict[str, tuple[str, int]] = {}
    for name, lines in bodies.items():
        for line in lines:
            loop = _WHILE.search(line)
            if loop:
                trips = _TRIPS.search(line)
                callers[loop["body"]] = name, int(trips["n"]) if trips else 1
            branches = [part.strip(" %") for found in _BRANCHES.findall(line) for part in found.split(",")]
            for called in [*_CALLED.findall(line), *branches]:
                callers.setdefault(called, (name, 1))

    def runs(name: str) -> int:
        caller = callers.get(name)
        return caller[1] * runs(caller[0]) if caller else 1

    return {name: runs(name) for name in bodies}


def _arrays(result: str) -> list[Array]:
    found = []
    for match in _ARRAY.finditer(result):
        shape = tuple(int(size) for size in match["shape"].split(",") if size)
        bits = int(match["bits"] or 8)  # pred has a byte
        found.append(Array(match["type"], shape, math.prod(shape) * bits // 8))
    return found


def _group_size(line: str) -> int:
    if match := _AXES.search(line):
        sizes = dict(pair.split("=") for pair in match["sizes"].split(",") if pair)
        # Part of an axis is 'a':(before)size.
        axes = [axis.strip() for axis in match["axes"].split(",") if axis.strip()]
        return math.prod(int(axis.split(")")[1] if ":(" in axis else sizes[axis]) for axis in axes)
    if match := _IOTA.search(line):
        return int(match["size"])
    if match := _LISTED.search(line):
        return len(match["first"].split(","))
    return 0


@dataclass(frozen=True)
class ScalingBenchmark:
    """Compile a training step for growing numbers of devices: what each computes, sends and keeps."""

    sizes: tuple[Literal["small", "medium", "large"], ...] = ("small",)
    """Models, by the names of their configurations."""
    regimes: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    """Train everything, or adapters, embeddings and head."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices."""
    split: tuple[Literal["data", "fsdp"], ...] = ("data", "fsdp")
    """data: each device holds all parameters. fsdp: large ones are split over all devices."""
    rows: int = 16
    """Rows of each device."""
    vocabulary: int = 1000
    """Rows of the vocabulary."""
    output: Path | None = None
    """File for the figures as JSON."""


def benchmark_scaling(
    config: ScalingBenchmark, configurations: Mapping[str, PretrainConfig] = PRETRAIN
) -> dict[str, Any]:
    """Compile every step, print the figures side by side, and return them.

    Args:
        config: what to compile.
        configurations: by name; for each size there is ``<size>_lora``.

    Returns:
        ``settings`` and ``runs``, each with ``size``, ``regime``, ``split``, ``devices``, and the figures of
        :func:`step_cost`.

    Raises:
        InputError: numbers below 1.
    """
    for name, values in (
        ("devices", config.devices),
        ("rows", (config.rows,)),
        ("vocabulary", (config.vocabulary,)),
    ):
        if min(values, default=0) < 1:
            raise InputError(f"--{name} is {' '.join(map(str, values)) or 'empty'}: give 1 or more.")
    runs = []
    for size in config.sizes:
        for regime in config.regimes:
            chosen = _of_regime(configurations[f"{size}_lora"], regime)
            for split in config.split:
                for devices in config.devices:
                    if split == "fsdp" and devices == 1 and "data" in config.split:
                        continue  # the same program
                    mesh = MeshConfig(fsdp=devices if split == "fsdp" else 1)
                    task = replace(chosen, mesh=mesh), devices, config.rows, config.vocabulary
                    # The number of devices is fixed once a process has asked for them.
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                        cost = process.submit(_step_cost_on_cpu, *task).result()
                    runs.append({"size": size, "regime": regime, "split": split, "devices": devices, **cost})
    settings = {key: value for key, value in asdict(config).items() if key != "output"}
    report = {"settings": settings, "runs": runs}
    print(as_table(report))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def step_cost(config: PretrainConfig, rows: int, vocabulary: int) -> dict[str, Any]:
    """What one training step costs each of this process's devices.

    Args:
        config: model, adapters, regime, mesh, micro-batches.
        rows: rows of each device.
        vocabulary: rows of the vocabulary.

    Returns:
        ``flops`` (None where the compiler does not tell), ``instructions`` and ``bytes`` of collectives by
        kind (of their results, see `training.collectives`), and the bytes that a device keeps:
        ``parameter_bytes``, ``optimizer_bytes``, ``temporary_bytes``.
    """
    mesh = make_mesh(config=config.mesh)
    assembly = assemble_pretraining(config, vocabulary, mesh)
    state, step = assembly.state_shapes, assembly.step(config.train.micro_batches or 1)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split_rows(mesh)),
        example_batch(config.model, rows * mesh.size),
    )
    compiled = assembly.jit(step).lower(state, batch).compile()
    found = collectives(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    return {
        "flops": (compiled.cost_analysis() or {}).get("flops"),
        "instructions": {kind: sum(one.kind == kind for one in found) for kind in KINDS},
        "bytes": bytes_by_kind(found),
        "parameter_bytes": _bytes_per_device(state.variables),
        "optimizer_bytes": _bytes_per_device(state.opt_state),
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def as_table(report: Mapping[str, Any]) -> str:
    """The figures of :func:`benchmark_scaling` as aligned text."""
    columns = ("all-reduce", "all-gather", "other")
    lines = [
        f"{'':<25} {'':>9} {'MB a step and device':^32} {'sends':>5} {'MB a device':^29}",
        f"{'size':<7} {'regime':<6} {'split':<5} {'on':>4} {'GFLOP':>9} "
        + " ".join(f"{name:>10}" for name in columns)
        + f" {'':>5} {'parameters':>10} {'moments':>9} {'rest':>8}",
    ]
    for run in report["runs"]:
        sent = run["bytes"]
        other = sum(sent.values()) - sent["all-reduce"] - sent["all-gather"]
        lines.append(
            f"{run['size']:<7} {run['regime']:<6} {run['split']:<5} {run['devices']:>4} "
            f"{(run['flops'] or math.nan) / 1e9:>9.3f} "
            + " ".join(f"{value / 1e6:>10.3f}" for value in (sent["all-reduce"], sent["all-gather"], other))
            + f" {sum(run['instructions'].values()):>5} {run['parameter_bytes'] / 1e6:>10.3f} "
            f"{run['optimizer_bytes'] / 1e6:>9.3f} {(run['temporary_bytes'] or math.nan) / 1e6:>8.1f}"
        )
    return "\n".join(lines)


def _step_cost_on_cpu(config: PretrainConfig, devices: int, rows: int, vocabulary: int) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    return step_cost(config, rows, vocabulary)


def _of_regime(config: PretrainConfig, regime: str) -> PretrainConfig:
    return config if regime == "lora" else replace(config, lora=None, freezing=FreezingConfig("full"))


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )

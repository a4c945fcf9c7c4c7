"""How fast training is: our step beside the same model in PyTorch, on the same patients, in turns.

Contenders are processes of their own (`benchmark_contender`) that take turns; speeds are compared round by
round, and the ratio is given with an interval over the rounds.
"""

import importlib.util
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from behrt_jax.config.model import Attention, LoRAConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.presets import PRETRAIN
from experiments.benchmarks.harness import Contender, contest

# What is made of the seconds of the training benchmark's contenders.


def figures(
    size: str, regime: str, contender: Contender, contenders: list[Contender], ceiling: float
) -> dict[str, Any]:
    """What was measured of one contender.

    Returns:
        ``size``, ``regime``, ``contender``, its facts, ``step_seconds`` (median), ``tokens_per_second``
        (real tokens, which are events), ``patients_per_second``, ``flops_per_second``, ``mfu`` (of the
        ceiling; None where FLOPs are unknown), ``peak_bytes``, ``peak_bytes_per_patient`` in flight, and
        ``ratios``: patients per second as a multiple of each other contender's, ``[low, median, high]``,
        where low and high are the quartiles over the rounds.
    """
    seconds, facts = float(np.median(contender.seconds)), contender.facts
    achieved = facts["flops"] / seconds if facts["flops"] else None
    return {
        "size": size,
        "regime": regime,
        "contender": contender.name,
        **facts,
        "step_seconds": seconds,
        "all_seconds": contender.seconds,
        "tokens_per_second": tokens_a_patient(contenders) * facts["patients_per_step"] / seconds,
        "patients_per_second": facts["patients_per_step"] / seconds,
        "flops_per_second": achieved,
        "mfu": achieved / ceiling if achieved else None,
        "peak_bytes": contender.peak_bytes,
        "peak_bytes_per_patient": contender.peak_bytes / facts["patients_in_flight"],
        "ratios": {other.name: _ratio(contender, other) for other in contenders if other is not contender},
    }


def tokens_a_patient(contenders: list[Contender]) -> float:
    """Mean tokens of a patient, from all of them: each saw others of the same population."""
    tokens = sum(contender.facts["tokens_per_step"] for contender in contenders)
    return tokens / sum(contender.facts["patients_per_step"] for contender in contenders)


def as_table(results: list[dict[str, Any]]) -> str:
    """Figures of :func:`figures` for one size and regime as aligned text; ratios against the last column."""
    first = results[0]
    lines = [
        f"{first['size']} {first['regime']}, rows of {first['row_length']} tokens",
        f"  {'contender':<30} {'ms/step':>9} {'events/s':>10} {'MFU':>6} {'GFLOP':>8} {'peak MiB':>9} "
        f"{'MiB/patient':>11} {'compile s':>9} {'parts':>5} {'fill':>5}",
    ]
    for r in results:
        mfu = f"{100 * r['mfu']:5.0f}%" if r["mfu"] else f"{'':>6}"
        flops = f"{r['flops'] / 1e9:8.1f}" if r["flops"] else f"{'':>8}"
        lines.append(
            f"  {r['contender']:<30} {1e3 * r['step_seconds']:>9.1f} {r['tokens_per_second']:>10,.0f} "
            f"{mfu} {flops} {r['peak_bytes'] / 2**20:>9,.0f} {r['peak_bytes_per_patient'] / 2**20:>11.1f} "
            f"{r['compile_seconds']:>9.1f} {r['micro_batches']:>5} {100 * r['fill']:>4.0f}%"
        )
    for r in results:
        for other, (low, middle, high) in r["ratios"].items() if r["contender"].startswith("ours") else ():
            if other.startswith("torch"):
                quartiles = f"quartiles {low:.2f} to {high:.2f}"
                lines.append(f"  {r['contender']} / {other}: {middle:.2f} x ({quartiles})")
    return "\n".join(lines)


def _ratio(ours: Contender, theirs: Contender) -> tuple[float, float, float]:
    patients = ours.facts["patients_per_step"] / theirs.facts["patients_per_step"]
    ratios = patients * np.array(theirs.seconds) / np.array(ours.seconds)  # [rounds]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(low), float(middle), float(high)


ALL_LINEARS = ("query", "key", "value", "out", "intermediate", "output")
Baseline = Literal["eager-float32", "eager-bfloat16", "compiled-float32", "compiled-bfloat16"]
Layout = Literal["packed", "padded", "full"]


@dataclass(frozen=True)
class TrainBenchmark:
    """Time training steps of ours and of PyTorch's (where it is installed) in turns, on the same patients."""

    sizes: tuple[str, ...] = ("small", "medium", "large")
    """Named configurations, without _lora."""
    regimes: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    """full: all parameters train. lora: adapters on all six linear layers, embeddings and head."""
    layouts: tuple[Layout, ...] = ("packed", "padded")
    """Ours: packed has several patients in a row, padded one, as PyTorch. full compares both on rows
    without padding."""
    baselines: tuple[Baseline, ...] = ("eager-float32",)
    """PyTorch: eager or compiled, float32 or under bfloat16 autocast."""
    torch_lora: tuple[Literal["frozen", "lora"], ...] = ("frozen", "lora")
    """What PyTorch does where ours trains adapters, each tried. frozen: nothing in their place, the base is
    frozen, as in an implementation whose adapters are outside of the graph. lora: adapters on the same
    layers."""
    patients: int = 128
    """Patients a step of ours (rows, for full rows)."""
    torch_patients: tuple[int, ...] = ()
    """Patients a step of PyTorch's, each tried; 16, 32 and 8 for small, medium and large where not given."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of our matrix products."""
    attention: Attention | None = None
    """Of ours; as the named configuration where not given."""
    attention_dropout: float | None = None
    """Of both; as the named configuration where not given."""
    rematerialise: bool | None = None
    """Of ours; as the named configuration where not given."""
    scan_layers: bool | None = None
    """Of ours; as the named configuration where not given."""
    torch_compile_mode: str = "default"
    """``mode`` of ``torch.compile``, for compiled baselines."""
    micro_batches: int | None = None
    """Parts of our batch; chosen by a rule where not given."""
    rank: int = 16
    """Of the adapters."""
    vocabulary_size: int = 1000
    """Codes and special tokens."""
    rounds: int = 7
    """Turns of each contender."""
    steps_per_turn: int | None = None
    """Steps of a turn; 1 on a CPU and 10 on an accelerator where not given."""
    build_together: bool = False
    """Build all contenders at the same time, which is quicker where there are many cores; compile times are
    then not comparable, and a GPU's compiler may choose kernels less well."""
    output: Path | None = None
    """Folder for train.json and train.png; nothing is written where not given."""


def benchmark_train(
    config: TrainBenchmark, configurations: Mapping[str, PretrainConfig] = PRETRAIN
) -> dict[str, Any]:
    """Run the contest for each size and regime, print the tables and return the figures.

    Args:
        config: what to run.
        configurations: named configurations, of which the model and learning rate are taken.

    Returns:
        ``settings``, ``machine`` (with ``ceiling``, FLOP/s of a large matrix product) and ``results``, a dict
        for each contender, see :func:`benchmark_figures.figures`.

    Raises:
        InputError: an unknown size, layouts that do not go together, no steps in a turn, or a contender
            that failed.
    """
    for size in config.sizes:
        if size not in configurations:
            raise InputError(f"--sizes: {size!r} is unknown, choose from {', '.join(configurations)}.")
    if "full" in config.layouts and set(config.layouts) != {"full"}:
        raise InputError("--layouts: full rows are of other patients than the rest: run full by itself.")
    if config.steps_per_turn is not None and config.steps_per_turn < 1:
        raise InputError(f"--steps_per_turn is {config.steps_per_turn}: give 1 or more.")
    with_torch = importlib.util.find_spec("torch") is not None
    if not with_torch:
        print('PyTorch is not installed (extra "torch"): ours runs alone.')
    machine = _machine(with_torch, config.precision)
    report: dict[str, Any] = {"settings": _plain(asdict(config)), "machine": machine}
    report["results"] = []
    for size in config.sizes:
        for regime in config.regimes:
            tasks = tasks_of(config, configurations[size], size, regime, with_torch)
            with contest(tasks, config.rounds, config.build_together) as contenders:
                report["results"] += [
                    figures(size, regime, contender, contenders, machine["ceiling"])
                    for contender in contenders
                ]
            print(as_table(report["results"][-len(tasks) :]), flush=True)
    if config.output is not None:
        from experiments.benchmarks.harness import plot_speeds

        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "train.json").write_text(json.dumps(report, indent=1) + "\n")
        plot_speeds(report["results"], config.output / "train.png")
        print(f"Wrote {config.output / 'train.json'} and {config.output / 'train.png'}.")
    return report


def tasks_of(
    config: TrainBenchmark, pretrain: PretrainConfig, size: str, regime: str, with_torch: bool
) -> dict[str, dict[str, Any]]:
    """Name -> task of each contender: ours first, in each layout, then PyTorch's."""
    usual = {"small": 16, "medium": 32, "large": 8}.get(size, 8)
    torch_patients = config.torch_patients or (usual,)
    names = ("attention", "attention_dropout", "rematerialise", "scan_layers")
    changes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    common = {
        "model": asdict(replace(pretrain.model, compute_dtype=config.precision, **changes)),
        "lora": asdict(LoRAConfig(rank=config.rank, targets=ALL_LINEARS)),
        "learning_rate": pretrain.optimizer.learning_rate,
        "regime": regime,
        "vocabulary_size": config.vocabulary_size,
        "precision": config.precision,
        "steps_per_turn": config.steps_per_turn,
        "micro_batches": config.micro_batches,
        "without": None,
    }
    tasks = {}
    for layout in config.layouts:
        # On padded rows both have the same shapes.
        patients = torch_patients[0] if layout == "padded" else config.patients
        tasks[f"ours {layout}"] = {**common, "kind": "jax", "layout": layout, "patients": patients}
    layout = "full" if "full" in config.layouts else "padded"
    for baseline in config.baselines if with_torch else ():
        mode, precision = baseline.split("-")
        for patients in torch_patients:
            for torch_regime in ("full",) if regime == "full" else config.torch_lora:
                own = {"kind": "torch", "layout": layout, "patients": patients, "precision": precision}
                own |= {"compiled": mode == "compiled", "compile_mode": config.torch_compile_mode}
                own |= {"torch_regime": torch_regime}
                tasks[f"torch {torch_regime} {mode} {precision} {patients}"] = {**common, **own}
    return tasks


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def _machine(with_torch: bool, precision: str) -> dict[str, Any]:
    # The largest rate of ten turns. The device is told by that process: this one takes no memory of it.
    with contest({"ceiling": {"kind": "ceiling", "precision": precision}}, rounds=10) as (product,):
        ceiling, device = product.facts["flops"] / min(product.seconds), product.facts["device"]
    packages = ("jax", "jaxlib", "flax", "numpy", *(["torch"] if with_torch else []))
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "device": device,
        "ceiling": ceiling,
        **{package: version(package) for package in packages},
    }

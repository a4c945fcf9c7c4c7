"""The train step with one optimisation undone at a time, in turns with the step as it is."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from behrt_jax.config import LoRAConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.workflows.benchmark_ablations import ABLATIONS, LORA_ONLY
from behrt_jax.workflows.benchmark_train import ALL_LINEARS
from behrt_jax.workflows.benchmark_turns import contest


@dataclass(frozen=True)
class AblationBenchmark:
    """Time the train step with one optimisation undone at a time, in turns with the step as it is."""

    size: str = "large"
    """Named configuration, without _lora."""
    regime: Literal["full", "lora"] = "lora"
    """full, or adapters on all six linear layers with embeddings and head."""
    without: tuple[str, ...] = ()
    """Optimisations to undo, by name; all that apply where not given."""
    patients: int = 128
    """Patients a step."""
    rank: int = 16
    """Of the adapters."""
    vocabulary_size: int = 1000
    """Codes and special tokens."""
    at_once: int = 4
    """Contenders that take turns with the step as it is, before the next ones do; each holds a model."""
    rounds: int = 7
    """Turns of each."""
    output: Path | None = None
    """JSON file for the figures."""


def benchmark_ablation(
    config: AblationBenchmark, configurations: Mapping[str, PretrainConfig]
) -> dict[str, Any]:
    """Run it, print a table and return ``settings`` and ``results``: name -> ``what``, ``slower``
    (``[low, median, high]`` over the rounds, quartiles), ``step_seconds``, ``peak_bytes``.

    Raises:
        InputError: an unknown configuration or optimisation, or a contender that failed.
    """
    if config.size not in configurations:
        raise InputError(f"--size: {config.size!r} is unknown, choose from {', '.join(configurations)}.")
    names = config.without or tuple(n for n in ABLATIONS if config.regime == "lora" or n not in LORA_ONLY)
    unknown = sorted(set(names) - set(ABLATIONS))
    if unknown:
        raise InputError(f"--without: {unknown[0]!r} is unknown, choose from {', '.join(ABLATIONS)}.")
    pretrain = configurations[config.size]
    common = {
        "kind": "jax",
        "layout": "packed",
        "model": asdict(replace(pretrain.model, compute_dtype="float32")),
        "lora": asdict(LoRAConfig(rank=config.rank, targets=ALL_LINEARS)),
        "learning_rate": pretrain.optimizer.learning_rate,
        "regime": config.regime,
        "patients": config.patients,
        "vocabulary_size": config.vocabulary_size,
        "micro_batches": None,
        "steps_per_turn": None,
    }
    results: dict[str, Any] = {}
    print(f"{config.size} {config.regime}, {config.patients} patients: time of a step without")
    for start in range(0, len(names), config.at_once):
        group = names[start : start + config.at_once]
        tasks = {name: {**common, "without": name} for name in group}
        with contest({"as it is": {**common, "without": None}, **tasks}, config.rounds) as contenders:
            whole, *others = contenders
            for other in others:
                patients = whole.facts["patients_per_step"] / other.facts["patients_per_step"]
                ratio = patients * np.array(other.seconds) / np.array(whole.seconds)  # [rounds]
                low, middle, high = (float(value) for value in np.percentile(ratio, [25, 50, 75]))
                results[other.name] = {
                    "what": ABLATIONS[other.name].what,
                    "slower": [low, middle, high],
                    "step_seconds": float(np.median(other.seconds)),
                    "step_seconds_as_it_is": float(np.median(whole.seconds)),
                    "peak_bytes": other.peak_bytes,
                    "peak_bytes_as_it_is": whole.peak_bytes,
                }
                what = ABLATIONS[other.name].what
                print(f"  {other.name:<18} {middle:5.2f} x ({low:.2f} to {high:.2f})  {what}")
    report = {"settings": {**asdict(config), "output": None}, "results": results}
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"Wrote {config.output}.")
    return report

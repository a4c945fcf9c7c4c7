"""What a training step costs under each freezing regime: compiled FLOPs, and time."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import jax

from behrt_jax.config import PretrainConfig
from behrt_jax.data.load import load_sequences
from behrt_jax.training.mesh import make_mesh, put_rows, replicated
from behrt_jax.training.parameter_report import count_parameters
from behrt_jax.training.sharding import shardings_of
from behrt_jax.training.state import init_state, optimizer_for, set_up
from behrt_jax.training.step import make_train_step
from behrt_jax.workflows.pretraining_batches import split_batches

WARM_UP = 3


def measure_costs(
    configs: Mapping[str, PretrainConfig], timed_steps: int, devices: Sequence[Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Count and time one training step of each configuration on the same batch.

    The steps are timed in turns, one of each, so that whatever else the machine does falls on all alike.

    Args:
        configs: regime -> configuration; they differ in adapters and freezing alone. Data is uniform.
        timed_steps: steps of each that are timed; 0 for none.
        devices: devices to run on; all where not given.

    Returns:
        regime -> ``trainable``, ``total``, ``trainable_percent``; ``flops`` of the compiled step (None
        where the compiler does not tell), ``step_seconds`` (median), and both as multiples of those of
        ``full`` (``flops_of_full``, ``time_of_full``; None without it).
    """
    first = next(iter(configs.values()))
    mesh = make_mesh(devices, first.mesh)
    data = load_sequences(replace(first.data, source="uniform"), first.model.sep_token)
    batches, _ = split_batches(first, data, mesh.size * (first.train.micro_batches or 1))
    batch = put_rows(batches.batch(0), mesh)

    costs: dict[str, dict[str, Any]] = {}
    steps, states = {}, {}
    for name, config in configs.items():
        setup = set_up(config, len(data.vocabulary), mesh)
        optimizer = optimizer_for(config, setup, total_steps=1000)
        init_key, step_key = jax.random.split(jax.random.key(0))
        states[name] = init_state(config, setup, optimizer, init_key, mesh)
        step = jax.jit(
            make_train_step(
                setup.predictor,
                optimizer,
                setup.mask,
                config.masking,
                step_key,
                clip_norm=config.optimizer.clip_norm,
                micro_batches=first.train.micro_batches or 1,
            ),
            donate_argnums=0,
            out_shardings=(shardings_of(states[name]), replicated(mesh)),
        )
        steps[name] = step.lower(states[name], batch).compile()
        analysis = steps[name].cost_analysis() or {}
        report = count_parameters(setup.shapes, setup.mask)
        costs[name] = {
            **{key: report[key] for key in ("trainable", "total", "trainable_percent")},
            "flops": analysis.get("flops"),
            "step_seconds": None,
        }
    if timed_steps:
        for name, seconds in _time_in_turns(steps, states, batch, timed_steps).items():
            costs[name]["step_seconds"] = seconds
    for cost in costs.values():
        for key, ratio in (("flops", "flops_of_full"), ("step_seconds", "time_of_full")):
            full = costs.get("full", {}).get(key)
            cost[ratio] = cost[key] / full if full and cost[key] else None
    return costs


def _time_in_turns(
    steps: Mapping[str, Any], states: dict[str, Any], batch: Any, rounds: int
) -> dict[str, float]:
    """Median seconds of each step; `states` are used up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], batch))
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}

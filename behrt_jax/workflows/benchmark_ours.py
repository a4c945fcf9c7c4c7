"""Our train step as a contender of the training benchmark."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from behrt_jax.config import LoRAConfig, ModelConfig, OptimizerConfig, PretrainConfig
from behrt_jax.data.batches import training_batches, with_rows_a_multiple_of
from behrt_jax.training.host_memory import keep_freed_memory
from behrt_jax.training.mesh import make_mesh, put_rows
from behrt_jax.training.micro_batches import likely_parts
from behrt_jax.training.state import init_state, optimizer_for, run_keys, set_up
from behrt_jax.training.step import Predictor, make_train_step
from behrt_jax.workflows.benchmark_ablations import ABLATIONS, no_change
from behrt_jax.workflows.benchmark_patients import DISTINCT_BATCHES, load_patients, steps_of
from behrt_jax.workflows.matrix_flops import matrix_flops
from behrt_jax.workflows.micro_batches import rows_multiple


def jax_contender(task: Mapping[str, Any]) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """Our train step on packed, padded or full rows."""
    keep_freed_memory()
    model = ModelConfig(**task["model"])
    adapters = None
    if task["regime"] == "lora":
        adapters = LoRAConfig(**{**task["lora"], "targets": tuple(task["lora"]["targets"])})
    config = PretrainConfig(
        model=model, lora=adapters, optimizer=OptimizerConfig(learning_rate=task["learning_rate"])
    )
    if adapters is not None:
        config = replace(config, freezing=replace(config.freezing, regime="lora"))
    ablation = ABLATIONS[task["without"]] if task["without"] else no_change
    config, layout = ablation.settings(config, task["layout"])

    data = load_patients(task)
    packed = layout == "packed"
    packing: dict[str, Any] = {
        "row_length": model.positions,
        "batch_size": task["patients"],
        # Without packing as many rows as PyTorch has, not about as many.
        "batch_tokens": None if packed else task["patients"] * model.positions,
        "window": "recent",
        "packed": packed,
    }
    mesh = make_mesh(jax.devices()[:1])
    batches = training_batches(data.splits["train"], **packing)
    platform = jax.devices()[0].platform
    rows, width = batches.rows_per_batch, model.ffn_size or 4 * model.hidden_size
    likely = likely_parts(rows, model.positions, width, platform)
    parts = ablation.micro_batches or task["micro_batches"] or likely
    batches = with_rows_a_multiple_of(batches, rows_multiple(batches, mesh, parts))
    distinct = min(DISTINCT_BATCHES, max(1, batches.steps_per_epoch - 1))  # an epoch's last one is smaller
    host = [batches.batch(step) for step in range(distinct)]
    placed = [put_rows(batch, mesh) for batch in host]

    with ExitStack() as stack:
        stack.enter_context(ablation.patched())
        config = replace(config, data=replace(config.data, packed=packed))
        setup = set_up(config, len(data.vocabulary))
        optimizer = optimizer_for(config, setup, total_steps=1000)
        init_key, step_key, _ = run_keys(0)

        def train_step(predictor: Predictor, parts: int) -> Callable[..., Any]:
            return make_train_step(
                predictor,
                optimizer,
                setup.mask,
                config.masking,
                step_key,
                clip_norm=config.optimizer.clip_norm,
                micro_batches=parts,
            )

        state = init_state(config, setup, optimizer, init_key, mesh)
        # What the model needs and no more: attention without tiles, nothing computed twice.
        plain = replace(model, attention="dense", rematerialise=False, head_chunk=len(data.vocabulary))
        whole = set_up(replace(config, model=plain), len(data.vocabulary)).predictor
        flops = matrix_flops(train_step(whole, 1), state, placed[0])
        donated = (0,) if ablation.donate else ()
        started = time.perf_counter()
        step = (
            jax.jit(train_step(setup.predictor, parts), donate_argnums=donated)
            .lower(state, placed[0])
            .compile()
        )
        compile_seconds = time.perf_counter() - started

    steps = steps_of(task, platform)

    def turn(index: int) -> Any:
        nonlocal state
        totals = None
        for number in range(index * steps, (index + 1) * steps):
            state, totals = step(state, placed[number % distinct])
        return jax.block_until_ready((state.step, totals))

    real = [int((batch.segment_ids > 0).sum()) for batch in host]
    patients = [sum(int(np.unique(row[row > 0]).size) for row in batch.segment_ids) for batch in host]
    return turn, {
        "compile_seconds": compile_seconds,
        "flops": flops,
        "micro_batches": parts,
        "steps_per_turn": steps,
        "rows": batches.batch_rows,
        "row_length": batches.row_length,
        "tokens_per_step": float(np.mean(real)),
        "patients_per_step": float(np.mean(patients)),
        "patients_in_flight": float(np.mean(patients)),
        "fill": float(np.mean(real)) / (batches.batch_rows * batches.row_length),
        "device": jax.devices()[0].device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.shapes)),
    }

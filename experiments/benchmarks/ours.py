"""Our train step as a contender of the training benchmark."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig
from behrt_jax.data.batches import RowShape, training_batches
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.files import from_stored
from behrt_jax.records.load import load_sequences
from behrt_jax.training.devices import make_mesh, put_rows
from behrt_jax.training.micro_batches import likely_parts, rows_multiple
from behrt_jax.training.state import assemble_pretraining
from experiments.benchmarks.ablation import ABLATIONS, OPTIONS, no_change
from experiments.benchmarks.operations import matrix_flops

# The machine's rate of large matrix products, a contender of the training benchmark.

TURN_SECONDS = 0.02
"""Duration of a turn, about: a host's wait for an accelerator is short beside it."""


def ceiling(task: Mapping[str, Any]) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """A turn's seconds are those of ``flops``, one product or several of the same square matrices."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    dtype = jnp.bfloat16 if task["precision"] == "bfloat16" else jnp.float32

    @jax.jit
    def operands() -> tuple[jax.Array, jax.Array]:
        # Not ones or zeros: a chip draws less power for those, and so runs faster.
        left, right = jax.random.normal(jax.random.key(0), (2, size, size))
        # A product has values about as large as the left matrix, and so has the product of that.
        return left.astype(dtype), (right * size**-0.5).astype(dtype)

    @jax.jit
    def multiply(left: jax.Array, right: jax.Array, products: int) -> jax.Array:
        def product(_: int, x: jax.Array) -> jax.Array:
            return jnp.matmul(x, right, preferred_element_type=dtype)

        return jax.lax.fori_loop(0, products, product, left)

    left, right = operands()

    def run(products: int) -> jax.Array:
        return jax.block_until_ready(multiply(left, right, products))

    run(1)  # compiles
    started = time.perf_counter()
    run(1)
    products = max(1, round(TURN_SECONDS / (time.perf_counter() - started)))
    return lambda index: run(products), {
        "flops": 2.0 * size**3 * products,
        "device": jax.devices()[0].device_kind,
    }


# The generated patients of the training benchmark.

DISTINCT_BATCHES = 4
"""Batches that a contender has on the device and trains on in turn."""


def load_patients(task: Mapping[str, Any]) -> SequenceSet:
    """Generated records with the lengths of clinical histories: mean 15 events, median 10; for full rows,
    histories that are each longer than a row.
    """
    full = task["layout"] == "full"
    data = DataConfig(
        subjects=max(400 if full else 3000, 6 * task["patients"]),
        vocabulary_size=task["vocabulary_size"],
        events_mean=min(10_000.0, 1.5 * task["model"]["positions"]) if full else 15.0,
        events_spread=0.1 if full else 0.9,
        tuning_fraction=0.01,
        held_out_fraction=0.01,
    )
    return load_sequences(data, False)


def steps_of(task: Mapping[str, Any], platform: str) -> int:
    """Steps of a turn: an accelerator's are shorter than what the host needs to wait for one."""
    return task["steps_per_turn"] or (1 if platform == "cpu" else 10)


def jax_contender(task: Mapping[str, Any]) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """Our train step on packed, padded or full rows."""
    model = ModelConfig(**task["model"])
    adapters = None
    if task["regime"] == "lora":
        adapters = from_stored(LoRAConfig, task["lora"])
    config = PretrainConfig(
        model=model, lora=adapters, optimizer=OptimizerConfig(learning_rate=task["learning_rate"])
    )
    if adapters is not None:
        config = replace(config, freezing=replace(config.freezing, regime="lora"))
    ablation = {**ABLATIONS, **OPTIONS}[task["without"]] if task["without"] else no_change
    config, layout = ablation.settings(config, task["layout"])
    model = config.model

    data = load_patients(task)
    packed = layout == "packed"
    mesh = make_mesh(jax.devices()[:1])
    batches = training_batches(
        data.splits["train"],
        RowShape(model.positions, packed),
        batch_size=task["patients"],
        # Without packing as many rows as PyTorch has, not about as many.
        batch_tokens=None if packed else task["patients"] * model.positions,
        window="recent",
    )
    platform = jax.devices()[0].platform
    rows, width = batches.rows_per_batch, model.inner_size
    likely = likely_parts(rows, model.positions, width, platform)
    parts = ablation.micro_batches or task["micro_batches"] or likely
    batches = batches.with_rows_a_multiple_of(rows_multiple(batches, mesh, parts))
    distinct = min(DISTINCT_BATCHES, max(1, batches.steps_per_epoch - 1))  # an epoch's last one is smaller
    host = [batches.batch(step) for step in range(distinct)]
    placed = [put_rows(batch, mesh) for batch in host]

    with ExitStack() as stack:
        stack.enter_context(ablation.patched())
        config = replace(config, data=replace(config.data, packed=packed))
        assembly = assemble_pretraining(config, len(data.vocabulary), mesh)
        state = assembly.first_state()
        # What the model needs and no more: attention without tiles, nothing computed twice.
        plain = replace(model, attention="dense", rematerialise=False, head_chunk=len(data.vocabulary))
        whole = assemble_pretraining(replace(config, model=plain), len(data.vocabulary), mesh)
        flops = matrix_flops(whole.step(), state, placed[0])
        donated = (0,) if ablation.donate else ()
        started = time.perf_counter()
        step = jax.jit(assembly.step(parts), donate_argnums=donated).lower(state, placed[0]).compile()
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
        "compiled_flops": (step.cost_analysis() or {}).get("flops", 0.0),
        "micro_batches": parts,
        "steps_per_turn": steps,
        "rows": batches.batch_rows,
        "row_length": batches.row_length,
        "tokens_per_step": float(np.mean(real)),
        "patients_per_step": float(np.mean(patients)),
        "patients_in_flight": float(np.mean(patients)),
        "fill": float(np.mean(real)) / (batches.batch_rows * batches.row_length),
        "device": jax.devices()[0].device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(assembly.setup.shapes)),
    }

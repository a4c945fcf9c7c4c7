"""One contender of the training benchmark, in a process of its own: our step, or that of PyTorch.

``python -m`` of this module builds the contender that its one argument, JSON, tells, and prints its facts as
a line of JSON. For each line that it then reads it runs one turn and prints the seconds that it took. At the
end of its input it prints its peak memory.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from behrt_jax.config import DataConfig, LoRAConfig, ModelConfig
from behrt_jax.data.load import load_sequences
from behrt_jax.data.sequences import SequenceSet

WARM_UP = 2
DISTINCT_BATCHES = 4
FULL_ROWS_MEAN = 2000.0
"""Mean events of a history in the benchmark of full rows: hardly any row has padding then."""

Turn = Callable[[int], Any]


def load_patients(task: Mapping[str, Any]) -> SequenceSet:
    """Generated records with the lengths of clinical histories: mean 15 events, median 10."""
    full = task["layout"] == "full"
    mean = FULL_ROWS_MEAN if full else 15.0
    data = DataConfig(
        subjects=400 if full else max(3000, 6 * task["patients"]),
        vocabulary_size=task["vocabulary_size"],
        events_mean=mean,
        events_spread=0.1 if full else 0.9,
        tuning_fraction=0.01,
        held_out_fraction=0.01,
    )
    return load_sequences(data, False)


def jax_contender(task: Mapping[str, Any]) -> tuple[Turn, dict[str, Any]]:
    """Our train step on packed, padded or full rows."""
    import jax

    from behrt_jax.config import OptimizerConfig, PretrainConfig
    from behrt_jax.data.batches import training_batches
    from behrt_jax.training.host_memory import keep_freed_memory
    from behrt_jax.training.mesh import make_mesh, put_rows
    from behrt_jax.training.micro_batches import likely_parts
    from behrt_jax.training.state import init_state, optimizer_for, run_keys, set_up
    from behrt_jax.training.step import make_train_step
    from behrt_jax.workflows.benchmark_ablations import ABLATIONS, no_change

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
    packing: dict[str, Any] = {
        "row_length": model.positions,
        "batch_size": task["patients"],
        "window": "recent" if layout != "full" else "all",
        "packed": layout != "padded",
    }
    mesh = make_mesh(jax.devices()[:1])
    rows = training_batches(data.splits["train"], **packing).rows_per_batch
    platform = jax.devices()[0].platform
    likely = likely_parts(rows, model.positions, model.ffn_size or 4 * model.hidden_size, platform)
    parts = ablation.micro_batches or task["micro_batches"] or likely
    batches = training_batches(data.splits["train"], **packing, multiple_of=parts)
    steps = min(DISTINCT_BATCHES, max(1, batches.steps_per_epoch - 1))  # the last of an epoch is smaller
    host = [batches.batch(step) for step in range(steps)]
    placed = [put_rows(batch, mesh) for batch in host]

    with ExitStack() as stack:
        stack.enter_context(ablation.patched())
        setup = set_up(config, len(data.vocabulary))
        optimizer = optimizer_for(config, setup, total_steps=1000)
        init_key, step_key, _ = run_keys(0)

        def compiled(parts: int, batch: Any) -> Any:
            step = make_train_step(
                setup.predictor,
                optimizer,
                setup.mask,
                config.masking,
                step_key,
                clip_norm=config.optimizer.clip_norm,
                micro_batches=parts,
            )
            donated = (0,) if ablation.donate else ()
            return jax.jit(step, donate_argnums=donated).lower(state, batch).compile()

        state = init_state(config, setup, optimizer, init_key, mesh)
        started = time.perf_counter()
        step = compiled(parts, placed[0])
        compile_seconds = time.perf_counter() - started
        flops = None
        if task["count_flops"]:
            # A loop's body is counted once, so the whole batch is counted in one part.
            whole = compiled(1, placed[0]) if parts > 1 else step
            flops = float((whole.cost_analysis() or {}).get("flops", 0.0)) or None

    def turn(index: int) -> Any:
        nonlocal state
        state, totals = step(state, placed[index % steps])
        return jax.block_until_ready((state.step, totals))

    real = [int((batch.segment_ids > 0).sum()) for batch in host]
    patients = [sum(int(np.unique(row[row > 0]).size) for row in batch.segment_ids) for batch in host]
    return turn, {
        "compile_seconds": compile_seconds,
        "flops": flops,
        "micro_batches": parts,
        "rows": batches.batch_rows,
        "row_length": batches.row_length,
        "tokens_per_turn": float(np.mean(real)),
        "patients_per_turn": float(np.mean(patients)),
        "patients_in_flight": float(np.mean(patients)),
        "fill": float(np.mean(real)) / (batches.batch_rows * batches.row_length),
        "device": jax.devices()[0].device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.shapes)),
    }


def torch_contender(task: Mapping[str, Any]) -> tuple[Turn, dict[str, Any]]:
    """The PyTorch reference on padded or full rows."""
    import torch  # pyright: ignore[reportMissingImports]

    from behrt_jax.config import OptimizerConfig
    from behrt_jax.interop.torch_batches import full_batches, padded_batches
    from behrt_jax.interop.torch_training import make_torch_step

    model = ModelConfig(**task["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    data = load_patients(task)
    make_batches = full_batches if task["layout"] == "full" else padded_batches
    stream = make_batches(data.splits["train"], model.positions, task["patients"])
    placed = [batch.to(device) for batch, _ in zip(stream, range(DISTINCT_BATCHES), strict=False)]
    regime = task["torch_regime"]
    adapters = None
    if regime == "lora":
        adapters = LoRAConfig(**{**task["lora"], "targets": tuple(task["lora"]["targets"])})
    step = make_torch_step(
        model,
        len(data.vocabulary),
        regime=regime,
        lora=adapters,
        precision=task["precision"],
        compiled=task["compiled"],
        device=device,
        optimizer=OptimizerConfig(learning_rate=task["learning_rate"]),
    )

    def turn(index: int) -> Any:
        return step(placed[index % len(placed)]).item()

    started = time.perf_counter()
    turn(0)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    turn(1)
    rows, length = placed[0].codes.shape
    padding = [0.0 if batch.padding is None else float(batch.padding.sum()) for batch in placed]
    real = rows * length - float(np.mean(padding))
    return turn, {
        "compile_seconds": max(0.0, seconds - (time.perf_counter() - started)) if task["compiled"] else 0.0,
        "flops": None,
        "micro_batches": 1,
        "rows": rows,
        "row_length": length,
        "tokens_per_turn": real,
        "patients_per_turn": float(rows),
        "patients_in_flight": float(rows),
        "fill": real / (rows * length),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in step.module.parameters()),
    }


def ceiling(task: Mapping[str, Any]) -> tuple[Turn, dict[str, Any]]:
    """The machine's rate of large matrix products: a turn's seconds are those of `flops`."""
    import jax
    import jax.numpy as jnp

    accelerator = jax.devices()[0].platform != "cpu"
    size = 8192 if accelerator else 2048
    dtype = jnp.bfloat16 if task["precision"] == "bfloat16" else jnp.float32
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=dtype))
    left = jnp.ones((size, size), dtype)
    return lambda index: jax.block_until_ready(product(left, left)), {"flops": 2.0 * size**3}


def peak_bytes(kind: str) -> int:
    """Largest memory of the device that was in use, or of this process where the device is the host."""
    if kind == "torch":
        import torch  # pyright: ignore[reportMissingImports]

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    else:
        import jax

        stats = jax.devices()[0].memory_stats()
        if stats:
            return stats["peak_bytes_in_use"]
    return _process_bytes("VmHWM")


def _process_bytes(name: str) -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith(name))
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(task: Mapping[str, Any]) -> None:
    """Serve turns, see the module."""
    make = {"jax": jax_contender, "torch": torch_contender, "ceiling": ceiling}[task["kind"]]
    turn, facts = make(task)
    for index in range(WARM_UP):
        turn(index)
    print(json.dumps(facts), flush=True)
    for index, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        turn(index)
        print(json.dumps(time.perf_counter() - started), flush=True)
    print(json.dumps({"peak_bytes": peak_bytes(task["kind"])}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

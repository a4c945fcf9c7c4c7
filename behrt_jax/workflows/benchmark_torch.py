"""The train step of the PyTorch reference as a contender of the training benchmark."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from behrt_jax.config import LoRAConfig, ModelConfig, OptimizerConfig
from behrt_jax.interop.torch_batches import full_batches, padded_batches
from behrt_jax.interop.torch_training import make_torch_step
from behrt_jax.workflows.benchmark_patients import DISTINCT_BATCHES, load_patients, steps_of


def torch_contender(task: Mapping[str, Any]) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """The PyTorch reference on padded or full rows."""
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
        compile_mode=task["compile_mode"],
        device=device,
        optimizer=OptimizerConfig(learning_rate=task["learning_rate"]),
    )
    steps = steps_of(task, device)

    def turn(index: int) -> float:
        loss = torch.zeros(())
        for number in range(index * steps, (index + 1) * steps):
            loss = step(placed[number % len(placed)])
        if device == "cuda":
            torch.cuda.synchronize()  # the update comes after the loss
        return loss.item()

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
        "steps_per_turn": steps,
        "rows": rows,
        "row_length": length,
        "tokens_per_step": real,
        "patients_per_step": float(rows),
        "patients_in_flight": float(rows),
        "fill": real / (rows * length),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in step.module.parameters()),
    }

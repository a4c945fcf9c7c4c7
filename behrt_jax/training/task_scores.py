"""Outputs of a fine-tuned model for all examples of some batches, and what they are worth on tuning."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from behrt_jax.config import TaskKind
from behrt_jax.data.task_batches import TaskBatch, TaskBatches
from behrt_jax.evaluation.ranking import auroc
from behrt_jax.training.mesh import put_rows
from behrt_jax.training.task_losses import task_losses
from behrt_jax.training.update import Variables


def score(
    output_step: Callable[[Variables, TaskBatch], jax.Array],
    variables: Variables,
    batches: TaskBatches,
    mesh: Mesh,
) -> np.ndarray:
    """Outputs of every example, in the order of the examples, float32 ``[examples, outputs]``.

    The next batch is on its way while the host takes the outputs of the one before.

    Args:
        output_step: a jitted `task_step.make_output_step`.
        variables: of the model.
        batches: one epoch of them is read.
        mesh: the devices.
    """
    found, pending = None, []

    def take() -> None:
        nonlocal found
        examples, outputs = pending.pop(0)
        outputs = np.asarray(outputs)  # [B, S, O]
        if found is None:
            found = np.empty((len(batches.examples), outputs.shape[-1]), np.float32)
        filled = examples >= 0
        found[examples[filled]] = outputs[filled]

    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        pending.append((batch.examples, output_step(variables, put_rows(batch, mesh))))
        if len(pending) > 1:
            take()
    while pending:
        take()
    assert found is not None
    return found


def task_metrics(kind: TaskKind, outputs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Mean loss of examples and, for binary tasks, ``auroc`` (None where it is not defined).

    Args:
        kind: of the task.
        outputs: float32 ``[examples, outputs]``.
        targets: float32 ``[examples, targets]``.
    """
    losses = np.asarray(task_losses(kind, outputs, targets), np.float64)
    metrics: dict[str, Any] = {"loss": float(losses.mean()), "targets": len(losses)}
    if kind == "binary":
        metrics["auroc"] = auroc(outputs[:, 0], targets[:, 0] > 0.5)
    if kind == "multiclass":
        metrics["accuracy"] = float((outputs.argmax(axis=1) == targets[:, 0]).mean())
    return metrics

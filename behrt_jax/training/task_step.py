"""The jitted steps of a labelled task."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.adapters.new_codes import with_new_codes
from behrt_jax.adapters.products import Product
from behrt_jax.config import LoRAConfig, TaskKind
from behrt_jax.data.rows import Batch
from behrt_jax.data.task_batches import TaskBatch
from behrt_jax.models.behrt import BEHRTForTask
from behrt_jax.training.sharding import gather
from behrt_jax.training.task_losses import task_losses
from behrt_jax.training.update import Objective, Totals, Variables


class TaskPredictor(NamedTuple):
    """How rows of examples become outputs: the model and, if any, its adapters."""

    model: BEHRTForTask
    kind: TaskKind
    lora: LoRAConfig | None = None
    product: Product = "activations"
    mesh: Mesh | None = None
    packed: bool = True
    """Rows may hold several examples, see `models.attention.SelfAttention`."""

    def merged(self, variables: Variables) -> dict[str, Any]:
        """What a step works out once for all its micro-batches, see `lora.merged_kernels`."""
        if self.lora is None or self.product != "merged":
            return {}
        return lora.merged_kernels(variables["params"], variables["lora"], self.lora)

    def outputs(
        self,
        variables: Variables,
        batch: Batch,
        segments: int,
        key: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        """Outputs of each segment, float32 `[batch, segments, outputs]`; no key, no dropout.

        `rows` numbers the rows, int32 `[batch]`, where they are not 0, 1, ...
        """
        deterministic = key is None
        adapters = lora.applying(self.lora, self.product, deterministic, rows) if self.lora else nullcontext()
        with adapters:
            return self.model.apply(  # pyright: ignore[reportReturnType]
                with_new_rows(gather(variables, self.mesh)),
                batch.codes,
                batch.ages,
                batch.visits,
                batch.positions,
                batch.segment_ids,
                segments,
                deterministic=deterministic,
                rows=rows,
                packed=self.packed,
                rngs=None if key is None else {"dropout": key},
            )


def with_new_rows(variables: Variables) -> Variables:
    """Variables whose code table ends with the rows of new codes, if there are any."""
    return {**variables, "params": with_new_codes(variables["params"])}


def task_objective(predictor: TaskPredictor) -> Objective:
    """The task's loss, each example weighed as its batch says."""
    local = predictor._replace(mesh=None)

    def loss(
        variables: Variables, batch: TaskBatch, rows: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Totals]:
        outputs = local.outputs(variables, batch.rows, batch.targets.shape[1], key, rows)  # [B, S, O]
        losses = task_losses(local.kind, outputs, batch.targets) * batch.weights  # [B, S]
        return losses.sum(), {"loss": losses.sum(), "targets": batch.weights.sum()}

    return Objective(lambda key, batch: batch, loss)


def make_output_step(predictor: TaskPredictor) -> Callable[[Variables, TaskBatch], jax.Array]:
    """Build what tells the outputs of a batch, float32 `[rows, segments, outputs]`, without dropout."""

    def output_step(variables: Variables, batch: TaskBatch) -> jax.Array:
        return predictor.outputs(variables, batch.rows, batch.weights.shape[1])

    return output_step

"""A small labelled task for tests of steps: batches, first state and jitted step."""

from functools import cache
from typing import Any

import jax
import numpy as np
import optax

from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.data.batches import TaskBatch
from behrt_jax.data.tasks import Task
from behrt_jax.models.behrt import BEHRTForTask
from behrt_jax.training.devices import make_mesh, put_rows, replicated, shardings_of
from behrt_jax.training.state import Setup, abstract_state, set_up_task
from behrt_jax.training.step import TrainState, make_update_step, task_objective
from tests.models.rows import VOCABULARY, random_batch, tiny_model
from tests.models.test_losses import random_targets

SEGMENTS = 3
TASKS = {
    "binary": Task("binary"),
    "multiclass": Task("multiclass", classes=("a", "b", "c")),
    "multilabel": Task("multilabel", classes=("X", "Y")),
    "regression": Task("regression", mean=2.0, deviation=3.0),
    "survival": Task("survival", edges_days=(10.0, 20.0, 40.0)),
}
LORA = LoRAConfig(rank=2, targets=("query", "key", "value", "out", "intermediate", "output"))
REGIMES: dict[str, tuple[LoRAConfig | None, FreezingConfig]] = {
    "full": (None, FreezingConfig("full")),
    "lora": (LORA, FreezingConfig("lora_pretrained")),
    "probe": (None, FreezingConfig(groups=("head",))),
}


def labelled_batch(seed: int, task: Task, rows: int = 8) -> TaskBatch:
    """Rows of up to `SEGMENTS` examples; some segments have none."""
    rng = np.random.default_rng(seed)
    batch = random_batch(seed, rows=rows, segments=SEGMENTS)
    filled = rng.random((rows, SEGMENTS)) < 0.8
    filled[0] = True
    batch = batch._replace(segment_ids=np.where(segment_of(batch, filled), batch.segment_ids, 0))
    targets = random_targets(rng, task.kind, rows * SEGMENTS, task.outputs).reshape(rows, SEGMENTS, -1)
    targets = (targets * filled[:, :, None]).astype(np.float32)
    examples = np.where(filled, np.arange(rows * SEGMENTS).reshape(rows, SEGMENTS), -1).astype(np.int32)
    return TaskBatch(batch, examples, targets, filled.astype(np.float32))


def segment_of(batch: Any, filled: np.ndarray) -> np.ndarray:
    """Which tokens are of a filled segment, bool `[rows, length]`."""
    padded = np.pad(filled, ((0, 0), (1, 0)))
    return np.take_along_axis(padded, batch.segment_ids, axis=1)


@cache
def set_up(
    task: Task, regime: str = "full", mesh: Any = None, pooling: Any = "mean", **changes: Any
) -> Setup:
    """Of a tiny model, of one layer where not said: nothing here is about layers."""
    adapters, freezing = REGIMES[regime]
    first = task.of.base_outputs(labelled_batch(0, task).targets.reshape(24, -1), task.outputs)
    model = BEHRTForTask(tiny_model(**{"layers": 1, **changes}), VOCABULARY, task.outputs, pooling)
    return set_up_task(model, adapters, freezing, mesh, first_outputs=first)


@cache
def first_variables(task: Task, regime: str = "full") -> Any:
    """Random variables, on the host."""
    return jax.device_get(jax.jit(set_up(task, regime).init)(jax.random.key(0)))


SGD = optax.sgd(0.5)


def start(setup: Setup, task: Task, devices: Any = None, micro_batches: int = 1, optimizer: Any = SGD):
    """First state, jitted step and mesh."""
    mesh = make_mesh(devices or jax.devices()[:1])
    init_key, step_key = jax.random.split(jax.random.key(0))
    # Without the optimizer in the same program: the model's is compiled once for all of its optimizers.
    variables = jax.jit(setup.init)(init_key)
    state = TrainState(np.zeros((), np.int32), variables, jax.jit(optimizer.init)(variables))
    state = jax.device_put(state, shardings_of(abstract_state(setup.shapes, optimizer, mesh)))
    step = jax.jit(
        make_update_step(
            task_objective(setup.predictor._replace(mesh=mesh), task.of.loss),
            optimizer,
            setup.mask,
            step_key,
            clip_norm=1.0,
            micro_batches=micro_batches,
        ),
        donate_argnums=0,
        out_shardings=(shardings_of(state), replicated(mesh)),
    )
    return state, step, mesh


def run(setup: Setup, task: Task, batches: list[TaskBatch], **options: Any):
    """State after some steps by plain gradient descent, and each step's figures, on the host."""
    state, step, mesh = start(setup, task, **options)
    figures = []
    for batch in batches:
        state, totals = step(state, put_rows(batch, mesh))
        totals = jax.device_get(totals)
        del totals["gradient_squares"]  # some are of rounding alone, such as those of a key's bias
        figures.append(totals)
    assert step._cache_size() == 1
    return jax.device_get(state), figures

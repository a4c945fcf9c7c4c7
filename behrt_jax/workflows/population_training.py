"""The training loop of a population, and the best epoch of each member."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.config import FinetuneConfig
from behrt_jax.data.read_ahead import reading_ahead
from behrt_jax.data.task_batches import TaskBatch, TaskBatches
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.run_folder import METRICS_FILE, append_metrics
from behrt_jax.training.feeding import AHEAD
from behrt_jax.training.loop import DivergenceError
from behrt_jax.training.mesh import put_rows, replicated
from behrt_jax.training.population import Members, PopulationState, member
from behrt_jax.training.task_scores import score, task_metrics
from behrt_jax.workflows.finetune_setup import Finetuning
from behrt_jax.workflows.population_variation import SEARCHES, Variation


class Population(NamedTuple):
    """Members before their first step, and what is done with them."""

    state: PopulationState
    members: Members
    step: Callable[..., Any]
    """Jitted `population.make_population_step`."""
    outputs: Callable[..., jax.Array]
    """Jitted, from (state, members, batch) to float32 ``[members, rows, segments, outputs]``."""


@dataclass(eq=False)
class Best:
    """The best epoch of a member so far."""

    loss: float = np.inf
    """Least tuning loss."""
    step: int = 0
    """Steps at which it was reached."""
    variables: Any = None
    """Variables then; while training goes on, None in place of frozen leaves."""
    outputs: np.ndarray | None = None
    """Of its own tuning examples, float32 ``[examples, outputs]``; None where no loss was finite."""
    of_unseen: np.ndarray | None = None
    """Folds: of the train examples that it did not learn from, likewise."""
    waited: int = 0
    """Validations since then."""
    curve: list[float] = field(default_factory=list)
    """Tuning loss after each epoch."""


def train_population(
    console: Console, config: FinetuneConfig, run: Finetuning, variation: Variation, population: Population
) -> list[Best]:
    """Train all members on the same batches and validate them every epoch. The first state is used up.

    Raises:
        DivergenceError: the loss of a member was never finite; of a search, that of all members.
    """
    state, batches, mask = population.state, run.batches, run.setup.mask
    every = config.train.validate_every or batches.steps_per_epoch
    found = [Best() for _ in range(variation.size)]

    def read(number: int) -> tuple[TaskBatch, dict[str, Any], int]:
        batch = batches.batch(number)
        tokens = int(np.count_nonzero(batch.rows.segment_ids))
        own = jax.device_put(own_fields(batch, variation), replicated(run.mesh))
        return put_rows(batch, run.mesh), own, tokens

    def outputs_of(part: TaskBatches) -> np.ndarray:
        return outputs_of_members(population._replace(state=state), part, run)

    console.start(run.total_steps, 0, batches.steps_per_epoch)
    with reading_ahead(map(read, range(run.total_steps)), AHEAD) as ahead:
        for number, (batch, own, tokens) in enumerate(ahead, start=1):
            state, totals = population.step(state, population.members, batch, own)
            console.step(number, tokens, None)
            if number % every and number != run.total_steps:
                continue
            outputs = outputs_of(run.tuning)
            on_train = outputs_of(replace(batches, seed=None)) if config.population.vary == "fold" else None
            metrics = []
            for k, best in enumerate(found):
                mine, labelled = outputs[k, variation.tuning[k]], variation.labelled[k]
                metrics.append(task_metrics(labelled.task.kind, mine, labelled.tuning_targets))
                best.curve.append(metrics[k]["loss"])
                best.waited += 1
                if metrics[k]["loss"] < best.loss:
                    best.loss, best.step, best.waited, best.outputs = metrics[k]["loss"], number, 0, mine
                    alone = member(state, k, variation.adapters[k])
                    # The frozen leaves go on with the state, which the next step uses up.
                    best.variables = jax.tree.map(lambda x, t: np.asarray(x) if t else None, alone, mask)
                    if on_train is not None and variation.weights is not None:
                        best.of_unseen = on_train[k, ~variation.weights[k]]
            train_losses = np.asarray(totals["loss"] / jnp.maximum(totals["targets"], 1.0))
            append_metrics(
                run.folder / METRICS_FILE,
                {
                    "step": number,
                    "epoch": number / batches.steps_per_epoch,
                    "split": "tuning",
                    "loss": float(np.mean([one["loss"] for one in metrics])),
                    "members": [{"loss": one["loss"], "auroc": one.get("auroc")} for one in metrics],
                    "train_losses": train_losses.tolist(),
                },
            )
            shown = "  ".join(f"{one['loss']:.4f}" for one in metrics)
            console.log(f"epoch {number / batches.steps_per_epoch:.1f}  validation losses {shown}")
            patience = config.train.patience
            if patience is not None and all(best.waited >= patience for best in found):
                break
    console.close()
    diverged = [name for name, best in zip(variation.names, found, strict=True) if best.outputs is None]
    if len(diverged) > (len(found) - 1 if config.population.vary in SEARCHES else 0):
        raise DivergenceError(
            f"The loss of {', '.join(diverged)} was never finite: lower optimizer.learning_rate."
        )
    last = member(state, 0, variation.adapters[0])
    for best in found:
        best.variables = jax.tree.map(
            lambda one, other: other if one is None else one,
            best.variables,
            last,
            is_leaf=lambda x: x is None,
        )
    return found


def own_fields(batch: TaskBatch, variation: Variation) -> dict[str, np.ndarray]:
    """The fields of a batch in which the members differ: see `population.make_population_step`."""
    own, examples = {}, np.maximum(batch.examples, 0)  # [B, S]
    if variation.weights is not None:
        own["weights"] = batch.weights * variation.weights[:, examples]  # [K, B, S]
    if variation.targets is not None:
        own["targets"] = variation.targets[:, examples]  # [K, B, S, T]
    return own


def outputs_of_members(population: Population, part: TaskBatches, run: Finetuning) -> np.ndarray:
    """Outputs of all members for each example of `part`, float32 ``[members, examples, outputs]``."""

    def stacked(state: Any, batch: TaskBatch) -> jax.Array:
        found = population.outputs(state, population.members, batch)  # [K, B, S, O]
        return jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], -1)

    found = score(stacked, population.state, part, run.mesh)  # pyright: ignore[reportArgumentType]
    return np.moveaxis(found.reshape(len(found), -1, run.labelled.task.outputs), 1, 0)

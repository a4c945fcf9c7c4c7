"""AdamW for each trainable group, nothing for frozen leaves."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.tree_util import tree_map_with_path

from behrt_jax.adapters.lora import GROUPS, path_names
from behrt_jax.config.training import OptimizerConfig
from behrt_jax.models.stacked_layers import Tree, is_stacked
from behrt_jax.training.freezing import FROZEN


def learning_rate_schedule(peak: float, config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate at each step (counted from 0): warm-up from zero, then the schedule's course."""
    warmup = round(config.warmup_fraction * total_steps)
    course = max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, course)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, course)
    else:
        decay = optax.constant_schedule(peak)
    # Starts at peak / warmup, not at 0: a first step that moves nothing is a step lost.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup]) if warmup else decay


def group_schedules(config: OptimizerConfig, total_steps: int) -> dict[str, Callable[[Any], Any]]:
    """Learning-rate schedule of each parameter group."""
    return {
        group: learning_rate_schedule(
            _or(getattr(config.learning_rates, group), config.learning_rate), config, total_steps
        )
        for group in GROUPS
    }


def rates_on_host(
    config: OptimizerConfig, total_steps: int, groups: Iterable[str]
) -> Callable[[int], dict[str, float]]:
    """Step -> learning rate of each of the groups, worked out beside an accelerator and not in its queue."""
    schedules = group_schedules(config, total_steps)
    try:
        beside = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use the accelerator alone
        beside = None

    def rates(step: int) -> dict[str, float]:
        with jax.default_device(beside):
            return {group: float(schedules[group](step)) for group in groups}

    return rates


def make_optimizer(config: OptimizerConfig, total_steps: int, labels: Tree) -> optax.GradientTransformation:
    """``optax.multi_transform`` with AdamW per group and ``set_to_zero`` for frozen leaves.

    Weight decay is applied to matrices only. The learning rate of each adapter's ``b``, its weight decay
    included, is ``config.lora_plus`` times that of the group (LoRA+: Hayou et al. 2024, arXiv 2402.12354).
    Clipping is not part of it: see :func:`clip_factor`.

    Args:
        config: rates, decays and betas.
        total_steps: length of the schedule.
        labels: tree of group names and `FROZEN`, see `freezing.optimizer_labels`.
    """

    def matrices(tree):
        # Stacked over layers, vectors have two axes as well.
        return tree_map_with_path(lambda path, leaf: leaf.ndim - is_stacked(path_names(path)) > 1, tree)

    transforms: dict[str, optax.GradientTransformation] = {
        group: optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            weight_decay=_or(getattr(config.weight_decays, group), config.weight_decay),
            mask=matrices,
        )
        for group, schedule in group_schedules(config, total_steps).items()
    }
    if config.lora_plus is not None:
        transforms["lora"] = optax.chain(transforms["lora"], _faster_b(config.lora_plus))
    return optax.multi_transform({**transforms, FROZEN: optax.set_to_zero()}, labels)


def _faster_b(ratio: float) -> optax.GradientTransformation:
    """Updates of adapters' ``b`` times `ratio`: AdamW's are proportional to the learning rate."""

    def multiplied(path, leaf):  # rows of new codes are of the group too
        return ratio * leaf if path_names(path)[-1] == "b" else leaf

    return optax.stateless(lambda updates, params: tree_map_with_path(multiplied, updates))


def clip_factor(norm: jax.Array, limit: float | None) -> jax.Array | float:
    """Factor that brings a gradient of the given norm down to `limit`, 1 where it is below."""
    if limit is None:
        return 1.0
    return jax.numpy.minimum(1.0, limit / jax.numpy.maximum(norm, 1e-16))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value

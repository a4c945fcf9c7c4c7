"""Losses of labelled tasks, and the outputs that training begins with."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from behrt_jax.config import TaskKind

TARGETS: dict[TaskKind, str] = {
    "binary": "0 or 1",
    "multiclass": "number of the class",
    "multilabel": "0 or 1 for each code",
    "regression": "the value, standardised",
    "survival": "number of the interval of the event or of censoring, and 1 for an event",
}
"""What the targets of a task are, float32 `[..., targets]`."""


def task_losses(
    kind: TaskKind, outputs: jax.Array | np.ndarray, targets: jax.Array | np.ndarray
) -> jax.Array:
    """Loss of each example.

    Binary and multi-label: cross-entropy of independent yes or no, in nats, the mean over the codes.
    Multi-class: cross-entropy. Regression: half the squared error. Survival: negative log-likelihood of
    discrete hazards (Gensheimer and Narasimhan 2019, doi 10.7717/peerj.6257), where whoever is censored in
    an interval is known to have survived those before it.

    Args:
        kind: of the task.
        outputs: of `models.behrt.BEHRTForTask`, float32 `[..., outputs]`.
        targets: float32 `[..., targets]`, see `TARGETS`.

    Returns:
        float32 `[...]`.
    """
    outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
    chex.assert_equal_shape_prefix([outputs, targets], outputs.ndim - 1)
    if kind in ("binary", "multilabel"):
        chex.assert_equal_shape([outputs, targets])
        return optax.losses.sigmoid_binary_cross_entropy(outputs, targets).mean(axis=-1)
    if kind == "multiclass":
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            outputs, targets[..., 0].astype(jnp.int32)
        )
    if kind == "regression":
        return optax.losses.l2_loss(outputs, targets).sum(axis=-1)
    return _survival_losses(outputs, targets)


def _survival_losses(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    interval, event = targets[..., :1], targets[..., 1:]
    numbers = jnp.arange(outputs.shape[-1], dtype=jnp.float32).reshape((1,) * (outputs.ndim - 1) + (-1,))
    survived = -jax.nn.log_sigmoid(-outputs) * (numbers < interval)
    died = -jax.nn.log_sigmoid(outputs) * ((numbers == interval) & (event > 0))
    return (survived + died).sum(axis=-1)


def base_outputs(kind: TaskKind, targets: np.ndarray, outputs: int) -> np.ndarray:
    """Outputs that tell of each example what is true on average, float32 `[outputs]`: where training begins.

    Each count is raised by a half, so that no output is infinite.

    Args:
        kind: of the task.
        targets: of the train examples, float32 `[examples, targets]`.
        outputs: of the model.
    """
    if kind == "regression":
        return np.zeros(outputs, np.float32)
    if kind == "multiclass":
        counts = np.bincount(targets[:, 0].astype(int), minlength=outputs) + 0.5
        return np.log(counts / counts.sum()).astype(np.float32)
    if kind == "survival":
        interval, event = targets[:, 0].astype(int), targets[:, 1] > 0
        yes = np.bincount(interval[event], minlength=outputs)[:outputs] + 0.5
        at_risk = (interval[:, None] > np.arange(outputs)).sum(axis=0) + yes + 0.5
        no = at_risk - yes
    else:
        yes = targets.sum(axis=0) + 0.5
        no = len(targets) + 1.0 - yes
    return (np.log(yes) - np.log(no)).astype(np.float32)

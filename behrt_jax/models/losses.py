"""Losses: of masked codes, with their ranks and the figures made of both, and of labelled tasks.

The last layer of the MLM head makes N x V logits, at V = 100,000 more numbers than the whole encoder holds.
Here they are worked out for some codes of the vocabulary at a time: a first pass collects the logarithm of
the sum of exponentials as it goes (Milakov and Gimelshein 2018, arXiv 1805.02867) and the label's logit, a
second one ranks and, while training, gradients. The gradient of a sum of losses is known up to a factor
before the backward pass begins, so that the second pass serves both: four products of the decoder's size
where the plain way takes three.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

# Sums of loss and hits over predicted codes, from which every MLM figure is made.

TOP = (1, 5, 10)


def target_ranks(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes are ranked ahead of the label, int32 `[...]`.

    Ties go to the lower class, as in ``jax.lax.top_k``, so that constant logits earn no hits beyond
    those of the first classes.

    Args:
        logits: `[..., classes]`.
        labels: int32 `[...]`.
    """
    label_logit = jnp.take_along_axis(logits, labels[..., None], axis=-1)  # [..., 1]
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    ahead = (logits > label_logit) | ((logits == label_logit) & (classes < labels[..., None]))
    return ahead.sum(axis=-1, dtype=jnp.int32)


def totals(loss: jax.Array, ranks: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """Sums over the predicted codes of a batch, each a float32 scalar.

    Args:
        loss: sum of the losses where `weights` is True, float32 scalar.
        ranks: of :func:`target_ranks`, int32 `[...]`.
        weights: bool `[...]`, False for slots that hold no target.

    Returns:
        ``loss`` (nats), ``top1``, ``top5``, ``top10`` (hits) and ``targets`` (how many).
    """
    chex.assert_equal_shape([ranks, weights])
    hits = {f"top{k}": jnp.where(weights, ranks < k, False).sum(dtype=jnp.float32) for k in TOP}
    return {"loss": loss, **hits, "targets": weights.sum(dtype=jnp.float32)}


def add_totals(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Sum of two totals, key by key; an empty one counts as zero."""
    return {key: first.get(key, 0.0) + second.get(key, 0.0) for key in {**first, **second}}


def mean_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Mean loss (nats) from totals and, where they have hits, perplexity and top-1/5/10 accuracy; where they
    have two losses, the means of both.

    NaN where there was no target.
    """
    targets = float(sums["targets"])

    def mean(name: str, targets: float = targets) -> float:
        return float(sums[name]) / targets if targets else math.nan

    found = {"loss": mean("loss"), "targets": int(targets)}
    if "mlm_targets" in sums:
        found["question_loss"] = mean("question_loss")
        found["mlm_loss"] = mean("mlm_loss", float(sums["mlm_targets"]))
    if "top1" in sums:
        loss = found["loss"]
        found["perplexity"] = math.exp(min(loss, 700.0)) if not math.isnan(loss) else math.nan
        found |= {"accuracy": mean("top1"), "accuracy_top5": mean("top5"), "accuracy_top10": mean("top10")}
    return found


# Losses of single masked codes, from all logits at once or from those of some codes at a time.


class CodeLosses(NamedTuple):
    """What a model made of masked codes."""

    loss: jax.Array
    """Sum of the losses of used slots in nats, float32 scalar: the only field with a gradient."""
    losses: jax.Array
    """Of each slot, float32."""
    ranks: jax.Array
    """Codes ranked ahead of the label, see :func:`target_ranks`, int32."""
    guesses: jax.Array | None = None
    """The code of the largest logit, where that is asked for, int32."""


# As long as all logits fit 64 MiB, holding them is as fast or up to 1.3 times faster on a CPU (N = 300 and
# 1,200, V = 10,000); at N = 300, D = 512, V = 100,000 parts of 4,096 are 1.1 times as fast as the whole.
_HELD_LOGITS = 2**24
_CHUNK = 4096


def vocabulary_chunk(asked: int | None, slots: int, vocabulary_size: int) -> int | None:
    """Codes to work out at a time, None for all of them at once.

    Args:
        asked: how many the user wants; chosen where not given.
        slots: N, masked codes of the batch.
        vocabulary_size: V.
    """
    if asked is None and slots * vocabulary_size <= _HELD_LOGITS:
        return None
    chunk = asked or _CHUNK
    return chunk if chunk < vocabulary_size else None


def logit_losses(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> CodeLosses:
    """Softmax cross-entropy of `logits`.

    Args:
        logits: float32 `[..., V]`.
        labels: int32 `[...]`.
        weights: bool `[...]`, False for slots that hold no target.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    loss = jnp.where(weights, losses, 0.0).sum()
    return CodeLosses(loss, jax.lax.stop_gradient(losses), target_ranks(logits, labels))


def decoder_losses(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    dtype: jnp.dtype,
) -> CodeLosses:
    """Softmax cross-entropy of ``features @ kernel + bias``, `chunk` codes at a time.

    Never more than N x chunk logits are held. Gradients of `features`, `kernel` and `bias` are computed
    for those that are differentiated alone: a frozen kernel costs none.

    Args:
        features: input of the head's last layer, float `[N, D]`.
        kernel: float32 `[D, V]`.
        bias: float32 `[V]`.
        labels: int32 `[N]`.
        weights: bool `[N]`, False for slots that hold no target: they add nothing to loss and gradients.
        chunk: codes at a time, from 1 to V.
        dtype: of the products' inputs; they are summed, and all else is computed, in float32.

    Returns:
        Losses and ranks of shape `[N]`.
    """
    chex.assert_rank([features, kernel, bias, labels, weights], [2, 2, 1, 1, 1])
    chex.assert_equal_shape([labels, weights, features[:, 0]])
    chex.assert_equal_shape([bias, kernel[0]])
    found: Any = _losses(chunk, jnp.dtype(dtype), features, kernel, bias, labels, weights)
    loss, losses, ranks = found
    return CodeLosses(loss, jax.lax.stop_gradient(losses), ranks)


class _Chunk(NamedTuple):
    """Logits of consecutive codes."""

    start: jax.Array
    """First code, int32 scalar."""
    kernel: jax.Array
    """`[D, C]` in the compute dtype."""
    logits: jax.Array
    """float32 `[N, C]`, -inf for codes that another chunk has too."""
    codes: jax.Array
    """int32 `[1, C]`."""


def _chunks(chunk, dtype, features, kernel, bias):
    """How many chunks there are, and a function that makes the one of a given number."""
    vocabulary = kernel.shape[1]
    count = -(-vocabulary // chunk)
    size = -(-vocabulary // count)
    features = features.astype(dtype)

    def make(number: jax.Array) -> _Chunk:
        # All chunks have one size. Number 0 holds the last codes, and is the one that overlaps another:
        # what it writes of their gradient is then written over.
        start = jnp.where(number == 0, vocabulary - size, (number - 1) * size)
        codes = start + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        part = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1).astype(dtype)
        logits = jnp.matmul(features, part, preferred_element_type=jnp.float32)
        shift = jax.lax.dynamic_slice_in_dim(bias, start, size).astype(dtype).astype(jnp.float32)
        own = (number > 0) | (codes >= (count - 1) * size)
        return _Chunk(start, part, jnp.where(own, logits + shift[None, :], -jnp.inf), codes)

    return count, make


def _log_sums(count, make, labels):
    """Log of the sum of exponentials, and the label's logit: float32 `[N, 1]` each."""

    def add(number, sums):
        highest, total, of_label = sums
        chunk = make(number)
        raised = jnp.maximum(highest, chunk.logits.max(axis=1, keepdims=True))
        total = total * jnp.exp(highest - raised)
        total = total + jnp.exp(chunk.logits - raised).sum(axis=1, keepdims=True)
        label_here = jnp.where(chunk.codes == labels, chunk.logits, -jnp.inf).max(axis=1, keepdims=True)
        return raised, total, jnp.maximum(of_label, label_here)

    lowest = jnp.full(labels.shape, -jnp.inf, jnp.float32)
    highest, total, of_label = jax.lax.fori_loop(0, count, add, (lowest, jnp.zeros_like(lowest), lowest))
    return highest + jnp.log(total), of_label


def _both_passes(chunk, dtype, features, kernel, bias, labels, weights, trains):
    """Loss, losses and ranks, and gradients of features, kernel and bias, None where `trains` is False."""
    labels = labels[:, None]
    used = weights[:, None]  # [N, 1]
    count, make = _chunks(chunk, dtype, features, kernel, bias)
    log_sum, of_label = _log_sums(count, make, labels)
    inputs = features.astype(dtype)

    def add(number, sums):
        ranks, (of_features, of_kernel, of_bias) = sums
        logits, codes = (part := make(number)).logits, part.codes
        tie = (logits == of_label) & (codes < labels)
        # The label itself is never ahead, should its logit come out otherwise than in the first pass.
        ranks = ranks + (((logits > of_label) & (codes != labels)) | tie).sum(axis=1, dtype=jnp.int32)
        if not any(trains):
            return ranks, (of_features, of_kernel, of_bias)
        own_label = (codes == labels) & (logits > -jnp.inf)
        errors = jnp.where(used, jnp.exp(logits - log_sum) - own_label.astype(jnp.float32), 0.0)  # [N, C]
        if of_bias is not None:
            of_bias = jax.lax.dynamic_update_slice_in_dim(of_bias, errors.sum(axis=0), part.start, axis=0)
        errors = errors.astype(dtype)
        if of_features is not None:
            of_features = of_features + jnp.matmul(errors, part.kernel.T, preferred_element_type=jnp.float32)
        if of_kernel is not None:
            here = jnp.matmul(inputs.T, errors, preferred_element_type=jnp.float32)  # [D, C]
            of_kernel = jax.lax.dynamic_update_slice_in_dim(of_kernel, here, part.start, axis=1)
        return ranks, (of_features, of_kernel, of_bias)

    zeros = tuple(
        jnp.zeros(x.shape, jnp.float32) if needed else None
        for x, needed in zip((features, kernel, bias), trains, strict=True)
    )
    start = (jnp.zeros(labels.shape[:1], jnp.int32), zeros)
    ranks, gradients = jax.lax.fori_loop(0, count, add, start)
    losses = (log_sum - of_label)[:, 0]
    return (jnp.where(weights, losses, 0.0).sum(), losses, ranks), gradients


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(chunk, dtype, features, kernel, bias, labels, weights):
    return _both_passes(chunk, dtype, features, kernel, bias, labels, weights, (False, False, False))[0]


def _forward(chunk, dtype, features, kernel, bias, labels, weights):
    trains = (features.perturbed, kernel.perturbed, bias.perturbed)
    values: list[Any] = [x.value for x in (features, kernel, bias, labels, weights)]
    results, gradients = _both_passes(chunk, dtype, *values, trains=trains)
    return results, tuple(
        None if gradient is None else gradient.astype(x.value.dtype)
        for gradient, x in zip(gradients, (features, kernel, bias), strict=True)
    )


def _backward(chunk, dtype, gradients, cotangents):
    of_loss = cotangents[0]
    scaled = (
        None if gradient is None else of_loss.astype(gradient.dtype) * gradient for gradient in gradients
    )
    return *scaled, None, None


_losses.defvjp(_forward, _backward, symbolic_zeros=True)


# Losses of labelled tasks, float32 `[...]` from outputs `[..., outputs]` and targets `[..., targets]`.


def _sigmoid(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of independent yes or no, in nats, the mean over the outputs."""
    chex.assert_equal_shape([outputs, targets])
    return optax.losses.sigmoid_binary_cross_entropy(outputs, targets).mean(axis=-1)


def _softmax(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of classes, in nats."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets[..., 0].astype(jnp.int32))


def _squared(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Half the squared error."""
    return optax.losses.l2_loss(outputs, targets).sum(axis=-1)


def _hazards(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of discrete hazards (Gensheimer and Narasimhan 2019, doi 10.7717/peerj.6257),
    where whoever is censored in an interval is known to have survived those before it.
    """
    interval, event = targets[..., :1], targets[..., 1:]
    numbers = jnp.arange(outputs.shape[-1], dtype=jnp.float32).reshape((1,) * (outputs.ndim - 1) + (-1,))
    survived = -jax.nn.log_sigmoid(-outputs) * (numbers < interval)
    died = -jax.nn.log_sigmoid(outputs) * ((numbers == interval) & (event > 0))
    return (survived + died).sum(axis=-1)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "sigmoid": _sigmoid,
    "softmax": _softmax,
    "squared": _squared,
    "hazards": _hazards,
}
"""By the ``loss`` of a kind of task."""


def task_losses(loss: str, outputs: jax.Array | np.ndarray, targets: jax.Array | np.ndarray) -> jax.Array:
    """Loss of each example.

    Args:
        loss: a name in `LOSSES`.
        outputs: of `models.behrt.BEHRTForTask`, float32 `[..., outputs]`.
        targets: of the kind of task, float32 `[..., targets]`.

    Returns:
        float32 `[...]`.
    """
    outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
    chex.assert_equal_shape_prefix([outputs, targets], outputs.ndim - 1)
    return LOSSES[loss](outputs, targets)

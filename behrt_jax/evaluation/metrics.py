"""Sums of loss and hits over predicted codes, from which every MLM figure is made."""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

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
    """Mean loss (nats) from totals and, where they have hits, perplexity and top-1/5/10 accuracy.

    NaN where there was no target.
    """
    targets = float(sums["targets"])

    def mean(name: str) -> float:
        return float(sums[name]) / targets if targets else math.nan

    found = {"loss": mean("loss"), "targets": int(targets)}
    if "top1" in sums:
        loss = found["loss"]
        found["perplexity"] = math.exp(min(loss, 700.0)) if not math.isnan(loss) else math.nan
        found |= {"accuracy": mean("top1"), "accuracy_top5": mean("top5"), "accuracy_top10": mean("top10")}
    return found

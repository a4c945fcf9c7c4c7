"""A running training watched leaf by leaf: gradients, adapters, rows of the code embedding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.tree_util import tree_leaves_with_path

from behrt_jax.adapters.lora import label, leaves_by_path, merge, path_names
from behrt_jax.config.model import LoRAConfig
from behrt_jax.files import JsonObject
from behrt_jax.models.stacked_layers import Tree, unstack_layers
from behrt_jax.training.runtime import RUN_ONCE
from behrt_jax.training.step import TrainState

CODE_TABLE = ("embeddings", "code", "embedding")
SURELY_SHOWN = 10.0
"""Occurrences after which a code was shown to the model: that each was masked has a chance of 1e-8."""


def leaf_names(tree: Tree) -> list[str]:
    """Path of every leaf of ``{"params": ..., "lora": ...}``, joined by slashes, in tree order."""
    return ["/".join(path_names(path)) for path, _ in tree_leaves_with_path(tree)]


def trainable_names(mask: Tree) -> list[str]:
    """Names of the leaves where `mask` is True."""
    return [name for name, trains in zip(leaf_names(mask), jax.tree.leaves(mask), strict=True) if trains]


def leaves_not_finite(variables: Tree) -> list[str]:
    """Names of the leaves that hold a value that is not finite, on the devices of this process.

    The host looks: a program for it would take longer to compile than all it looks at takes to come over.
    """

    def finite(leaf: jax.Array) -> bool:
        return all(np.isfinite(part.data).all() for part in leaf.addressable_shards if part.replica_id == 0)

    leaves = zip(leaf_names(variables), jax.tree.leaves(variables), strict=True)
    return [name for name, leaf in leaves if not finite(leaf)]


@dataclass(frozen=True)
class Telemetry:
    """Everything that is watched of a training beside its loss."""

    learning_rates: Callable[[int], dict[str, float]]
    """Step -> learning rate of each group that trains, see `optimizer.rates_on_host`."""
    names: Sequence[str]
    """Of the trainable leaves, see :func:`trainable_names`."""
    probe: Callable[[TrainState], JsonObject]
    """Figures that join a validation's, see :func:`make_probe`."""
    at_start: Sequence[str] = ()
    """Leaves that were not finite before the first step, see :func:`leaves_not_finite`."""

    def gradients(self, squares: np.ndarray) -> JsonObject:
        """Gradient norms by group, and which leaves got no gradient at all.

        Args:
            squares: sum of squares of each trainable leaf's gradient, `[leaves]`.

        Returns:
            ``gradient_norms``: group -> norm, with ``lora_a`` and ``lora_b`` beside ``lora``; only what
            trains. ``without_gradient``: names of leaves whose gradient is exactly zero.
        """
        sums: dict[str, float] = {}
        without = []
        for name, square in zip(self.names, squares.astype(np.float64), strict=True):
            group = label(tuple(name.split("/")))
            parts = [group, f"lora_{name[-1]}"] if name.startswith("lora/") else [group]
            for part in parts:
                sums[part] = sums.get(part, 0.0) + float(square)
            if square == 0.0:
                without.append(name)
        norms = {part: math.sqrt(value) for part, value in sums.items()}
        return {"gradient_norms": norms, "without_gradient": without}

    def offender(self, squares: np.ndarray | None) -> str:
        """The place where a training that is not finite any more went wrong first, as a clause for a person.

        `squares` are those of :meth:`gradients` at the first step whose loss or gradient is not finite.
        """
        if self.at_start:
            return f"the parameters {self.at_start[0]}, before the first step"
        squares = np.zeros(len(self.names)) if squares is None else squares
        bad = [name for name, square in zip(self.names, squares, strict=True) if not np.isfinite(square)]
        if not bad:
            return "the loss alone"
        return f"the gradient of {bad[0]} (and {len(bad) - 1} of {len(self.names)} leaves)"


def compilations(jitted: Any) -> int | None:
    """Number of times that a jitted function was compiled so far; None where JAX does not tell.

    One that was compiled ahead (``jax.stages.Compiled``) refuses what it was not compiled for.
    """
    if isinstance(jitted, jax.stages.Compiled):
        return 1
    count = getattr(jitted, "_cache_size", None)
    return None if count is None else count()


def make_probe(
    start: Tree, code_counts: np.ndarray, steps_per_epoch: int, static_masks: bool = False
) -> Callable[[TrainState], JsonObject]:
    """A look at a state when a validation is due: how far adapters moved, which rows were never updated.

    Args:
        start: the adapters (the ``lora`` tree) at the beginning of the run; they are copied.
        code_counts: events of the train split, int64 `[vocabulary]`, 0 for special tokens.
        steps_per_epoch: tells how often a code was shown.
        static_masks: what is masked once is masked in each epoch.

    Returns:
        A function from the state to ``adapters`` (only where there are any): for ``a`` and ``b`` the
        ``layer`` that moved least and its ``movement``, the root mean square of the change relative to
        that of ``a`` at the start, without what only shrinks or grows along the start, as weight
        decay does; and ``embedding_rows`` (only where the code embedding trains): how many rows of
        codes should have been shown by now (``expected``), and how many of those never had a gradient
        (``untouched``).
    """
    start = unstack_layers(jax.tree.map(np.array, start))  # the state that they come from is donated
    layers = [name.removesuffix("/a") for name in leaf_names(start) if name.endswith("/a")]
    movement = jax.jit(lambda start, now: _movement(layers, start, unstack_layers(now)))
    updated = jax.jit(lambda moments: (moments != 0).any(axis=1))

    def probe(state: TrainState) -> JsonObject:
        found: JsonObject = {}
        if layers:
            moved = jax.device_get(movement(start, state.variables["lora"]))
            found["adapters"] = {
                part: {"layer": layers[int(np.argmin(values))], "movement": float(np.min(values))}
                for part, values in moved.items()
            }
        moments = _second_moments(state.opt_state)
        if moments is not None:
            epochs = int(state.step) / steps_per_epoch
            expected = code_counts * (min(epochs, 1.0) if static_masks else epochs) >= SURELY_SHOWN
            found["embedding_rows"] = {
                "expected": int(expected.sum()),
                "untouched": int((expected & ~np.asarray(updated(moments))).sum()),
            }
        return found

    return probe


def _movement(layers: Sequence[str], start: Tree, now: Tree) -> dict[str, jax.Array]:
    before, after = (dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)) for tree in (start, now))
    moved: dict[str, list[jax.Array]] = {"a": [], "b": []}
    for layer in layers:
        # Adapters that were worked out of the base keep what they began with.
        a0, b0 = (after.get(f"{layer}/{side}0", before[f"{layer}/{side}"]) for side in ("a", "b"))
        scale = jnp.maximum(_rms(a0), 1e-12)
        moved["a"].append(_rms(_across(after[f"{layer}/a"], a0)) / scale)
        moved["b"].append(_rms(_across(after[f"{layer}/b"], b0)) / scale)
    return {part: jnp.stack(values) for part, values in moved.items()}


def _across(x: jax.Array, x0: jax.Array) -> jax.Array:
    """`x` less its part along `x0`."""
    along = (x * x0).sum() / jnp.maximum((x0 * x0).sum(), 1e-30)
    return x - along * x0


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).mean())


def code_table(variables: Tree) -> jax.Array:
    """The code embedding, float32 ``[V, E]``."""
    (table,) = (leaf for path, leaf in leaves_by_path(variables).items() if path[-3:] == CODE_TABLE)
    return table


def adapter_norms(variables: Tree, config: LoRAConfig) -> list[JsonObject]:
    """Size of what each adapter adds to its layer's kernel, ready for JSON.

    Returns:
        For each adapted layer: ``name``, ``norm`` (Frobenius norm of what `lora.merge` adds), and ``share``,
        that norm divided by the kernel's; None of a kernel that is all zeros.
    """
    params, adapters = unstack_layers(variables["params"]), unstack_layers(variables["lora"])
    layers = {path[:-1]: None for path in leaves_by_path(adapters)}
    leaves = leaves_by_path(params)
    kernels = unflatten_dict({(*path, "kernel"): leaves[(*path, "kernel")] for path in layers})

    @partial(jax.jit, compiler_options=RUN_ONCE)
    def norms(kernels: Tree, adapters: Tree) -> tuple[jax.Array, jax.Array]:
        added = merge(jax.tree.map(jnp.zeros_like, kernels), adapters, config)
        whole, part = leaves_by_path(kernels), leaves_by_path(added)
        of_kernels, of_parts = (
            jnp.stack([jnp.linalg.norm(tree[(*path, "kernel")]) for path in layers]) for tree in (whole, part)
        )
        return of_parts, of_kernels

    found = zip(
        layers, *(values.tolist() for values in jax.device_get(norms(kernels, adapters))), strict=True
    )
    return [
        {"name": "/".join(path), "norm": part, "share": part / whole if whole else None}
        for path, part, whole in found
    ]


def _second_moments(opt_state: Any) -> jax.Array | None:
    """Adam's second moments of the code embedding: zero for a row exactly where it never had a gradient."""
    for path, leaf in tree_leaves_with_path(opt_state):
        names = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
        if "nu" in names and tuple(names[-3:]) == CODE_TABLE:
            return leaf
    return None

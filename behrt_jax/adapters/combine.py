"""One adapter made of several on the same base, with numpy.

:func:`linear` and :func:`truncated` are the ``linear`` and ``svd`` of PEFT's ``add_weighted_adapter``
(https://github.com/huggingface/peft); :func:`ordinary` brings an adapter that is more than ``a`` and ``b`` to
these two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from behrt_jax.adapters import lora
from behrt_jax.adapters.targets import scale
from behrt_jax.config.model import LoRAConfig
from behrt_jax.models.stacked_layers import Path, Tree, unstack_layers


class Update(NamedTuple):
    """What an adapter adds to a kernel: ``scale * a @ b``."""

    a: np.ndarray
    """float `[in, rank]`."""
    b: np.ndarray
    """float `[rank, out]`."""
    scale: float


def updates_of(adapters: Tree, config: LoRAConfig) -> dict[Path, Update]:
    """Updates of the layers of an adapter, by path, layer by layer."""
    flat = lora.leaves_by_path(unstack_layers(adapters))
    return {
        path: Update(np.asarray(flat[(*path, "a")]), np.asarray(flat[(*path, "b")]), scale(config, path))
        for path in lora.layer_paths(unstack_layers(adapters))
    }


def linear(updates: Sequence[tuple[float, Update]]) -> Update:
    """Sums of all ``a`` and of all ``b``, each times the root of weight and scale: as PEFT's ``linear``.

    The product has mixed terms, of the ``a`` of one and the ``b`` of another, beside the weighted sum.

    Args:
        updates: of equal rank, with their weights.
    """
    roots = [abs(weight * update.scale) ** 0.5 for weight, update in updates]
    signs = [np.sign(weight) for weight, _ in updates]
    a = sum(sign * root * update.a for sign, root, (_, update) in zip(signs, roots, updates, strict=True))
    b = sum(root * update.b for root, (_, update) in zip(roots, updates, strict=True))
    return Update(np.asarray(a), np.asarray(b), 1.0)


def truncated(updates: Sequence[tuple[float, Update]], rank: int) -> Update:
    """The nearest update of this rank to the weighted sum (Eckart and Young 1936): as PEFT's ``svd``.

    It is the sum itself where `rank` is not below the sum's own. Kernels are never formed: the singular
    values are those of a small matrix, after the QR decompositions of all ``a`` and of all ``b``.

    Args:
        updates: with their weights; ranks may differ.
        rank: largest of the result, which has no more than the sum can have.
    """
    left = np.concatenate([update.a for _, update in updates], axis=1).astype(np.float64)  # [I, ranks]
    right = np.concatenate([weight * update.scale * update.b for weight, update in updates])  # [ranks, O]
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T.astype(np.float64))
    u, s, v = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = np.sqrt(s[:rank])
    return Update(q_left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_right.T, 1.0)


def ordinary(adapters: Tree, config: LoRAConfig) -> tuple[Tree, LoRAConfig]:
    """The adapter and its settings, made of ``a`` and ``b`` alone where they are not, for the same base.

    A ``pissa`` adapter, whose update is ``scale * (a @ b - a0 @ b0)``, becomes one of twice the rank, or of
    the width of its layer where that is less. Any other comes back as it is.
    """
    if config.init != "pissa":
        return adapters, config
    flat = lora.leaves_by_path(unstack_layers(adapters))
    found = {}
    for path, after in updates_of(adapters, config).items():
        a0, b0 = (np.asarray(flat[(*path, side)]) for side in ("a0", "b0"))
        both = [(1.0, after), (-1.0, Update(a0, b0, after.scale))]
        widest = min(len(after.a), after.b.shape[1])
        if 2 * after.a.shape[1] > widest:
            found[path] = truncated(both, widest)
        else:
            a, b = np.concatenate([after.a, a0], axis=1), np.concatenate([after.b, -b0])
            found[path] = Update(a, b, after.scale)
    return as_adapter(found, config)


def as_adapter(updates: Mapping[Path, Update], like: LoRAConfig) -> tuple[Tree, LoRAConfig]:
    """An adapter with these updates, its leaves float32, and its settings.

    Layers are named one by one; every scale is 2, by the default alpha.

    Args:
        updates: by path of the layer.
        like: gives dropout and product.
    """
    ranks = {"/".join(path): update.a.shape[1] for path, update in updates.items()}
    rank = max(ranks.values())
    config = replace(
        like,
        init="default",
        targets=tuple(ranks),
        exclude=(),
        rank=rank,
        rank_pattern=tuple(f"{name}={own}" for name, own in ranks.items() if own != rank),
        alpha=None,
        alpha_pattern=(),
        rank_stabilised=False,
    )
    leaves = {}
    for path, update in updates.items():
        root = (update.scale / scale(config, path)) ** 0.5
        leaves[(*path, "a")] = (root * update.a).astype(np.float32)
        leaves[(*path, "b")] = (root * update.b).astype(np.float32)
    return unflatten_dict(leaves), config

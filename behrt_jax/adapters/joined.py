"""Layers with the adapters of several members at once, of which each token uses those of its own member.

Where a layer has adapters, those of all are joined along the rank axis: ``a`` `[in, ranks]`, ``b``
`[ranks, out]` with each one's scale in it. There are two forms of the product:

- *joined*, for rows in which adapters stand side by side: ``((x @ a) * own) @ b``, where ``own`` is 1 at
  the ranks of the token's adapter. The work grows with the sum of all ranks.
- *gathered*, for rows of one adapter each: the row's own ``a`` and ``b`` are picked out first. The work is
  that of one adapter, however many there are; the batch must be packed adapter by adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from behrt_jax.models.stacked_layers import is_stacked


def join(members: Sequence[Mapping[tuple[str, ...], jax.Array]]) -> dict[str, Any]:
    """Join the adapters of all members along the rank axis.

    Args:
        members: flat, by path: ``a`` float32 `[in, rank]` and, with the scale in it, ``b`` float32
            `[rank, out]` of each layer that the member adapts. Stacked layers have a leading axis, here and
            in the result.

    Returns:
        Tree with, at the path of each layer that some member adapts: ``a`` float32 `[in, ranks]`, ``b``
        float32 `[ranks, out]`, ``owner`` int32 `[ranks]` (whose a rank is) and ``slots`` int32
        `[members, largest rank]` (which ranks a member has; beyond its own, a number past the end).
    """
    joined = {}
    for layer in dict.fromkeys(path[:-1] for member in members for path in member):
        owners = [number for number, member in enumerate(members) if (*layer, "a") in member]
        parts_a, parts_b = ([members[number][(*layer, side)] for number in owners] for side in ("a", "b"))
        ranks = [part.shape[-1] for part in parts_a]
        owner = np.repeat(owners, ranks).astype(np.int32)  # [R]
        slots = np.full((len(members), max(ranks)), len(owner), np.int32)  # [K, most]
        for number, rank, end in zip(owners, ranks, np.cumsum(ranks), strict=True):
            slots[number, :rank] = np.arange(end - rank, end)
        layers = parts_a[0].shape[:1] if is_stacked(layer) else ()
        joined |= {
            (*layer, "a"): jnp.concatenate(parts_a, axis=-1),
            (*layer, "b"): jnp.concatenate(parts_b, axis=-2),
            (*layer, "owner"): jnp.asarray(np.broadcast_to(owner, (*layers, *owner.shape))),
            (*layer, "slots"): jnp.asarray(np.broadcast_to(slots, (*layers, *slots.shape))),
        }
    return unflatten_dict(joined)


@contextmanager
def choosing(numbers: jax.Array) -> Iterator[None]:
    """Within this context, every Dense that has an entry in the `bank` collection uses it.

    Enter it inside the function that is jitted, as with `lora.applying`. No adapter dropout: a bank predicts.

    Args:
        numbers: adapter of each token, int32 `[batch, length]`, -1 for none (joined form); or of each row,
            int32 `[batch]` (gathered form).
    """

    def add_adapters(dense, args, kwargs, context):
        module = context.module
        named = isinstance(module, nn.Dense) and context.method_name == "__call__"
        if not (named and module.has_variable("bank", "a")):
            return dense(*args, **kwargs)
        (x,) = args
        y = dense(x)  # [B, L, O]
        x = x.astype(module.dtype or x.dtype)
        a, b = (module.get_variable("bank", side).astype(x.dtype) for side in ("a", "b"))
        if numbers.ndim == 1:
            own = module.get_variable("bank", "slots")[numbers]  # [B, most]
            a_rows = jnp.take(a, own, axis=1, mode="fill", fill_value=0)  # [I, B, most]
            b_rows = jnp.take(b, own, axis=0, mode="fill", fill_value=0)  # [B, most, O]
            inner = jnp.einsum("bli,ibr->blr", x, a_rows)
            return y + jnp.einsum("blr,bro->blo", inner, b_rows).astype(y.dtype)
        own = numbers[:, :, None] == module.get_variable("bank", "owner")[None, None]  # [B, L, R]
        return y + (jnp.where(own, x @ a, 0) @ b).astype(y.dtype)

    with nn.intercept_methods(add_adapters):
        yield

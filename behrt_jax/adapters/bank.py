"""Several adapters on one base, answered in one pass: each segment of a batch has its own (task, hospital).

There is no command for it: :func:`load` and :func:`predict` are for a service in Python that holds one base
for many tasks. Layers compute with the adapters of all members at once; segments of different adapters in
one row never see each other, since attention stays within a segment. Heads are applied after pooling, joined
along their outputs.

Example, from a pretraining run and the adapter folders of fine-tuning runs on it::

    pretrained = open_pretrained(Path("runs/base"))
    params = {"behrt": read_encoder(pretrained, make_mesh()).params}
    adapters = bank.load([Path("runs/death/adapter"), Path("runs/stay/adapter")], params)
    model = PatientEmbedding(pretrained.model, len(pretrained.vocabulary))
    predict = jax.jit(partial(bank.predict, model=model, segments=1))
    batch = example_batch(pretrained.model, 3)  # three rows: one for death, two for stay
    outputs = predict(adapters, batch=batch, numbers=np.array([0, 1, 1]))  # [3, 1, most outputs]
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import base_fingerprint_of, load_adapter, read_config
from behrt_jax.config.model import LoRAConfig
from behrt_jax.data.batches import Batch
from behrt_jax.errors import InputError
from behrt_jax.files import from_stored
from behrt_jax.models.behrt import BEHRTForTask, PatientEmbedding
from behrt_jax.models.stacked_layers import Path as TreePath
from behrt_jax.models.stacked_layers import Tree, is_stacked


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bank:
    """Adapters 0, 1, ... on one base: a tree of arrays, to be given to a jitted function like any other."""

    behrt: Tree
    """The base, shared with the params that the bank was made from."""
    adapters: Tree
    """Of all layers, see :func:`join`."""
    kernel: jax.Array
    """Kernels of all heads side by side, float32 `[hidden, outputs of all]`."""
    bias: jax.Array
    """float32 `[outputs of all]`."""
    outputs: tuple[int, ...] = field(metadata={"static": True})
    """Outputs of each adapter's head."""

    def __len__(self) -> int:
        return len(self.outputs)


def load(folders: Sequence[Path], params: Tree, vocabulary_fingerprint: str | None = None) -> Bank:
    """Read adapter folders (`adapters.files`) into a bank; adapter i is that of ``folders[i]``.

    Args:
        folders: with a task head each; ranks, targets, dropout and outputs may differ.
        params: of the base they were all trained on; only ``params["behrt"]`` is used, and kept as it is.
        vocabulary_fingerprint: checked where given.

    Raises:
        InputError: no folders; an adapter on another base or vocabulary; one that has changed the base
            itself (trained embeddings or encoder, codes of its own) or has no trained task head; a damaged
            folder.
    """
    if not folders:
        raise InputError("a bank needs one adapter folder at least")
    base = {"behrt": params["behrt"]}
    fingerprint = base_fingerprint_of(base)
    members = [_read(Path(folder), base, fingerprint, vocabulary_fingerprint) for folder in folders]
    _, kernels, biases = zip(*members, strict=True)
    return Bank(
        params["behrt"],
        join([member.lora for member in members]),
        jnp.concatenate(kernels, axis=1),
        jnp.concatenate(biases),
        tuple(kernel.shape[1] for kernel in kernels),
    )


class _Member(NamedTuple):
    lora: dict[TreePath, jax.Array]
    """Flat, below ``behrt``; the scale is in ``b``."""
    kernel: jax.Array
    bias: jax.Array


def _read(folder: Path, base: Tree, fingerprint: str, vocabulary_fingerprint: str | None) -> _Member:
    tensors = read_config(folder).tensors
    changed = [
        key for key in tensors if key.startswith("params/") and not key.startswith("params/task_head/")
    ]
    if changed:
        raise InputError(
            f"{folder}: this adapter cannot share a base with others, since it has trained {changed[0]}. "
            "Train it with freezing.regime lora_pretrained, without extend_vocabulary and without "
            "task.pooling attention, or use it alone."
        )
    head = {name: f"params/task_head/dense/{name}" for name in ("kernel", "bias")}
    if not set(head.values()) <= tensors.keys():
        raise InputError(f"{folder}: this adapter has no trained task head; a bank needs one of each adapter")
    places = {name: np.zeros(tensors[key], np.float32) for name, key in head.items()}
    like = {**base, "task_head": {"dense": places}}
    params, adapters, config = load_adapter(folder, like, vocabulary_fingerprint, fingerprint)
    if adapters:
        of_lora = from_stored(LoRAConfig, config.lora or {})
        if "task_head" in adapters:  # one head each, so that its adapter can be merged
            params = lora.merge(params, {"task_head": adapters["task_head"]}, of_lora)
        adapters = lora.with_scale(adapters, of_lora)
    own = lora.leaves_by_path(adapters.get("behrt", {}))
    kernel, bias = (jnp.asarray(params["task_head"]["dense"][name]) for name in head)
    return _Member(own, kernel, bias)


def predict(
    bank: Bank,
    model: BEHRTForTask | PatientEmbedding,
    batch: Batch,
    numbers: jax.Array,
    segments: int,
) -> jax.Array:
    """Outputs of each segment's own adapter, in one pass.

    Args:
        bank: see :func:`load`.
        model: gives ``config``, ``vocabulary_size`` and ``pooling``, which all adapters share.
        batch: of events, see `models.behrt.BEHRT`.
        numbers: adapter of each segment, int32 `[batch, segments]`; or of each row, int32 `[batch]`, where no
            row mixes them, which is less work.
        segments: of a row, at least the largest id.

    Returns:
        float32 `[batch, segments, most outputs]`: segment `s + 1` at index `s`; 0 beyond ``bank.outputs`` of
        the segment's adapter, and without meaning where there is no such segment.
    """
    segment_ids = jnp.asarray(batch.segment_ids)
    numbers = jnp.asarray(numbers)
    rows = segment_ids.shape[0]
    by_row = numbers.ndim == 1
    chex.assert_shape(numbers, (rows,) if by_row else (rows, segments))
    of_segments = jnp.broadcast_to(numbers[:, None], (rows, segments)) if by_row else numbers  # [B, S]
    of_tokens = jnp.take_along_axis(of_segments, jnp.maximum(segment_ids - 1, 0), axis=1)  # [B, L]
    encoder = PatientEmbedding(model.config, model.vocabulary_size, model.pooling)
    with choosing(numbers if by_row else jnp.where(segment_ids > 0, of_tokens, -1)):
        variables = {"params": {"behrt": bank.behrt}, "bank": {"behrt": bank.adapters}}
        pooled = encoder.apply(variables, batch, segments=segments)  # [B, S, D]
    return _heads(bank, pooled, of_segments)  # pyright: ignore[reportArgumentType]


def _heads(bank: Bank, pooled: jax.Array, numbers: jax.Array) -> jax.Array:
    """Outputs of each segment's own head, from `pooled` `[batch, segments, hidden]`."""
    every = pooled @ bank.kernel + bank.bias[None, None]  # [B, S, outputs of all]
    counts = np.asarray(bank.outputs)
    within = np.arange(counts.max())  # [O]
    columns = (np.cumsum(counts) - counts)[:, None] + within  # [K, O]
    used = within < counts[:, None]
    chosen = jnp.take_along_axis(every, jnp.asarray(np.where(used, columns, 0))[numbers], axis=2)  # [B, S, O]
    return jnp.where(jnp.asarray(used)[numbers], chosen, 0.0)


# Layers with the adapters of several members at once, of which each token uses those of its own member.


def join(members: Sequence[Mapping[TreePath, jax.Array]]) -> Tree:
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

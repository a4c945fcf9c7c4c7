"""Attention by cuDNN, NVIDIA's library: one kernel a pass, without weights in memory (bfloat16 alone)."""

import functools

import jax
import jax.numpy as jnp


def segment_mask(segment_ids: jax.Array) -> jax.Array:
    """Who may attend to whom in packed rows: bool `[batch, 1, length, length]`.

    Args:
        segment_ids: subject of each token within its row, int32 `[batch, length]`; 0 is padding.
            Padding attends to padding, so that no row of the softmax is empty.
    """
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


def cudnn_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segment_ids: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
    scale: float = 1.0,
    packed: bool = True,
) -> jax.Array:
    """Attention on an NVIDIA GPU in bfloat16; arguments as in `chunked_attention`, but for the last two.

    Args:
        queries: as the other arguments up to `rows`, see `chunked_attention`.
        keys: see there.
        values: see there.
        segment_ids: see there.
        rate: 0.
        key: not read.
        rows: not read.
        scale: factor on the scores, where `queries` are not scaled yet.
        packed: rows may hold several segments. Without, each holds one and then padding: the length of each
            row takes the place of a mask of all pairs, which is faster.

    Raises:
        ValueError: a dropout rate above 0: cuDNN's bits would not be those of the other forms.
    """
    if rate:
        raise ValueError("cudnn attention has no dropout: set attention_dropout to 0")
    queries, keys, values = (x.transpose(0, 2, 1, 3) for x in (queries, keys, values))  # [B, L, N, K]
    attend = functools.partial(
        jax.nn.dot_product_attention, queries, keys, values, scale=scale, implementation="cudnn"
    )
    if packed:
        mixed = attend(mask=segment_mask(segment_ids))
    else:
        # An empty row reads its first token of padding: a softmax over nothing is no number.
        lengths = jnp.maximum((segment_ids > 0).sum(-1, dtype=jnp.int32), 1)  # [B]
        mixed = attend(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return mixed.transpose(0, 2, 1, 3)


def cudnn_takes(length: int, size: int, dtype: jnp.dtype, rate: float) -> bool:
    """Whether cuDNN is there and takes rows of `length` tokens with heads of `size`, forward and backward."""
    fits = size % 8 == 0 and size <= 128 and length % 2 == 0
    return fits and dtype == jnp.bfloat16 and rate == 0.0 and has_cudnn()


@functools.cache
def has_cudnn() -> bool:
    """Whether JAX computes on an NVIDIA GPU of compute capability 8.0 (Ampere) or later."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; AMD's are "gfx90a"
    return capability[:1].isdigit() and int(capability.split(".")[0]) >= 8

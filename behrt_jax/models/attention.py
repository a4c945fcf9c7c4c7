"""Multi-head self-attention with four plain Dense layers: query, key, value, out."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.config import Attention
from behrt_jax.models.chunked_attention import chunked_attention
from behrt_jax.models.dense_attention import dense_attention

CHUNKED_FROM = 512
"""Length of a row from which `auto` takes the chunked form."""


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
) -> jax.Array:
    """Attention by cuDNN (an NVIDIA GPU, bfloat16); arguments as in `chunked_attention`.

    Raises:
        ValueError: a dropout rate above 0: cuDNN's bits would not be those of the other forms.
    """
    if rate:
        raise ValueError("cudnn attention has no dropout: set attention_dropout to 0")
    queries, keys, values = (x.transpose(0, 2, 1, 3) for x in (queries, keys, values))  # [B, L, N, K]
    mixed = jax.nn.dot_product_attention(
        queries, keys, values, mask=segment_mask(segment_ids), scale=1.0, implementation="cudnn"
    )
    return mixed.transpose(0, 2, 1, 3)


FORMS = {"dense": dense_attention, "chunked": chunked_attention, "cudnn": cudnn_attention}


class SelfAttention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017) with a float32 softmax."""

    heads: int
    dropout: float
    dtype: jnp.dtype
    form: Attention = "auto"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        deterministic: bool = True,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        """Attend within segments.

        Args:
            x: `[batch, length, hidden]`.
            segment_ids: subject of each token within its row, int32 `[batch, length]`; 0 is padding.
            deterministic: no dropout.
            rows: number of each row in its batch, int32 `[batch]`, for dropout; 0, 1, ... where not given.

        Returns:
            `[batch, length, hidden]` in `dtype`.
        """
        batch, length, hidden = x.shape
        size = hidden // self.heads

        def project(name: str) -> jax.Array:
            y = nn.Dense(hidden, dtype=self.dtype, name=name)(x)
            return y.reshape(batch, length, self.heads, size).transpose(0, 2, 1, 3)  # [B, N, L, K]

        queries, keys, values = project("query") * size**-0.5, project("key"), project("value")
        rate = 0.0 if deterministic else self.dropout
        form = self.form
        if form == "auto":
            form = "dense" if length < CHUNKED_FROM else "chunked"
        dropout_key = self.make_rng("dropout") if rate else None
        mixed = FORMS[form](queries, keys, values, segment_ids, rate=rate, key=dropout_key, rows=rows)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, hidden)  # [B, L, D]
        return nn.Dense(hidden, dtype=self.dtype, name="out")(mixed)

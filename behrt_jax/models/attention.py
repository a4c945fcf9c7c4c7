"""Multi-head self-attention with four plain Dense layers: query, key, value, out."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.config import Attention
from behrt_jax.models.chunked_attention import chunked_attention
from behrt_jax.models.cudnn_attention import cudnn_attention, cudnn_takes
from behrt_jax.models.dense_attention import dense_attention

CHUNKED_FROM = 512
"""Length of a row from which `auto` takes the chunked form where cuDNN is not to be had."""


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
        packed: bool = True,
    ) -> jax.Array:
        """Attend within segments.

        Args:
            x: `[batch, length, hidden]`.
            segment_ids: subject of each token within its row, int32 `[batch, length]`; 0 is padding.
            deterministic: no dropout.
            rows: number of each row in its batch, int32 `[batch]`, for dropout; 0, 1, ... where not given.
            packed: rows may hold several segments; False is faster in the `cudnn` form where each holds one.

        Returns:
            `[batch, length, hidden]` in `dtype`.
        """
        batch, length, hidden = x.shape
        size = hidden // self.heads

        def project(name: str) -> jax.Array:
            y = nn.Dense(hidden, dtype=self.dtype, name=name)(x)
            return y.reshape(batch, length, self.heads, size).transpose(0, 2, 1, 3)  # [B, N, L, K]

        queries, keys, values = project("query"), project("key"), project("value")
        rate = 0.0 if deterministic else self.dropout
        form = self.form
        if form == "auto":
            form = "dense" if length < CHUNKED_FROM else "chunked"
            if cudnn_takes(length, size, self.dtype, rate):
                form = "cudnn"
        if form == "cudnn":  # scales without a pass of its own
            attend = partial(cudnn_attention, scale=size**-0.5, packed=packed)
        else:
            attend, queries = FORMS[form], queries * size**-0.5
        dropout_key = self.make_rng("dropout") if rate else None
        mixed = attend(queries, keys, values, segment_ids, rate=rate, key=dropout_key, rows=rows)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, hidden)  # [B, L, D]
        return nn.Dense(hidden, dtype=self.dtype, name="out")(mixed)

"""Multi-head self-attention with four plain Dense layers: query, key, value, out."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.models.dropout import Dropout


def segment_mask(segment_ids: jax.Array) -> jax.Array:
    """Who may attend to whom in packed rows: bool `[batch, 1, length, length]`.

    Args:
        segment_ids: subject of each token within its row, int32 `[batch, length]`; 0 is padding.
            Padding attends to padding, so that no row of the softmax is empty.
    """
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


class SelfAttention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017) with a float32 softmax."""

    heads: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, deterministic: bool = True, rows: jax.Array | None = None
    ) -> jax.Array:
        """Attend.

        Args:
            x: `[batch, length, hidden]`.
            mask: bool `[batch, 1, length, length]`, True where attention is allowed.
            deterministic: no dropout.
            rows: number of each row in its batch, int32 `[batch]`, for dropout; 0, 1, ... where not given.

        Returns:
            `[batch, length, hidden]` in `dtype`.
        """
        batch, length, hidden = x.shape
        size = hidden // self.heads

        def project(name: str) -> jax.Array:
            return nn.Dense(hidden, dtype=self.dtype, name=name)(x).reshape(batch, length, self.heads, size)

        query = project("query").transpose(0, 2, 1, 3) * size**-0.5  # [B, N, L, K]
        # Keys are transposed before the product: on CPU 1.1 to 2 times as fast as an einsum that
        # leaves it to the compiler.
        key = project("key").transpose(0, 2, 3, 1)  # [B, N, K, L]
        value = project("value").transpose(0, 2, 1, 3)  # [B, N, L, K]
        scores = jnp.matmul(query, key, preferred_element_type=jnp.float32)  # [B, N, L, L]
        weights = nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min))
        weights = Dropout(self.dropout)(weights.astype(self.dtype), deterministic, rows)
        mixed = jnp.matmul(weights, value)  # [B, N, L, K]
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, hidden)  # [B, L, D]
        return nn.Dense(hidden, dtype=self.dtype, name="out")(mixed)

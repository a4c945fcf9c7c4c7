"""Pre-LayerNorm transformer encoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.config import ModelConfig
from behrt_jax.models.attention import SelfAttention
from behrt_jax.models.dropout import Dropout
from behrt_jax.models.gelu import gelu
from behrt_jax.models.layer_norm import LayerNorm


class Block(nn.Module):
    """Attention and feed-forward branch, each behind a LayerNorm and added to its input."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, deterministic: bool, rows: jax.Array | None = None
    ) -> jax.Array:
        """Map `x` `[batch, length, hidden]` to the same shape; other arguments as in `SelfAttention`."""
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        attention_dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        drop = Dropout(config.dropout)

        branch = LayerNorm(name="attention_norm")(x)
        branch = SelfAttention(config.heads, attention_dropout, dtype, config.attention, name="attention")(
            branch, segment_ids, deterministic, rows
        )
        x = x + drop(branch, deterministic, rows)

        branch = LayerNorm(name="ffn_norm")(x)
        branch = nn.Dense(config.ffn_size or 4 * config.hidden_size, dtype=dtype, name="intermediate")(branch)
        branch = gelu(branch)  # [B, L, F]
        branch = nn.Dense(config.hidden_size, dtype=dtype, name="output")(branch)
        return x + drop(branch, deterministic, rows)


class Encoder(nn.Module):
    """Blocks `layer_0`, `layer_1`, ... and a final LayerNorm."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, deterministic: bool = True, rows: jax.Array | None = None
    ) -> jax.Array:
        """Encode `x` `[batch, length, hidden]`; float32 out; other arguments as in `SelfAttention`."""
        # Dropout must be static for the branches above, hence argument 3 (self counts).
        block = nn.remat(Block, static_argnums=(3,)) if self.config.rematerialise else Block
        for layer in range(self.config.layers):
            x = block(self.config, name=f"layer_{layer}")(x, segment_ids, deterministic, rows)
        return LayerNorm(name="norm")(x)

"""Pre-LayerNorm transformer encoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.config import ModelConfig
from behrt_jax.models.attention import SelfAttention
from behrt_jax.models.dropout import Dropout
from behrt_jax.models.gelu import gelu
from behrt_jax.models.layer_norm import LayerNorm
from behrt_jax.models.stacked_layers import STACKED, layer_name


class Block(nn.Module):
    """Attention and feed-forward branch, each behind a LayerNorm and added to its input."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        deterministic: bool,
        rows: jax.Array | None = None,
        packed: bool = True,
    ) -> jax.Array:
        """Map `x` `[batch, length, hidden]` to the same shape; other arguments as in `SelfAttention`."""
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        attention_dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        drop = Dropout(config.dropout)

        branch = LayerNorm(name="attention_norm")(x)
        branch = SelfAttention(config.heads, attention_dropout, dtype, config.attention, name="attention")(
            branch, segment_ids, deterministic, rows, packed
        )
        x = x + drop(branch, deterministic, rows)

        branch = LayerNorm(name="ffn_norm")(x)
        branch = nn.Dense(config.ffn_size or 4 * config.hidden_size, dtype=dtype, name="intermediate")(branch)
        branch = gelu(branch)  # [B, L, F]
        branch = nn.Dense(config.hidden_size, dtype=dtype, name="output")(branch)
        return x + drop(branch, deterministic, rows)


class Encoder(nn.Module):
    """Blocks `layer_0`, `layer_1`, ... and a final LayerNorm; or all blocks as one, `layers`, whose
    parameters have a leading axis over layers (`ModelConfig.scan_layers`).
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
    ) -> jax.Array:
        """Encode `x` `[batch, length, hidden]`; float32 out; other arguments as in `SelfAttention`."""
        config, block = self.config, Block
        if config.rematerialise:
            # What branches depend on must be static, hence arguments 3 and 5 (self counts). Inside a scan
            # nothing can undo the recomputation: the barriers against it are not needed there.
            block = nn.remat(Block, static_argnums=(3, 5), prevent_cse=not config.scan_layers)
        if config.scan_layers:
            # Every collection and every random stream goes by the layer, whatever its name: adapters come in
            # a collection that this module does not know.
            scanned = nn.scan(
                lambda layer, x, segment_ids, rows: (
                    layer(x, segment_ids, deterministic, rows, packed),
                    None,
                ),
                variable_axes={True: 0},
                split_rngs={True: True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=config.layers,
            )
            x, _ = scanned(block(config, name=STACKED), x, segment_ids, rows)
        else:
            for layer in range(config.layers):
                x = block(config, name=layer_name(layer))(x, segment_ids, deterministic, rows, packed)
        return LayerNorm(name="norm")(x)

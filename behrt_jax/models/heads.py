"""Heads on top of the encoder."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.models.embeddings import EMBEDDING_STDDEV
from behrt_jax.models.gelu import gelu
from behrt_jax.models.layer_norm import LayerNorm


class MLMHead(nn.Module):
    """Logits over the vocabulary: Dense, GELU, LayerNorm, Dense. Not tied to the embeddings."""

    vocabulary_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden: jax.Array, decode: bool = True) -> jax.Array:
        """Map `hidden` `[..., hidden]` to float32 logits `[..., vocabulary]`.

        Without `decode`, to the decoder's input `[..., hidden]`: a loss over a large vocabulary takes it
        from there in parts (`evaluation.code_losses`).
        """
        x = nn.Dense(hidden.shape[-1], dtype=self.dtype, name="dense")(hidden)
        x = gelu(x)
        x = LayerNorm(name="norm")(x)
        if not decode:
            return x
        # Small initial logits: training starts at ln(vocabulary), not above it. In bfloat16 the sum
        # over the hidden axis still comes out in float32: the softmax needs its digits.
        return nn.Dense(
            self.vocabulary_size,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(EMBEDDING_STDDEV),
            dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            name="decoder",
        )(x).astype(jnp.float32)


class TaskHead(nn.Module):
    """One linear layer, in float32: few numbers, and all that the task adds to the encoder."""

    outputs: int

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """Map `pooled` `[..., hidden]` to float32 `[..., outputs]`."""
        # Small at first, so that training starts at the loss of an even guess.
        kernel_init = nn.initializers.normal(EMBEDDING_STDDEV)
        return nn.Dense(self.outputs, kernel_init=kernel_init, name="dense")(pooled.astype(jnp.float32))

"""Embedding of an event: its code, the age at it, its visit and its position."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from behrt_jax.config import ModelConfig
from behrt_jax.models.dropout import Dropout
from behrt_jax.models.layer_norm import LayerNorm

EMBEDDING_STDDEV = 0.02


def sinusoids(rows: int, size: int) -> np.ndarray:
    """Fixed position table `[rows, size]`, float32 (Vaswani et al. 2017, section 3.5).

    Scaled to the root mean square of the trained tables at initialisation: at their customary
    amplitude of 1 the positions would drown codes and ages.
    """
    position = np.arange(rows)[:, None]  # [P, 1]
    frequency = np.exp(-np.log(10000.0) * (np.arange(size) // 2 * 2) / size)[None, :]  # [1, E]
    angle = position * frequency  # [P, E]
    table = np.where(np.arange(size)[None, :] % 2 == 0, np.sin(angle), np.cos(angle))
    return (EMBEDDING_STDDEV * np.sqrt(2.0) * table).astype(np.float32)


def age_bins(ages: jax.Array, bin_years: float, rows: int) -> jax.Array:
    """Row of the age table for each age in years, float32 -> int32, same shape; ends are clipped."""
    return jnp.clip(jnp.floor(ages / bin_years).astype(jnp.int32), 0, rows - 1)


class Embeddings(nn.Module):
    """Sum of four embeddings, LayerNorm, dropout, and a projection to the encoder's width."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        ages: jax.Array,
        visits: jax.Array,
        positions: jax.Array,
        deterministic: bool = True,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        """Embed events.

        Args:
            codes: vocabulary ids, int32 `[batch, length]`.
            ages: years, float32 `[batch, length]`.
            visits: ordinal of the visit from 0, int32 `[batch, length]`.
            positions: ordinal of the token in its sequence from 0, int32 `[batch, length]`.
            deterministic: no dropout.
            rows: number of each row in its batch, int32 `[batch]`, for dropout; 0, 1, ... where not given.

        Returns:
            `[batch, length, hidden]` in the compute dtype.
        """
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)

        # The gradient of each table stays the compiler's scatter-add. On a CPU, summing by sorted codes takes
        # 1 to 9 times as long and a one-hot product 2 to 40 times, at 22 rows as at 512.
        def table(name: str, rows: int, index: jax.Array) -> jax.Array:
            init = nn.initializers.normal(EMBEDDING_STDDEV)
            return nn.Embed(rows, config.embedding_size, embedding_init=init, name=name)(index)

        x = table("code", self.vocabulary_size, codes)  # [B, L, E]
        x = x + table("age", config.age_rows, age_bins(ages, config.age_bin_years, config.age_rows))
        if config.visit_embedding == "alternating":
            x = x + table("visit", 2, visits % 2)
        else:
            x = x + table("visit", config.visit_rows, jnp.clip(visits, 0, config.visit_rows - 1))
        place = jnp.clip(visits, 0, config.positions - 1) if config.position_of == "visit" else positions
        if config.position_embedding == "sinusoidal":
            x = x + jnp.asarray(sinusoids(config.positions, config.embedding_size))[place]
        else:
            x = x + table("position", config.positions, place)
        x = LayerNorm(name="norm")(x)
        x = Dropout(config.dropout)(x, deterministic, rows).astype(dtype)
        if config.embedding_size != config.hidden_size:
            x = nn.Dense(config.hidden_size, dtype=dtype, name="projection")(x)  # [B, L, D]
        return x

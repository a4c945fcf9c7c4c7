"""BEHRT (Li et al. 2020, doi 10.1038/s41598-020-62922-y) with a pre-LayerNorm encoder."""

from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from behrt_jax.config import ModelConfig
from behrt_jax.models.attention import SelfAttention
from behrt_jax.models.layers import Dropout, LayerNorm, gelu
from behrt_jax.models.stacked_layers import STACKED, layer_name

# Embedding of an event: its code, the age at it, its visit and its position.

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


# Pre-LayerNorm transformer encoder.


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


# Heads on top of the encoder.


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


# From token vectors to one vector for each subject in a packed row.

Pooling = Literal["cls", "mean", "max", "last"]


def pool_segments(hidden: jax.Array, segment_ids: jax.Array, how: Pooling, segments: int) -> jax.Array:
    """Pool each segment's tokens.

    Args:
        hidden: `[batch, length, hidden]`.
        segment_ids: int32 `[batch, length]`, 0 for padding, subjects from 1 up.
        how: `cls` takes the vector of the first token (which must be [CLS]), `last` that of the last, `mean`
            and `max` go over all tokens of the segment.
        segments: how many segments to return a row, at least the largest id.

    Returns:
        `[batch, segments, hidden]`; segment `s + 1` at index `s`, zeros where it does not occur.
    """
    chex.assert_rank(hidden, 3)
    chex.assert_shape(segment_ids, hidden.shape[:2])
    ids = jnp.arange(1, segments + 1, dtype=segment_ids.dtype)
    member = segment_ids[:, None, :] == ids[None, :, None]  # [B, S, L]
    present = member.any(axis=-1, keepdims=True)  # [B, S, 1]
    if how == "cls":
        first = jnp.argmax(member, axis=-1)  # [B, S]
        pooled = jnp.take_along_axis(hidden, first[:, :, None], axis=1)  # [B, S, D]
    elif how == "last":
        last = member.shape[-1] - 1 - jnp.argmax(member[:, :, ::-1], axis=-1)  # [B, S]
        pooled = jnp.take_along_axis(hidden, last[:, :, None], axis=1)  # [B, S, D]
    elif how == "mean":
        total = jnp.einsum("bsl,bld->bsd", member.astype(hidden.dtype), hidden)
        pooled = total / jnp.maximum(member.sum(axis=-1, keepdims=True), 1)
    elif how == "max":
        pooled = jax.vmap(lambda rows, ids: jax.ops.segment_max(rows, ids, num_segments=segments + 1)[1:])(
            hidden, segment_ids
        )
    else:
        raise ValueError(f"pooling must be cls, mean, max or last, not {how!r}")
    return jnp.where(present, pooled, 0.0)


class BEHRT(nn.Module):
    """Events in, one vector an event out."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        ages: jax.Array,
        visits: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
    ) -> jax.Array:
        """Encode rows of events, in each of which several subjects may stand one after the other.

        Args:
            codes: vocabulary ids, int32 `[batch, length]`.
            ages: years at the event, float32 `[batch, length]`.
            visits: ordinal of the visit in the subject's history from 0, int32 `[batch, length]`.
            positions: ordinal of the token in the subject's sequence from 0, int32 `[batch, length]`.
            segment_ids: subject within the row from 1, int32 `[batch, length]`; 0 is padding.
            deterministic: no dropout; otherwise a `dropout` PRNG key is needed.
            rows: number of each row in its batch, int32 `[batch]`, for dropout; 0, 1, ... where not given.
            packed: False promises that no row holds more than one subject, see `SelfAttention`.

        Returns:
            float32 `[batch, length, hidden]`; at padding, numbers without meaning.
        """
        chex.assert_rank(codes, 2)
        chex.assert_equal_shape([codes, ages, visits, positions, segment_ids])
        x = Embeddings(self.config, self.vocabulary_size, name="embeddings")(
            codes, ages, visits, positions, deterministic, rows
        )
        return Encoder(self.config, name="encoder")(x, segment_ids, deterministic, rows, packed)


class BEHRTForMLM(nn.Module):
    """BEHRT with the masked-code head."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        ages: jax.Array,
        visits: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        targets: jax.Array | None = None,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
        decode: bool = True,
    ) -> jax.Array:
        """Logits over the vocabulary.

        Args:
            codes: as the other inputs up to `segment_ids`, see :class:`BEHRT`.
            ages: see :class:`BEHRT`.
            visits: see :class:`BEHRT`.
            positions: see :class:`BEHRT`.
            segment_ids: see :class:`BEHRT`.
            targets: columns at which the head is evaluated, int32 `[batch, targets]`; every column
                where not given. The head is the widest layer: evaluate it only where it is asked.
            deterministic: no dropout.
            rows: see :class:`BEHRT`.
            packed: see :class:`BEHRT`.
            decode: False for the input of the head's last layer in place of its logits.

        Returns:
            float32 `[batch, targets or length, vocabulary]`, or `[batch, targets or length, hidden]`.
        """
        hidden = BEHRT(self.config, self.vocabulary_size, name="behrt")(
            codes, ages, visits, positions, segment_ids, deterministic, rows, packed
        )
        if targets is not None:
            chex.assert_shape(targets, (codes.shape[0], None))
            hidden = jnp.take_along_axis(hidden, targets[:, :, None], axis=1)  # [B, T, D]
        head = MLMHead(self.vocabulary_size, jnp.dtype(self.config.compute_dtype), name="mlm_head")
        return head(hidden, decode)


class PatientEmbedding(nn.Module):
    """One vector for each subject: BEHRT and a pooling over the subject's events.

    Raises:
        ValueError: `cls` pooling for a model whose sequences carry no [CLS] token.
    """

    config: ModelConfig
    vocabulary_size: int
    pooling: Pooling = "mean"

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        ages: jax.Array,
        visits: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        segments: int,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
    ) -> jax.Array:
        """Return float32 `[batch, segments, hidden]`; inputs as in :class:`BEHRT`."""
        if self.pooling == "cls" and not self.config.cls_token:
            raise ValueError("cls pooling needs sequences with a [CLS] token: set model.cls_token")
        hidden = BEHRT(self.config, self.vocabulary_size, name="behrt")(
            codes, ages, visits, positions, segment_ids, deterministic, rows, packed
        )
        return pool_segments(hidden, segment_ids, self.pooling, segments)


class BEHRTForTask(nn.Module):
    """:class:`PatientEmbedding`, beside whose parameters stands one linear layer on the pooled vector."""

    config: ModelConfig
    vocabulary_size: int
    outputs: int
    """Numbers that the task needs for an example, such as a logit a class."""
    pooling: Pooling = "mean"

    @nn.compact
    def __call__(self, *inputs: Any, **options: Any) -> jax.Array:
        """Return float32 `[batch, segments, outputs]`; arguments as in :class:`PatientEmbedding`."""
        embedding = PatientEmbedding(self.config, self.vocabulary_size, self.pooling)
        nn.share_scope(self, embedding)  # its parameters have the same paths here as there
        pooled = embedding(*inputs, **options)  # [B, S, D]
        return TaskHead(self.outputs, name="task_head")(pooled)


def example_inputs(config: ModelConfig, rows: int = 1) -> tuple[jax.Array, ...]:
    """Inputs of the right shapes and dtypes, `[rows, positions]`, to initialise or tabulate a model."""
    shape = (rows, config.positions)
    integers = jnp.zeros(shape, jnp.int32)
    return integers, jnp.zeros(shape, jnp.float32), integers, integers, jnp.ones(shape, jnp.int32)

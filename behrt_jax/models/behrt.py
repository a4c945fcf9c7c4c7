"""BEHRT (Li et al. 2020, doi 10.1038/s41598-020-62922-y) with a pre-LayerNorm encoder, and its heads.

A batch of events goes through :class:`Embeddings` and :class:`Encoder`; a head makes of each event, or of
each subject's events pooled, what a task asks for. All modules share two arguments beside their input:
``rows``, the number of each row in its batch, int32 `[batch]` (dropout draws by it; 0, 1, ... where not
given), and ``packed``, which False makes a promise that no row holds more than one subject.
"""

from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from behrt_jax.config import ModelConfig
from behrt_jax.data.batches import Batch
from behrt_jax.models.attention import SelfAttention
from behrt_jax.models.layers import Dropout, LayerNorm, gelu
from behrt_jax.models.stacked_layers import STACKED, layer_name

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
    """Row of the age table for each age in years, float32 -> int32, same shape.

    Ends are clipped; an unknown age (NaN) has the last row.
    """
    known = jnp.where(jnp.isnan(ages), jnp.inf, ages)
    return jnp.clip(jnp.floor(known / bin_years), 0, rows - 1).astype(jnp.int32)


class Embeddings(nn.Module):
    """Sum of four embeddings, LayerNorm, dropout, and a projection to the encoder's width."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(self, batch: Batch, deterministic: bool = True, rows: jax.Array | None = None) -> jax.Array:
        """Embed the events of a batch; `[batch, length, hidden]` in the compute dtype."""
        config, visits = self.config, jnp.asarray(batch.visits)
        dtype = jnp.dtype(config.compute_dtype)

        # The gradient of each table stays the compiler's scatter-add. On a CPU, summing by sorted codes takes
        # 1 to 9 times as long and a one-hot product 2 to 40 times, at 22 rows as at 512.
        def table(name: str, rows: int, index: jax.Array) -> jax.Array:
            init = nn.initializers.normal(EMBEDDING_STDDEV)
            return nn.Embed(rows, config.embedding_size, embedding_init=init, name=name)(index)

        x = table("code", self.vocabulary_size, jnp.asarray(batch.codes))  # [B, L, E]
        ages = age_bins(jnp.asarray(batch.ages), config.age_bin_years, config.age_rows)
        x = x + table("age", config.age_rows, ages)
        if config.visit_embedding == "alternating":
            x = x + table("visit", 2, visits % 2)
        else:
            x = x + table("visit", config.visit_rows, jnp.clip(visits, 0, config.visit_rows - 1))
        place = jnp.asarray(batch.positions)
        if config.position_of == "visit":
            place = jnp.clip(visits, 0, config.positions - 1)
        if config.position_embedding == "sinusoidal":
            x = x + jnp.asarray(sinusoids(config.positions, config.embedding_size))[place]
        else:
            x = x + table("position", config.positions, place)
        x = LayerNorm(name="norm")(x)
        x = Dropout(config.dropout)(x, deterministic, rows).astype(dtype)
        if config.embedding_size != config.hidden_size:
            x = nn.Dense(config.hidden_size, dtype=dtype, name="projection")(x)  # [B, L, D]
        return x


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


class BEHRT(nn.Module):
    """Events in, one vector an event out."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
    ) -> jax.Array:
        """Encode rows of events, in each of which several subjects may stand one after the other.

        Args:
            batch: of arrays of either kind, numpy's or JAX's; its `row_ids` are not read.
            deterministic: no dropout; otherwise a `dropout` PRNG key is needed.
            rows: see the module.
            packed: see the module.

        Returns:
            float32 `[batch, length, hidden]`; at padding, numbers without meaning.
        """
        chex.assert_rank(batch.codes, 2)
        chex.assert_equal_shape([batch.codes, batch.ages, batch.visits, batch.positions, batch.segment_ids])
        x = Embeddings(self.config, self.vocabulary_size, name="embeddings")(batch, deterministic, rows)
        segment_ids = jnp.asarray(batch.segment_ids)
        return Encoder(self.config, name="encoder")(x, segment_ids, deterministic, rows, packed)


class MLMHead(nn.Module):
    """Logits over the vocabulary: Dense, GELU, LayerNorm, Dense. Not tied to the embeddings."""

    vocabulary_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden: jax.Array, decode: bool = True) -> jax.Array:
        """Map `hidden` `[..., hidden]` to float32 logits `[..., vocabulary]`.

        Without `decode`, to the decoder's input `[..., hidden]`: a loss over a large vocabulary takes it
        from there in parts (`models.losses`).
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


class BEHRTForMLM(nn.Module):
    """BEHRT with the masked-code head."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        targets: jax.Array | None = None,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
        decode: bool = True,
    ) -> jax.Array:
        """Logits over the vocabulary.

        Args:
            batch: see :class:`BEHRT`.
            targets: columns at which the head is evaluated, int32 `[batch, targets]`; every column
                where not given. The head is the widest layer: evaluate it only where it is asked.
            deterministic: no dropout.
            rows: see the module.
            packed: see the module.
            decode: False for the input of the head's last layer in place of its logits.

        Returns:
            float32 `[batch, targets or length, vocabulary]`, or `[batch, targets or length, hidden]`.
        """
        hidden = BEHRT(self.config, self.vocabulary_size, name="behrt")(batch, deterministic, rows, packed)
        if targets is not None:
            chex.assert_shape(targets, (hidden.shape[0], None))
            hidden = jnp.take_along_axis(hidden, targets[:, :, None], axis=1)  # [B, T, D]
        head = MLMHead(self.vocabulary_size, jnp.dtype(self.config.compute_dtype), name="mlm_head")
        return head(hidden, decode)


Pooling = Literal["cls", "mean", "max", "last", "attention", "each"]
EACH: tuple[Pooling, ...] = ("mean", "max", "last", "attention")
"""Poolings among which a search chooses; "each" computes all, and its parameters say which counts."""


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


class PoolingHead(nn.Module):
    """Poolings with parameters: attention, by a learned query for each head, and a choice among `EACH`."""

    heads: int
    how: Pooling

    @nn.compact
    def __call__(self, hidden: jax.Array, segment_ids: jax.Array, segments: int) -> jax.Array:
        """Pool each segment's tokens; arguments and result as of :func:`pool_segments`."""
        batch, length, width = hidden.shape
        # Zero queries weigh all alike: attention begins as the mean.
        query = self.param("query", nn.initializers.zeros, (width, self.heads))
        scores = (hidden.astype(jnp.float32) @ query).swapaxes(1, 2)[:, None]  # [B, 1, H, L]
        ids = jnp.arange(1, segments + 1, dtype=segment_ids.dtype)
        member = (segment_ids[:, None, :] == ids[None, :, None])[:, :, None]  # [B, S, 1, L]
        weights = jax.nn.softmax(jnp.where(member, scores, -1e30), axis=-1)  # [B, S, H, L]
        by_head = hidden.reshape(batch, length, self.heads, width // self.heads)
        attended = jnp.einsum("bshl,blhd->bshd", weights.astype(hidden.dtype), by_head)
        present = member.any(axis=-1)  # [B, S, 1]
        attended = jnp.where(present, attended.reshape(batch, segments, width), 0.0)
        if self.how == "attention":
            return attended
        chosen = jax.lax.stop_gradient(self.param("choice", nn.initializers.ones, (len(EACH),)))
        pooled = [pool_segments(hidden, segment_ids, how, segments) for how in EACH[:-1]]
        return jnp.einsum("p,pbsd->bsd", chosen.astype(hidden.dtype), jnp.stack([*pooled, attended]))


class TaskHead(nn.Module):
    """One linear layer, in float32: few numbers, and all that the task adds to the encoder."""

    outputs: int

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """Map `pooled` `[..., hidden]` to float32 `[..., outputs]`."""
        # Small at first, so that training starts at the loss of an even guess.
        kernel_init = nn.initializers.normal(EMBEDDING_STDDEV)
        return nn.Dense(self.outputs, kernel_init=kernel_init, name="dense")(pooled.astype(jnp.float32))


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
        batch: Batch,
        segments: int,
        deterministic: bool = True,
        rows: jax.Array | None = None,
        packed: bool = True,
    ) -> jax.Array:
        """Return float32 `[batch, segments, hidden]`; other arguments as in :class:`BEHRT`."""
        if self.pooling == "cls" and not self.config.cls_token:
            raise ValueError("cls pooling needs sequences with a [CLS] token: set model.cls_token")
        hidden = BEHRT(self.config, self.vocabulary_size, name="behrt")(batch, deterministic, rows, packed)
        ids = jnp.asarray(batch.segment_ids)
        if self.pooling in ("attention", "each"):
            return PoolingHead(self.config.heads, self.pooling, name="pooling_head")(hidden, ids, segments)
        return pool_segments(hidden, ids, self.pooling, segments)


class BEHRTForTask(nn.Module):
    """:class:`PatientEmbedding`, beside whose parameters stands one linear layer on the pooled vector."""

    config: ModelConfig
    vocabulary_size: int
    outputs: int
    """Numbers that the task needs for an example, such as a logit a class."""
    pooling: Pooling = "mean"

    @nn.compact
    def __call__(self, batch: Batch, segments: int, *mode: Any, **options: Any) -> jax.Array:
        """Return float32 `[batch, segments, outputs]`; arguments as in :class:`PatientEmbedding`."""
        embedding = PatientEmbedding(self.config, self.vocabulary_size, self.pooling)
        nn.share_scope(self, embedding)  # its parameters have the same paths here as there
        pooled = embedding(batch, segments, *mode, **options)  # [B, S, D]
        return TaskHead(self.outputs, name="task_head")(pooled)


def example_batch(config: ModelConfig, rows: int = 1) -> Batch:
    """A batch of the right shapes and dtypes, `[rows, positions]`, to initialise or tabulate a model."""
    shape = (rows, config.positions)
    integers = np.zeros(shape, np.int32)
    return Batch(
        codes=integers,
        ages=np.zeros(shape, np.float32),
        visits=integers,
        positions=integers,
        segment_ids=np.ones(shape, np.int32),
        row_ids=np.zeros(rows, np.int32),
    )

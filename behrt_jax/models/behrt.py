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

from behrt_jax.config.model import ModelConfig
from behrt_jax.data.batches import Batch
from behrt_jax.models.attention import SelfAttention
from behrt_jax.models.layers import Dropout, Norm, gelu, rotations, sine
from behrt_jax.models.stacked_layers import STACKED, Tree, layer_name

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


# Time and place within a segment.


def since_segment_start(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Each value less the one at the first token of its segment; int32 `[batch, length]` all."""
    return values - jnp.take_along_axis(values, _run_starts(_leads(segment_ids)), axis=1)


def visit_gaps(days: jax.Array, visits: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Days from the last event of the visit before to the first one of this visit, for each token.

    The first visit of a segment has 0: what a window of a longer history does not show is not known.

    Args:
        days: int32 `[batch, length]`, as the others.
        visits: ordinal; facts, at -1 before the first visit and on its day, have 0 like it.
        segment_ids: 0 is padding.
    """
    starts = _leads(segment_ids)
    before = jnp.concatenate([days[:, :1], days[:, :-1]], axis=1)
    gaps = jnp.where(starts, 0, days - before)  # at the first token of a visit
    return jnp.take_along_axis(gaps, _run_starts(starts | _leads(visits)), axis=1)


def _leads(values: jax.Array) -> jax.Array:
    """Where a run of equal values begins along a row: bool `[batch, length]`."""
    return jnp.pad(values[:, 1:] != values[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _run_starts(leads: jax.Array) -> jax.Array:
    """Column at which the run of each token begins: int32 `[batch, length]`."""
    columns = jax.lax.broadcasted_iota(jnp.int32, leads.shape, 1)
    return jax.lax.cummax(jnp.where(leads, columns, 0), axis=1)


EPOCH_DAY, CENTURY = 10_957, 36_525.0
"""Time2Vec of the calendar counts centuries of days from 2000-01-01: float32 then holds a day."""


class Time2Vec(nn.Module):
    """One linear and otherwise periodic functions of a time (Kazemi et al. 2019, arXiv 1907.05321).

    Periods begin evenly spread, by their logarithm, between the given ones. Each function has a scale, at
    first that of the other embeddings, among which it is added.
    """

    size: int
    shortest: float
    """Shortest period at first, days."""
    longest: float
    """Longest period at first, days."""

    @nn.compact
    def __call__(self, days: jax.Array) -> jax.Array:
        """Map `days`, `[batch, length]`, to float32 `[batch, length, size]`."""
        periods = np.geomspace(self.longest, self.shortest, self.size - 1) / CENTURY
        first = np.concatenate([[1.0], 2.0 * np.pi / periods]).astype(np.float32)
        frequency = self.param("frequency", lambda key: jnp.asarray(first))
        phase = self.param("phase", nn.initializers.uniform(2.0 * np.pi), (self.size,))
        scale = self.param("scale", nn.initializers.constant(EMBEDDING_STDDEV * 2.0**0.5), (self.size,))
        angle = (days.astype(jnp.float32) / CENTURY)[:, :, None] * frequency[None, None]  # [B, L, E]
        angle = angle + phase[None, None]
        linear = jax.lax.broadcasted_iota(jnp.int32, angle.shape, 2) == 0
        return scale[None, None] * jnp.where(linear, angle, sine(angle))


class Embeddings(nn.Module):
    """Sum of the embeddings of an event, normalised, dropout, and a projection to the encoder's width."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(self, batch: Batch, deterministic: bool = True, rows: jax.Array | None = None) -> jax.Array:
        """Embed the events of a batch; `[batch, length, hidden]` in the compute dtype."""
        config, visits = self.config, jnp.maximum(jnp.asarray(batch.visits), 0)
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
        elif config.visit_embedding == "ordinal":
            x = x + table("visit", config.visit_rows, jnp.clip(visits, 0, config.visit_rows - 1))
        place = jnp.asarray(batch.positions)
        if config.position_of == "visit":
            place = jnp.clip(visits, 0, config.positions - 1)
        if config.position_embedding == "sinusoidal":
            x = x + jnp.asarray(sinusoids(config.positions, config.embedding_size))[place]
        elif config.position_embedding == "learned":
            x = x + table("position", config.positions, place)
        if config.time != "none":
            days, segments = jnp.asarray(batch.days), jnp.asarray(batch.segment_ids)
            gaps = visit_gaps(days, jnp.asarray(batch.visits), segments)
            # From two days to twenty years.
            x = x + Time2Vec(config.embedding_size, 2.0, CENTURY / 5, name="gap")(gaps)
            if config.time == "time2vec":
                # From a month to two centuries.
                calendar = Time2Vec(config.embedding_size, 30.0, 2 * CENTURY, name="calendar")
                x = x + calendar(days - EPOCH_DAY)
        x = Norm(config.norm, config.bias, name="norm")(x)
        x = Dropout(config.dropout)(x, deterministic, rows).astype(dtype)
        if config.embedding_size != config.hidden_size:
            dense = nn.Dense(config.hidden_size, dtype=dtype, use_bias=config.bias, name="projection")
            x = dense(x)  # [B, L, D]
        return x


def head_rotations(config: ModelConfig, batch: Batch) -> tuple[jax.Array, jax.Array] | None:
    """Rotations of queries and keys, of `layers.rotations`, where the model's positions are rotary.

    Visits and days are counted from the first token of a segment: attention reads differences alone.
    """
    segments = jnp.asarray(batch.segment_ids)
    if config.position_embedding == "rope_time":
        places = since_segment_start(jnp.asarray(batch.days), segments)
    elif config.position_embedding != "rope":
        return None
    elif config.position_of == "visit":
        places = since_segment_start(jnp.maximum(jnp.asarray(batch.visits), 0), segments)
    else:
        places = jnp.asarray(batch.positions)
    return rotations(places, config.hidden_size // config.heads, config.rope_base)


class Block(nn.Module):
    """Attention and feed-forward branch, each behind a norm and added to its input."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        deterministic: bool,
        rows: jax.Array | None = None,
        packed: bool = True,
        rotation: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Map `x` `[batch, length, hidden]` to the same shape; other arguments as in `SelfAttention`."""
        config = self.config.resolved()
        dtype = jnp.dtype(config.compute_dtype)
        drop = Dropout(config.dropout)
        dense = partial(nn.Dense, dtype=dtype, use_bias=config.bias)
        assert config.attention_dropout is not None and config.ffn_size is not None  # resolved

        branch = Norm(config.norm, config.bias, name="attention_norm")(x)
        attention = SelfAttention(
            config.heads, config.attention_dropout, dtype, config.attention, config.bias, name="attention"
        )
        branch = attention(branch, segment_ids, deterministic, rows, packed, rotation)
        x = x + drop(branch, deterministic, rows)

        branch = Norm(config.norm, config.bias, name="ffn_norm")(x)
        wide = dense(config.ffn_size, name="intermediate")(branch)  # [B, L, F]
        if config.ffn == "gelu":
            wide = gelu(wide)
        else:
            gate = dense(config.ffn_size, name="gate")(branch)
            wide = (gelu if config.ffn == "geglu" else nn.silu)(gate) * wide
        branch = dense(config.hidden_size, name="output")(wide)
        return x + drop(branch, deterministic, rows)


class Encoder(nn.Module):
    """Blocks `layer_0`, `layer_1`, ... and a final norm; or all blocks as one, `layers`, whose
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
        rotation: tuple[jax.Array, jax.Array] | None = None,
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
                lambda layer, x, segment_ids, rows, rotation: (
                    layer(x, segment_ids, deterministic, rows, packed, rotation),
                    None,
                ),
                variable_axes={True: 0},
                split_rngs={True: True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=config.layers,
            )
            x, _ = scanned(block(config, name=STACKED), x, segment_ids, rows, rotation)
        else:
            for layer in range(config.layers):
                one = block(config, name=layer_name(layer))
                x = one(x, segment_ids, deterministic, rows, packed, rotation)
        return Norm(config.norm, config.bias, name="norm")(x)


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
        chex.assert_equal_shape(batch[:-1])
        x = Embeddings(self.config, self.vocabulary_size, name="embeddings")(batch, deterministic, rows)
        segment_ids, rotation = jnp.asarray(batch.segment_ids), head_rotations(self.config, batch)
        encoder = Encoder(self.config, name="encoder")
        return encoder(x, segment_ids, deterministic, rows, packed, rotation)


class TiedDecoder(nn.Module):
    """The MLM head's last layer where that is the code embedding: one parameter, `bias` `[vocabulary]`."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Map `x` `[..., embedding]` to float32 logits by the code embedding `[vocabulary, embedding]`."""
        bias = self.param("bias", nn.initializers.zeros, table.shape[:1])
        kernel = table.T.astype(self.dtype)
        logits = jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return logits + bias.astype(self.dtype).astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def decoder_weights(params: Tree, tied: bool) -> tuple[jax.Array, jax.Array]:
    """Kernel `[features, vocabulary]` and bias `[vocabulary]` of the MLM head's last layer.

    `params` are those of :class:`BEHRTForMLM`.
    """
    decoder = params["mlm_head"]["decoder"]
    table = params["behrt"]["embeddings"]["code"]["embedding"]
    return (table.T if tied else decoder["kernel"]), decoder["bias"]


class MLMHead(nn.Module):
    """Logits over the vocabulary: Dense, GELU, a norm, and the decoder."""

    config: ModelConfig
    vocabulary_size: int

    @nn.compact
    def __call__(self, hidden: jax.Array, decode: bool = True, table: jax.Array | None = None) -> jax.Array:
        """Map `hidden` `[..., hidden]` to float32 logits `[..., vocabulary]`.

        Without `decode`, to the decoder's input `[..., features]`: a loss over a large vocabulary takes it
        from there in parts (`models.losses`). `table` is the code embedding, which a tied decoder reads.
        """
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        features = config.embedding_size if config.tied_decoder else config.hidden_size
        x = nn.Dense(features, dtype=dtype, use_bias=config.bias, name="dense")(hidden)
        x = gelu(x)
        x = Norm(config.norm, config.bias, name="norm")(x)
        if not decode:
            return x
        if config.tied_decoder:
            assert table is not None
            return TiedDecoder(dtype, name="decoder")(x, table)
        # Small initial logits: training starts at ln(vocabulary), not above it. In bfloat16 the sum
        # over the hidden axis still comes out in float32: the softmax needs its digits.
        return nn.Dense(
            self.vocabulary_size,
            dtype=dtype,
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
            float32 `[batch, targets or length, vocabulary]`, or `[batch, targets or length, features]`.
        """
        hidden = BEHRT(self.config, self.vocabulary_size, name="behrt")(batch, deterministic, rows, packed)
        if targets is not None:
            chex.assert_shape(targets, (hidden.shape[0], None))
            hidden = jnp.take_along_axis(hidden, targets[:, :, None], axis=1)  # [B, T, D]
        table = None
        if self.config.tied_decoder:
            table = self.variables["params"]["behrt"]["embeddings"]["code"]["embedding"]
        return MLMHead(self.config, self.vocabulary_size, name="mlm_head")(hidden, decode, table)


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
    """Poolings with parameters: attention by one learned query, and a choice among `EACH`.

    The query's scores in a head, ``(query @ W_q) @ (x @ W_k).T``, are linear in `x`: one vector a head, which
    is what is learned in place of query and projections. All columns alike are a query without heads.
    """

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
        days=integers,
        positions=integers,
        segment_ids=np.ones(shape, np.int32),
        row_ids=np.zeros(rows, np.int32),
    )

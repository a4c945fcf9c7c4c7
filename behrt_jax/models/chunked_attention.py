"""Exact attention in tiles: memory linear in the length, and no work between rows' separate subjects.

Online softmax over tiles of queries and keys (Rabe & Staats 2021, arXiv 2112.05682) with a backward pass
that keeps only the output and the logarithm of the softmax's sum, and works the tiles out again (Dao et al.
2022, arXiv 2205.14135). Subjects stand one after the other in a row, so tiles whose subjects do not overlap
are skipped.
"""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from behrt_jax.models.layers import batch_rows, bits_at, row_words, threshold

Words = tuple[jax.Array, jax.Array] | None
"""Two words a row, from which dropout bits are made, see `dropout.row_words`; None without dropout."""
MASKED = -1e30
"""Score of a key of another segment."""


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix product, summed and returned in float32."""
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def same_segment(of_keys: jax.Array, of_queries: jax.Array) -> jax.Array:
    """Mask of who may attend to whom: from int32 `[batch, length]` each, bool `[batch, 1, keys, queries]`."""
    return (of_keys[:, :, None] == of_queries[:, None, :])[:, None]


def dropout_words(rate: float, key: jax.Array | None, rows: jax.Array | None, x: jax.Array) -> Words:
    """Words of the rows of `x` `[batch, ...]`; rows are 0, 1, ... where not given.

    Raises:
        ValueError: a rate above 0 and no key.
    """
    if rate == 0.0:
        return None
    if key is None:
        raise ValueError("attention dropout needs a key")
    return row_words(key, batch_rows(x) if rows is None else rows)


def kept(
    words: Words, rate: float, length: int, shape: tuple[int, int, int], first_key, first_query
) -> jax.Array | None:
    """Mask of the weights of a tile that dropout keeps, by their bits among all weights of their row.

    Args:
        words: of the rows; without, the result is None: all are kept.
        rate: dropout rate.
        length: keys of a row: the weights of a row are `[heads, length, length]`, queries before keys.
        shape: heads, keys and queries of the tile.
        first_key: number of the tile's first key in the row, an integer or int32 scalar.
        first_query: likewise.

    Returns:
        bool `[batch, heads, keys, queries]`.
    """
    if words is None:
        return None
    first, second = (word[:, None, None, None] for word in words)
    head, key, query = (lax.broadcasted_iota(jnp.uint32, _only(shape, axis), axis + 1) for axis in range(3))
    key, query = (x + jnp.asarray(y).astype(jnp.uint32) for x, y in ((key, first_key), (query, first_query)))
    index = (head * jnp.uint32(length) + query) * jnp.uint32(length) + key
    return bits_at(first, second, index) >= jnp.uint32(threshold(rate))


def _only(shape: tuple[int, int, int], axis: int) -> tuple[int, ...]:
    return (1, *(size if place == axis else 1 for place, size in enumerate(shape)))


QUERY_CHUNK = 128
KEY_CHUNK = 128

Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Words]

_OUTSIDE = jnp.iinfo(jnp.int32).max
"""Segment of what fills the last tiles up."""
_LOWEST = -1e29
"""Start of the running maximum: above masked scores, so that those always come to exp(-inf) = 0."""


class Tiling(NamedTuple):
    """Settings of a tile besides its operands; all static."""

    query_chunk: int
    key_chunk: int
    rate: float
    """Dropout rate of the weights."""
    length: int
    """Tokens of a row before it is filled up to whole tiles."""


def chunked_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segment_ids: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
    query_chunk: int = QUERY_CHUNK,
    key_chunk: int = KEY_CHUNK,
) -> jax.Array:
    """Softmax attention within segments, with the values, gradients and dropout bits of the dense form.

    Args:
        queries: `[batch, heads, length, size]`, already scaled, float32 or bfloat16.
        keys: likewise.
        values: likewise.
        segment_ids: subject of each token within its row, int32 `[batch, length]`; 0 is padding, which
            attends to padding. Any order is right; segments one after the other are fast.
        rate: dropout rate of the weights, from 0 up to, but not, 1.
        key: typed PRNG key for dropout; needed where `rate` is not 0.
        rows: number of each row in its batch, int32 `[batch]`, for dropout; 0, 1, ... where not given.
        query_chunk: queries in a tile.
        key_chunk: keys in a tile.

    Returns:
        `[batch, heads, length, size]` in the dtype of `values`. Softmax and sums are float32.
    """
    batch, _, length, _ = queries.shape
    chex.assert_equal_shape([queries, keys, values])
    chex.assert_shape(segment_ids, (batch, length))
    words = dropout_words(rate, key, rows, queries)
    query_chunk, key_chunk = min(query_chunk, length), min(key_chunk, length)
    tiling = Tiling(query_chunk, key_chunk, rate, length)

    # Padding comes last in a row: as the last but one of all segments it keeps them in order.
    segments = jnp.where(segment_ids == 0, _OUTSIDE - 1, segment_ids)
    fill = -length % math.lcm(query_chunk, key_chunk)
    queries, keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (queries, keys, values))
    segments = jnp.pad(segments, ((0, 0), (0, fill)), constant_values=_OUTSIDE)
    mixed: jax.Array = _attend(tiling, (queries, keys, values, segments, words))  # pyright: ignore[reportAssignmentType]
    return mixed[:, :, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling: Tiling, operands: Operands) -> jax.Array:
    return _forward(tiling, operands)[0]


def _forward(tiling: Tiling, operands: Operands):
    queries, keys, values, segments, words = operands
    batch, heads, _, size = queries.shape
    keys, values = _tiles(keys, tiling.key_chunk), _tiles(values, tiling.key_chunk).swapaxes(-1, -2)
    of_queries, of_keys = (_segment_tiles(segments, chunk) for chunk in tiling[:2])

    def of_query_tile(_, tile):
        number, query, segment, first, last = tile

        def add_key_tile(other, sums):
            highest, total, mixed = sums
            scores = product(_at(keys, other), query)  # [B, N, S, T]
            scores = jnp.where(same_segment(_at(of_keys, other), segment), scores, MASKED)
            higher = jnp.maximum(highest, scores.max(-2))  # [B, N, T]
            weights = jnp.exp(scores - higher[:, :, None])
            rescale = jnp.exp(highest - higher)
            total = total * rescale + weights.sum(-2)
            keep = _kept(tiling, words, heads, number, other)
            used = weights if keep is None else jnp.where(keep, weights, 0.0)
            used = used.astype(values.dtype)
            mixed = mixed * rescale[:, :, None] + product(_at(values, other), used)  # [B, N, K, T]
            return higher, total, mixed

        per_query = (batch, heads, tiling.query_chunk)
        start = (
            jnp.full(per_query, _LOWEST, jnp.float32),
            jnp.zeros(per_query, jnp.float32),
            jnp.zeros((batch, heads, size, tiling.query_chunk), jnp.float32),
        )
        highest, total, mixed = lax.fori_loop(first, last, add_key_tile, start)
        out = mixed / (total * (1.0 - tiling.rate))[:, :, None]
        return None, (out.astype(values.dtype), highest + jnp.log(total))

    tiles = (
        jnp.arange(len(of_queries)),
        _tiles(queries, tiling.query_chunk).swapaxes(-1, -2),
        of_queries,
        *_overlap(of_queries, of_keys),
    )
    _, (out, log_sums) = lax.scan(of_query_tile, None, tiles)
    return _whole(out.swapaxes(-1, -2)), (operands, out, log_sums)


def _backward(tiling: Tiling, saved, gradient: jax.Array):
    (queries, keys, values, segments, words), out, log_sums = saved
    batch, heads, _, size = queries.shape
    queries, gradients = _tiles(queries, tiling.query_chunk), _tiles(gradient, tiling.query_chunk)
    keys, values = _tiles(keys, tiling.key_chunk), _tiles(values, tiling.key_chunk)
    keys_across, queries_across = keys.swapaxes(-1, -2), queries.swapaxes(-1, -2)
    gradients_across = gradients.swapaxes(-1, -2)
    of_queries, of_keys = (_segment_tiles(segments, chunk) for chunk in tiling[:2])
    # Sum over keys of weight times its gradient, dropout or not.
    projections = (gradients_across.astype(jnp.float32) * out.astype(jnp.float32)).sum(-2)

    def of_query_tile(sums, tile):
        number, query, query_across, gradient, gradient_across, segment, log_sum, projection, *ends = tile

        def of_key_tile(other, sums):
            query_sum, key_sums, value_sums = sums
            scores = product(_at(keys, other), query_across)  # [B, N, S, T]
            weights = jnp.exp(scores - log_sum[:, :, None])
            weights = jnp.where(same_segment(_at(of_keys, other), segment), weights, 0.0)
            by_weight = product(_at(values, other), gradient_across)
            used = weights
            keep = _kept(tiling, words, heads, number, other)
            if keep is not None:
                used = jnp.where(keep, weights / (1.0 - tiling.rate), 0.0)
                by_weight = jnp.where(keep, by_weight / (1.0 - tiling.rate), 0.0)
            by_score = (weights * (by_weight - projection[:, :, None])).astype(keys.dtype)
            used = used.astype(values.dtype)
            query_sum = query_sum + product(_at(keys_across, other), by_score)  # [B, N, K, T]
            key_sums = _added(key_sums, other, product(by_score, query))
            value_sums = _added(value_sums, other, product(used, gradient))
            return query_sum, key_sums, value_sums

        start = jnp.zeros((batch, heads, size, tiling.query_chunk), jnp.float32)
        first, last = ends
        query_sum, *sums = lax.fori_loop(first, last, of_key_tile, (start, *sums))
        return sums, query_sum

    tiles = (
        jnp.arange(len(queries)),
        queries,
        queries_across,
        gradients,
        gradients_across,
        of_queries,
        log_sums,
        projections,
        *_overlap(of_queries, of_keys),
    )
    zeros = jnp.zeros(keys.shape, jnp.float32)
    (key_sums, value_sums), query_sums = lax.scan(of_query_tile, [zeros, zeros], tiles)
    parts = (query_sums.swapaxes(-1, -2), key_sums, value_sums)
    return ((*(_whole(part).astype(values.dtype) for part in parts), None, None),)


_attend.defvjp(_forward, _backward)


def _tiles(x: jax.Array, chunk: int) -> jax.Array:
    """`[batch, heads, length, size]` -> `[tiles, batch, heads, chunk, size]`."""
    batch, heads, length, size = x.shape
    return x.reshape(batch, heads, length // chunk, chunk, size).transpose(2, 0, 1, 3, 4)


def _whole(tiles: jax.Array) -> jax.Array:
    """Put together what `_tiles` has taken apart."""
    count, batch, heads, chunk, size = tiles.shape
    return tiles.transpose(1, 2, 0, 3, 4).reshape(batch, heads, count * chunk, size)


def _segment_tiles(segments: jax.Array, chunk: int) -> jax.Array:
    """`[batch, length]` -> `[tiles, batch, chunk]`."""
    return segments.reshape(segments.shape[0], -1, chunk).transpose(1, 0, 2)


def _at(tiles: jax.Array, number) -> jax.Array:
    return lax.dynamic_index_in_dim(tiles, number, keepdims=False)


def _added(tiles: jax.Array, number, x: jax.Array) -> jax.Array:
    """Add to one tile; a slice, where `.at[number].add` would be a scatter."""
    return lax.dynamic_update_index_in_dim(tiles, _at(tiles, number) + x, number, 0)


def _overlap(of_queries: jax.Array, of_keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First key tile that a query tile of any row attends to, and the one after the last: int32 `[tiles]`."""
    least = of_queries.min(-1)[:, None] <= of_keys.max(-1)[None]  # [T, S, B]
    most = of_queries.max(-1)[:, None] >= of_keys.min(-1)[None]
    overlap = (least & most).any(-1)  # [T, S]
    first = jnp.argmax(overlap, axis=1)
    return first, overlap.shape[1] - jnp.argmax(overlap[:, ::-1], axis=1)


def _kept(tiling: Tiling, words: Words, heads: int, number, other) -> jax.Array | None:
    """Mask of what dropout keeps in the tile of query tile `number` and key tile `other`, see `kept`."""
    shape = (heads, tiling.key_chunk, tiling.query_chunk)
    starts = other * tiling.key_chunk, number * tiling.query_chunk
    return kept(words, tiling.rate, tiling.length, shape, *starts)

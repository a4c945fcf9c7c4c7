"""What the forms of attention share: tiles of scores and weights, `[batch, heads, keys, queries]`.

Keys come first: sums over keys then run along an axis that is not the innermost, and neither pass has to
transpose a tile for a matrix product. Both are much faster on a CPU.
"""

import jax
import jax.numpy as jnp
from jax import lax

from behrt_jax.models.dropout import batch_rows, bits_at, row_words, threshold

Words = tuple[jax.Array, jax.Array] | None
"""Two words a row, from which dropout bits are made, see `dropout.row_words`; None without dropout."""
MASKED = -1e30
"""Score of a key of another segment."""


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix product, summed and returned in float32."""
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def same_segment(of_keys: jax.Array, of_queries: jax.Array) -> jax.Array:
    """Who may attend to whom: from int32 `[batch, length]` each, bool `[batch, 1, keys, queries]`."""
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
    """Which weights of a tile dropout keeps, by the bits that they have among all weights of their row.

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

"""Masked-code prediction (Devlin et al. 2018, arXiv 1810.04805, section 3.1)."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.config import MaskingConfig
from behrt_jax.data.vocabulary import MASK, PAD, SPECIAL_TOKENS

FIRST_CODE = len(SPECIAL_TOKENS)
Rows = jax.Array | np.ndarray


class MaskedCodes(NamedTuple):
    """Codes with some of them hidden, and where and what those are."""

    codes: jax.Array
    """Codes as the model sees them, int32 `[batch, length]`."""
    columns: jax.Array
    """Columns to predict, distinct within a row, int32 `[batch, budget]`."""
    labels: jax.Array
    """Codes that stood there, int32 `[batch, budget]`; [PAD] in unused slots."""
    weights: jax.Array
    """Used slots, bool `[batch, budget]`."""


def masking_budget(length: int, probability: float) -> int:
    """Most codes that are ever masked in a row of `length` tokens."""
    return max(1, math.ceil(length * probability))


def mask_codes(
    key: jax.Array,
    codes: Rows,
    row_ids: Rows,
    config: MaskingConfig,
    vocabulary_size: int,
    visits: Rows | None = None,
) -> MaskedCodes:
    """Hide codes and remember them.

    In a row of n codes, ``probability * n`` of them are drawn without replacement, the fraction
    rounded up or down at random so that every code is drawn with exactly that probability. Thus
    a budget of ``ceil(probability * length)`` slots can never overflow. Special tokens are neither
    drawn nor put in place of a code, and static facts are not drawn.

    Args:
        key: typed PRNG key; with the row's id it decides everything, whatever batch the row is in.
        codes: vocabulary ids, int32 `[batch, length]`.
        row_ids: int32 `[batch]`.
        config: probability and shares.
        vocabulary_size: ids from `FIRST_CODE` up to it are codes.
        visits: int32 `[batch, length]`; where given, what is in no visit (below 0) is a static fact.
    """
    chex.assert_rank(codes, 2)
    chex.assert_shape(row_ids, codes.shape[:1])
    length = codes.shape[1]
    budget = masking_budget(length, config.probability)

    def mask_row(codes: jax.Array, row_id: jax.Array, visits: jax.Array | None) -> MaskedCodes:
        # All that is random comes from one draw: each further one would be compiled anew.
        bits = jax.random.bits(jax.random.fold_in(key, row_id), (length + 1 + 2 * budget,))
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24  # [L + 1 + 2T], in [0, 1)
        is_code = codes >= FIRST_CODE if visits is None else (codes >= FIRST_CODE) & (visits >= 0)  # [L]
        scores = jnp.where(is_code, uniform[:length], -1.0)
        _, columns = jax.lax.top_k(scores, budget)  # [T]
        expected = config.probability * is_code.sum().astype(jnp.float32)
        count = jnp.floor(expected + uniform[length]).astype(jnp.int32)
        weights = (jnp.arange(budget) < count) & is_code[columns]

        originals = codes[columns]
        kind = uniform[length + 1 : length + 1 + budget]
        # The remainder favours low codes by less than vocabulary / 2**32.
        drawn = bits[length + 1 + budget :] % jnp.uint32(vocabulary_size - FIRST_CODE)
        random_codes = FIRST_CODE + drawn.astype(jnp.int32)
        replacement = jnp.where(
            kind < config.mask_share,
            MASK,
            jnp.where(kind < config.mask_share + config.random_share, random_codes, originals),
        )
        shown = codes.at[columns].set(jnp.where(weights, replacement, originals), unique_indices=True)
        return MaskedCodes(shown, columns, jnp.where(weights, originals, PAD), weights)

    of_visits = None if visits is None else jnp.asarray(visits)
    return jax.vmap(mask_row)(jnp.asarray(codes), jnp.asarray(row_ids), of_visits)

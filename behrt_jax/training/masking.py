"""Masked-code prediction (Devlin et al. 2018, arXiv 1810.04805, section 3.1)."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.vocabulary import MASK, PAD, SPECIAL_TOKENS

FIRST_CODE = len(SPECIAL_TOKENS)
Rows = jax.Array | np.ndarray


VISIT_ROOM = 16
"""Most slots of a row beyond its share of the codes, for the visit that goes over it."""


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
    unasked: jax.Array
    """Codes that are hidden with their visit but find no slot, int32 `[batch]`."""


class _Choice(NamedTuple):
    """Which codes of a row are masked."""

    scores: jax.Array
    """The highest are masked, float32 `[length]`; -1 where there is no code that can be."""
    number: jax.Array
    """How many, int32 scalar."""


def masking_budget(length: int, probability: float, unit: str = "code") -> int:
    """Most codes that are ever predicted in a row of `length` tokens."""
    share = max(1, math.ceil(length * probability))
    return share if unit == "code" else min(length, share + min(share, VISIT_ROOM))


def mask_codes(
    key: jax.Array,
    codes: Rows,
    row_ids: Rows,
    config: MaskingConfig,
    vocabulary_size: int,
    visits: Rows | None = None,
    segment_ids: Rows | None = None,
) -> MaskedCodes:
    """Hide codes and remember them.

    In a row of n codes, ``probability * n`` of them are drawn without replacement, the fraction
    rounded up or down at random so that every code is drawn with exactly that probability. Thus
    a budget of ``ceil(probability * length)`` slots can never overflow. Special tokens are neither
    drawn nor put in place of a code, and static facts are not drawn.

    With ``unit`` visit, the codes of a visit are drawn together. The row's visits are laid in random order
    on a circle of length n, each as long as it has codes, and those that begin on an arc of length
    ``probability * n``, put at random, are drawn: every visit with exactly that probability, and with less
    than one visit's codes beyond the share. For those there are `VISIT_ROOM` further slots (fewer in short
    rows). What finds no slot, as in visits of more codes, is shown as [MASK] all the same, but not predicted,
    and counted.

    Args:
        key: typed PRNG key; with the row's id it decides everything, whatever batch the row is in.
        codes: vocabulary ids, int32 `[batch, length]`.
        row_ids: int32 `[batch]`.
        config: probability, unit and shares.
        vocabulary_size: ids from `FIRST_CODE` up to it are codes.
        visits: int32 `[batch, length]`; where given, what is in no visit (below 0) is a static fact.
        segment_ids: int32 `[batch, length]`; visits of different segments are different ones. Needed, as
            `visits`, where visits are drawn.
    """
    chex.assert_rank(codes, 2)
    chex.assert_shape(row_ids, codes.shape[:1])
    length, by_visit = codes.shape[1], config.unit == "visit"
    if by_visit and (visits is None or segment_ids is None):
        raise ValueError("masking by visit needs the visits and segments of the codes")
    budget = masking_budget(length, config.probability, config.unit)

    def mask_row(
        codes: jax.Array, row_id: jax.Array, visits: jax.Array | None, segments: jax.Array | None
    ) -> MaskedCodes:
        # All that is random comes from one draw: each further one would be compiled anew.
        more = length if by_visit else 0
        bits = jax.random.bits(jax.random.fold_in(key, row_id), (length + 1 + 2 * budget + more,))
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24  # [L + 1 + 2T (+ L)], in [0, 1)
        is_code = codes >= FIRST_CODE if visits is None else (codes >= FIRST_CODE) & (visits >= 0)  # [L]
        share = config.probability * is_code.sum().astype(jnp.float32)
        if by_visit:
            assert visits is not None
            assert segments is not None
            runs = _runs(visits, segments)
            chosen = _choose_visits(is_code, runs, share, uniform[: length + 1], uniform[-length:])
        else:
            scores = jnp.where(is_code, uniform[:length], -1.0)
            chosen = _Choice(scores, jnp.floor(share + uniform[length]).astype(jnp.int32))
        _, columns = jax.lax.top_k(chosen.scores, budget)  # [T]
        weights = (jnp.arange(budget) < chosen.number) & is_code[columns]

        originals = codes[columns]
        kind = uniform[length + 1 : length + 1 + budget]
        # The remainder favours low codes by less than vocabulary / 2**32.
        drawn = bits[length + 1 + budget : length + 1 + 2 * budget] % jnp.uint32(vocabulary_size - FIRST_CODE)
        random_codes = FIRST_CODE + drawn.astype(jnp.int32)
        replacement = jnp.where(
            kind < config.mask_share,
            MASK,
            jnp.where(kind < config.mask_share + config.random_share, random_codes, originals),
        )
        unasked = jnp.zeros((), jnp.int32)
        shown = codes
        if by_visit:
            unasked = chosen.number - weights.sum()
            shown = jnp.where(chosen.scores > 0, MASK, codes)
        shown = shown.at[columns].set(jnp.where(weights, replacement, originals), unique_indices=True)
        return MaskedCodes(shown, columns, jnp.where(weights, originals, PAD), weights, unasked)

    given = [None if values is None else jnp.asarray(values) for values in (visits, segment_ids)]
    return jax.vmap(mask_row)(jnp.asarray(codes), jnp.asarray(row_ids), *given)


def _runs(visits: jax.Array, segments: jax.Array) -> jax.Array:
    """Number of the visit that each token of a row is in, from 0: int32 `[length]`."""
    leads = (visits[1:] != visits[:-1]) | (segments[1:] != segments[:-1])
    return jnp.pad(jnp.cumsum(leads), (1, 0))


def _choose_visits(
    is_code: jax.Array, runs: jax.Array, share: jax.Array, uniform: jax.Array, within: jax.Array
) -> _Choice:
    """Choose whole visits of a row.

    Args:
        is_code: bool `[length]`.
        runs: of :func:`_runs`.
        share: number of codes to choose, on average.
        uniform: `[length + 1]`, for the order of the visits and for the place of the arc.
        within: `[length]`, for the order of the codes of a visit.
    """
    length = len(is_code)
    sizes = jnp.zeros(length).at[runs].add(is_code)  # [runs]
    order = jnp.argsort(uniform[:length])
    begins = jnp.zeros(length).at[order].set(jnp.cumsum(sizes[order]) - sizes[order])
    around = jnp.maximum(sizes.sum(), 1.0)
    along = ((begins - uniform[length] * around) % around)[runs]  # from the beginning of the arc, [L]
    chosen = is_code & (along < share)
    # Visit by visit along the arc: the next one begins a code further on, at the earliest.
    scores = jnp.where(chosen, 2.0 * length - along - within, jnp.where(is_code, 0.0, -1.0))
    return _Choice(scores, chosen.sum())

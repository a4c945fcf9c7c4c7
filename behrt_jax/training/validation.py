"""Validation over a split, and the unigram baseline on the very same masked codes."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from behrt_jax.config import MaskingConfig
from behrt_jax.data.rows import Batch
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.evaluation.baselines import Unigram
from behrt_jax.evaluation.metrics import add_totals, mean_metrics
from behrt_jax.training.mesh import put_rows
from behrt_jax.training.objectives import FIRST_CODE, mask_codes
from behrt_jax.training.step import Totals, Variables


def validate(
    validation_step: Callable[[Variables, Batch], Totals],
    variables: Variables,
    batches: Iterable[Batch],
    mesh: Mesh,
) -> dict[str, float]:
    """Metrics of `evaluation.metrics.mean_metrics` over all batches, each target counted once."""
    return _mean([validation_step(variables, put_rows(batch, mesh)) for batch in batches])


def unigram_metrics(
    vocabulary: Vocabulary, batches: Iterable[Batch], masking: MaskingConfig, key: jax.Array
) -> dict[str, float]:
    """Metrics of predicting by train frequency at the codes that :func:`validate` masks.

    Args:
        vocabulary: its counts are those of the train split.
        batches: of the validation split.
        masking: how codes are masked.
        key: the key that the validation step was made with.

    Raises:
        InputError: the validation split is so small that not one code is masked.
    """
    unigram = Unigram(vocabulary.counts, FIRST_CODE)

    @jax.jit
    def totals(codes: jax.Array, row_ids: jax.Array) -> Totals:
        masked = mask_codes(key, codes, row_ids, masking, len(vocabulary))
        return unigram.totals(masked.labels, masked.weights)

    metrics = _mean([totals(batch.codes, batch.row_ids) for batch in batches])
    if not metrics["targets"]:
        raise InputError(
            "No code of the tuning split is masked, it is too small: give it more subjects or raise "
            "masking.probability."
        )
    return metrics


def _mean(totals: list[Totals]) -> dict[str, float]:
    sums: dict[str, Any] = {}
    for batch_totals in jax.device_get(totals):
        sums = add_totals(sums, {key: float(value) for key, value in batch_totals.items()})
    return mean_metrics(sums)

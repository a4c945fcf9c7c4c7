"""The batches that a pretraining run reads, by its settings."""

from typing import Any

from behrt_jax.config import PretrainConfig
from behrt_jax.data.batches import TrainingBatches, ValidationBatches, training_batches, validation_batches
from behrt_jax.data.sequences import SequenceSet


def split_batches(
    config: PretrainConfig, data: SequenceSet, multiple_of: int
) -> tuple[TrainingBatches, ValidationBatches]:
    """Batches of the train split and of the tuning split.

    Args:
        config: of the run.
        data: its sequences.
        multiple_of: by which the rows of each batch can be divided: devices, or parts of a step.

    Raises:
        InputError: a split without events.
    """
    common: dict[str, Any] = {
        "row_length": config.data.max_length or config.model.positions,
        "window": config.data.window,
        "packed": config.data.packed,
        "cls_token": config.model.cls_token,
        "multiple_of": multiple_of,
    }
    batches = training_batches(
        data.splits["train"],
        **common,
        batch_size=config.train.batch_size,
        batch_tokens=config.train.batch_tokens,
        seed=config.train.seed,
        static=config.train.static_masks,
    )
    return batches, validation_batches(data.splits["tuning"], **common, rows_per_batch=batches.rows_per_batch)

"""Small batches for tests of models and steps."""

import numpy as np

from behrt_jax.config.model import ModelConfig
from behrt_jax.data.batches import Batch
from behrt_jax.data.vocabulary import SPECIAL_TOKENS

VOCABULARY = 60
MODERN = {
    "position_embedding": "rope", "time": "time2vec", "ffn": "swiglu", "norm": "rms", "bias": False,
    "tied_decoder": True, "visit_embedding": "none",
}  # fmt: skip
"""Settings of a model of today."""


def tiny_model(**changes) -> ModelConfig:
    """A model that compiles in a second."""
    return ModelConfig(
        **{"embedding_size": 12, "hidden_size": 16, "layers": 2, "heads": 2, "positions": 24, **changes}
    )


def random_batch(seed: int, rows: int = 4, length: int = 24, segments: int = 3) -> Batch:
    """Rows of up to `segments` subjects of random lengths, with padding behind them."""
    rng = np.random.default_rng(seed)
    segment_ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, length), size=segments, replace=False))
        for segment, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), start=1):
            segment_ids[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
    real = segment_ids > 0
    return Batch(
        codes=np.where(real, rng.integers(len(SPECIAL_TOKENS), VOCABULARY, real.shape), 0).astype(np.int32),
        ages=np.where(real, rng.uniform(0, 99, real.shape), 0).astype(np.float32),
        visits=np.where(real, positions // 3, 0).astype(np.int32),
        days=np.where(real, 14_000 + 400 * (positions // 3), 0).astype(np.int32),
        positions=positions,
        segment_ids=segment_ids,
        row_ids=np.arange(rows, dtype=np.int32),
    )


def padded_segment(batch: Batch, row: int, segment: int) -> Batch:
    """One subject of a packed row, alone in a padded row of the same length."""
    length = batch.codes.shape[1]
    there = batch.segment_ids[row] == segment

    def alone(values: np.ndarray) -> np.ndarray:
        result = np.zeros((1, length), values.dtype)
        result[0, : there.sum()] = values[row, there]
        return result

    fields = {name: alone(getattr(batch, name)) for name in batch._fields if name != "row_ids"}
    fields["segment_ids"] = np.minimum(fields["segment_ids"], 1)
    return Batch(**fields, row_ids=np.zeros(1, np.int32))

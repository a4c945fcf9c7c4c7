"""The generated patients of the training benchmark."""

from collections.abc import Mapping
from typing import Any

from behrt_jax.config import DataConfig
from behrt_jax.data.load import load_sequences
from behrt_jax.data.sequences import SequenceSet

DISTINCT_BATCHES = 4
"""Batches that a contender has on the device and trains on in turn."""


def load_patients(task: Mapping[str, Any]) -> SequenceSet:
    """Generated records with the lengths of clinical histories: mean 15 events, median 10; for full rows,
    histories that are each longer than a row.
    """
    full = task["layout"] == "full"
    data = DataConfig(
        subjects=max(400 if full else 3000, 6 * task["patients"]),
        vocabulary_size=task["vocabulary_size"],
        events_mean=min(10_000.0, 1.5 * task["model"]["positions"]) if full else 15.0,
        events_spread=0.1 if full else 0.9,
        tuning_fraction=0.01,
        held_out_fraction=0.01,
    )
    return load_sequences(data, False)


def steps_of(task: Mapping[str, Any], platform: str) -> int:
    """Steps of a turn: an accelerator's are shorter than what the host needs to wait for one."""
    return task["steps_per_turn"] or (1 if platform == "cpu" else 10)

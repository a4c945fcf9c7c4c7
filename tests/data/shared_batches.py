"""Batches of all kinds, and what is read of their data when a share of the rows is gathered."""

from dataclasses import replace
from typing import Any

import numpy as np

from behrt_jax.data.batches import (
    RowBatches,
    RowShape,
    TaskBatches,
    task_batches,
    training_batches,
    validation_batches,
)
from behrt_jax.data.questions import QuestionBatches, question_batches
from tests.data.test_batches import histories
from tests.data.test_examples import drawn
from tests.data.test_facts import with_facts
from tests.data.test_questions import CATALOGUE, CONFIG, DATA

LENGTH = 16
PLAIN = histories(np.random.default_rng(2).integers(1, 14, 60))


def masked(multiple_of: int, facts: bool = False, static: bool = False, **shape: Any) -> RowBatches:
    """Of pretraining on masked codes."""
    sequences = with_facts(PLAIN) if facts else PLAIN
    return training_batches(
        sequences, RowShape(LENGTH, multiple_of=multiple_of, **shape), batch_size=14, seed=4, static=static
    )


def validation(multiple_of: int) -> RowBatches:
    """Of validation on masked codes."""
    return validation_batches(PLAIN, RowShape(LENGTH, multiple_of=multiple_of), rows_per_batch=9)


def task(multiple_of: int, packed: bool = True, seed: int | None = 3) -> TaskBatches:
    """Of labelled examples; the longest has as many tokens as a row."""
    shape = RowShape(LENGTH, packed=packed, multiple_of=multiple_of)
    return task_batches(*drawn(5, max_tokens=LENGTH), shape, batch_size=11, seed=seed)


def questions(multiple_of: int, packed: bool = True, endless: bool = True) -> QuestionBatches:
    """Of questions at ends of visits."""
    shape = RowShape(LENGTH, packed, True, multiple_of)
    return question_batches(DATA, "train", CATALOGUE, CONFIG, shape, batch_size=9, endless=endless)


KINDS = {
    "masked, packed": masked,
    "masked, padded": lambda multiple_of: masked(multiple_of, packed=False),
    "masked, [CLS] and facts": lambda multiple_of: masked(multiple_of, facts=True, cls_token=True),
    "masked, static": lambda multiple_of: masked(multiple_of, static=True),
    "validation": validation,
    "task, packed": task,
    "task, padded": lambda multiple_of: task(multiple_of, packed=False),
    "task, one order": lambda multiple_of: task(multiple_of, seed=None),
    "questions, packed": questions,
    "questions, padded": lambda multiple_of: questions(multiple_of, packed=False),
    "questions, tuning": lambda multiple_of: questions(multiple_of, endless=False),
}


class Column:
    """A column of tokens that counts those that are read of it."""

    def __init__(self, values: np.ndarray):
        self.values, self.read = values, 0

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        self.read += len(places)
        return self.values[places]


def watched(batches: RowBatches) -> tuple[RowBatches, dict[str, Column]]:
    """The same batches, and the columns that they gather tokens from."""
    sequences = batches.sequences
    columns = {name: Column(getattr(sequences, name)) for name in ("codes", "ages", "visits", "times")}
    return replace(batches, sequences=replace(sequences, **columns)), columns


def leaves(batch: Any) -> list[np.ndarray]:
    """The arrays of a batch, one after the other."""
    return [leaf for part in batch for leaf in (leaves(part) if isinstance(part, tuple) else [part])]

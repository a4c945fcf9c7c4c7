"""Processes that share a batch gather their own rows alone, and together the very batch that one gathers."""

import numpy as np
import pytest

from behrt_jax.data import questions
from behrt_jax.data.batches import ExampleBatches, ValidationBatches
from tests.data.shared_batches import KINDS, leaves, watched

DEVICES, PARTS = 4, 2
"""Devices of a mesh, and micro-batches of a step."""
PROCESSES = {"two": [[0, 1], [2, 3]], "in turns": [[0, 2], [1, 3]], "four": [[0], [1], [2], [3]]}
"""Devices of each process."""


def steps_of(batches):
    """The first batches of a run, and those about the end of an epoch, where rows are empty."""
    last = batches.steps_per_epoch - 1
    return sorted({0, 1, last} if isinstance(batches, ValidationBatches) else {0, 1, last, last + 1})


def shares_of(batches, processes):
    """Places of the rows of each process."""
    of_devices = np.split(np.arange(batches.batch_rows), DEVICES)
    return [np.concatenate([of_devices[device] for device in devices]) for devices in processes]


@pytest.mark.parametrize("processes", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_shares_put_together_are_the_whole_batch(kind, processes):
    batches, *of_processes = (KINDS[kind](DEVICES * PARTS) for _ in range(1 + len(processes)))
    for step in steps_of(batches):
        whole = leaves(batches.batch(step))
        together = [np.empty_like(leaf) for leaf in whole]
        for own, places in zip(of_processes, shares_of(batches, processes), strict=True):
            for found, rows in zip(together, leaves(own.batch(step, places)), strict=True):
                assert rows.dtype == found.dtype
                found[places] = rows
        for found, expected in zip(together, whole, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_share_no_other_token_is_read_and_no_other_question_drawn(kind, monkeypatch):
    whole = KINDS[kind](DEVICES * PARTS)
    batches, columns = watched(whole)
    asked, draw = [], questions.uniforms

    def uniforms(seed, epoch, examples, draws):
        asked.append(len(examples))
        return draw(seed, epoch, examples, draws)

    monkeypatch.setattr(questions, "uniforms", uniforms)
    for step in steps_of(batches):
        segments = whole.batch(step).segment_ids  # [B, L]
        for places in shares_of(batches, PROCESSES["in turns"]):
            tokens, of_all = (np.count_nonzero(rows) for rows in (segments[places], segments))
            assert 0 < tokens < of_all or step == batches.steps_per_epoch - 1
            asked.clear()
            before = {name: column.read for name, column in columns.items()}
            batches.batch(step, places)
            read = {name: column.read - before[name] for name, column in columns.items()}
            assert read == dict.fromkeys(columns, tokens)
            if kind.startswith("questions"):
                assert asked == [segments[places].max(axis=1).sum()]  # a prediction time for each segment


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_the_whole_batch_is_known_without_reading_it(kind):
    whole_batches = KINDS[kind](DEVICES * PARTS)
    batches, columns = watched(whole_batches)
    for step in steps_of(batches):
        whole = whole_batches.batch(step)
        assert batches.tokens(step) == np.count_nonzero(whole.segment_ids)
        if isinstance(batches, ExampleBatches):
            np.testing.assert_array_equal(batches.examples_of(step), whole.examples)
    assert all(column.read == 0 for column in columns.values())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_counted_from_0(kind):
    with pytest.raises((ValueError, IndexError), match=r"counted from 0|no batch -1"):
        KINDS[kind](1).batch(-1)

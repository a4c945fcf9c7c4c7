"""Batches of labelled examples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.event_rules import DAY
from behrt_jax.data.examples import find_examples, task_batches
from behrt_jax.data.vocabulary import CLS
from behrt_jax.errors import InputError
from tests.data.histories import CODES, Event, labels_at, sequence_set

LENGTH = 12


def drawn(seed, subjects=30, max_tokens=LENGTH):
    """Examples of random histories, some with two prediction times, and targets that number them."""
    rng = np.random.default_rng(seed)
    histories = {
        subject: [
            Event((day + 1) * DAY, CODES[rng.integers(len(CODES))], day) for day in range(rng.integers(1, 15))
        ]
        for subject in range(subjects)
    }
    pairs = [(int(rng.integers(subjects)), int(rng.integers(16)) * DAY) for _ in range(40)]
    data = sequence_set({"train": histories})
    examples = find_examples(data, "train", labels_at(pairs), max_tokens=max_tokens)
    numbers = np.arange(len(examples))
    return examples, np.stack([numbers + 1, -numbers], axis=1).astype(np.float32)


def shown(batches, steps):
    """Of each example in some batches, in order: its number, targets, codes and ages without [CLS]."""
    for step in steps:
        batch = batches.batch(step)
        assert batch.examples.shape == batch.weights.shape == batch.targets.shape[:2]
        np.testing.assert_array_equal(batch.weights, batch.examples >= 0)
        assert (batch.targets[batch.examples < 0] == 0).all()
        # A segment of the rows for each example, and no other.
        np.testing.assert_array_equal(batch.segment_ids.max(axis=1), (batch.examples >= 0).sum(axis=1))
        for row, segment in np.argwhere(batch.examples >= 0):
            cells = batch.segment_ids[row] == segment + 1
            columns = batch.rows.codes[row, cells], batch.rows.ages[row, cells]
            if batches.cls_token:
                assert columns[0][0] == CLS
                columns = [column[1:] for column in columns]
            yield batch.examples[row, segment], batch.targets[row, segment], *columns


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@given(seed=st.integers(0, 2**32 - 1), batch_size=st.integers(1, 50), multiple_of=st.integers(1, 4))
def test_every_example_once_an_epoch_with_its_own_targets_and_tokens(
    packed, cls_token, seed, batch_size, multiple_of
):
    examples, targets = drawn(seed, max_tokens=LENGTH - cls_token)
    batches = task_batches(
        examples,
        targets,
        row_length=LENGTH,
        batch_size=batch_size,
        seed=seed,
        packed=packed,
        cls_token=cls_token,
        multiple_of=multiple_of,
    )
    for epoch in (0, 3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        found = list(shown(batches, steps))
        assert sorted(number for number, *_ in found) == list(range(len(examples)))
        for number, numbers, codes, ages in found:
            np.testing.assert_array_equal(numbers, targets[number])
            start, length = examples.windows.starts[number], examples.windows.lengths[number]
            np.testing.assert_array_equal(codes, examples.sequences.codes[start : start + length])
            np.testing.assert_array_equal(ages, examples.sequences.ages[start : start + length])
        shapes = {batches.batch(step).rows.codes.shape for step in steps}
        assert shapes == {(batches.batch_rows, LENGTH)}
        assert batches.batch_rows % multiple_of == 0
    # About as many examples a step as asked for: never so many steps that a batch is half as large.
    assert batches.steps_per_epoch <= -(-len(examples) // batch_size)
    if not packed:
        assert batches.segments == 1


def equal(ours, theirs):
    return all(
        np.array_equal(a, b)
        for a, b in zip((*ours.rows, *ours[1:]), (*theirs.rows, *theirs[1:]), strict=True)
    )


def test_a_batch_depends_on_seed_and_step_alone():
    examples, targets = drawn(0)

    def batches(seed):
        return task_batches(examples, targets, row_length=LENGTH, batch_size=8, seed=seed)

    first, second = batches(5), batches(5)
    steps = range(3 * first.steps_per_epoch)
    ahead = {step: first.batch(step) for step in steps}
    for step in reversed(steps):
        assert equal(second.batch(step), ahead[step])
    epochs = [first.steps_per_epoch * epoch for epoch in range(3)]
    assert not any(equal(ahead[0], ahead[step]) for step in epochs[1:])  # each epoch anew
    assert not equal(batches(6).batch(0), ahead[0])
    fixed = batches(None)
    assert all(equal(fixed.batch(0), fixed.batch(step)) for step in epochs)


def test_batches_of_a_fixed_number_of_rows_show_the_same_rows():
    examples, targets = drawn(1)
    batches = task_batches(examples, targets, row_length=LENGTH, batch_size=len(examples), seed=None)
    assert batches.steps_per_epoch == 1
    few = batches.of_rows(3, multiple_of=2)
    assert (few.rows_per_batch, few.batch_rows) == (3, 4)
    assert few.steps_per_epoch == -(-batches.rows // 3) > 2
    assert all(few.batch(step).rows.codes.shape == (4, LENGTH) for step in range(few.steps_per_epoch))
    numbers = [
        [int(number) for number, *_ in shown(part, range(part.steps_per_epoch))] for part in (batches, few)
    ]
    assert numbers[0] == numbers[1]


def test_segments_have_room_for_as_many_as_asked():
    examples, targets = drawn(2)
    common = {"row_length": LENGTH, "batch_size": 8, "seed": None}
    least = task_batches(examples, targets, **common).segments
    assert least > 1
    wide = task_batches(examples, targets, **common, least_segments=least + 3)
    assert wide.batch(0).targets.shape[1] == least + 3
    assert task_batches(examples, targets, **common, least_segments=1).segments == least


def test_wrong_sizes_are_refused():
    examples, targets = drawn(3)
    with pytest.raises(InputError, match=r"train.batch_size is 0"):
        task_batches(examples, targets, row_length=LENGTH, batch_size=0, seed=None)
    nobody = find_examples(sequence_set({}), "train", labels_at([(1, DAY)]), max_tokens=3)
    with pytest.raises(InputError, match="no example"):
        task_batches(nobody, targets[:0], row_length=LENGTH, batch_size=8, seed=None)

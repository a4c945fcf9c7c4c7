"""Rows gathered on the device equal those that numpy gathers, bit for bit."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.data.batches import TrainingBatches, training_batches
from behrt_jax.training.feeding import device_bytes, gather_on_device, tokens_of
from tests.data.test_batches import assert_equal, histories, history_lengths, long_tailed


def assert_device_gathers_the_same(batches: TrainingBatches, epochs) -> None:
    tokens = jax.device_put(tokens_of(batches.sequences))
    gather = jax.jit(  # a function of its own: programs are counted by function
        lambda *arrays, **settings: gather_on_device(*arrays, **settings),
        static_argnames=("row_length", "cls_token", "most_segments"),
    )
    for number in epochs:
        epoch, counts = batches.epoch_rows(number)
        assert epoch.first_step == number * batches.steps_per_epoch
        assert {array.dtype for array in epoch} == {np.dtype(np.int32)}
        assert epoch.rows.shape == (batches.steps_per_epoch, batches.batch_rows)
        for index, rows in enumerate(epoch.rows):
            found = gather(
                tokens,
                jax.device_put(epoch),
                rows,
                row_length=batches.row_length,
                cls_token=batches.cls_token,
                most_segments=batches.most_segments,
            )
            expected = batches.batch(number * batches.steps_per_epoch + index)
            assert_equal(type(expected)(*map(np.asarray, found)), expected)
            assert counts[index] == (expected.segment_ids > 0).sum()
    assert gather._cache_size() == 1  # the shapes of an epoch never change


@settings(max_examples=8)  # each has shapes of its own, and so a compilation
@given(
    history_lengths,
    st.integers(2, 30),
    st.integers(1, 12),
    st.sampled_from(["all", "random", "recent", "first"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 4]),
)
def test_any_batches(lengths, row_length, batch_size, window, packed, cls_token, static, multiple_of):
    batches = training_batches(
        histories(lengths),
        row_length=row_length,
        batch_size=batch_size,
        window=window,
        packed=packed,
        cls_token=cls_token,
        seed=3,
        static=static,
        multiple_of=multiple_of,
    )
    assert_device_gathers_the_same(batches, [0, 2])


def test_many_histories_of_every_length():
    assert_device_gathers_the_same(training_batches(long_tailed(2000), row_length=50, batch_size=200), [0, 1])


def test_awkward_values_keep_their_bits():
    sequences = histories([3, 2])
    sequences.ages[:] = [-0.0, 1e-42, -3.5, np.float32(np.nextafter(np.float32(1), 2)), 119.0]
    batches = training_batches(sequences, row_length=4, batch_size=1, packed=False)
    epoch, _ = batches.epoch_rows(0)
    found = gather_on_device(
        tokens_of(sequences), epoch, epoch.rows[0], row_length=4, cls_token=False, most_segments=1
    )
    assert np.asarray(found.ages).tobytes() == batches.batch(0).ages.tobytes()


@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_those_of_the_tokens_and_two_epochs(packed):
    batches = training_batches(long_tailed(100), row_length=20, batch_size=8, packed=packed)
    tokens = sum(array.nbytes for array in tokens_of(batches.sequences))
    epoch = sum(array.nbytes for array in batches.epoch_rows(0)[0][:4])
    assert device_bytes(batches) == tokens + 2 * epoch

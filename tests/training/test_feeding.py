"""Ways to feed the steps: the same batches, the same results, and no word from the host in between."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.config.model import FreezingConfig
from behrt_jax.config.training import TrainConfig
from behrt_jax.data.batches import RowShape, TrainingBatches, training_batches, validation_batches
from behrt_jax.errors import InputError
from behrt_jax.training import feeding
from behrt_jax.training.devices import make_mesh, replicated, split_rows
from behrt_jax.training.feeding import (
    PlacedBatches,
    call_length,
    device_bytes,
    fits,
    gather_on_device,
    one_step,
    open_feed,
    tokens_of,
)
from behrt_jax.training.loop import Cursor, Schedule, Steps
from behrt_jax.training.state import assemble_pretraining
from behrt_jax.training.telemetry import Telemetry, leaf_names
from tests.commands import QUICK_COMPILATION
from tests.data.test_batches import assert_equal, histories, history_lengths, long_tailed, readers
from tests.data.test_facts import with_facts
from tests.models.rows import VOCABULARY
from tests.training.test_step import SHALLOW

# One layer without adapters: what is fed does not depend on the model, and it compiles quickly.
PLAIN = replace(SHALLOW, lora=None, freezing=FreezingConfig("full"))
HOST = TrainConfig(data_on_device="no")
SCAN = TrainConfig(data_on_device="yes", steps_per_call=3)


def sequences(subjects=60):
    found = histories(np.random.default_rng(1).integers(1, 24, subjects))
    found.codes[:] = 5 + found.codes % (VOCABULARY - 5)
    return found


def make_batches(static=False, devices=1):
    return training_batches(
        sequences(), RowShape(24, cls_token=True, multiple_of=devices), batch_size=12, static=static
    )


@contextmanager
def fed(config, first_step=0, total_steps=8, devices=1, static=False, state=None):
    """A feed of the tiny model, the state to begin with and the mesh."""
    mesh = make_mesh(jax.devices()[:devices])
    config_of_run = replace(PLAIN, train=replace(PLAIN.train, static_masks=static))
    assembly = assemble_pretraining(config_of_run, VOCABULARY, mesh, total_steps=100)
    step = assembly.step()
    batches = make_batches(static, devices)
    schedule = Schedule(total_steps, batches.steps_per_epoch, 4, 3, None)
    if state is None:
        state = assembly.first_state()
    program = one_step(assembly, step)
    with open_feed(config, assembly, step, program, batches, first_step, schedule) as feed:
        yield feed, state, schedule


def run(feed, state, schedule, first_step=0):
    """State at the end, and the metrics of each step."""
    step, metrics, tokens = first_step, [], []
    while step < schedule.total_steps:
        inputs, counts = feed.next_inputs(step, schedule.next_validation(step) - step)
        state, found = feed.train_step(state, inputs)
        found = jax.device_get(found)
        metrics += [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(counts))]
        tokens += counts
        step += len(counts)
    return jax.device_get(state), metrics, tokens


def assert_same(one, other):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def compiled_as_trained(monkeypatch):
    """Programs by the loop emitters of real runs.

    By the older ones of quick tests, a scanned step's sums are rounded otherwise than a single step's.
    """
    if any("fusion_emitters" in flag for flag in QUICK_COMPILATION):
        monkeypatch.setattr(
            jax, "jit", partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
        )


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_read_ahead_and_scanned_are_bit_identical(static, compiled_as_trained):
    results = []
    for config in (HOST, SCAN):
        with fed(config, static=static) as (feed, state, schedule):
            assert schedule.steps_per_epoch < 8  # an epoch ends on the way
            results.append(run(feed, state, schedule))
            assert feed.compilations() == 1
    assert_same(*results)


@pytest.mark.slow
def test_going_on_in_the_middle_of_an_epoch_is_bit_identical(compiled_as_trained):
    with fed(SCAN) as (feed, state, schedule):
        whole = run(feed, state, schedule)
    with fed(SCAN, total_steps=2) as (feed, state, schedule):
        half, first, _ = run(feed, state, schedule)
    mesh = make_mesh(jax.devices()[:1])
    with fed(SCAN, first_step=2, state=jax.device_put(half, replicated(mesh))) as (feed, state, schedule):
        end, second, _ = run(feed, state, schedule, first_step=2)
    assert_same(whole[:2], (end, first + second))


@pytest.mark.slow
def test_eight_devices_hold_the_tokens_and_gather_their_own_rows():
    with fed(SCAN) as (feed, state, schedule):
        _, alone, _ = run(feed, state, schedule)
    with fed(SCAN, devices=8) as (feed, state, schedule):
        (_, (tokens, _)), _ = feed.next_inputs(0, 1)
        assert tokens.codes.sharding.is_fully_replicated and len(tokens.codes.devices()) == 8
        text = feed.programs[0].lower(state, (tokens, feed.next_inputs(0, 1)[0][1][1])).compile().as_text()
        _, split, _ = run(feed, state, schedule)
    # The program of one device knows its own row alone: the batch is never whole.
    assert "s32[1,24]" in text and "s32[8,24]" not in text
    np.testing.assert_allclose([step["loss"] for step in alone], [step["loss"] for step in split], rtol=1e-4)


@pytest.mark.slow
def test_the_host_says_nothing_between_two_lines():
    """No implicit copy to or from a device in any call, and one fetch a line."""
    for config in (HOST, SCAN):
        with fed(config, total_steps=24) as (feed, state, _):
            schedule = Schedule(24, make_batches().steps_per_epoch, 24, 6, None)
            fetched, lines, original = [], [], jax.device_get

            def counting(tree, fetched=fetched, original=original):
                fetched.append(tree)
                return original(tree)

            with pytest.MonkeyPatch.context() as patch, jax.transfer_guard("disallow"):
                patch.setattr(jax, "device_get", counting)
                telemetry = Telemetry(lambda step: {}, leaf_names(state.variables), lambda state: {})
                steps = Steps(feed, Cursor(), schedule, telemetry, lines.append)
                for _ in steps.dispatch(state, lambda: False):
                    pass
                steps.settle()
            assert [line["step"] for line in lines] == [6, 12, 18, 24]
            assert len(fetched) == 4
            assert {line["compilations"] for line in lines} == {1}


def test_a_copy_that_nobody_asked_for_would_be_noticed():
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
        jax.jit(lambda x: x + 1)(np.ones(3, np.float32))


@pytest.mark.parametrize("config", [HOST, SCAN])
def test_an_error_in_reading_comes_to_the_loop_and_ends_the_thread(config, monkeypatch):
    def broken(self, *arguments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(feeding.TrainingBatches, "batch", broken)
    monkeypatch.setattr(feeding.TrainingBatches, "epoch_rows", broken)
    with fed(config) as (feed, _, _), pytest.raises(OSError, match="the disk is gone"):
        feed.next_inputs(0, 1)
    assert not readers()


def test_memory_decides_and_a_cpu_reads_ahead():
    class Device:
        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    def mesh(*stats):
        return type("Mesh", (), {"local_devices": [Device(one) for one in stats]})()

    free = {"bytes_limit": 1000, "bytes_in_use": 600}
    assert fits(100, mesh(free)) and not fits(101, mesh(free))
    assert not fits(100, mesh(free, {**free, "bytes_in_use": 700}))
    assert not fits(1, mesh(None))
    with fed(TrainConfig()) as (feed, _, _):
        assert len(feed.programs) == 1


def test_more_tokens_than_int32_counts_are_refused(monkeypatch):
    monkeypatch.setattr(feeding, "MOST_TOKENS", 10)
    with pytest.raises(InputError, match=r"train\.data_on_device is yes.*give auto or no"), fed(SCAN):
        pass
    with fed(TrainConfig(data_on_device="auto")):
        pass


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 25))
def test_no_other_length_takes_fewer_calls(stretches, most):
    def calls(length):
        return sum(n // length + n % length for n in stretches)

    found = call_length(np.array(stretches), most)
    assert 1 <= found <= most
    assert calls(found) == min(calls(length) for length in range(1, most + 1))


@pytest.mark.parametrize("kept", [0, 2**20])
def test_validation_batches_stay_where_they_fit(kept, monkeypatch):
    monkeypatch.setattr(feeding, "KEPT_IN_HOST_MEMORY", kept)
    batches = validation_batches(sequences(), RowShape(24, multiple_of=8), rows_per_batch=8)
    mesh = make_mesh()
    placed = PlacedBatches(batches, mesh)
    next(iter(placed))  # a pass that is broken off is no whole pass
    first, second = list(placed), list(placed)
    for ours, again, theirs in zip(first, second, batches, strict=True):
        assert (ours is again) == (kept > 0)
        assert ours.codes.sharding == split_rows(mesh)
        assert_equal(type(theirs)(*map(np.asarray, ours)), theirs)
    assert not readers()


def test_a_feed_that_is_left_early_ends_its_thread():
    for config in (HOST, SCAN):
        with fed(config, total_steps=1000) as (feed, _, _):
            feed.next_inputs(0, 1)
            assert readers()
        assert not readers()


# Rows gathered on the device equal those that numpy gathers, bit for bit.


def assert_device_gathers_the_same(batches: TrainingBatches, epochs) -> None:
    tokens = jax.device_put(tokens_of(batches.sequences))
    gather = jax.jit(  # a function of its own: programs are counted by function
        lambda *arrays, **settings: gather_on_device(*arrays, **settings),
        static_argnames=("row_length", "cls_token", "most_segments"),
    )
    for number in epochs:
        epoch, counts = batches.epoch_rows(number)
        assert epoch.first_step == number * batches.steps_per_epoch
        assert {array.dtype for array in epoch if array is not None} == {np.dtype(np.int32)}
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
    st.integers(5, 30),
    st.integers(1, 12),
    st.sampled_from(["all", "random", "recent", "first"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 4]),
    st.booleans(),
)
def test_any_batches(lengths, row_length, batch_size, window, packed, cls_token, static, multiple_of, facts):
    sequences = histories(lengths)
    batches = training_batches(
        with_facts(sequences, seed=len(lengths)) if facts else sequences,
        RowShape(row_length, packed=packed, cls_token=cls_token, multiple_of=multiple_of),
        batch_size=batch_size,
        window=window,
        seed=3,
        static=static,
    )
    assert_device_gathers_the_same(batches, [0, 2])


def test_many_histories_of_every_length():
    assert_device_gathers_the_same(training_batches(long_tailed(2000), RowShape(50), batch_size=200), [0, 1])


def test_awkward_values_keep_their_bits():
    sequences = histories([3, 2])
    sequences.ages[:] = [-0.0, 1e-42, -3.5, np.float32(np.nextafter(np.float32(1), 2)), 119.0]
    batches = training_batches(sequences, RowShape(4, packed=False), batch_size=1)
    epoch, _ = batches.epoch_rows(0)
    found = gather_on_device(
        tokens_of(sequences), epoch, epoch.rows[0], row_length=4, cls_token=False, most_segments=1
    )
    assert np.asarray(found.ages).tobytes() == batches.batch(0).ages.tobytes()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("facts", [False, True])
def test_bytes_are_those_of_the_tokens_and_two_epochs(packed, facts):
    sequences = with_facts(long_tailed(100)) if facts else long_tailed(100)
    batches = training_batches(sequences, RowShape(20, packed=packed), batch_size=8)
    tokens = sum(array.nbytes for array in jax.tree.leaves(tokens_of(batches.sequences)))
    rows = batches.epoch_rows(0)[0]._replace(first_step=None)
    epoch = sum(array.nbytes for array in jax.tree.leaves(rows))
    assert device_bytes(batches) == tokens + 2 * epoch

import itertools
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data import batches as batches_module
from behrt_jax.data.batches import (
    Batch,
    RowShape,
    TrainingBatches,
    gather_rows,
    reading_ahead,
    training_batches,
    validation_batches,
)
from behrt_jax.data.events import DAY
from behrt_jax.data.packing import RowPlan, Windows
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import CLS, PAD
from behrt_jax.errors import InputError

FIRST_CODE = 5
history_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def histories(lengths: Iterable[int]) -> Sequences:
    """Tokens that tell where they come from: code - FIRST_CODE is the index in the flat arrays."""
    lengths = np.array(list(lengths), np.int64)
    tokens = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(tokens) - np.repeat(offsets[:-1], lengths)
    return Sequences(
        subject_ids=np.arange(len(lengths), dtype=np.int64) - 3,
        offsets=offsets,
        codes=np.arange(tokens, dtype=np.int32) + FIRST_CODE,
        ages=(np.arange(tokens) * 0.25).astype(np.float32),
        visits=(place // 3).astype(np.int32),
        times=np.arange(tokens, dtype=np.int64),
    )


def long_tailed(subjects: int, longest: int = 10_000) -> Sequences:
    lengths = np.random.default_rng(0).lognormal(2.3, 0.9, subjects).round()
    return histories(np.clip(lengths, 1, longest).astype(int))


def segments(batch: Batch) -> list[tuple[np.ndarray, ...]]:
    """Codes, ages, visits, days and positions of every segment, after checks of the row they are in."""
    found = []
    for row in range(len(batch.row_ids)):
        ids = batch.segment_ids[row]
        assert (np.diff(ids[ids > 0]) >= 0).all()
        assert (ids[np.count_nonzero(ids) :] == 0).all()  # padding is at the end
        for segment in range(1, ids.max() + 1):
            cells = ids == segment
            assert cells.any()
            found.append(tuple(array[row][cells] for array in batch[:5]))
        padding = [array[row][ids == 0] for array in batch[:5]]
        assert PAD == 0 and not np.any(padding)
        assert (batch.row_ids[row] == -1) == (not ids.any())
    return found


def epoch(batches: TrainingBatches, number: int) -> list[Batch]:
    return [batches.batch(number * batches.steps_per_epoch + i) for i in range(batches.steps_per_epoch)]


def assert_equal(a: Batch, b: Batch) -> None:
    for name, left, right in zip(Batch._fields, a, b, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)
        assert left.dtype == right.dtype == (np.float32 if name == "ages" else np.int32)


def shown(batches: Iterable[Batch]) -> Counter[bytes]:
    """Multiset of segments, by their codes."""
    return Counter(codes.tobytes() for batch in batches for codes, *_ in segments(batch))


def rows_shown(batches: Iterable[Batch]) -> dict[int, tuple[bytes, ...]]:
    """Row id -> contents of the row; each id once."""
    rows = [
        (int(batch.row_ids[i]), tuple(array[i].tobytes() for array in batch[:5]))
        for batch in batches
        for i in np.flatnonzero(batch.row_ids >= 0)
    ]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_gather_rows_by_hand():
    sequences = histories([4, 3, 9])
    windows = Windows(np.array([1, 4, 10]), np.array([3, 2, 4], np.int32))
    plan = RowPlan(np.array([1, 2, 0]), np.array([0, 2, 3]))
    batch = gather_rows(sequences, windows, plan, np.array([1, -1, 0]), 9, cls_token=True)
    assert batch.codes.tolist() == [
        [CLS, 6, 7, 8, PAD, PAD, PAD, PAD, PAD],
        [PAD] * 9,
        [CLS, 9, 10, CLS, 15, 16, 17, 18, PAD],
    ]
    assert batch.ages.tolist() == [
        [0.25, 0.25, 0.5, 0.75, 0, 0, 0, 0, 0],
        [0] * 9,
        [1, 1, 1.25, 2.5, 2.5, 2.75, 3, 3.25, 0],
    ]
    assert batch.visits.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0], [0] * 9, [0, 0, 0, 1, 1, 1, 1, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 0, 0, 0, 0], [0] * 9, [0, 1, 2, 0, 1, 2, 3, 4, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0], [0] * 9, [1, 1, 1, 2, 2, 2, 2, 2, 0]]
    assert batch.row_ids.tolist() == [1, -1, 0]


def test_gather_rows_refuses_a_plan_that_forgot_the_cls_token():
    windows = Windows(np.array([0]), np.array([4], np.int32))
    plan = RowPlan(np.array([0]), np.array([0, 1]))
    with pytest.raises(ValueError, match="do not fit in 4 tokens"):
        gather_rows(histories([4]), windows, plan, np.array([0]), 4, cls_token=True)


@given(
    history_lengths, st.integers(1, 50), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 2)
)
def test_an_epoch_shows_every_subject_once(
    lengths: list[int], batch_size: int, multiple_of: int, packed: bool, cls_token: bool, number: int
):
    sequences = histories(lengths)
    batches = training_batches(
        sequences,
        RowShape(40 + cls_token, packed=packed, cls_token=cls_token, multiple_of=multiple_of),
        batch_size=batch_size,
    )
    expected = Counter()
    for start, end in zip(sequences.offsets, sequences.offsets[1:], strict=False):
        expected[np.array([CLS] * cls_token + sequences.codes[start:end].tolist(), np.int32).tobytes()] += 1
    found = epoch(batches, number)
    assert shown(found) == expected
    assert sorted(rows_shown(found)) == list(range(batches.rows))
    assert sum(np.count_nonzero(batch.segment_ids) for batch in found) == batches.tokens_per_epoch
    cells = sum(batch.codes.size for batch in found)
    assert batches.fill == pytest.approx(batches.tokens_per_epoch / cells)


@given(history_lengths, st.integers(2, 20), st.booleans())
def test_all_windows_show_every_token_of_long_histories_once_an_epoch(
    lengths: list[int], row_length: int, cls_token: bool
):
    sequences = histories(lengths)
    batches = training_batches(sequences, RowShape(row_length, cls_token=cls_token), batch_size=5)
    codes = np.concatenate([batch.codes[batch.codes >= FIRST_CODE] for batch in epoch(batches, 0)])
    np.testing.assert_array_equal(np.sort(codes), np.sort(sequences.codes))
    assert batches.windows_per_epoch == sum(-(-n // (row_length - cls_token)) for n in lengths)


@given(history_lengths, st.sampled_from(["random", "recent", "first"]), st.booleans(), st.integers(0, 5))
def test_a_segment_is_a_window_of_one_history(lengths: list[int], window: Any, cls_token: bool, step: int):
    sequences = histories(lengths)
    subject = np.repeat(np.arange(len(lengths)), lengths)
    batches = training_batches(
        sequences, RowShape(12, cls_token=cls_token), batch_size=10, window=window, seed=3
    )
    for codes, ages, visits, days, positions in segments(batches.batch(step)):
        assert positions.tolist() == list(range(len(codes)))
        if cls_token:
            assert (codes[0], ages[0], visits[0], days[0]) == (CLS, ages[1], visits[1], days[1])
        tokens = codes[cls_token:] - FIRST_CODE
        assert (np.diff(tokens) == 1).all()
        owner = subject[tokens[0]]
        assert owner == subject[tokens[-1]]
        assert len(tokens) == min(lengths[owner], 12 - cls_token)
        assert window != "first" or tokens[0] == sequences.offsets[owner]
        assert window != "recent" or tokens[-1] == sequences.offsets[owner + 1] - 1
        np.testing.assert_array_equal(ages[cls_token:], sequences.ages[tokens])
        np.testing.assert_array_equal(visits[cls_token:], sequences.visits[tokens])
        np.testing.assert_array_equal(days[cls_token:], sequences.times[tokens] // DAY)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_a_batch_does_not_depend_on_those_before(steps: list[int], static: bool, packed: bool):
    sequences = long_tailed(100)
    shape = RowShape(30, packed)
    options: dict[str, Any] = {"batch_size": 12, "seed": 7, "static": static}
    used = training_batches(sequences, shape, **options)
    for step in steps:
        assert_equal(used.batch(step), training_batches(sequences, shape, **options).batch(step))


@pytest.mark.parametrize("packed", [True, False])
def test_epochs_and_seeds_differ(packed: bool):
    sequences = long_tailed(200)
    shape, options = RowShape(20, packed), {"batch_size": 20, "window": "random"}
    batches = training_batches(sequences, shape, **options)
    first, second = epoch(batches, 0), epoch(batches, 1)
    assert rows_shown(first) != rows_shown(second)
    assert shown(first) != shown(second)  # windows of long histories are drawn anew
    other_seed = training_batches(sequences, shape, **options, seed=1)
    assert rows_shown(epoch(other_seed, 0)) != rows_shown(first)


@pytest.mark.parametrize("packed", [True, False])
def test_recent_windows_are_the_same_each_epoch_but_in_other_rows(packed: bool):
    batches = training_batches(long_tailed(200), RowShape(20, packed=packed), batch_size=20, window="recent")
    first, second = epoch(batches, 0), epoch(batches, 1)
    assert shown(first) == shown(second)
    assert rows_shown(first) != rows_shown(second)


@pytest.mark.parametrize("packed", [True, False])
def test_static_rows_keep_their_contents_and_change_their_order(packed: bool):
    shape = RowShape(20, packed)
    batches = training_batches(long_tailed(200), shape, batch_size=20, static=True)
    first, second = epoch(batches, 0), epoch(batches, 3)
    assert rows_shown(first) == rows_shown(second)
    orders = [np.concatenate([batch.row_ids for batch in part]) for part in (first, second)]
    assert (orders[0] != orders[1]).any()
    assert rows_shown(first) == rows_shown(epoch(training_batches(long_tailed(200), shape, batch_size=20), 0))


@given(history_lengths, st.integers(2, 8), st.integers(0, 9))
def test_multiple_of_only_adds_empty_rows(lengths: list[int], multiple_of: int, step: int):
    options: dict[str, Any] = {"batch_size": 9, "seed": 1}
    plain = training_batches(histories(lengths), RowShape(40), **options)
    rounded = training_batches(histories(lengths), RowShape(40, multiple_of=multiple_of), **options)
    assert plain.steps_per_epoch == rounded.steps_per_epoch
    assert plain.rows_per_batch == rounded.rows_per_batch
    a, b = plain.batch(step), rounded.batch(step)
    assert len(b.row_ids) == -(-len(a.row_ids) // multiple_of) * multiple_of
    assert_equal(Batch(*(array[a.row_ids >= 0] for array in a)), Batch(*(x[b.row_ids >= 0] for x in b)))


def test_batch_size_counts_subjects():
    sequences = long_tailed(4000, longest=200)
    packed = training_batches(sequences, RowShape(200), batch_size=128)
    assert 0.8 * 128 < packed.windows_per_step < 1.25 * 128
    assert packed.rows_per_batch < 20
    assert packed.tokens_per_epoch == len(sequences.codes)
    assert packed.fill > 0.95
    unpacked = training_batches(sequences, RowShape(200, packed=False), batch_size=128)
    assert (unpacked.rows, unpacked.steps_per_epoch, unpacked.rows_per_batch) == (4000, 32, 125)
    assert unpacked.windows_per_step == 125
    assert unpacked.batch(5).codes.shape == (125, 200)


def test_batch_tokens_counts_tokens():
    sequences = long_tailed(4000, longest=200)
    batches = training_batches(sequences, RowShape(200), batch_size=128, batch_tokens=3_900)
    assert batches.rows_per_batch == 20
    assert batches.batch(0).codes.shape == (20, 200)
    assert training_batches(sequences, RowShape(200), batch_size=1, batch_tokens=1).rows_per_batch == 1
    whole = training_batches(sequences, RowShape(200), batch_size=1, batch_tokens=10**9)
    assert (whole.rows_per_batch, whole.steps_per_epoch) == (whole.rows, 1)


@given(history_lengths, st.integers(1, 9), st.integers(1, 4), st.booleans(), st.booleans())
def test_validation_reads_every_history_whole(
    lengths: list[int], rows_per_batch: int, multiple_of: int, packed: bool, cls_token: bool
):
    sequences = histories(lengths)
    batches = validation_batches(
        sequences,
        RowShape(11, packed=packed, cls_token=cls_token, multiple_of=multiple_of),
        rows_per_batch=rows_per_batch,
        window="random",
    )
    found = list(batches)
    assert len(found) == len(batches)
    tokens = [codes[cls_token:] for batch in found for codes, *_ in segments(batch)]
    np.testing.assert_array_equal(np.sort(np.concatenate(tokens)), sequences.codes)
    assert len(tokens) == sum(-(-n // (11 - cls_token)) for n in lengths)
    assert {batch.codes.shape for batch in found} == {(-(-rows_per_batch // multiple_of) * multiple_of, 11)}
    assert sorted(rows_shown(found)) == list(range(len(batches.plan)))


@pytest.mark.parametrize("window", ["recent", "first"])
def test_validation_reads_the_windows_of_training(window: Any):
    sequences = long_tailed(100)
    validation = validation_batches(sequences, RowShape(20), rows_per_batch=4, window=window)
    training = training_batches(sequences, RowShape(20), batch_size=10, window=window)
    assert shown(validation) == shown(epoch(training, 0))


def test_validation_is_the_same_in_any_order():
    sequences = long_tailed(100)
    one = validation_batches(sequences, RowShape(20), rows_per_batch=4)
    other = validation_batches(sequences, RowShape(20), rows_per_batch=4)
    for index in reversed(range(len(one))):
        assert_equal(one[index], list(other)[index])
    for index in (-1, len(one)):
        with pytest.raises(IndexError):
            one[index]


def test_validation_gathers_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch):
    gathered = []

    def counting(*arguments: Any) -> Batch:
        gathered.append(arguments)
        return gather_rows(*arguments)

    monkeypatch.setattr(batches_module, "gather_rows", counting)
    batches = validation_batches(long_tailed(100), RowShape(20), rows_per_batch=4)
    assert len(batches) > 2 and not gathered
    next(iter(batches))
    assert len(gathered) == 1


def taken_shape(options: dict[str, Any]) -> RowShape:
    """The options of the shape, which are taken out of the others."""
    names = ("row_length", "cls_token", "multiple_of")
    return RowShape(**{name: options.pop(name) for name in names if name in options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"train\.batch_size is 0: give 1 or more"),
        ({"batch_tokens": 0}, r"train\.batch_tokens is 0: give 1 or more"),
        ({"seed": -1}, r"train\.seed is -1: give 0 or more"),
        ({"row_length": 0}, r"data\.max_length leaves a sequence 0 codes"),
        ({"row_length": 1, "cls_token": True}, r"data\.max_length leaves a sequence 0 codes"),
        ({"window": "last"}, r"data\.window is 'last': choose one of all, random, recent, first"),
        ({"multiple_of": 0}, r"multiple_of is 0"),
    ],
)
def test_training_mistakes_name_the_option(options: dict[str, Any], message: str):
    options = {"row_length": 5, "batch_size": 2} | options
    with pytest.raises(InputError, match=message):
        training_batches(histories([3]), taken_shape(options), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_batch": 0}, r"rows_per_batch is 0"),
        ({"row_length": 1, "cls_token": True}, r"data\.max_length leaves a sequence 0 codes"),
        ({"window": "last"}, r"data\.window is 'last'"),
        ({"multiple_of": 0}, r"multiple_of is 0"),
    ],
)
def test_validation_mistakes_name_the_option(options: dict[str, Any], message: str):
    options = {"row_length": 5, "rows_per_batch": 2} | options
    with pytest.raises(InputError, match=message):
        validation_batches(histories([3]), taken_shape(options), **options)


def test_there_must_be_subjects_with_events():
    with pytest.raises(InputError, match="no subjects"):
        training_batches(histories([]), RowShape(5), batch_size=2)
    with pytest.raises(InputError, match="1 subjects have no events"):
        validation_batches(histories([3, 0]), RowShape(5), rows_per_batch=2)


def test_steps_are_counted_from_0():
    with pytest.raises(ValueError, match="counted from 0"):
        training_batches(histories([3]), RowShape(5), batch_size=2).batch(-1)


# Reading ahead changes when items are made, and nothing else.

WAIT = 30.0  # seconds after which a test that hangs fails


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@given(st.integers(0, 20), st.integers(1, 5))
def test_the_items_come_in_order_and_once(count, depth):
    with reading_ahead(iter(range(count)), depth) as ahead:
        assert list(ahead) == list(range(count))
    assert not readers()


def test_items_are_made_in_another_thread_and_no_more_than_the_depth_ahead():
    made, waiting_for_fourth = [], threading.Event()

    def items():
        for number in itertools.count():
            made.append((number, threading.current_thread()))
            if number == 3:
                waiting_for_fourth.set()
            yield number

    with reading_ahead(items(), depth=3) as ahead:
        assert next(ahead) == 0
        # The caller holds 0; 1 to 3 are made without being asked for, and then the thread rests.
        assert waiting_for_fourth.wait(WAIT)
        assert [number for number, _ in made] == [0, 1, 2, 3]
        assert threading.current_thread() not in {thread for _, thread in made}
        assert next(ahead) == 1
    assert not readers()


def test_an_error_comes_in_the_place_of_its_item():
    def items():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    with reading_ahead(items(), depth=2) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    assert not readers()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_thread_ends_when_the_caller_fails(error):
    with pytest.raises(error), reading_ahead(itertools.count(), depth=2) as ahead:
        next(ahead)
        raise error
    assert not readers()


def test_a_caller_that_stops_early_leaves_no_thread_behind():
    with reading_ahead(itertools.count(), depth=2) as ahead:
        assert next(ahead) == 0
    assert not readers()

"""Reading ahead changes when items are made, and nothing else."""

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.batches import reading_ahead

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

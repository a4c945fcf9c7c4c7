import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config.model import ModelConfig
from behrt_jax.data.sequences import Sequences
from behrt_jax.errors import InputError
from behrt_jax.workflows.checks import check_days, unread_leaves

TREE = {"a": np.float32(1), "b": np.float32(2), "c": np.float32(3)}


def plain(x, y):
    return x * 2


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_what_is_computed_but_not_used_is_unread(wrap):
    def function(tree):
        unused = jnp.sin(tree["c"])
        return wrap(plain)(tree["a"], tree["b"]), unused * 0 if tree is None else tree["a"]

    assert unread_leaves(function, TREE) == [False, True, True]


def test_custom_gradients_and_loops_read_what_they_are_given():
    @jax.custom_vjp
    def product(x, y):
        return x * y

    product.defvjp(lambda x, y: (x * y, None), lambda _, g: (g, g))

    def function(tree):
        total, _ = jax.lax.scan(lambda carry, x: (carry + x, None), tree["a"], jnp.ones(3))
        return total + product(tree["b"], 2.0)

    assert unread_leaves(function, TREE) == [False, False, True]


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_exactly_what_is_summed_is_read(used):
    leaves = [np.float32(index) for index in range(len(used))]
    unread = unread_leaves(
        lambda tree: sum((x for x, use in zip(tree, used, strict=True) if use), 0.0), leaves
    )
    assert unread == [not use for use in used]


def test_a_scan_reads_what_its_steps_hand_on():
    """`a` and `b` make the second carry, which the next step adds to the first; `c` is in the third alone."""

    def function(tree, result):
        def step(carry, x):
            first, second, third = carry
            return (first + second, second * tree["b"], third + x), first + x

        (total, _, left), each = jax.lax.scan(step, (0.0, tree["a"], tree["c"]), jnp.ones(3))
        return {"total": total, "left": left, "each": each}[result]

    expected = {"total": [False, False, True], "each": [False, False, True], "left": [True, True, False]}
    for result, unread in expected.items():
        assert unread_leaves(lambda tree, result=result: function(tree, result), TREE) == unread


# Days that a model can read.


def on_days(*days):
    """A subject an event."""
    count = len(days)
    times = np.array(days, "datetime64[us]").astype(np.int64)
    columns = [np.zeros(count, kind) for kind in (np.int32, np.float32, np.int32)]
    return Sequences(np.arange(count), np.arange(count + 1), *columns, times)


def test_years_that_the_calendar_does_not_know_are_counted_by_split():
    fair = on_days("1900-01-01", "2026-07-01", "2200-12-31T23:59:59")
    wrong = on_days("1899-12-31T23:59:59", "2000-01-01", "2201-01-01", "0001-01-01")
    calendar = ModelConfig(time="time2vec")
    check_days(calendar, {"train": fair, "tuning": fair})
    with pytest.raises(
        InputError, match=r"^3 of 4 events of the tuning split .*1900 to 2200.*--model.time gaps"
    ):
        check_days(calendar, {"train": fair, "tuning": wrong})
    check_days(ModelConfig(time="gaps", position_embedding="rope_time"), {"train": wrong})


@pytest.mark.parametrize("model", [ModelConfig(time="gaps"), ModelConfig(position_embedding="rope_time")])
def test_days_of_data_that_have_one_alone_are_refused(model):
    same = on_days("2020-02-03T01:00", "2020-02-03T09:00")
    with pytest.raises(InputError, match=r"^All 2 events of the train split are on one day .2020-02-03"):
        check_days(model, {"train": same})
    check_days(ModelConfig(), {"train": same})
    check_days(model, {"train": on_days("2020-02-03"), "held_out": same})  # one subject, and no training
    check_days(model, {"train": on_days("2020-02-03", "2020-02-04")})

"""What the products of a step must compute and move, on small functions, and a floor made of it."""

import json

import jax
import jax.numpy as jnp
import pytest

from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.errors import InputError
from experiments.benchmarks.operations import Operation, operations
from experiments.benchmarks.roofline import (
    RooflineBenchmark,
    as_table,
    benchmark_roofline,
    floor_seconds,
    of_step,
)

X, W = jax.ShapeDtypeStruct((6, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
BYTES_X, BYTES_W = 4 * 6 * 5, 4 * 5 * 5


def moved(function, *arguments, **options):
    """Bytes of each product, as often as it runs, and of the rest."""
    found = operations(function, *arguments, **{"cache_bytes": 0, **options})
    return [one.bytes * one.times for one in found]


def test_operands_are_read_and_results_written_once():
    assert moved(lambda x, w: x @ w, X, W) == [BYTES_X + BYTES_W, BYTES_X]
    # One read of x for three products; nothing for what is done to it on the way, cast, turned or not.
    assert moved(lambda x, w: ((x @ w) + (x @ w.T) + (x.T.T @ w)).sum(), X, W) == [BYTES_X + BYTES_W, 0, 0, 4]
    halves = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)
    assert moved(lambda x, w: x.astype(jnp.float32) @ w, halves, W)[0] == BYTES_X / 2 + BYTES_W
    # What comes between two products is written and read again, whatever is done to it.
    assert moved(lambda x, w: jnp.sin(jnp.tanh(x @ w) + 1) @ w, X, W) == [
        BYTES_X + BYTES_W,
        2 * BYTES_X,
        BYTES_X,
    ]


def test_what_fits_the_cache_is_free():
    def twice(x, w):
        return jnp.sin(x @ w) @ w

    held = 2 * BYTES_X + BYTES_W  # arguments and result
    assert moved(twice, X, W, cache_bytes=held) == [0, 0, 0]
    # So much of an array as fits stays there, and of arguments and results from one step to the next.
    assert moved(twice, X, W, cache_bytes=held - 1) == [BYTES_X + BYTES_W, 0, 0]
    assert moved(twice, X, W, cache_bytes=BYTES_X) == [BYTES_X + BYTES_W, 0, 0]
    assert moved(twice, X, W, cache_bytes=20) == [BYTES_X + BYTES_W, 2 * (BYTES_X - 20), BYTES_X - 2 * 20]


def test_an_optimizer_reads_and_writes_its_state_and_frozen_leaves_stay():
    def update(state, x):
        w, moment, frozen = state
        moment = 0.9 * moment + 0.1 * (x.T @ x)
        return (w - moment, moment, frozen)

    *_, rest = operations(update, (W, W, W), X, cache_bytes=0)
    assert rest.group == "optimiser" and rest.bytes == 3 * BYTES_W + 2 * BYTES_W  # three unread, two written


def test_nothing_moves_between_the_two_products_of_attention():
    heads = jax.ShapeDtypeStruct((2, 7, 3), jnp.float32)
    size = 4 * 2 * 7 * 3

    def attend(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
        return jnp.einsum("bqk,bkd->bqd", weights, v)

    found = operations(attend, heads, heads, heads, cache_bytes=0)
    assert [(one.group, one.bytes) for one in found] == [
        ("attention", 2 * size),
        ("attention", size),
        ("optimiser", size),
    ]
    assert all(one.flops == 2 * 2 * 7 * 7 * 3 for one in found[:2])
    # Its output is read by the layer behind it, as any other.
    w = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    assert moved(lambda q, k, v, w: attend(q, k, v) @ w, heads, heads, heads, w)[2] == 2 * size + 4 * 9


def test_narrow_products_are_of_adapters():
    a, b = jax.ShapeDtypeStruct((5, 2), jnp.float32), jax.ShapeDtypeStruct((2, 5), jnp.float32)
    found = operations(lambda x, w, a, b: x @ w + x @ a @ b, X, W, a, b, cache_bytes=0, rank=2)
    assert [one.group for one in found] == ["products", "adapters", "adapters", "optimiser"]
    assert found[1].bytes == 4 * 5 * 2  # x is read already


def test_loops_and_nested_computations():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w), None), x, length=7)[0]

    loop, _ = operations(scanned, X, W, cache_bytes=0)
    assert (loop.times, loop.flops) == (7, 2 * 6 * 5 * 5)
    # The weights come in once, the carry is written and read at each turn.
    assert loop.bytes * loop.times == pytest.approx(BYTES_W + 7 * BYTES_X)

    # What is gone through is read once, a part of it at each turn.
    stack = jax.ShapeDtypeStruct((7, 5, 5), jnp.float32)
    loop, _ = operations(
        lambda x, ws: jax.lax.scan(lambda x, w: (x @ w, x.sum()), x, ws), X, stack, cache_bytes=0
    )
    assert loop.bytes * loop.times == pytest.approx(7 * BYTES_W + 7 * BYTES_X)

    @jax.custom_vjp
    def ruled(x, w):
        return x @ w

    ruled.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    for nested in (ruled, jax.checkpoint(lambda x, w: x @ w), jax.jit(lambda x, w: x @ w)):
        assert moved(nested, X, W)[0] == BYTES_X + BYTES_W
        forward, *backward, _ = operations(
            jax.grad(lambda x, w, f=nested: jnp.sin(f(x, w)).sum(), (0, 1)), X, W
        )
        assert len(backward) in (2, 3) and {one.flops for one in backward} == {forward.flops}


def test_the_floor_is_the_longer_of_the_two_for_each_operation():
    machine = {"flops_per_second": 100.0, "bytes_per_second": 10.0}
    product, narrow = Operation("products", 400, 10, 2, None), Operation("adapters", 10, 20, 1, None)
    rest = Operation("optimiser", 0, 30, 1, None)
    assert [floor_seconds(one, machine) for one in (product, narrow, rest)] == [8, 2, 3]
    found = of_step([product, narrow, rest], machine, 26.0, {"products": 10.0, "optimiser": 4.0})
    assert found["floor_seconds"] == 13 and found["multiple"] == 2
    assert found["overlapped_seconds"] == pytest.approx(8.1)
    lines = as_table(
        {**found, "size": "small", "regime": "lora", "rows": 2, "length": 5, "parts": 1}
    ).splitlines()
    figures = {line.split()[0]: line.split()[-1] for line in lines}
    assert figures["products"] == "1.25" and figures["optimiser"] == "1.33"
    assert next(line for line in lines if line.startswith("elementwise")).split()[-1] == "12000.00"


@pytest.mark.slow
def test_a_step_is_never_below_its_floor(tmp_path, capsys):
    tiny = PretrainConfig(
        model=ModelConfig(embedding_size=16, hidden_size=32, layers=1, heads=2, positions=16)
    )
    config = RooflineBenchmark(sizes=("tiny",), tokens=256, rank=4, vocabulary_size=50, rounds=1)
    config = RooflineBenchmark(**{**vars(config), "output": tmp_path / "roofline.json"})
    report = benchmark_roofline(config, {"tiny": tiny})
    full, lora = report["results"]
    assert full["multiple"] > 1 and lora["multiple"] > 1
    assert full["groups"]["adapters"]["flops"] == 0 < lora["groups"]["adapters"]["flops"]
    assert lora["groups"]["products"]["flops"] < full["groups"]["products"]["flops"]
    assert lora["groups"]["attention"]["flops"] == full["groups"]["attention"]["flops"]
    assert json.loads((tmp_path / "roofline.json").read_text()) == json.loads(json.dumps(report))
    assert "tiny lora, 16 rows of 16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"sizes": ("tiny",)}, {"rounds": 0}])
def test_wrong_options(options):
    with pytest.raises(InputError, match=r"--(sizes|rounds)"):
        benchmark_roofline(RooflineBenchmark(**options))

"""FLOPs of matrix products, beside counts by hand and the compiler's own."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config import FreezingConfig, LoRAConfig, PretrainConfig
from behrt_jax.presets import PRETRAIN
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.state import abstract_state, optimizer_for, run_keys, set_up
from behrt_jax.training.step import make_train_step
from experiments.benchmarks.ours import matrix_flops
from experiments.benchmarks.train import ALL_LINEARS
from tests.models.rows import random_batch

SIZES = st.integers(1, 9)
X, W = jax.ShapeDtypeStruct((6, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
ONE = 2 * 6 * 5 * 5
"""FLOPs of X @ W."""


@given(SIZES, SIZES, SIZES, SIZES)
def test_batched_products(b, m, k, n):
    left, right = np.zeros((b, m, k), np.float32), np.zeros((n, b, k), np.float32)
    assert matrix_flops(lambda x, y: jnp.einsum("bmk,nbk->nmb", x, y), left, right) == 2 * b * m * k * n


def test_what_is_nested_counts_as_often_as_it_runs():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w), None), x, length=7)[0]

    def chosen(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def looped(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)

    assert matrix_flops(scanned, X, W) == 7 * ONE
    assert matrix_flops(chosen, X, W) == 2 * ONE
    with pytest.raises(ValueError, match="while loop"):
        matrix_flops(looped, X, W)
    assert matrix_flops(lambda x, w: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, 0), X, W) == 0


def test_a_gradient_needs_no_product_for_what_is_not_asked_for():
    def layers(x, w, v):
        return jnp.sin(jnp.sin(x @ w) @ v).sum()

    both, last = jax.grad(layers, argnums=(1, 2)), jax.grad(layers, argnums=2)
    assert matrix_flops(layers, X, W, W) == 2 * ONE
    assert matrix_flops(jax.grad(layers, argnums=(0, 1, 2)), X, W, W) == 6 * ONE
    assert matrix_flops(both, X, W, W) == 5 * ONE
    assert matrix_flops(last, X, W, W) == 3 * ONE


def test_recomputation_and_rules_of_our_own_count():
    def layers(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    assert matrix_flops(jax.grad(layers), X, W) == 4 * ONE
    # The second product is not needed again, the first is.
    assert matrix_flops(jax.grad(jax.checkpoint(layers)), X, W) >= 5 * ONE

    @jax.custom_vjp
    def ruled(x, w):
        return x @ w

    ruled.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w @ w @ w, None))
    assert matrix_flops(ruled, X, W) == ONE
    assert matrix_flops(jax.grad(lambda x, w: ruled(x, w).sum()), X, W) == 4 * ONE


def step_of(config: PretrainConfig, vocabulary: int):
    """Train step and abstract state."""
    setup = set_up(config, vocabulary)
    optimizer = optimizer_for(config, setup, 10)
    key = run_keys(0)[1]
    step = make_train_step(setup.predictor, optimizer, setup.mask, config.masking, key, clip_norm=1.0)
    return step, abstract_state(setup.shapes, optimizer, make_mesh(jax.devices()[:1]))


def test_a_train_step_beside_the_compilers_count():
    # On a CPU, without loops, the compiler counts every product, and elementwise work too.
    model = replace(PRETRAIN["small"].model, layers=1)
    step, state = step_of(PretrainConfig(model=model), 1000)
    batch = random_batch(0, rows=16, length=50)
    counted = jax.jit(step).lower(state, batch).compile().cost_analysis()
    assert 1.0 < counted["flops"] / matrix_flops(step, state, batch) < 1.08


def test_train_steps_beside_each_other():
    def flops(lora: LoRAConfig | None = None, **changes) -> float:
        model = replace(PRETRAIN["small"].model, **changes)
        freezing = FreezingConfig("lora" if lora else "full")
        step, state = step_of(PretrainConfig(model=model, lora=lora, freezing=freezing), 1000)
        return matrix_flops(step, state, random_batch(0, rows=16, length=50))

    full, adapters = flops(), LoRAConfig(rank=16, targets=ALL_LINEARS)
    merged = flops(replace(adapters, product="merged"))
    activations = flops(replace(adapters, product="activations"))
    # Of the three products of a frozen layer two are left: with all layers frozen, two thirds would be.
    assert 2 / 3 * full < merged < activations < full
    assert flops(scan_layers=True) == full
    assert flops(rematerialise=True) > 1.1 * full

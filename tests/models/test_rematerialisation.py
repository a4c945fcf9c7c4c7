"""Rematerialised blocks: the same gradients from less memory, for one more forward pass."""

import chex
import jax
import pytest

from behrt_jax.models.behrt import BEHRTForMLM, example_inputs
from tests.models.rows import VOCABULARY, random_batch, tiny_model

LAYERS, LENGTH = 6, 96


def compiled(scan_layers, rematerialise, dropout=0.1):
    config = tiny_model(
        layers=LAYERS, hidden_size=32, positions=LENGTH, dropout=dropout,
        scan_layers=scan_layers, rematerialise=rematerialise,
    )  # fmt: skip
    model = BEHRTForMLM(config, VOCABULARY)
    params = jax.jit(model.init)(jax.random.key(0), *example_inputs(config))["params"]
    batch = random_batch(0, rows=8, length=LENGTH)

    def loss(params):
        return (
            model.apply(
                {"params": params}, *batch[:5], deterministic=False, rngs={"dropout": jax.random.key(1)}
            )
            ** 2
        ).mean()

    return params, jax.jit(jax.value_and_grad(loss)).lower(params).compile()


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_equal_gradients_for_another_forward_pass_and_from_less_memory_in_a_loop(scan_layers):
    params, kept = compiled(scan_layers, False)
    _, again = compiled(scan_layers, True)
    chex.assert_trees_all_close(again(params), kept(params), rtol=1e-4, atol=1e-7)
    if scan_layers:
        # XLA's CPU backend recomputes blocks that are not in a loop all at once, and saves nothing by it.
        bytes_kept, bytes_again = (run.memory_analysis().temp_size_in_bytes for run in (kept, again))
        assert bytes_again < 0.5 * bytes_kept
    else:  # not the whole of a forward pass again: XLA finds some of it twice. (A loop is counted once.)
        flops = again.cost_analysis()["flops"] / kept.cost_analysis()["flops"]
        assert 1.05 < flops < 1.4

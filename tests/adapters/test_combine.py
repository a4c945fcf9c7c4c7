"""One update of a kernel made of several."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.adapters import lora
from behrt_jax.adapters.combine import Update, as_adapter, linear, ordinary, truncated, updates_of
from behrt_jax.config.model import LoRAConfig
from behrt_jax.models.stacked_layers import stack_layers, unstack_layers

LAYERS = {("encoder", "layer_0", "query"): (6, 6), ("encoder", "layer_1", "output"): (10, 4)}


def update(rng, inputs, outputs, rank, scale=1.5):
    a, b = rng.normal(size=(inputs, rank)), rng.normal(size=(rank, outputs))
    return Update(a.astype(np.float32), b.astype(np.float32), scale)


def delta(one):
    return one.scale * one.a.astype(np.float64) @ one.b.astype(np.float64)


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    rank=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_svd_is_the_truncated_singular_values_of_the_weighted_sum(ranks, sizes, rank, seed):
    rng = np.random.default_rng(seed)
    weighted = [(rng.normal(), update(rng, *sizes, own, rng.uniform(0.5, 3))) for own in ranks]
    total = sum(weight * delta(one) for weight, one in weighted)
    u, s, v = np.linalg.svd(total)
    found = truncated(weighted, rank)
    best = (u[:, : len(s)] * s)[:, :rank] @ v[: len(s)][:rank]
    np.testing.assert_allclose(delta(found), best, atol=1e-5 * max(1.0, s[0]))
    assert found.a.shape[1] == min(rank, *sizes, sum(ranks))
    # No rank is lost where there are enough: it is the sum itself.
    if rank >= sum(ranks):
        np.testing.assert_allclose(delta(found), total, atol=1e-5 * max(1.0, s[0]))


def test_linear_adds_a_and_b_with_the_roots_of_weight_and_scale():
    rng = np.random.default_rng(0)
    one, other = update(rng, 5, 7, 3, 2.0), update(rng, 5, 7, 3, 0.5)
    found = linear([(0.7, one), (-0.4, other)])
    a = 1.4**0.5 * one.a - 0.2**0.5 * other.a
    b = 1.4**0.5 * one.b + 0.2**0.5 * other.b
    np.testing.assert_allclose(delta(found), a.astype(np.float64) @ b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(delta(linear([(-0.3, one)])), -0.3 * delta(one), rtol=1e-5, atol=1e-6)


def test_an_adapter_of_several_updates_has_their_products_by_its_own_settings():
    rng = np.random.default_rng(1)
    updates = {
        path: update(rng, *sizes, rank, 0.7)
        for (path, sizes), rank in zip(LAYERS.items(), (3, 2), strict=True)
    }
    like = LoRAConfig(alpha=9.0, rank_stabilised=True, dropout=0.1, alpha_pattern=("query=3",), init="pissa")
    adapters, config = as_adapter(updates, like)
    assert (config.rank, config.dropout, config.init) == (3, 0.1, "default")
    kernels = lora.unflatten_dict(
        {(*path, "kernel"): np.zeros(sizes, np.float32) for path, sizes in LAYERS.items()}
    )
    assert {layer.rank for layer in lora.adapted_layers(kernels, config)} == {2, 3}
    merged = lora.leaves_by_path(lora.merge(kernels, adapters, config))
    for path, one in updates.items():
        np.testing.assert_allclose(merged[(*path, "kernel")], delta(one), rtol=1e-4, atol=1e-5)
    again = updates_of(adapters, config)
    for path, one in updates.items():
        np.testing.assert_allclose(delta(again[path]), delta(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers apart", "stacked"])
@pytest.mark.parametrize("rank", [2, 3, 5], ids=["twice fits", "twice is the width", "twice is too much"])
def test_a_pissa_adapter_becomes_an_ordinary_one_for_the_same_base(rank, stacked):
    rng = np.random.default_rng(rank)
    config = LoRAConfig(rank=rank, alpha=3.0, targets=("query",), init="pissa", rank_stabilised=True)
    kernels = {("encoder", f"layer_{n}", "query", "kernel"): rng.normal(size=(6, 8)) for n in range(2)}
    params = lora.unflatten_dict({path: kernel.astype(np.float32) for path, kernel in kernels.items()})
    params = stack_layers(params) if stacked else params
    flat = lora.leaves_by_path(lora.init(jax.random.key(0), params, config))
    moved = lora.unflatten_dict(
        {path: leaf if path[-1].endswith("0") else leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
         for path, leaf in flat.items()}
    )  # fmt: skip
    found, settings = ordinary(moved, config)
    assert settings.init == "default" and settings.rank == min(2 * rank, 6)
    assert {path[-1] for path in lora.leaves_by_path(found)} == {"a", "b"}
    expected = unstack_layers(lora.merge(params, moved, config))
    merged = lora.merge(unstack_layers(params), found, settings)
    for path, kernel in lora.leaves_by_path(expected).items():
        np.testing.assert_allclose(lora.leaves_by_path(merged)[path], kernel, rtol=1e-4, atol=2e-5)
        assert np.abs(kernel - lora.leaves_by_path(unstack_layers(params))[path]).max() > 0.05
    other = LoRAConfig(rank=2)
    assert ordinary(moved, other) == (moved, other)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "svd"])
@pytest.mark.parametrize("weights", [(0.6, 0.4), (1.0, -0.5)])
def test_it_is_what_peft_makes_of_them(method, weights):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    rng = np.random.default_rng(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5))
    of_peft = [
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]),
        peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], use_rslora=True),
    ]
    ours = [update(rng, 7, 5, 3, 2.0), update(rng, 7, 5, 3, 3**0.5)]
    wrapped = peft.get_peft_model(model, of_peft[0], adapter_name="x")
    wrapped.add_adapter("y", of_peft[1])
    layer = wrapped.base_model.model[0]
    for name, one in zip("xy", ours, strict=True):
        layer.lora_A[name].weight.data = torch.tensor(one.a.T.copy())
        layer.lora_B[name].weight.data = torch.tensor(one.b.T.copy())
        np.testing.assert_allclose(
            layer.get_delta_weight(name).detach().numpy().T, delta(one), rtol=1e-5, atol=1e-5
        )
    wrapped.add_weighted_adapter(list("xy"), list(weights), "z", combination_type=method, svd_rank=2)
    theirs = layer.get_delta_weight("z").detach().numpy().T
    both = list(zip(weights, ours, strict=True))
    found = linear(both) if method == "linear" else truncated(both, 2)
    np.testing.assert_allclose(delta(found), theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(theirs).max() > 0.1

"""What a step tells of its leaves, by name."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from behrt_jax.adapters.lora import leaves_by_path
from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import MaskingConfig
from behrt_jax.training.devices import put_rows
from behrt_jax.training.state import optimizer_for, set_up
from behrt_jax.training.step import TrainState
from behrt_jax.training.telemetry import (
    SURELY_SHOWN,
    Telemetry,
    adapter_norms,
    code_table,
    compilations,
    leaves_not_finite,
    make_probe,
    trainable_names,
)
from tests.models.rows import VOCABULARY, random_batch
from tests.training.test_step import TINY, start


def watching(names, at_start=()):
    return Telemetry(lambda step: {}, names, lambda state: {}, at_start)


TABLE = ("params", "behrt", "embeddings", "code", "embedding")


@pytest.fixture(scope="module")
def started():
    """Names of the trainable leaves, a maker of first states, the step and the mesh."""
    no_random_codes = replace(TINY, masking=MaskingConfig(mask_share=0.9, random_share=0.0))
    setup, _, step, mesh = start(no_random_codes)
    return trainable_names(setup.mask), lambda: start(no_random_codes)[1], step, mesh


@pytest.fixture(scope="module")
def trained(started):
    """Three steps: names, probes made at the start, metrics of each step, and the last state."""
    names, fresh, step, mesh = started
    state = fresh()
    counts = np.where(np.arange(VOCABULARY) < 5, 0, 100)
    probes = make_probe(state.variables["lora"], counts, 1), make_probe(state.variables["lora"], counts, 100)
    metrics = []
    for index in range(3):
        batch = random_batch(index)
        few = np.where(batch.codes > 0, 5 + batch.codes % 10, 0).astype(np.int32)
        state, totals = step(state, put_rows(batch._replace(codes=few), mesh))
        metrics.append(jax.device_get(totals))
    return names, probes, metrics, state


def test_group_norms_add_up_to_the_norm(trained):
    names, _, metrics, _ = trained
    assert all(name.startswith("lora/") or "embeddings" in name or "mlm_head" in name for name in names)
    for totals in metrics:
        assert totals["gradient_squares"].shape == (len(names),)
        norms = watching(names).gradients(totals["gradient_squares"])["gradient_norms"]
        assert set(norms) == {"lora", "lora_a", "lora_b", "embedding", "head"}
        whole = sum(norms[group] ** 2 for group in ("lora", "embedding", "head")) ** 0.5
        assert whole == pytest.approx(totals["gradient_norm"], rel=1e-5)
        assert norms["lora_a"] ** 2 + norms["lora_b"] ** 2 == pytest.approx(norms["lora"] ** 2, rel=1e-5)


def test_at_the_first_step_every_a_is_without_gradient_and_then_none(trained):
    names, _, metrics, _ = trained
    first, second, _ = (watching(names).gradients(totals["gradient_squares"]) for totals in metrics)
    assert first["without_gradient"] == [name for name in names if name.endswith("/a")]
    assert first["gradient_norms"]["lora_a"] == 0.0 < first["gradient_norms"]["lora_b"]
    assert second["without_gradient"] == []


def test_movement_of_adapters(trained):
    _, (probe, _), _, state = trained
    moved = probe(state)["adapters"]
    assert set(moved) == {"a", "b"}
    for least in moved.values():
        assert 1e-3 < least["movement"] < 1.0
        assert "encoder/layer_" in least["layer"]


def test_weight_decay_alone_is_no_movement(trained):
    state = trained[3]
    adapters = jax.device_get(state.variables["lora"])
    probe = make_probe(adapters, np.zeros(VOCABULARY), 1)
    shrunk = jax.tree.map(lambda x: 0.9 * x, adapters)
    still = probe(state._replace(variables={**state.variables, "lora": shrunk}))["adapters"]
    assert max(least["movement"] for least in still.values()) < 1e-6
    # One layer that stays is found among others that move.
    part = shrunk["behrt"]["encoder"]["layer_1"]["attention"]
    shifted = jax.tree.map(np.copy, shrunk)
    for leaf in jax.tree.leaves(shifted):
        leaf[0] += 1.0
    shifted["behrt"]["encoder"]["layer_1"]["attention"] = {
        **shifted["behrt"]["encoder"]["layer_1"]["attention"],
        "out": part["out"],
    }
    still = probe(state._replace(variables={**state.variables, "lora": shifted}))["adapters"]
    assert {least["layer"] for least in still.values()} == {"behrt/encoder/layer_1/attention/out"}


def test_adapters_that_keep_what_they_began_with_are_measured_from_there(trained):
    state = trained[3]
    adapters = jax.device_get(state.variables["lora"])
    flat = leaves_by_path(adapters)
    kept = {(*path[:-1], f"{path[-1]}0"): leaf for path, leaf in flat.items()}
    probe = make_probe(jax.tree.map(np.ones_like, adapters), np.zeros(VOCABULARY), 1)
    for shift, least, most in ((0.0, 0.0, 1e-6), (0.1, 1e-2, 100.0)):
        lora = unflatten_dict({path: leaf + np.float32(shift) for path, leaf in flat.items()} | kept)
        moved = probe(state._replace(variables={**state.variables, "lora": lora}))["adapters"]
        assert set(moved) == {"a", "b"}
        assert all(least <= found["movement"] <= most for found in moved.values())


def test_rows_of_codes_that_were_never_shown(trained):
    _, (probe, early), _, state = trained
    # Ten codes came; every one should have 3 * 100 times, or, with the longer epochs, 3 times.
    assert probe(state)["embedding_rows"] == {"expected": 55, "untouched": 45}
    assert SURELY_SHOWN > 3 * 100 / 100
    assert early(state)["embedding_rows"] == {"expected": 0, "untouched": 0}


def test_frozen_embeddings_and_no_adapters_are_not_looked_at():
    plain = replace(TINY, lora=None, freezing=replace(TINY.freezing, regime="full", groups=("head",)))
    setup = set_up(plain, VOCABULARY)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), setup.shapes)
    moments = jax.jit(optimizer_for(plain.optimizer, setup, 10).init)(variables)
    state = TrainState(np.int32(0), variables, moments)
    assert make_probe(state.variables["lora"], np.full(VOCABULARY, 100), 1)(state) == {}


def test_one_compilation_is_counted_once_and_another_shape_again():
    double = jax.jit(lambda x: 2 * x)
    assert compilations(double) == 0
    for length in (2, 2, 3):
        double(np.ones(length))
    assert compilations(double) == 2
    assert compilations(lambda x: x) is None


@pytest.mark.parametrize(
    "spoilt",
    [
        "lora/behrt/encoder/layer_1/attention/out/a",
        "params/behrt/encoder/layer_1/attention/out/kernel",  # frozen
    ],
)
def test_parameters_that_are_not_finite_are_named(started, spoilt):
    names, fresh, _, _ = started
    assert (spoilt in names) == spoilt.startswith("lora/")
    variables = jax.tree.map(np.array, fresh().variables)
    assert leaves_not_finite(jax.device_put(variables)) == []
    *path, last = spoilt.split("/")
    tree = variables
    for name in path:
        tree = tree[name]
    tree[last][0, 0] = np.inf
    at_start = leaves_not_finite(jax.device_put(variables))
    assert at_start == [spoilt]
    all_bad = np.full(len(names), np.nan)
    assert watching(names, at_start).offender(all_bad) == f"the parameters {spoilt}, before the first step"


def test_a_gradient_that_is_not_finite_is_named(trained):
    names, _, metrics, _ = trained
    squares = metrics[0]["gradient_squares"].copy()
    assert watching(names).offender(squares) == watching(names).offender(None) == "the loss alone"
    squares[[3, 5]] = np.inf
    assert watching(names).offender(squares) == f"the gradient of {names[3]} (and 1 of {len(names)} leaves)"


def test_the_norm_of_an_adapter_is_that_of_what_it_adds_to_its_kernel():
    rng = np.random.default_rng(0)
    config = LoRAConfig(rank=2, alpha=6.0)

    def tree(**leaves):
        return {"encoder": {"layer_0": {"query": leaves}, "layer_1": {"query": leaves}}}

    kernel, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3), (4, 2), (2, 3)))
    variables = {"params": tree(kernel=kernel, bias=np.zeros(3)), "lora": tree(a=a, b=b)}
    variables["params"]["encoder"]["layer_1"] = {"query": {"kernel": 0 * kernel, "bias": np.zeros(3)}}
    first, second = adapter_norms(variables, config)
    assert (first["name"], second["name"]) == ("encoder/layer_0/query", "encoder/layer_1/query")
    assert first["norm"] == pytest.approx(np.linalg.norm(3.0 * a @ b), rel=1e-6)
    assert first["share"] == pytest.approx(first["norm"] / np.linalg.norm(kernel), rel=1e-6)
    assert second["share"] is None
    # Layers that are stacked are told one by one.
    stacked = {
        "params": {"behrt": {"encoder": {"layers": {"query": {"kernel": np.stack([kernel, 2 * kernel])}}}}},
        "lora": {"behrt": {"encoder": {"layers": {"query": {"a": np.stack([a, a]), "b": np.stack([b, b])}}}}},
    }
    shares = [one["share"] for one in adapter_norms(stacked, config)]
    assert shares == pytest.approx([first["share"], first["share"] / 2], rel=1e-6)


def test_the_code_table_is_found_in_the_variables(started):
    _, fresh, _, _ = started
    table = code_table(fresh().variables)
    assert table.shape[0] == VOCABULARY and table.ndim == 2

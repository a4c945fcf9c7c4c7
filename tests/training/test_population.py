"""Many adapters trained at once: each as if it were alone."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from behrt_jax.adapters import lora
from behrt_jax.adapters.lora import path_names
from behrt_jax.config.model import LoRAConfig
from behrt_jax.data.batches import TaskBatch
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForTask, example_batch
from behrt_jax.models.losses import task_losses
from behrt_jax.training import population as many
from behrt_jax.training.freezing import REGIMES, trainable
from behrt_jax.training.step import Objective, TrainState, make_update_step
from tests.models.rows import VOCABULARY, random_batch, tiny_model

SEGMENTS, ROWS, STEPS = 3, 4, 4
LORA = LoRAConfig(rank=3, targets=("query", "out", "intermediate"))


class Case(NamedTuple):
    """A model with a frozen base, and what is needed to train adapters on it."""

    model: BEHRTForTask
    variables: Any
    mask: Any
    optimizer: Any


def make_case(stacked=False, config=LORA):
    layers = 2 if stacked else 1
    model = BEHRTForTask(tiny_model(layers=layers, dropout=0.1, scan_layers=stacked), VOCABULARY, 1)
    variables = first_variables(jax.random.key(0), model, config)
    mask = trainable(variables, REGIMES["lora_pretrained"])
    return Case(model, variables, mask, adamw(mask))


def adamw(mask, rate=1.0):
    """For what trains. With its usual epsilon, AdamW would make a step of the rounding of a gradient that is
    next to zero.
    """
    schedule = optax.linear_schedule(rate * 2e-3, rate * 1e-2, 3)
    transforms = {"trained": optax.adamw(schedule, eps=1e-4, weight_decay=0.1), "frozen": optax.set_to_zero()}
    return optax.multi_transform(transforms, jax.tree.map(lambda flag: "trained" if flag else "frozen", mask))


def init(model, key, config):
    params_key, lora_key = jax.random.split(key)
    params = model.init(params_key, example_batch(model.config), segments=SEGMENTS)["params"]
    return {"params": params, "lora": {} if config is None else lora.init(lora_key, params, config)}


def batch_of(step):
    rng = np.random.default_rng(100 + step)
    shape = (ROWS, SEGMENTS)
    targets = rng.integers(0, 2, (*shape, 1)).astype(np.float32)
    rows = random_batch(step, ROWS, segments=SEGMENTS)
    examples = np.arange(ROWS * SEGMENTS, dtype=np.int32).reshape(shape)
    return TaskBatch(rows, examples, targets, np.ones(shape, np.float32))


def objective(model, config, product):
    def loss(variables, batch, rows, key):
        with lora.applying(config or LORA, product, False, rows):
            outputs = model.apply(
                variables,
                batch.rows,
                segments=SEGMENTS,
                deterministic=False,
                rows=rows,
                rngs={"dropout": key},
            )
        losses = task_losses("sigmoid", outputs, batch.targets) * batch.weights
        return losses.sum(), {"targets": batch.weights.sum(), "loss": losses.sum()}

    def merged(variables):
        if product == "activations":
            return {}
        return lora.merged_kernels(variables["params"], variables["lora"], config)

    return Objective(lambda key, batch: batch, loss, merged)


@partial(jax.jit, static_argnames=("model", "config"))
def first_variables(key, model, config):
    return init(model, key, config)


def alone(variables, rate):
    """Mask and optimizer of a single run, its learning rate `rate` times as high."""
    mask = trainable(variables, REGIMES["lora_pretrained"])
    return mask, adamw(mask, rate)


@partial(jax.jit, static_argnames=("model", "config", "product"))
def step_alone(state, batch, key, rate, model, config, product):
    mask, optimizer = alone(state.variables, rate)
    loss = objective(model, config, product)
    return make_update_step(loss, optimizer, mask, key, clip_norm=0.5)(state, batch)


def train_alone(case, init_key, key, rate, config, product, own):
    """One adapter by `make_update_step`."""
    variables = first_variables(init_key, case.model, config)
    variables["params"]["behrt"] = case.variables["params"]["behrt"]
    state = TrainState(jnp.zeros((), jnp.int32), variables, alone(variables, rate)[1].init(variables))
    totals = None
    for number in range(STEPS):
        batch = batch_of(number)._replace(**{name: values[number] for name, values in own.items()})
        state, totals = step_alone(state, batch, jax.random.clone(key), rate, case.model, config, product)
    return state.variables, totals


def train_together(case, init_keys, keys, rates, configs, product, own, at_once=None, **more):
    """All by `make_population_step`; `own` has fields `[members, steps, ...]`."""
    config = many.largest(configs)
    layers = lora.layer_paths(case.variables["lora"])
    members = many.make_members(keys, rates, configs, layers=layers)
    state = many.init_population(
        partial(init, case.model), init_keys, configs, case.variables, case.mask, case.optimizer
    )
    step = jax.jit(
        many.make_population_step(
            objective(case.model, config, product), case.optimizer, case.mask,
            at_once=at_once, clip_norm=0.5, **more,
        ),
        donate_argnums=0,
    )  # fmt: skip
    state, totals = jax.tree.map(jnp.copy, state), None
    for number in range(STEPS):
        state, totals = step(state, members, batch_of(number), {k: v[:, number] for k, v in own.items()})
    assert step._cache_size() == 1
    return state, members, totals


def assert_each_as_alone(case, init_keys, keys, rates, configs, product="activations", own=None, **more):
    own = own or {}
    clone = jax.random.clone
    arguments = (clone(init_keys), clone(keys), rates, configs, product, own)
    state, members, totals = train_together(case, *arguments, **more)
    found = [many.member(state, number, config) for number, config in enumerate(configs)]
    for number, config in enumerate(configs):
        key = clone(keys)[number] if keys.ndim else clone(keys)
        fields = {name: values[number] for name, values in own.items()}
        arguments = (clone(init_keys)[number], key, rates[number], config, product, fields)
        expected, sums = train_alone(case, *arguments)
        chex.assert_trees_all_close(found[number], expected, rtol=1e-5, atol=5e-6)
        for name in ("loss", "targets", "gradient_norm"):
            np.testing.assert_allclose(totals[name][number], sums[name], rtol=1e-4)
    return found, state, members


def keys_of(seed, members):
    return jax.random.split(jax.random.key(seed), members)


def same(key, members):
    return jnp.stack([jax.random.clone(key) for _ in range(members)])


def apart(found):
    """Largest difference between the heads of the first two members."""
    heads = [tree["params"]["task_head"]["dense"]["kernel"] for tree in found[:2]]
    return np.abs(heads[0] - heads[1]).max()


@pytest.mark.slow
@pytest.mark.parametrize(("stacked", "at_once"), [(True, None), (False, 2)], ids=["stacked", "apart"])
def test_seeds(stacked, at_once):
    found, *_ = assert_each_as_alone(
        make_case(stacked), keys_of(1, 3), keys_of(2, 3), [1.0] * 3, [LORA] * 3, "merged", at_once=at_once
    )
    assert apart(found) > 1e-2


@pytest.mark.slow
def test_learning_rates_with_one_key_for_all():
    case = make_case()
    found, *_ = assert_each_as_alone(
        case, same(jax.random.key(1), 2), jax.random.key(2), [1.0, 0.2], [LORA] * 2, at_once=1
    )
    assert apart(found) > 1e-2


@pytest.mark.slow
def test_ranks_and_alphas():
    """Of smaller rank, a member is filled up with zeros, and these stay zero under AdamW with decay."""
    dropped = replace(LORA, dropout=0.3)
    configs = [dropped, replace(dropped, rank=1, alpha=5.0)]
    found, state, _ = assert_each_as_alone(
        make_case(stacked=True), same(jax.random.key(1), 2), same(jax.random.key(2), 2), [1.0] * 2, configs
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.trained["lora"]):
        side = path_names(path)[-1]
        for number, config in enumerate(configs):
            own = leaf[number] if side == "a" else leaf[number].swapaxes(-1, -2)  # [..., width, rank]
            assert np.abs(own[..., : config.rank]).max() > 1e-3
            assert own.shape[-1] == 3 and not own[..., config.rank :].any()
    leaves = jax.tree_util.tree_leaves_with_path(found[1]["lora"])
    assert {leaf.shape[-1] for path, leaf in leaves if path_names(path)[-1] == "a"} == {1}


@pytest.mark.slow
def test_ranks_of_single_layers_are_alike_in_all_members_and_each_layer_has_its_scale():
    patterns = replace(LORA, alpha=4.0, rank_pattern=("out=2",), alpha_pattern=("intermediate=1",))
    configs = [patterns, replace(patterns, rank=1)]
    case = make_case(config=patterns)
    arguments = same(jax.random.key(1), 2), same(jax.random.key(2), 2), [1.0] * 2, configs, "merged"
    found, _, members = assert_each_as_alone(case, *arguments)
    # Of out, query and intermediate: with the same alpha, a third of the rank has three times the scale.
    np.testing.assert_allclose(members.scales, [[1, 1, 1], [1, 3, 3]])
    ranks = [
        {
            path[-2]: leaf.shape[-1]
            for path, leaf in lora.leaves_by_path(tree["lora"]).items()
            if path[-1] == "a"
        }
        for tree in found
    ]
    assert ranks == [{"query": 3, "out": 2, "intermediate": 3}, {"query": 1, "out": 2, "intermediate": 1}]


def test_folds_and_tasks():
    """Members that weigh the examples differently, and that have targets of their own."""
    case = make_case()
    rng = np.random.default_rng(0)
    shape = (2, STEPS, ROWS, SEGMENTS)
    own = {
        "weights": rng.integers(0, 2, shape).astype(np.float32),
        "targets": rng.integers(0, 2, (*shape, 1)).astype(np.float32),
    }
    found, *_ = assert_each_as_alone(
        case, same(jax.random.key(1), 2), jax.random.key(2), [1.0] * 2, [LORA] * 2, "merged", own
    )
    assert apart(found) > 1e-3


def test_parts_of_a_batch():
    assert_each_as_alone(
        make_case(), keys_of(1, 2), keys_of(2, 2), [1.0] * 2, [LORA] * 2, "merged", micro_batches=2
    )


@pytest.mark.slow
def test_predictions_are_those_of_each_member():
    case = make_case()
    configs = [LORA, replace(LORA, rank=1, alpha=5.0)]
    found, state, members = assert_each_as_alone(case, keys_of(1, 2), keys_of(2, 2), [1.0] * 2, configs)

    def forward(config, variables, batch):
        with lora.applying(config):
            return case.model.apply(variables, batch.rows, segments=SEGMENTS)

    batch = batch_of(0)
    ours = jax.jit(partial(many.population_predict, partial(forward, LORA)))(state, members, batch)
    assert ours.shape == (2, ROWS, SEGMENTS, 1)
    for number, config in enumerate(configs):
        theirs = jax.jit(partial(forward, config))(found[number], batch)
        np.testing.assert_allclose(ours[number], theirs, rtol=1e-5, atol=1e-6)


def test_the_frozen_base_is_held_once():
    case = make_case()
    start = partial(many.init_population, partial(init, case.model), keys_of(1, 8), [LORA] * 8)
    state = start(case.variables, case.mask, case.optimizer)

    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    trains = [
        leaf for leaf, flag in zip(*map(jax.tree.leaves, (case.variables, case.mask)), strict=True) if flag
    ]
    assert size(state.frozen) == size(case.variables) - size(trains)
    for ours, theirs in zip(jax.tree.leaves(state.frozen["params"]["behrt"]),
                            jax.tree.leaves(case.variables["params"]["behrt"]), strict=True):  # fmt: skip
        assert ours is theirs
    assert size(state.trained) == 8 * size(trains)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    assert size(moments) == 2 * 8 * size(trains)


def flops(case, config, product, members):
    state = many.init_population(
        partial(init, case.model), keys_of(1, members), [config] * members, case.variables, case.mask,
        case.optimizer,
    )  # fmt: skip
    step = many.make_population_step(
        objective(case.model, config, product), case.optimizer, case.mask, clip_norm=0.5
    )
    arguments = (state, many.make_members(jax.random.key(2), [1.0] * members), batch_of(0), {})
    return jax.jit(step).lower(*arguments).cost_analysis()["flops"]


def test_no_gradient_of_frozen_weights_is_computed():
    """The forward pass and that of the activations' gradients: two products a kernel, not three."""
    case = make_case()
    found = flops(case, LORA, "merged", 2)
    everything = case._replace(mask=jax.tree.map(lambda _: True, case.mask))
    full = flops(everything._replace(optimizer=adamw(everything.mask)), LORA, "activations", 2)
    assert found < 0.8 * full


@pytest.mark.slow
def test_a_linear_probe_encodes_once_for_all_members():
    """Without adapters and with one dropout key: eight members cost little more than one."""
    case = make_case(config=None)
    one, eight = (flops(case, None, "activations", members) for members in (1, 8))
    assert eight < 1.15 * one


def test_adapters_of_other_layers_are_refused():
    with pytest.raises(InputError, match=r"member 1 differ.*lora\.rank and lora\.alpha"):
        many.largest([LORA, replace(LORA, targets=("query",))])
    with pytest.raises(InputError, match=r"lora\.init pissa .* give all members the same rank"):
        many.largest([replace(LORA, init="pissa"), replace(LORA, init="pissa", rank=2)])
    assert many.largest([replace(LORA, rank=1), LORA, replace(LORA, rank=2)]) == LORA

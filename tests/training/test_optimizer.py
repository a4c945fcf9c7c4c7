"""Learning-rate schedules, the optimizer of adapters, and clipping."""

import jax
import numpy as np
import pytest

from behrt_jax.config.training import GroupValues, OptimizerConfig
from behrt_jax.training.freezing import optimizer_labels
from behrt_jax.training.optimizer import (
    clip_factor,
    group_schedules,
    learning_rate_schedule,
    make_optimizer,
)


def rates(schedule, warmup=0.1, steps=100):
    course = learning_rate_schedule(2.0, OptimizerConfig(schedule=schedule, warmup_fraction=warmup), steps)
    return np.array([float(course(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_rises_evenly_to_the_peak_and_no_step_is_lost(schedule):
    course = rates(schedule)
    np.testing.assert_allclose(course[:10], np.linspace(0.2, 2.0, 10), rtol=1e-6)
    assert course.max() == pytest.approx(2.0)


def test_courses_after_warm_up():
    np.testing.assert_allclose(rates("constant")[10:], 2.0)
    np.testing.assert_allclose(rates("linear")[[10, 55, 100]], [2.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(rates("cosine")[[10, 55, 100]], [2.0, 1.0, 0.0], atol=1e-6)
    assert rates("cosine")[32] > rates("linear")[32]


def test_no_warm_up_starts_at_the_peak():
    assert rates("cosine", warmup=0.0)[0] == pytest.approx(2.0)


def test_a_single_step_has_a_rate():
    assert rates("cosine", steps=1)[0] == pytest.approx(2.0)


def test_groups_take_the_common_rate_or_their_own():
    config = OptimizerConfig(
        learning_rate=0.1, learning_rates=GroupValues(lora=0.5), schedule="constant", warmup_fraction=0.0
    )
    found = {group: float(schedule(0)) for group, schedule in group_schedules(config, 10).items()}
    assert found == pytest.approx({"lora": 0.5, "embedding": 0.1, "head": 0.1, "base": 0.1})


def test_lora_plus_makes_the_steps_of_b_larger_and_no_others():
    rng = np.random.default_rng(0)

    def leaves(*names):
        return {name: rng.normal(size=(2, 2)).astype(np.float32) for name in names}

    variables = {
        "params": {
            "encoder": {"query": leaves("kernel")},
            "task_head": {"b": leaves("kernel")},
            "new_codes": leaves("rows"),
        },
        "lora": {"encoder": {"query": leaves("a", "b"), "out": leaves("a", "b")}},
    }
    gradient = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variables)
    mask = jax.tree.map(lambda _: True, variables)
    mask["params"]["encoder"]["query"]["kernel"] = False
    labels = optimizer_labels(variables, mask)

    def updates(ratio):
        """Of two steps, with weight decay."""
        config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, lora_plus=ratio)
        optimizer = make_optimizer(config, 10, labels)
        state, found = optimizer.init(variables), []
        for _ in range(2):
            update, state = optimizer.update(gradient, state, variables)
            found.append(update)
        return found

    for alone, faster in zip(updates(None), updates(16.0), strict=True):
        for layer, sides in alone["lora"]["encoder"].items():
            assert np.abs(sides["b"]).min() > 0
            np.testing.assert_allclose(faster["lora"]["encoder"][layer]["b"], 16 * sides["b"], rtol=1e-6)
            np.testing.assert_array_equal(faster["lora"]["encoder"][layer]["a"], sides["a"])
        jax.tree.map(np.testing.assert_array_equal, faster["params"], alone["params"])
        assert not alone["params"]["encoder"]["query"]["kernel"].any()
        assert np.abs(alone["params"]["new_codes"]["rows"]).min() > 0


@pytest.mark.parametrize(
    ("norm", "limit", "factor"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (9.0, None, 1.0)]
)
def test_clip_factor(norm, limit, factor):
    assert float(clip_factor(np.float32(norm), limit)) == pytest.approx(factor)

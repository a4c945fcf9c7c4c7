"""Training with the vocabulary in parts equals training with all logits."""

import re
from dataclasses import replace

import chex
import jax
import pytest

from behrt_jax.config import FreezingConfig, LoRAConfig, PretrainConfig
from behrt_jax.training.devices import put_rows
from behrt_jax.training.step import make_validation_step
from behrt_jax.training.validation import make_scoring_step
from tests.models.rows import random_batch
from tests.training.test_step import TINY, sgd, start

CHUNK = 17  # of a vocabulary of 60


def in_parts(config: PretrainConfig) -> PretrainConfig:
    return replace(config, model=replace(config.model, head_chunk=CHUNK))


def assert_equal_training(config, **options):
    whole, whole_metrics = sgd(config, 3, **options)
    parts, parts_metrics = sgd(in_parts(config), 3, **options)
    chex.assert_trees_all_close(whole_metrics, parts_metrics, rtol=1e-5)
    chex.assert_trees_all_close(whole.variables, parts.variables, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "regime"),
    [
        (None, "full"),
        (LoRAConfig(rank=2, targets=("out",)), "lora_only"),
        (LoRAConfig(rank=2, targets=("mlm_head/decoder", "query")), "lora_only"),
        (LoRAConfig(rank=2, targets=("mlm_head/decoder",)), "lora"),
    ],
)
def test_equal_training(lora, regime):
    assert_equal_training(replace(TINY, lora=lora, freezing=FreezingConfig(regime)))


@pytest.mark.slow
def test_equal_training_by_micro_batches_on_eight_devices():
    one, one_metrics = sgd(TINY, 2)
    many, many_metrics = sgd(in_parts(TINY), 2, devices=jax.devices()[:4], micro_batches=2)
    chex.assert_trees_all_close(one_metrics, many_metrics, rtol=1e-5)
    chex.assert_trees_all_close(one.variables, many.variables, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [make_validation_step, make_scoring_step])
def test_equal_validation(make):
    results = []
    for config in (TINY, in_parts(TINY)):
        setup, state, _, mesh = start(config)
        step = jax.jit(make(setup.predictor, config.masking, jax.random.key(1)))
        results.append(jax.device_get(step(state.variables, put_rows(random_batch(0), mesh))))
    chex.assert_trees_all_close(*results, rtol=1e-5)


def products(regime):
    """Shapes of the compiled step's matrix products, as the HLO writes them."""
    config = replace(
        in_parts(TINY), lora=LoRAConfig(rank=2, targets=("out",)), freezing=FreezingConfig(regime)
    )
    _, state, step, mesh = start(config)
    program = step.lower(state, put_rows(random_batch(0, rows=5), mesh)).compile().as_text()
    return set(re.findall(r"= f32(\[[0-9,]+\])\S* dot\(", program))


@pytest.mark.slow
def test_the_frozen_head_costs_no_gradient_of_its_kernel():
    # 60 codes in parts of at most 17 are four parts of 15; the hidden size is 16, and there are 20
    # slots for masked codes.
    assert {"[16,15]", "[15,16]"} & products("lora_pretrained")
    assert not {"[16,15]", "[15,16]"} & products("lora_only")

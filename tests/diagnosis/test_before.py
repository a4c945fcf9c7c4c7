"""Each fault that can be told before training, and none for what is healthy."""

import math
from dataclasses import replace

import pytest

from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import InitConfig
from behrt_jax.diagnosis import before
from behrt_jax.diagnosis.finding import Facts, RunRecord
from behrt_jax.presets import PRETRAIN
from tests.diagnosis.runs import BASELINES, FACTS, ids, only, parameters_of, settings_of

LORA = settings_of()


def told(check, settings=LORA, parameters=None, facts=None, baselines=None):
    """Findings of a check of what is known."""
    return list(check(RunRecord(settings, parameters or {}, facts or Facts(), baselines or {})))


def changed(section, **values):
    return {**LORA, section: {**(LORA[section] or {}), **values}}


def test_nothing_is_found_in_a_healthy_run_or_where_nothing_is_known():
    assert ids(told(before.check_before, LORA, parameters_of(), FACTS, BASELINES)) == []
    full = settings_of(PRETRAIN["small"])
    assert told(before.check_before, full, parameters_of("full", lora=None), FACTS, BASELINES) == []
    assert told(before.check_before, {}) == []


@pytest.mark.parametrize(
    ("regime", "groups", "named"),
    [
        ("lora_only", (), ("embedding (109,824)", "head (145,768)")),
        ("lora_pretrained", (), ("embedding (109,824)",)),
        ("lora", ("lora", "embedding", "base"), ("head (145,768)",)),
    ],
)
def test_frozen_at_random(regime, groups, named):
    found = only(told(before.frozen_at_random, LORA, parameters_of(regime, groups)), "frozen-at-random")
    assert found.severity == "error"
    assert all(part in found.seen for part in named)
    assert found.seen.count("(") == len(named)
    assert "ln(vocabulary)" in found.why


def test_groups_of_a_run_are_not_random(tmp_path):
    def found(groups):
        settings = settings_of(replace(PRETRAIN["small_lora"], init=InitConfig(tmp_path, groups)))
        return told(before.frozen_at_random, settings, parameters_of("lora_only"))

    assert found(("embedding", "head", "base")) == []
    left = only(found(("head", "base")), "frozen-at-random").seen
    assert "embedding" in left
    assert "head" not in left


def test_vectors_of_few_codes_or_frozen_beside_random_embeddings(tmp_path):
    def found(share, groups):
        settings = settings_of(replace(PRETRAIN["small"], init=InitConfig(vectors=tmp_path)))
        coverage = {"codes": 900, "vocabulary_share": 900 / 995, "event_share": share}
        parameters = parameters_of("full", groups, lora=None)
        return told(before.check_before, settings, parameters, facts=Facts(vectors=coverage))

    assert "frozen-at-random" not in ids(found(0.9, ("head", "base")))
    frozen = only(found(0.9, ("head", "base")), "frozen-beside-vectors")
    assert frozen.severity == "info"
    assert f"{109_824 - 900 * 64:,} other parameters" in frozen.seen
    little = only(found(0.4, ("head", "base", "embedding")), "vectors-cover-little")
    assert little.severity == "warning"
    assert "40.0%" in little.seen
    assert found(0.6, ("head", "base", "embedding")) == []


def test_a_random_base_is_a_fault_only_without_adapters():
    found = only(told(before.frozen_at_random, LORA, parameters_of("lora")), "base-at-random")
    assert found.severity == "info"
    plain = parameters_of("full", ("embedding", "head"), lora=None)
    settings = settings_of(PRETRAIN["small"])
    assert only(told(before.frozen_at_random, settings, plain), "base-at-random").severity == "warning"


def test_a_base_that_trains_beside_adapters():
    parameters = parameters_of("all_but_adapted", lora=LoRAConfig(8, targets=("out",)))
    found = only(told(before.trainable_share, LORA, parameters), "trainable-share")
    assert found.severity == "warning"
    assert "all_but_adapted" in found.seen
    assert "95" in found.seen
    assert told(before.trainable_share, settings_of(PRETRAIN["small"]), parameters) == []


def test_a_large_vocabulary_is_no_fault_of_the_regime():
    found = only(told(before.trainable_share, LORA, parameters_of(vocabulary=20_000)), "trainable-share")
    assert found.severity == "info"


def test_adapters_that_are_not_there_or_not_reached():
    assert ids(told(before.adapters_reached, LORA, parameters_of("full", lora=None), FACTS)) == [
        "no-adapters"
    ]
    facts = replace(FACTS, unreached_adapters=["lora/x/a", "lora/x/b"])
    found = only(told(before.adapters_reached, LORA, parameters_of(), facts), "adapters-not-reached")
    assert found.severity == "error"
    assert "lora/x/a" in found.seen


def test_data_and_masks_for_study():
    found = only(
        told(before.data_without_structure, changed("data", source="uniform"), facts=FACTS), "uniform-data"
    )
    assert f"{math.log(995):.4f}" in found.why
    assert ids(told(before.static_masks, changed("train", static_masks=True))) == ["static-masks"]


@pytest.mark.parametrize(
    ("interval", "subjects", "severity"),
    [([5.46, 5.54], 500, None), ([5.40, 5.60], 500, "info"), ([5.30, 5.70], 500, "warning"),
     ([5.49, 5.51], 10, "warning"), ([None, None], 1, "warning"),
     ([math.nan, math.nan], 1, "warning")],
)  # fmt: skip
def test_the_size_of_the_validation_set(interval, subjects, severity):
    baselines = {"unigram": {"loss": 5.5, "targets": 40, "interval": interval}}
    findings = told(before.validation_size, facts=Facts(validation_subjects=subjects), baselines=baselines)
    assert [found.severity for found in findings] == ([severity] if severity else [])
    if interval[0] == 5.30:
        assert "+- 0.200 nats" in findings[0].seen
        assert "40 masked codes of 500 subjects" in findings[0].seen


def test_unseen_codes():
    assert told(before.unseen_codes, facts=Facts(unseen_share=0.01)) == []
    assert "5.0%" in only(told(before.unseen_codes, facts=Facts(unseen_share=0.05)), "unseen-codes").seen


@pytest.mark.parametrize("name", ["ages", "before_birth", "visits", "positions"])
def test_beyond_the_tables(name):
    for share, severity in ((0.02, "warning"), (0.001, "info")):
        (found,) = told(before.beyond_tables, facts=Facts(beyond_tables={name: share}))
        assert (found.id, found.severity) == (f"beyond-tables-{name.replace('_', '-')}", severity)
    assert told(before.beyond_tables, facts=Facts(beyond_tables={name: 0.0})) == []


@pytest.mark.parametrize("window", ["recent", "first", "random"])
def test_cut_histories(window):
    settings, facts = changed("data", window=window), Facts(cut_share=0.3, row_length=50)
    found = only(told(before.cut_histories, settings, facts=facts), "cut-histories")
    assert found.severity == "warning"
    assert "30.0%" in found.seen
    assert ids(told(before.cut_histories, facts=facts), "info") == ["cut-histories"]
    assert told(before.cut_histories, settings, facts=Facts(cut_share=0.05)) == []


def test_the_calendar_of_shifted_dates_is_warned_of_where_it_is_read():
    facts = Facts(shifted_dates="The events spread over 190 years.")
    found = only(told(before.calendar_time, changed("model", time="time2vec"), facts=facts), "shifted-dates")
    assert (found.severity, found.seen) == ("warning", facts.shifted_dates)
    assert "--model.time gaps" in found.mend
    assert told(before.calendar_time, changed("model", time="gaps"), facts=facts) == []
    assert told(before.calendar_time, changed("model", time="time2vec")) == []


def test_too_few_steps():
    def found(total, per_epoch, **train):
        facts = Facts(total_steps=total, steps_per_epoch=per_epoch)
        return told(before.steps_for_schedule, changed("train", **train), facts=facts)

    assert ids(found(100, 20)) == ["few-steps"]
    assert ids(found(240, 3)) == ["few-steps-per-epoch"]
    settings, facts = changed("optimizer", warmup_fraction=0.01), Facts(total_steps=500, steps_per_epoch=50)
    few = told(before.steps_for_schedule, settings, facts=facts)
    assert ids(few) == ["few-warmup-steps"]
    assert "5 of 500" in few[0].seen
    # A trial of a few steps is meant.
    assert ids(found(3, 63, max_steps=3)) == []
    assert ids(found(3, 63, max_steps=3), "info") == ["few-steps"]


def test_learning_rates_far_from_the_batch():
    def found(rate, tokens=1000.0, **groups):
        settings = changed("optimizer", learning_rate=rate, learning_rates=groups)
        facts = replace(FACTS, tokens_per_step=tokens)
        return told(before.learning_rate_for_batch, settings, parameters_of(), facts)

    assert found(3e-3) == []
    assert ids(found(3e-2)) == ["learning-rate-high"]
    assert ids(found(2e-2, tokens=100.0)) == ["learning-rate-high"]
    assert found(2e-2, tokens=32_000.0) == []
    assert ids(found(1e-5)) == ["learning-rate-low"]
    only_lora = only(found(3e-3, lora=0.1), "learning-rate-high")
    assert "lora 0.1" in only_lora.seen
    assert "head" not in only_lora.seen


@pytest.mark.parametrize("name", PRETRAIN)
def test_every_shipped_configuration_has_a_usual_learning_rate(name):
    config = PRETRAIN[name]
    tokens = config.train.batch_tokens or config.data.events_mean * config.train.batch_size
    facts = replace(FACTS, tokens_per_step=float(tokens))
    assert told(before.learning_rate_for_batch, settings_of(config), parameters_of(), facts) == []

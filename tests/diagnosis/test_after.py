"""Each fault of what came out, and none for a healthy run."""

import pytest

from behrt_jax.diagnosis.after import check_after
from behrt_jax.diagnosis.finding import RunRecord
from tests.diagnosis.runs import BASELINES, HEALTHY, history, ids, only, settings_of

LORA = settings_of()
BANDS = [
    {"band": band, "codes": codes, "targets": targets, "loss": loss, "unigram_loss": unigram_loss,
     "accuracy": accuracy, "unigram_accuracy": unigram_accuracy}
    for band, codes, targets, loss, unigram_loss, accuracy, unigram_accuracy in (
        ("1-10", 10, 300, 2.0, 3.0, 0.5, 0.1),
        ("11-100", 90, 500, 3.5, 5.0, 0.3, 0.0),
        ("101-995", 895, 300, 6.0, 8.0, 0.1, 0.0),
    )
]  # fmt: skip
ORACLE = {"loss": 4.0, "accuracy": 0.3}
SUMMARY = {
    "steps": 1890,
    "best_step": 504,
    "best": {"step": 504, "loss": 4.07},
    "gain_over_unigram": 1.43,
    "baselines": BASELINES,
    "bands": BANDS,
}


def found(records=HEALTHY, settings=LORA, **changes):
    summary = {**SUMMARY, **changes}
    baselines = summary["baselines"] or {}
    return list(check_after(RunRecord(settings, baselines=baselines, metrics=records, summary=summary)))


def gain(value):
    return {"gain_over_unigram": value, "best": {"step": 504, "loss": 5.5 - value}}


def test_nothing_is_found_in_a_healthy_run():
    assert ids(found()) == []
    assert list(check_after(RunRecord(summary={"steps": 1000}))) == []
    assert ids(found(bands=None, baselines=None, gain_over_unigram=None)) == []


def test_of_a_trial_it_is_only_told_that_pairs_are_not_beaten():
    trial = history([6.9], [6.9])
    assert ids(found(trial, steps=99, **gain(-1.0))) == ["no-gain-over-co-occurrence"]
    assert ids(found(trial, steps=99, **gain(1.2))) == []
    cut = {**LORA, "train": {**LORA["train"], "max_steps": 3}}
    finding = only(found(trial, cut, steps=3, **gain(-1.0)), "no-gain-over-co-occurrence")
    assert finding.severity == "info"  # it was cut short on purpose


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-0.1, ["error"]), (0.0, ["error"]), (0.005, ["warning"])],
)
def test_no_gain_over_frequencies(value, expected):
    findings = found(**gain(value))
    assert only(findings, "no-gain-over-unigram").severity == expected[0]
    assert "no-gain-over-co-occurrence" not in ids(findings)
    uniform = {**LORA, "data": {**LORA["data"], "source": "uniform"}}
    assert ids(found(settings=uniform, **gain(value))) == []


def test_no_gain_over_the_prevalence_of_answers():
    answers = {"gain_over_unigram": None, "bands": None, "baselines": {"prevalence": {"loss": 0.1}}}
    finding = only(found(**answers, gain_over_prevalence=-0.01), "no-gain-over-prevalence")
    assert finding.severity == "error" and "0.0100 nats above" in finding.seen
    assert ids(found(**answers, gain_over_prevalence=0.01)) == []


def test_no_gain_over_counting_pairs():
    finding = only(found(**gain(0.9)), "no-gain-over-co-occurrence")
    assert "4.6000" in finding.seen
    assert "4.5000" in finding.seen
    assert finding.severity == "warning"


@pytest.mark.parametrize(
    ("low", "high", "severity"), [(-0.02, 0.22, "info"), (0.01, 0.19, "warning"), (-0.2, -0.01, None)]
)
def test_a_gain_over_counting_pairs_within_noise_is_no_alarm(low, high, severity):
    gaps = {"co-occurrence": {"nats": (low + high) / 2, "low": low, "high": high}}
    change = gain(1.0 - (low + high) / 2)
    findings = found(gaps=gaps, **change)
    if severity is None:
        assert "no-gain-over-co-occurrence" not in ids(findings, "error", "warning", "info")
    else:
        finding = only(findings, "no-gain-over-co-occurrence")
        assert finding.severity == severity
        assert f"{low:+.4f} to {high:+.4f}" in finding.seen


def test_advice_names_options_that_this_run_takes():
    rare = [BANDS[0], *({**band, "accuracy": 0.01, "loss": band["unigram_loss"]} for band in BANDS[1:])]
    assert "--data.min_count" in only(found(bands=rare), "common-codes-alone").mend
    prepared = {**LORA, "data": {**LORA["data"], "source": "prepared"}}
    mend = only(found(settings=prepared, bands=rare), "common-codes-alone").mend
    assert "--data." not in mend and "prepare's --min_count" in mend


def test_only_common_codes_are_learnt():
    stuck = [BANDS[0], *({**band, "accuracy": 0.01, "loss": band["unigram_loss"]} for band in BANDS[1:])]
    finding = only(found(bands=stuck), "common-codes-alone")
    assert "1-10: 50.0%, 11-100: 1.0%, 101-995: 1.0%" in finding.seen
    assert ids(found(bands=[stuck[0], BANDS[1], stuck[2]])) == []
    few = [BANDS[0], {**stuck[1], "targets": 20}, {**stuck[2], "targets": 0, "accuracy": None, "loss": None}]
    assert ids(found(bands=few)) == []


def test_the_first_validation_is_the_best():
    records = history([4.0, 3.5, 3.0, 2.5, 2.0], [4.5, 4.6, 4.8, 5.0, 5.2])
    assert "0.700 nats above" in only(found(records), "best-at-first").seen
    assert ids(found(records[:6])) == []


def test_the_last_validation_is_the_best():
    falling = history([5.0] * 6, [6.5, 6.0, 5.5, 5.0, 4.5, 4.0])
    assert only(found(falling), "best-at-last").severity == "warning"
    assert only(found(), "best-at-last").severity == "info"


def test_the_gap_to_the_oracle():
    near = {"share_of_attainable_gain": 0.95, "oracle_gap": {"nats": 0.07, "low": 0.05, "high": 0.09}}
    baselines = {**BASELINES, "oracle": ORACLE}
    findings = found(**near, baselines=baselines)
    assert ids(findings) == []
    assert "30.0%" in only(findings, "gap-to-oracle").seen
    far = {**near, "share_of_attainable_gain": 0.5}
    assert only(found(**far, baselines=baselines), "gap-to-oracle").severity == "warning"


@pytest.mark.parametrize("steps", [3, 1890])
def test_better_than_possible_is_leakage(steps):
    gap = {"nats": -0.2, "low": -0.25, "high": -0.15}
    finding = only(found(oracle_gap=gap, share_of_attainable_gain=1.1, steps=steps), "below-oracle")
    assert finding.severity == "error"
    assert "0.2000 nats below" in finding.seen
    assert ids(found(oracle_gap={"nats": -0.01, "low": -0.05, "high": 0.03})) == []


def test_a_best_step_that_the_metrics_do_not_know():
    assert ids(found(best=None, best_step=41)) == ["best-without-record"]

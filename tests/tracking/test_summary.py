"""The summary says plainly whether the model beats the unigram baseline."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.files import read_json, write_json
from behrt_jax.tracking.summary import (
    SMALL_GAIN,
    advice,
    attained,
    band_table,
    figure_table,
    flat,
    format_figure,
    gain_over,
    headline,
    other_counts,
    rule_table,
    split_table,
    summarise,
    summary_text,
    tone,
    verdict,
)

BASELINES = {"unigram": {"loss": 5.5, "accuracy": 0.03}}
METRICS = [
    {"step": 20, "epoch": 0.5, "split": "train", "loss": 6.0},
    {"step": 40, "epoch": 1.0, "split": "tuning", "loss": 5.0, "accuracy": 0.1, "perplexity": 148.41},
    {"step": 60, "epoch": 1.5, "split": "train", "loss": 4.5},
    {"step": 80, "epoch": 2.0, "split": "tuning", "loss": 5.2, "accuracy": 0.12, "perplexity": 181.3},
]
PARAMETERS = {"total": 668776, "trainable": 271976, "trainable_percent": 40.668, "adapters": [{"name": "q"}]}
DATA = {"source": "clinical", "events": {"read": 75012}, "shards": ["one", "two"]}


def summary(**changes):
    arguments = {
        "metrics": METRICS,
        "baselines": BASELINES,
        "best_step": 40,
        "stop_reason": "all 2 epochs done",
        "wall_seconds": 151.3,
        "data": DATA,
        "parameters": PARAMETERS,
    }
    return summarise(**{**arguments, **changes})


def test_summary_holds_best_last_and_gain():
    result = summary()
    assert result["best"] == {"step": 40, "epoch": 1.0, "loss": 5.0, "accuracy": 0.1, "perplexity": 148.41}
    assert result["last"]["step"] == 80
    assert result["last_train"] == {"step": 60, "epoch": 1.5, "loss": 4.5}
    assert (result["epochs"], result["steps"]) == (2.0, 80)
    assert result["gain_over_unigram"] == pytest.approx(0.5)
    assert result["stop_reason"] == "all 2 epochs done"
    assert result["wall_seconds"] == 151.3
    assert result["baselines"] == BASELINES
    assert result["findings"] == []
    assert result["best_step"] == 40
    assert result["parameters"] == {"total": 668776, "trainable": 271976, "trainable_percent": 40.668}


def test_summary_is_the_same_after_a_round_trip_through_its_file(tmp_path):
    write_json(tmp_path / "summary.json", summary())
    assert read_json(tmp_path / "summary.json") == summary()


def test_a_run_that_stopped_before_the_first_validation():
    result = summary(metrics=METRICS[:1], best_step=None)
    assert result["best"] is None
    assert result["last"] is None
    assert result["gain_over_unigram"] is None
    assert result["steps"] == 20
    text = summary_text(result, "small")
    assert "no validation loss to compare" in " ".join(text.split())
    json.dumps(result, allow_nan=False)


def test_a_run_without_any_record():
    result = summary(metrics=[], best_step=None, baselines={}, data={}, parameters={})
    assert (result["epochs"], result["steps"]) == (0.0, 0)
    text = summary_text(result, "small")
    assert "Findings" not in text
    assert "Parameters" not in text
    assert "Counts" not in text


def test_a_best_step_without_its_record_has_no_figures():
    result = summary(best_step=41)
    assert (result["best"], result["best_step"]) == (None, 41)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_no_gain_without_finite_losses(loss):
    assert gain_over("unigram", {"loss": loss}, BASELINES) is None
    assert gain_over("unigram", {"loss": 1.0}, {"unigram": {"loss": loss}}) is None
    assert gain_over("unigram", None, BASELINES) is None
    assert gain_over("unigram", {"loss": 1.0}, {}) is None


@given(st.floats(-1e3, 1e4))
def test_the_verdict_says_below_only_when_it_is(gain):
    text = verdict(gain)
    assert ("NOT below" in text) == (gain <= 0)
    assert ("only just below" in text) == (0 < gain < SMALL_GAIN)
    assert ("predicts masked codes better than" in text) == (gain >= SMALL_GAIN)


def test_the_verdict_gives_the_size_of_the_gain_and_of_the_gap():
    assert "by 0.500 nats" in verdict(0.5)
    assert "1.65 times lower" in verdict(0.5)
    assert "0.250 nats above" in verdict(-0.25)
    assert "it is 0.000 nats above" in verdict(0.0)
    assert "by 0.0040 nats" in verdict(0.004)


def test_the_text_is_short_plain_ascii_with_the_figures():
    finding = {"severity": "error", "id": "frozen-at-random", "seen": "Seen.", "why": "Why.", "mend": "Mend."}
    text = summary_text({**summary(stop_reason="fièvre"), "findings": [finding]}, "small_lora")
    assert text.isascii()
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 40
    for part in (
        "Pretraining run: small_lora",
        "2.0 epochs, 80 steps, 2 min 31 s. Stopped: fi?vre.",
        "best step 40, epoch 1.0",
        "271,976 trained of 668,776 (40.7 %)",
        "  events.read: 75,012",
        "- ERROR frozen-at-random: Seen. Why. Mend.",
    ):
        assert part in text
    assert "below the unigram baseline by 0.500 nats; the doctor found 1 error" in " ".join(text.split())
    parts = ("The model predicts", "Validation (", "Findings:", "Parameters:", "events.read")
    assert sorted(parts, key=text.index) == list(parts)
    assert "shards" not in text  # lists could hold anything


def test_figures_are_named_and_the_unigram_perplexity_is_worked_out():
    columns, rows = figure_table(summary(), ("best", "last"))
    assert columns == ["", "best", "last", "unigram baseline"]
    rows = {row[0]: row[1:] for row in rows}
    assert rows["loss (nats)"] == ["5.000", "5.200", "5.500"]
    assert rows["top-1 accuracy"] == ["10.0%", "12.0%", "3.0%"]
    assert rows["perplexity"] == ["148.4", "181.3", "244.7"]
    assert "top-5 accuracy" not in rows
    assert "perplexity" not in BASELINES["unigram"]


ORACLE = {
    "baselines": {**BASELINES, "oracle": {"loss": 4.8, "accuracy": 0.14}},
    "share_of_attainable_gain": 0.7142,
    "oracle_gap": {"nats": 0.2, "low": 0.18, "high": 0.22},
    "bands": [
        {
            "band": "1-10",
            "codes": 10,
            "targets": 700,
            "loss": 2.5,
            "accuracy": 0.4,
            "accuracy_top10": 0.9,
            "unigram_loss": 3.0,
            "unigram_accuracy": 0.3,
        },
        {
            "band": "11-20",
            "codes": 10,
            "targets": 0,
            **dict.fromkeys(("loss", "accuracy", "accuracy_top10", "unigram_loss", "unigram_accuracy")),
        },
    ],
}


def test_the_known_optimum_is_a_column_and_how_near_it_is_a_sentence():
    known = {**summary(), **ORACLE}
    columns, rows = figure_table(known, ("best", "last"))
    assert columns[-1] == "best possible"
    assert {row[0]: row[-1] for row in rows}["loss (nats)"] == "4.800"
    text = summary_text(known, "x")
    assert "71.4% was attained" in " ".join(text.split())
    assert "0.2000 nats above the best possible" in " ".join(text.split())
    assert attained(summary()) == ""


def test_bands_are_a_table_with_gaps_where_nothing_was_masked():
    columns, rows = band_table(ORACLE)
    assert len(columns) == len(rows[0])
    assert rows[0] == ["1-10", 700, "2.500", "40.0%", "90.0%", "3.000", "30.0%"]
    assert rows[1] == ["11-20", 0, "", "", "", "", ""]
    assert "By frequency of the code" in summary_text({**summary(), **ORACLE}, "x")
    assert "By frequency of the code" not in summary_text(summary(), "x")


def test_format_figure_leaves_out_what_is_not_a_number():
    assert [format_figure("loss", value) for value in (None, math.nan, math.inf, "x")] == [""] * 4


def test_flat_names_every_single_value_and_leaves_lists_out():
    assert list(flat({"a": {"b": 1, "c": {"d": None}}, "e": [1], "f": (2,), "g": "x"})) == [
        ("a.b", 1),
        ("a.c.d", None),
        ("g", "x"),
    ]


def gap(low, high):
    return {"gaps": {"co-occurrence": {"nats": 0.0, "low": low, "high": high}}}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.3, -0.1, "and below that of a table"),
        (0.1, 0.3, "but above that of a table"),
        (-0.1, 0.1, "and not told apart from that of a table"),
        (math.nan, math.nan, "by 0.500 nats; the doctor"),
    ],
)
def test_the_headline_says_how_the_model_stands_beside_a_table_of_codes(low, high, said):
    known = summary(baselines={**BASELINES, "co-occurrence": {"loss": 4.766}})
    assert said in headline({**known, **gap(low, high)})


def test_the_headline_of_a_model_that_learnt_nothing_says_so_and_what_to_do():
    poor = summary(baselines={"unigram": {"loss": 4.9}})
    assert "has learnt nothing of use yet" in headline(poor) and "is NOT below" in headline(poor)
    assert tone(poor) == "bad"
    assert "Train longer" in " ".join(advice(poor))
    assert advice(summary()) == []


def test_the_tone_is_as_grave_as_the_findings():
    assert tone(summary()) == "good"
    assert tone({**summary(), "findings": [{"severity": "info"}]}) == "good"
    assert tone({**summary(), "findings": [{"severity": "info"}, {"severity": "warning"}]}) == "doubt"
    assert tone({**summary(), "findings": [{"severity": "error"}]}) == "bad"


def test_labels_that_taught_nothing_are_told():
    run = {
        "task": "binary",
        "best": {"step": 1, "epoch": 1.0, "loss": 0.7},
        "baselines": {"base rate": {"loss": 0.69}},
    }
    assert "is NOT below that of the base rate, 0.6900" in headline(run)
    assert advice(run) == ["Try another learning rate, more epochs or more labels."]
    assert headline({**run, "best": None}).startswith("There is no validation yet;")


def test_counts_of_splits_are_a_table_and_rules_another():
    part = {"subjects": 3, "events": 9, "tokens": 12, "lengths": {"p50": 2.0}}
    data = {
        "splits": {"train": part, "tuning": {**part, "lengths": {}}},
        "subjects_without_events": {"train": 2, "tuning": 0},
        "events_read": 20,
        "events_kept": 18,
        "events_dropped": {"no birth": 2},
        "events_changed": {"unit": 1},
        "ages": {"min": 0.0, "max": 90.1},
        "fingerprint": "ab",
    }
    columns, rows = split_table(data)
    assert columns == ["split", "subjects", "events", "tokens", "median length"]
    assert rows == [["train", 3, 9, 12, 2.0], ["tuning", 3, 9, 12, None]]
    assert rule_table(data)[1] == [
        ["read", 20],
        ["dropped: no birth", 2],
        ["changed: unit", 1],
        ["kept", 18],
        ["subjects of train left without events", 2],
    ]
    assert other_counts(data) == [("ages.min", 0.0), ("ages.max", 90.1), ("fingerprint", "ab")]

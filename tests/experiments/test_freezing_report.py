"""The figures, verdicts, page and pictures of a freezing study, from made-up runs."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from experiments.studies.freezing_report import (
    EXPLAINED,
    STYLES,
    half_width,
    judge,
    plot_study,
    read_run,
    study_text,
    summarise_cells,
)

CODES = 100
LN = math.log(CODES)


def made_up(source, masks, regime, train, validation, seed=0, interval=(0.0, 0.1), unigram=4.0):
    """A run of which only the losses matter."""
    curves = {"train_loss": train, "validation_loss": validation}
    accuracies = {"train_accuracy": [0.1] * len(train), "validation_accuracy": [0.05] * len(train)}
    best = min(validation)
    return {
        "source": source,
        "masks": masks,
        "regime": regime,
        "seed": seed,
        "ln_codes": LN,
        "unigram": unigram if source != "uniform" else LN + 0.02,
        "oracle": LN if source == "uniform" else 2.0,
        "targets": 1000,
        "interval": list(interval) if interval else None,
        "curves": {**curves, **accuracies},
        "train_loss_first": train[0],
        "train_loss_last": train[-1],
        "validation_loss_best": best,
        "validation_loss_last": validation[-1],
        "validation_accuracy_best": 0.05,
        "share_of_attainable_gain": None if source == "uniform" else (unigram - best) / (unigram - 2.0),
    }


def history(**changed):
    """Runs that behave as the history says, some of them changed."""
    runs = {
        "once_full": made_up("uniform", "once", "full", [LN, LN - 1.5], [LN + 0.1, LN + 1.0]),
        "once_lora": made_up("uniform", "once", "lora", [LN, LN - 1.2], [LN + 0.1, LN + 0.8]),
        "once_frozen": made_up("uniform", "once", "lora_only", [LN, LN - 0.1], [LN + 0.1, LN + 0.1]),
        "fresh_full": made_up("uniform", "fresh", "full", [LN, LN - 0.1], [LN + 0.1, LN + 0.2]),
        "fresh_lora": made_up("uniform", "fresh", "lora", [LN, LN - 0.1], [LN + 0.1, LN + 0.2]),
        "latent_full": made_up("latent", "fresh", "full", [4.0, 2.5], [3.9, 2.6]),
        "latent_lora": made_up("latent", "fresh", "lora", [4.0, 2.7], [3.9, 2.8]),
        "latent_mistake": made_up("latent", "fresh", "all_but_adapted", [4.0, 2.7], [3.9, 2.8]),
        "latent_pretrained": made_up("latent", "fresh", "lora_pretrained", [4.0, 2.7], [3.9, 2.8]),
        "latent_frozen": made_up("latent", "fresh", "lora_only", [LN, LN - 0.1], [LN, LN - 0.1]),
    }
    return list({**runs, **changed}.values())


def failing(runs):
    return {verdict["id"] for verdict in judge(runs) if not verdict["holds"]}


def test_the_history_holds():
    verdicts = judge(history())
    assert all(verdict["holds"] for verdict in verdicts)
    assert {verdict["id"] for verdict in verdicts} == {
        "frozen-latent",
        "learns-latent-full",
        "learns-latent-lora",
        "learns-latent-all_but_adapted",
        "learns-latent-lora_pretrained",
        "once-memorises-full",
        "once-memorises-lora",
        "once-frozen-full",
        "once-frozen-lora",
        "fresh-forgets-full",
        "fresh-forgets-lora",
        "no-leak",
    }


@pytest.mark.parametrize(
    ("name", "run", "claims"),
    [
        ("latent_frozen", made_up("latent", "fresh", "lora_only", [LN, 3.0], [LN, 3.0]), {"frozen-latent"}),
        ("latent_lora", made_up("latent", "fresh", "lora", [4.0, 4.1], [4.2, 4.1]), {"learns-latent-lora"}),
        (
            "once_lora",
            made_up("uniform", "once", "lora", [LN, LN - 0.1], [LN, LN]),
            {"once-memorises-lora", "once-frozen-lora", "fresh-forgets-lora"},
        ),
        (
            "once_frozen",
            made_up("uniform", "once", "lora_only", [LN, LN - 1.0], [LN, LN]),
            {"once-frozen-full", "once-frozen-lora"},
        ),
        (
            "fresh_full",
            made_up("uniform", "fresh", "full", [LN, LN - 1.0], [LN, LN]),
            {"fresh-forgets-full"},
        ),
        (
            "fresh_lora",
            made_up("uniform", "fresh", "lora", [LN, LN - 0.1], [LN, LN - 0.06]),
            {"no-leak"},
        ),
    ],
)
def test_each_claim_fails_on_runs_that_contradict_it(name, run, claims):
    assert failing(history(**{name: run})) == claims


def test_a_loss_below_the_guess_but_within_its_interval_is_chance():
    within = made_up("uniform", "fresh", "lora", [LN, LN - 0.1], [LN, LN - 0.04])
    assert failing(history(fresh_lora=within)) == set()
    assert half_width(within) == pytest.approx(0.05)


def test_nothing_is_claimed_without_runs():
    assert judge([]) == []
    assert judge(history()[:1])[0]["id"] == "once-memorises-full"


def test_mean_and_spread_over_seeds():
    runs = [
        made_up("latent", "fresh", "full", [4.0, 3.0], [3.5, 3.0 + 0.2 * seed], seed=seed)
        for seed in range(3)
    ]
    (cell,) = summarise_cells(runs)
    assert (cell["seeds"], cell["regime"]) == (3, "full")
    assert cell["curves"]["validation_loss"] == {
        "mean": [3.5, pytest.approx(3.2)],
        "least": [3.5, 3.0],
        "most": [3.5, 3.4],
    }
    assert cell["validation_loss_best"] == {"mean": pytest.approx(3.2), "sd": pytest.approx(0.2)}
    assert cell["share_of_attainable_gain"]["mean"] == pytest.approx(0.4)
    assert summarise_cells(runs[:1])[0]["validation_loss_best"]["sd"] is None


@pytest.fixture
def run_folder(tmp_path):
    """A run of two epochs with two training lines in the first."""
    lines = [
        {"step": 1, "epoch": 0.5, "split": "train", "loss": 4.0, "accuracy": 0.0, "targets": 30},
        {"step": 2, "epoch": 1.0, "split": "train", "loss": 3.0, "accuracy": 0.4, "targets": 10},
        {"step": 2, "epoch": 1.0, "split": "tuning", "loss": 3.6, "accuracy": 0.1, "targets": 20},
        {"step": 4, "epoch": 2.0, "split": "train", "loss": 2.0, "accuracy": 0.5, "targets": 40},
        {"step": 4, "epoch": 2.0, "split": "tuning", "loss": 3.2, "accuracy": 0.2, "targets": 20},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    codes = (*SPECIAL_TOKENS, *(f"C{number}" for number in range(CODES)))
    Vocabulary(codes, np.zeros(len(codes), np.int64), (None,) * len(codes)).write(
        tmp_path / "vocabulary.parquet"
    )
    return tmp_path


def write_summary(folder, source, **more):
    summary = {
        "best": {"loss": 3.2, "accuracy": 0.2, "targets": 20},
        "baselines": {"unigram": {"loss": 4.2}},
        "interval": [3.1, 3.3],
        **more,
    }
    (folder / "config.json").write_text(json.dumps({"settings": {"data": {"source": source}}}))
    (folder / "summary.json").write_text(json.dumps(summary))


def test_epochs_of_a_run_are_weighted_by_targets(run_folder):
    write_summary(run_folder, "clinical")
    run = read_run(run_folder)
    assert run["curves"] == {
        "train_loss": [3.75, 2.0],
        "train_accuracy": [0.1, 0.5],
        "validation_loss": [3.6, 3.2],
        "validation_accuracy": [0.1, 0.2],
    }
    assert (run["train_loss_first"], run["train_loss_last"], run["validation_loss_best"]) == (3.75, 2.0, 3.2)
    assert (run["ln_codes"], run["oracle"]) == (pytest.approx(LN), None)
    assert (run["share_of_attainable_gain"], run["interval"]) == (None, [3.1, 3.3])


def test_the_share_of_the_attainable_gain(run_folder):
    baselines = {"unigram": {"loss": 4.2}, "oracle": {"loss": 2.2}}
    write_summary(run_folder, "latent", baselines=baselines, share_of_attainable_gain=0.6)
    assert read_run(run_folder)["share_of_attainable_gain"] == 0.6
    write_summary(run_folder, "uniform", share_of_attainable_gain=0.6)
    uniform = read_run(run_folder)
    assert (uniform["share_of_attainable_gain"], uniform["oracle"]) == (None, pytest.approx(LN))


def study(runs):
    cost = {"trainable": 271_976, "trainable_percent": 40.67, "flops_of_full": 0.6, "time_of_full": None}
    shared = {
        "data": {"subjects": 1000},
        "train": {"epochs": 2, "batch_size": 32, "batch_tokens": None},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "model": {"dropout": 0.1},
        "lora": {"rank": 8},
    }
    return {
        "model": "small",
        "settings": shared,
        "seeds": 1,
        "costs": {"lora": cost},
        "cells": summarise_cells(runs),
        "verdicts": judge(runs),
        "runs": runs,
    }


def test_the_page_has_every_figure():
    text = study_text(study(history()))
    assert "92.3 %" not in text
    mistake = {"costs": {"all_but_adapted": study(history())["costs"]["lora"]}}
    assert "recorded with 92.3 % trainable" in study_text({**study(history()), **mistake})
    assert "| lora: adapters, embeddings and head | 271,976 | 40.7 % | 0.60 |  |" in text
    assert "## latent data, masks fresh in each epoch" in text
    assert "| full | 4.000 | 2.500 | 2.600 | 2.600 | 5.0 % | 70.0 % |" in text
    assert "| 2 | 2.50 / 2.60 |" in text
    assert "- holds: uniform: the validation loss never drops" in text
    frozen = made_up("latent", "fresh", "lora_only", [LN, 3.0], [LN, 3.0])
    assert "- DOES NOT HOLD: latent: with embeddings" in study_text(study(history(latent_frozen=frozen)))
    assert "Too few kinds of runs" in study_text({**study(history()), "verdicts": []})


def test_a_picture_for_each_kind_of_data_and_masks(tmp_path):
    drawn = plot_study(study(history()), tmp_path / "plots")
    assert [path.name for path in drawn] == [
        "loss-uniform-once.png",
        "loss-uniform-fresh.png",
        "loss-latent-fresh.png",
    ]
    assert all(imread(path).std() > 0.05 for path in drawn)
    assert STYLES.keys() == EXPLAINED.keys()

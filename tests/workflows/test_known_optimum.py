"""Pretraining on records whose best possible loss is known: shown, approached, and a leak told by it."""

import json
from dataclasses import replace

import jax
import pytest

from behrt_jax.config.data import DataConfig
from behrt_jax.training import step, validation
from behrt_jax.workflows.pretrain import pretrain
from tests.workflows.small_run import SMALL_RUN, changed

ONE = jax.devices()[:1]
LATENT = changed(
    replace(
        SMALL_RUN,
        name="tiny_latent",
        model=replace(SMALL_RUN.model, layers=2),
        lora=None,
        freezing=replace(SMALL_RUN.freezing, regime="full"),
        data=DataConfig(source="latent", subjects=1500, vocabulary_size=80, window="first"),
    ),
    "train",
    epochs=8,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent") / "run"
    return folder, pretrain(replace(LATENT, output=folder), ONE).summary


@pytest.mark.slow
def test_the_optimum_is_in_metrics_summary_text_and_pictures(run):
    folder, summary = run
    unigram, oracle = summary["baselines"]["unigram"]["loss"], summary["baselines"]["oracle"]["loss"]
    assert oracle < summary["baselines"]["co-occurrence"]["loss"] < unigram
    assert oracle < summary["best"]["loss"] < unigram
    share = (unigram - summary["best"]["loss"]) / (unigram - oracle)
    assert 0.2 < share < 1
    assert summary["share_of_attainable_gain"] == pytest.approx(share, abs=1e-5)
    assert summary["best"]["share_of_attainable_gain"] == pytest.approx(share, abs=1e-5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(("share_of_attainable_gain" in line) == (line["split"] == "tuning") for line in lines)
    gap = summary["oracle_gap"]
    assert gap["nats"] == pytest.approx(summary["best"]["loss"] - oracle, abs=1e-5)
    assert 0 < gap["low"] < gap["nats"] < gap["high"]
    assert sum(band["targets"] for band in summary["bands"]) == summary["best"]["targets"]
    assert "best possible" in (folder / "SUMMARY.txt").read_text()
    assert "best possible" in (folder / "report.html").read_text()
    ids = {finding["id"] for finding in summary["findings"]}
    assert "gap-to-oracle" in ids
    assert "below-oracle" not in ids


@pytest.mark.slow
def test_codes_that_are_taken_for_others_are_named_where_enough_subjects_have_them(run):
    folder, summary = run
    assert summary["confusions"]
    for one in summary["confusions"]:
        assert one["masked"] >= one["subjects"] >= 10 and one["code"] != one["instead_code"]
        assert 0 < one["instead_share"] <= 1 - one["found"] + 1e-9
    misses = [one["masked"] * (1 - one["found"]) for one in summary["confusions"]]
    assert misses == sorted(misses, reverse=True)
    assert "adapter_norms" not in summary  # it has none
    assert "What is taken for what" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_leak_of_what_is_masked_takes_the_loss_below_the_optimum_and_is_an_error(tmp_path, monkeypatch):
    honest = step.masked_code_losses

    def leaking(predictor, variables, batch, masked, *others, **options):
        return honest(predictor, variables, batch, masked._replace(codes=batch.codes), *others, **options)

    for module in (step, validation):
        monkeypatch.setattr(module, "masked_code_losses", leaking)
    summary = pretrain(replace(LATENT, output=tmp_path / "run"), ONE).summary
    assert summary["oracle_gap"]["high"] < 0
    (finding,) = [finding for finding in summary["findings"] if finding["id"] == "below-oracle"]
    assert finding["severity"] == "error"
    assert summary["findings"][0] == finding  # errors come first

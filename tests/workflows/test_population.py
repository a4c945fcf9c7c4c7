"""Members of a population are the runs that they would be alone, and predict together."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from behrt_jax.config.training import PopulationConfig
from behrt_jax.data.predictions import members_path
from behrt_jax.errors import InputError
from behrt_jax.training.loop import DivergenceError
from behrt_jax.workflows.finetune import finetune
from tests.workflows.finetune_case import ONE, changed


def population(case, folder, name="lora", **options):
    config = case.config("binary", name)
    config = replace(config, output=folder, population=PopulationConfig(**options))
    summary = finetune(config, ONE).summary
    assert summary == json.loads((folder / "summary.json").read_text())
    return summary


def probabilities(case, model, output):
    return case.predicted(output, model=model)["predicted_boolean_probability"].to_numpy()


@pytest.mark.slow
def test_the_first_of_the_seeds_is_the_single_run_and_the_mean_predicts(case, tmp_path):
    summary = population(case, tmp_path / "run", size=3)
    alone = json.loads((case.run("binary", "lora") / "summary.json").read_text())
    members = summary["members"]
    assert [row["member"] for row in members] == ["seed 0", "seed 1", "seed 2"]
    assert members[0]["loss"] == pytest.approx(alone["best"]["loss"], abs=2e-4)
    assert len({round(row["loss"], 5) for row in members}) == 3
    assert summary["predicting_members"] == [0, 1, 2]

    mean = probabilities(case, tmp_path / "run", tmp_path / "p.parquet")
    table = pq.read_table(members_path(tmp_path / "p.parquet"))
    by_member = np.stack([table[f"member_{k}"].to_numpy() for k in range(3)])
    assert by_member.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(mean, by_member.mean(axis=0), rtol=1e-12)
    ours = probabilities(case, tmp_path / "run" / "members" / "0", tmp_path / "one.parquet")
    theirs = probabilities(case, case.run("binary", "lora"), tmp_path / "single.parquet")
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


@pytest.mark.slow
def test_a_search_predicts_with_the_best_member(case, tmp_path):
    rate = case.config("binary", "lora").optimizer.learning_rate
    summary = population(case, tmp_path / "run", size=2, vary="learning_rate", values=(1e-7, rate))
    losses = [row["loss"] for row in summary["members"]]
    assert losses[1] < losses[0] - 0.02 and summary["predicting_members"] == [1]
    chosen = probabilities(case, tmp_path / "run", tmp_path / "p.parquet")
    best = probabilities(case, tmp_path / "run" / "members" / "1", tmp_path / "best.parquet")
    np.testing.assert_array_equal(chosen, best)
    assert not members_path(tmp_path / "p.parquet").exists()


@pytest.mark.slow
def test_a_member_that_diverges_loses_the_search_and_ends_an_ensemble(case, tmp_path):
    rate = case.config("binary", "lora").optimizer.learning_rate
    search = PopulationConfig(size=2, vary="learning_rate", values=(1e30, rate))
    finetune(replace(case.config("binary", "lora"), output=tmp_path / "run", population=search), ONE)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    diverged, other = summary["members"]
    assert diverged == {"member": "learning rate 1e+30", "best_step": None, "tuning_losses": [None] * 5}
    assert other["loss"] < other["base_rate_loss"] and summary["predicting_members"] == [1]
    assert [path.name for path in (tmp_path / "run/members").iterdir()] == ["1"]

    config = changed(case.config("binary", "lora"), "optimizer", learning_rate=1e30, clip_norm=None)
    config = replace(config, output=tmp_path / "ensemble", population=PopulationConfig(size=2))
    with pytest.raises(DivergenceError, match="loss of seed 0, seed 1 was never finite: lower optimizer"):
        finetune(config, ONE)


@pytest.mark.slow
def test_folds_are_validated_on_what_they_did_not_see(case, tmp_path):
    summary = population(case, tmp_path / "run", size=2, vary="fold")
    found = summary["out_of_fold"]
    assert found["targets"] == summary["data"]["train"]["examples"]
    assert 0.5 < found["auroc"] < 1.0


@pytest.mark.slow
def test_ranks_differ_and_the_probe_needs_no_adapters(case, tmp_path):
    population(case, tmp_path / "ranks", size=2, vary="rank", values=(1, 2))
    for number, rank in enumerate((1, 2)):
        config = json.loads((tmp_path / "ranks/members" / str(number) / "behrt_jax.json").read_text())
        assert {s[-1] for key, s in config["tensors"].items() if key.endswith("/a")} == {rank}
    assert len(population(case, tmp_path / "probe", "probe", size=2)["members"]) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("full", {"size": 2}, "share a frozen base"),
        ("lora", {"size": 3, "vary": "rank", "values": (1, 2)}, "2 values for 3 members"),
        ("lora", {"size": 2, "values": (1, 2)}, "vary in seed"),
        ("lora", {"size": 2, "vary": "rank", "values": (1, 1.5)}, "whole numbers"),
        ("probe", {"size": 2, "vary": "rank"}, "no adapters"),
        ("lora", {"size": 0}, "population.size is 0"),
    ],
)
def test_wrong_options(case, tmp_path, name, options, message):
    with pytest.raises(InputError, match=message):
        population(case, tmp_path / "run", name, **options)
    assert not (tmp_path / "run").exists()


def test_members_that_could_not_be_written_are_not_trained(case, tmp_path, monkeypatch):
    monkeypatch.setattr("behrt_jax.workflows.checks.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install safetensors"):
        population(case, tmp_path / "run", size=2)
    assert not (tmp_path / "run").exists()

"""Which settings a resumed run must share with its beginning."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import InitConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.run_folder import append_metrics
from behrt_jax.training.loop import Schedule
from behrt_jax.workflows import run
from behrt_jax.workflows.run import check_metrics, check_same_everywhere, check_same_run, settings

CONFIG = PretrainConfig(lora=LoRAConfig(rank=4))


def written(folder, change=lambda settings: None):
    stored = settings(CONFIG)
    change(stored)
    (folder / "config.json").write_text(json.dumps({"settings": stored, "data": {"fingerprint": "f"}}))
    return folder


def test_settings_that_an_earlier_version_did_not_have_count_as_their_defaults(tmp_path):
    def older(stored):
        del stored["model"]["scan_layers"], stored["mesh"], stored["lora"]["product"]

    folder = written(tmp_path, older)
    check_same_run(folder, CONFIG, "f")
    with pytest.raises(InputError, match=r"model.scan_layers is True, but the run .* was made with False"):
        check_same_run(folder, replace(CONFIG, model=replace(CONFIG.model, scan_layers=True)), "f")
    with pytest.raises(InputError, match="is activations, but the run"):
        check_same_run(folder, replace(CONFIG, lora=LoRAConfig(rank=4, product="activations")), "f")


def test_a_run_to_start_from_may_be_named_by_another_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path, lambda stored: stored["init"].update(run="runs/a"))
    check_same_run(folder, replace(CONFIG, init=InitConfig(tmp_path / "runs" / "a")), "f")
    with pytest.raises(InputError, match=r"init\.run is .*runs/b, but the run"):
        check_same_run(folder, replace(CONFIG, init=InitConfig(tmp_path / "runs" / "b")), "f")


def test_metrics_and_checkpoints_that_are_gone_are_missed_and_those_not_due_are_not(tmp_path):
    schedule = Schedule(total_steps=100, steps_per_epoch=50, validate_every=50, log_every=20, patience=None)
    check_metrics(tmp_path, schedule, 0)
    check_metrics(tmp_path, schedule, 19)  # interrupted before the first line
    with pytest.raises(InputError, match=r"metrics\.jsonl is gone, but there is a checkpoint of step 20"):
        check_metrics(tmp_path, schedule, 20)
    lines = [{"step": 20, "split": "train"}, {"step": 50, "split": "tuning"}]
    for line in lines:  # it died between the line of its first validation and the checkpoint
        append_metrics(tmp_path / "metrics.jsonl", line)
    for step in (0, 50):
        check_metrics(tmp_path, schedule, step)
    append_metrics(tmp_path / "metrics.jsonl", {"step": 100, "split": "tuning"})
    with pytest.raises(InputError, match="no checkpoint that is whole, but 2 validations"):
        check_metrics(tmp_path, schedule, 0)


def test_processes_of_one_run_share_settings_data_and_version_but_not_places(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "check_same", lambda own, mend: seen.append(own))
    check_same_everywhere(CONFIG, "f")
    moved = replace(
        CONFIG,
        output=Path("elsewhere"),
        data=replace(CONFIG.data, path=Path("data")),
        distributed=replace(CONFIG.distributed, process=1),
    )
    other = replace(CONFIG, train=replace(CONFIG.train, epochs=CONFIG.train.epochs + 1))
    codes = replace(CONFIG, queries=replace(CONFIG.queries, codes=("A",)))
    for config in (moved, other, codes):
        check_same_everywhere(config, "f")
    check_same_everywhere(CONFIG, "g")
    first, *rest = seen
    changed = [[name for name in first if first[name] != later[name]] for later in rest]
    assert changed == [[], ["train.epochs"], ["queries.codes"], ["the fingerprint of the data"]]
    json.dumps(first)


def test_adapters_are_not_added_on_the_way(tmp_path):
    folder = written(tmp_path, lambda stored: stored.update(lora=None))
    with pytest.raises(InputError, match="--resume: lora"):
        check_same_run(folder, CONFIG, "f")

"""Which settings a resumed run must share with its beginning."""

import json
from dataclasses import replace

import pytest

from behrt_jax.config import InitConfig, LoRAConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.workflows.run import check_same_run, settings

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


def test_adapters_are_not_added_on_the_way(tmp_path):
    folder = written(tmp_path, lambda stored: stored.update(lora=None))
    with pytest.raises(InputError, match="--resume: lora"):
        check_same_run(folder, CONFIG, "f")

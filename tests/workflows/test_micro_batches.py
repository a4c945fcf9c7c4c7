"""Which number of micro-batches a run takes."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from behrt_jax.config import PretrainConfig, TrainConfig
from behrt_jax.data.batches import training_batches
from behrt_jax.records.load import load_sequences
from behrt_jax.training import micro_batches
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.micro_batches import choose_micro_batches
from behrt_jax.workflows.pretrain import pretrain
from tests.models.rows import tiny_model
from tests.workflows.small_run import SMALL_RUN


class Run:
    """A run of which only the batches are real."""

    def __init__(self, folder, **train):
        self.config = replace(SMALL_RUN, model=tiny_model(), train=TrainConfig(**train))
        data = load_sequences(self.config.data, False)
        self.mesh = make_mesh(jax.devices()[:2])
        self.batches = training_batches(
            data.splits["train"], row_length=24, batch_size=32, multiple_of=self.mesh.size
        )
        self.folder, self.tried = folder, []

    def choose(self, steps, **changes):
        def program(parts):
            def step(state, batch):
                assert batch.codes.shape[0] % (parts * self.mesh.size) == 0
                self.tried.append(parts)
                return type("State", (), {"step": jnp.zeros(())}), {}

            return step

        return choose_micro_batches(
            replace(self.config, **changes),
            self.folder,
            self.batches,
            self.mesh,
            steps,
            60,
            program,
            lambda: None,
            lambda line: None,
        )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batches, "default_folder", lambda: tmp_path / "cache" / "compiled")


def test_what_is_asked_for_is_taken(tmp_path):
    run = Run(tmp_path, micro_batches=3)
    assert run.choose(10**6) == 3 and not run.tried


def test_a_short_run_is_not_searched_for_and_a_long_one_once(tmp_path):
    run = Run(tmp_path)
    assert run.choose(micro_batches.SEARCH_FROM - 1) == 1 and not run.tried
    found = run.choose(micro_batches.SEARCH_FROM)
    assert found in set(run.tried) and len(set(run.tried)) > 1
    tried = len(run.tried)
    assert run.choose(micro_batches.SEARCH_FROM) == found and len(run.tried) == tried


def test_a_resumed_run_keeps_the_number_that_it_began_with(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"facts": {"micro_batches": 7}}))
    assert run.choose(10**6, resume=True) == 7 and not run.tried
    assert isinstance(run.config, PretrainConfig)


@pytest.mark.slow
def test_a_run_that_searches_trains_as_one_that_is_told(tmp_path, monkeypatch):
    """The trials leave no trace in what is trained, nor do they use a key twice."""
    monkeypatch.setattr(micro_batches, "SEARCH_FROM", 1)
    train = TrainConfig(max_steps=4, batch_size=32, log_every=1)
    searched = replace(SMALL_RUN, train=train, output=tmp_path / "searched")
    pretrain(searched, jax.devices()[:1])
    found = json.loads((searched.output / "config.json").read_text())["facts"]["micro_batches"]
    assert (tmp_path / "cache" / "micro_batches.json").is_file()
    told = replace(searched, train=replace(train, micro_batches=found), output=tmp_path / "told")
    pretrain(told, jax.devices()[:1])
    losses = [
        [json.loads(line)["loss"] for line in (run.output / "metrics.jsonl").read_text().splitlines()]
        for run in (searched, told)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5

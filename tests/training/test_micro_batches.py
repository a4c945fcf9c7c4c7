"""The number of micro-batches: tried, remembered, and kept by a run that goes on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config.training import PretrainConfig, TrainConfig
from behrt_jax.data.batches import RowShape, training_batches
from behrt_jax.records.load import load_sequences
from behrt_jax.training import micro_batches
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.micro_batches import (
    candidates,
    choose_micro_batches,
    even_rows,
    fastest,
    likely_parts,
    remembered,
)
from behrt_jax.workflows.pretrain import pretrain
from tests.models.rows import tiny_model
from tests.workflows.small_run import SMALL_RUN


@given(st.integers(1, 500), st.integers(8, 1024), st.integers(16, 4096))
def test_likely_parts_fit_the_cache_and_are_no_more_than_rows(rows, row_length, ffn_size):
    parts = likely_parts(rows, row_length, ffn_size, "cpu")
    assert 1 <= parts <= rows
    rows_of_part = -(-rows // parts)
    assert rows_of_part == 1 or rows_of_part * row_length * ffn_size * 4 <= micro_batches.CACHED_BYTES
    assert likely_parts(rows, row_length, ffn_size, "gpu") == 1


@given(st.integers(1, 500), st.integers(1, 500))
def test_candidates_are_few_different_and_waste_less_than_a_part(rows, likely):
    found = candidates(rows, min(likely, rows))
    assert found == sorted(set(found)) and 1 <= len(found) <= micro_batches.MOST_CANDIDATES
    assert found[0] == 1
    for parts in found:
        part = -(-rows // parts)
        assert (parts - 1) * part < rows <= parts * part


@given(st.integers(1, 5000), st.integers(1, 2048))
def test_rows_on_an_accelerator_are_even_and_few_of_them_empty(rows, row_length):
    multiple = even_rows(rows, row_length, "gpu")
    assert multiple & (multiple - 1) == 0  # a power of two
    filled = -(-rows // multiple) * multiple
    assert filled <= rows * (1 + micro_batches.MOST_EMPTY)
    doubled = -(-rows // (2 * multiple)) * 2 * multiple
    even = filled * row_length % micro_batches.EVEN_TOKENS == 0
    assert even or doubled > rows * (1 + micro_batches.MOST_EMPTY)
    assert even_rows(rows, row_length, "cpu") == 1


def test_even_rows_of_the_named_configurations():
    assert [even_rows(rows, 200, "gpu") for rows in (123, 10, 1)] == [64, 2, 1]
    assert [even_rows(128, length, "gpu") for length in (512, 1024)] == [1, 1]


def test_the_fastest_that_fits_is_taken(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(micro_batches.time, "perf_counter", lambda: clock[0])
    seconds = {1: None, 2: 3.0, 4: 1.0, 8: 2.0}
    said = []

    def make_trial(parts):
        def trial():
            if seconds[parts] is None:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            clock[0] += seconds[parts]
            return jnp.zeros(())

        return trial

    assert fastest([1, 2, 4, 8], make_trial, said.append) == 4
    assert len(said) == 1 and "4 (measured 2: 3,000 ms, 4: 1,000 ms" in said[0]
    with pytest.raises(RuntimeError, match="does not fit the memory"):
        fastest([1], make_trial, said.append)

    def broken(parts):
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        fastest([1, 2], broken, said.append)


def test_an_answer_is_remembered_for_its_own_key(tmp_path):
    file = tmp_path / "folder" / "answers.json"
    asked = []

    def find(answer):
        return lambda: asked.append(answer) or answer

    assert remembered(file, {"rows": 3}, find(5)) == 5
    assert remembered(file, {"rows": 3}, find(6)) == 5
    assert remembered(file, {"rows": 4}, find(7)) == 7
    assert remembered(file, {"rows": 3}, find(8)) == 5
    assert asked == [5, 7]
    file.write_text("no JSON")
    assert remembered(file, {"rows": 3}, find(9)) == 9
    assert list(json.loads(file.read_text()).values()) == [9]
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert remembered(blocked / "answers.json", {}, find(3)) == 3  # a folder that cannot be made


# Which number of micro-batches a run takes.


class Run:
    """A run of which only the batches are real."""

    def __init__(self, folder, **train):
        self.config = replace(SMALL_RUN, model=tiny_model(), train=TrainConfig(**train))
        data = load_sequences(self.config.data, False)
        self.mesh = make_mesh(jax.devices()[:2])
        self.batches = training_batches(
            data.splits["train"], RowShape(24, multiple_of=self.mesh.size), batch_size=32
        )
        self.folder, self.tried = folder, []

    def choose(self, steps, **changes):
        """By an assembly whose steps only note that they were tried."""
        state = SimpleNamespace(step=jnp.zeros(()))

        def step(parts):
            def train_step(_, batch):
                assert batch.codes.shape[0] % (parts * self.mesh.size) == 0
                self.tried.append(parts)
                return state, {}

            return train_step

        model = SimpleNamespace(vocabulary_size=60)
        assembly = SimpleNamespace(
            setup=SimpleNamespace(predictor=SimpleNamespace(model=model)),
            mesh=self.mesh,
            first_state=lambda: state,
            step=step,
            jit=lambda function: function,
        )
        return choose_micro_batches(
            replace(self.config, **changes), self.folder, self.batches, steps, assembly, lambda line: None
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

"""What a contender of the training benchmark runs in a turn, and the facts that it tells."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from behrt_jax.errors import InputError
from experiments.benchmarks import harness as benchmark_turns
from experiments.benchmarks import ours as benchmark_ceiling
from experiments.benchmarks import ours as benchmark_ours
from experiments.benchmarks.harness import Contender, contest
from experiments.benchmarks.train import TrainBenchmark, tasks_of
from tests.workflows.small_run import SMALL_RUN, changed

RUN = changed(SMALL_RUN, "model", positions=24)
OPTIONS = {
    "patients": 48, "torch_patients": (48,), "rank": 2, "vocabulary_size": 200, "steps_per_turn": 3,
}  # fmt: skip


def task(name: str, layout: str, regime: str = "lora", **options):
    config = TrainBenchmark(layouts=(layout,), **{**OPTIONS, **options})
    return tasks_of(config, RUN, "small", regime, with_torch=True)[name]


@pytest.mark.slow
def test_flops_are_of_the_model_whatever_is_computed_twice():
    _, plain = benchmark_ours.jax_contender(task("ours full", "full", micro_batches=1))
    options = {"attention": "chunked", "rematerialise": True, "scan_layers": True, "micro_batches": 3}
    turn, other = benchmark_ours.jax_contender(task("ours full", "full", **options))
    assert plain["flops"] == other["flops"] > 0
    assert (plain["micro_batches"], other["micro_batches"]) == (1, 3)
    assert other["rows"] == other["patients_per_step"] == 48
    assert (other["tokens_per_step"], other["fill"], other["steps_per_turn"]) == (48 * 24, 1.0, 3)
    assert [int(turn(index)[0]) for index in range(2)] == [3, 6]


@pytest.mark.slow
def test_a_turn_of_pytorch_has_as_many_steps(monkeypatch):
    pytest.importorskip("torch")
    from experiments.benchmarks import torch_training as benchmark_torch

    made = []

    def make(*arguments, **options):
        made.append(benchmark_torch_step(*arguments, **options))
        return made[-1]

    benchmark_torch_step = benchmark_torch.make_torch_step
    monkeypatch.setattr(benchmark_torch, "make_torch_step", make)
    turn, facts = benchmark_torch.torch_contender(task("torch lora eager float32 48", "padded"))
    (step,) = made

    def steps_done() -> int:
        return int(next(iter(step.optimizer.state.values()))["step"])

    before = steps_done()
    assert jnp.isfinite(turn(0))
    assert steps_done() - before == facts["steps_per_turn"] == 3
    assert facts["patients_per_step"] == 48 and 0 < facts["tokens_per_step"] < 48 * 24


def test_products_of_the_ceiling_stay_as_large_and_are_all_counted(monkeypatch):
    # One product took 7 ms: a turn of 20 ms has three.
    clock = SimpleNamespace(perf_counter=iter([5.0, 5.007]).__next__)
    monkeypatch.setattr(benchmark_ceiling, "time", clock)
    turn, facts = benchmark_ceiling.ceiling({"precision": "float32"})
    values = turn(0)
    assert facts["flops"] == 3 * 2 * values.shape[0] ** 3
    left, right = jax.random.normal(jax.random.key(0), (2, *values.shape))
    right = right / values.shape[0] ** 0.5
    np.testing.assert_allclose(values, left @ right @ right @ right, atol=1e-4)
    assert 0.9 < values.std() < 1.1
    assert facts["device"] == jax.devices()[0].device_kind


@pytest.mark.parametrize("together", [False, True])
def test_contenders_are_built_together_where_asked_and_all_end_with_one_that_fails(monkeypatch, together):
    said = []

    class Told(Contender):
        def __init__(self, name, *arguments):
            said.append(f"start {name}")
            super().__init__(name, *arguments)
            started.append(self)

        def wait(self):
            said.append(f"wait {self.name}")
            super().wait()

    started: list[Contender] = []
    monkeypatch.setattr(benchmark_turns, "Contender", Told)
    tasks = {"good": {"kind": "ceiling", "precision": "float32"}, "wrong": {"kind": "nonsense"}}
    with (
        pytest.raises(InputError, match="The contender wrong failed: KeyError: 'nonsense'"),
        contest(tasks, 1, together),
    ):
        pass
    first, second = ["start good", "wait good"], ["start wrong", "wait wrong"]
    assert said == ([first[0], second[0], first[1], second[1]] if together else first + second)
    assert len(started) == 2 and all(contender._process.poll() is not None for contender in started)

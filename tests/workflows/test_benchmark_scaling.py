"""What a step costs each device, as counted by the benchmark."""

import json
from dataclasses import replace

import jax
import pytest

from behrt_jax.config import MeshConfig
from behrt_jax.errors import InputError
from behrt_jax.training import state as state_module
from experiments.benchmark import main
from experiments.benchmarks.scaling import ScalingBenchmark, as_table, benchmark_scaling, step_cost
from tests.workflows.small_run import SMALL_RUN, changed

CONFIGURATIONS = {"small_lora": SMALL_RUN}
PARAMETERS = state_module.set_up(SMALL_RUN, 200).shapes


@pytest.mark.slow
def test_the_cost_of_a_step_is_of_one_device():
    total = 4 * sum(leaf.size for leaf in jax.tree.leaves(PARAMETERS))
    whole = step_cost(SMALL_RUN, rows=2, vocabulary=200)
    assert whole["parameter_bytes"] == total
    assert 0 < whole["bytes"]["all-reduce"] < total
    assert whole["bytes"]["all-gather"] == 0
    large = changed(SMALL_RUN, "model", hidden_size=128, embedding_size=128)  # 4 h by h is large
    whole = step_cost(large, rows=2, vocabulary=200)
    split = step_cost(replace(large, mesh=MeshConfig(fsdp=8)), rows=2, vocabulary=200)
    kernels = 2 * 2 * 4 * 128 * 128 * 4 + 512 * 128 * 4  # feed-forward kernels, visit table
    assert whole["parameter_bytes"] - split["parameter_bytes"] == kernels * 7 // 8
    assert split["bytes"]["all-gather"] == kernels


@pytest.mark.slow
def test_one_run_in_a_process_of_its_own(tmp_path, capsys):
    config = ScalingBenchmark(
        regimes=("lora",),
        devices=(2,),
        split=("data",),
        rows=2,
        vocabulary=200,
        output=tmp_path / "a" / "b.json",
    )
    report = benchmark_scaling(config, CONFIGURATIONS)
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == json.loads(json.dumps(report))
    (run,) = report["runs"]
    assert (run["size"], run["regime"], run["split"], run["devices"]) == ("small", "lora", "data", 2)
    here = step_cost(SMALL_RUN, rows=2, vocabulary=200)
    # Of eight devices, each with as many rows, a device computes and sends the same.
    assert run["bytes"] == here["bytes"]
    assert run["parameter_bytes"] == here["parameter_bytes"]
    assert run["flops"] == pytest.approx(here["flops"], rel=0.01)
    assert capsys.readouterr().out.splitlines() == as_table(report).splitlines()


def test_numbers_below_one_are_refused():
    with pytest.raises(InputError, match="--devices is 2 0"):
        benchmark_scaling(ScalingBenchmark(devices=(2, 0)), CONFIGURATIONS)
    with pytest.raises(InputError, match="--rows is 0"):
        benchmark_scaling(ScalingBenchmark(rows=0), CONFIGURATIONS)


def test_the_command_names_its_benchmarks(capsys):
    assert main(["scaling", "--devices", "0"]) == 2
    assert "--devices is 0" in capsys.readouterr().err
    assert main(["nothing"]) == 2
    assert "benchmark.py scaling" in capsys.readouterr().err

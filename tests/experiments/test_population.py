"""The benchmark of populations: whole processes, and what is made of their times."""

import json

import pytest

from behrt_jax.errors import InputError
from experiments.benchmarks import population as module
from experiments.benchmarks.population import PopulationBenchmark, benchmark_population


@pytest.mark.slow
def test_processes_from_end_to_end(tmp_path, capsys):
    config = PopulationBenchmark(members=2, steps=2, subjects=200, output=tmp_path / "figures.json")
    report = benchmark_population(config)
    assert len(report["single_seconds"]) == 2
    assert report["ratio"] == pytest.approx(report["population_seconds"] / sum(report["single_seconds"]))
    assert json.loads((tmp_path / "figures.json").read_text()) == report
    assert "2 single runs" in capsys.readouterr().out


def test_ratios(monkeypatch, tmp_path):
    asked = []

    def timed(config, folder, given, name, options):
        asked.append((name, *options))
        return {"population": 24.0, "single-0": 18.0}.get(name, 10.0)

    monkeypatch.setattr(module, "make_task", lambda folder, subjects, base: [])
    monkeypatch.setattr(module, "_finetune", timed)
    report = benchmark_population(PopulationBenchmark(members=4))
    assert report["ratio"] == pytest.approx(24 / 48)
    assert report["ratio_without_compiling"] == pytest.approx(24 / 40)
    assert asked[0] == ("population", "--population.size", "4")
    assert asked[1:] == [(f"single-{k}", "--train.seed", str(k)) for k in range(4)]


@pytest.mark.parametrize("options", [{"members": 1}, {"steps": 0}])
def test_wrong_options(options):
    with pytest.raises(InputError, match="give --members 2 or more"):
        benchmark_population(PopulationBenchmark(**options))

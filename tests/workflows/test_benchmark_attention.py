"""The benchmark of attention."""

import json

import pytest

from experiments.benchmark import main


def test_figures_of_both_forms(tmp_path, capsys):
    file = tmp_path / "out.json"
    size = ["--lengths", "256", "--heads", "4", "--size", "8", "--batch", "8", "--rounds", "1"]
    assert main(["attention", *size, "--subject_events", "5", "--output", str(file)]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert [(run["length"], run["form"]) for run in runs] == [(256, "dense"), (256, "chunked")]
    assert all(run["milliseconds"] > 0 for run in runs)
    dense, chunked = runs
    weights_mib = 8 * 4 * 256**2 * 4 / 2**20
    assert dense["temporary_mib"] > weights_mib
    assert dense["speed_by_dense"] == 1.0
    assert chunked["temporary_mib"] < dense["temporary_mib"]
    assert "temporary MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--lengths", "0"], "--lengths is (0,)"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--subject_events", "0"], "--subject_events is 0"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert main(["attention", *arguments]) == 2
    assert message in capsys.readouterr().err

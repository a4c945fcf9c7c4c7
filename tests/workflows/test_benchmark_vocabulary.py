import json

import pytest

from experiments.benchmark import main

TINY = "--model.embedding-size 8 --model.hidden-size 8 --model.layers 1 --model.heads 2 --model.positions 10"
SIZES = "--vocabularies 40 30000 --tokens 640 --repeats 1 --model.head-chunk 2000"


@pytest.mark.slow
def test_the_command_measures_each_vocabulary_with_all_logits_and_in_parts(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["vocabulary", *TINY.split(), *SIZES.split(), "--output", str(file)]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert [(run["vocabulary"], run["head"], run["chunk"]) for run in runs] == [
        (40, "whole", 40),
        (40, "parts", 20),
        (30000, "whole", 30000),
        (30000, "parts", 2000),
    ]
    for run in runs:
        assert run["step_ms"] > 0 and run["head_ms"] > 0 and run["table_ms"] > 0
        assert run["head_share"] == pytest.approx(run["head_ms"] / run["step_ms"])
    assert [run["chosen"] for run in runs] == [True, False, False, True]
    # 64 rows with two masked codes: 128 x 30,000 logits are 14.6 MiB.
    assert runs[2]["temporary_mib"] > 14.6
    assert runs[3]["temporary_mib"] < 0.6 * runs[2]["temporary_mib"]
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--vocabularies", "5"], "sizes above 5"), (["--tokens", "49"], "at least one row, 50 tokens")],
)
def test_wrong_sizes(capsys, options, message):
    assert main(["vocabulary", *options]) == 2
    assert message in capsys.readouterr().err

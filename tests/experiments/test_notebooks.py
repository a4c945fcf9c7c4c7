"""Notebooks: each .ipynb is its script, executed and whole; and the scripts run to the end."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import of_a_command

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
NAMES = [path.stem for path in sorted(FOLDER.glob("[0-9]*.py"))]


def cells_of_script(name):
    """Kind and source of each cell of a script in the percent format."""
    first, *cells = (FOLDER / f"{name}.py").read_text(encoding="utf-8").split("# %%")
    assert not first
    for cell in cells:
        head, _, source = cell.partition("\n")
        if head == " [markdown]":
            yield "markdown", "\n".join(line[2:] for line in source.strip().splitlines())
        else:
            assert not head
            yield "code", source.strip()


def cells_of_notebook(path):
    """Kind and source of each cell of an .ipynb, and its outputs."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        yield (cell["cell_type"], "".join(cell["source"])), cell.get("outputs", [])


def checked_outputs(path):
    """The outputs of a notebook, of which none may be an error or say anything on stderr."""
    outputs = [output for _, of_cell in cells_of_notebook(path) for output in of_cell]
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
    return outputs


def pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_four():
    assert NAMES == [
        "01_records_to_sequences",
        "02_pretrain",
        "03_lora_and_freezing",
        "04_labels_to_predictions",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script_executed(name):
    path = FOLDER / f"{name}.ipynb"
    assert [cell for cell, _ in cells_of_notebook(path)] == list(cells_of_script(name))
    assert pictures(checked_outputs(path)) >= 2
    assert path.stat().st_size < 500_000
    text = path.read_text(encoding="utf-8")
    assert "/tmp" not in text and "/home" not in text and "/root" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_the_end(name, tmp_path):
    for needed in ("jupytext", "nbclient", "ipykernel", "treescope"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs the extra notebooks: {needed} is not installed")
    command = [sys.executable, FOLDER / "execute.py", FOLDER / f"{name}.py", "--output", tmp_path]
    environment = {**of_a_command(), "PYTHONPATH": str(FOLDER.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    stored, made = (list(cells_of_notebook(folder / f"{name}.ipynb")) for folder in (FOLDER, tmp_path))
    assert [cell for cell, _ in made] == [cell for cell, _ in stored]
    assert [len(outputs) > 0 for _, outputs in made] == [len(outputs) > 0 for _, outputs in stored]
    assert pictures(checked_outputs(tmp_path / f"{name}.ipynb")) == pictures(
        output for _, outputs in stored for output in outputs
    )

"""Execute notebooks: ``python experiments/notebooks/execute.py [SCRIPT ...]`` writes each beside its script.

Scripts are in jupytext's percent format. What a notebook writes goes to a folder that is removed in the end.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
MOST_SECONDS = 600  # for one cell


def execute(script: Path) -> Any:
    """The notebook of a script, with the outputs of its cells and without any trace of time or place."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=MOST_SECONDS, kernel_name="python3", resources=place).execute()
        text = nbformat.writes(notebook).replace(str(Path(folder).resolve()), ".")
    notebook = nbformat.reads(text, as_version=4)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    return notebook


def main() -> None:
    """Execute the scripts that are named, or all."""
    parser = argparse.ArgumentParser(description="Execute the notebooks, from their scripts.")
    parser.add_argument("scripts", nargs="*", type=Path, help="all of this folder where none is given")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the notebooks")
    options = parser.parse_args()
    for script in options.scripts or sorted(HERE.glob("[0-9]*.py")):
        nbformat.write(execute(script), options.output / f"{script.stem}.ipynb")
        print(f"{script.stem}.ipynb")


if __name__ == "__main__":
    main()

"""The pages say what is so: commands are understood, links lead somewhere, files are there."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from behrt_jax.cli import COMMANDS, parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def command_lines() -> list[str]:
    """Every line of every page that starts a command of ours, each once, without those that ask for help."""
    lines = [line for text in TEXTS.values() for block in blocks("bash", text) for line in block.splitlines()]
    start = r"(behrt-jax|python experiments/(?!benchmark|meds_dev|notebooks|skipgram|\w+_study)).*"
    ours = [re.search(start, line) for line in lines]
    return list(dict.fromkeys(found[0] for found in ours if found and "--help" not in found[0]))


@pytest.mark.parametrize("line", command_lines())
def test_a_command_of_the_pages_is_understood(line):
    first, *arguments = shlex.split(line, comments=True)
    if first == "python":
        script = Path(arguments.pop(0))
        assert (ROOT / script).is_file()
        name = script.stem.replace("_", "-")
    else:
        name = arguments.pop(0)
    assert isinstance(parse(COMMANDS[name], arguments, ""), COMMANDS[name].options)


def test_the_pages_start_each_command():
    assert {line.split()[1] for line in command_lines() if line.startswith("behrt-jax")} >= {*COMMANDS}
    assert "python experiments/pretrain.py --config large_lora" in TEXTS["README.md"]


@pytest.mark.parametrize("page", TEXTS)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_the_files_and_tables_that_the_layout_names_are_there():
    text = TEXTS["README.md"].split("## How the code is laid out")[1].split("\n## ")[0]
    package = ROOT / "behrt_jax"
    files = set(re.findall(r"[\w/]+\.py\b", text))
    folders = set(re.findall(r"(?<![\w/])[a-z_]+(?:/[a-z_]+)*/(?![\w*])", text))
    assert len(files) > 25 and len(folders) > 10
    beside = {"during.py": "diagnosis", "after.py": "diagnosis"}
    missing = {name for name in files if not (package / beside.get(name, "") / name).is_file()}
    missing |= {name for name in folders if not any((place / name).is_dir() for place in (package, ROOT))}
    assert missing == set()
    tables = re.findall(r"entry of `(\w+)` in `([\w/]+\.py)`", text)
    assert len(tables) >= 8
    for table, file in tables:
        assert re.search(rf"^{table}\b.* = ", (package / file).read_text(), re.MULTILINE), table


def test_folders_import_only_from_those_that_the_layout_names_before_them():
    paragraph = (
        TEXTS["README.md"].split("Folders, each importing only from those before it: ")[1].split("\n\n")[0]
    )
    order = re.findall(r"`(\w+)(?:\.py|/)`", paragraph)
    package = ROOT / "behrt_jax"
    modules = [path for path in package.iterdir() if path.suffix in ("", ".py") and "__" not in path.stem]
    parts = {path.stem for path in modules}
    assert parts <= {*order}
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                own in order
                and isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("behrt_jax.")
            ):
                imported = (node.module or "").split(".")[1]
                assert order.index(imported) <= order.index(own), f"{path.name} imports {node.module}"


@pytest.mark.slow
def test_the_example_in_python_runs():
    (example,) = (text for text in blocks("python", TEXTS["experiments/README.md"]) if "lora.init" in text)
    names = {}
    exec(example, names)
    assert names["logits"](names["params"], names["tree"], names["batch"]).shape[-1] == 1000
    assert names["merged"].keys() == names["params"].keys()

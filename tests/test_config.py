"""The settings as a package: what it offers, what it imports, and how options get their help."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap

import pytest

from behrt_jax.cli import Command, parse
from behrt_jax.config import commands, data, model, training
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.files import from_stored

CHAPTERS = (model, data, training, commands)
KINDS = [
    value
    for chapter in CHAPTERS
    for value in vars(chapter).values()
    if dataclasses.is_dataclass(value) and value.__module__ == chapter.__name__
]
COMMANDS = [kind for kind in KINDS if any(field.name == "output" for field in dataclasses.fields(kind))]


def docstrings(kind):
    """Docstring of each field that has one."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    pairs = zip(definition.body, definition.body[1:], strict=False)
    return {
        field.target.id: text.value.value
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def letters(text):
    """Without what is between words, such as line ends and the frames around them."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_setting_is_explained(kind):
    """By its docstring; a section of settings has one of its own."""
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    for field in dataclasses.fields(kind):
        section = dataclasses.is_dataclass(field.default_factory) or field.name == "lora"
        assert section or kind is training.GroupValues or field.name in docstrings(kind)


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_help_has_the_docstring_of_every_option(kind, capsys):
    with pytest.raises(SystemExit):
        parse(Command(kind, ""), ["--help"], "command")
    shown = letters(capsys.readouterr().out)
    sections = [field.default_factory for field in dataclasses.fields(kind)]
    for part in (kind, *filter(dataclasses.is_dataclass, sections)):
        for name, text in docstrings(part).items():
            assert letters(text) in shown, name


def test_settings_import_nothing_but_the_standard_library():
    script = (
        "import sys; before = set(sys.modules); "
        "import behrt_jax.config.commands, behrt_jax.config.training; "
        "found = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(found - sys.stdlib_module_names - {'behrt_jax'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_stored_settings_are_read_back_also_those_of_another_version():
    given = LoRAConfig(rank=3, alpha=2.0, targets=("query", "out"))
    stored = {**dataclasses.asdict(given), "targets": ["query", "out"], "of_another_version": 1}
    assert from_stored(LoRAConfig, stored) == given
    assert from_stored(ModelConfig, {"layers": 3}) == ModelConfig(layers=3)

"""The troubleshooting page names every check that there is, and no other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "experiments" / "TROUBLESHOOTING.md"


def ids_in_code() -> set[str]:
    text = "".join(path.read_text() for path in (ROOT / "behrt_jax" / "diagnosis").glob("*.py"))
    found = set(re.findall(r'(?:Finding(?:\.\w+)?|_finding|_\w+)\(\s*"([a-z]+(?:-[a-z]+)+)"', text))
    tables = ("ages", "before-birth", "visits", "positions")
    return found | {f"beyond-tables-{name}" for name in tables} | {"learning-rate-high", "learning-rate-low"}


def test_every_check_is_on_the_page_and_the_page_names_no_other():
    cells = [line.split("|")[2] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", " ".join(cells)))
    known = ids_in_code()
    assert len(known) > 60
    assert named - known == set()
    assert known - named == set()


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`--([a-z_.]+)", PAGE.read_text()))))
def test_every_option_on_the_page_exists(option):
    from behrt_jax.config.commands import DoctorConfig
    from behrt_jax.config.data import PrepareConfig
    from behrt_jax.config.model import LoRAConfig
    from behrt_jax.config.training import FinetuneConfig, PretrainConfig
    from experiments.studies.freezing import FreezingStudyConfig

    commands = PretrainConfig, FinetuneConfig, PrepareConfig, DoctorConfig, FreezingStudyConfig

    def has(kind, path):
        field = getattr(kind, "__dataclass_fields__", {}).get(path[0])
        if field is None:
            return False
        if len(path) == 1:
            return True
        inner = field.default_factory if callable(field.default_factory) else LoRAConfig
        return has(inner, path[1:])

    assert any(has(command, option.split(".")) for command in commands)

"""Starting a run: what a second start finds on disk, and what is written about the first step."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

SCRIPT = textwrap.dedent("""
    import dataclasses, pathlib, sys
    import jax
    from behrt_jax.training.checkpoints import open_checkpoints
    from behrt_jax.workflows.pretrain import pretrain
    from tests.workflows.small_run import SMALL_RUN, changed

    config = changed(changed(SMALL_RUN, "data", subjects=300), "train", epochs=1)
    folder, resume, cache = pathlib.Path(sys.argv[1]), sys.argv[2] == "resume", sys.argv[3]
    if sys.argv[2] == "begin":
        config = changed(config, "train", max_steps=4)
    cache = "off" if cache == "off" else pathlib.Path(cache)
    pretrain(dataclasses.replace(config, output=folder, resume=resume, compilation_cache=cache))
""")


def start(folder: Path, how: str, cache: Path | str) -> str:
    """Run in a process of its own, which has no other cache; what it wrote to the standard error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(folder.parent / "caches")  # with the secret that signs programs
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), how, str(cache)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_start_compiles_nothing_anew_and_computes_the_same(tmp_path):
    cache = tmp_path / "compiled"

    def entries() -> set[str]:
        return {path.name for path in cache.rglob("*-cache")}

    start(tmp_path / "without", "whole", "off")
    assert not cache.exists()
    start(tmp_path / "cold", "whole", cache)
    of_first = entries()
    assert any("train_step" in name for name in of_first)
    errors = start(tmp_path / "warm", "whole", cache)
    assert entries() == of_first
    assert not errors  # such as a program for another processor would give
    start(tmp_path / "resumed", "begin", cache)
    start(tmp_path / "resumed", "resume", cache)

    expected = losses(tmp_path / "without")
    for name in ("cold", "warm"):
        np.testing.assert_array_equal(losses(tmp_path / name), expected, name)
    assert losses(tmp_path / "resumed")[-2:] == expected[-2:]

    def programs(name: str) -> dict[str, set[str]]:
        found = json.loads((tmp_path / name / "summary.json").read_text())["startup_programs"]
        return {program: set(parts) for program, parts in found.items()}

    # The two large ones come from disk whole, nothing of them is traced or lowered again.
    for name in ("init", "train_step"):
        assert programs("cold")[name] == {"trace", "lower", "compile"}
        assert programs("warm")[name] == {"load"}

    summary = json.loads((tmp_path / "warm" / "summary.json").read_text())
    marks = summary["startup_seconds"]
    assert 0 < marks["imported"] <= marks["data read"] <= marks["compiled"] <= marks["first step"]
    assert (
        summary["first_step_seconds"] == marks["first step"] < summary["wall_seconds"] + marks["imported"] + 1
    )

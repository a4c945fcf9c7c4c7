"""The commands of `experiments/` as a person starts them: processes of their own, compiled in full."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

QUICK_COMPILATION = ["--xla_backend_optimization_level=0"]
"""Flags of XLA with which single tests compile quickly."""
if version("jaxlib").startswith("0.10."):
    # The emitters of loops before MLIR's: two to three times as quick. Later versions have MLIR's alone.
    QUICK_COMPILATION += ["--xla_cpu_use_fusion_emitters=false"]


def run_command(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, as :func:`of_a_command` says."""
    return subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=of_a_command(),
    )


def of_a_command() -> dict[str, str]:
    """The environment without the flags that make single tests compile quickly: what trains for more than a
    few seconds runs two to three times as fast without them.
    """
    environment = dict(os.environ)
    flags = [flag for flag in environment.pop("XLA_FLAGS", "").split() if flag not in QUICK_COMPILATION]
    if flags:  # XLA takes blank flags for the name of a file
        environment["XLA_FLAGS"] = " ".join(flags)
    return environment

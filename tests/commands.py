"""The commands of `experiments/` as a person starts them: processes of their own, compiled in full."""

import os
import subprocess
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def run_command(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, without the flags that make single tests compile quickly."""
    environment = dict(os.environ)
    flags = environment.pop("XLA_FLAGS", "").replace("--xla_backend_optimization_level=0", "").strip()
    if flags:  # XLA takes blank flags for the name of a file
        environment["XLA_FLAGS"] = flags
    return subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )

"""One contender of the training benchmark, in a process of its own: our step, or that of PyTorch.

``python -m`` of this module builds the contender that its one argument, JSON, tells, and prints its facts as
a line of JSON. For each line that it then reads it runs one turn and prints the seconds that it took, divided
by ``steps_per_turn`` where that is among the facts. At the end of its input it prints its peak memory.
"""

import json
import pkgutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from behrt_jax.training.memory import keep_freed_memory

WARM_UP = 2
CONTENDERS = {
    "jax": "experiments.benchmarks.ours:jax_contender",
    "torch": "experiments.benchmarks.torch_training:torch_contender",
    "ceiling": "experiments.benchmarks.ours:ceiling",
}
"""Kind -> function of a task that returns what runs a turn, given its number, and the facts."""


def peak_bytes(kind: str) -> int:
    """Largest memory of the device that was in use, or of this process where the device is the host."""
    if kind == "torch":
        import torch  # pyright: ignore[reportMissingImports]

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    else:
        import jax

        stats = jax.devices()[0].memory_stats()
        if stats:
            return stats["peak_bytes_in_use"]
    return _process_bytes("VmHWM")


def _process_bytes(name: str) -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith(name))
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(task: Mapping[str, Any]) -> None:
    """Serve turns, see the module."""
    contender = CONTENDERS[task["kind"]]
    if task["kind"] != "torch":
        keep_freed_memory()  # as a command does, before a library starts threads
    turn, facts = pkgutil.resolve_name(contender)(task)
    for index in range(WARM_UP):
        turn(index)
    print(json.dumps(facts), flush=True)
    steps = facts.get("steps_per_turn", 1)
    clock = time.process_time if task.get("clock") == "processor" else time.perf_counter
    for index, _ in enumerate(sys.stdin):
        started = clock()
        turn(index)
        print(json.dumps((clock() - started) / steps), flush=True)
    print(json.dumps({"peak_bytes": peak_bytes(task["kind"])}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

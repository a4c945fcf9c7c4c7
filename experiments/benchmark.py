"""Benchmarks: ``python experiments/benchmark.py NAME``, such as ``train --sizes large``."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package `experiments`

from behrt_jax.cli import Command, run_command

BENCHMARKS = {
    "ablation": "AblationBenchmark",
    "attention": "AttentionBenchmark",
    "peers": "PeersBenchmark",
    "population": "PopulationBenchmark",
    "prepare": "PrepareBenchmark",
    "roofline": "RooflineBenchmark",
    "scaling": "ScalingBenchmark",
    "startup": "StartupBenchmark",
    "train": "TrainBenchmark",
    "vocabulary": "VocabularyBenchmark",
}
"""Name -> dataclass of its options; it and ``benchmark_NAME`` are in ``experiments.benchmarks.NAME``."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; the others are its options."""
    name = arguments[0] if arguments else ""
    if name not in BENCHMARKS:
        known = " or ".join(f"benchmark.py {known}" for known in BENCHMARKS)
        print(f"error: Name a benchmark: {known} (--help after it shows its options).", file=sys.stderr)
        return 2
    module = importlib.import_module(f"experiments.benchmarks.{name}")
    benchmark = Command(getattr(module, BENCHMARKS[name]), f"{module.__name__}:benchmark_{name}")
    return run_command(benchmark, arguments[1:], prog=f"benchmark.py {name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

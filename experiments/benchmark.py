"""Benchmarks: ``python experiments/benchmark.py NAME``, such as ``prepare --events 20000000``."""

import importlib
import sys
from collections.abc import Sequence

from behrt_jax.cli import exit_status
from behrt_jax.errors import InputError

BENCHMARKS = {
    "attention": ("AttentionBenchmark", "benchmark_attention"),
    "prepare": ("PrepareBenchmark", "benchmark_prepare"),
    "vocabulary": ("VocabularyBenchmark", "benchmark_vocabulary"),
}
"""Name -> dataclass of its options and function that runs it, both in ``workflows.benchmark_NAME``."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; the others are its options."""

    def run() -> int:
        import tyro

        name = arguments[0] if arguments else None
        if name not in BENCHMARKS:
            known = " or ".join(f"benchmark.py {known}" for known in BENCHMARKS)
            raise InputError(f"Name a benchmark: {known} (--help after it shows its options).")
        module = importlib.import_module(f"behrt_jax.workflows.benchmark_{name}")
        options, benchmark = (getattr(module, part) for part in BENCHMARKS[name])
        config = tyro.cli(
            options, prog=f"benchmark.py {name}", args=list(arguments[1:]), use_underscores=True
        )
        benchmark(config)
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

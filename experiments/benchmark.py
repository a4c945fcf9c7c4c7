"""Benchmarks: ``python experiments/benchmark.py prepare --events 20000000``."""

import sys
from collections.abc import Sequence

from behrt_jax.cli import exit_status
from behrt_jax.errors import InputError
from behrt_jax.workflows.benchmark_prepare import PrepareBenchmark, benchmark_prepare
from behrt_jax.workflows.benchmark_vocabulary import VocabularyBenchmark, benchmark_vocabulary

BENCHMARKS = {
    "prepare": (PrepareBenchmark, benchmark_prepare),
    "vocabulary": (VocabularyBenchmark, benchmark_vocabulary),
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; the others are its options."""

    def run() -> int:
        import tyro

        if not arguments or arguments[0] not in BENCHMARKS:
            names = ", ".join(f"benchmark.py {name}" for name in BENCHMARKS)
            raise InputError(f"Name a benchmark: {names} (--help shows its options).")
        name, *options = arguments
        settings, benchmark = BENCHMARKS[name]
        benchmark(tyro.cli(settings, prog=f"benchmark.py {name}", args=options, use_underscores=True))
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

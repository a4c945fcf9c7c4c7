"""Benchmarks: ``python experiments/benchmark.py prepare --events 20000000``."""

import sys
from collections.abc import Sequence

from behrt_jax.cli import exit_status
from behrt_jax.errors import InputError
from behrt_jax.workflows.benchmark_prepare import PrepareBenchmark, benchmark_prepare


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; the others are its options."""

    def run() -> int:
        import tyro

        if not arguments or arguments[0] != "prepare":
            raise InputError("Name a benchmark: benchmark.py prepare (--help shows its options).")
        config = tyro.cli(
            PrepareBenchmark, prog="benchmark.py prepare", args=list(arguments[1:]), use_underscores=True
        )
        benchmark_prepare(config)
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Benchmarks: ``python experiments/benchmark.py prepare --events 20000000``."""

import sys
from collections.abc import Sequence
from functools import partial

from behrt_jax.cli import exit_status
from behrt_jax.errors import InputError
from behrt_jax.workflows.benchmark_prepare import PrepareBenchmark, benchmark_prepare
from behrt_jax.workflows.benchmark_scaling import ScalingBenchmark, benchmark_scaling

if __package__:
    from experiments.configs import PRETRAIN
else:  # started as a script, whose folder is where Python looks first
    from configs import PRETRAIN

BENCHMARKS = {
    "prepare": (PrepareBenchmark, benchmark_prepare),
    "scaling": (ScalingBenchmark, partial(benchmark_scaling, configurations=PRETRAIN)),
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; the others are its options."""

    def run() -> int:
        import tyro

        if not arguments or arguments[0] not in BENCHMARKS:
            names = " or ".join(f"benchmark.py {name}" for name in BENCHMARKS)
            raise InputError(f"Name a benchmark: {names} (--help shows its options).")
        name = arguments[0]
        config, benchmark = BENCHMARKS[name]
        benchmark(
            tyro.cli(config, prog=f"benchmark.py {name}", args=list(arguments[1:]), use_underscores=True)
        )
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

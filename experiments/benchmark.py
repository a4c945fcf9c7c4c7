"""Benchmarks: ``python experiments/benchmark.py NAME``, such as ``train --sizes large``."""

import importlib
import inspect
import sys
from collections.abc import Sequence

from behrt_jax.cli import exit_status
from behrt_jax.errors import InputError
from behrt_jax.presets import PRETRAIN

BENCHMARKS = {
    "ablation": ("AblationBenchmark", "benchmark_ablation"),
    "attention": ("AttentionBenchmark", "benchmark_attention"),
    "population": ("PopulationBenchmark", "benchmark_population"),
    "prepare": ("PrepareBenchmark", "benchmark_prepare"),
    "scaling": ("ScalingBenchmark", "benchmark_scaling"),
    "startup": ("StartupBenchmark", "benchmark_startup"),
    "train": ("TrainBenchmark", "benchmark_train"),
    "vocabulary": ("VocabularyBenchmark", "benchmark_vocabulary"),
}
"""Name -> dataclass of its options and function that runs it, both in ``experiments.benchmarks.NAME``."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; the others are its options."""

    def run() -> int:
        import tyro

        name = arguments[0] if arguments else None
        if name not in BENCHMARKS:
            known = " or ".join(f"benchmark.py {known}" for known in BENCHMARKS)
            raise InputError(f"Name a benchmark: {known} (--help after it shows its options).")
        module = importlib.import_module(f"experiments.benchmarks.{name}")
        options, benchmark = (getattr(module, part) for part in BENCHMARKS[name])
        config = tyro.cli(
            options, prog=f"benchmark.py {name}", args=list(arguments[1:]), use_underscores=True
        )
        named = "configurations" in inspect.signature(benchmark).parameters
        benchmark(config, **({"configurations": PRETRAIN} if named else {}))
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

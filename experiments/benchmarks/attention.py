"""How fast the forms of attention are, forward and backward, and how much memory they take.

Times are taken in turns in one process, so that all forms meet the same machine. The resident size is that
of a fresh process for each form and length: ``python -m`` of this module prints it, in MiB.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import behrt_jax
from behrt_jax.errors import InputError
from behrt_jax.models.attention import FORMS

MIB = 2**20


@dataclass(frozen=True)
class AttentionBenchmark:
    """Time dense against chunked attention, forward and backward, and what they take in memory."""

    lengths: tuple[int, ...] = (50, 200, 512, 2048)
    """Tokens of a row; 8192 needs some 9 GiB for the dense form."""
    heads: int = 8
    """Attention heads."""
    size: int = 32
    """Width of a head."""
    batch: int = 1
    """Rows."""
    subject_events: int | None = None
    """Mean tokens of the subjects packed in a row (geometric lengths); one subject a row where not given."""
    dropout: float = 0.1
    """Dropout rate of the weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of queries, keys and values."""
    rounds: int = 15
    """Measurements of each form; the median counts."""
    output: Path | None = None
    """File for the figures as JSON."""


def benchmark_attention(config: AttentionBenchmark) -> dict[str, Any]:
    """Measure every length, print the figures side by side, and return them.

    Returns:
        ``settings``, ``machine`` and ``runs``: for each length and form ``length``, ``form``,
        ``milliseconds``, ``speed_by_dense``, ``temporary_mib`` as the compiler plans it, and
        ``growth_mib``, by how much the largest resident size grew while a fresh process ran it: 0 where that
        fits in what compiling it had taken.

    Raises:
        InputError: settings that make no rows.
    """
    for name in ("heads", "size", "batch", "rounds"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} is {getattr(config, name)}: give 1 or more.")
    if not config.lengths or min(config.lengths) < 1:
        raise InputError(f"--lengths is {config.lengths}: give one or more lengths above 0.")
    if config.subject_events is not None and config.subject_events < 1:
        raise InputError(f"--subject_events is {config.subject_events}: give 1 or more.")
    if not 0 <= config.dropout < 1:
        raise InputError(f"--dropout is {config.dropout}: give a rate from 0 up to, but not, 1.")
    runs = [run for length in config.lengths for run in _measure(config, length)]
    report = {"settings": _settings(config), "machine": _machine(), "runs": runs}
    print(as_table(report))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def as_table(report: Mapping[str, Any]) -> str:
    """The figures of :func:`benchmark_attention` as aligned text."""
    lines = [f"{'length':>6} {'form':<8} {'ms':>10} {'/ dense':>8} {'temporary MiB':>14} {'growth MiB':>11}"]
    lines += [
        f"{run['length']:>6} {run['form']:<8} {run['milliseconds']:>10.2f} {run['speed_by_dense']:>7.2f}x "
        f"{run['temporary_mib']:>14.1f} {run['growth_mib']:>11.1f}"
        for run in report["runs"]
    ]
    return "\n".join(lines)


def _measure(config: AttentionBenchmark, length: int) -> list[dict[str, Any]]:
    operands = _operands(config, length)
    programs = {form: _compiled(config, form, operands) for form in ("dense", "chunked")}
    times: dict[str, list[float]] = {form: [] for form in programs}
    for turn in range(config.rounds + 1):
        for form, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            if turn:  # the first warms up
                times[form].append(time.perf_counter() - start)
    medians = {form: statistics.median(values) for form, values in times.items()}
    return [
        {
            "length": length,
            "form": form,
            "milliseconds": 1e3 * medians[form],
            "speed_by_dense": medians["dense"] / medians[form],
            "temporary_mib": program.memory_analysis().temp_size_in_bytes / MIB,
            "growth_mib": _growth_in_fresh_process(config, form, length),
        }
        for form, program in programs.items()
    ]


def _operands(config: AttentionBenchmark, length: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values and the gradient of the output, and packed segments."""
    generator = np.random.default_rng(0)
    shape = (config.batch, config.heads, length, config.size)
    four = [jnp.asarray(generator.normal(size=shape, scale=0.5), config.dtype) for _ in range(4)]
    segments = np.ones((config.batch, length), np.int32)
    if config.subject_events is not None:
        # A new subject at each token with equal probability: geometric lengths.
        segments += np.cumsum(generator.random(segments.shape) < 1 / config.subject_events, axis=1)
    return (*four, jnp.asarray(segments, jnp.int32))


def _compiled(config: AttentionBenchmark, form: str, operands: tuple[jax.Array, ...]) -> Any:
    def forward_and_backward(queries, keys, values, gradient, segment_ids):
        key = jax.random.key(0)

        def attend(*operands):
            return FORMS[form](*operands, segment_ids, rate=config.dropout, key=key)

        out, pull = jax.vjp(attend, queries, keys, values)
        return out, pull(gradient)

    return jax.jit(forward_and_backward).lower(*operands).compile()


def _growth_in_fresh_process(config: AttentionBenchmark, form: str, length: int) -> float:
    root = Path(behrt_jax.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps({"form": form, "length": length, **_settings(config)})],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise InputError(f"{form} attention failed at length {length}: {reason}")
    return float(done.stdout.splitlines()[-1])


def _growth_mib(form: str, length: int, **settings: Any) -> float:
    """By how much running a form raises the largest resident size of this process so far."""
    config = AttentionBenchmark(**settings)
    operands = _operands(config, length)
    program = _compiled(config, form, operands)
    before = _peak_mib()
    jax.block_until_ready(program(*operands))
    return _peak_mib() - before


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def _settings(config: AttentionBenchmark) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "output"}


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    print(_growth_mib(**json.loads(sys.argv[1])))

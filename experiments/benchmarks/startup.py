"""How long a command takes from the start of its process to what it is waited for, beside a bare script.

`train` ends with the first finished step of pretraining, `predict` and `embed` with the output of one
patient. Each is the command itself in a fresh process, in turns with a script that has jax, flax, optax and
the same model and nothing else of this package (`experiments.benchmarks.bare`): cold with no compiled
programs on disk, warm with those of the run before. Wall time beside processor time: on a machine that does
something else too, the second says more.
"""

import json
import math
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.config.data import PrepareConfig
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.presets import PRETRAIN
from behrt_jax.tracking.console import table_text
from experiments.benchmarks.harness import run_script
from experiments.benchmarks.population import make_task

What = Literal["train", "predict", "embed"]
PARTS = ("imported", "data read", "baselines counted", "compiled", "first step")
"""Marks of a pretraining run. The step is compiled while the baselines are counted: either may come first."""


@dataclass(frozen=True)
class StartupBenchmark:
    """Time the start of commands beside bare scripts, with and without compiled programs on disk."""

    config: str = "small_lora"
    """Named configuration."""
    what: tuple[What, ...] = ("train", "predict", "embed")
    """train: to the first step of pretraining. predict, embed: a fine-tuned model, from its run, on one
    patient."""
    options: tuple[str, ...] = ()
    """Further options of pretrain, each as one word: --data.subjects=500."""
    rounds: int = 3
    """Runs of each kind, cold and warm."""
    output: Path | None = None
    """File for the figures as JSON."""


def benchmark_startup(config: StartupBenchmark) -> dict[str, Any]:
    """Run all rounds, print tables of medians, and return the figures.

    Returns:
        ``settings``, ``machine`` and ``runs``: a dict for each run, with ``what``, ``by`` (ours or bare),
        ``cache`` (cold or warm), ``round``, ``wall`` and ``processor`` seconds; those of ``train`` by ours
        have the seconds of each of :data:`PARTS` (``marks``) and of each program (``programs``) too.

    Raises:
        InputError: no rounds, an unknown configuration, or a run that failed.
    """
    if config.rounds < 1:
        raise InputError(f"--rounds is {config.rounds}: give 1 or more.")
    if config.config not in PRETRAIN:
        raise InputError(f"--config: {config.config!r} is unknown, choose from {', '.join(PRETRAIN)}.")
    machine = {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    runs = []
    with tempfile.TemporaryDirectory(prefix="benchmark-startup-") as scratch:
        folder = Path(scratch)
        for what in config.what:
            if what == "train":
                contenders = _contenders_of_training(config, folder)
            else:
                contenders = _contenders_of_prediction(config, folder, what == "embed")
            for number in range(config.rounds):
                for cache in ("cold", "warm"):
                    for by, contender in contenders.items():
                        found = {"what": what, "by": by, "cache": cache, "round": number}
                        runs.append({**found, **contender(folder / f"compiled-{what}-{by}-{number}")})
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    report = {"settings": settings, "machine": machine, "runs": runs}
    print(as_table(report))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def ratios(report: Mapping[str, Any], what: str, cache: str, unit: str) -> list[float]:
    """Ours as a multiple of the bare script, round by round; `unit` is wall or processor."""
    found = {
        (run["by"], run["round"]): run[unit]
        for run in report["runs"]
        if (run["what"], run["cache"]) == (what, cache)
    }
    return [found["ours", number] / found["bare", number] for number in range(len(found) // 2)]


def as_table(report: Mapping[str, Any]) -> str:
    """Medians over the rounds as aligned text: beside the bare script, by mark, and by program."""

    def chosen(what: str, cache: str, by: str) -> list[Mapping[str, Any]]:
        return [run for run in report["runs"] if (run["what"], run["cache"], run["by"]) == (what, cache, by)]

    def seconds(values: Sequence[float]) -> str:
        return f"{median(values):.2f}"

    kinds = [(what, cache) for what in report["settings"]["what"] for cache in ("cold", "warm")]
    rows = [
        [what, cache, unit]
        + [seconds([run[unit] for run in chosen(what, cache, by)]) for by in ("ours", "bare")]
        + [seconds(ratios(report, what, cache, unit))]
        for what, cache in kinds
        for unit in ("wall", "processor")
    ]
    title = "Seconds from the start of the process, median over the rounds"
    text = [table_text(title, ["what", "cache", "time", "ours", "bare script", "ratio"], rows)]
    if "train" in report["settings"]["what"]:
        rows = [
            [
                cache,
                *(seconds([run["marks"][part] for run in chosen("train", cache, "ours")]) for part in PARTS),
            ]
            for cache in ("cold", "warm")
        ]
        text.append(table_text("Seconds until this was done, train", ["cache", *PARTS], rows))
        steps = ("trace", "lower", "compile", "load")
        rows = [
            [cache, name, *(f"{parts[step]:.2f}" if step in parts else "" for step in steps)]
            for cache in ("cold", "warm")
            for name, parts in chosen("train", cache, "ours")[-1]["programs"].items()
        ]
        title = "Programs before the first step and their seconds (threads overlap), last round"
        text.append(table_text(title, ["cache", "program", *steps], rows))
    return "\n".join(text)


Contenders = dict[str, Callable[[Path], dict[str, Any]]]
"""``ours`` and ``bare``: from a folder of compiled programs to what was measured of one run."""


def _contenders_of_training(config: StartupBenchmark, folder: Path) -> Contenders:
    run = folder / "run"

    def ours(compiled: Path) -> dict[str, Any]:
        shutil.rmtree(run, ignore_errors=True)
        options = ["--config", config.config, "--train.max_steps", "1", *config.options]
        places = ["--output", str(run), "--compilation_cache", str(compiled)]
        run_script("pretrain.py", [*options, *places])
        summary = json.loads((run / "summary.json").read_text())
        return {
            "wall": summary["first_step_seconds"],
            "processor": summary["startup_processor_seconds"]["first step"],
            "marks": summary["startup_seconds"],
            "programs": summary["startup_programs"],
        }

    ours(folder / "untimed")
    record = json.loads((run / "config.json").read_text())
    model, facts = record["settings"]["model"], record["facts"]
    length = facts["row_length"]
    task = {
        "model": {**model, "positions": length},
        "vocabulary_size": facts["codes"] + len(SPECIAL_TOKENS),
        "rows": math.ceil(facts["tokens_per_step"] / length),
        "targets": math.ceil(record["settings"]["masking"]["probability"] * length),
    }
    return {"ours": ours, "bare": partial(_bare, "train", task)}


def _contenders_of_prediction(config: StartupBenchmark, folder: Path, embeddings: bool) -> Contenders:
    """Of a fine-tuned model and one patient, who is in prepared data of their own."""
    tuned, patient, parameters = folder / "tuned", folder / "patient", folder / "parameters.npz"
    if not tuned.exists():
        _tune(config, folder)
    record = json.loads((tuned / "task.json").read_text())

    def ours(compiled: Path) -> dict[str, Any]:
        output = folder / "output.parquet"
        output.unlink(missing_ok=True)
        options = ["--model", str(tuned), "--data", str(patient), "--split", "all", "--output", str(output)]
        places = ["--compilation_cache", str(compiled), *(["--embeddings"] if embeddings else [])]
        return _timed("predict.py", [*options, *places])

    with np.load(parameters) as stored:
        vocabulary_size = len(stored["behrt/embeddings/code/embedding"])
        outputs = len(stored["task_head/dense/bias"])
    task = {
        "model": record["model"],
        "vocabulary_size": vocabulary_size,
        "outputs": outputs,
        "pooling": record["pooling"],
        "parameters": str(parameters),
        "embeddings": embeddings,
    }
    return {"ours": ours, "bare": partial(_bare, "predict", task)}


def _tune(config: StartupBenchmark, folder: Path) -> None:
    """Write a fine-tuned run, its parameters as a plain file, and a data set of one patient."""
    from flax.traverse_util import flatten_dict

    from behrt_jax.adapters.lora import merge
    from behrt_jax.training.devices import make_mesh
    from behrt_jax.workflows.finetuned import open_finetuned
    from behrt_jax.workflows.prepare import prepare_records

    given = make_task(folder, 500, config.config)
    options = ["--config", "lora", *given, "--train.max_steps", "1", "--search.size", "0"]
    places = ["--output", str(folder / "tuned"), "--compilation_cache", "off"]
    run_script("finetune.py", [*options, "--task.pooling", "mean", *places])
    finetuned = open_finetuned(folder / "tuned", None, make_mesh())
    (variables,), adapters = finetuned.members, finetuned.setup.predictor.lora
    params = variables["params"]
    if adapters is not None:
        params = merge(params, variables["lora"], adapters)
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    np.savez(folder / "parameters.npz", **flat)  # pyright: ignore[reportArgumentType]
    events = pq.read_table(folder / "events.parquet")
    subjects = events["subject_id"].to_numpy()
    one = events.filter(pa.array(subjects == subjects[0]))
    pq.write_table(one, folder / "one.parquet")
    prepare_records(
        PrepareConfig(
            source="table", input=folder / "one.parquet", output=folder / "patient", like=folder / "tuned"
        )
    )


def _bare(what: str, task: Mapping[str, Any], compiled: Path) -> dict[str, Any]:
    return _timed(
        "benchmarks/bare.py",
        [what, json.dumps(task)],
        JAX_COMPILATION_CACHE_DIR=str(compiled),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def _timed(script: str, options: list[str], **environment: str) -> dict[str, Any]:
    """Seconds of a whole process; of its processor time, that of all its threads."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run_script(script, options, **environment)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall": seconds, "processor": used}

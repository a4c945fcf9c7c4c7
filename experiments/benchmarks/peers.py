"""What this encoder learns beside BERT and ModernBERT of Hugging Face, from the very same masked codes.

Every contender sees the same rows with the same codes masked, step by step, in a process of its own that has
the same cores; what it costs is counted in processor seconds, which another busy program hardly changes.
"""

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig, TrainConfig
from behrt_jax.data.batches import Batch, TrainingBatches, ValidationBatches
from behrt_jax.errors import InputError
from behrt_jax.evaluation.masked_codes import mean_interval, share_of_attainable_gain
from behrt_jax.presets import MODERN
from behrt_jax.records.load import load_sequences
from behrt_jax.tracking.console import open_console
from behrt_jax.tracking.plots import BASELINE_COLOUR, COLOURS, DPI, ORACLE_COLOUR, STYLES
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.masking import MaskedCodes
from behrt_jax.training.memory import keep_freed_memory
from behrt_jax.training.micro_batches import likely_parts, rows_multiple
from behrt_jax.training.state import assemble, set_up
from behrt_jax.training.step import masked_code_losses, masked_code_objective
from behrt_jax.training.validation import mask_split
from behrt_jax.workflows.pretrain import predict_baselines, split_batches

OURS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "rope": {"position_embedding": "rope"},
    "rope, alternating visits": {"position_embedding": "rope", "visit_embedding": "alternating"},
    "as modern_*": MODERN,
}
"""Contenders that are this encoder, by what differs from the default of `ModelConfig`."""
THEIRS = {
    "BERT": ("bert", False),
    "ModernBERT": ("modernbert", False),
    "BERT, ages and visits": ("bert", True),
    "ModernBERT, ages and visits": ("modernbert", True),
}
"""Those of Hugging Face: the architecture, and whether ages and alternating visits are embedded too."""
RIVAL = "ModernBERT"
"""Contenders are compared with it, code by code."""


@dataclass(frozen=True)
class PeersBenchmark:
    """Pretrain this encoder and those of Hugging Face on the same masked codes, and compare loss and cost."""

    contenders: tuple[str, ...] = (*OURS, *THEIRS)
    """Which, by name."""
    source: Literal["clinical", "latent"] = "clinical"
    """Generated records; of latent ones the best possible loss is known."""
    subjects: int = 10_000
    """How many are generated; a tenth each are of tuning and held_out."""
    vocabulary_size: int = 1000
    """Codes and special tokens."""
    hidden_size: int = 128
    """Width of embeddings and encoder."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    positions: int = 64
    """Tokens of a row; several subjects share one."""
    epochs: int = 4
    """Passes over the train subjects."""
    batch_size: int = 64
    """Subjects a step."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peaks that each contender trains with; the one of the least loss on tuning counts."""
    dropout: float = 0.0
    """Of all contenders, attention included."""
    points: int = 16
    """Validations of a run, evenly spaced."""
    cores: int = 1
    """Cores of each contender (Linux). On one, no threads wait for each other and count as busy."""
    seed: int = 0
    """Of records, rows, masks and first parameters."""
    output: Path | None = None
    """Folder for peers.json and peers.png; nothing is written where not given."""


class MaskedBatches(NamedTuple):
    """What all contenders see, as numpy arrays."""

    train: list[tuple[Batch, MaskedCodes]]
    """One a step."""
    tuning: list[tuple[Batch, MaskedCodes]]
    vocabulary_size: int
    parts: int
    """Parts of a step of this encoder, which change no result."""


class Task(NamedTuple):
    """One run: a contender with a learning rate."""

    config: PretrainConfig
    points: int
    cores: int
    peer: tuple[str, bool] | None
    """Of `THEIRS`, where it is one of these."""


class Course(NamedTuple):
    """What a run was like."""

    steps: list[int]
    """Steps done at each validation."""
    seconds: list[float]
    """Processor seconds of the steps so far, validation and compilation left out."""
    losses: list[float]
    """Mean loss of the masked codes of tuning, nats."""
    last: np.ndarray
    """Loss of each of them at the end, ``[targets]``."""
    first_seconds: float
    """Processor seconds of the first step, compilation included."""
    parameters: int
    """Of the model, each counted once."""


def config_of(benchmark: PeersBenchmark, name: str, learning_rate: float) -> PretrainConfig:
    """The run that is asked for; for models of Hugging Face, sizes and course alone are read."""
    model = ModelConfig(
        embedding_size=benchmark.hidden_size,
        hidden_size=benchmark.hidden_size,
        layers=benchmark.layers,
        heads=benchmark.heads,
        positions=benchmark.positions,
        dropout=benchmark.dropout,
    )
    return PretrainConfig(
        name=name,
        model=replace(model, **OURS.get(name, {})),
        data=DataConfig(
            source=benchmark.source,
            subjects=benchmark.subjects,
            vocabulary_size=benchmark.vocabulary_size,
            window="first",  # as the optimum of latent records asks for
            seed=benchmark.seed,
        ),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        train=TrainConfig(epochs=benchmark.epochs, batch_size=benchmark.batch_size, seed=benchmark.seed),
    )


def masked_batches(config: PretrainConfig) -> tuple[MaskedBatches, dict[str, Any]]:
    """Rows of each step and of tuning with codes masked, and what predictors without training make of tuning.

    Returns:
        The batches; and of each baseline, and of the optimum where it is known, its results.
    """
    data, mesh = load_sequences(config.data, config.model.sep_token), make_mesh(jax.devices()[:1])
    batches, tuning = split_batches(config, data, 1)
    assert isinstance(batches, TrainingBatches)
    assert isinstance(tuning, ValidationBatches)
    rows, length = batches.rows_per_batch, batches.row_length
    parts = likely_parts(rows, length, 4 * config.model.hidden_size, "cpu")
    batches = batches.with_rows_a_multiple_of(rows_multiple(batches, mesh, parts))
    total = config.train.epochs * batches.steps_per_epoch
    setup = set_up(config, len(data.vocabulary), mesh)
    objective = masked_code_objective(setup.predictor, config.masking)
    keys = assemble(config, setup, objective, total, mesh).keys
    mask = jax.jit(objective.inputs)

    def masked(key: jax.Array, batch: Batch) -> tuple[Batch, MaskedCodes]:
        return jax.device_get(mask(key, batch))

    train = [masked(jax.random.fold_in(keys.step, step), batches.batch(step)) for step in range(total)]
    seen = MaskedBatches(
        train, [masked(keys.validation, batch) for batch in tuning], len(data.vocabulary), parts
    )
    split = mask_split(tuning, config.masking, keys.validation, len(data.vocabulary))
    return seen, predict_baselines(config, data, split)


def train(step: Any, batches: MaskedBatches, points: int) -> Course:
    """Train, with the clock stopped while the loss on tuning is worked out.

    Args:
        step: an :class:`OurStep` or `huggingface.TheirStep`.
        batches: to train and to validate on.
        points: validations.
    """
    wanted = {round(len(batches.train) * point / points) for point in range(1, points + 1)}
    done, seconds, losses = [], [], []
    spent = first = 0.0
    last = np.zeros(0)
    for number, masked in enumerate(batches.train, start=1):
        started = time.process_time()
        step(*masked)
        took = time.process_time() - started
        if number == 1:
            first = took
        else:
            spent += took
        if number in wanted:
            of_rows = [step.losses(*rows)[rows[1].weights] for rows in batches.tuning]
            last = np.concatenate(of_rows).astype(np.float64)
            done.append(number)
            # The first step compiles: it counts as the mean of the others.
            seconds.append(spent * number / max(1, number - 1))
            losses.append(float(last.mean()))
    return Course(done, seconds, losses, last, first, step.parameters)


class OurStep:
    """Training of this encoder on masked rows; as `huggingface.TheirStep`."""

    def __init__(self, config: PretrainConfig, batches: MaskedBatches):
        setup = set_up(config, batches.vocabulary_size, make_mesh(jax.devices()[:1]))
        objective = masked_code_objective(setup.predictor, config.masking)
        given = objective._replace(inputs=lambda key, masked: masked)
        assembly = assemble(config, setup, given, len(batches.train), make_mesh(jax.devices()[:1]))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.shapes))
        self._update, self._state = assembly.jit(assembly.step(batches.parts)), assembly.first_state()
        self._score = jax.jit(partial(masked_code_losses, setup.predictor))

    def __call__(self, batch: Batch, masked: MaskedCodes) -> None:
        """Do the next step, and wait for its end."""
        self._state, _ = jax.block_until_ready(self._update(self._state, (batch, masked)))

    def losses(self, batch: Batch, masked: MaskedCodes) -> np.ndarray:
        """Those of the slots, float32 `[rows, slots]`, without dropout."""
        return np.asarray(self._score(self._state.variables, batch, masked).losses)


def run(task: Task, batches: MaskedBatches) -> Course:
    """One run, in the process that this is called in."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.cores])
    if task.peer is None:
        return train(OurStep(task.config, batches), batches, task.points)
    from experiments.benchmarks.huggingface import TheirStep

    step = TheirStep(*task.peer, task.config, batches.vocabulary_size, len(batches.train))
    return train(step, batches, task.points)


def benchmark_peers(benchmark: PeersBenchmark) -> dict[str, Any]:
    """Train every contender, print the table, and draw loss against processor time.

    Returns:
        What is written to peers.json: the settings, the machine, the losses of the baselines, and for each
        contender its course, parameters, share of the attainable gain where the optimum is known, and how far
        its loss is below ModernBERT's, with a 95 % interval over subjects, paired code by code.

    Raises:
        InputError: an unknown contender, or one of Hugging Face without the extra `benchmark`.
    """
    _check(benchmark)
    batches, baselines = masked_batches(config_of(benchmark, "", benchmark.learning_rates[0]))
    subjects = baselines["unigram"].subjects
    known = {name: float(results.losses.mean()) for name, results in baselines.items()}
    courses: dict[str, Course] = {}
    rates: dict[str, float] = {}
    report: dict[str, Any] = {}
    for name in benchmark.contenders:
        for rate in benchmark.learning_rates:
            config = config_of(benchmark, name, rate)
            task = Task(config, benchmark.points, benchmark.cores, THEIRS.get(name))
            # As a command does, before a library starts threads.
            with ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=keep_freed_memory
            ) as process:
                course = process.submit(run, task, batches).result()
            if name not in courses or course.losses[-1] < courses[name].losses[-1]:
                courses[name], rates[name] = course, rate
        found = courses[name]
        print(f"{name}: {found.losses[-1]:.3f} nats, {found.seconds[-1]:.0f} processor seconds", flush=True)
        report = {
            "settings": {**vars(benchmark), "output": None},
            "machine": _machine(),
            "baselines": known,
            "targets": len(subjects),
            "rows": [
                _row(name, courses, rate, subjects, known, len(batches.train)) for name, rate in rates.items()
            ],
        }
        if benchmark.output is not None:  # after each contender: what is known is not lost
            benchmark.output.mkdir(parents=True, exist_ok=True)
            (benchmark.output / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
            plot_courses(report["rows"], known, benchmark.output / "peers.png")
    show(report["rows"], known)
    if benchmark.output is not None:
        print(f"Written to {benchmark.output}: peers.json, peers.png.")
    return report


def _check(benchmark: PeersBenchmark) -> None:
    if unknown := set(benchmark.contenders) - {*OURS, *THEIRS}:
        raise InputError(
            f"--contenders: {min(unknown)!r} is unknown, choose from {', '.join((*OURS, *THEIRS))}."
        )
    for name, count in (("contenders", len(benchmark.contenders)), ("points", benchmark.points)):
        if not count:
            raise InputError(f"--{name}: give one or more.")
    if set(benchmark.contenders) & set(THEIRS) and not (find_spec("torch") and find_spec("transformers")):
        raise InputError(
            "Models of Hugging Face take transformers and PyTorch: pip install 'behrt-jax[benchmark]', or "
            f"name --contenders among {', '.join(OURS)}."
        )


def _row(
    name: str,
    courses: Mapping[str, Course],
    rate: float,
    subjects: np.ndarray,
    known: Mapping[str, float],
    steps: int,
) -> dict[str, Any]:
    course = courses[name]
    row: dict[str, Any] = {"contender": name, "learning_rate": rate, **course._asdict()}
    del row["last"]
    row["seconds_per_step"] = course.seconds[-1] / steps
    if "oracle" in known:
        row["share_of_attainable_gain"] = share_of_attainable_gain(
            course.losses[-1], known["unigram"], known["oracle"]
        )
    if RIVAL in courses and name != RIVAL:
        gain = courses[RIVAL].last - course.last  # [targets]
        low, high = mean_interval(gain, subjects)
        row["below_rival"] = {"value": float(gain.mean()), "low": low, "high": high}
    return row


def show(rows: Sequence[Mapping[str, Any]], known: Mapping[str, float]) -> None:
    """The table for a person."""

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        below = row.get("below_rival")
        return (
            row["contender"],
            f"{row['parameters']:,}",
            f"{row['learning_rate']:g}",
            f"{row['losses'][-1]:.3f}",
            "" if below is None else "{value:+.3f} ({low:+.3f} to {high:+.3f})".format_map(below),
            f"{row['seconds'][-1]:.0f}",
            f"{1e3 * row['seconds_per_step']:.0f}",
            f"{row['first_seconds']:.1f}",
        )

    columns = (
        "contender",
        "parameters",
        "learning rate",
        "loss",
        f"below {RIVAL}",
        "processor s",
        "ms/step",
        "first step s",
    )
    title = ", ".join(f"{name} {loss:.3f}" for name, loss in known.items())
    with open_console() as console:
        console.table(f"Loss on tuning (nats; {title})", columns, list(map(cells, rows)))


def plot_courses(rows: Sequence[Mapping[str, Any]], known: Mapping[str, float], file: Path) -> None:
    """Draw loss against processor seconds. Nothing is drawn where matplotlib is not installed.

    Args:
        rows: of :func:`benchmark_peers`.
        known: losses of baselines; ``unigram`` and ``oracle`` are drawn.
        file: PNG to write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6.4, 4.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, row in enumerate(rows):
        ours = row["contender"] in OURS
        axes.plot(
            row["seconds"],
            row["losses"],
            STYLES[0] if ours else STYLES[1],
            color=COLOURS[index % len(COLOURS)],
            linewidth=1.8 if ours else 1.3,
            label=f"{'ours, ' if ours else ''}{row['contender']}: {row['losses'][-1]:.3f}",
        )
    for name, label, colour in (
        ("unigram", "code frequencies", BASELINE_COLOUR),
        ("oracle", "best possible", ORACLE_COLOUR),
    ):
        if name in known:
            axes.axhline(known[name], color=colour, linewidth=1.0, linestyle=STYLES[2], label=label)
    axes.set_xlabel("processor seconds of training steps")
    axes.set_ylabel("loss of masked codes, tuning split (nats)")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file)


def _machine() -> dict[str, Any]:
    packages = [name for name in ("jax", "torch", "transformers") if find_spec(name)]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        **{name: version(name) for name in packages},
    }

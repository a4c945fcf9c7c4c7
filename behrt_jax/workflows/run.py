"""A training run from its opening to its end, whatever it trains: its parts, its start, its saves.

The recipes of pretraining and fine-tuning make a :class:`Run`, let it :func:`begin`, and :func:`save` it; its
settings decide whether another start may go on with it.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from behrt_jax import __version__
from behrt_jax.adapters.lora import GROUPS
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import FinetuneConfig, PretrainConfig, TrackingConfig
from behrt_jax.data.batches import TaskBatches, TrainingBatches
from behrt_jax.data.questions import QuestionBatches
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, json_text, resolved
from behrt_jax.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    PARAMETERS_FILE,
    open_run_folder,
    read_config,
    read_metrics,
    truncate_metrics,
    write_files,
)
from behrt_jax.tracking.console import Console, SilentConsole, open_console
from behrt_jax.tracking.summary import flat
from behrt_jax.tracking.trackers import Send, open_trackers
from behrt_jax.training.checkpoints import Checkpoints
from behrt_jax.training.devices import shapes_of
from behrt_jax.training.feeding import place_batch
from behrt_jax.training.freezing import count_parameters
from behrt_jax.training.loop import Cursor, Interruption, Schedule
from behrt_jax.training.optimizer import rates_on_host
from behrt_jax.training.processes import check_same, from_first, is_first
from behrt_jax.training.runtime import KeptProgram
from behrt_jax.training.state import Assembly, Setup, with_adapters_of_base
from behrt_jax.training.step import TrainState, Variables
from behrt_jax.training.telemetry import Telemetry, leaves_not_finite, make_probe, trainable_names


@dataclass(frozen=True, eq=False)
class Run:
    """A training run that is about to begin."""

    folder: Path
    assembly: Assembly
    batches: TrainingBatches | TaskBatches | QuestionBatches
    schedule: Schedule
    micro_batches: int
    parameters: JsonObject
    """Content of parameters.json."""
    code_counts: np.ndarray
    """Events of each code in the train split, int64 ``[vocabulary]``."""


class Preparation(NamedTuple):
    """What is being made while a run begins."""

    step: Future[Any]
    """The program of one step, compiled; as it was given where it is not needed."""
    state: Future[TrainState]
    """The first state."""


def compile_beside(
    executor: Executor, run: Run, program: Any, decisive: JsonObject, from_host: bool = True
) -> Preparation:
    """Compile the step, and make the first state, while the processor has time for it.

    Both programs are kept on disk as they are (:class:`behrt_jax.training.runtime.KeptProgram`).

    Args:
        executor: of two threads: the compiler works on both at a time, the longer one first.
        run: what is trained.
        program: `feeding.one_step` of its step.
        decisive: :func:`decisive_settings` of the run.
        from_host: batches come from the host, else they are gathered on the device by another program.
    """
    assembly, devices = run.assembly, list(run.assembly.mesh.devices.flat)
    decisive = {
        **decisive,
        "total_steps": run.schedule.total_steps,
        "micro_batches": run.micro_batches,
        "predictor": repr(assembly.setup.predictor),
    }
    kept: list[KeptProgram] = []
    state_made = Event()

    def compiled(program: Any, *arguments: Any) -> Any:
        kept.append(KeptProgram(program, decisive, arguments, devices))
        return kept[-1].compiled()

    def step() -> Any:
        if not from_host:
            return program
        batch = place_batch(run.batches, 0, assembly.mesh)
        return compiled(program, assembly.state_shapes, shapes_of(batch))

    def state() -> TrainState:
        try:
            return compiled(assembly.initialise, assembly.keys.init)(assembly.keys.init)
        finally:
            state_made.set()

    def keep() -> None:
        wait([stepping])
        state_made.wait()  # not for its future, which holds the state
        for one in kept:
            one.keep()

    stepping = executor.submit(step)
    if jax.process_count() > 1:
        wait([stepping])  # processes must start their programs in the same order
    ready = Preparation(stepping, executor.submit(state))
    if jax.process_count() > 1:
        wait(ready)
    executor.submit(keep)
    return ready


def decisive_settings(config: PretrainConfig | FinetuneConfig) -> JsonObject:
    """Settings that may decide what a run's programs do: all but those that surely do not."""
    surely_not = ("name", "output", "resume", "distributed", "tracking", "compilation_cache")
    return {name: value for name, value in settings(config).items() if name not in surely_not}


def run_console() -> Console:
    """The console of a run: of several processes, the first one alone speaks."""
    return open_console() if is_first() else SilentConsole()


def not_recorded(line: JsonObject) -> None:
    """Take a line of metrics.jsonl in a process that does not write it."""


def trackers(config: PretrainConfig | FinetuneConfig, folder: Path) -> AbstractContextManager[Send]:
    """What sends records on as the configuration asks: of several processes, the first one alone sends.

    Raises:
        InputError: see `trackers.open_trackers`.
    """
    asked = config.tracking if is_first() else TrackingConfig()
    return open_trackers(asked, folder, settings(config))


class Begun(NamedTuple):
    """A run at the step where it begins or goes on."""

    state: TrainState
    cursor: Cursor
    telemetry: Telemetry
    clock: float
    """``time.perf_counter()`` at which it would have begun, had it never been interrupted."""


def begin(
    run: Run,
    config: PretrainConfig | FinetuneConfig,
    making: Future[TrainState],
    checkpoints: Checkpoints,
    console: Console,
    start: Callable[[TrainState], TrainState],
    started: float,
) -> Begun:
    """Go on from the latest checkpoint where the run is resumed, else from `start` of its first state.

    Args:
        run: what is trained.
        config: its settings.
        making: gives its first state, which is used up.
        checkpoints: of the run.
        console: told where it goes on.
        start: puts other parameters in place of the first ones, in a run that begins.
        started: ``time.perf_counter()`` at the start of this process's part.
    """
    first = making.result()
    static_masks = isinstance(config, PretrainConfig) and config.train.static_masks
    # How far adapters moved is told from their first values, also after a restart.
    probe = make_probe(
        first.variables["lora"], run.code_counts, run.schedule.steps_per_epoch, static_masks=static_masks
    )
    state, cursor = restore_latest(checkpoints, first, console) if config.resume else (first, Cursor())
    if cursor.step == 0:
        state = with_adapters_of_base(start(state), config.lora, run.assembly.keys.init)
    trains = [group for group in GROUPS if run.parameters[group]["trainable"]]
    telemetry = Telemetry(
        rates_on_host(config.optimizer, run.schedule.total_steps, trains),
        trainable_names(run.assembly.setup.mask),
        probe,
        leaves_not_finite(state.variables),
    )
    if is_first():
        if config.resume:
            check_metrics(run.folder, run.schedule, cursor.step)
        truncate_metrics(run.folder / METRICS_FILE, cursor.step)
    if config.resume:
        checkpoints.remove_older()
    console.start(run.schedule.total_steps, cursor.step, run.schedule.steps_per_epoch)
    return Begun(state, cursor, telemetry, started - cursor.seconds)


def check_metrics(folder: Path, schedule: Schedule, step: int) -> None:
    """Refuse to go on after `step` where metrics or checkpoints of the run are gone.

    A run dies at most between the line of a validation and its checkpoint.

    Raises:
        InputError: names what is gone.
    """
    metrics = read_metrics(folder / METRICS_FILE)
    if step >= schedule.next_line(0) and not (folder / METRICS_FILE).exists():
        raise InputError(
            f"--resume: {folder / METRICS_FILE} is gone, but there is a checkpoint of step {step}: bring it "
            "back, or make an empty file of that name to go on without the figures up to there."
        )
    validations = [line for line in metrics if line.get("split") == "tuning"]
    if not step and len(validations) > 1:
        raise InputError(
            f"--resume: {folder} has no checkpoint that is whole, but {len(validations)} validations: bring "
            "its checkpoints back, or start a new run with another --output."
        )


def restore_latest(checkpoints: Checkpoints, state: TrainState, console: Console) -> tuple[Any, Cursor]:
    """State and cursor of the latest checkpoint; the fresh ones where there is none yet.

    Raises:
        InputError: it cannot be read, or is not the same in all processes.
    """
    step = checkpoints.latest_step()
    check_same({"the latest checkpoint": step}, "wait until the file system shows all of them the same.")
    if step is None:
        console.log("No checkpoint was written yet: the run starts from its beginning.")
        return state, Cursor()
    params, lora, opt_state = checkpoints.restore(
        step, params=state.variables["params"], lora=state.variables["lora"], opt_state=state.opt_state
    )
    console.log(f"Resuming after step {step:,}.")
    step_array = jax.device_put(state.step.dtype.type(step), state.step.sharding)
    return (
        TrainState(step_array, {"params": params, "lora": lora}, opt_state),
        Cursor.from_json(checkpoints.read_cursor(step)),
    )


def save(
    checkpoints: Checkpoints,
    config: PretrainConfig | FinetuneConfig,
    begun: Begun,
    state: TrainState,
    validation: Mapping[str, float | None] | None = None,
) -> None:
    """Write a checkpoint; with the figures of the validation (None: not defined) where it follows one."""
    begun.cursor.seconds = time.perf_counter() - begun.clock
    trees = state.variables["params"], state.variables["lora"], state.opt_state
    figures = None if validation is None else {k: v for k, v in validation.items() if v is not None}
    checkpoints.save(begun.cursor.step, *trees, begun.cursor.to_json(), settings(config), figures)


def best_variables(checkpoints: Checkpoints, step: int, state: TrainState) -> Variables:
    """Variables of the checkpoint of a step, spread over devices as those of `state`."""
    trees = state.variables
    best = checkpoints.restore(step, params=trees["params"], lora=trees["lora"])
    return {"params": best.params, "lora": best.lora}


def exit_status(stop_reason: str, interruption: Interruption) -> tuple[str, int]:
    """Reason why a run stopped, for a person, and exit status of its command."""
    if stop_reason == "interrupted":
        return f"interrupted by {interruption.name}", 128 + interruption.number
    return stop_reason, 0


@dataclass(frozen=True)
class RunResult:
    """A run's folder, and how it ended."""

    folder: Path
    summary: Mapping[str, Any]
    """Content of summary.json."""
    exit_status: int = 0
    """0, or 128 plus the number of the signal that stopped the run."""


def parameter_report(freezing: FreezingConfig, setup: Setup) -> JsonObject:
    """Content of parameters.json: counts by group, the regime, and the adapted layers."""
    return {
        **count_parameters(setup.shapes, setup.mask),
        "regime": "+".join(freezing.groups) or freezing.regime,
        "adapters": [
            {"name": layer.name, "in": layer.inputs, "out": layer.outputs, "rank": layer.rank}
            for layer in setup.layers
        ],
    }


# A resumed run may differ in these: they say how long to train and where, not how.
FREE = (
    "output",
    "resume",
    "train.epochs",
    "train.max_steps",
    "train.patience",
    "train.data_on_device",
    "train.steps_per_call",
    "mesh.data",
    "mesh.fsdp",
    "distributed.auto",
    "distributed.coordinator",
    "distributed.processes",
    "distributed.process",
    "distributed.timeout",
    "tracking.tensorboard",
    "tracking.wandb",
    "tracking.project",
    "data.path",
    "data.verify",
    "data",
    "labels",
    "init",
    "max_unknown",
    "compilation_cache",
)


C = TypeVar("C", PretrainConfig, FinetuneConfig)


@contextmanager
def open_folder(config: C) -> Iterator[tuple[Path, C]]:
    """The run's folder, locked until this ends, and its settings: ``resume`` is off where nothing was begun.

    Without ``output`` it is ``runs/<name>-<time>`` in the working directory. Of several processes the first
    one opens it, and decides for all.

    Raises:
        InputError: see `run_folder.open_run_folder`.
    """
    path = config.output or Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    with ExitStack() as stack:

        def opened() -> JsonObject:
            folder = stack.enter_context(open_run_folder(path, config.resume))
            resume = config.resume and (folder / CONFIG_FILE).is_file()
            return {"folder": str(folder), "resume": resume}

        found = from_first(opened)
        yield Path(found["folder"]), replace(config, resume=found["resume"])


def run_record(
    config: PretrainConfig | FinetuneConfig,
    data: JsonObject,
    facts: JsonObject,
    baselines: JsonObject,
) -> JsonObject:
    """Content of config.json: settings, versions, devices, what the data is (no events), and what the
    doctor goes by.
    """
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "settings": settings(config),
        "versions": {
            "behrt_jax": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "devices": [device.device_kind for device in jax.devices()],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "data": dict(data),
        "facts": dict(facts),
        "baselines": dict(baselines),
        "recorded": True,  # in files.json, which belongs to the run
    }


def write_start(folder: Path, rules: Mapping[str, bytes], parameters: JsonObject, record: JsonObject) -> None:
    """Write what a run folder begins with; config.json comes last, so that where it is all is there.

    Args:
        folder: of the run.
        rules: `data.prepared.rule_files` of its data.
        parameters: of :func:`parameter_report`.
        record: of :func:`run_record`.
    """
    documents = {PARAMETERS_FILE: parameters, CONFIG_FILE: record}
    texts = {name: json_text(value, 2).encode() for name, value in documents.items()}
    write_files(folder, {**rules, **texts})


def settings(config: Any) -> JsonObject:
    """A configuration (a dataclass) as nested dicts, ready for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(asdict(config))


def check_same_run(folder: Path, config: PretrainConfig | FinetuneConfig, fingerprint: str) -> None:
    """Refuse to resume a run with settings or data other than its own.

    Raises:
        InputError: names the first setting that differs, with both values.
    """
    record = read_config(folder)
    completed = _completed(record["settings"], type(config))
    if isinstance(config, PretrainConfig) and completed["init"]["run"]:  # may be relative in older runs
        completed["init"]["run"] = str(resolved(Path(completed["init"]["run"])))
    stored, given = (_comparable(value) for value in (completed, settings(config)))
    for name in sorted(stored.keys() | given.keys()):
        if stored.get(name) != given.get(name):
            raise InputError(
                f"--resume: {name} is {given.get(name)}, but the run in {folder} was made with "
                f"{stored.get(name)}: give the same settings (only {', '.join(FREE[2:])} may change)."
            )
    if record["data"].get("fingerprint") != fingerprint:
        raise InputError(
            f"--resume: the data, or its labels, differ from those of the run in {folder}: give the same, or "
            "start a new run with another --output."
        )


def _completed(stored: JsonObject, kind: type[PretrainConfig | FinetuneConfig]) -> JsonObject:
    """Settings of a run, with the defaults of those that its version of behrt_jax did not have."""
    defaults = settings(kind(lora=LoRAConfig()))
    return {
        name: {**default, **stored[name]} if isinstance(stored.get(name), dict) else stored.get(name, default)
        for name, default in defaults.items()
    }


PLACES = ("data", "labels", "init", "data.path", "init.run", "init.vectors")
"""Settings that say where something lies."""


def check_same_everywhere(config: PretrainConfig | FinetuneConfig, fingerprint: str) -> None:
    """Refuse processes of one run that differ in settings, versions or data: what they add up would be no
    run, or they would wait for each other. Where files lie may differ.

    Raises:
        InputError: see `processes.check_same`.
    """
    given = _single_values(decisive_settings(config))
    own = {name: value for name, value in given.items() if name not in PLACES}
    own |= {"the version of behrt_jax": __version__, "the version of jax": jax.__version__}
    mend = "start all processes with the same options, on the same data."
    check_same({**own, "the fingerprint of the data": fingerprint}, mend)


def _comparable(values: JsonObject) -> JsonObject:
    return {name: value for name, value in _single_values(values).items() if name not in FREE}


def _single_values(values: JsonObject) -> JsonObject:
    """Dotted name -> value of all settings."""
    lists = {
        f"{section}.{name}": value
        for section, inner in values.items()
        if isinstance(inner, dict)
        for name, value in inner.items()
        if isinstance(value, list)
    }
    return {**dict(flat(dict(values))), **lists}

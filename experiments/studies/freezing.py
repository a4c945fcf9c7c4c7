"""The freezing study: the same model under each regime, on the same data, compared.

What it must show is known from the history of the mistakes that it repeats: with embeddings and head
frozen at random values the loss stays near ln(codes), whatever the adapters do.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax

from behrt_jax.cli import Command, run_command
from behrt_jax.config.model import FreezingConfig
from behrt_jax.config.training import InitConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.files import read_json, write_json, write_text
from behrt_jax.presets import PRETRAIN
from behrt_jax.records.load import load_sequences
from behrt_jax.run_folder import CONFIG_FILE, FILES_FILE, PARAMETERS_FILE, SUMMARY_FILE, VOCABULARY_FILE
from behrt_jax.training.devices import make_mesh, put_rows
from behrt_jax.training.freezing import count_parameters
from behrt_jax.training.state import assemble_pretraining
from behrt_jax.workflows.pretrain import pretrain, split_batches
from behrt_jax.workflows.run import settings
from experiments.studies.freezing_report import judge, plot_study, read_run, study_text, summarise_cells

# Studies: many runs that answer one question.


@dataclass(frozen=True)
class FreezingStudyConfig:
    """Train the same model under each freezing regime and compare what it learns, and what it costs.

    Broken off, it goes on where it stopped when started again with the same options: finished runs
    are not repeated.
    """

    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """What all runs share: model, adapters, data, optimizer, length. Regime, source, masks, seeds and
    output are set by the study, and every run trains to its end (no patience)."""
    sources: tuple[Literal["uniform", "clinical", "latent"], ...] = ("uniform", "latent")
    """Generated data to train on."""
    masks: tuple[Literal["fresh", "once"], ...] = ("fresh", "once")
    """fresh: drawn anew in each epoch. once: drawn once and reused, on uniform data alone."""
    regimes: tuple[
        Literal["full", "lora", "lora_head", "lora_only", "all_but_adapted", "lora_pretrained"], ...
    ] = ("full", "lora", "lora_head", "lora_only", "all_but_adapted", "lora_pretrained")
    """full: all. lora: adapters, embeddings, head. lora_head: adapters and head, the embeddings frozen at
    random values. lora_only: adapters, all else frozen at random values. all_but_adapted: all but the
    adapted layers, which are `out` alone here, as in the mistake that it repeats. lora_pretrained:
    adapters and head, the embeddings frozen as the full run of the same seed and data left them."""
    seeds: int = 3
    """Runs of each kind; each has its own data, initialisation and masks."""
    timed_steps: int = 30
    """Steps of each regime that are timed, in turns; 0 leaves the timing out."""
    output: Path = Path("runs/freezing_study")
    """Folder of the study; each run has its own folder in it."""


# What a training step costs under each freezing regime: compiled FLOPs, and time.

WARM_UP = 3


def measure_costs(
    configs: Mapping[str, PretrainConfig], timed_steps: int, devices: Sequence[Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Count and time one training step of each configuration on the same batch.

    The steps are timed in turns, one of each, so that whatever else the machine does falls on all alike.

    Args:
        configs: regime -> configuration; they differ in adapters and freezing alone. Data is uniform.
        timed_steps: steps of each that are timed; 0 for none.
        devices: devices to run on; all where not given.

    Returns:
        regime -> ``trainable``, ``total``, ``trainable_percent``; ``flops`` of the compiled step (None
        where the compiler does not tell), ``step_seconds`` (median), and both as multiples of those of
        ``full`` (``flops_of_full``, ``time_of_full``; None without it).
    """
    first = next(iter(configs.values()))
    mesh = make_mesh(devices, first.mesh)
    data = load_sequences(replace(first.data, source="uniform"), first.model.sep_token)
    batches, _ = split_batches(first, data, mesh.size * (first.train.micro_batches or 1))
    batch = put_rows(batches.batch(0), mesh)

    costs: dict[str, dict[str, Any]] = {}
    steps, states = {}, {}
    for name, config in configs.items():
        assembly = assemble_pretraining(config, len(data.vocabulary), mesh)
        states[name] = assembly.first_state()
        step = assembly.jit(assembly.step(first.train.micro_batches or 1))
        steps[name] = step.lower(states[name], batch).compile()
        analysis = steps[name].cost_analysis() or {}
        report = count_parameters(assembly.setup.shapes, assembly.setup.mask)
        costs[name] = {
            **{key: report[key] for key in ("trainable", "total", "trainable_percent")},
            "flops": analysis.get("flops"),
            "step_seconds": None,
        }
    if timed_steps:
        for name, seconds in _time_in_turns(steps, states, batch, timed_steps).items():
            costs[name]["step_seconds"] = seconds
    for cost in costs.values():
        for key, ratio in (("flops", "flops_of_full"), ("step_seconds", "time_of_full")):
            full = costs.get("full", {}).get(key)
            cost[ratio] = cost[key] / full if full and cost[key] else None
    return costs


def _time_in_turns(
    steps: Mapping[str, Any], states: dict[str, Any], batch: Any, rounds: int
) -> dict[str, float]:
    """Median seconds of each step; `states` are used up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], batch))
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


# The runs of the freezing study: one for each kind of data, masks, regime and seed.

LEFT_BEFORE_THE_START = {VOCABULARY_FILE, PARAMETERS_FILE, FILES_FILE}
"""Files of a run that may be there before its config.json is."""

Masks = Literal["fresh", "once"]
Source = Literal["uniform", "clinical", "latent"]


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    source: Source
    masks: Masks
    regime: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.source}-{self.masks}-{self.regime}-{self.seed}"


def cells_of(config: FreezingStudyConfig) -> list[Cell]:
    """All runs, each full run before those that take its embeddings."""
    regimes = sorted(config.regimes, key=lambda name: name != "full")
    return [
        Cell(source, masks, regime, seed)
        for source in config.sources
        for masks in config.masks
        if source == "uniform" or masks == "fresh"
        for seed in range(config.seeds)
        for regime in regimes
    ]


def regime_config(shared: PretrainConfig, regime: str) -> PretrainConfig:
    """The shared configuration under a regime of the study."""
    assert shared.lora is not None
    if regime == "full":
        return replace(shared, lora=None, freezing=FreezingConfig("full"))
    if regime in ("lora_head", "lora_pretrained"):
        return replace(shared, freezing=FreezingConfig("lora", groups=("lora", "head")))
    if regime == "all_but_adapted":
        only_out = replace(shared.lora, targets=("out",))
        return replace(shared, lora=only_out, freezing=FreezingConfig("all_but_adapted"))
    if regime == "lora_only":
        return replace(shared, freezing=FreezingConfig("lora_only"))
    return replace(shared, freezing=FreezingConfig("lora"))


def config_of(config: FreezingStudyConfig, cell: Cell, folder: Path) -> PretrainConfig:
    """The configuration of one run, as :func:`behrt_jax.workflows.pretrain.pretrain` takes it."""
    shared = regime_config(config.pretrain, cell.regime)
    init = InitConfig()
    if cell.regime == "lora_pretrained":
        init = InitConfig(folder / "runs" / replace(cell, regime="full").name, ("embedding",))
    output = folder / "runs" / cell.name
    return replace(
        shared,
        name=cell.name,
        data=replace(shared.data, source=cell.source, seed=shared.data.seed + cell.seed),
        train=replace(
            shared.train,
            seed=shared.train.seed + cell.seed,
            static_masks=cell.masks == "once",
            validate_every=None,
            patience=None,
        ),
        init=init,
        output=output,
        resume=_started(output),
    )


def _started(output: Path) -> bool:
    """Is there a run to go on with? What was written before it could start is removed."""
    if (output / CONFIG_FILE).is_file():
        return True
    if output.is_dir() and {path.name for path in output.iterdir()} <= LEFT_BEFORE_THE_START:
        shutil.rmtree(output)
    return False


STUDY_FILE = "study.json"
STUDY_TEXT_FILE = "study.md"


def freezing_study(config: FreezingStudyConfig, devices: Sequence[Any] | None = None) -> tuple[dict, int]:
    """Train every run that is not finished yet, compare all, and write the study to its folder.

    Writes ``study.json``, ``study.md`` (tables and verdicts) and ``plots/``. Each run is an ordinary
    pretraining run below ``runs/``.

    Returns:
        The content of study.json, and 0; or, where a signal stopped a run, an empty dict and 128 plus the
        signal's number.

    Raises:
        InputError: options that do not go together, or a folder with runs of other options.
    """
    _check(config)
    folder = config.output.expanduser().resolve()
    cells = cells_of(config)
    for number, cell in enumerate(cells, start=1):
        run_config = config_of(config, cell, folder)
        assert run_config.output is not None
        if _is_finished(run_config):
            continue
        print(f"\nRun {number} of {len(cells)}: {cell.name}", flush=True)
        status = pretrain(run_config, devices).exit_status
        if status:
            print(f"Stopped: start the study again with the same options to go on ({folder}).")
            return {}, status
    costs = measure_costs(
        {name: regime_config(config.pretrain, name) for name in config.regimes}, config.timed_steps, devices
    )
    runs = [{**vars(cell), **read_run(config_of(config, cell, folder).output or folder)} for cell in cells]
    study = {
        "model": config.pretrain.name,
        "settings": settings(config.pretrain),
        "seeds": config.seeds,
        "costs": costs,
        "cells": summarise_cells(runs),
        "verdicts": judge(runs),
        "runs": runs,
    }
    text = study_text(study)
    write_json(folder / STUDY_FILE, study)
    write_text(folder / STUDY_TEXT_FILE, text)
    plots = plot_study(study, folder / "plots")
    print(f"\n{text}\nWritten to {folder}: {STUDY_FILE}, {STUDY_TEXT_FILE}, {len(plots)} plots, runs/")
    return study, 0


def _is_finished(config: PretrainConfig) -> bool:
    """Whether the run has ended as it should.

    Raises:
        InputError: the folder holds a run with other settings; the first that differs is named.
    """
    assert config.output is not None
    if not config.resume:
        return False
    stored = _comparable(read_json(config.output / CONFIG_FILE)["settings"])
    given = _comparable(settings(config))
    for name in sorted(stored.keys() | given.keys()):
        if stored.get(name) != given.get(name):
            raise InputError(
                f"{config.output} was made with {name} {stored.get(name)}, and not {given.get(name)}: give "
                "the same options, or another --output."
            )
    summary = config.output / SUMMARY_FILE
    return summary.is_file() and read_json(summary)["stop_reason"] == "finished"


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, inner in values.items()
        if isinstance(inner, dict)
        for name, value in inner.items()
        if (section, name) != ("init", "run")
    }


def _check(config: FreezingStudyConfig) -> None:
    shared = config.pretrain
    if shared.lora is None:
        raise InputError("pretrain.lora is missing: the study needs a configuration with adapters.")
    for name, given in [
        ("pretrain.output", shared.output is not None),
        ("pretrain.resume", shared.resume),
        ("pretrain.init.run", shared.init.run is not None),
        ("pretrain.freezing.groups", bool(shared.freezing.groups)),
        ("pretrain.data.path", shared.data.path is not None),
    ]:
        if given:
            raise InputError(f"{name} is set by the study: leave it out.")
    for name in ("sources", "masks", "regimes"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} is {' '.join(values) or 'empty'}: give one or more, each once.")
    if config.seeds < 1:
        raise InputError(f"seeds is {config.seeds}: give 1 or more.")
    if "lora_pretrained" in config.regimes and "full" not in config.regimes:
        raise InputError("regimes: lora_pretrained takes its embeddings from the full run, add full.")
    if not cells_of(config):
        raise InputError("masks once is for uniform data: add uniform to sources, or fresh to masks.")


def _study(name: str, of: str, seeds: int = 3, **changes: dict[str, Any]) -> FreezingStudyConfig:
    """The freezing study of configuration `of`, some sections of it changed."""
    base = PRETRAIN[f"{of}_lora"]
    sections = {section: replace(getattr(base, section), **values) for section, values in changes.items()}
    output = Path("runs") / f"freezing_study_{name}"
    return FreezingStudyConfig(replace(base, name=of, **sections), seeds=seeds, output=output)


# The optimum of latent data is known for histories that are read from their beginning.
_FIRST = {"subjects": 5000, "window": "first"}
# 18 epochs: as many as the longest of the recorded runs that the study repeats.
FREEZING_STUDIES: dict[str, FreezingStudyConfig] = {
    **{name: _study(name, name, data=_FIRST, train={"epochs": 18}) for name in ("small", "medium", "large")},
    "quick": _study(
        "quick",
        "small",
        seeds=1,
        data={"subjects": 1000, "window": "first"},
        optimizer={"learning_rate": 1e-3, "schedule": "constant"},
        train={"epochs": 10, "batch_size": 32},
    ),
}


def freezing_study_command(arguments: Sequence[str]) -> int:
    """Run the freezing study; ``--quick`` is short for ``--config quick``. As :func:`run_command`."""
    study = Command(
        FreezingStudyConfig,
        f"{__name__}:freezing_study",
        named=FREEZING_STUDIES,
        default="large",
        status=itemgetter(1),
    )
    spelt_out = [part for a in arguments for part in (("--config", "quick") if a == "--quick" else (a,))]
    return run_command(study, spelt_out, prog="freezing_study.py")

"""The freezing study: the same model under each regime, on the same data, compared.

What it must show is known from the history of the mistakes that it repeats: with embeddings and head
frozen at random values the loss stays near ln(codes), whatever the adapters do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from behrt_jax.config import FreezingStudyConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.tracking.run_folder import (
    CONFIG_FILE,
    SUMMARY_FILE,
    read_json,
    write_json,
    write_text,
)
from behrt_jax.tracking.study_plots import plot_study
from behrt_jax.tracking.study_results import read_run, summarise_cells
from behrt_jax.tracking.study_text import study_text
from behrt_jax.tracking.study_verdicts import judge
from behrt_jax.workflows.pretrain import pretrain
from behrt_jax.workflows.run_settings import settings
from behrt_jax.workflows.study_cost import measure_costs
from behrt_jax.workflows.study_runs import cells_of, config_of, regime_config

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

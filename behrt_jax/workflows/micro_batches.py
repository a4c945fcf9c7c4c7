"""Into how many parts a run cuts its batches: as asked, as the run began, or as is fastest here."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from behrt_jax.config import PretrainConfig
from behrt_jax.data.batches import TrainingBatches, with_rows_a_multiple_of
from behrt_jax.tracking.run_folder import CONFIG_FILE, read_json
from behrt_jax.training.compilation import default_folder, host_fingerprint
from behrt_jax.training.mesh import put_rows
from behrt_jax.training.micro_batches import candidates, even_rows, fastest, likely_parts, remembered
from behrt_jax.training.update import TrainState

SEARCH_FROM = 2000
"""Steps of a run from which on a search pays: it compiles and times up to four programs."""


def rows_multiple(batches: TrainingBatches, mesh: Mesh, parts: int) -> int:
    """Of what number the rows of each batch are made a multiple: all devices and parts alike, evenly."""
    shares = mesh.size * parts
    rows, platform = -(-batches.rows_per_batch // shares), mesh.devices.flat[0].platform
    return shares * even_rows(rows, batches.row_length, platform)


def choose_micro_batches(
    config: PretrainConfig,
    folder: Path,
    batches: TrainingBatches,
    mesh: Mesh,
    total_steps: int,
    vocabulary_size: int,
    program: Callable[[int], Callable[[TrainState, Any], tuple[TrainState, Any]]],
    first_state: Callable[[], TrainState],
    log: Callable[[str], None],
) -> int:
    """Number of micro-batches of the run.

    A run that is resumed keeps the number that it began with, so that it goes on bit for bit.

    Args:
        config: `train.micro_batches` is taken where it is given.
        folder: of the run.
        batches: of the train split, whatever their rows are a multiple of.
        mesh: the devices.
        total_steps: of the run; a short one takes a rule in place of a search.
        vocabulary_size: of the model.
        program: number of micro-batches -> jitted step that uses its state up.
        first_state: makes a state to try steps on.
        log: told what was measured.
    """
    if config.train.micro_batches is not None:
        return config.train.micro_batches
    if config.resume and (folder / CONFIG_FILE).is_file():
        began_with = read_json(folder / CONFIG_FILE)["facts"].get("micro_batches")
        if began_with is not None:
            return began_with
    rows = -(-batches.rows_per_batch // mesh.size)
    model, platform = config.model, mesh.devices.flat[0].platform
    likely = likely_parts(rows, batches.row_length, model.ffn_size or 4 * model.hidden_size, platform)
    if total_steps < SEARCH_FROM or jax.process_count() > 1:
        return likely
    settings = {name: asdict(config)[name] for name in ("model", "lora", "freezing", "masking", "mesh")}
    settings |= {"rows": rows, "row_length": batches.row_length, "vocabulary_size": vocabulary_size}
    machine = {
        "devices": [device.device_kind for device in mesh.devices.flat],
        "host": host_fingerprint(),
        "jax": jax.__version__,
    }

    def make_trial(parts: int) -> Callable[[], Any]:
        batch = put_rows(with_rows_a_multiple_of(batches, rows_multiple(batches, mesh, parts)).batch(0), mesh)
        step, state = program(parts), first_state()

        def trial() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return state.step, metrics

        return trial

    return remembered(
        default_folder().parent / "micro_batches.json",
        {"settings": settings, "machine": machine},
        lambda: fastest(candidates(rows, likely), make_trial, log),
    )

"""The number of parts into which a step cuts its batch: asked for, or found by trying, once for each machine.

On a CPU a part whose activations fit the cache is up to twice as fast as the whole batch; on a GPU the
largest part that fits the memory is the fastest. The result of a step does not depend on it, up to rounding.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.batches import TrainingBatches
from behrt_jax.data.questions import QuestionBatches
from behrt_jax.files import JsonObject, write_text
from behrt_jax.run_folder import CONFIG_FILE, read_document
from behrt_jax.training.devices import put_rows
from behrt_jax.training.feeding import one_step
from behrt_jax.training.runtime import default_folder, host_fingerprint
from behrt_jax.training.state import Assembly

CACHED_BYTES = 2**22
"""Without a search, a CPU's parts are such that the widest activation takes about this much."""
EVEN_TOKENS = 512
"""On an accelerator the tokens of a part are a multiple of this, see :func:`even_rows`."""
MOST_EMPTY = 1 / 16
"""Of the rows of a part, how many may be empty for that."""
MOST_CANDIDATES = 4
TIMED_STEPS = 3


def likely_parts(rows: int, row_length: int, ffn_size: int, platform: str) -> int:
    """Number of parts that is taken where a search would not pay.

    Args:
        rows: of a batch, on one device.
        row_length: tokens of a row.
        ffn_size: width of the widest activation.
        platform: of the device, such as ``cpu``.
    """
    if platform != "cpu":
        return 1
    rows_of_part = max(1, CACHED_BYTES // (4 * ffn_size * row_length))
    return -(-rows // rows_of_part)


def even_rows(rows: int, row_length: int, platform: str) -> int:
    """Of what number the rows of a part are best a multiple, filled up with empty ones.

    An accelerator cuts sums over all tokens, which the gradients of all weights are, into parts of a power
    of two, and copies what does not divide: measured on an H200, 13 % of a step of `large` in 123 rows of
    200 tokens, none in 128. So the tokens of a part are brought to a multiple of 512, or of the largest
    power of two below for which at most a sixteenth of the rows is empty.

    Args:
        rows: of a part of a batch, on one device.
        row_length: tokens of a row.
        platform: of the device, such as ``cpu``.
    """
    if platform == "cpu":
        return 1
    multiple = EVEN_TOKENS // math.gcd(EVEN_TOKENS, row_length)
    while -(-rows // multiple) * multiple > rows * (1 + MOST_EMPTY):
        multiple //= 2
    return multiple


def candidates(rows: int, likely: int) -> list[int]:
    """Numbers of parts to try, ascending: around the likely one, none with less than a row a part.

    Each gives parts of as equal a size as can be, so that few empty rows fill the last one.
    """
    tried = {1, likely} | {round(likely * factor) for factor in (0.5, 2)}
    return sorted({-(-rows // -(-rows // min(max(parts, 1), rows))) for parts in tried})[:MOST_CANDIDATES]


def fastest(
    parts: Sequence[int], make_trial: Callable[[int], Callable[[], Any]], log: Callable[[str], None]
) -> int:
    """Time a step with each number of parts and return the best.

    Args:
        parts: see :func:`candidates`.
        make_trial: compiles a step with so many parts, and returns what runs it once.
        log: told what was measured, in one line.

    Raises:
        RuntimeError: not one of them runs, for want of memory; the last one's error.
    """
    seconds: dict[int, float] = {}
    failure: Exception | None = None
    for count in parts:
        try:
            trial = make_trial(count)
            jax.block_until_ready(trial())
            times = []
            for _ in range(TIMED_STEPS):
                started = time.perf_counter()
                jax.block_until_ready(trial())
                times.append(time.perf_counter() - started)
            seconds[count] = min(times)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            failure = error
    if not seconds:
        raise RuntimeError("a step does not fit the memory with any number of micro-batches") from failure
    best = min(seconds, key=seconds.__getitem__)
    measured = ", ".join(f"{count}: {1e3 * value:,.0f} ms" for count, value in seconds.items())
    log(f"Micro-batches a step: {best} (measured {measured}).")
    return best


def remembered(file: Path, key: JsonObject, find: Callable[[], int]) -> int:
    """Return what `find` returned earlier for the same key, kept in a JSON file; a file that cannot be read
    or written is no error.

    Args:
        file: of earlier answers.
        key: all that the answer depends on, ready for JSON.
        find: called where there is no answer yet.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    known = _read(file)
    if isinstance(known.get(name), int):
        return known[name]
    answer = find()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**_read(file), name: answer}, indent=1) + "\n")
    except OSError:
        pass
    return answer


def _read(file: Path) -> JsonObject:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


SEARCH_FROM = 2000
"""Steps of a run from which on a search pays: it compiles and times up to four programs."""


def rows_multiple(batches: TrainingBatches | QuestionBatches, mesh: Mesh, parts: int) -> int:
    """Of what number the rows of each batch are made a multiple: all devices and parts alike, evenly."""
    shares = mesh.size * parts
    rows, platform = -(-batches.rows_per_batch // shares), mesh.devices.flat[0].platform
    return shares * even_rows(rows, batches.row_length, platform)


def choose_micro_batches(
    config: PretrainConfig,
    folder: Path,
    batches: TrainingBatches | QuestionBatches,
    total_steps: int,
    assembly: Assembly,
    log: Callable[[str], None],
) -> int:
    """Number of micro-batches of the run.

    A run that is resumed keeps the number that it began with, so that it goes on bit for bit.

    Args:
        config: `train.micro_batches` is taken where it is given.
        folder: of the run.
        batches: of the train split, whatever their rows are a multiple of.
        total_steps: of the run; a short one takes a rule in place of a search.
        assembly: of the run, whose steps are tried.
        log: told what was measured.
    """
    if config.train.micro_batches is not None:
        return config.train.micro_batches
    if config.resume and (folder / CONFIG_FILE).is_file():
        began_with = read_document(folder, CONFIG_FILE).get("facts", {}).get("micro_batches")
        if began_with is not None:
            return began_with
    mesh = assembly.mesh
    rows = -(-batches.rows_per_batch // mesh.size)
    model, platform = config.model, mesh.devices.flat[0].platform
    likely = likely_parts(rows, batches.row_length, model.inner_size, platform)
    if total_steps < SEARCH_FROM or jax.process_count() > 1:
        return likely
    settings = {name: asdict(config)[name] for name in ("model", "lora", "freezing", "masking", "mesh")}
    settings |= {"objective": config.objective, "questions": config.queries.questions}
    vocabulary_size = assembly.setup.predictor.model.vocabulary_size
    settings |= {"rows": rows, "row_length": batches.row_length, "vocabulary_size": vocabulary_size}
    machine = {
        "devices": [device.device_kind for device in mesh.devices.flat],
        "host": host_fingerprint(),
        "jax": jax.__version__,
    }

    def make_trial(parts: int) -> Callable[[], Any]:
        batch = put_rows(batches.with_rows_a_multiple_of(rows_multiple(batches, mesh, parts)).batch(0), mesh)
        step, state = one_step(assembly, assembly.step(parts)), assembly.first_state()

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

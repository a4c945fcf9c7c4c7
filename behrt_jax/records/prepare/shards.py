"""Reading on several processes of one machine, and by independent jobs that are merged afterwards."""

import json
import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from behrt_jax.config import PrepareConfig
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, work_folder
from behrt_jax.records.prepare.manifest import describe_counts, input_files
from behrt_jax.records.prepare.spill import Reading, Spill, Told, spill_units
from behrt_jax.records.sources.source import Source


def spill_in_parallel(
    source: Source, units: Sequence[int], reading: Reading, folder: Path, workers: int, told: Told
) -> list[Spill]:
    """Read units with as many processes as ``workers``; each of them takes every n-th unit.

    Args:
        source: what to read; with several workers a copy of it goes to each process.
        units: which of its units.
        reading: how.
        folder: new folder; each process makes one of its own in it.
        workers: processes; one reads in this process.
        told: progress in units.
    """
    workers = max(1, min(workers, len(units)))
    folder.mkdir()
    if workers == 1:
        return [spill_units(source, units, reading, folder / "0", lambda done: told(done, len(units)))]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(spill_units, source, units[worker::workers], reading, folder / str(worker)): worker
            for worker in range(workers)
        }
        done = 0
        for job in as_completed(jobs):
            job.result()
            done += len(units[jobs[job] :: workers])
            told(done, len(units))
    return [job.result() for job in jobs]


def parse_shard(shard: str) -> tuple[int, int]:
    """Index and number of shards of ``i/n``.

    Raises:
        InputError: it is not of that form, or out of range.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not int(found[1]) < int(found[2]):
        raise InputError(f"shard is {shard!r}: give i/n, with i from 0 to n - 1.")
    return int(found[1]), int(found[2])


def shards_folder(output: Path) -> Path:
    """Where jobs with ``shard`` leave what they have read."""
    return output.with_name(f"{output.name}.shards")


def read_shard(
    source: Source, config: PrepareConfig, reading: Reading, options: JsonObject, told: Told
) -> JsonObject:
    """Do the shard of ``config.shard``: units i, i + n, i + 2n ... of the source.

    Returns:
        Its counts, ready for JSON.

    Raises:
        InputError: the shard is there already; no output is given.
    """
    if config.shard is None or config.output is None:
        raise InputError("shard needs an output: give the folder that merge is to write.")
    index, shards = parse_shard(config.shard)
    folder = shards_folder(config.output)
    place = folder / f"{index}-of-{shards}"
    if place.exists():
        raise InputError(f"{place} is there already: remove it to read this shard again.")
    folder.mkdir(parents=True, exist_ok=True)
    with work_folder(folder, f"reading-{place.name}") as temporary:
        work = temporary / "shard"
        units = range(source.units())[index::shards]
        spills = spill_in_parallel(source, units, reading, work, config.workers, told)
        (work / "reading.json").write_text(json.dumps(_identity(source, config, reading, options)))
        work.replace(place)
    counts = [describe_counts(spill.counts) for spill in spills]
    return {"shard": config.shard, "units": len(units), "events": counts}


def load_shards(source: Source, config: PrepareConfig, reading: Reading, options: JsonObject) -> list[Spill]:
    """What the jobs with ``shard`` have left beside the output.

    Raises:
        InputError: a shard is missing, or was read with other options or of another input.
    """
    if config.output is None:
        raise InputError("merge needs an output: give the one that the shards were read for.")
    folder = shards_folder(config.output)
    found = [re.fullmatch(r"(\d+)-of-(\d+)", place.name) for place in folder.glob("*-of-*")]
    pairs = {(int(match[1]), int(match[2])) for match in found if match}
    if not pairs:
        raise InputError(f"{folder} holds no shards: run prepare with shard 0/n, 1/n ... first.")
    numbers = sorted({shards for _, shards in pairs})
    if len(numbers) > 1:
        cuts = " and ".join(map(str, numbers))
        raise InputError(f"{folder} holds shards of different cuts ({cuts}): remove those of all but one.")
    shards = numbers[0]
    missing = [str(index) for index in range(shards) if (index, shards) not in pairs]
    if missing:
        raise InputError(
            f"{folder} has no shard {', '.join(missing)} of {shards}: run prepare with shard "
            f"{missing[0]}/{shards}, then merge again."
        )
    identity = json.loads(json.dumps(_identity(source, config, reading, options)))
    spills = []
    for index in range(shards):
        place = folder / f"{index}-of-{shards}"
        if json.loads((place / "reading.json").read_text()) != identity:
            raise InputError(
                f"{place} was read with other options or of another input: remove it and read it again."
            )
        spills += [Spill.load(part) for part in sorted(place.iterdir()) if part.is_dir()]
    return spills


def _identity(source: Source, config: PrepareConfig, reading: Reading, options: JsonObject) -> JsonObject:
    """What must be the same for all shards."""
    files = input_files(source, config.input)
    return {"options": options, "files": files, "boundaries": reading.boundaries.tolist()}

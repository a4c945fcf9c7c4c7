"""The shards of a MEDS folder cut into units that are read by themselves."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from behrt_jax.data.sources.parquet_ranges import column_range
from behrt_jax.data.sources.source import CHUNK_ROWS


@dataclass(frozen=True)
class Unit:
    """Some row groups of a shard, about ``CHUNK_ROWS`` rows together."""

    shard: Path
    row_groups: tuple[int, ...]
    rows: int
    subjects: tuple[int, int] | None
    """Smallest and largest id, where the footer tells."""


def cut_units(shard: Path, metadata: pq.FileMetaData) -> list[Unit]:
    """Cut a shard into runs of row groups that fill ``CHUNK_ROWS`` as far as they can."""
    runs: list[list[int]] = []
    rows = CHUNK_ROWS  # of the last run
    for group in range(metadata.num_row_groups):
        more = metadata.row_group(group).num_rows
        if rows + more > CHUNK_ROWS:
            runs.append([])
            rows = 0
        runs[-1].append(group)
        rows += more
    return [
        Unit(
            shard,
            tuple(run),
            sum(metadata.row_group(group).num_rows for group in run),
            column_range(metadata, run, "subject_id"),
        )
        for run in runs
    ]

"""A source of events that lie in memory, cut into units and chunks as a test wishes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import EventCounts
from behrt_jax.records.sources.source import Source


@dataclass
class MemorySource(Source):
    """Tables that are there already."""

    tables: list[list[pa.Table]]
    """Chunks of each unit."""
    given_splits: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    input_files: list[Path] = field(default_factory=list)
    sample: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    name: str = "memory"
    ranges: np.ndarray | None = None

    def files(self) -> list[Path]:
        return self.input_files

    def units(self) -> int:
        return len(self.tables)

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        for table in self.tables[unit]:
            counts.read += table.num_rows
            yield table

    def splits(self) -> dict[str, np.ndarray]:
        return self.given_splits

    def descriptions(self) -> dict[str, str]:
        return self.texts

    def subject_ranges(self) -> np.ndarray | None:
        return self.ranges

    def sample_subjects(self) -> np.ndarray:
        return self.sample

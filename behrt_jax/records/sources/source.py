"""What a source of events offers to the preparation: independent units, read in bounded pieces."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import EventCounts

"""Most rows of a table that a source yields at once: what bounds its memory."""


class Source(Protocol):
    """A stored data set, opened: its metadata is checked, its events are not read yet.

    Opening raises `InputError` for whatever can be told without reading all events: missing files
    and columns, splits that overlap. Reading raises it for the rest.
    """

    name: str
    """meds, omop, synthea or table."""

    def files(self) -> list[Path]:
        """Every input file, in a fixed order: what the data set's fingerprint covers."""
        ...

    def units(self) -> int:
        """How many parts can be read independently of each other (a shard, a table, a file of one)."""
        ...

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit in tables of at most `CHUNK_ROWS` rows, in any order.

        Columns and types are those of `events.EVENT_SCHEMA`, with `visit_id` where the source knows
        visits. Births and deaths are events with the codes MEDS_BIRTH and MEDS_DEATH. `counts.read`
        grows by every row read; rows that cannot become events are dropped and counted there (null
        code, no subject of that id, ...), changed ones too (month of birth filled in, ...).
        """
        ...

    def subject_ranges(self) -> np.ndarray | None:
        """Smallest and largest subject id of each unit, int64 ``[units, 2]``, where the source knows them
        without reading; else None. Where units do not overlap, nothing has to be sorted by subject.
        """
        ...

    def splits(self) -> dict[str, np.ndarray]:
        """Split name -> int64 subject ids, where the source has splits; else empty."""
        ...

    def descriptions(self) -> dict[str, str]:
        """Code -> text, for whatever codes the source has texts of. Called after reading."""
        ...

    def learned(self) -> dict[str, Any]:
        """What reading has taught this object that `descriptions` needs, ready for JSON."""
        ...

    def learn(self, learned: Mapping[str, Any]) -> None:
        """Take over what another object of the same source has `learned`, which read other units."""
        ...

    def sample_subjects(self) -> np.ndarray:
        """int64 ids of some or all subjects (repeats allowed), spread as the events are: they only
        decide how the work is cut, never what comes out.
        """
        ...

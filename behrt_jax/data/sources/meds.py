"""Events from a folder in the Medical Event Data Standard.

Read are ``data/**/*.parquet`` (shards, at any depth), ``metadata/subject_splits.parquet`` and
``metadata/codes.parquet``; versions 0.3.3 and 0.4 of the standard agree on what is taken from them.
Source: https://github.com/Medical-Event-Data-Standard/meds.

What is met in the wild beside the standard, and taken: times in other units, births and deaths called
DOB, DOD or MEDS_BIRTH//..., columns of any other name, no metadata, rows in any order, a subject in
several shards, shards without rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import SPLITS, EventCounts, EventSet
from behrt_jax.data.sequences import MEDS_CODES
from behrt_jax.data.sources import meds_files, meds_metadata
from behrt_jax.data.sources.meds_units import Unit, cut_units
from behrt_jax.data.splits import split_index
from behrt_jax.errors import InputError

DEFAULT_CODES = MEDS_CODES
"""Patterns of the codes to take where none are given: diagnoses, procedures and medications."""
_SAMPLED_GROUPS = 64
_SAMPLED_ROWS = 1 << 17


@dataclass(eq=False)
class MedsSource:
    """An opened MEDS folder; a :class:`~behrt_jax.data.sources.source.Source`.

    Events whose subject is in no split come out too: leaving them out is up to the reader.
    """

    path: Path
    visit_column: str | None
    shards: tuple[Path, ...]
    parts: tuple[Unit, ...]
    subjects_by_split: dict[str, np.ndarray]
    texts: dict[str, str]
    name: str = "meds"

    def files(self) -> list[Path]:
        """Shards by name, then the metadata that is read."""
        metadata = [_codes_file(self.path), _splits_file(self.path)]
        return [*self.shards, *(file for file in metadata if file.is_file())]

    def units(self) -> int:
        """Number of shards, large ones counted once for about every ``CHUNK_ROWS`` rows."""
        return len(self.parts)

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit; see :class:`~behrt_jax.data.sources.source.Source`.

        Times become microseconds without a zone (UTC where there was one; finer parts are cut off).
        Dropped: ``null code``. Changed: births and deaths under another name. The codes of a table
        share one dictionary.

        Raises:
            InputError: a shard is damaged, has a null subject id or values that do not fit.
        """
        part = self.parts[unit]
        return meds_files.read_events(part.shard, part.row_groups, self.visit_column, counts)

    def subject_ranges(self) -> np.ndarray | None:
        """As the shards' footers have them; see :class:`~behrt_jax.data.sources.source.Source`."""
        ranges = [part.subjects for part in self.parts if part.subjects is not None]
        return np.array(ranges, np.int64) if len(ranges) == len(self.parts) else None

    def splits(self) -> dict[str, np.ndarray]:
        """From ``subject_splits.parquet``, else from folders ``data/{train,tuning,held_out}``, else none."""
        return self.subjects_by_split

    def descriptions(self) -> dict[str, str]:
        """All texts of ``codes.parquet``, whether or not the code occurs."""
        return self.texts

    def learned(self) -> dict[str, Any]:
        """Nothing: descriptions do not depend on reading."""
        return {}

    def learn(self, learned: Mapping[str, Any]) -> None:
        """Nothing."""

    def sample_subjects(self) -> np.ndarray:
        """Ids of about 100,000 rows, int64, at even distances in a row group each of up to 64 units."""
        step = max(1, len(self.parts) // _SAMPLED_GROUPS)
        chosen = [  # the first row group of one unit, the second of the next one, ...
            (part.shard, part.row_groups[place % len(part.row_groups)], part.rows // len(part.row_groups))
            for place, part in enumerate(self.parts[::step])
        ]
        stride = max(1, sum(rows for *_, rows in chosen) // _SAMPLED_ROWS)
        ids = (ids for shard, group, _ in chosen for ids in meds_files.read_subject_ids(shard, (group,)))
        return np.concatenate([np.empty(0, np.int64), *(part[::stride] for part in ids)])


def open_meds(path: Path, visit_column: str | None = None) -> MedsSource:
    """Open a MEDS folder: everything is checked that shows without reading the events.

    Args:
        path: the folder that holds ``data/`` and, where there is any, ``metadata/``.
        visit_column: integer column to take as ``visit_id`` (``hadm_id`` in MIMIC); a shard without it
            has null visit ids.

    Raises:
        InputError: the folder, a file, a column, a type or the splits are missing or wrong, or there is
            no row; the message names which.
    """
    path = Path(path)
    shards = meds_files.find_shards(path)
    parts, columns = [], {}
    for shard in shards:
        with meds_files.open_parquet(shard) as opened:
            columns |= dict.fromkeys(opened.schema_arrow.names)
            if opened.metadata.num_rows:  # Writers give a shard without rows whatever types.
                meds_files.check_shard(shard, opened, visit_column)
                parts += cut_units(shard, opened.metadata)
    if visit_column is not None and visit_column not in columns:
        raise InputError(
            f"The option visit_column is {visit_column}, but no shard of {path / 'data'} has it: choose from "
            f"{', '.join(columns)}."
        )
    if not parts:
        raise _no_event(path)
    splits = _splits_file(path)
    codes = _codes_file(path)
    return MedsSource(
        path,
        visit_column,
        tuple(shards),
        tuple(parts),
        meds_metadata.read_splits(splits) if splits.is_file() else _splits_of_folders(path, shards, parts),
        meds_metadata.read_descriptions(codes) if codes.is_file() else {},
    )


def read_meds(path: Path, visit_column: str | None = None) -> EventSet:
    """Read all events of a MEDS folder, with its splits and the descriptions of its codes.

    As :func:`open_meds` and its source's ``read``, for data that fits into memory; events of a subject
    in no split are dropped too, and counted.

    Raises:
        InputError: as these two, and where no event is left.
    """
    source = open_meds(path, visit_column)
    counts = EventCounts()
    units = range(source.units())
    events = pa.concat_tables([table for unit in units for table in source.read(unit, counts)])
    if not events.num_rows:
        raise _no_event(source.path)
    if source.splits():
        assigned = split_index(events["subject_id"].to_numpy(), source.splits()) >= 0  # [N]
        counts.drop("subject in no split", int(np.count_nonzero(~assigned)))
        events = events.filter(pa.array(assigned))
        if not events.num_rows:
            raise InputError(
                f"No subject in {source.path / 'data'} is in a split: list them in "
                "metadata/subject_splits.parquet."
            )
    present = set(events["code"].unique().to_pylist())
    texts = {code: text for code, text in source.descriptions().items() if code in present}
    return EventSet(source.name, events.combine_chunks(), source.splits(), counts, texts)


def _splits_of_folders(path: Path, shards: list[Path], parts: list[Unit]) -> dict[str, np.ndarray]:
    data = path / "data"
    if not {shard.relative_to(data).parts[0] for shard in shards}.intersection(SPLITS):
        return {}
    splits = {}
    for name in SPLITS:
        chosen = [part for part in parts if part.shard.relative_to(data).parts[0] == name]
        ids = (ids for part in chosen for ids in meds_files.read_subject_ids(part.shard, part.row_groups))
        splits[name] = np.unique(np.concatenate([np.empty(0, np.int64), *(np.unique(part) for part in ids)]))
    return meds_metadata.check_splits(splits, data)


def _no_event(path: Path) -> InputError:
    return InputError(f"{path / 'data'} holds no event with a code: give a data set that is not empty.")


def _splits_file(path: Path) -> Path:
    return path / "metadata" / "subject_splits.parquet"


def _codes_file(path: Path) -> Path:
    return path / "metadata" / "codes.parquet"

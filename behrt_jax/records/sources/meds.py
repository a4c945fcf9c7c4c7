"""Events from a folder in the Medical Event Data Standard.

Read are ``data/**/*.parquet`` (shards, at any depth), ``metadata/subject_splits.parquet`` and
``metadata/codes.parquet``; versions 0.3.3 and 0.4 of the standard agree on what is taken from them.
Source: https://github.com/Medical-Event-Data-Standard/meds.

What is met in the wild beside the standard, and taken: times in other units, births and deaths called
DOB, DOD or MEDS_BIRTH//..., columns of any other name, no metadata, rows in any order, a subject in
several shards, shards without rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data import parquet
from behrt_jax.data.events import (
    BIRTH_CODE,
    DEATH_CODE,
    EVENT_SCHEMA,
    SPLITS,
    VISIT_FIELD,
    EventCounts,
    EventSet,
)
from behrt_jax.data.sequences import MEDS_CODES
from behrt_jax.data.splits import check_disjoint, split_index
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject
from behrt_jax.records.sources.files import Part, column_ranges, cut_parts
from behrt_jax.records.sources.source import Source

_SAMPLED_GROUPS = 64
_SAMPLED_ROWS = 1 << 17


def open_meds(path: Path, visit_column: str | None = None) -> "MedsSource":
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
    shards = find_shards(path)
    parts, ranges, columns = [], [], {}
    for shard in shards:
        with parquet.open_parquet(shard) as opened:
            columns |= dict.fromkeys(opened.schema_arrow.names)
            if opened.metadata.num_rows:  # Writers give a shard without rows whatever types.
                parquet.require_columns(shard, opened, _REQUIRED)
                # Types that cannot be events are refused.
                _convert(shard, opened.schema_arrow.empty_table(), visit_column)
                own = cut_parts(shard, opened.metadata, parquet.CHUNK_ROWS)
                parts += own
                ranges += column_ranges(opened.metadata, own, "subject_id")
    if visit_column is not None and visit_column not in columns:
        raise InputError(
            f"The option visit_column is {visit_column}, but no shard of {path / 'data'} has it: choose from "
            f"{', '.join(columns)}."
        )
    if not parts:
        raise _no_event(path)
    splits, codes = _splits_file(path), _codes_file(path)
    return MedsSource(
        path,
        visit_column,
        shards,
        parts,
        np.array(ranges, np.int64) if len(ranges) == len(parts) else None,
        read_splits(splits) if splits.is_file() else _splits_of_folders(path, shards, parts),
        read_descriptions(codes) if codes.is_file() else {},
    )


@dataclass(eq=False)
class MedsSource(Source):
    """An opened MEDS folder.

    Events whose subject is in no split come out too: leaving them out is up to the reader.
    """

    path: Path
    visit_column: str | None
    shards: list[Path]
    parts: list[Part]
    ranges: np.ndarray | None
    subjects_by_split: dict[str, np.ndarray]
    texts: dict[str, str]
    name = "meds"
    default_codes = MEDS_CODES

    def files(self) -> list[Path]:
        """Shards by name, then the metadata that is read."""
        metadata = [_codes_file(self.path), _splits_file(self.path)]
        return [*self.shards, *(file for file in metadata if file.is_file())]

    def options(self) -> JsonObject:
        """The column of visit ids."""
        return {"visit_column": self.visit_column}

    def units(self) -> int:
        """Number of shards, large ones counted once for about every ``CHUNK_ROWS`` rows."""
        return len(self.parts)

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit; see `source.Source.read`.

        Times become microseconds without a zone (UTC where there was one; finer parts are cut off).
        Dropped: ``null code``. Changed: births and deaths under another name. The codes of a table
        share one dictionary.

        Raises:
            InputError: a shard is damaged, has a null subject id or values that do not fit.
        """
        part = self.parts[unit]
        return read_events(part.file, part.row_groups, self.visit_column, counts)

    def subject_ranges(self) -> np.ndarray | None:
        """As the shards' footers have them."""
        return self.ranges

    def splits(self) -> dict[str, np.ndarray]:
        """From ``subject_splits.parquet``, else from folders ``data/{train,tuning,held_out}``, else none."""
        return self.subjects_by_split

    def descriptions(self) -> dict[str, str]:
        """All texts of ``codes.parquet``, whether or not the code occurs."""
        return self.texts

    def sample_subjects(self) -> np.ndarray:
        """Ids of about 100,000 rows, int64, at even distances in a row group each of up to 64 units."""
        step = max(1, len(self.parts) // _SAMPLED_GROUPS)
        chosen = [  # the first row group of one unit, the second of the next one, ...
            (part.file, part.row_groups[place % len(part.row_groups)], part.rows // len(part.row_groups))
            for place, part in enumerate(self.parts[::step])
        ]
        stride = max(1, sum(rows for *_, rows in chosen) // _SAMPLED_ROWS)
        ids = (ids for shard, group, _ in chosen for ids in read_subject_ids(shard, (group,)))
        return np.concatenate([np.empty(0, np.int64), *(part[::stride] for part in ids)])


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


def _splits_of_folders(path: Path, shards: list[Path], parts: list[Part]) -> dict[str, np.ndarray]:
    data = path / "data"
    if not {shard.relative_to(data).parts[0] for shard in shards}.intersection(SPLITS):
        return {}
    splits = {}
    for name in SPLITS:
        chosen = [part for part in parts if part.file.relative_to(data).parts[0] == name]
        ids = (ids for part in chosen for ids in read_subject_ids(part.file, part.row_groups))
        splits[name] = np.unique(np.concatenate([np.empty(0, np.int64), *(np.unique(part) for part in ids)]))
    return check_splits(splits, data)


def _no_event(path: Path) -> InputError:
    return InputError(f"{path / 'data'} holds no event with a code: give a data set that is not empty.")


def _splits_file(path: Path) -> Path:
    return path / "metadata" / "subject_splits.parquet"


def _codes_file(path: Path) -> Path:
    return path / "metadata" / "codes.parquet"


# The shards of a MEDS folder: found, opened, checked and turned into columns of the events table.

_REQUIRED = ("subject_id", "time", "code")


def find_shards(path: Path) -> list[Path]:
    """Every shard below ``path/data``, at any depth, in order of its name.

    Raises:
        InputError: no such folder, or no shard in it.
    """
    if not (path / "data").is_dir():
        what = "has no folder data/ in it" if path.is_dir() else "is not a folder"
        raise InputError(
            f"{path} {what}: set data.path (or --input of prepare) to a MEDS folder, which holds data/ and "
            "metadata/."
        )
    files = sorted((path / "data").rglob("*.parquet"))
    shards = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not shards:
        raise InputError(f"{path / 'data'} holds no .parquet file: put the data set's shards there.")
    return shards


def read_events(
    file: Path, row_groups: tuple[int, ...], visit_column: str | None, counts: EventCounts
) -> Iterator[pa.Table]:
    """Read row groups of a shard as events, in tables of at most ``CHUNK_ROWS`` rows.

    Only the columns of the events table are read. Rows with a null code are dropped, and other names
    of the markers of birth and death changed to the standard's; ``counts`` has them all.

    Raises:
        InputError: damage, a null subject id, or a value that does not fit.
    """
    with parquet.open_parquet(file) as opened:
        wanted = [*_REQUIRED, "numeric_value", *([visit_column] if visit_column is not None else [])]
        columns = [column for column in dict.fromkeys(wanted) if column in opened.schema_arrow.names]
        for table in parquet.read_tables(file, opened, row_groups, columns):
            counts.read += table.num_rows
            events = _convert(file, table, visit_column)
            if events["subject_id"].null_count:
                every = parquet.read_columns(file, opened, ["subject_id"])
                parquet.refuse_nulls(file, "subject_id", every["subject_id"])
            nulls = events["code"].null_count
            counts.drop("null code", nulls)
            if nulls:
                events = events.filter(events["code"].is_valid())
            yield with_standard_markers(events.unify_dictionaries(), counts)


def read_subject_ids(file: Path, row_groups: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Subject ids of row groups of a shard, int64 arrays of at most ``CHUNK_ROWS``; nulls are left out."""
    with parquet.open_parquet(file) as opened:
        for table in parquet.read_tables(file, opened, row_groups, ["subject_id"]):
            ids = parquet.cast_column(file, "subject_id", table["subject_id"], pa.int64())
            yield ids.drop_null().to_numpy()


def _convert(file: Path, table: pa.Table, visit_column: str | None) -> pa.Table:
    """The columns of the events table, in its types; null where the shard has none."""
    wanted = {field.name: (field.name, field.type) for field in EVENT_SCHEMA}
    if visit_column is not None:
        wanted[VISIT_FIELD.name] = (visit_column, VISIT_FIELD.type)
    return pa.table(
        {
            name: parquet.cast_column(file, column, table[column], kind)
            if column in table.column_names
            else pa.nulls(table.num_rows, kind)
            for name, (column, kind) in wanted.items()
        }
    )


# Codes of births and deaths that MEDS data sets write in their own way.

_OTHER_MARKER = f"^({BIRTH_CODE}//|{DEATH_CODE}//|DO[BD]$)"


def with_standard_markers(events: pa.Table, counts: EventCounts) -> pa.Table:
    """Call births MEDS_BIRTH and deaths MEDS_DEATH where they have another name, and count them.

    Some data sets write DOB and DOD, or add detail after the standard's code (MEDS_BIRTH//...). All
    chunks of ``events`` share one dictionary of codes.
    """
    codes = events["code"]
    if not codes.num_chunks:
        return events
    dictionary = codes.chunk(0).dictionary
    pattern = pc.MatchSubstringOptions(_OTHER_MARKER)
    other = pc.call_function("match_substring_regex", [dictionary], pattern).to_numpy(zero_copy_only=False)
    if not other.any():
        return events
    names = dictionary.to_pylist()
    renamed = {int(place): _marker(names[place]) for place in np.flatnonzero(other)}
    for place, to in renamed.items():
        names[place] = to
    distinct = list(dict.fromkeys(names))
    places = {name: place for place, name in enumerate(distinct)}
    new_place = pa.array([places[name] for name in names], pa.int32())  # [old dictionary]
    chunks = []
    for chunk in codes.chunks:
        used = np.bincount(chunk.indices.to_numpy(), minlength=len(names))  # [old dictionary]
        for place, to in renamed.items():
            counts.change(f"other code of birth or death -> {to}", int(used[place]))
        chunks.append(pa.DictionaryArray.from_arrays(new_place.take(chunk.indices), pa.array(distinct)))
    return events.set_column(events.column_names.index("code"), "code", pa.chunked_array(chunks))


def _marker(code: str) -> str:
    """The standard's code for a birth or death under another name."""
    return BIRTH_CODE if code == "DOB" or code.startswith(BIRTH_CODE) else DEATH_CODE


# The metadata of a MEDS folder: the splits of its subjects and the descriptions of its codes.


def read_splits(file: Path) -> dict[str, np.ndarray]:
    """Split name -> ascending int64 subject ids, as ``subject_splits.parquet`` has them.

    Raises:
        InputError: damage, wrong columns or names, a subject in two splits, no train split.
    """
    with parquet.open_parquet(file) as opened:
        parquet.require_columns(file, opened, ("subject_id", "split"))
        table = parquet.read_columns(file, opened, ["subject_id", "split"])
    ids = parquet.cast_column(file, "subject_id", table["subject_id"], pa.int64())
    parquet.refuse_nulls(file, "subject_id", ids)
    names = parquet.cast_column(file, "split", table["split"], parquet.TEXT).cast(pa.string())
    parquet.refuse_nulls(file, "split", names)
    unknown = sorted(set(names.unique().to_pylist()).difference(SPLITS))
    if unknown:
        raise InputError(f"{file} names the splits {', '.join(unknown)}: use {', '.join(SPLITS)}.")
    ids, names = ids.to_numpy(), names.to_numpy()  # [S]
    return check_splits({name: np.unique(ids[names == name]) for name in SPLITS}, file)


def check_splits(splits: dict[str, np.ndarray], where: Path) -> dict[str, np.ndarray]:
    """Refuse splits that share subjects or lack a train split; else give them back."""
    check_disjoint(splits, str(where))
    if not len(splits["train"]):
        raise InputError(f"{where} has no train split: put subjects into one called train.")
    return splits


def read_descriptions(file: Path) -> dict[str, str]:
    """Code -> text, as ``codes.parquet`` has them; a file without texts gives none.

    Raises:
        InputError: damage or wrong columns.
    """
    with parquet.open_parquet(file) as opened:
        if "description" not in opened.schema_arrow.names:
            return {}
        parquet.require_columns(file, opened, ("code",))
        table = parquet.read_columns(file, opened, ["code", "description"])
    codes = parquet.cast_column(file, "code", table["code"], parquet.TEXT)
    texts = parquet.cast_column(file, "description", table["description"], parquet.TEXT)
    rows = zip(codes.to_pylist(), texts.to_pylist(), strict=True)
    return {code: text for code, text in rows if text is not None and code is not None}

"""Events from a folder in the Medical Event Data Standard.

Read are ``data/**/*.parquet`` (shards, at any depth, as `files.data_files` finds them),
``metadata/subject_splits.parquet`` and ``metadata/codes.parquet``; versions 0.3.3 and 0.4 of the standard
agree on what is taken from them. Source: https://github.com/Medical-Event-Data-Standard/meds.

What is met in the wild beside the standard, and taken: times in other units, births and deaths called
DOB, DOD or MEDS_BIRTH//..., columns of any other name, no metadata, no folder data/ around the shards, rows
in any order, a subject in several shards, shards without rows, visit ids in text, whole numbers as floats.

Splits are those of the split file, else of folders (or files) called train, tuning and held_out. Where any
is called so, or as other tools call such splits (test, validation, TRAIN, split=train), each shard must be in
one that is known: else subjects of a test set would be trained on.
"""

import re
from collections.abc import Iterator, Sequence
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
from behrt_jax.files import JsonObject, data_files, refuse_versions
from behrt_jax.records.sources.columns import is_text, text_ids
from behrt_jax.records.sources.files import Part, column_ranges, cut_parts
from behrt_jax.records.sources.source import Source

_SAMPLED_GROUPS = 64
_SAMPLED_ROWS = 1 << 17


def open_meds(
    path: Path,
    visit_column: str | None = None,
    split_names: Sequence[str] = (),
    needs_train: bool = True,
) -> "MedsSource":
    """Open a MEDS folder: everything is checked that shows without reading the events.

    Args:
        path: the folder that holds ``data/`` and, where there is any, ``metadata/``; or the shards' own.
        visit_column: column to take as ``visit_id`` (``hadm_id`` in MIMIC), integers or text; a shard
            without it has null visit ids.
        split_names: ``NAME=SPLIT`` for folders, or rows of the split file, that call a split otherwise.
        needs_train: where there are splits, the train split must have subjects.

    Raises:
        InputError: the folder, a file, a column, a type or the splits are missing or wrong, or there is
            no row; the message names which.
    """
    path = Path(path)
    names = parse_split_names(split_names)
    data, metadata = meds_folders(path)
    shards = find_shards(path, data, metadata)
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
                ranges += column_ranges(opened, own, "subject_id")
    if visit_column is not None and visit_column not in columns:
        raise InputError(
            f"The option visit_column is {visit_column}, but no shard of {data} has it: choose from "
            f"{', '.join(columns)}."
        )
    if not parts:
        raise _no_event(data)
    splits, codes = metadata_file(metadata, "subject_splits"), metadata_file(metadata, "codes")
    dealt = splits_of_folders(data, shards, parts, names) if splits is None else read_splits(splits, names)
    if needs_train and dealt and not len(dealt["train"]):
        raise InputError(f"{splits or data} has no train split: put subjects into one called train.")
    return MedsSource(
        data,
        visit_column,
        shards,
        [file for file in (codes, splits) if file is not None],
        parts,
        np.array(ranges, np.int64) if len(ranges) == len(parts) else None,
        dealt,
        read_descriptions(codes) if codes is not None else {},
    )


@dataclass(eq=False)
class MedsSource(Source):
    """An opened MEDS folder.

    Events whose subject is in no split come out too: leaving them out is up to the reader.
    """

    data: Path
    """The folder of the shards."""
    visit_column: str | None
    shards: list[Path]
    metadata: list[Path]
    parts: list[Part]
    ranges: np.ndarray | None
    subjects_by_split: dict[str, np.ndarray]
    texts: dict[str, str]
    name = "meds"
    births_from = "events of the code MEDS_BIRTH with a time, or of other codes by --birth_codes"
    default_codes = MEDS_CODES

    def files(self) -> list[Path]:
        """Shards by name, then the metadata that is read."""
        return [*self.shards, *self.metadata]

    def options(self) -> JsonObject:
        """The column of visit ids."""
        return {"visit_column": self.visit_column}

    def units(self) -> int:
        """Number of shards, large ones counted once for about every ``CHUNK_ROWS`` rows."""
        return len(self.parts)

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit; see `source.Source.read`.

        Times become microseconds without a zone; see `parquet.plain_times`.
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
        raise _no_event(source.data)
    if source.splits():
        assigned = split_index(events["subject_id"].to_numpy(), source.splits()) >= 0  # [N]
        counts.drop("subject in no split", int(np.count_nonzero(~assigned)))
        events = events.filter(pa.array(assigned))
        if not events.num_rows:
            raise InputError(
                f"No subject in {source.data} is in a split: list them in metadata/subject_splits.parquet."
            )
    present = set(events["code"].unique().to_pylist())
    texts = {code: text for code, text in source.descriptions().items() if code in present}
    return EventSet(source.name, events.combine_chunks(), source.splits(), counts, texts)


def _no_event(data: Path) -> InputError:
    return InputError(f"{data} holds no event with a code: give a data set that is not empty.")


# The shards of a MEDS folder: found, opened, checked and turned into columns of the events table.

_REQUIRED = ("subject_id", "time", "code")


def meds_folders(path: Path) -> tuple[Path, Path]:
    """The folders of shards and of metadata; ``path`` holds both, or is the first itself."""
    if (path / "data").is_dir():
        return path / "data", path / "metadata"
    beside = path.absolute().parent / "metadata"
    return path, beside if path.absolute().name == "data" and beside.is_dir() else path / "metadata"


def find_shards(path: Path, data: Path, metadata: Path) -> list[Path]:
    """Every shard below ``data``, at any depth, in order of its name.

    Raises:
        InputError: no such folder, no shard in it, or shards neither in ``data/`` nor in folders of splits.
    """
    refuse_versions(path)
    endings = (".parquet", ".pq", ".csv", ".csv.gz") if data != path else (".parquet",)
    files = data_files(data, endings) if data.is_dir() else []
    files = [file for file in files if metadata not in file.parents]
    # Without data/ shards lie here or in folders of splits: not anywhere below what may be another folder.
    here = any(file.parent == data or _like_split(_names_of(data, file)[0]) for file in files)
    if data == path and not here and not (files and metadata.is_dir()):
        what = "has no folder data/ in it" if path.is_dir() else "is not a folder"
        below = [folder.parent.name for folder in sorted(path.glob("*/data")) if folder.is_dir()]
        raise InputError(
            f"{path} {what}: set data.path (or --input of prepare) to a MEDS folder, which holds data/ and "
            f"metadata/{', as ' + ' and '.join(below) + ' in it does' if below else ''}."
        )
    if not files:
        raise InputError(f"{data} holds no .parquet file: put the data set's shards there.")
    if other := next((file for file in files if not file.name.lower().endswith(".parquet")), None):
        raise InputError(
            f"{other} is among the shards, but is not called .parquet: write it so, or move it away."
        )
    return files


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
        if visit_column in table.column_names and is_text(table[visit_column].type):
            texts = table[visit_column].combine_chunks()
            parquet.refuse_broken(file, visit_column, texts)
            place = table.column_names.index(visit_column)
            table = table.set_column(place, visit_column, pa.chunked_array([text_ids(texts)]))
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


def metadata_file(metadata: Path, name: str) -> Path | None:
    """``NAME.parquet`` in the folder of metadata; None where there is none.

    Raises:
        InputError: what is called so is a folder, or a link to what is not there.
    """
    file = metadata / f"{name}.parquet"
    if not file.is_file() and (file.exists() or file.is_symlink()):
        raise InputError(
            f"{file} is {'a folder' if file.exists() else 'a link to what is not there'}: make it a file."
        )
    return file if file.is_file() else None


def parse_split_names(split_names: Sequence[str]) -> dict[str, str]:
    """Name -> split, of ``NAME=SPLIT`` and the standard's own.

    Raises:
        InputError: an option is not of that form.
    """
    names = {split: split for split in SPLITS}
    for option in split_names:
        name, _, split = option.rpartition("=")
        if not name or split not in SPLITS:
            raise InputError(
                f"--splits.names has {option!r}: give NAME=SPLIT, SPLIT one of {', '.join(SPLITS)}."
            )
        names[name] = split
    return names


_SPLIT_LIKE = re.compile(
    r"(split=)?(?P<train>train(ing)?)|(split=)?(?P<tuning>tun(e|ing)|val|valid(ation)?|dev|eval)"
    r"|(split=)?(?P<held_out>test(ing)?|held[-_]?out|hold[-_]?out)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"[-_.]?\d+([-_.].*)?$")  # the end of train-00000-of-00001


def _like_split(name: str) -> str | None:
    """The split that a name is like, but for a number at its end."""
    like = _SPLIT_LIKE.fullmatch(_NUMBERED.sub("", name))
    return like and like.lastgroup


def _names_of(data: Path, shard: Path) -> list[str]:
    """Its folders', and its own without its number (train-00000-of-00004 is train)."""
    inside = shard.relative_to(data)
    folders = [re.sub(r"\.parquet$", "", name, flags=re.IGNORECASE) for name in inside.parts[:-1]]
    return [*folders, _NUMBERED.sub("", inside.stem) or inside.stem]


def splits_of_folders(
    data: Path, shards: Sequence[Path], parts: Sequence[Part], names: dict[str, str]
) -> dict[str, np.ndarray]:
    """Split name -> ascending int64 ids of the subjects in its shards; empty where no shard names a split.

    Raises:
        InputError: some shards are in folders of splits, or in what looks like one, and others not; a
            subject is in two splits; an option names what is not there.
    """
    called = {shard: _names_of(data, shard) for shard in shards}
    own = {shard: {names[name] for name in called[shard] if name in names} for shard in shards}
    _refuse_unused(names, {name for found in called.values() for name in found}, f"{data} has no folder")
    like = {
        shard: {name: split for name in called[shard] if name not in names and (split := _like_split(name))}
        for shard in shards
    }
    if not any(own.values()) and not any(like.values()):
        return {}
    stray = {}  # name of a folder, or of a shard beside such -> the split it may be
    for shard in shards:
        if len(own[shard]) != 1 or own[shard] != own[shard].union(like[shard].values()):
            stray |= like[shard] or {called[shard][0]: "SPLIT"}
    if stray:
        raise InputError(
            f"{data} holds {', '.join(sorted(stray))}, which is no split, beside or in place of "
            f"{', '.join(SPLITS)}: rename it, list its subjects in metadata/subject_splits.parquet, "
            "or prepare with "
            f"--splits.names {' '.join(f'{name}={split}' for name, split in sorted(stray.items())[:5])}."
        )
    splits = {}
    for split in SPLITS:
        chosen = [part for part in parts if split in own[part.file]]
        ids = (ids for part in chosen for ids in read_subject_ids(part.file, part.row_groups))
        splits[split] = np.unique(np.concatenate([np.empty(0, np.int64), *(np.unique(part) for part in ids)]))
    check_disjoint(splits, str(data))
    return splits


def _refuse_unused(names: dict[str, str], there: set[str], place: str) -> None:
    if unused := [name for name in names if name not in there and name not in SPLITS]:
        raise InputError(f"--splits.names gives {', '.join(unused)}, but {place} of that name: correct it.")


def read_splits(file: Path, split_names: dict[str, str] | None = None) -> dict[str, np.ndarray]:
    """Split name -> ascending int64 subject ids, as ``subject_splits.parquet`` has them.

    ``split_names`` are other names -> the split that is meant.

    Raises:
        InputError: damage, wrong columns or names, a subject in two splits.
    """
    with parquet.open_parquet(file) as opened:
        parquet.require_columns(file, opened, ("subject_id", "split"))
        table = parquet.read_columns(file, opened, ["subject_id", "split"])
    ids = parquet.cast_column(file, "subject_id", table["subject_id"], pa.int64())
    parquet.refuse_nulls(file, "subject_id", ids)
    column = parquet.cast_column(file, "split", table["split"], parquet.TEXT).cast(pa.string())
    parquet.refuse_nulls(file, "split", column)
    names = parse_split_names(()) | (split_names or {})
    there = set(column.unique().to_pylist())
    _refuse_unused(names, there, f"{file} has no split")
    if unknown := sorted(there.difference(names)):
        raise InputError(
            f"{file} names the splits {', '.join(unknown)}: use {', '.join(SPLITS)}, or prepare with "
            f"--splits.names {unknown[0]}=SPLIT."
        )
    ids, column = ids.to_numpy(), column.to_numpy()  # [S]
    splits = {
        split: np.unique(ids[np.isin(column, [name for name in names if names[name] == split])])
        for split in SPLITS
    }
    check_disjoint(splits, str(file))
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

"""Events from a folder in the Medical Event Data Standard.

Read are ``data/**/*.parquet`` (shards, at any depth), ``metadata/subject_splits.parquet`` and
``metadata/codes.parquet``; versions 0.3.3 and 0.4 of the standard agree on what is taken from them.
Source: https://github.com/Medical-Event-Data-Standard/meds.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from behrt_jax.data.events import EVENT_SCHEMA, SPLITS, VISIT_FIELD, EventCounts, EventSet
from behrt_jax.data.splits import check_disjoint, split_index
from behrt_jax.errors import InputError

_TEXT = EVENT_SCHEMA.field("code").type
_REQUIRED = ("subject_id", "time", "code")


def read_meds(path: Path, visit_column: str | None = None) -> EventSet:
    """Read all events of a MEDS folder, with its splits and the descriptions of its codes.

    Times become microseconds without a zone (UTC where there was one; finer parts are cut off). Splits
    come from ``subject_splits.parquet``, else from folders ``data/{train,tuning,held_out}``, else there
    are none. Events with a null code, or of a subject in no split, are dropped and counted. Columns
    beside the standard's are ignored.

    Args:
        path: the folder that holds ``data/`` and ``metadata/``.
        visit_column: integer column to take as ``visit_id`` (``hadm_id`` in MIMIC); a shard without it
            has null visit ids.

    Raises:
        InputError: the folder, a file, a column or the splits are missing or wrong; the message names
            which.
    """
    path = Path(path)
    shards = _shards(path)
    tables, columns = [], {}
    for shard in shards:
        with _open(shard) as file:
            columns |= dict.fromkeys(file.schema_arrow.names)
            tables.append(_read_shard(shard, file, visit_column))
    if visit_column is not None and visit_column not in columns:
        raise InputError(
            f"data.visit_column is {visit_column}, but no shard of {path / 'data'} has it: choose from "
            f"{', '.join(columns)}."
        )
    events = pa.concat_tables(tables)
    counts = EventCounts(read=events.num_rows)
    events = _drop(events, events["code"].is_valid(), "null code", counts)
    if not events.num_rows:
        raise InputError(f"{path / 'data'} holds no event with a code: give a data set that is not empty.")

    splits = _splits_of_file(path) or _splits_of_folders(path, shards, tables)
    if splits:
        assigned = split_index(events["subject_id"].to_numpy(), splits) >= 0  # [N]
        events = _drop(events, pa.array(assigned), "subject in no split", counts)
        if not events.num_rows:
            raise InputError(
                f"No subject in {path / 'data'} is in a split: list them in metadata/subject_splits.parquet."
            )
    return EventSet("meds", events.combine_chunks(), splits, counts, _descriptions(path, events))


def _shards(path: Path) -> list[Path]:
    if not (path / "data").is_dir():
        what = "has no folder data/ in it" if path.is_dir() else "is not a folder"
        raise InputError(f"{path} {what}: set data.path to a MEDS folder, which holds data/ and metadata/.")
    files = sorted((path / "data").rglob("*.parquet"))
    shards = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not shards:
        raise InputError(f"{path / 'data'} holds no .parquet file: put the data set's shards there.")
    return shards


def _open(file: Path) -> pq.ParquetFile:
    try:
        columns = [field.name for field in pq.read_schema(file) if not pt.is_nested(field.type)]
        texts = [name for name in columns if name in ("code", "split", "description")]
        return pq.ParquetFile(file, read_dictionary=texts)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file) from error


def _read(file: Path, opened: pq.ParquetFile, required: tuple[str, ...], optional: list[str]) -> pa.Table:
    names = opened.schema_arrow.names
    for column in required:
        if column not in names:
            raise InputError(
                f"{file} has no column {column}, which MEDS requires: add or rename it; the columns are "
                f"{', '.join(names)}."
            )
    try:
        return opened.read(columns=[*required, *(column for column in optional if column in names)])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file) from error


def _unreadable(file: Path) -> InputError:
    return InputError(f"{file} is no readable Parquet file (cut short, or another format): write it again.")


def _read_shard(file: Path, opened: pq.ParquetFile, visit_column: str | None) -> pa.Table:
    """Read one shard into the columns of the events table."""
    wanted = {field.name: (field.name, field.type) for field in EVENT_SCHEMA}
    if visit_column is not None:
        wanted[VISIT_FIELD.name] = (visit_column, VISIT_FIELD.type)
    table = _read(file, opened, _REQUIRED, [column for column, _ in wanted.values()])
    events = pa.table(
        {
            name: _cast(file, column, table[column], kind)
            if column in table.column_names
            else pa.nulls(table.num_rows, kind)
            for name, (column, kind) in wanted.items()
        }
    )
    _refuse_nulls(file, "subject_id", events["subject_id"])
    return events


def _cast(file: Path, column: str, values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    kind = values.type
    if pt.is_int64(target):
        fits, meant = pt.is_integer(kind), "integers"
    elif pt.is_timestamp(target):
        fits, meant = pt.is_timestamp(kind) or pt.is_date(kind), "timestamps or dates"
    elif pt.is_float32(target):
        fits, meant = pt.is_floating(kind) or pt.is_integer(kind), "numbers"
    else:
        fits, meant = kind == _TEXT, "strings"
    if not fits and not pt.is_null(kind):
        raise InputError(f"{file} has {kind} in the column {column}: write it as {meant}.")
    # Values and nanoseconds may lose their last digits; anything else must come through exactly.
    safe = not (pt.is_float32(target) or (pt.is_timestamp(kind) and kind.unit == "ns"))
    try:
        return values.cast(target, safe=safe)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{file} has values in the column {column} that do not fit into {target}: mend or drop them."
        ) from error


def _refuse_nulls(file: Path, column: str, values: pa.ChunkedArray) -> None:
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy())) + 1
        raise InputError(
            f"{file} has no {column} in row {row} (the first of {values.null_count} such rows, counted "
            "from 1): fill it in or leave the row out."
        )


def _drop(events: pa.Table, keep: pa.Array | pa.ChunkedArray, rule: str, counts: EventCounts) -> pa.Table:
    kept = events.filter(keep)
    counts.drop(rule, events.num_rows - kept.num_rows)
    return kept


def _splits_of_file(path: Path) -> dict[str, np.ndarray]:
    file = path / "metadata" / "subject_splits.parquet"
    if not file.is_file():
        return {}
    with _open(file) as opened:
        table = _read(file, opened, ("subject_id", "split"), [])
    ids = _cast(file, "subject_id", table["subject_id"], pa.int64())
    _refuse_nulls(file, "subject_id", ids)
    names = _cast(file, "split", table["split"], _TEXT).cast(pa.string())
    _refuse_nulls(file, "split", names)
    unknown = sorted(set(names.unique().to_pylist()).difference(SPLITS))
    if unknown:
        raise InputError(f"{file} names the splits {', '.join(unknown)}: use {', '.join(SPLITS)}.")
    ids, names = ids.to_numpy(), names.to_numpy()  # [S]
    return _checked({name: np.unique(ids[names == name]) for name in SPLITS}, file)


def _splits_of_folders(path: Path, shards: list[Path], tables: list[pa.Table]) -> dict[str, np.ndarray]:
    data = path / "data"
    folders = [shard.relative_to(data).parts[0] for shard in shards]
    if not set(folders).intersection(SPLITS):
        return {}
    splits = {}
    for name in SPLITS:
        parts = [table["subject_id"] for table, folder in zip(tables, folders, strict=True) if folder == name]
        chunks = [chunk.to_numpy() for part in parts for chunk in part.chunks]
        splits[name] = np.unique(np.concatenate([np.empty(0, np.int64), *chunks]))
    return _checked(splits, data)


def _checked(splits: dict[str, np.ndarray], where: Path) -> dict[str, np.ndarray]:
    check_disjoint(splits, str(where))
    if not len(splits["train"]):
        raise InputError(f"{where} has no train split: put subjects into one called train.")
    return splits


def _descriptions(path: Path, events: pa.Table) -> dict[str, str]:
    """Code -> text for the codes of the events, where the data set has texts at all."""
    file = path / "metadata" / "codes.parquet"
    if not file.is_file():
        return {}
    with _open(file) as opened:
        if "description" not in opened.schema_arrow.names:
            return {}
        table = _read(file, opened, ("code", "description"), [])
    codes = _cast(file, "code", table["code"], _TEXT)
    texts = _cast(file, "description", table["description"], _TEXT)
    present = set(events["code"].unique().to_pylist())
    rows = zip(codes.to_pylist(), texts.to_pylist(), strict=True)
    return {code: text for code, text in rows if text is not None and code in present}

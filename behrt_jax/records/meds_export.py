"""Events of a source written as a data set in the Medical Event Data Standard, 0.4, in bounded memory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax import __version__
from behrt_jax.config.data import PrepareConfig
from behrt_jax.data.events import EVENT_SCHEMA, SPLITS, VISIT_FIELD
from behrt_jax.data.splits import check_disjoint, split_index
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, check_new_folder, work_folder
from behrt_jax.records.prepare.encode import split_by_hash
from behrt_jax.records.prepare.spill import Partitions, Reading, choose_boundaries, spill_units
from behrt_jax.records.sources.source import Source

MEDS_VERSION = "0.4.1"
"""The version of the standard that is written."""
_ROW_GROUP = 1 << 18
_FIELDS = [*EVENT_SCHEMA.set(2, pa.field("code", pa.string(), nullable=False)), VISIT_FIELD]


def export_meds(source: Source, config: PrepareConfig, folder: Path) -> list[Path]:
    """Write every event of a source, selected or not, as a MEDS 0.4 data set into a new or empty folder.

    Splits are the source's own, else those that the prepared data gets by hash. Subjects that the
    source's splits leave out are left out. Gives the files written.

    Raises:
        InputError: see `write_meds` and the source.
    """
    every_code = lambda names: np.ones(len(names), bool)  # noqa: E731
    reading = Reading(choose_boundaries(source), every_code, values=True, subjects=True)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with work_folder(folder.absolute().parent, f"exporting-{folder.name}") as work:
        spill = spill_units(source, range(source.units()), reading, work / "spill")
        splits = source.splits() or split_by_hash(spill.subjects(), config)
        return write_meds(
            _events(Partitions([spill]), splits),
            folder,
            splits=splits,
            descriptions=source.descriptions(),
            dataset_name=source.name,
        )


def _events(partitions: Partitions, splits: Mapping[str, np.ndarray]) -> Iterator[pa.Table]:
    """Events tables of whole subjects, without those in no split, which the preparation drops too."""
    for buckets in partitions.buckets:
        events, values = partitions.load(buckets)
        untimed = None if events.timed is None else ~events.timed
        times = pa.array(events.times, pa.int64(), mask=untimed).cast(pa.timestamp("us"))
        codes = pa.DictionaryArray.from_arrays(events.codes, pa.array(partitions.names, pa.string()))
        columns = {"subject_id": pa.array(events.subject_ids), "time": times, "code": codes}
        values = np.full(len(events.codes), np.nan, np.float32) if values is None else values
        columns["numeric_value"] = pa.array(values.astype(np.float32), mask=np.isnan(values))
        if events.visits is not None and events.named is not None:
            columns[VISIT_FIELD.name] = pa.array(events.visits, pa.int64(), mask=~events.named)
        yield pa.table(columns).filter(pa.array(split_index(events.subject_ids, splits) >= 0))


def write_meds(
    tables: Iterable[pa.Table],
    folder: Path,
    *,
    splits: Mapping[str, np.ndarray],
    descriptions: Mapping[str, str],
    dataset_name: str,
) -> list[Path]:
    """Write events as a MEDS 0.4 data set, which appears at ``folder`` when it is whole.

    Each table becomes a shard, ``data/<split>/<k>.parquet`` for each split with subjects in the table,
    or ``data/<k>.parquet`` where there are no splits. Memory holds one table at a time, its sorted copy,
    and all subject ids. A shard is sorted by subject, then time (null first), then code, visit and value,
    so the same tables with their rows in another order give the same bytes; for that reason
    ``dataset.json`` has no date.

    Args:
        tables: events tables (see :mod:`behrt_jax.data.events`), rows in any order. All events of a
            subject must be in one table, since MEDS keeps a subject in one shard; tables of partitions
            by subject are such. An empty table makes no shard.
        folder: must not exist, or be empty.
        splits: split name -> int64 subject ids, for all subjects of the tables or for none. Subjects
            without events stay in ``subject_splits.parquet``.
        descriptions: code -> text; those of codes that occur are written.
        dataset_name: for ``dataset.json``.

    Returns:
        Every file written, shards first, in order of writing.

    Raises:
        InputError: the folder holds something, there is no event, splits share subjects or lack some, or
            a subject is in two tables.
    """
    folder = Path(folder).absolute()
    check_disjoint(splits, "The splits to write")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(folder.parent, f"writing-{folder.name}") as work:
        check_new_folder(folder, "--to_meds")
        unfinished = work / "meds"
        files, codes, visits = _write_shards(tables, unfinished, splits)
        texts = {code: descriptions.get(code) for code in sorted(codes)}
        about = {
            "dataset_name": dataset_name,
            "etl_name": "behrt_jax",
            "etl_version": __version__,
            "meds_version": MEDS_VERSION,
            **({"raw_source_id_columns": [VISIT_FIELD.name]} if visits else {}),
        }
        files += _write_metadata(unfinished / "metadata", texts, splits, about)
        unfinished.replace(folder)
    return [folder / file.relative_to(unfinished) for file in files]


def _write_shards(
    tables: Iterable[pa.Table], folder: Path, splits: Mapping[str, np.ndarray]
) -> tuple[list[Path], set[str], bool]:
    """Write the shards; gives them, the codes in them, and whether any table has visit ids."""
    files: list[Path] = []
    seen: list[np.ndarray] = []
    shards: dict[str, int] = {}
    codes: set[str] = set()
    visits = False
    for table in tables:
        seen.append(table["subject_id"].unique().to_numpy())
        visits |= VISIT_FIELD.name in table.column_names
        for split, part in _by_split(table, splits):
            file = folder / "data" / split / f"{shards.get(split, 0)}.parquet"
            shards[split] = shards.get(split, 0) + 1
            file.parent.mkdir(parents=True, exist_ok=True)
            shard = _sorted(part)
            pq.write_table(shard, file, row_group_size=_ROW_GROUP, write_page_checksum=True)
            codes.update(shard["code"].unique().to_pylist())
            files.append(file)
    if not files:
        raise InputError("There is no event to write as MEDS: select codes that occur.")
    refuse_repeats(seen, "The tables to write as MEDS have {} subjects in more than one table")
    return files, codes, visits


def _write_metadata(
    folder: Path, texts: Mapping[str, str | None], splits: Mapping[str, np.ndarray], about: JsonObject
) -> list[Path]:
    folder.mkdir()
    columns = {
        "code": pa.array(texts.keys(), pa.string()),
        "description": pa.array(texts.values(), pa.string()),
        "parent_codes": pa.nulls(len(texts), pa.list_(pa.string())),
    }
    files = [folder / "codes.parquet"]
    pq.write_table(pa.table(columns), files[0], write_page_checksum=True)
    if splits:
        files.append(folder / "subject_splits.parquet")
        ids = [np.unique(np.asarray(splits.get(name, ()), np.int64)) for name in SPLITS]
        names = np.repeat(SPLITS, [len(part) for part in ids])
        table = pa.table({"subject_id": np.concatenate(ids), "split": pa.array(names, pa.string())})
        pq.write_table(table, files[-1], write_page_checksum=True)
    files.append(folder / "dataset.json")
    files[-1].write_text(json.dumps(about, indent=2) + "\n")
    return files


def _by_split(table: pa.Table, splits: Mapping[str, np.ndarray]) -> Iterator[tuple[str, pa.Table]]:
    """The parts of a table that have rows, with the name of their split ("" without splits)."""
    if not splits:
        if table.num_rows:
            yield "", table
        return
    split = split_index(table["subject_id"].to_numpy(), splits)  # [N]
    lost = len(np.unique(table["subject_id"].to_numpy()[split < 0]))
    if lost:
        raise InputError(f"{lost} subjects to write as MEDS are in no split: put each into one.")
    for place, name in enumerate(SPLITS):
        if (split == place).any():
            yield name, table.filter(pa.array(split == place))


def _sorted(events: pa.Table) -> pa.Table:
    """Events as a shard: sorted, its codes plain strings."""
    code = events["code"].combine_chunks()
    names = np.array(code.dictionary.to_pylist(), dtype=object)
    rank = np.unique(names, return_inverse=True)[1][code.indices.to_numpy()]  # [N], in order of the names
    time = events["time"].cast(pa.int64())
    keys = [rank, time.fill_null(0).to_numpy(), time.is_valid().to_numpy(), events["subject_id"].to_numpy()]
    for column in (VISIT_FIELD.name, "numeric_value"):
        if column in events.column_names and events[column].null_count < events.num_rows:
            known = events[column].is_valid().to_numpy()
            keys = [events[column].fill_null(0).to_numpy(), known, *keys]
    fields = [field for field in _FIELDS if field.name in events.column_names]
    events = events.take(pa.array(np.lexsort(keys))).select([field.name for field in fields])
    return events.cast(pa.schema(fields))


def refuse_repeats(subjects: list[np.ndarray], what: str) -> None:
    """Refuse ids that are in more than one of the arrays; ``what`` has a place for their number."""
    ids = np.concatenate([np.empty(0, np.int64), *subjects])
    repeated = int(np.count_nonzero(np.unique(ids, return_counts=True)[1] > 1))
    if repeated:
        raise InputError(f"{what.format(repeated)}: put all events of a subject into one.")

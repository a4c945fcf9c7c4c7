"""A source's events as a MEDS data set, in bounded memory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax.config import PrepareConfig
from behrt_jax.data.events import VISIT_FIELD
from behrt_jax.data.meds_writer import write_meds
from behrt_jax.data.partitions import choose_partitions, load_partition
from behrt_jax.data.sources.source import Source
from behrt_jax.data.spill import Reading, Spill, choose_boundaries, spill_units
from behrt_jax.data.splits import hash_splits, split_index
from behrt_jax.data.work_folder import work_folder


def export_meds(source: Source, config: PrepareConfig, folder: Path) -> list[Path]:
    """Write every event of a source, selected or not, as a MEDS 0.4 data set.

    Splits are the source's own, else those that the prepared data gets by hash. Subjects that the
    source's splits leave out are left out.

    Args:
        source: opened.
        config: fractions and seed of the split.
        folder: new or empty.

    Returns:
        The files written.

    Raises:
        InputError: see `meds_writer.write_meds` and the source.
    """
    reading = Reading(choose_boundaries(source), _every_code, values=True, subjects=True)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with work_folder(folder.absolute().parent, f"exporting-{folder.name}") as work:
        spill = spill_units(source, range(source.units()), reading, work / "spill")
        splits = source.splits() or hash_splits(
            spill.subjects(), config.tuning_fraction, config.held_out_fraction, config.seed, options=""
        )
        return write_meds(
            (_in_splits(table, splits) for table in _partitions(spill)),
            folder,
            splits=splits,
            descriptions=source.descriptions(),
            dataset_name=source.name,
        )


def _every_code(names: Sequence[str]) -> np.ndarray:
    return np.ones(len(names), dtype=bool)


def _in_splits(table: pa.Table, splits: Mapping[str, np.ndarray]) -> pa.Table:
    """Without the events of subjects in no split, which the preparation drops and counts as well."""
    return table.filter(pa.array(split_index(table["subject_id"].to_numpy(), splits) >= 0))


def _partitions(spill: Spill) -> Iterator[pa.Table]:
    """Events tables, each with whole subjects."""
    names = sorted(spill.codes)
    for buckets in choose_partitions([spill]):
        events, values = load_partition([spill], buckets, names)
        untimed = None if events.timed is None else ~events.timed
        times = pa.array(events.times, pa.int64(), mask=untimed).cast(pa.timestamp("us"))
        places, texts = pa.array(events.codes, pa.int32()), pa.array(names, pa.string())
        codes = pa.DictionaryArray.from_arrays(places, texts)
        columns = {"subject_id": pa.array(events.subject_ids), "time": times, "code": codes}
        values = np.full(len(events.codes), np.nan, np.float32) if values is None else values
        columns["numeric_value"] = pa.array(values.astype(np.float32), mask=np.isnan(values))
        if events.visits is not None and events.named is not None:
            columns[VISIT_FIELD.name] = pa.array(events.visits, pa.int64(), mask=~events.named)
        yield pa.table(columns)

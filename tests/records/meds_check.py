"""The check that a folder keeps to the Medical Event Data Standard, 0.4.

Source: https://github.com/Medical-Event-Data-Standard/meds, whose package ``meds`` has the schemas.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.errors import InputError
from behrt_jax.records.meds_export import refuse_repeats


def check_meds(folder: Path) -> None:
    """Check a data set against the schemas of the package ``meds``, and what they cannot say.

    That is: each shard is sorted by subject and time, null times first; no subject is in two shards;
    each code has a row in ``codes.parquet``. Extra columns are allowed, as in the standard.

    Raises:
        InputError: names the file that breaks a rule, or the package where it is not installed.
    """
    try:
        import meds
    except ImportError as error:
        raise InputError("Checking MEDS data needs the package meds: pip install meds.") from error
    seen, codes = [], set()
    shards = sorted((folder / meds.data_subdirectory).rglob("*.parquet"))
    for shard in shards:
        with pq.ParquetFile(shard) as file:
            table = file.read()
        _validate(meds.DataSchema, table, shard)
        subject = table["subject_id"].to_numpy()
        time = table["time"].cast(pa.int64())
        micros, timed = time.fill_null(0).to_numpy(), time.is_valid().to_numpy()
        if not np.array_equal(np.lexsort((micros, timed, subject)), np.arange(len(subject))):
            raise InputError(f"{shard} is not sorted by subject_id and time (null first): write it again.")
        seen.append(np.unique(subject))
        codes |= set(table["code"].unique().to_pylist())
    refuse_repeats(seen, f"{folder / meds.data_subdirectory} has {{}} subjects in more than one shard")
    file = folder / meds.code_metadata_filepath
    table = pq.read_table(file)
    _validate(meds.CodeMetadataSchema, table, file)
    absent = codes.difference(table["code"].to_pylist())
    if absent:
        raise InputError(f"{file} lacks {len(absent)} codes that occur: add a row for each.")
    file = folder / meds.subject_splits_filepath
    if file.is_file():
        _validate(meds.SubjectSplitSchema, pq.read_table(file), file)
    file = folder / meds.dataset_metadata_filepath
    _validate(meds.DatasetMetadataSchema, json.loads(file.read_text()), file)


def _validate(schema: type, content: object, file: Path) -> None:
    """Apply a schema of ``meds``, which raises errors of its own package for whatever is wrong."""
    try:
        schema.validate(content)  # type: ignore[attr-defined]
    except Exception as error:
        raise InputError(f"{file} breaks {schema.__name__} of MEDS ({error}): write it again.") from error

"""The metadata of a MEDS folder: the splits of its subjects and the descriptions of its codes."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import EVENT_SCHEMA, SPLITS
from behrt_jax.data.sources.meds_files import (
    cast_column,
    open_parquet,
    read_columns,
    refuse_nulls,
    require_columns,
)
from behrt_jax.data.splits import check_disjoint
from behrt_jax.errors import InputError

_TEXT = EVENT_SCHEMA.field("code").type


def read_splits(file: Path) -> dict[str, np.ndarray]:
    """Split name -> ascending int64 subject ids, as ``subject_splits.parquet`` has them.

    Raises:
        InputError: damage, wrong columns or names, a subject in two splits, no train split.
    """
    with open_parquet(file) as opened:
        require_columns(file, opened, ("subject_id", "split"))
        table = read_columns(file, opened, ["subject_id", "split"])
    ids = cast_column(file, "subject_id", table["subject_id"], pa.int64())
    refuse_nulls(file, "subject_id", ids)
    names = cast_column(file, "split", table["split"], _TEXT).cast(pa.string())
    refuse_nulls(file, "split", names)
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
    with open_parquet(file) as opened:
        if "description" not in opened.schema_arrow.names:
            return {}
        require_columns(file, opened, ("code",))
        table = read_columns(file, opened, ["code", "description"])
    codes = cast_column(file, "code", table["code"], _TEXT)
    texts = cast_column(file, "description", table["description"], _TEXT)
    rows = zip(codes.to_pylist(), texts.to_pylist(), strict=True)
    return {code: text for code, text in rows if text is not None and code is not None}

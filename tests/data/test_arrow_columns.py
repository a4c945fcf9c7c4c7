import hashlib

import numpy as np
import pyarrow as pa
import pytest

from behrt_jax.data import prepared as arrow_columns
from behrt_jax.data.prepared import read_columns, write_columns

SCHEMA = pa.schema([("small", pa.int32()), ("large", pa.int64()), ("real", pa.float32())])


def columns(rows: int) -> list[np.ndarray]:
    random = np.random.default_rng(rows)
    kinds = [field.type.to_pandas_dtype() for field in SCHEMA]
    return [random.integers(0, 10**6, rows).astype(kind) for kind in kinds]


@pytest.mark.parametrize("rows", [0, 1, 7, 2000])
def test_parts_make_the_same_file_as_the_whole(tmp_path, monkeypatch, rows):
    whole = columns(rows)
    with pa.OSFile(str(tmp_path / "arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(column) for column in whole], schema=SCHEMA))
    write_columns(tmp_path / "few", SCHEMA, rows, [np.array_split(column, 3) for column in whole])
    monkeypatch.setattr(arrow_columns, "_FEW_ROWS", 1000)
    write_columns(tmp_path / "many", SCHEMA, rows, [iter(np.array_split(column, 3)) for column in whole])
    prints = [hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("arrow", "few", "many")]
    assert prints[0] == prints[1] == prints[2]
    for column, read in zip(whole, read_columns(tmp_path / "many", SCHEMA), strict=True):
        assert read.dtype == column.dtype
        assert read.tolist() == column.tolist()


def test_parts_that_are_too_few(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_columns, "_FEW_ROWS", 1000)
    whole = columns(2000)
    with pytest.raises(ValueError, match="not as long as the column"):
        write_columns(tmp_path / "short", SCHEMA, 2000, [[whole[0]], [whole[1][1:]], [whole[2]]])

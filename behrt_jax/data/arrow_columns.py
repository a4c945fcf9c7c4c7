"""Arrow files of one record batch, whose columns may be written part by part and are read as views."""

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from behrt_jax.errors import InputError

_FEW_ROWS = 1 << 16


def write_columns(file: Path, schema: pa.Schema, rows: int, columns: Sequence[Iterable[np.ndarray]]) -> None:
    """Write an Arrow file of one record batch, with no column in memory as a whole.

    Args:
        file: to write.
        schema: types of the columns, numbers.
        rows: how many there are.
        columns: parts of each column, of its type, with ``rows`` values together.
    """
    if rows <= _FEW_ROWS:
        batch = pa.RecordBatch.from_arrays(
            [
                pa.array(np.concatenate([np.empty(0, field.type.to_pandas_dtype()), *parts]))
                for field, parts in zip(schema, columns, strict=True)
            ],
            schema=schema,
        )
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        return
    sizes = [rows * field.type.bit_width // 8 for field in schema]
    with file.open("wb", buffering=0) as opened:
        filling = _Filling(opened, sizes, columns)
        # Never touched, so that it takes no memory: it only tells Arrow where columns are and how long.
        blank = pa.py_buffer(mmap.mmap(-1, max(sizes)))
        arrays = [
            pa.Array.from_buffers(field.type, rows, [None, blank.slice(0, size)], null_count=0)
            for field, size in zip(schema, sizes, strict=True)
        ]
        with pa.PythonFile(filling, mode="w") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    filling.check()


class _Filling:
    """A file in which the buffers of Arrow's columns are replaced by parts."""

    closed = False

    def __init__(self, file: BinaryIO, sizes: Sequence[int], columns: Sequence[Iterable[np.ndarray]]):
        self._file = file
        self._columns = list(zip(sizes, columns, strict=True))

    def write(self, piece: bytes | pa.Buffer) -> int:
        size = len(piece)
        # What belongs to the format comes as short bytes, and the columns in their order.
        if size <= _FEW_ROWS:
            return self._all(piece)
        expected, parts = self._columns.pop(0)
        if size != expected or expected != sum(self._all(np.ascontiguousarray(part).data) for part in parts):
            raise ValueError("parts of a column that are not as long as the column")
        return size

    def _all(self, piece: bytes | memoryview | pa.Buffer) -> int:
        left = memoryview(piece).cast("B")
        size = len(left)
        while left:
            left = left[self._file.write(left) :]
        return size

    def check(self) -> None:
        if self._columns:
            raise ValueError("columns that were not written")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def read_columns(file: Path, schema: pa.Schema) -> list[np.ndarray]:
    """Columns as read-only views of the file, which is memory-mapped.

    Raises:
        InputError: no such file, or another one.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        if reader.schema != schema or reader.num_record_batches != 1:
            raise pa.ArrowInvalid("another schema")
        return [column.to_numpy(zero_copy_only=True) for column in reader.get_batch(0).columns]
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file} is missing, cut short or of another format: run prepare again, with another output."
        ) from error

"""Quotes that a CSV file opens and never closes, which parsers take for one value up to the file's end."""

import csv
import io
from typing import IO


class QuoteCounter(io.RawIOBase):
    """A stream that counts the quotes in what is read from it: where all are closed, they are even."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.quotes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.quotes += data.count(b'"')
        return data

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_quote(stream: IO[bytes]) -> int:
    """The data row (from 1) in which a file ends, if it ends within a quoted value; else 0.

    Reads the stream from its start and closes it.
    """
    row = 0
    with io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="") as lines:
        try:
            for line in csv.reader(lines, strict=True):
                row += bool(line)
        except csv.Error as error:
            # A value beyond csv's limit has swallowed many rows.
            open_to_the_end = "unexpected end of data" in str(error) or "field limit" in str(error)
            return row if open_to_the_end else 0
    return 0

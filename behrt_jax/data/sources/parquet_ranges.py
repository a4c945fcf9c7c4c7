"""What the footer of a Parquet file tells about a column."""

from collections.abc import Iterable

import pyarrow.parquet as pq


def column_range(metadata: pq.FileMetaData, row_groups: Iterable[int], column: str) -> tuple[int, int] | None:
    """Smallest and largest integer of a column in some row groups; None where the footer does not tell."""
    found = []
    for group in row_groups:
        part = metadata.row_group(group)
        names = [part.column(place).path_in_schema for place in range(part.num_columns)]
        if column not in names:
            return None
        statistics = part.column(names.index(column)).statistics
        if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
            return None
        found += [statistics.min, statistics.max]
    return (min(found), max(found)) if found else None

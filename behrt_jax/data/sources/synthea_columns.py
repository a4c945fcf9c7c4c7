"""What the columns of Synthea's tables become: codes, values, visits and descriptions."""

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.events import EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.data.sources.csv_reading import Piece
from behrt_jax.data.sources.synthea_files import Encounters, encoded_ids
from behrt_jax.data.sources.text_columns import encode_text, find, parse_numbers

PREFIXES = {
    "encounters": "ENCOUNTER",
    "conditions": "DX",
    "medications": "RX",
    "procedures": "PX",
    "observations": "OBS",
    "immunizations": "VAX",
    "allergies": "ALLERGY",
    "careplans": "CAREPLAN",
    "devices": "DEVICE",
}
"""Table of events -> first part of its codes."""
_DAY = 86_400_000_000
_SCHEMA = pa.schema([*EVENT_SCHEMA, VISIT_FIELD])


def prefixed(prefix: str, texts: pa.DictionaryArray) -> pa.DictionaryArray:
    """``<prefix>//<text>`` of each text."""
    words = pc.binary_join_element_wise(pa.scalar(prefix), texts.dictionary, "//")
    return pa.DictionaryArray.from_arrays(texts.indices, words)


def codes_of(name: str, piece: Piece) -> pa.DictionaryArray:
    """Codes of the rows of the table ``name``, null where there is none."""
    codes = encode_text(piece.column("CODE"))
    if name == "encounters" and "ENCOUNTERCLASS" in piece.table.column_names:
        classes = encode_text(piece.column("ENCOUNTERCLASS"))
        if classes.null_count:
            merged = pc.coalesce(classes.cast(pa.string()), codes.cast(pa.string()))
            classes = merged.dictionary_encode()
        codes = classes
    return prefixed(PREFIXES[name], codes)


def values_of(piece: Piece, counts: EventCounts) -> pa.Array | None:
    """VALUE of observations, float32 with null where it is no number; None where there is no such column."""
    if "VALUE" not in piece.table.column_names:
        return None
    values, wrong = parse_numbers(piece, "VALUE")
    if "TYPE" in piece.table.column_names:
        numeric = pc.fill_null(pc.equal(pc.utf8_lower(piece.column("TYPE")), "numeric"), False)
        counts.change(
            "value is no number", int(np.count_nonzero(wrong & numeric.to_numpy(zero_copy_only=False)))
        )
    return values


def visits_of(
    piece: Piece, column: str, times: pa.Array, encounters: Encounters | None, counts: EventCounts
) -> pa.Array:
    """Visit id of each event, int64 ``[rows]`` with nulls.

    Args:
        piece: rows of a table, without those that are dropped.
        column: of the encounter's id; it may be missing.
        times: of the events ``[rows]``.
        encounters: which the ids are looked up in; None to take every id as it is.
        counts: gets the ids that are unknown, and the events outside their encounter.
    """
    if column not in piece.table.column_names:
        counts.change("unknown visit", len(times))
        return pa.nulls(len(times), pa.int64())
    visits = encoded_ids(encode_text(piece.column(column)))
    if encounters is None:
        counts.change("unknown visit", visits.null_count)
        return visits
    there = visits.is_valid().to_numpy(zero_copy_only=False)
    place = np.where(there, find(encounters.ids, visits.fill_null(0).to_numpy()), -1)
    known = place >= 0
    days = times.cast(pa.int64()).to_numpy() // _DAY
    outside = np.zeros(len(days), dtype=bool)
    place, day = place[known], days[known]
    outside[known] = (day < encounters.first[place] - 1) | (day > encounters.last[place] + 1)
    counts.change("unknown visit", int(np.count_nonzero(~known)))
    counts.change("event outside its encounter", int(np.count_nonzero(outside)))
    return pc.if_else(pa.array(known & ~outside), visits, pa.scalar(None, pa.int64()))


def describe(piece: Piece, codes: pa.DictionaryArray, texts: dict[str, str]) -> None:
    """Add the descriptions of these codes; those of encounters are of the code, not of the class."""
    columns = piece.table.column_names
    if "DESCRIPTION" not in columns or "ENCOUNTERCLASS" in columns:
        return
    pairs = pa.table({"code": codes.indices, "text": piece.column("DESCRIPTION")})
    least = pairs.group_by("code", use_threads=False).aggregate([("text", "min")])
    names = codes.dictionary.to_pylist()
    for code, text in zip(least["code"].to_pylist(), least["text_min"].to_pylist(), strict=True):
        if code is not None and text is not None:
            name = str(names[code])
            texts[name] = min(texts.get(name, str(text)), str(text))


def events_table(
    subject: pa.Array,
    times: pa.Array,
    codes: pa.DictionaryArray,
    values: pa.Array | None = None,
    visits: pa.Array | None = None,
) -> pa.Table:
    """An events table of some columns, all ``[rows]``; values and visits are null where not given."""
    rows = len(subject)
    values = pa.nulls(rows, pa.float32()) if values is None else values
    visits = pa.nulls(rows, pa.int64()) if visits is None else visits
    return pa.table([subject, times, codes, values, visits], schema=_SCHEMA)

"""Codes of births and deaths that MEDS data sets write in their own way."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EventCounts
from behrt_jax.errors import InputError

_OTHER_MARKER = f"^({BIRTH_CODE}//|{DEATH_CODE}//|DO[BD]$)"


def with_standard_markers(file: Path, events: pa.Table, counts: EventCounts) -> pa.Table:
    """Call births MEDS_BIRTH and deaths MEDS_DEATH where they have another name, and count them.

    Some data sets write DOB and DOD, or add detail after the standard's code (MEDS_BIRTH//...). All
    chunks of ``events`` share one dictionary of codes.
    """
    codes = events["code"]
    if not codes.num_chunks:
        return events
    dictionary = codes.chunk(0).dictionary
    try:
        dictionary.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file} has codes that are not UTF-8 text: write the column code again.") from error
    pattern = pc.MatchSubstringOptions(_OTHER_MARKER)
    other = pc.call_function("match_substring_regex", [dictionary], pattern).to_numpy(zero_copy_only=False)
    if not other.any():
        return events
    names = dictionary.to_pylist()
    renamed = {int(place): _marker(names[place]) for place in np.flatnonzero(other)}
    for place, to in renamed.items():
        names[place] = to
    distinct = list(dict.fromkeys(names))
    places = {name: place for place, name in enumerate(distinct)}
    new_place = pa.array([places[name] for name in names], pa.int32())  # [old dictionary]
    chunks = []
    for chunk in codes.chunks:
        used = np.bincount(chunk.indices.to_numpy(), minlength=len(names))  # [old dictionary]
        for place, to in renamed.items():
            counts.change(f"other code of birth or death -> {to}", int(used[place]))
        chunks.append(pa.DictionaryArray.from_arrays(new_place.take(chunk.indices), pa.array(distinct)))
    return events.set_column(events.column_names.index("code"), "code", pa.chunked_array(chunks))


def _marker(code: str) -> str:
    """The standard's code for a birth or death under another name."""
    return BIRTH_CODE if code == "DOB" or code.startswith(BIRTH_CODE) else DEATH_CODE

"""The events of one patient, in memory, as the tokens that a model reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.events import EVENT_SCHEMA, SPLITS, VISIT_FIELD, event_columns
from behrt_jax.data.facts import FactTable
from behrt_jax.data.lives import check_ages
from behrt_jax.data.parquet import cast_column, refuse_nulls
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.sorting import run_offsets
from behrt_jax.data.vocabulary import UNK, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.records.prepare.encode import EncodingRules

Events: TypeAlias = pa.Table | Sequence[Mapping[str, object]]
"""Events of one patient, in any order: ``code``, ``time`` (a datetime; None where static) and, where there
are any, ``numeric_value`` and ``visit_id``. The birth is an event of the code MEDS_BIRTH."""
FIELDS = (*EVENT_SCHEMA, VISIT_FIELD)
_MEANT = "give each a code (text) and a time (datetime or None), and where known numeric_value and visit_id"


def event_rows(events: Events) -> pa.Table:
    """The events of one patient as a table by `data.events`, whose subject is 0 where it is not named.

    Raises:
        InputError: a column is missing, unknown, of another type, or null where it must not be, or there are
            several subjects.
    """
    given = Path("events")  # in place of a file, for messages
    if isinstance(events, Sequence):
        names = sorted({name for row in events for name in row})
        if unknown := [name for name in names if name not in {field.name for field in FIELDS}]:
            raise InputError(f"{given} have {', '.join(unknown)}: {_MEANT}.")
        columns = {name: pa.chunked_array([_column(name, events)]) for name in names}
    else:
        columns = dict(zip(events.column_names, events.columns, strict=True))
    rows = len(next(iter(columns.values()), ()))
    if rows and (missing := {"time", "code"} - columns.keys()):
        raise InputError(f"{given} have no {' and no '.join(sorted(missing))}: {_MEANT}.")
    empty = {"subject_id": pa.array(np.zeros(rows, np.int64))}
    found = {}
    for field in FIELDS:
        values = columns.get(field.name, empty.get(field.name))
        if values is None:
            values = pa.nulls(rows, field.type)
        values = pa.chunked_array([values]) if isinstance(values, pa.Array) else values
        if pt.is_string(values.type) or pt.is_large_string(values.type):
            values = values.cast(pa.string()).dictionary_encode()
        found[field.name] = cast_column(given, field.name, values, field.type)
    for name in ("subject_id", "code"):
        refuse_nulls(given, name, found[name])
    if len(found["subject_id"].unique()) > 1:
        raise InputError(f"{given} are of several subjects: give those of one.")
    return pa.table(found, schema=pa.schema(FIELDS)).combine_chunks()


def _column(name: str, events: Sequence[Mapping[str, object]]) -> pa.Array:
    try:
        return pa.array([row.get(name) for row in events])
    except (pa.ArrowException, TypeError, ValueError) as error:  # the message would show values
        raise InputError(f"events have a {name} of mixed or unknown types: {_MEANT}.") from error


def encode_events(events: pa.Table, vocabulary: Vocabulary, preparation: Preparation) -> SequenceSet:
    """Events of a few subjects as the tokens of a model, by the rules of its own data; all are held_out.

    Args:
        events: as in `data.events`, with visit ids.
        vocabulary: of the model.
        preparation: rules of the data that it was trained on.
    """
    place = SPLITS.index("held_out")
    rules = EncodingRules(
        preparation.choice,
        preparation.options["duplicates"],
        preparation.life,
        lambda ids: np.full(len(ids), place, np.int8),
        preparation.bins,
    )
    encoded = rules.encode(event_columns(events), events["numeric_value"].to_numpy())
    encoded.counts.read = events.num_rows
    check_ages(encoded.counts, preparation.life)
    ids = vocabulary.encode(encoded.names)
    splits = {
        name: Sequences(subjects, run_offsets(lengths), ids[codes], ages, visits, times)
        for name, (subjects, lengths, codes, ages, visits, times) in encoded.parts.items()
    }
    found = encoded.events["held_out"]
    rows = np.flatnonzero((ids == UNK) & (found > 0))
    rows = rows[np.argsort(-found[rows], kind="stable")]
    return SequenceSet(
        vocabulary,
        splits,
        encoded.counts,
        fingerprint="",
        births={name: facts.births for name, facts in encoded.facts.items()},
        deaths={name: facts.deaths for name, facts in encoded.facts.items()},
        preparation=preparation,
        unknown_codes={encoded.names[row]: int(found[row]) for row in rows},
        static=FactTable(lambda: {name: facts.static for name, facts in encoded.facts.items()}, tuple),
    )

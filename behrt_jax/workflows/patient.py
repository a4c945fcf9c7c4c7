"""One patient's events, in memory, to a prediction: no folders are read or written but the model's."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from behrt_jax.config import PredictConfig
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.events import BIRTH_CODE, EVENT_SCHEMA, SPLITS, VISIT_FIELD, EventCounts, event_columns
from behrt_jax.data.labels import Labels
from behrt_jax.data.lives import check_ages
from behrt_jax.data.parquet import cast_column, refuse_nulls
from behrt_jax.data.prepared import read_rules
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.sorting import run_offsets
from behrt_jax.data.vocabulary import UNK, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import mean_predictions
from behrt_jax.files import JsonObject
from behrt_jax.records.prepare.encode import EncodingRules
from behrt_jax.training.devices import Devices, make_mesh
from behrt_jax.training.runtime import use_compilation_cache
from behrt_jax.training.validation import make_output_step
from behrt_jax.workflows.labelled_data import check_codes
from behrt_jax.workflows.predict import last_events, open_finetuned, outputs_of

FIELDS = (*EVENT_SCHEMA, VISIT_FIELD)
_MEANT = "give each a code (text) and a time (datetime or None), and where known numeric_value and visit_id"


class PatientPrediction(NamedTuple):
    """The prediction for one patient."""

    predicted: np.ndarray
    """float64 ``[outputs]``: binary, the probability of a positive label, alone; else as in files of
    predictions, such as the probability of each class."""
    time: int
    """Prediction time, microseconds since 1970."""
    codes: JsonObject
    """What `labelled_data.check_codes` found: the share of events that the model does not know, ..."""
    events: EventCounts
    """Events given, and those that each rule of the preparation dropped or changed."""


class PatientModel:
    """A fine-tuned model in memory, which predicts for one patient at a time.

    The first prediction compiles; the others take the time of one row.
    """

    def __init__(self, folder: Path, base: Path | None = None, devices: Devices | None = None):
        """Read a model; arguments and errors of :func:`open_finetuned`, and a run without its rules."""
        use_compilation_cache(None)
        self._folder, self._mesh = Path(folder), make_mesh(devices)
        self.model = open_finetuned(self._folder, base, self._mesh)
        self._rules = self.model.preparation or read_rules(self._folder, "folder")[1]
        self._step = jax.jit(make_output_step(self.model.setup.predictor))

    def predict(
        self,
        events: pa.Table | Sequence[Mapping[str, object]],
        time: datetime | None = None,
        max_unknown: float | None = None,
    ) -> PatientPrediction:
        """Predict from the events of one patient, which are prepared as the model's own data were.

        Args:
            events: in any order: ``code``, ``time`` (a datetime; None where static) and, where there are any,
                ``numeric_value`` and ``visit_id``. The birth is an event of the code MEDS_BIRTH.
            time: of the prediction, inclusive; that of the last event that is kept where not given.
            max_unknown: as in `config.PredictConfig`.

        Raises:
            InputError: columns that are missing or of other types, no birth, no event to predict at, or more
                unknown codes than allowed.
        """
        model = self.model
        data = encode_events(event_rows(events), model.vocabulary, self._rules)
        split = "held_out"
        codes = check_codes(data, [split], model.vocabulary, self._rules, max_unknown, self._folder)
        labels = last_events(data, [split])
        if time is not None and len(known := data.subject_ids(split)):
            at = pa.scalar(time, pa.timestamp("us")).cast(pa.int64()).as_py()
            labels = Labels(known, np.array([at], np.int64), np.full(1, None), "none")
        if not len(labels):
            rules = ", ".join(f"{rule}: {count}" for rule, count in data.counts.dropped.items())
            raise InputError(
                f"events: none of {data.counts.read} is left to predict from ({rules or 'none was given'}): "
                f"give a {BIRTH_CODE} with a time, and an event with a code of the model or a time."
            )
        chosen = {split: labels}
        one = PredictConfig(rows=1)
        found = outputs_of(self._step, one, model, data, chosen, self._rules.delays, self._mesh)
        _, outputs, _, _ = next(found, (None, None, 0, None))
        if outputs is None:
            raise InputError("time: it lies after the patient's death: give an earlier one.")
        predicted = mean_predictions(model.task.kind, outputs, model.calibration.temperature)
        return PatientPrediction(predicted[0], int(labels.times[0]), codes, data.counts)


def event_rows(events: pa.Table | Sequence[Mapping[str, object]]) -> pa.Table:
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
        name: Sequences(subjects, run_offsets(lengths), ids[codes], *columns)
        for name, (subjects, lengths, codes, *columns) in encoded.parts.items()
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
    )

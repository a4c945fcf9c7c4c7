"""Answers of a model pretrained on questions: the probability that any code of a set comes within a horizon.

No label is learned from. A set on which the model was trained as a group is asked as one question. The codes
of any other are asked one by one, and the chance of none of them is the product of the chances of each not to
come, as if they were independent given the history; calibration on the tuning split mends part of that.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.config.commands import AskConfig, PredictConfig
from behrt_jax.data.batches import TaskBatch
from behrt_jax.data.events import DAY
from behrt_jax.data.labels import Labels
from behrt_jax.data.predictions import PredictionWriter, prediction_rows, schema_of
from behrt_jax.data.questions import Occurrences, PredictionTimes, matching_some, prediction_times
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.sorting import place_in
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary, matching_codes
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import fit_platt, fit_threshold
from behrt_jax.files import JsonObject
from behrt_jax.models.questions import Asked
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.training.devices import Devices
from behrt_jax.training.runtime import use_compilation_cache
from behrt_jax.training.step import Predictor, Variables
from behrt_jax.training.validation import score
from behrt_jax.workflows.loaded import Loaded, load
from behrt_jax.workflows.prediction_data import (
    Histories,
    Records,
    announce_counts,
    check_output,
    count_labels,
    labels_to_predict,
    metadata_of,
    open_records,
    pieces_of,
    shown,
)

LEAST_ANSWERS = 20
"""Of either kind on the tuning split, to calibrate by."""
_AT_ONCE = 256  # codes that are asked of in one pass over the histories
_CALIBRATED_ON = 20_000  # ends of visits at most
_BINARY = Task("binary")


def ask(config: AskConfig, devices: Devices | None = None) -> JsonObject:
    """Ask, write the file of predictions, and say what is in it.

    Returns:
        Counts: ``examples``, ``unknown_subjects``, ``empty_histories``, ``duplicates``, ``after_last_event``
        (prediction times more than a day after the last event before them), and what else was left out.

    Raises:
        InputError: something in the options, the model, the data or the labels is wrong; nothing is left
            half-written.
    """
    as_prediction = _checked(config)
    days = config.horizon_days
    assert config.model is not None and config.output is not None and days is not None
    with ExitStack() as stack:
        console = stack.enter_context(open_console())
        if reason := use_compilation_cache(config.compilation_cache):
            console.log(reason)
        model = load_asked(config.model, devices)
        question = find_question(model, config.codes, days)
        records = stack.enter_context(
            open_records(as_prediction, model.vocabulary, model.preparation, model.config, console)
        )
        question, facts = without_facts(question, records.data)
        if facts:
            console.log(f"{facts:,} of the codes that match are static facts, which never come: left out.")
        _announce(console, config, question)
        for line in beyond_training(model, question):
            console.log(f"Warning: {line}")
        fitted = Fitted()
        if config.calibrate:
            fitted = calibrate(model, question, records, as_prediction)
            console.log(fitted.told)
        labels, without = labels_to_predict(records)
        histories = records.at(labels)
        schema = schema_of(_BINARY, labels)
        counts = count_labels(records, labels, histories) | {"after_last_event": 0}
        asked = {"codes": list(config.codes), "horizon_days": days, **question.to_json(), **fitted.to_json()}
        metadata = metadata_of(config.model, records, model.max_length - model.config.cls_token)
        metadata |= {"kind": "binary", "threshold": fitted.threshold, "question": asked, "counts": counts}
        with PredictionWriter(config.output, schema, metadata) as writer:
            pieces = answers(model, question, histories, as_prediction)
            for part, log_odds, empty, late in shown(pieces, counts, console):
                predicted = fitted.probabilities(log_odds)[:, None]
                writer.write(prediction_rows(schema, _BINARY, part, predicted, fitted.threshold, None))
                counts["empty_histories"] += empty
                counts["after_last_event"] += late
        console.close()
        if records.labels is None:
            console.log("No labels were given: each subject is asked about at its last event.")
        announce_counts(
            console,
            {**counts, "without_events": without},
            without_events="subjects have no event to be asked about at: left out",
            empty_histories="examples have no event yet: answered from the age alone",
            after_last_event="prediction times are more than a day after the last event before them: the "
            "model, which was trained at ends of visits, answers as if it were still that time",
        )
        console.log(f"Written to {config.output}: {counts['examples']:,} answers.")
    return counts


def _checked(config: AskConfig) -> PredictConfig:
    """The options as predict has them, checked."""
    if config.model is None:
        raise InputError("--model is missing: give a pretraining run with --objective queries or both.")
    if not config.codes:
        raise InputError("--codes is missing: give regular expressions of the codes to ask of.")
    if config.horizon_days is None:
        raise InputError("--horizon_days is missing: give the days after the prediction time.")
    if not 0 < config.horizon_days < 1e6:
        raise InputError(f"--horizon_days is {config.horizon_days:g}: give a number of days above 0.")
    check_output(config.output, config.rows)
    return PredictConfig(
        model=config.model,
        data=config.data,
        labels=config.labels,
        split=config.split,
        max_unknown=config.max_unknown,
        output=config.output,
        outside_life=config.outside_life,
        rows=config.rows,
    )


def load_asked(run: Path, devices: Devices | None = None) -> Loaded:
    """Open a model that answers questions.

    Raises:
        InputError: there is none in the folder.
    """
    model = load(run, devices=devices)
    if model.finetuned is not None or model.objective == "mlm":
        was = "fine-tuned" if model.finetuned is not None else "pretrained on masked codes alone"
        raise InputError(
            f"--model: {run} was {was}, and answers no questions: give a run of pretrain with --objective "
            "queries or both."
        )
    return model


# What is asked.


@dataclass(frozen=True, eq=False)
class Question:
    """A set of codes and a horizon, as a model is asked."""

    ids: np.ndarray
    """Vocabulary ids, or the id of one group, int32 ``[questions]``."""
    codes: np.ndarray
    """Codes of the set, bool ``[vocabulary]``."""
    horizon_days: float
    group: bool
    """The model was trained on the set as one."""

    def to_json(self) -> JsonObject:
        """What the file of predictions says of it."""
        return {"matched": int(self.codes.sum()), "asked_as": "a group" if self.group else "single codes"}


def find_question(model: Loaded, patterns: tuple[str, ...], horizon_days: float) -> Question:
    """The set of codes that patterns match, as the model knows it.

    Raises:
        InputError: a pattern matches no code of the model.
    """
    vocabulary: Vocabulary = model.vocabulary
    codes = matching_some(vocabulary, patterns, "--codes")
    groups = model.queries.groups
    if len(patterns) == 1 and patterns[0] in groups:
        own = len(vocabulary) + groups.index(patterns[0])
        return Question(np.array([own], np.int32), codes, horizon_days, True)
    return Question(np.flatnonzero(codes).astype(np.int32), codes, horizon_days, False)


def without_facts(question: Question, data: SequenceSet) -> tuple[Question, int]:
    """The question about codes that events may have: those that are static facts alone never come after a
    visit, so that no model has learnt to answer about them. Beside it, how many are left out.

    Args:
        question: what is asked.
        data: in the vocabulary of the model.

    Raises:
        InputError: no code is left.
    """
    facts, events = np.zeros((2, len(question.codes)), bool)
    for part in data.splits.values():
        if part.facts is not None:
            facts[part.facts.codes], events[part.codes] = True, True
    never = question.codes & facts & ~events
    if not never.any():
        return question, 0
    codes = question.codes & ~never
    if not codes.any():
        raise InputError(
            f"--codes: all {int(never.sum()):,} codes that match are static facts, which never come after a "
            "visit: give codes of events."
        )
    ids = question.ids if question.group else np.flatnonzero(codes).astype(np.int32)
    return replace(question, ids=ids, codes=codes), int(never.sum())


def beyond_training(model: Loaded, question: Question) -> list[str]:
    """What of a question pretraining never asked, and nothing like it: a line each."""
    asked, found = model.queries, []
    shortest, longest = min(asked.horizon_days), max(asked.horizon_days)
    if not shortest <= question.horizon_days <= longest:
        found.append(
            f"The model was asked within {shortest:g} to {longest:g} days: of {question.horizon_days:g} days "
            "the answer is an extrapolation."
        )
    if asked.codes and not question.group:
        never = int((question.codes & ~matching_codes(model.vocabulary, asked.codes, "--codes")).sum())
        if never:
            found.append(f"The model was never asked about {never:,} of the codes (queries.codes).")
    return found


def _announce(console: Console, config: AskConfig, question: Question) -> None:
    said = f"{int(question.codes.sum()):,} codes match {' '.join(config.codes)}"
    how = "the model was trained on them as a group" if question.group else "asked one by one"
    console.log(f"{said}, {how}: does one come within {question.horizon_days:g} days?")


def any_of(log_odds: np.ndarray) -> np.ndarray:
    """Log odds that any of several codes comes, from those of each: float64 ``[n]`` of ``[n, codes]``."""
    if log_odds.shape[1] == 1:
        return log_odds[:, 0].astype(np.float64)
    none = -np.logaddexp(0.0, log_odds.astype(np.float64)).sum(axis=1)  # log of the chance
    none = np.minimum(none, -1e-300)
    return np.log(-np.expm1(none)) - none


def answers(
    model: Loaded, question: Question, histories: Histories, config: PredictConfig
) -> Iterator[tuple[Labels, np.ndarray, int, int]]:
    """Labels and log odds float64 ``[n]`` of a few thousand examples at a time; how many have no event yet,
    and how many are more than a day after their last event.

    Args:
        model: of :func:`load_asked`.
        question: what is asked.
        histories: of whom.
        config: its ``rows`` and ``outside_life`` are read.
    """
    predictor, days = model.setup.predictor, np.float32(question.horizon_days)
    width = min(_AT_ONCE, len(question.ids))
    parts = [question.ids[start : start + width] for start in range(0, len(question.ids), width)]
    for _, part, examples, batches in pieces_of(config, model.config, None, histories, model.mesh):
        found = []
        for ids in parts:
            step = partial(_log_odds, predictor, np.pad(ids, (0, width - len(ids)), "edge"), days)
            found.append(score(step, model.variables, batches, model.mesh)[:, : len(ids)])
        last = examples.windows.starts + examples.windows.lengths - 1
        late = ~examples.empty & (examples.times - examples.sequences.times[last] > DAY)
        yield part, any_of(np.concatenate(found, axis=1)), int(examples.empty.sum()), int(late.sum())


@partial(jax.jit, static_argnums=0)
def _log_odds(
    predictor: Predictor, ids: jax.Array, days: jax.Array, variables: Variables, batch: TaskBatch
) -> jax.Array:
    """Answers about each segment, float32 ``[rows, segments, codes]``, by one program for all questions."""
    shape = (*batch.weights.shape, len(ids))
    asked = Asked(jnp.broadcast_to(ids[None, None], shape), jnp.full(shape, days))
    return predictor.outputs(variables, batch.rows, asked)


# Calibration on the same question about the tuning split.


class Fitted(NamedTuple):
    """From log odds of a model to probabilities."""

    slope: float = 1.0
    intercept: float = 0.0
    threshold: float = 0.5
    answers: int = 0
    """That it was fitted to."""
    told: str = "Not calibrated."

    def probabilities(self, log_odds: np.ndarray) -> np.ndarray:
        """float64 ``[n]`` of ``[n]``."""
        return 1 / (1 + np.exp(-np.clip(self.slope * log_odds + self.intercept, -700, 700)))

    def to_json(self) -> JsonObject:
        """What the file of predictions says of it; None where nothing was fitted."""
        fitted = {"slope": self.slope, "intercept": self.intercept, "answers": self.answers}
        return {"calibration": fitted if self.answers else None}


def calibrate(model: Loaded, question: Question, records: Records, config: PredictConfig) -> Fitted:
    """Fit slope and intercept to the question at ends of visits of tuning, where enough answers are known."""
    try:
        times = prediction_times(records.data, "tuning", question.horizon_days, records.delays)
    except InputError:
        return Fitted(told="Not calibrated: no visit of the tuning split is followed up for the horizon.")
    if len(times) > _CALIBRATED_ON:
        drawn = np.random.default_rng(0).permutation(len(times))[:_CALIBRATED_ON]
        times = times.take(np.sort(drawn))
    labels = known_answers(records.data, "tuning", times, question)
    positive = int(labels.values.sum())
    if min(positive, len(labels) - positive) < LEAST_ANSWERS:
        return Fitted(
            told=f"Not calibrated: of the question on the tuning split {positive:,} answers are positive and "
            f"{len(labels) - positive:,} negative, and {LEAST_ANSWERS} of either are needed."
        )
    histories = Histories(records.data, {"tuning": labels}, records.delays)
    found = list(answers(model, question, histories, config))
    log_odds = np.concatenate([part for _, part, _, _ in found])
    truths = np.concatenate([part.values for part, _, _, _ in found]).astype(bool)
    slope, intercept = fit_platt(log_odds, truths)
    if not (np.isfinite(slope) and slope > 0):
        return Fitted(told="Not calibrated: on the tuning split the answers do not rise with the outcome.")
    fitted = Fitted(slope, intercept, answers=len(truths))
    threshold = fit_threshold(fitted.probabilities(log_odds), truths, "f1")
    told = (
        f"Calibrated on {len(truths):,} ends of visits of the tuning split ({int(truths.sum()):,} positive): "
        f"slope {slope:.3f}, intercept {intercept:+.3f}."
    )
    return fitted._replace(threshold=threshold, told=told)


def known_answers(data: SequenceSet, split: str, times: PredictionTimes, question: Question) -> Labels:
    """Whether any code of the set came within the horizon of each prediction time, as labels."""
    part = data.splits[split]
    ends = times.times + int(question.horizon_days * DAY)
    stops = place_in(part.times, times.up_to, part.offsets[times.subjects + 1], ends, inclusive=True)
    # The set as the only group.
    occurrences = Occurrences.of(part.codes, question.codes[None])
    group = np.full(len(times), len(question.codes))
    came = occurrences.count(group, times.up_to, stops) > 0
    return Labels(part.subject_ids[times.subjects], times.times, came, "boolean")

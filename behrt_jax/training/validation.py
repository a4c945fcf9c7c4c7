"""Validation over a split, in sums or code by code."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.batches import Batch, TaskBatch, TaskBatches, ValidationBatches
from behrt_jax.data.questions import QuestionBatch, QuestionBatches
from behrt_jax.data.tasks import KINDS, TaskKind
from behrt_jax.data.vocabulary import CLS, PAD
from behrt_jax.errors import InputError
from behrt_jax.evaluation.masked_codes import MaskedSplit
from behrt_jax.evaluation.scores import ON_TUNING
from behrt_jax.files import JsonObject
from behrt_jax.models.behrt import PatientEmbedding
from behrt_jax.models.losses import add_totals, mean_metrics, task_losses, totals
from behrt_jax.training.feeding import place_batch
from behrt_jax.training.masking import MaskedCodes, mask_codes
from behrt_jax.training.runtime import RUN_ONCE
from behrt_jax.training.step import Predictor, Totals, Variables, masked_code_losses, question_log_odds

OutputStep = Callable[[Variables, Any], jax.Array]
"""(variables, batch of examples) -> outputs of each segment, float32 `[rows, segments, outputs]`."""


def make_output_step(predictor: Predictor) -> OutputStep:
    """Build the step to outputs of a task's batch, float32 `[rows, segments, outputs]`, without dropout."""

    def output_step(variables: Variables, batch: TaskBatch) -> jax.Array:
        return predictor.outputs(variables, batch.rows, batch.weights.shape[1])

    return output_step


def make_embedding_step(network: PatientEmbedding) -> OutputStep:
    """Build the step from parameters to vectors of a task's batch, float32 `[rows, segments, hidden]`."""

    def embed_step(params: Any, batch: TaskBatch) -> jax.Array:
        return network.apply({"params": params}, batch.rows, batch.weights.shape[1])  # pyright: ignore[reportReturnType]

    return embed_step


def make_question_step(predictor: Predictor) -> OutputStep:
    """Build the step to answers of a batch of questions, `[rows, segments, questions]`, without dropout."""

    def question_step(variables: Variables, batch: QuestionBatch) -> jax.Array:
        return question_log_odds(predictor, variables, batch)

    return question_step


def score(
    output_step: OutputStep,
    variables: Variables,
    batches: TaskBatches | QuestionBatches,
    mesh: Mesh,
) -> np.ndarray:
    """Outputs of every example, in the order of the examples, float32 ``[examples, outputs]``.

    The next batch is on its way while the host takes the outputs of the one before.

    Args:
        output_step: a jitted :func:`make_output_step` or :func:`make_question_step`.
        variables: of the model.
        batches: one epoch of them is read.
        mesh: the devices.
    """
    found, pending = None, []

    def take() -> None:
        nonlocal found
        examples, outputs = pending.pop(0)
        outputs = np.asarray(outputs)  # [B, S, O]
        if found is None:
            found = np.empty((len(batches.examples), outputs.shape[-1]), np.float32)
        filled = examples >= 0
        found[examples[filled]] = outputs[filled]

    for step in range(batches.steps_per_epoch):
        outputs = output_step(variables, place_batch(batches, step, mesh))
        pending.append((batches.examples_of(step), outputs))
        if len(pending) > 1:
            take()
    while pending:
        take()
    assert found is not None
    return found


def task_metrics(kind: TaskKind, outputs: np.ndarray, targets: np.ndarray) -> JsonObject:
    """Mean loss of examples, and figures of `evaluation.scores.ON_TUNING` (None where not defined).

    Args:
        kind: of the task.
        outputs: float32 ``[examples, outputs]``.
        targets: float32 ``[examples, targets]``.
    """
    losses = np.asarray(task_losses(KINDS[kind].loss, outputs, targets), np.float64)
    figures = ON_TUNING.get(KINDS[kind].predicts, {})
    found = {name: figure(outputs, targets) for name, figure in figures.items()}
    return {"loss": float(losses.mean()), "targets": len(losses), **found}


def make_validation_step(
    predictor: Predictor, masking: MaskingConfig, key: jax.Array
) -> Callable[[Variables, Batch], Totals]:
    """Build the validation step: totals of a batch, with masks fixed by the key and the row ids."""
    mask = _fixed_masks(masking, key, predictor.model.vocabulary_size)

    def validation_step(variables: Variables, batch: Batch) -> Totals:
        masked = mask(batch)
        found = masked_code_losses(predictor, variables, batch, masked)
        return totals(found.loss, found.ranks, masked.weights)

    return validation_step


def validate(
    validation_step: Callable[[Variables, Batch], Totals],
    variables: Variables,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Metrics of `models.losses.mean_metrics` over all batches, each target counted once.

    The host waits for the devices once, at the end.

    Args:
        validation_step: a jitted :func:`make_validation_step`.
        variables: of the model.
        batches: on the devices, see `feeding.PlacedBatches`.
    """
    return _mean([validation_step(variables, batch) for batch in batches])


ScoringStep = Callable[[Variables, Batch], tuple[jax.Array, ...]]


def make_scoring_step(predictor: Predictor, masking: MaskingConfig, key: jax.Array) -> ScoringStep:
    """Build the step to losses and ranks of a batch's masked codes, to the codes held most likely in their
    place, and to which slots are used: `[batch, budget]` each. Masks are those of
    :func:`make_validation_step`.
    """
    mask = _fixed_masks(masking, key, predictor.model.vocabulary_size)

    def scoring_step(variables: Variables, batch: Batch) -> tuple[jax.Array, ...]:
        masked = mask(batch)
        found = masked_code_losses(predictor, variables, batch, masked, guess=True)
        assert found.guesses is not None
        return found.losses, found.ranks, found.guesses, masked.weights

    return scoring_step


def score_masked_codes(
    scoring_step: ScoringStep, variables: Variables, batches: ValidationBatches, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, rank and guess of every masked code, `[targets]` each: what `evaluation.masked_codes.results_of`
    takes, in the order of the targets of :func:`mask_split` with the same batches, masking and key.

    Args:
        scoring_step: a jitted :func:`make_scoring_step`.
        variables: of the model.
        batches: of the split.
        mesh: the devices to compute on.
    """
    found = []
    for index in range(len(batches)):
        *of_slots, used = jax.device_get(scoring_step(variables, place_batch(batches, index, mesh)))  # [B, T]
        found.append([values[used] for values in of_slots])
    losses, ranks, guesses = map(np.concatenate, zip(*found, strict=True))
    return losses, ranks, guesses


def mask_split(
    batches: ValidationBatches, masking: MaskingConfig, key: jax.Array, vocabulary_size: int
) -> MaskedSplit:
    """The tuning split as the validation step sees it, token by token, and what it is asked for.

    Args:
        batches: of the validation split.
        masking: how codes are masked.
        key: the key that the validation step is made with.
        vocabulary_size: V.

    Raises:
        InputError: the validation split is so small that not one code is masked.
    """
    sequences = batches.sequences
    # The same batches with each code replaced by its place in the split.
    places = replace(
        batches, sequences=replace(sequences, codes=np.arange(len(sequences.codes), dtype=np.int32))
    )
    mask = jax.jit(_fixed_masks(masking, key, vocabulary_size), compiler_options=RUN_ONCE)
    shown = np.full(len(sequences.codes), PAD, np.int32)
    windows = np.full(len(sequences.codes), -1, np.int64)
    targets, unasked = [], 0
    for batch, of_places in zip(batches, places, strict=True):
        masked = jax.device_get(mask(batch))
        unasked += int(masked.unasked.sum())
        seen = (batch.segment_ids > 0) & (batch.codes != CLS) & (batch.visits >= 0)  # [B, L]
        place = of_places.codes[seen]
        shown[place] = masked.codes[seen]
        segments = batch.row_ids[:, None].astype(np.int64) * batches.row_length + batch.segment_ids
        windows[place] = segments[seen]
        rows, slots = np.nonzero(masked.weights)
        targets.append(of_places.codes[rows, masked.columns[rows, slots]])
    found = np.concatenate(targets).astype(np.int64)
    split = MaskedSplit(sequences, shown, windows, found, unasked)
    if not len(split.targets):
        raise InputError(
            "No code of the tuning split is masked, it is too small: give it more subjects or raise "
            "masking.probability."
        )
    return split


def _fixed_masks(
    masking: MaskingConfig, key: jax.Array, vocabulary_size: int
) -> Callable[[Batch], MaskedCodes]:
    """Masks of a batch that the key and its row ids decide."""

    def mask(batch: Batch) -> MaskedCodes:
        rows = batch.codes, batch.row_ids
        return mask_codes(key, *rows, masking, vocabulary_size, batch.visits, batch.segment_ids)

    return mask


def _mean(totals: list[Totals]) -> dict[str, float]:
    sums: dict[str, Any] = {}
    for batch_totals in jax.device_get(totals):
        sums = add_totals(sums, {key: float(value) for key, value in batch_totals.items()})
    return mean_metrics(sums)

"""Pretraining on questions: batches, the loss, and how answers stand on the tuning split."""

from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np

from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.batches import RowShape, ValidationBatches, validation_batches
from behrt_jax.data.questions import Catalogue, QuestionBatches, question_batches
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.evaluation.masked_codes import Unigram
from behrt_jax.evaluation.questions import predict_prevalence, question_metrics
from behrt_jax.files import JsonObject
from behrt_jax.tracking.console import Console
from behrt_jax.training.devices import replicated
from behrt_jax.training.feeding import PlacedBatches
from behrt_jax.training.masking import FIRST_CODE
from behrt_jax.training.state import Assembly, Setup
from behrt_jax.training.step import Objective, Variables, question_objective
from behrt_jax.training.validation import (
    make_question_step,
    make_validation_step,
    mask_split,
    score,
    validate,
)


def split_question_batches(
    config: PretrainConfig, data: SequenceSet, shape: RowShape
) -> tuple[QuestionBatches, QuestionBatches]:
    """Batches of questions about the train split, and about the tuning split, always the same.

    Raises:
        InputError: nothing to ask of, or nobody to ask about.
    """
    events = replace(data.vocabulary, counts=data.event_counts)
    catalogue, train = Catalogue.of(events, config.queries), config.train
    of_run = catalogue, config.queries, shape
    batches = question_batches(
        data,
        "train",
        *of_run,
        batch_size=train.batch_size,
        batch_tokens=train.batch_tokens,
        seed=train.seed,
    )
    tuning = question_batches(data, "tuning", *of_run, batch_size=1, endless=False)
    return batches, tuning.of_rows(batches.rows_per_batch, shape.multiple_of)


def objective_of_questions(config: PretrainConfig, setup: Setup, batches: QuestionBatches) -> Objective:
    """The loss of questions alone, or with that of masked codes beside it, as `config` asks."""
    if config.objective == "queries":
        return question_objective(setup.predictor)
    questions = batches.histories * config.queries.questions
    masked = config.masking.probability * batches.maskable_per_epoch
    factor = config.queries.mlm_weight * questions / masked
    return question_objective(setup.predictor, config.masking, factor)


@dataclass(frozen=True, eq=False)
class QuestionValidation:
    """Answers to the questions of the tuning split; with objective both, its masked codes beside them."""

    config: PretrainConfig
    data: SequenceSet
    assembly: Assembly
    batches: QuestionBatches
    tuning: QuestionBatches

    @cached_property
    def baselines(self) -> dict[str, JsonObject]:
        """Figures of ``prevalence``: how often each code, or group, comes within each horizon.

        With objective both, its ``loss`` has that of masked codes predicted by their frequency (`unigram`).
        """
        found = predict_prevalence(self.batches, self.tuning)
        if self.config.objective == "queries":
            return {"prevalence": found}
        masked = mask_split(
            self._masked, self.config.masking, self.assembly.keys.validation, len(self.data.vocabulary)
        )
        unigram = Unigram(self.data.event_counts, FIRST_CODE).predict(masked).metrics()
        # The interval is that of the questions' loss alone.
        interval = found.pop("interval")
        return {"prevalence": {**self._together(found, unigram), "interval": interval}}

    def announce(self, console: Console) -> None:
        """Say what is asked about, and what must be beaten."""
        figures, sampler = self.baselines["prevalence"], self.tuning.sampler
        ids = np.count_nonzero(sampler.catalogue.shares)
        groups = len(sampler.catalogue.groups)
        console.log(
            f"Questions: of {ids - groups:,} codes{f' and {groups} groups' if groups else ''}, within "
            f"{', '.join(f'{days:g}' for days in sampler.horizons)} days; {sampler.questions} at each of "
            f"{self.batches.histories:,} ends of visits an epoch, of {len(self.batches.times):,}."
        )
        for split, times in (("train", self.batches.times), ("tuning", self.tuning.times)):
            if times.left_out:
                told = ", ".join(f"{why}: {count:,}" for why, count in times.left_out.items())
                console.log(f"Ends of visits of {split} that are not asked about: {told}.")
        console.log(
            f"Baseline on the {figures['targets']:,} questions of the tuning split: how often each code "
            f"comes within each horizon, loss {figures['loss']:.4f}."
        )

    def figures(self, variables: Variables) -> JsonObject:
        """Of a model: `evaluation.questions.question_metrics`, and of masked codes where they are asked."""
        answers = score(self._step, variables, self.tuning, self.assembly.mesh)
        found = question_metrics(self._questions, answers)
        if self.config.objective == "queries":
            return found
        return self._together(found, validate(self._masked_step, variables, self._placed))

    def _together(self, questions: JsonObject, masked: JsonObject) -> JsonObject:
        loss = questions["loss"] + self.config.queries.mlm_weight * masked["loss"]
        beside = {name: masked[name] for name in ("accuracy", "accuracy_top5", "accuracy_top10")}
        own = {"question_loss": questions["loss"], "mlm_loss": masked["loss"], **beside}
        return {**questions, "loss": loss, **own}

    def assess(self, variables: Variables) -> JsonObject:
        """Nothing beside the figures of the validation."""
        return {}

    @cached_property
    def _questions(self):
        return self.tuning.all_questions()

    @cached_property
    def _step(self):
        step = make_question_step(self.assembly.setup.predictor)
        return jax.jit(step, out_shardings=replicated(self.assembly.mesh))

    @cached_property
    def _masked(self) -> ValidationBatches:
        rows, window = self.tuning.rows_per_batch, self.config.data.window
        part = self.data.splits["tuning"]
        return validation_batches(part, self.tuning.shape, rows_per_batch=rows, window=window)

    @cached_property
    def _placed(self) -> PlacedBatches:
        return PlacedBatches(self._masked, self.assembly.mesh)

    @cached_property
    def _masked_step(self):
        key, masking = self.assembly.keys.validation, self.config.masking
        step = make_validation_step(self.assembly.setup.predictor, masking, key)
        return jax.jit(step, out_shardings=replicated(self.assembly.mesh))

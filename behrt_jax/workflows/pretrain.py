"""Pretraining, by masked codes or questions, from a configuration to a finished run folder."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from behrt_jax.adapters import combine
from behrt_jax.adapters.files import AdapterConfig, save_adapter
from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.batches import (
    Batch,
    RowShape,
    TrainingBatches,
    ValidationBatches,
    training_batches,
    validation_batches,
)
from behrt_jax.data.prepared import rule_files
from behrt_jax.data.questions import QuestionBatches
from behrt_jax.data.sequences import SequenceSet, describe, told_facts
from behrt_jax.diagnosis.finding import RunRecord
from behrt_jax.errors import DivergenceError, InputError
from behrt_jax.evaluation.learned import confusions, neighbours
from behrt_jax.evaluation.masked_codes import (
    Cooccurrence,
    MaskedCodeResults,
    MaskedSplit,
    Unigram,
    assess,
    results_of,
)
from behrt_jax.evaluation.oracle import oracle_of
from behrt_jax.files import JsonObject, json_text, write_text
from behrt_jax.records.load import load_sequences
from behrt_jax.run_folder import (
    CHECKPOINTS_FOLDER,
    METRICS_FILE,
    PLOTS_FOLDER,
    SUMMARY_FILE,
    SUMMARY_TEXT_FILE,
    read_config,
    read_metrics,
    record_metrics,
    write_files,
)
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.plots import plot_curves
from behrt_jax.tracking.report import write_report
from behrt_jax.tracking.summary import Summary, summarise, summary_text
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import Devices, make_mesh, replicated
from behrt_jax.training.feeding import PlacedBatches, on_device, one_step, open_feed
from behrt_jax.training.loop import Schedule, Steps, catching_signals
from behrt_jax.training.masking import FIRST_CODE
from behrt_jax.training.memory import keep_freed_memory
from behrt_jax.training.micro_batches import choose_micro_batches, rows_multiple
from behrt_jax.training.pretrained import check_source, check_vocabulary, start_from
from behrt_jax.training.processes import agreed, from_first, is_first, together, whole_here
from behrt_jax.training.runtime import Startup, use_compilation_cache
from behrt_jax.training.state import Assembly, assemble, set_up, with_code_rows
from behrt_jax.training.step import Totals, TrainState, Variables, masked_code_objective
from behrt_jax.training.telemetry import adapter_norms, code_table
from behrt_jax.training.validation import (
    make_scoring_step,
    make_validation_step,
    mask_split,
    score_masked_codes,
    validate,
)
from behrt_jax.weights.code_vectors import CodeVectors, first_rows, read_vectors
from behrt_jax.workflows import announce
from behrt_jax.workflows.checks import check, check_days, gather_facts
from behrt_jax.workflows.doctor import Examination
from behrt_jax.workflows.questions import (
    QuestionValidation,
    objective_of_questions,
    split_question_batches,
)
from behrt_jax.workflows.run import (
    Run,
    RunResult,
    begin,
    best_variables,
    check_same_everywhere,
    check_same_run,
    compile_beside,
    decisive_settings,
    exit_status,
    not_recorded,
    open_folder,
    parameter_report,
    run_console,
    run_record,
    save,
    settings,
    trackers,
    write_start,
)


def pretrain(config: PretrainConfig, devices: Devices | None = None) -> RunResult:
    """Pretrain BEHRT for its objective and leave a run folder behind.

    Args:
        config: every setting of the run.
        devices: devices to train on; all where not given.

    Raises:
        InputError: something in the configuration or the data is wrong; raised before training.
        DivergenceError: the loss is not finite any more; the last good checkpoint is in the folder.
    """
    started, startup = time.perf_counter(), Startup()
    startup.mark("imported")
    with (
        together(config.distributed),
        run_console() as console,
        catching_signals() as interruption,
        open_folder(config) as (folder, config),
        trackers(config, folder) as send,
        ThreadPoolExecutor(2) as beside,
    ):
        run = open_pretraining(config, folder, devices, console)
        assembly, batches, schedule = run.assembly, run.batches, run.schedule
        startup.mark("data read")

        train_step = assembly.step(run.micro_batches)
        program = one_step(assembly, train_step)
        from_host = not on_device(config.train, batches, assembly.mesh)
        decisive = {**decisive_settings(config), "fingerprint": run.data.fingerprint}
        compiling, making = compile_beside(beside, run, program, decisive, from_host)
        compiling.add_done_callback(lambda _: startup.mark("compiled"))

        validation = open_validation(config, run)
        examination, record = None, not_recorded
        if is_first():
            validation.announce(console)
            examination = examine_before(config, run, validation.baselines, console)
            during, path = examination.during, run.folder / METRICS_FILE
            record = announce.LoopReporter(console, path, validation.baselines, during, send).record
        startup.mark("baselines counted")

        with open_checkpoints(run.folder / CHECKPOINTS_FOLDER) as checkpoints:
            start = partial(start_with, run, config, console)
            begun = begin(run, config, making, checkpoints, console, start, started)
            del making  # or it would hold this state's arrays beside those of a restored one
            state, cursor, telemetry = begun.state, begun.cursor, begun.telemetry
            divergence = None
            try:
                program = compiling.result()
                with open_feed(
                    config.train, assembly, train_step, program, batches, cursor.step, schedule
                ) as feed:
                    steps = Steps(feed, cursor, schedule, telemetry, record)
                    for state in steps.dispatch(begun.state, agreed(interruption, assembly.mesh)):
                        if "first step" not in startup.marks:
                            jax.block_until_ready(state)
                            startup.mark("first step")
                        console.step(cursor.step, steps.latest_tokens, steps.latest_loss)
                        if schedule.validates(cursor.step):
                            steps.settle()
                            figures = validation.figures(state.variables)
                            cursor.note_validation(figures["loss"])
                            # Metrics first: a run killed in between drops the lines past its checkpoint when
                            # resumed, while a line never written could not be brought back.
                            line = schedule.line(cursor.step, "tuning")
                            record({**line, **figures, **telemetry.probe(state)})
                            save(checkpoints, config, begun, state, figures)
                            steps.restart_clock()
                stop_reason = steps.stop_reason
                if stop_reason == "interrupted":
                    save(checkpoints, config, begun, state)
            except DivergenceError as error:
                divergence, stop_reason = error, f"diverged: {error}"
            console.close()

            best_step, assessment = checkpoints.best_step(), {}
            if best_step is not None and not divergence:
                best = best_variables(checkpoints, best_step, state)
                if stop_reason != "interrupted":  # whoever stops a run wants it to end soon
                    assessment = validation.assess(best)
                best = whole_here(best, assembly.mesh)
                if is_first():
                    write_adapter(console, config, run, best)
                    if stop_reason != "interrupted":
                        assessment |= assess_parameters(config, run, best)
        stop_reason, status = exit_status(stop_reason, interruption)
        summary: JsonObject = {}
        if examination is not None:
            ended = RunEnd(best_step, stop_reason, time.perf_counter() - begun.clock, startup)
            summary = write_summary(run, config, validation.baselines, assessment, ended, examination)
            announce.end(console, run.folder, summary)
        from_first(dict)  # what the others raise below would end the first one while it writes
    if divergence:
        raise divergence
    return RunResult(run.folder, summary, status)


@dataclass(frozen=True, eq=False)
class Pretraining(Run):
    """A pretraining run that is about to begin."""

    batches: TrainingBatches | QuestionBatches
    data: SequenceSet
    description: JsonObject
    """Counts of `data`, see `data.sequences.describe`."""
    tuning: ValidationBatches | QuestionBatches
    vectors: CodeVectors | None
    """Of `init.vectors`, in a run that begins."""
    coverage: JsonObject
    """How much of the vocabulary they cover; empty without."""


def open_pretraining(
    config: PretrainConfig, folder: Path, devices: Devices | None, console: Console
) -> Pretraining:
    """Work out everything that can go wrong, and say what will be trained on what, in the run's folder.

    Raises:
        InputError: something in the configuration or the data is wrong.
    """
    keep_freed_memory()
    check(config)
    mesh = make_mesh(devices, config.mesh)
    vectors = None
    if not config.resume:
        check_source(config.init, config.model)
        vectors = None if config.init.vectors is None else read_vectors(config.init.vectors)
    if reason := use_compilation_cache(config.compilation_cache):
        console.log(reason)
    data = load_sequences(config.data, config.model.sep_token, config.model.fact_tokens)
    check_days(config.model, data.splits)
    check_same_everywhere(config, data.fingerprint)
    description = describe(data)
    announce.data(console, config, description)
    for note in [*data.notes, *told_facts(data, tuple(data.splits))]:
        console.log(note)
    if config.resume:
        check_same_run(folder, config, data.fingerprint)
    else:
        check_vocabulary(config.init, data.vocabulary)
    if vectors is not None:
        coverage = first_rows(vectors, data.vocabulary, config).coverage
        announce.vectors(console, config.init, coverage)
    else:  # a run that is resumed keeps what it knew
        coverage = (read_config(folder).get("facts") or {}).get("vectors", {}) if config.resume else {}

    setup = set_up(config, len(data.vocabulary), mesh)
    parameters = parameter_report(config.freezing, setup)
    announce.parameters(console, parameters, setup.predictor.product)
    batches, tuning = split_batches(config, data, mesh.size)
    schedule = Schedule.of(config.train, batches.steps_per_epoch)
    announce.batches(console, batches, mesh, schedule.total_steps)

    if isinstance(batches, QuestionBatches):
        objective = objective_of_questions(config, setup, batches)
    else:
        objective = masked_code_objective(setup.predictor, config.masking, config.train.static_masks)
    assembly = assemble(config, setup, objective, schedule.total_steps, mesh)
    parts = choose_micro_batches(config, folder, batches, schedule.total_steps, assembly, console.log)
    batches = batches.with_rows_a_multiple_of(rows_multiple(batches, mesh, parts))
    counts = data.vocabulary.counts
    of_any_run = folder, assembly, batches, schedule, parts, parameters, counts
    return Pretraining(*of_any_run, data, description, tuning, vectors, coverage)


def start_with(run: Pretraining, config: PretrainConfig, console: Console, state: TrainState) -> TrainState:
    """The first state, with what `config.init` gives in place of its own parameters."""
    if config.init.vectors is not None:
        # A run that is resumed before it had a checkpoint has not read them.
        vectors = run.vectors or read_vectors(config.init.vectors)
        return with_code_rows(state, first_rows(vectors, run.data.vocabulary, config).rows)
    if config.init.run is None:
        return state
    state, source_step = start_from(config.init, state)
    announce.started_from(console, config.init, source_step)
    return state


def split_batches(
    config: PretrainConfig, data: SequenceSet, multiple_of: int
) -> tuple[TrainingBatches, ValidationBatches] | tuple[QuestionBatches, QuestionBatches]:
    """Batches of the train split and of the tuning split, for the objective of the run.

    Args:
        config: of the run.
        data: its sequences.
        multiple_of: by which the rows of each batch can be divided: devices, or parts of a step.

    Raises:
        InputError: a split without events.
    """
    length, window = config.data.max_length or config.model.positions, config.data.window
    shape = RowShape(length, config.data.packed, config.model.cls_token, multiple_of)
    if config.objective != "mlm":
        return split_question_batches(config, data, shape)
    batches = training_batches(
        data.splits["train"],
        shape,
        batch_size=config.train.batch_size,
        batch_tokens=config.train.batch_tokens,
        window=window,
        seed=config.train.seed,
        static=config.train.static_masks,
    )
    rows = batches.rows_per_batch
    return batches, validation_batches(data.splits["tuning"], shape, rows_per_batch=rows, window=window)


@dataclass(frozen=True, eq=False)
class MaskedCodeValidation:
    """Masked codes of the tuning split, the same ones each time."""

    config: PretrainConfig
    data: SequenceSet
    assembly: Assembly
    tuning: ValidationBatches

    @cached_property
    def masked(self) -> MaskedSplit:
        """The split as the validation step sees it."""
        key = self.assembly.keys.validation
        return mask_split(self.tuning, self.config.masking, key, len(self.data.vocabulary))

    @cached_property
    def results(self) -> dict[str, MaskedCodeResults]:
        """Of :func:`predict_baselines`."""
        return predict_baselines(self.config, self.data, self.masked)

    @cached_property
    def baselines(self) -> dict[str, JsonObject]:
        """Figures of `results`."""
        return {name: results.metrics() for name, results in self.results.items()}

    def announce(self, console: Console) -> None:
        """Say what must be beaten."""
        announce.baselines(console, self.results, self.masked.unasked)

    def figures(self, variables: Variables) -> JsonObject:
        """Of a model: `models.losses.mean_metrics`."""
        return validate(self._step, variables, self._placed)

    def assess(self, variables: Variables) -> JsonObject:
        """How a model stands beside the baselines, code by code, and what it takes for what; told by the
        first of several processes, which compute it together.
        """
        key, masking = self.assembly.keys.validation, self.config.masking
        step = make_scoring_step(self.assembly.setup.predictor, masking, key)
        whole = jax.jit(step, out_shardings=replicated(self.assembly.mesh))
        found = score_masked_codes(whole, variables, self.tuning, self.assembly.mesh)
        if not is_first():
            return {}
        results = results_of(self.masked, *found)
        assessment = assess(self.data.event_counts, FIRST_CODE, self.results, results)
        assessment["confusions"] = confusions(self.data.vocabulary, results)
        return assessment

    @cached_property
    def _step(self) -> Callable[[Variables, Batch], Totals]:
        key, masking = self.assembly.keys.validation, self.config.masking
        step = make_validation_step(self.assembly.setup.predictor, masking, key)
        return jax.jit(step, out_shardings=replicated(self.assembly.mesh))

    @cached_property
    def _placed(self) -> PlacedBatches:
        return PlacedBatches(self.tuning, self.assembly.mesh)


def open_validation(config: PretrainConfig, run: Pretraining) -> MaskedCodeValidation | QuestionValidation:
    """What is validated, for the objective of the run."""
    batches, tuning = run.batches, run.tuning
    if isinstance(batches, QuestionBatches) and isinstance(tuning, QuestionBatches):
        return QuestionValidation(config, run.data, run.assembly, batches, tuning)
    assert isinstance(tuning, ValidationBatches)
    return MaskedCodeValidation(config, run.data, run.assembly, tuning)


def predict_baselines(
    config: PretrainConfig, data: SequenceSet, masked: MaskedSplit
) -> dict[str, MaskedCodeResults]:
    """Predictors without training, scored on the very codes that the validation step masks.

    Returns:
        Results of ``unigram`` and ``co-occurrence``, and of the ``oracle`` where the optimum is known; where
        codes depend on covariates, also of ``oracle without sex``, ``year`` or ``gaps``.
    """
    unigram = Unigram(data.event_counts, FIRST_CODE)
    cooccurrence = Cooccurrence(data.splits["train"], unigram, FIRST_CODE)
    found = {"unigram": unigram.predict(masked), "co-occurrence": cooccurrence.predict(masked)}
    oracle = oracle_of(config.data, data.vocabulary.codes)
    if oracle is not None:
        found["oracle"] = oracle.predict(masked, config.masking)
        for name in config.data.covariates:
            found[f"oracle without {name}"] = oracle.predict(masked, config.masking, name)
    return found


def examine_before(
    config: PretrainConfig, run: Pretraining, baselines: JsonObject, console: Console
) -> Examination:
    """Show the doctor's findings before the first step, and write what a run folder begins with."""
    setup, total_steps = run.assembly.setup, run.schedule.total_steps
    facts = gather_facts(config, run.data, setup, run.batches, total_steps, run.micro_batches)
    facts = replace(facts, vectors=run.coverage)
    record = RunRecord(settings(config), run.parameters, facts, baselines)
    examination = Examination(console, record, run.folder / METRICS_FILE)
    examination.before()
    began = run_record(config, run.description, asdict(facts), baselines)
    rules = rule_files(run.data.vocabulary, run.data.preparation)
    write_start(run.folder, rules, run.parameters, began)
    return examination


def write_adapter(console: Console, config: PretrainConfig, run: Pretraining, variables: Variables) -> None:
    """Write the adapter with all that was trained beside it; nothing where the model has no adapters."""
    if config.lora is None:
        return
    values = settings(config)
    try:
        fingerprint = run.data.vocabulary.fingerprint()
        adapters, ordinary = combine.ordinary(variables["lora"], config.lora)
        adapter = AdapterConfig(
            lora=settings(ordinary),
            model=values["model"],
            vocabulary_fingerprint=fingerprint,
            base=str(run.folder.resolve()),
        )
        trained = run.assembly.setup.mask["params"]
        rules = rule_files(run.data.vocabulary, run.data.preparation)
        save_adapter(run.folder / "adapter", variables["params"], adapters, trained, adapter, rules)
    except InputError as error:
        console.log(f"The adapter was not written: {error} Its values are in checkpoints/ all the same.")


def assess_parameters(config: PretrainConfig, run: Pretraining, variables: Variables) -> JsonObject:
    """What the summary says of a trained model's parameters: which codes it holds alike, and how large its
    adapters became.
    """
    found: JsonObject = {}
    if config.init.run is not None or run.parameters["embedding"]["trainable"]:
        found["neighbours"] = neighbours(run.data.vocabulary, np.asarray(code_table(variables)))
    if config.lora is not None:
        found["adapter_norms"] = adapter_norms(variables, config.lora)
    return found


class RunEnd(NamedTuple):
    """The end of a run."""

    best_step: int | None
    stop_reason: str
    seconds: float
    """Wall time of all its parts."""
    startup: Startup


def write_summary(
    run: Pretraining,
    config: PretrainConfig,
    baselines: JsonObject,
    assessment: JsonObject,
    ended: RunEnd,
    examination: Examination,
) -> JsonObject:
    """Write summary.json, SUMMARY.txt, plots and report.html; returns the summary."""
    folder, metrics = run.folder, read_metrics(run.folder / METRICS_FILE)
    found = summarise(
        metrics,
        baselines,
        ended.best_step,
        ended.stop_reason,
        ended.seconds,
        run.description,
        run.parameters,
    )
    summary = Summary(**found, **assessment)
    if run.coverage:
        summary["init_vectors"] = run.coverage
    if "first step" in ended.startup.marks:
        summary["first_step_seconds"] = ended.startup.marks["first step"]
        summary["startup_seconds"] = ended.startup.marks
        summary["startup_processor_seconds"] = ended.startup.processor
        summary["startup_programs"] = ended.startup.programs
    summary["findings"] = examination.after(summary)
    record_metrics(folder)
    write_files(folder, {SUMMARY_FILE: json_text(summary, 2).encode()})
    write_text(folder / SUMMARY_TEXT_FILE, summary_text(summary, config.name))
    plot_curves(metrics, baselines, folder / PLOTS_FOLDER)
    write_report(folder)
    return dict(summary)

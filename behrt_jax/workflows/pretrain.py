"""Masked-code pretraining, from a configuration to a finished run folder."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import jax

from behrt_jax.adapters.lora import GROUPS
from behrt_jax.config import PretrainConfig
from behrt_jax.data.batches import (
    RowShape,
    TrainingBatches,
    ValidationBatches,
    training_batches,
    validation_batches,
)
from behrt_jax.data.sequences import SequenceSet, describe
from behrt_jax.diagnosis.finding import RunRecord
from behrt_jax.evaluation.masked_codes import Cooccurrence, MaskedCodeResults, MaskedSplit, Unigram, assess
from behrt_jax.evaluation.oracle import oracle_of
from behrt_jax.files import write_json
from behrt_jax.records.load import load_sequences
from behrt_jax.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    PARAMETERS_FILE,
    prepare_run_folder,
    truncate_metrics,
)
from behrt_jax.tracking.console import open_console
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import make_mesh, put_rows, replicated, shapes_of, shardings_of
from behrt_jax.training.feeding import PlacedBatches, on_device, one_step, open_feed
from behrt_jax.training.loop import Actions, Cursor, DivergenceError, Schedule, catching_signals, train
from behrt_jax.training.masking import FIRST_CODE
from behrt_jax.training.micro_batches import choose_micro_batches, rows_multiple
from behrt_jax.training.optimizer import rates_on_host
from behrt_jax.training.pretrained import check_source, check_vocabulary, start_from
from behrt_jax.training.runtime import Startup, keep_freed_memory, use_compilation_cache
from behrt_jax.training.state import abstract_state, init_state, optimizer_for, run_keys, set_up
from behrt_jax.training.step import TrainState, make_train_step, make_validation_step
from behrt_jax.training.telemetry import (
    gradient_metrics,
    leaves_not_finite,
    make_probe,
    offending_leaf,
    trainable_names,
)
from behrt_jax.training.validation import make_scoring_step, mask_split, score_masked_codes, validate
from behrt_jax.workflows import announce
from behrt_jax.workflows.checks import check, gather_facts
from behrt_jax.workflows.doctor import Examination
from behrt_jax.workflows.run import (
    RunResult,
    check_same_run,
    default_folder,
    parameter_report,
    restore_latest,
    run_record,
    settings,
    try_write_adapter,
    write_summary,
)

# Predictors without training, scored on the very codes that the validation step masks.


def predict_baselines(
    config: PretrainConfig, data: SequenceSet, masked: MaskedSplit
) -> dict[str, MaskedCodeResults]:
    """Results of ``unigram`` and ``co-occurrence``, and of the ``oracle`` where the optimum is known."""
    unigram = Unigram(data.vocabulary.counts, FIRST_CODE)
    cooccurrence = Cooccurrence(data.splits["train"], unigram, FIRST_CODE)
    found = {"unigram": unigram.predict(masked), "co-occurrence": cooccurrence.predict(masked)}
    oracle = oracle_of(config.data, data.vocabulary.codes)
    if oracle is not None:
        found["oracle"] = oracle.predict(masked, config.masking)
    return found


# The batches that a pretraining run reads, by its settings.


def split_batches(
    config: PretrainConfig, data: SequenceSet, multiple_of: int
) -> tuple[TrainingBatches, ValidationBatches]:
    """Batches of the train split and of the tuning split.

    Args:
        config: of the run.
        data: its sequences.
        multiple_of: by which the rows of each batch can be divided: devices, or parts of a step.

    Raises:
        InputError: a split without events.
    """
    length, window = config.data.max_length or config.model.positions, config.data.window
    shape = RowShape(length, config.data.packed, config.model.cls_token, multiple_of)
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


def pretrain(config: PretrainConfig, devices: Sequence[Any] | None = None) -> RunResult:
    """Pretrain BEHRT by masked-code prediction and leave a run folder behind.

    Args:
        config: every setting of the run.
        devices: devices to train on; all where not given.

    Raises:
        InputError: something in the configuration or the data is wrong; raised before training.
        DivergenceError: the loss is not finite any more; the last good checkpoint is in the folder.
    """
    started, startup = time.perf_counter(), Startup()
    startup.mark("imported")
    keep_freed_memory()
    check(config)
    mesh = make_mesh(devices, config.mesh)
    if not config.resume:
        check_source(config.init, config.model)
    with open_console() as console, catching_signals() as interruption, ThreadPoolExecutor(1) as beside:
        if reason := use_compilation_cache(config.compilation_cache):
            console.log(reason)
        folder = prepare_run_folder(config.output or default_folder(config.name), config.resume)
        data = load_sequences(config.data, config.model.sep_token)
        description = describe(data)
        announce.data(console, config, description)
        if not config.resume:
            check_vocabulary(config.init, data.vocabulary)
        if config.resume:
            check_same_run(folder, config, data.fingerprint)

        setup = set_up(config, len(data.vocabulary), mesh)
        parameters = parameter_report(config.freezing, setup)
        announce.parameters(console, parameters, setup.predictor.product)

        batches, tuning = split_batches(config, data, mesh.size)
        total_steps = config.train.epochs * batches.steps_per_epoch
        total_steps = min(total_steps, config.train.max_steps or total_steps)
        announce.batches(console, batches, mesh, total_steps)
        startup.mark("data read")

        init_key, step_key, validation_key = run_keys(config.train.seed)
        optimizer = optimizer_for(config, setup, total_steps)
        state_shapes = abstract_state(setup.shapes, optimizer, mesh)
        jit_step = partial(
            jax.jit,
            donate_argnums=0,
            out_shardings=(shardings_of(state_shapes), replicated(mesh)),
        )
        step_in_parts = partial(
            make_train_step,
            setup.predictor,
            optimizer,
            setup.mask,
            config.masking,
            step_key,
            clip_norm=config.optimizer.clip_norm,
            static_masks=config.train.static_masks,
        )
        micro_batches = choose_micro_batches(
            config,
            folder,
            batches,
            mesh,
            total_steps,
            len(data.vocabulary),
            lambda parts: one_step(step_in_parts(micro_batches=parts), jit_step),
            lambda: init_state(config, setup, optimizer, init_key, mesh),
            console.log,
        )
        batches = batches.with_rows_a_multiple_of(rows_multiple(batches, mesh, micro_batches))
        train_step = step_in_parts(micro_batches=micro_batches)
        program = one_step(train_step, jit_step)

        def prepare_step() -> TrainState:
            state = init_state(config, setup, optimizer, init_key, mesh)
            if not on_device(config.train, batches, mesh):
                program.lower(state_shapes, shapes_of(put_rows(batches.batch(0), mesh))).compile()
            startup.mark("compiled")
            return state

        compiling = beside.submit(prepare_step)  # the processor has time for it while the host counts
        if jax.process_count() > 1:
            compiling.result()  # processes must start their programs in the same order
        masked = mask_split(tuning, config.masking, validation_key, len(data.vocabulary))
        baselines = predict_baselines(config, data, masked)
        baseline_metrics = {name: results.metrics() for name, results in baselines.items()}
        announce.baselines(console, baselines)
        facts = gather_facts(config, data, setup, batches, total_steps, micro_batches)
        run = RunRecord(settings(config), parameters, facts, baseline_metrics)
        examination = Examination(console, run, folder / METRICS_FILE)
        examination.before()
        startup.mark("baselines counted")

        data.vocabulary.write(folder / "vocabulary.parquet")
        write_json(folder / PARAMETERS_FILE, parameters)
        write_json(folder / CONFIG_FILE, run_record(config, description, asdict(facts), baseline_metrics))

        trains = [group for group in GROUPS if parameters[group]["trainable"]]
        learning_rates = rates_on_host(config.optimizer, total_steps, trains)
        validation_step = jax.jit(make_validation_step(setup.predictor, config.masking, validation_key))

        with open_checkpoints(folder / CHECKPOINTS_FOLDER) as checkpoints:
            state, cursor = compiling.result(), Cursor()
            del compiling  # or it would hold this state's arrays beside those of a restored one
            counts, static = data.vocabulary.counts, config.train.static_masks
            probe = make_probe(state.variables["lora"], counts, batches.steps_per_epoch, static)
            names = trainable_names(setup.mask)
            if config.resume:
                state, cursor = restore_latest(checkpoints, state, console)
            if config.init.run is not None and cursor.step == 0:
                state, source_step = start_from(config.init, state)
                announce.started_from(console, config.init, source_step)
            at_start = leaves_not_finite(state.variables)
            truncate_metrics(folder / METRICS_FILE, cursor.step)
            earlier_seconds = cursor.seconds

            def save(state: TrainState, cursor: Cursor, metrics: dict[str, Any] | None) -> None:
                cursor.seconds = earlier_seconds + time.perf_counter() - started
                trees = state.variables["params"], state.variables["lora"], state.opt_state
                checkpoints.save(cursor.step, *trees, cursor.to_json(), settings(config), metrics)

            schedule = Schedule(
                total_steps,
                batches.steps_per_epoch,
                config.train.validate_every or batches.steps_per_epoch,
                config.train.log_every,
                config.train.patience,
            )
            placed = PlacedBatches(tuning, mesh)
            console.start(total_steps, cursor.step, batches.steps_per_epoch)
            divergence = None
            try:
                with open_feed(
                    config.train, train_step, program, jit_step, batches, mesh, cursor.step, schedule
                ) as feed:

                    def step_and_note(state: TrainState, inputs: Any) -> tuple[TrainState, Any]:
                        results = feed.train_step(state, inputs)
                        if "first step" not in startup.marks:
                            jax.block_until_ready(results)
                            startup.mark("first step")
                        return results

                    state, stop_reason = train(
                        state,
                        cursor,
                        schedule,
                        Actions(
                            feed.next_inputs,
                            step_and_note,
                            validate=lambda variables: validate(validation_step, variables, placed),
                            learning_rates=learning_rates,
                            save=save,
                            interrupted=lambda: bool(interruption),
                            probe=probe,
                            gradients=lambda squares: gradient_metrics(names, squares),
                            offender=lambda squares: offending_leaf(names, squares, at_start),
                            compilations=feed.compilations,
                        ),
                        announce.LoopReporter(
                            console,
                            folder / METRICS_FILE,
                            baseline_metrics,
                            examination.during,
                        ),
                    )
            except DivergenceError as error:
                divergence, stop_reason = error, f"diverged: {error}"
            console.close()

            best_step, assessment = checkpoints.best_step(), {}
            if best_step is not None and not divergence:
                trees = state.variables
                best = checkpoints.restore(best_step, params=trees["params"], lora=trees["lora"])
                variables = {"params": best.params, "lora": best.lora}
                try_write_adapter(console, folder, config, setup, variables, data.vocabulary.fingerprint())
                if stop_reason != "interrupted":  # whoever stops a run wants it to end soon
                    scoring_step = jax.jit(make_scoring_step(setup.predictor, config.masking, validation_key))
                    results = score_masked_codes(scoring_step, variables, tuning, masked, mesh)
                    assessment = assess(data.vocabulary.counts, FIRST_CODE, baselines, results)
        exit_status = 0
        if stop_reason == "interrupted":
            stop_reason, exit_status = f"interrupted by {interruption.name}", 128 + interruption.number
        summary = write_summary(
            folder,
            config,
            baselines=baseline_metrics,
            assessment=assessment,
            best_step=best_step,
            stop_reason=stop_reason,
            seconds=earlier_seconds + time.perf_counter() - started,
            examination=examination,
            data=description,
            parameters=parameters,
            startup=startup.marks,
        )
        announce.end(console, folder, summary)
    if divergence:
        raise divergence
    return RunResult(folder, summary, exit_status)

"""Fine-tuning: from a pretrained encoder and a table of labels to a calibrated model."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from behrt_jax.adapters.lora import GROUPS
from behrt_jax.config import FinetuneConfig
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE, truncate_metrics
from behrt_jax.tracking.console import open_console
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import put_rows, replicated, shapes_of, shardings_of
from behrt_jax.training.feeding import from_host, one_step
from behrt_jax.training.loop import Actions, Cursor, DivergenceError, Schedule, catching_signals, train
from behrt_jax.training.optimizer import rates_on_host
from behrt_jax.training.pretrained import read_encoder
from behrt_jax.training.state import abstract_state, first_state, run_keys, with_encoder
from behrt_jax.training.step import TrainState, make_output_step, make_update_step, task_objective
from behrt_jax.training.telemetry import (
    gradient_metrics,
    leaves_not_finite,
    make_probe,
    offending_leaf,
    trainable_names,
)
from behrt_jax.training.validation import score, task_metrics
from behrt_jax.workflows.checks import check_finetune, has_members
from behrt_jax.workflows.finetune_run import TaskReporter, calibrate, open_finetuning, write_results
from behrt_jax.workflows.labelled_data import read_labelled
from behrt_jax.workflows.run import RunResult, restore_latest, settings


def finetune(config: FinetuneConfig, devices: Sequence[Any] | None = None) -> RunResult:
    """Fine-tune on prepared data and its labels, and leave a run folder behind.

    Args:
        config: every setting of the run.
        devices: devices to train on; all where not given.

    Raises:
        InputError: something in the configuration, the data or the labels is wrong; raised before training.
        DivergenceError: the loss is not finite any more; the last good checkpoint is in the folder.
    """
    check_finetune(config)
    if has_members(config):
        from behrt_jax.workflows.population import finetune_population

        return finetune_population(config, devices)
    data, labels, delays = read_labelled(config.data, config.labels)
    return finetune_on(config, data, labels, delays, devices)


def finetune_on(
    config: FinetuneConfig,
    data: SequenceSet,
    labels: Labels,
    delays: Sequence[str] = (),
    devices: Sequence[Any] | None = None,
) -> RunResult:
    """As :func:`finetune`, a single model with data (opened without separators) and labels in memory."""
    started = time.perf_counter()
    with open_console() as console, catching_signals() as interruption, ThreadPoolExecutor(1) as beside:
        run = open_finetuning(config, data, labels, delays, devices, console)
        folder, setup, labelled, batches, mesh = run.folder, run.setup, run.labelled, run.batches, run.mesh

        init_key, step_key, _ = run_keys(config.train.seed)
        state_shapes = abstract_state(setup.shapes, run.optimizer, mesh)
        jit_step = partial(
            jax.jit, donate_argnums=0, out_shardings=(shardings_of(state_shapes), replicated(mesh))
        )
        step = make_update_step(
            task_objective(setup.predictor),
            run.optimizer,
            setup.mask,
            step_key,
            clip_norm=config.optimizer.clip_norm,
            micro_batches=run.micro_batches,
            merged=setup.predictor.merged,
            mesh=mesh,
        )
        program = one_step(step, jit_step)
        output_step = jax.jit(make_output_step(setup.predictor))

        def prepare_step() -> TrainState:
            state = first_state(setup.init, setup.shapes, run.optimizer, init_key, mesh)
            program.lower(state_shapes, shapes_of(put_rows(batches.batch(0), mesh))).compile()
            return state

        compiling = beside.submit(prepare_step)  # the processor has time for it while the encoder is read
        if jax.process_count() > 1:
            compiling.result()  # processes must start their programs in the same order
        encoder = None if config.from_scratch else read_encoder(run.pretrained, mesh)

        with open_checkpoints(folder / CHECKPOINTS_FOLDER) as checkpoints:
            state, cursor = compiling.result(), Cursor()
            del compiling  # or it would hold this state's arrays beside those of a restored one
            # How far adapters moved is told from their first values, also after a restart.
            counts = labelled.vocabulary.counts
            probe = make_probe(state.variables["lora"], counts, batches.steps_per_epoch)
            if config.resume:
                state, cursor = restore_latest(checkpoints, state, console)
            if encoder is not None and cursor.step == 0:
                state = with_encoder(state, encoder.params, labelled.first_rows(encoder.params))
                console.log(f"Starting from step {encoder.step:,} of {config.init}.")
            del encoder
            names = trainable_names(setup.mask)
            at_start = leaves_not_finite(state.variables)
            truncate_metrics(folder / METRICS_FILE, cursor.step)
            earlier_seconds = cursor.seconds

            def save(state: TrainState, cursor: Cursor, metrics: dict[str, Any] | None) -> None:
                cursor.seconds = earlier_seconds + time.perf_counter() - started
                trees = state.variables["params"], state.variables["lora"], state.opt_state
                figures = None if metrics is None else {k: v for k, v in metrics.items() if v is not None}
                checkpoints.save(cursor.step, *trees, cursor.to_json(), settings(config), figures)

            def validate(variables: Any) -> dict[str, Any]:
                outputs = score(output_step, variables, run.tuning, mesh)
                return task_metrics(labelled.task.kind, outputs, labelled.tuning_targets)

            trains = [group for group in GROUPS if run.parameters[group]["trainable"]]
            schedule = Schedule(
                run.total_steps,
                batches.steps_per_epoch,
                config.train.validate_every or batches.steps_per_epoch,
                config.train.log_every,
                config.train.patience,
            )
            console.start(run.total_steps, cursor.step, batches.steps_per_epoch)
            divergence = None
            try:
                with from_host(program, batches, mesh, range(cursor.step, run.total_steps)) as feed:
                    state, stop_reason = train(
                        state,
                        cursor,
                        schedule,
                        Actions(
                            feed.next_inputs,
                            feed.train_step,
                            validate=validate,
                            learning_rates=rates_on_host(config.optimizer, run.total_steps, trains),
                            save=save,
                            interrupted=lambda: bool(interruption),
                            probe=probe,
                            gradients=lambda squares: gradient_metrics(names, squares),
                            offender=lambda squares: offending_leaf(names, squares, at_start),
                            compilations=feed.compilations,
                        ),
                        TaskReporter(console, folder / METRICS_FILE),
                    )
            except DivergenceError as error:
                divergence, stop_reason = error, f"diverged: {error}"
            console.close()

            best_step, variables, calibration = checkpoints.best_step(), None, None
            if best_step is not None and not divergence:
                trees = state.variables
                best = checkpoints.restore(best_step, params=trees["params"], lora=trees["lora"])
                variables = {"params": best.params, "lora": best.lora}
                outputs = score(output_step, variables, run.tuning, mesh)
                calibration = calibrate(
                    config.task, labelled.task.kind, outputs[None], labelled.tuning_targets
                )
        exit_status = 0
        if stop_reason == "interrupted":
            stop_reason, exit_status = f"interrupted by {interruption.name}", 128 + interruption.number
        summary = write_results(
            console,
            config,
            run,
            variables=variables,
            calibration=calibration,
            best_step=best_step,
            stop_reason=stop_reason,
            seconds=earlier_seconds + time.perf_counter() - started,
        )
    if divergence:
        raise divergence
    return RunResult(folder, summary, exit_status)

"""Fine-tuning: from a pretrained encoder and a table of labels to a calibrated model."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from behrt_jax.adapters.groups import GROUPS
from behrt_jax.config import FinetuneConfig
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.tracking.console import open_console
from behrt_jax.tracking.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    PARAMETERS_FILE,
    prepare_run_folder,
    truncate_metrics,
    write_json,
)
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.compilation import use_compilation_cache
from behrt_jax.training.feeding import from_host, one_step
from behrt_jax.training.host_memory import keep_freed_memory
from behrt_jax.training.interruption import catching_signals
from behrt_jax.training.loop import Actions, Cursor, DivergenceError, Schedule, train
from behrt_jax.training.mesh import make_mesh, put_rows, replicated, shapes_of
from behrt_jax.training.optimizer import rates_on_host
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.training.sharding import shardings_of
from behrt_jax.training.state import abstract_state, first_state, run_keys
from behrt_jax.training.task_losses import base_outputs
from behrt_jax.training.task_scores import score, task_metrics
from behrt_jax.training.task_state import set_up_task, task_optimizer, with_encoder
from behrt_jax.training.task_step import make_output_step, task_objective
from behrt_jax.training.telemetry import (
    gradient_metrics,
    leaves_not_finite,
    make_probe,
    offending_leaf,
    trainable_names,
)
from behrt_jax.training.update import TrainState, make_update_step
from behrt_jax.workflows import announce
from behrt_jax.workflows.finetune_checks import check_finetune, model_of
from behrt_jax.workflows.finetune_results import TaskReporter, calibrate, write_results
from behrt_jax.workflows.labelled_data import announce_labels, label_data, read_labelled, split_batches
from behrt_jax.workflows.restoring import restore_latest
from behrt_jax.workflows.results import RunResult, parameter_report
from behrt_jax.workflows.run_settings import check_same_run, default_folder, run_record, settings


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
    data, labels, delays = read_labelled(config.data, config.labels)
    return finetune_on(config, data, labels, delays, devices)


def finetune_on(
    config: FinetuneConfig,
    data: SequenceSet,
    labels: Labels,
    delays: Sequence[str] = (),
    devices: Sequence[Any] | None = None,
) -> RunResult:
    """As :func:`finetune`, with data (opened without separators) and labels that are in memory."""
    started = time.perf_counter()
    keep_freed_memory()
    check_finetune(config)
    assert config.init is not None
    pretrained = open_pretrained(config.init)
    model = model_of(config, pretrained.model)
    mesh = make_mesh(devices, config.mesh)
    with open_console() as console, catching_signals() as interruption, ThreadPoolExecutor(1) as beside:
        if reason := use_compilation_cache(config.compilation_cache):
            console.log(reason)
        labelled = label_data(config, model, pretrained.vocabulary, data, labels, delays)
        announce_labels(console, labelled)
        task = labelled.task
        folder = prepare_run_folder(config.output or default_folder(config.name), config.resume)
        if config.resume:
            check_same_run(folder, config, data.fingerprint)

        setup = set_up_task(
            model,
            len(labelled.vocabulary),
            task,
            config.task.pooling,
            config.lora,
            config.freezing,
            mesh,
            base_outputs(task.kind, labelled.train_targets, task.outputs),
        )
        parameters = parameter_report(config.freezing, setup)
        announce.parameters(console, parameters, setup.predictor.product)
        batches, tuning, micro_batches = split_batches(config, model, labelled, mesh)
        total_steps = config.train.epochs * batches.steps_per_epoch
        total_steps = min(total_steps, config.train.max_steps or total_steps)
        console.log(
            f"A step: {len(labelled.train) / batches.steps_per_epoch:.1f} examples in {batches.batch_rows} "
            f"rows of {batches.row_length}. In all {total_steps:,} steps at most."
        )

        init_key, step_key, _ = run_keys(config.train.seed)
        optimizer = task_optimizer(config.optimizer, setup, total_steps)
        state_shapes = abstract_state(setup.shapes, optimizer, mesh)
        jit_step = partial(
            jax.jit, donate_argnums=0, out_shardings=(shardings_of(state_shapes), replicated(mesh))
        )
        step = make_update_step(
            task_objective(setup.predictor),
            optimizer,
            setup.mask,
            step_key,
            clip_norm=config.optimizer.clip_norm,
            micro_batches=micro_batches,
            merged=setup.predictor.merged,
            mesh=mesh,
        )
        program = one_step(step, jit_step)
        output_step = jax.jit(make_output_step(setup.predictor))

        def prepare_step() -> TrainState:
            state = first_state(setup.init, setup.shapes, optimizer, init_key, mesh)
            program.lower(state_shapes, shapes_of(put_rows(batches.batch(0), mesh))).compile()
            return state

        compiling = beside.submit(prepare_step)  # the processor has time for it while the encoder is read
        if jax.process_count() > 1:
            compiling.result()  # processes must start their programs in the same order
        encoder, encoder_step = (None, None) if config.from_scratch else read_encoder(pretrained, mesh)

        labelled.vocabulary.write(folder / "vocabulary.parquet")
        write_json(folder / PARAMETERS_FILE, parameters)
        facts = {
            "task": task.to_json(),
            "model": settings(model),
            "micro_batches": micro_batches,
            "total_steps": total_steps,
            "started_from_step": encoder_step,
        }
        description = {"fingerprint": data.fingerprint, **labelled.counts}
        write_json(folder / CONFIG_FILE, run_record(config, description, facts, {}))

        with open_checkpoints(folder / CHECKPOINTS_FOLDER) as checkpoints:
            state, cursor = compiling.result(), Cursor()
            del compiling  # or it would hold this state's arrays beside those of a restored one
            if config.resume:
                state, cursor = restore_latest(checkpoints, state, console)
            if encoder is not None and cursor.step == 0:
                state = with_encoder(state, encoder)
                console.log(f"Starting from step {encoder_step:,} of {config.init}.")
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
                outputs = score(output_step, variables, tuning, mesh)
                return task_metrics(task.kind, outputs, labelled.tuning_targets)

            trains = [group for group in GROUPS if parameters[group]["trainable"]]
            schedule = Schedule(
                total_steps,
                batches.steps_per_epoch,
                config.train.validate_every or batches.steps_per_epoch,
                config.train.log_every,
                config.train.patience,
            )
            console.start(total_steps, cursor.step, batches.steps_per_epoch)
            divergence = None
            try:
                with from_host(program, batches, mesh, range(cursor.step, total_steps)) as feed:
                    state, stop_reason = train(
                        state,
                        cursor,
                        schedule,
                        Actions(
                            feed.next_inputs,
                            feed.train_step,
                            validate=validate,
                            learning_rates=rates_on_host(config.optimizer, total_steps, trains),
                            save=save,
                            interrupted=lambda: bool(interruption),
                            probe=make_probe(
                                state.variables["lora"], labelled.vocabulary.counts, batches.steps_per_epoch
                            ),
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
                outputs = score(output_step, variables, tuning, mesh)
                calibration = calibrate(config.task, task.kind, outputs, labelled.tuning_targets)
        summary = write_results(
            console,
            folder,
            config,
            setup=setup,
            labelled=labelled,
            variables=variables,
            calibration=calibration,
            best_step=best_step,
            stop_reason=f"{stop_reason} by {interruption.name}"
            if stop_reason == "interrupted"
            else stop_reason,
            seconds=earlier_seconds + time.perf_counter() - started,
            parameters=parameters,
        )
    if divergence:
        raise divergence
    return RunResult(folder, summary, 128 + interruption.number if stop_reason == "interrupted" else 0)

"""Fine-tuning: from a pretrained encoder and a table of labels to a calibrated model."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

import jax

from behrt_jax.config.training import FinetuneConfig
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.diagnosis import finding
from behrt_jax.errors import DivergenceError, InputError
from behrt_jax.files import JsonObject, json_text, write_text
from behrt_jax.run_folder import (
    CHECKPOINTS_FOLDER,
    METRICS_FILE,
    PLOTS_FOLDER,
    SUMMARY_FILE,
    SUMMARY_TEXT_FILE,
    append_metrics,
    read_metrics,
    record_metrics,
    shown_files,
    write_files,
)
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.plots import plot_curves
from behrt_jax.tracking.report import write_report
from behrt_jax.tracking.summary import Summary, headline, summary_text
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import Devices, replicated
from behrt_jax.training.feeding import from_host, one_step
from behrt_jax.training.loop import Steps, catching_signals
from behrt_jax.training.pretrained import EncoderParameters, check_readable, open_pretrained, read_encoder
from behrt_jax.training.processes import agreed, from_first, is_first, together, whole_here
from behrt_jax.training.state import with_encoder
from behrt_jax.training.step import TrainState, Variables
from behrt_jax.training.telemetry import adapter_norms
from behrt_jax.training.validation import make_output_step, score, task_metrics
from behrt_jax.workflows.checks import check_finetune, has_members
from behrt_jax.workflows.finetune_run import (
    TASK_FILE,
    Finetuning,
    Judged,
    examined,
    judge,
    loss_of_base_rate,
    open_finetuning,
    task_record,
    try_write_adapter,
)
from behrt_jax.workflows.labelled_data import read_labelled
from behrt_jax.workflows.population import finetune_population, search
from behrt_jax.workflows.run import (
    RunResult,
    begin,
    best_variables,
    compile_beside,
    decisive_settings,
    exit_status,
    not_recorded,
    open_folder,
    run_console,
    save,
    trackers,
)


def finetune(config: FinetuneConfig, devices: Devices | None = None) -> RunResult:
    """Fine-tune on prepared data and its labels, and leave a run folder behind.

    Args:
        config: every setting of the run.
        devices: devices to train on; all where not given.

    Raises:
        InputError: something in the configuration, the data or the labels is wrong; raised before training.
        DivergenceError: the loss is not finite any more; the last good checkpoint is in the folder.
    """
    check_finetune(config)
    assert config.init is not None
    with together(config.distributed):
        if has_members(config) and jax.process_count() > 1:
            raise InputError(
                "population.size: members are trained by one process alone: leave out --distributed, or give "
                "each member a run of its own (train.seed)."
            )
        pretrained = open_pretrained(config.init)
        if not config.from_scratch:
            check_readable(pretrained)
        if has_members(config):
            return finetune_population(config, devices)
        data, labels, delays = read_labelled(config.data, config.labels)
        return finetune_on(config, data, labels, delays, devices)


def finetune_on(
    config: FinetuneConfig,
    data: SequenceSet,
    labels: Labels,
    delays: Sequence[str] = (),
    devices: Devices | None = None,
) -> RunResult:
    """As :func:`finetune`, a single model with data (opened without separators) and labels in memory."""
    started = time.perf_counter()
    with (
        run_console() as console,
        catching_signals() as interruption,
        open_folder(config) as (folder, config),
        trackers(config, folder) as send,
        ThreadPoolExecutor(2) as beside,
    ):
        run = open_finetuning(config, folder, data, labels, delays, devices, console, search)
        config = run.config
        assembly, labelled, schedule, mesh = run.assembly, run.labelled, run.schedule, run.assembly.mesh
        program = one_step(assembly, assembly.step(run.micro_batches))
        output_step = jax.jit(make_output_step(assembly.setup.predictor), out_shardings=replicated(mesh))
        decisive = decisive_settings(config) | {
            "fingerprint": data.fingerprint,
            "task": labelled.task.to_json(),
            "first_outputs": None if labelled.tasks else labelled.base_outputs().tolist(),
        }
        compiling, making = compile_beside(beside, run, program, decisive)
        encoder = None if config.from_scratch else read_encoder(run.pretrained, mesh)

        def write(line: JsonObject) -> None:
            append_metrics(run.folder / METRICS_FILE, line)
            send(line)

        record = write if is_first() else not_recorded

        with open_checkpoints(run.folder / CHECKPOINTS_FOLDER) as checkpoints:
            start = partial(_start, config, run, encoder, console)
            begun = begin(run, config, making, checkpoints, console, start, started)
            del making, encoder, start  # or they would hold their arrays beside those that are trained
            state, cursor, telemetry = begun.state, begun.cursor, begun.telemetry
            divergence = None
            try:
                remaining = range(cursor.step, schedule.total_steps)
                with from_host(compiling.result(), run.batches, mesh, remaining) as feed:
                    steps = Steps(feed, cursor, schedule, telemetry, record)
                    for state in steps.dispatch(begun.state, agreed(interruption, mesh)):
                        console.step(cursor.step, steps.latest_tokens, steps.latest_loss)
                        if schedule.validates(cursor.step):
                            steps.settle()
                            outputs = score(output_step, state.variables, run.tuning, mesh)
                            validation = task_metrics(labelled.task.kind, outputs, labelled.tuning_targets)
                            cursor.note_validation(validation["loss"])
                            # Metrics before the checkpoint, as in pretraining.
                            line = {**schedule.line(cursor.step, "tuning"), **validation}
                            record({**line, **telemetry.probe(state)})
                            where = f"epoch {line['epoch']:.1f}  step {cursor.step:,}"
                            console.log(f"{where}  validation {_figures(line)}")
                            save(checkpoints, config, begun, state, validation)
                            steps.restart_clock()
                stop_reason = steps.stop_reason
                if stop_reason == "interrupted":
                    save(checkpoints, config, begun, state)
            except DivergenceError as error:
                divergence, stop_reason = error, f"diverged: {error}"
            console.close()

            best_step, best = checkpoints.best_step(), None
            if best_step is not None and not divergence:
                variables = best_variables(checkpoints, best_step, state)
                outputs = score(output_step, variables, run.tuning, mesh)
                variables = whole_here(variables, mesh)
                if is_first():
                    best = variables, judge(config, labelled, outputs[None])
        stop_reason, status = exit_status(stop_reason, interruption)
        seconds = time.perf_counter() - begun.clock
        summary: JsonObject = {}
        if is_first():
            summary = _summary(run, best, best_step, stop_reason, seconds)
            write_results(console, config, run, best, summary)
        from_first(dict)  # as in pretraining
    if divergence:
        raise divergence
    return RunResult(run.folder, summary, status)


def _start(
    config: FinetuneConfig,
    run: Finetuning,
    encoder: EncoderParameters | None,
    console: Console,
    state: TrainState,
) -> TrainState:
    """The state with the pretrained encoder in it, if the run starts from one."""
    if encoder is None:
        return state
    console.log(f"Starting from step {encoder.step:,} of {config.init}.")
    return with_encoder(state, encoder.params, run.labelled.first_rows(encoder.params))


def _summary(
    run: Finetuning,
    best: tuple[Variables, Judged] | None,
    best_step: int | None,
    stop_reason: str,
    seconds: float,
) -> JsonObject:
    """Content of summary.json."""
    lora = run.config.lora
    metrics = read_metrics(run.folder / METRICS_FILE)
    validations = [record for record in metrics if record.get("split") == "tuning"]
    return {
        "task": run.labelled.task.kind,
        "best_step": best_step,
        "best": next((record for record in validations if record["step"] == best_step), None),
        "last": validations[-1] if validations else None,
        "epochs": max((record.get("epoch") or 0.0 for record in metrics), default=0.0),
        "steps": max((record["step"] for record in metrics), default=0),
        "stop_reason": stop_reason,
        "wall_seconds": seconds,
        "baselines": {"base rate": {"loss": loss_of_base_rate(run.labelled)}},
        **({} if best is None else best[1].said),
        **({} if best is None or lora is None else {"adapter_norms": adapter_norms(best[0], lora)}),
        "calibration": None if best is None else asdict(best[1].calibration),
        "data": run.labelled.counts,
        "parameters": {key: value for key, value in run.parameters.items() if key != "adapters"},
    }


def write_results(
    console: Console,
    config: FinetuneConfig,
    run: Finetuning,
    best: tuple[Variables, Judged] | None,
    summary: JsonObject,
) -> None:
    """Write task.json, the adapter, summary.json, SUMMARY.txt, plots and report.html; `best` are the
    variables of the best checkpoint and what was fitted with them.
    """
    folder = run.folder
    if best is not None:
        record = task_record(config, run, best[1].calibration, best[1].blend)
        write_files(folder, {TASK_FILE: json_text(record, 2).encode()})
        if config.lora is not None:
            try_write_adapter(console, folder / "adapter", run, best[0], record)
    record_metrics(folder)
    found = examined(console, run, summary)
    summary = {**summary, "findings": finding.to_json(found)}
    write_files(folder, {SUMMARY_FILE: json_text(summary, 2).encode()})
    write_text(folder / SUMMARY_TEXT_FILE, summary_text(Summary(**summary), config.name))
    plot_curves(read_metrics(folder / METRICS_FILE), summary["baselines"], folder / PLOTS_FOLDER)
    write_report(folder)
    console.log(f"Stopped: {summary['stop_reason']}.")
    console.log(headline(Summary(**summary)))
    console.log(f"Written to {folder}: {', '.join(shown_files(folder))}")


def _figures(metrics: JsonObject) -> str:
    names = [name for name in ("loss", "auroc", "accuracy") if metrics.get(name) is not None]
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in names)

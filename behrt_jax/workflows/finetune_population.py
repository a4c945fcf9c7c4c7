"""Several members fine-tuned at once on one frozen base: an ensemble, a search, or a cross-validation."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.config import FinetuneConfig, LoRAConfig
from behrt_jax.data.labels import Labels
from behrt_jax.data.read_ahead import reading_ahead
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.task_batches import TaskBatch, TaskBatches
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.tracking.run_folder import (
    METRICS_FILE,
    SUMMARY_FILE,
    SUMMARY_TEXT_FILE,
    append_metrics,
    write_json,
    write_text,
)
from behrt_jax.training.compilation import use_compilation_cache
from behrt_jax.training.feeding import AHEAD
from behrt_jax.training.host_memory import keep_freed_memory
from behrt_jax.training.mesh import put_rows, replicated
from behrt_jax.training.population import (
    PopulationState,
    init_population,
    largest,
    make_members,
    make_population_step,
    member,
    population_predict,
)
from behrt_jax.training.pretrained import read_encoder
from behrt_jax.training.state import first_state, run_keys
from behrt_jax.training.task_scores import score, task_metrics
from behrt_jax.training.task_state import with_encoder
from behrt_jax.training.task_step import make_output_step, task_objective
from behrt_jax.workflows.finetune_checks import check_finetune, check_population
from behrt_jax.workflows.finetune_results import (
    MEMBERS_FOLDER,
    TASK_FILE,
    calibrate,
    loss_of_base_rate,
    task_record,
    try_write_adapter,
)
from behrt_jax.workflows.finetune_setup import Finetuning, open_finetuning
from behrt_jax.workflows.results import RunResult
from behrt_jax.workflows.run_settings import settings


class Variation(NamedTuple):
    """In what the members of a population differ."""

    seeds: list[int]
    rates: list[float]
    """Factors on the learning rate."""
    adapters: list[LoRAConfig | None]
    folds: np.ndarray | None
    """Fold of each train example, int64 ``[examples]``: member k does not train on fold k."""
    names: list[str]


def finetune_population(
    config: FinetuneConfig,
    data: SequenceSet,
    labels: Labels,
    delays: Sequence[str] = (),
    devices: Sequence[Any] | None = None,
) -> RunResult:
    """Train all members in one program, keep each one's best epoch, and leave a run folder behind.

    Its ``members/0``, ``members/1``, ... are adapters of their own; task.json says which of them predict.

    Raises:
        InputError: something in the configuration, the data or the labels is wrong; raised before training.
    """
    started = time.perf_counter()
    keep_freed_memory()
    check_finetune(config)
    check_population(config)
    with open_console() as console:
        if reason := use_compilation_cache(config.compilation_cache):
            console.log(reason)
        run = open_finetuning(config, data, labels, delays, devices, console)
        variation = vary(config, run)
        state, members, program, forward = _build(config, run, variation)
        best = _train(console, config, run, variation, state, members, program, forward)
        summary = _write(console, config, run, variation, best, time.perf_counter() - started)
    return RunResult(run.folder, summary)


def vary(config: FinetuneConfig, run: Finetuning) -> Variation:
    """Seeds, learning rates, adapters and folds of the members."""
    population, size = config.population, config.population.size
    seeds, rates = [config.train.seed] * size, [1.0] * size
    adapters: list[LoRAConfig | None] = [config.lora] * size
    folds = None
    if population.vary == "seed":
        seeds = [config.train.seed + k for k in range(size)]
        names = [f"seed {seed}" for seed in seeds]
    elif population.vary == "learning_rate":
        rates = [2.0 ** (2 * k / max(size - 1, 1) * 2 - 2) for k in range(size)]  # a quarter to four times
        if population.values:
            rates = [value / config.optimizer.learning_rate for value in population.values]
        names = [f"learning rate {rate * config.optimizer.learning_rate:.2g}" for rate in rates]
    elif population.vary == "rank":
        ranks = [int(value) for value in population.values] or [2**k for k in range(size)]
        assert config.lora is not None
        for place, rank in enumerate(ranks):
            adapters[place] = replace(config.lora, rank=rank)
        names = [f"rank {rank}" for rank in ranks]
    else:
        subjects, place = np.unique(run.labelled.train.subject_ids, return_inverse=True)
        of_subject = np.random.default_rng(config.train.seed).permutation(len(subjects)) % size
        folds = of_subject[place]
        names = [f"fold {k}" for k in range(size)]
    return Variation(seeds, rates, adapters, folds, names)


def _build(config: FinetuneConfig, run: Finetuning, variation: Variation) -> tuple[Any, ...]:
    """First state, members, jitted step and jitted outputs of all members."""
    setup, mesh = run.setup, run.mesh
    keys = [run_keys(seed) for seed in variation.seeds]
    first = first_state(setup.init, setup.shapes, run.optimizer, keys[0][0], mesh)
    if not config.from_scratch:
        encoder = read_encoder(run.pretrained, mesh)
        first = with_encoder(first, encoder.params, run.labelled.first_rows(encoder.params))
    given = first.variables["params"].get("new_codes")

    def init(key: jax.Array, adapters: LoRAConfig | None) -> Any:
        variables = setup.init_with(key, adapters)
        if given is not None:  # what the rows begin with comes from the base
            variables["params"]["new_codes"] = given
        return variables

    configs = variation.adapters
    with_adapters = [one for one in configs if one is not None]
    predictor = setup.predictor
    if with_adapters:
        predictor = predictor._replace(lora=largest(with_adapters))
    alike = len(set(variation.seeds)) == 1
    step_keys = keys[0][1] if alike else jnp.stack([key[1] for key in keys])
    members = make_members(step_keys, variation.rates, with_adapters or None)
    first_keys = jnp.stack([jax.random.clone(key[0]) for key in keys])
    state = init_population(init, first_keys, configs, first.variables, setup.mask, run.optimizer)
    state, members = jax.device_put((state, members), replicated(mesh))
    step = make_population_step(
        task_objective(predictor),
        run.optimizer,
        setup.mask,
        clip_norm=config.optimizer.clip_norm,
        micro_batches=run.micro_batches,
        merged=predictor.merged,
        # On a CPU members side by side are no faster, and take more memory.
        at_once=1 if mesh.devices.flat[0].platform == "cpu" else None,
    )
    outputs = make_output_step(predictor)
    forward = jax.jit(lambda state, members, batch: population_predict(outputs, state, members, batch))
    return state, members, jax.jit(step, donate_argnums=0), forward


class Best(NamedTuple):
    """The best epoch of each member."""

    losses: np.ndarray
    """Least tuning loss, float64 ``[members]``."""
    steps: np.ndarray
    """Steps at which it was reached, int64 ``[members]``."""
    variables: list[Any]
    """Variables of each member then, the frozen leaves shared."""
    outputs: np.ndarray
    """Of the tuning examples, float32 ``[members, examples, outputs]``."""
    out_of_fold: np.ndarray | None
    """Outputs of each train example by the member that did not train on it; None without folds."""
    curves: list[list[float]]
    """Tuning loss of each member after each epoch."""


def _train(
    console: Console,
    config: FinetuneConfig,
    run: Finetuning,
    variation: Variation,
    state: PopulationState,
    members: Any,
    program: Any,
    forward: Any,
) -> Best:
    size, batches, labelled = config.population.size, run.batches, run.labelled
    every = config.train.validate_every or batches.steps_per_epoch
    losses, steps, waited = np.full(size, np.inf), np.zeros(size, np.int64), np.zeros(size, int)
    mask, trained = run.setup.mask, [None] * size
    outputs = np.zeros((size, len(labelled.tuning), labelled.task.outputs), np.float32)
    out_of_fold = None
    if variation.folds is not None:
        out_of_fold = np.zeros((len(labelled.train), labelled.task.outputs), np.float32)
    curves: list[list[float]] = [[] for _ in range(size)]

    def read(number: int) -> tuple[TaskBatch, dict[str, Any]]:
        batch = batches.batch(number)
        own = {}
        if variation.folds is not None:
            fold = variation.folds[np.maximum(batch.examples, 0)]  # [B, S]
            weights = batch.weights * (fold != np.arange(size)[:, None, None])  # [K, B, S]
            own["weights"] = jax.device_put(weights.astype(np.float32), replicated(run.mesh))
        return put_rows(batch, run.mesh), own

    def outputs_of(part: TaskBatches) -> np.ndarray:
        """Outputs of all members, float32 ``[members, examples, outputs]``."""

        def stacked(state: Any, batch: TaskBatch) -> jax.Array:
            found = forward(state, members, batch)  # [K, B, S, O]
            return jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], -1)

        found = score(stacked, state, part, run.mesh)  # pyright: ignore[reportArgumentType]
        return np.moveaxis(found.reshape(len(found), size, -1), 1, 0)

    console.start(run.total_steps, 0, batches.steps_per_epoch)
    with reading_ahead(map(read, range(run.total_steps)), AHEAD) as ahead:
        for number, (batch, own) in enumerate(ahead, start=1):
            state, totals = program(state, members, batch, own)
            console.step(number, 0, None)
            if number % every and number != run.total_steps:
                continue
            now = outputs_of(run.tuning)
            metrics = [task_metrics(labelled.task.kind, one, labelled.tuning_targets) for one in now]
            train_losses = np.asarray(totals["loss"] / jnp.maximum(totals["targets"], 1.0))
            append_metrics(
                run.folder / METRICS_FILE,
                {
                    "step": number,
                    "epoch": number / batches.steps_per_epoch,
                    "split": "tuning",
                    "loss": float(np.mean([one["loss"] for one in metrics])),
                    "members": [{"loss": one["loss"], "auroc": one.get("auroc")} for one in metrics],
                    "train_losses": train_losses.tolist(),
                },
            )
            better = [k for k in range(size) if metrics[k]["loss"] < losses[k]]
            waited += 1
            on_train = outputs_of(replace(batches, seed=None)) if variation.folds is not None else None
            for k in range(size):
                curves[k].append(metrics[k]["loss"])
            for k in better:
                losses[k], steps[k], waited[k] = metrics[k]["loss"], number, 0
                outputs[k] = now[k]
                found = member(state, k, variation.adapters[k])
                # The frozen leaves go on with the state, which the next step uses up.
                trained[k] = jax.tree.map(lambda leaf, t: np.asarray(leaf) if t else None, found, mask)
                if out_of_fold is not None and on_train is not None:
                    mine = variation.folds == k  # predicted by the one member that did not see them
                    out_of_fold[mine] = on_train[k][mine]
            shown = "  ".join(f"{one['loss']:.4f}" for one in metrics)
            console.log(f"epoch {number / batches.steps_per_epoch:.1f}  validation losses {shown}")
            patience = config.train.patience
            if patience is not None and (waited >= patience).all():
                break
    console.close()
    last = member(state, 0, variation.adapters[0])
    variables = [
        jax.tree.map(lambda one, other: other if one is None else one, of, last, is_leaf=lambda x: x is None)
        for of in trained
    ]
    return Best(losses, steps, variables, outputs, out_of_fold, curves)


def _write(
    console: Console,
    config: FinetuneConfig,
    run: Finetuning,
    variation: Variation,
    best: Best,
    seconds: float,
) -> dict[str, Any]:
    labelled, kind = run.labelled, run.labelled.task.kind
    searched = config.population.vary in ("learning_rate", "rank")
    chosen = [int(best.losses.argmin())] if searched else list(range(config.population.size))
    calibration = calibrate(config.task, kind, best.outputs[chosen], labelled.tuning_targets)
    for k, variables in enumerate(best.variables):
        one = replace(config, lora=variation.adapters[k])
        alone = calibrate(config.task, kind, best.outputs[k : k + 1], labelled.tuning_targets)
        record = task_record(one, run, alone)
        try_write_adapter(console, run.folder / MEMBERS_FOLDER / str(k), run, variables, record)
    record = {**task_record(config, run, calibration), "members": chosen}
    write_json(run.folder / TASK_FILE, record)
    rows = [
        {
            "member": variation.names[k],
            "best_step": int(best.steps[k]),
            **task_metrics(kind, best.outputs[k], labelled.tuning_targets),
            "tuning_losses": best.curves[k],
        }
        for k in range(config.population.size)
    ]
    summary: dict[str, Any] = {
        "task": kind,
        "population": settings(config.population),
        "members": rows,
        "predicting_members": chosen,
        "baselines": {"base rate": {"loss": loss_of_base_rate(labelled)}},
        "calibration": asdict(calibration),
        "data": labelled.counts,
        "parameters": {key: value for key, value in run.parameters.items() if key != "adapters"},
        "wall_seconds": seconds,
    }
    if best.out_of_fold is not None:
        summary["out_of_fold"] = task_metrics(kind, best.out_of_fold, labelled.train_targets)
    write_json(run.folder / SUMMARY_FILE, summary)
    columns = ("member", "best step", "tuning loss", "tuning AUROC")
    table = [(row["member"], row["best_step"], _cell(row["loss"]), _cell(row.get("auroc"))) for row in rows]
    console.table(f"Members ({kind}, vary {config.population.vary})", columns, table)
    lines = [", ".join(f"{name} {cell}" for name, cell in zip(columns, row, strict=True)) for row in table]
    if best.out_of_fold is not None:
        found = summary["out_of_fold"]
        auroc = f", AUROC {_cell(found['auroc'])}" if "auroc" in found else ""
        lines.append(f"Cross-validated on the train split: loss {_cell(found['loss'])}{auroc}.")
        console.log(lines[-1])
    predicting = ", ".join(variation.names[k] for k in chosen)
    lines.append(f"Predicts: {predicting}.")
    console.log(lines[-1])
    write_text(run.folder / SUMMARY_TEXT_FILE, "\n".join(lines) + "\n")
    console.log(f"Written to {run.folder}: {', '.join(sorted(path.name for path in run.folder.iterdir()))}")
    return summary


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

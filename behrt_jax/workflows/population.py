"""Several members fine-tuned at once on one frozen base: seeds, a search, a cross-validation, or tasks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import FinetuneConfig, PopulationConfig
from behrt_jax.data.batches import TaskBatch, TaskBatches, reading_ahead
from behrt_jax.data.labels import read_label_tables
from behrt_jax.diagnosis.finding import to_json
from behrt_jax.errors import DivergenceError
from behrt_jax.files import JsonObject, json_text, write_text
from behrt_jax.models.behrt import EACH, Pooling
from behrt_jax.run_folder import (
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
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.tracking.plots import plot_curves
from behrt_jax.tracking.report import write_report
from behrt_jax.tracking.summary import Summary, member_table, summary_text
from behrt_jax.training.devices import Devices, put_rows, replicated
from behrt_jax.training.feeding import AHEAD
from behrt_jax.training.freezing import part, regime, whole
from behrt_jax.training.loop import Schedule
from behrt_jax.training.population import (
    Members,
    PopulationState,
    init_population,
    largest,
    make_members,
    make_population_step,
    member,
    population_predict,
)
from behrt_jax.training.pretrained import Pretrained, read_encoder
from behrt_jax.training.state import (
    assemble,
    init_state,
    run_keys,
    with_adapters_of_base,
    with_encoder,
)
from behrt_jax.training.step import task_objective
from behrt_jax.training.validation import make_output_step, score, task_metrics
from behrt_jax.workflows.checks import has_members
from behrt_jax.workflows.finetune_run import (
    CHOICE,
    MEMBERS_FOLDER,
    TASK_FILE,
    Finetuning,
    calibrate,
    examined,
    judge,
    loss_of_base_rate,
    open_finetuning,
    task_record,
    task_setup,
    try_write_adapter,
    with_embeddings,
)
from behrt_jax.workflows.labelled_data import (
    LabelledData,
    batch_size,
    read_data,
    read_labelled,
    split_batches,
)
from behrt_jax.workflows.run import RunResult, open_folder, settings, trackers

SEARCHES = ("learning_rate", "rank")
"""Variations of which the best member alone predicts."""


def finetune_population(config: FinetuneConfig, devices: Devices | None = None) -> RunResult:
    """Train all members in one program, keep each one's best epoch, and leave a run folder behind.

    Its ``members/0``, ``members/1``, ... are adapters of their own; task.json says which of them predict, or
    which tasks they are for.

    Args:
        config: every setting of the run.
        devices: devices to train on; all where not given.

    Raises:
        InputError: something in the configuration, the data or the labels is wrong; raised before training.
        DivergenceError: the loss of a member was never finite; of a search, that of all members.
    """
    started = time.perf_counter()
    population = config.population
    if population.vary == "task":
        labels = read_label_tables(population.labels)
        data, delays = read_data(config.data)
        config = replace(config, population=replace(population, size=len(population.labels)))
    else:
        data, labels, delays = read_labelled(config.data, config.labels)
    with (
        open_console() as console,
        open_folder(config) as (folder, config),
        trackers(config, folder) as send,
    ):
        run = open_finetuning(config, folder, data, labels, delays, devices, console, search)
        config = run.config
        variation = vary(config, run.labelled)

        def record(line: JsonObject) -> None:
            append_metrics(run.folder / METRICS_FILE, line)
            send(line)

        members = make_population(config, run, variation)
        found = train_population(console, config, run, variation, members, record)
        summary = write_population(console, config, run, variation, found, time.perf_counter() - started)
    return RunResult(run.folder, summary)


@dataclass(frozen=True, eq=False)
class Variation:
    """Each member's own settings and examples."""

    names: list[str]
    seeds: list[int]
    rates: list[float]
    """Factors on the learning rate."""
    adapters: Sequence[LoRAConfig | None]
    labelled: list[LabelledData]
    """Each member's own examples."""
    tuning: list[np.ndarray]
    """The tuning examples of all that are its own, bool ``[examples]``."""
    embedding: Sequence[float] | None = None
    """Factors on the learning rate of the embeddings, where they train: 0 where a member leaves them."""
    poolings: Sequence[Pooling] | None = None
    """Where the model computes each pooling: the member's own."""
    weights: np.ndarray | None = None
    """Where members learn from other examples: which of the train examples of all, bool
    ``[members, examples]``."""
    targets: np.ndarray | None = None
    """Where members learn other things from them: float32 ``[members, examples, targets]``."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.names)


def vary(config: FinetuneConfig, labelled: LabelledData) -> Variation:
    """The members of a population, whose examples are these."""
    population, size = config.population, config.population.size
    alike = Variation(
        names=[f"member {k}" for k in range(size)],
        seeds=[config.train.seed] * size,
        rates=[1.0] * size,
        adapters=[config.lora] * size,
        labelled=[labelled] * size,
        tuning=[np.ones(len(labelled.tuning), bool)] * size,
    )
    if population.vary == "seed":
        seeds = [config.train.seed + k for k in range(size)]
        return replace(alike, names=[f"seed {seed}" for seed in seeds], seeds=seeds)
    if population.vary == "learning_rate":
        rates = [2.0 ** (2 * k / max(size - 1, 1) * 2 - 2) for k in range(size)]  # a quarter to four times
        if population.values:
            rates = [value / config.optimizer.learning_rate for value in population.values]
        names = [f"learning rate {rate * config.optimizer.learning_rate:.2g}" for rate in rates]
        return replace(alike, names=names, rates=rates)
    if population.vary == "rank":
        assert config.lora is not None
        ranks = [int(value) for value in population.values] or [2**k for k in range(size)]
        adapters = [replace(config.lora, rank=rank) for rank in ranks]
        return replace(alike, names=[f"rank {rank}" for rank in ranks], adapters=adapters)
    if population.vary == "fold":
        return _folds(alike, labelled, config.train.seed)
    return _tasks(alike, labelled)


def _folds(alike: Variation, labelled: LabelledData, seed: int) -> Variation:
    """Member k does not learn from the subjects of fold k."""
    size = alike.size
    subjects, place = np.unique(labelled.train.subject_ids, return_inverse=True)
    of_subject = np.random.default_rng(seed).permutation(len(subjects)) % size
    weights = of_subject[place] != np.arange(size)[:, None]  # [K, N]
    own = [
        replace(labelled, train=labelled.train.take(kept), train_targets=labelled.train_targets[kept])
        for kept in weights
    ]
    return replace(alike, names=[f"fold {k}" for k in range(size)], labelled=own, weights=weights)


def _tasks(alike: Variation, labelled: LabelledData) -> Variation:
    """Member k learns from the labels of table k."""
    targets = labelled.train_targets.T  # [K, N]
    return replace(
        alike,
        names=list(labelled.tasks),
        labelled=list(labelled.tasks.values()),
        tuning=list(~np.isnan(labelled.tuning_targets.T)),
        weights=~np.isnan(targets),
        targets=np.nan_to_num(targets)[..., None],
    )


class Population(NamedTuple):
    """Members before their first step, and what is done with them."""

    state: PopulationState
    members: Members
    step: Callable[..., Any]
    """Jitted `population.make_population_step`."""
    outputs: Callable[..., jax.Array]
    """Jitted, from (state, members, batch) to float32 ``[members, rows, segments, outputs]``."""


def make_population(config: FinetuneConfig, run: Finetuning, variation: Variation) -> Population:
    """Members before their first step, on the devices."""
    setup, mesh, optimizer = run.assembly.setup, run.assembly.mesh, run.assembly.optimizer
    keys = [run_keys(seed) for seed in variation.seeds]
    first = init_state(setup, optimizer, keys[0].init, mesh)
    if not config.from_scratch:
        encoder = read_encoder(run.pretrained, mesh)
        first = with_encoder(first, encoder.params, run.labelled.first_rows(encoder.params))
        first = with_adapters_of_base(first, config.lora, keys[0].init)
    # What comes from the base, where it trains, is not drawn anew.
    adapters_of_base = first.variables["lora"]
    rows = first.variables["params"].get("new_codes")
    embeddings = None
    if "embedding" in regime(config.freezing).groups:
        embeddings = first.variables["params"]["behrt"]["embeddings"]

    def init(key: jax.Array, adapters: LoRAConfig | None) -> Any:
        variables = setup.init_with(key, adapters)
        if rows is not None:
            variables["params"]["new_codes"] = rows
        if embeddings is not None:
            variables["params"]["behrt"]["embeddings"] = embeddings
        if adapters is not None and adapters.init == "pissa":
            variables["lora"] = adapters_of_base
        return variables

    configs = variation.adapters
    with_adapters = [one for one in configs if one is not None]
    predictor = setup.predictor
    if with_adapters:
        predictor = predictor._replace(lora=largest(with_adapters))
    alike = len(set(variation.seeds)) == 1
    step_keys = keys[0].step if alike else jnp.stack([key.step for key in keys])
    layers = lora.layer_paths(adapters_of_base)
    members = make_members(step_keys, variation.rates, with_adapters or None, variation.embedding, layers)
    first_keys = jnp.stack([jax.random.clone(key.init) for key in keys])
    state = init_population(init, first_keys, configs, first.variables, setup.mask, optimizer)
    head = state.trained["params"]["task_head"]["dense"]
    if head["bias"] is not None:  # it trains: each member begins with the base rate of its own train examples
        head["bias"] = jnp.stack([jnp.asarray(one.base_outputs()) for one in variation.labelled])
    if variation.poolings is not None:
        chosen = [[float(how == own) for how in EACH] for own in variation.poolings]  # [K, P]
        state.trained["params"]["pooling_head"]["choice"] = jnp.asarray(chosen, jnp.float32)
    state, members = jax.device_put((state, members), replicated(mesh))
    step = make_population_step(
        task_objective(predictor, run.labelled.task.of.loss),
        optimizer,
        setup.mask,
        clip_norm=config.optimizer.clip_norm,
        micro_batches=run.micro_batches,
        # On a CPU members side by side are no faster, and take more memory.
        at_once=1 if mesh.devices.flat[0].platform == "cpu" else None,
    )
    outputs = make_output_step(predictor)
    forward = jax.jit(lambda state, members, batch: population_predict(outputs, state, members, batch))
    return Population(state, members, jax.jit(step, donate_argnums=0), forward)


@dataclass(eq=False)
class Best:
    """The best epoch of a member so far."""

    loss: float = np.inf
    """Least tuning loss."""
    step: int = 0
    """Steps at which it was reached."""
    variables: Any = None
    """Variables then; while training goes on, None in place of frozen leaves."""
    outputs: np.ndarray | None = None
    """Of its own tuning examples, float32 ``[examples, outputs]``; None where no loss was finite."""
    of_unseen: np.ndarray | None = None
    """Folds: of the train examples that it did not learn from, likewise."""
    waited: int = 0
    """Validations since then."""
    curve: list[float] = field(default_factory=list)
    """Tuning loss after each epoch."""


def train_population(
    console: Console,
    config: FinetuneConfig,
    run: Finetuning,
    variation: Variation,
    population: Population,
    record: Callable[[JsonObject], None] | None = None,
) -> list[Best]:
    """Train all members on the same batches and validate them every epoch. The first state is used up.

    `record` takes the line of each validation; without it the best variables are not kept either.

    Raises:
        DivergenceError: the loss of a member was never finite; of a search, that of all members.
    """
    state, batches, mask = population.state, run.batches, run.assembly.setup.mask
    found = [Best() for _ in range(variation.size)]

    def read(number: int) -> tuple[TaskBatch, JsonObject, int]:
        batch = batches.batch(number)
        tokens = int(np.count_nonzero(batch.rows.segment_ids))
        own = jax.device_put(own_fields(batch, variation), replicated(run.assembly.mesh))
        return put_rows(batch, run.assembly.mesh), own, tokens

    def outputs_of(part: TaskBatches) -> np.ndarray:
        return outputs_of_members(population._replace(state=state), part, run)

    console.start(run.schedule.total_steps, 0, batches.steps_per_epoch)
    with reading_ahead(map(read, range(run.schedule.total_steps)), AHEAD) as ahead:
        for number, (batch, own, tokens) in enumerate(ahead, start=1):
            state, totals = population.step(state, population.members, batch, own)
            console.step(number, tokens, None)
            if not run.schedule.validates(number):
                continue
            outputs = outputs_of(run.tuning)
            on_train = outputs_of(replace(batches, seed=None)) if config.population.vary == "fold" else None
            metrics = []
            for k, best in enumerate(found):
                mine, labelled = outputs[k, variation.tuning[k]], variation.labelled[k]
                metrics.append(task_metrics(labelled.task.kind, mine, labelled.tuning_targets))
                best.curve.append(metrics[k]["loss"])
                best.waited += 1
                if metrics[k]["loss"] < best.loss:
                    best.loss, best.step, best.waited, best.outputs = metrics[k]["loss"], number, 0, mine
                    if record is None:
                        continue
                    alone = member(state, k, variation.adapters[k])
                    # The frozen leaves go on with the state, which the next step uses up.
                    best.variables = jax.tree.map(np.asarray, part(alone, mask, trains=True))
                    if on_train is not None and variation.weights is not None:
                        best.of_unseen = on_train[k, ~variation.weights[k]]
            if record is not None:
                train_losses = np.asarray(totals["loss"] / jnp.maximum(totals["targets"], 1.0))
                record(
                    {
                        **run.schedule.line(number, "tuning"),
                        "loss": float(np.mean([one["loss"] for one in metrics])),
                        "members": [{"loss": one["loss"], "auroc": one.get("auroc")} for one in metrics],
                        "train_losses": train_losses.tolist(),
                    },
                )
                shown = "  ".join(f"{one['loss']:.4f}" for one in metrics)
                console.log(f"epoch {number / batches.steps_per_epoch:.1f}  validation losses {shown}")
            patience = config.train.patience
            if patience is not None and all(best.waited >= patience for best in found):
                break
    console.close()
    if record is None:
        return found
    diverged = [name for name, best in zip(variation.names, found, strict=True) if best.outputs is None]
    if len(diverged) > (len(found) - 1 if config.population.vary in SEARCHES else 0):
        raise DivergenceError(
            f"The loss of {', '.join(diverged)} was never finite: lower optimizer.learning_rate."
        )
    last = member(state, 0, variation.adapters[0])
    for best in found:
        best.variables = whole(best.variables, last)
    return found


SEARCH_STEPS, SEARCH_BATCH = 400, 64
"""Most steps and examples a step of a search: it only has to tell its members apart."""
LEVELS = ((3.0, 1.0, True), (1.0, 1.0, False), (1.0, 1.0, True), (3.0, 0.25, False))
"""In a search: factors on learning rate and rank, and whether embeddings train. A base may not tell codes
apart whose difference it has never needed, such as the bins of a value that nothing else depends on."""
MOST_EMBEDDINGS = 32_000_000
"""Parameters of all members' embeddings, with which they train; of larger ones they stay."""


def search(
    console: Console,
    config: FinetuneConfig,
    model: ModelConfig,
    labelled: LabelledData,
    pretrained: Pretrained,
    mesh: Mesh,
) -> JsonObject:
    """Train a few members for a short while, in one program, and take the settings of the best on tuning.

    Args:
        console: told what was tried.
        config: of the run.
        model: of the run.
        labelled: of one task.
        pretrained: the base.
        mesh: the devices.

    Returns:
        What `finetune_run.with_choice` takes; and ``tried``, the same of each member with its least loss on
        tuning.
    """
    free, alone = config.task.pooling == "auto", not has_members(config)
    size = config.search.size if alone else min(config.search.size, len(EACH))
    poolings: tuple[Pooling, ...] = EACH if free else (config.task.pooling,)  # pyright: ignore[reportAssignmentType]
    # A population varies in the rest by itself.
    levels = [LEVELS[k // len(poolings) % len(LEVELS)] if alone else (1.0, 1.0, False) for k in range(size)]
    own: list[Pooling] = [poolings[k % len(poolings)] for k in range(size)]
    some = labelled.drawn(config.search.labels, config.train.seed)
    given = config.lora
    if given is not None and given.init == "pissa":  # members share the base that it is taken from
        levels = [(rate, 1.0, wide) for rate, _, wide in levels]
    adapters = [given and replace(given, rank=max(1, round(given.rank * rank))) for _, rank, _ in levels]
    rows = len(labelled.vocabulary) * model.embedding_size
    free_rows = [wide and size * rows <= MOST_EMBEDDINGS and given is not None for _, _, wide in levels]
    short = replace(
        with_embeddings(config) if any(free_rows) else config,
        population=PopulationConfig(size=size),
        train=replace(
            config.train,
            max_steps=min(config.train.max_steps or SEARCH_STEPS, SEARCH_STEPS),
            batch_size=min(SEARCH_BATCH, batch_size(config, len(some.train))),
        ),
    )
    setup = task_setup(short, model, labelled, pretrained, mesh, "each" if free else own[0])
    batches, tuning, parts = split_batches(short, model, some, mesh)
    schedule = Schedule.of(short.train, batches.steps_per_epoch)
    objective = task_objective(setup.predictor, some.task.of.loss)
    assembly = assemble(short, setup, objective, schedule.total_steps, mesh)
    run = Finetuning(
        Path(), assembly, batches, schedule, parts, {}, np.zeros(0), short, some, tuning, pretrained
    )
    variation = replace(
        vary(short, some),
        names=own,
        seeds=[config.train.seed] * size,
        rates=[rate for rate, _, _ in levels],
        adapters=adapters,
        embedding=[float(wide) for wide in free_rows],
        poolings=own if free else None,
    )
    console.log(
        f"Searching: {size} members on {len(some.train):,} train and {len(some.tuning):,} tuning labels."
    )
    found = train_population(console, short, run, variation, make_population(short, run, variation))
    tried = [
        {
            "pooling": how,
            "learning_rate": config.optimizer.learning_rate * rate,
            "rank": one and one.rank,
            "embeddings": wide,
            "loss": best.loss if np.isfinite(best.loss) else None,
            "step": best.step,
        }
        for how, rate, one, wide, best in zip(own, variation.rates, adapters, free_rows, found, strict=True)
    ]
    console.table("Search", tuple(tried[0]), [tuple(map(str, row.values())) for row in tried])
    chosen = tried[int(np.argmin([best.loss for best in found]))]
    return {**{name: chosen[name] for name in CHOICE}, "tried": tried}


def own_fields(batch: TaskBatch, variation: Variation) -> dict[str, np.ndarray]:
    """The fields of a batch in which the members differ: see `population.make_population_step`."""
    own, examples = {}, np.maximum(batch.examples, 0)  # [B, S]
    if variation.weights is not None:
        own["weights"] = batch.weights * variation.weights[:, examples]  # [K, B, S]
    if variation.targets is not None:
        own["targets"] = variation.targets[:, examples]  # [K, B, S, T]
    return own


def outputs_of_members(population: Population, part: TaskBatches, run: Finetuning) -> np.ndarray:
    """Outputs of all members for each example of `part`, float32 ``[members, examples, outputs]``."""

    def stacked(state: Any, batch: TaskBatch) -> jax.Array:
        found = population.outputs(state, population.members, batch)  # [K, B, S, O]
        return jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], -1)

    found = score(stacked, population.state, part, run.assembly.mesh)  # pyright: ignore[reportArgumentType]
    return np.moveaxis(found.reshape(len(found), -1, run.labelled.task.outputs), 1, 0)


def write_population(
    console: Console,
    config: FinetuneConfig,
    run: Finetuning,
    variation: Variation,
    found: Sequence[Best],
    seconds: float,
) -> JsonObject:
    """Write members/, task.json, summary.json, SUMMARY.txt, plots and report.html; returns the summary."""
    rows = [_write_member(console, config, run, variation, k, best) for k, best in enumerate(found)]
    summary: JsonObject = {
        "task": run.labelled.task.kind,
        "population": settings(config.population),
        "members": rows,
        "data": run.labelled.counts,
        "parameters": {key: value for key, value in run.parameters.items() if key != "adapters"},
        "wall_seconds": seconds,
    }
    if run.labelled.tasks:
        write_files(run.folder, {TASK_FILE: json_text({"tasks": variation.names}, 2).encode()})
        lines = [f"Each predicts its own task: predict.py --model {run.folder / MEMBERS_FOLDER / 'K'}."]
    else:
        together, lines = _predict_together(config, run, variation, found)
        summary |= together
    record_metrics(run.folder)
    summary["findings"] = to_json(examined(console, run, summary))
    write_files(run.folder, {SUMMARY_FILE: json_text(summary, 2).encode()})
    told = Summary(**summary)
    console.table(f"Members ({summary['task']}, vary {config.population.vary})", *member_table(told))
    for line in lines:
        console.log(line)
    write_text(run.folder / SUMMARY_TEXT_FILE, summary_text(told, config.name))
    metrics = read_metrics(run.folder / METRICS_FILE)
    plot_curves(metrics, summary.get("baselines") or {}, run.folder / PLOTS_FOLDER, variation.names)
    write_report(run.folder)
    console.log(f"Written to {run.folder}: {', '.join(shown_files(run.folder))}")
    return summary


def _write_member(
    console: Console, config: FinetuneConfig, run: Finetuning, variation: Variation, k: int, best: Best
) -> JsonObject:
    """Write the adapter of a member; returns its part of the summary."""
    labelled, kind = variation.labelled[k], run.labelled.task.kind
    if best.outputs is None:
        return {"member": variation.names[k], "best_step": None, "tuning_losses": best.curve}
    calibration = calibrate(config.task, kind, best.outputs[None], labelled.tuning_targets)
    labels = config.population.labels[k] if run.labelled.tasks else config.labels
    record = task_record(replace(config, lora=variation.adapters[k], labels=labels), run, calibration)
    folder = run.folder / MEMBERS_FOLDER / str(k)
    try_write_adapter(console, folder, run, best.variables, {"name": variation.names[k], **record})
    return {
        "member": variation.names[k],
        "best_step": best.step,
        **task_metrics(kind, best.outputs, labelled.tuning_targets),
        "base_rate_loss": loss_of_base_rate(labelled),
        "calibration": asdict(calibration),
        "tuning_losses": best.curve,
    }


def _predict_together(
    config: FinetuneConfig, run: Finetuning, variation: Variation, found: Sequence[Best]
) -> tuple[JsonObject, list[str]]:
    """Choose who predicts, the best of a search or all, and calibrate it: what the summary says of it."""
    labelled, kind = run.labelled, run.labelled.task.kind
    searched = config.population.vary in SEARCHES
    chosen = [int(np.argmin([best.loss for best in found]))] if searched else list(range(variation.size))
    outputs = np.array([found[k].outputs for k in chosen])  # [K, N, O]
    judged = judge(config, labelled, outputs)
    record = {**task_record(config, run, judged.calibration, judged.blend), "members": chosen}
    write_files(run.folder, {TASK_FILE: json_text(record, 2).encode()})
    together: JsonObject = {
        "predicting_members": chosen,
        **judged.said,
        "calibration": asdict(judged.calibration),
    }
    lines = [f"Predicts: {', '.join(variation.names[k] for k in chosen)}."]
    if variation.weights is not None:  # each train example by the one member that did not learn from it
        unseen = np.zeros((len(labelled.train), labelled.task.outputs), np.float32)
        for weights, best in zip(variation.weights, found, strict=True):
            unseen[~weights] = best.of_unseen
        metrics = together["out_of_fold"] = task_metrics(kind, unseen, labelled.train_targets)
        auroc = f", AUROC {_cell(metrics['auroc'])}" if "auroc" in metrics else ""
        lines.insert(0, f"Cross-validated on the train split: loss {_cell(metrics['loss'])}{auroc}.")
    return together, lines


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

"""A fine-tuning run, of a single model or a population: its opening, and the model that it leaves behind."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from behrt_jax.adapters import combine
from behrt_jax.adapters.files import AdapterConfig, save_adapter
from behrt_jax.adapters.lora import GROUPS
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import FinetuneConfig, TaskConfig
from behrt_jax.data.batches import TaskBatches
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.labels import Labels, LabelTables
from behrt_jax.data.prepared import rule_files
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.tasks import KINDS, TaskKind
from behrt_jax.diagnosis.finding import Finding, one_line, read_run
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import fit_temperature, fit_threshold, mean_predictions
from behrt_jax.evaluation.count_model import CountModel, fit_count_model
from behrt_jax.evaluation.masked_codes import mean_interval
from behrt_jax.evaluation.task_baselines import count_codes, join_histories
from behrt_jax.files import JsonObject, absolute, from_stored, json_text
from behrt_jax.models.behrt import BEHRTForTask, Pooling
from behrt_jax.models.losses import task_losses
from behrt_jax.run_folder import CONFIG_FILE, read_config
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.summary import Summary
from behrt_jax.training.devices import Devices, make_mesh
from behrt_jax.training.freezing import regime
from behrt_jax.training.loop import Schedule
from behrt_jax.training.memory import keep_freed_memory
from behrt_jax.training.pretrained import Pretrained, open_pretrained
from behrt_jax.training.processes import from_first, is_first
from behrt_jax.training.runtime import use_compilation_cache
from behrt_jax.training.state import Setup, assemble, set_up_task
from behrt_jax.training.step import Variables, task_objective
from behrt_jax.training.validation import task_metrics
from behrt_jax.workflows import announce
from behrt_jax.workflows.checks import check_finetune, has_members, model_of
from behrt_jax.workflows.doctor import examine
from behrt_jax.workflows.labelled_data import (
    TRAINS,
    LabelledData,
    announce_codes,
    announce_labels,
    check_codes,
    label_data,
    label_tasks,
    split_batches,
)
from behrt_jax.workflows.run import (
    Run,
    check_same_everywhere,
    check_same_run,
    parameter_report,
    run_record,
    settings,
    write_start,
)

TASK_FILE = "task.json"
MEMBERS_FOLDER = "members"


@dataclass(frozen=True, eq=False)
class Finetuning(Run):
    """A fine-tuning run that is about to begin."""

    config: FinetuneConfig
    """Its settings, in which nothing is to be chosen any more."""
    batches: TaskBatches
    labelled: LabelledData
    tuning: TaskBatches
    pretrained: Pretrained
    preparation: Preparation | None = None
    """Rules by which the data were prepared, where they are known."""


Search = Callable[[Console, FinetuneConfig, ModelConfig, LabelledData, Pretrained, Mesh], JsonObject]
"""From a console, settings, model, labels, base and devices of a run to what :func:`with_choice` takes."""


def open_finetuning(
    config: FinetuneConfig,
    folder: Path,
    data: SequenceSet,
    labels: Labels | LabelTables,
    delays: Sequence[str],
    devices: Devices | None,
    console: Console,
    search: Search,
) -> Finetuning:
    """Work out everything that can go wrong, and say what will be trained on what, in the run's folder.

    `search` finds settings that are left open (`population.search`).

    Raises:
        InputError: something in the configuration, the data or the labels is wrong.
    """
    keep_freed_memory()
    check_finetune(config)
    assert config.init is not None
    if reason := use_compilation_cache(config.compilation_cache):
        console.log(reason)
    pretrained = open_pretrained(config.init)
    model = model_of(config, pretrained.model)
    mesh = make_mesh(devices, config.mesh)
    if isinstance(labels, LabelTables):
        labelled = label_tasks(config, model, pretrained.vocabulary, data, labels, delays)
    else:
        labelled = label_data(config, model, pretrained.vocabulary, data, labels, delays)
    task = labelled.task
    announce_labels(console, task.kind, labelled.counts)
    codes = check_codes(
        data, TRAINS, labelled.vocabulary, pretrained.preparation, config.max_unknown, config.init
    )
    announce_codes(console, codes)
    labelled.counts["codes"] = codes
    if config.task.blend == "counts" and (task.kind != "binary" or labelled.tasks):
        raise InputError(
            f"task.blend is counts, which is for one task of yes or no, but this is {task.kind}"
            f"{', several of them' if labelled.tasks else ''}: leave it out."
        )
    check_same_everywhere(config, _fingerprint(data, labelled))
    given = config
    choice = _choice_before(folder) if config.resume else None
    choice = choice or choose(search, console, config, model, labelled, pretrained, mesh)
    config = with_choice(config, choice)
    assert config.task.pooling != "auto"
    setup = task_setup(config, model, labelled, pretrained, mesh, config.task.pooling)
    parameters = parameter_report(config.freezing, setup)
    announce.parameters(console, parameters, setup.predictor.product)
    batches, tuning, micro_batches = split_batches(config, model, labelled, mesh)
    schedule = Schedule.of(config.train, batches.steps_per_epoch)
    examples = len(labelled.train) / batches.steps_per_epoch
    console.log(
        f"A step: {examples:.1f} examples in {batches.batch_rows} rows of {batches.row_length}. "
        f"In all {schedule.total_steps:,} steps at most."
    )
    objective = task_objective(setup.predictor, task.of.loss)
    assembly = assemble(config, setup, objective, schedule.total_steps, mesh)
    if config.resume:
        check_same_run(folder, given, _fingerprint(data, labelled))
    facts = {
        "task": task.to_json(),
        "model": settings(model),
        "micro_batches": micro_batches,
        "total_steps": schedule.total_steps,
        CHOSEN: choice,
    }
    description = {"fingerprint": _fingerprint(data, labelled), **labelled.counts}
    rules = rule_files(labelled.vocabulary, data.preparation)
    if is_first():
        write_start(folder, rules, parameters, run_record(given, description, facts, {}))
    counts = labelled.vocabulary.counts
    return Finetuning(
        folder,
        assembly,
        batches,
        schedule,
        micro_batches,
        parameters,
        counts,
        config,
        labelled,
        tuning,
        pretrained,
        data.preparation,
    )


def task_setup(
    config: FinetuneConfig,
    model: ModelConfig,
    labelled: LabelledData,
    pretrained: Pretrained,
    mesh: Mesh,
    pooling: Pooling,
) -> Setup:
    """The model of a task, with an untrained head that says of each example what is true on average."""
    return set_up_task(
        BEHRTForTask(model, len(pretrained.vocabulary), labelled.task.outputs, pooling),
        config.lora,
        config.freezing,
        mesh,
        first_outputs=None if labelled.tasks else labelled.base_outputs(),
        new_codes=len(labelled.vocabulary) - len(pretrained.vocabulary),
        packed=config.task.packed,
    )


CHOSEN = "chosen"
"""Among the facts in config.json: what was chosen before training."""
CHOICE = ("pooling", "learning_rate", "rank", "embeddings")
"""What that is."""


def _choice_before(folder: Path) -> JsonObject | None:
    """What the run that is resumed has chosen; None where it has not come so far."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    return read_config(folder).get("facts", {}).get(CHOSEN)


def with_choice(config: FinetuneConfig, choice: JsonObject) -> FinetuneConfig:
    """The settings as chosen: ``pooling``, ``learning_rate``, ``rank`` (where there are adapters), and
    whether ``embeddings`` train.
    """
    config = with_embeddings(config) if choice["embeddings"] else config
    lora = config.lora and replace(config.lora, rank=choice["rank"])
    return replace(
        config,
        task=replace(config.task, pooling=choice["pooling"]),
        optimizer=replace(config.optimizer, learning_rate=choice["learning_rate"]),
        lora=lora,
    )


def with_embeddings(config: FinetuneConfig) -> FinetuneConfig:
    """The settings with embeddings that train beside what trains already."""
    trained = regime(config.freezing).groups | {"embedding"}
    groups = tuple(group for group in GROUPS if group in trained)
    return replace(config, freezing=replace(config.freezing, groups=groups))


def choose(
    search: Search,
    console: Console,
    config: FinetuneConfig,
    model: ModelConfig,
    labelled: LabelledData,
    pretrained: Pretrained,
    mesh: Mesh,
) -> JsonObject:
    """Pooling, learning rate and rank: as given, or as the best member of a search on tuning has them.

    Arguments as of the functions here; returns what :func:`with_choice` takes.
    """
    trained = regime(config.freezing).groups
    varies = config.task.pooling == "auto" or not has_members(config)
    if varies and config.search.size and not labelled.tasks and not trained & {"base", "embedding"}:
        if jax.process_count() > 1:  # each by itself, as one process would; the first one's choice counts
            mesh = make_mesh(jax.local_devices())
        tried = search(console, config, model, labelled, pretrained, mesh)
        return from_first(lambda: tried)
    pooling = "attention" if config.task.pooling == "auto" else config.task.pooling
    rank = None if config.lora is None else config.lora.rank
    return dict(zip(CHOICE, (pooling, config.optimizer.learning_rate, rank, False), strict=True))


def _fingerprint(data: SequenceSet, labelled: LabelledData) -> str:
    """SHA-256 of the data, and of the labels that are learned from: held_out ones may be added later."""
    digest = hashlib.sha256(data.fingerprint.encode())
    for examples, targets in (
        (labelled.train, labelled.train_targets),
        (labelled.tuning, labelled.tuning_targets),
    ):
        for column in (examples.subject_ids, examples.times, targets):
            digest.update(column.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Calibration:
    """Temperature and threshold, fitted on the tuning split once the model was trained."""

    temperature: float = 1.0
    """Divides the outputs."""
    threshold: float | None = None
    """Binary: probability from which on a prediction is positive."""
    loss: float | None = None
    """Log loss of the tuning split at this temperature, which is what its predictions have; None where there
    are no probabilities."""


def calibrate(config: TaskConfig, kind: TaskKind, outputs: np.ndarray, targets: np.ndarray) -> Calibration:
    """Fit temperature and threshold.

    Args:
        config: how the threshold is chosen.
        kind: of the task.
        outputs: of the tuning examples, float32 ``[members, examples, outputs]``.
        targets: theirs, float32 ``[examples, targets]``.
    """
    of, temperature = KINDS[kind], fit_temperature(kind, outputs, targets)
    if not of.tempered:
        return Calibration(temperature)
    predicted = mean_predictions(kind, outputs, temperature)
    loss = float(-np.log(np.maximum(of.of_truth(predicted, targets), 1e-300)).mean())
    if not of.thresholded:
        return Calibration(temperature, loss=loss)
    threshold = fit_threshold(predicted[:, 0], targets[:, 0] > 0.5, config.threshold)
    return Calibration(temperature, threshold, loss)


MOST_COUNTED = 20_000
"""Examples of train, and of tuning, that a count model is fitted on."""


class Judged(NamedTuple):
    """What the tuning split says of a trained model, and what is fitted there."""

    calibration: Calibration
    blend: JsonObject | None
    """What predictions are blended with: ``count_model``, and its ``share``."""
    said: JsonObject
    """For the summary: ``baselines``, ``gaps`` (model's loss less count model's, in nats), ``blend``."""


def judge(config: FinetuneConfig, labelled: LabelledData, outputs: np.ndarray) -> Judged:
    """Compare a model with a count model (where scikit-learn is installed, and the task is one of yes or no),
    blend them if that is asked, and calibrate.

    Args:
        config: of the run.
        labelled: of one task.
        outputs: of the tuning examples, float32 ``[members, examples, outputs]``.
    """
    task, targets, blend = labelled.task, labelled.tuning_targets, None
    baselines: JsonObject = {"base rate": {"loss": loss_of_base_rate(labelled)}}
    said: JsonObject = {"baselines": baselines}
    if (found := _count_model(config, labelled)) is not None:
        counts, beside = found
        baselines["count model"] = task_metrics(task.kind, beside, targets)
        own, theirs = (task_losses(task.of.loss, one, targets) for one in (outputs.mean(axis=0), beside))
        difference = np.asarray(own) - np.asarray(theirs)
        low, high = mean_interval(difference, labelled.tuning.subject_ids)
        said["gaps"] = {"count model": {"nats": float(difference.mean()), "low": low, "high": high}}
        if config.task.blend == "counts":
            shares = np.linspace(0, 1, 21)
            mixed = [blended(outputs, beside, share).mean(axis=0) for share in shares]
            losses = [np.asarray(task_losses(task.of.loss, one, targets), np.float64) for one in mixed]
            place = safest(losses, labelled.tuning.subject_ids)
            share = float(shares[place])
            said["blend"] = {"share": share, **task_metrics(task.kind, mixed[place], targets)}
            blend = {"share": share, "count_model": counts.to_json()}
            outputs = blended(outputs, beside, share)
    return Judged(calibrate(config.task, task.kind, outputs, targets), blend, said)


def safest(losses: Sequence[np.ndarray], subjects: np.ndarray) -> int:
    """The last place whose loss is within a standard error of the least (Breiman et al. 1984): where few
    labels cannot tell, the simpler model, here the largest share of counts, is the safer one.

    Args:
        losses: from the least simple to the simplest, float64 ``[examples]`` each.
        subjects: theirs.
    """
    best = int(np.argmin([one.mean() for one in losses]))
    alike = [best]
    for place in range(best + 1, len(losses)):
        more = losses[place] - losses[best]
        low, high = mean_interval(more, subjects)
        if more.mean() <= (high - low) / (2 * 1.96):
            alike.append(place)
    return alike[-1]


def examined(console: Console, run: Finetuning, summary: JsonObject) -> list[Finding]:
    """Show the doctor's findings of a run that ended, errors first; the summary need not be written yet."""
    record = read_run(run.folder)
    found = examine(replace(record, summary=Summary(**summary), baselines=summary.get("baselines") or {}))
    for one in found:
        console.log(one_line(one))
    return found


def blended(outputs: np.ndarray, beside: np.ndarray, share: float) -> np.ndarray:
    """Outputs ``[members, examples, 1]`` with a share of a count model's, ``[examples, 1]``: log odds."""
    return ((1 - share) * outputs + share * beside).astype(np.float32)


def _count_model(config: FinetuneConfig, labelled: LabelledData) -> tuple[CountModel, np.ndarray] | None:
    """The count model of train and tuning, and its log odds of the tuning examples, float32 ``[n, 1]``, each
    by a model that has not seen the subject.
    """
    if labelled.task.kind != "binary" or find_spec("sklearn") is None:
        return None
    rng = np.random.default_rng(config.train.seed)
    parts, yes = (labelled.train, labelled.tuning), (labelled.train_targets, labelled.tuning_targets)
    chosen = [np.sort(rng.permutation(len(part))[:MOST_COUNTED]) for part in parts]
    targets = np.concatenate([one[places, 0] > 0.5 for one, places in zip(yes, chosen, strict=True)])
    subjects = np.concatenate([part.subject_ids[places] for part, places in zip(parts, chosen, strict=True)])
    if min(len(np.unique(subjects[targets == value])) for value in (False, True)) < 2:
        return None
    rows = len(labelled.vocabulary)
    counted = [count_codes(part, rows, places) for part, places in zip(parts, chosen, strict=True)]
    histories = join_histories(counted, np.arange(len(targets)))
    boosted = config.task.blend == "counts"
    model, unseen = fit_count_model(histories, targets, subjects, boosted, config.train.seed)
    beside = model.outputs(count_codes(labelled.tuning, rows))
    beside[chosen[1]] = unseen[len(chosen[0]) :]
    return model, beside


def task_record(
    config: FinetuneConfig, run: Finetuning, calibration: Calibration, blend: JsonObject | None = None
) -> JsonObject:
    """All that prediction needs beside the parameters, ready for JSON; `blend` is that of :class:`Judged`."""
    new = len(run.labelled.vocabulary) - len(run.labelled.base_codes)
    return {
        "task": run.labelled.task.to_json(),
        "pooling": config.task.pooling,
        "max_length": config.task.max_length,
        "model": settings(run.assembly.setup.predictor.model.config),
        "lora": None if config.lora is None else settings(config.lora),
        "freezing": settings(config.freezing),
        "parameters": {name: run.parameters[name] for name in ("total", "trainable")},
        "calibration": asdict(calibration),
        "blend": blend,
        "new_codes": new,
        "base": str(config.init),
        "data": absolute(config.data),
        "labels": absolute(config.labels),
    }


def try_write_adapter(
    console: Console, folder: Path, run: Finetuning, variables: Variables, record: JsonObject
) -> None:
    """Write an adapter folder; where safetensors is not installed, say so and go on."""
    codes = run.labelled.vocabulary.codes[len(run.labelled.base_codes) :]
    adapters = variables["lora"]
    if record["lora"] is not None:
        adapters, ordinary = combine.ordinary(adapters, from_stored(LoRAConfig, record["lora"]))
        record = {**record, "lora": settings(ordinary)}
    task = json_text({**record, "base": str(run.pretrained.run.resolve())}, 2).encode()
    try:
        adapter = AdapterConfig(
            lora=record["lora"],
            model=record["model"],
            vocabulary_fingerprint=run.pretrained.vocabulary.fingerprint(),
            base=str(run.pretrained.run.resolve()),
            new_codes=codes,
        )
        trained = run.assembly.setup.mask["params"]
        beside = {TASK_FILE: task, **rule_files(run.labelled.vocabulary, run.preparation)}
        save_adapter(folder, variables["params"], adapters, trained, adapter, beside)
    except InputError as error:
        console.log(f"The adapter was not written: {error} Its values are in checkpoints/ all the same.")


def loss_of_base_rate(labelled: LabelledData) -> float:
    """Loss on tuning of saying of everyone what is true on average in the train split."""
    kind = labelled.task.kind
    outputs = labelled.base_outputs()
    everyone = np.broadcast_to(outputs, (len(labelled.tuning_targets), len(outputs)))
    return task_metrics(kind, everyone, labelled.tuning_targets)["loss"]

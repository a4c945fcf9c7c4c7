"""Predictions of a fine-tuned model for the labels of a split, or vectors of subjects, in bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import CONFIG_FILE as ADAPTER_FILE
from behrt_jax.adapters.files import load_adapter, read_config
from behrt_jax.config import (
    FreezingConfig,
    LoRAConfig,
    ModelConfig,
    PredictConfig,
    PrepareConfig,
    from_stored,
)
from behrt_jax.data.batches import RowShape, TaskBatch, TaskBatches, task_batches
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.events import SPLITS
from behrt_jax.data.examples import Examples, find_examples, of_unknown_subjects
from behrt_jax.data.labels import VALUE_COLUMNS, Labels, read_labels
from behrt_jax.data.predictions import (
    PredictionWriter,
    codes_seen,
    member_rows,
    member_schema,
    members_path,
    prediction_rows,
    schema_of,
)
from behrt_jax.data.prepared import read_preparation, read_rules
from behrt_jax.data.sequences import SequenceSet, told_facts
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import mean_predictions
from behrt_jax.evaluation.count_model import CountModel
from behrt_jax.evaluation.task_baselines import count_codes
from behrt_jax.files import JsonObject, read_json, work_folder
from behrt_jax.models.behrt import BEHRTForTask, PatientEmbedding, Pooling
from behrt_jax.models.stacked_layers import with_layout_of
from behrt_jax.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, VOCABULARY_FILE, checked, read_document
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import Devices, make_mesh, replicated, replicated_shapes
from behrt_jax.training.pretrained import open_pretrained, read_encoder, stored_settings
from behrt_jax.training.runtime import kept, use_compilation_cache
from behrt_jax.training.state import Setup, set_up_task
from behrt_jax.training.step import Variables, with_new_rows
from behrt_jax.training.validation import OutputStep, make_output_step, score
from behrt_jax.weights.portable import Portable, is_portable, open_portable, read_weights
from behrt_jax.workflows.checks import check_days
from behrt_jax.workflows.finetune_run import (
    MEMBERS_FOLDER,
    TASK_FILE,
    Calibration,
    blended,
)
from behrt_jax.workflows.labelled_data import (
    announce_codes,
    check_codes,
    examples_of,
    in_vocabulary,
    read_data,
)

AT_ONCE = 8192
"""Examples that are held in memory together."""


def predict(config: PredictConfig, devices: Devices | None = None) -> JsonObject:
    """Predict, write the file, and say what is in it.

    Returns:
        Counts: ``examples``, ``unknown_subjects``, ``empty_histories``, ``duplicates``.

    Raises:
        InputError: something in the options, the model, the data or the labels is wrong; nothing is left
            half-written.
    """
    if config.model is None:
        raise InputError("--model is missing: give the folder of a fine-tuning run.")
    check_output(config.output, config.rows)
    assert config.output is not None
    if config.embeddings:
        return embed(config, devices)
    mesh = make_mesh(devices)
    with ExitStack() as stack:
        console = stack.enter_context(open_console())
        if reason := use_compilation_cache(config.compilation_cache):
            console.log(reason)
        finetuned = open_finetuned(config.model, config.base, mesh)
        records = stack.enter_context(
            open_records(config, finetuned.vocabulary, finetuned.preparation, finetuned.model, console)
        )
        data, delays = records.data, records.delays
        check_days(finetuned.model, {name: data.splits[name] for name in records.splits})
        labels, without = labels_to_predict(records)
        task, calibration = finetuned.task, finetuned.calibration
        if labels.kind != "none" and not task.fits(labels):
            raise InputError(
                f"--labels: the labels are {labels.kind} ones, but the model predicts a {task.kind} task."
            )
        chosen = of_splits(labels, data, records.splits)
        counts = count_outside(records, labels, chosen)
        schema = schema_of(task, labels)
        metadata = _metadata(config, finetuned, records) | {"counts": counts}  # complete when it is closed
        console.start(counts["examples"], 0, None)
        done = 0
        with ExitStack() as files:
            writer = files.enter_context(PredictionWriter(config.output, schema, metadata))
            members = None
            if len(finetuned.members) > 1 and task.of.thresholded:
                path, of_members = members_path(config.output), member_schema(len(finetuned.members))
                members = files.enter_context(PredictionWriter(path, of_members, metadata))
            predictor = finetuned.setup.predictor
            step = kept(jax.jit(make_output_step(predictor)), {"predictor": repr(predictor)}, mesh)
            for part, outputs, empty, seen in outputs_of(step, config, finetuned, data, chosen, delays, mesh):
                predicted = mean_predictions(task.kind, outputs, calibration.temperature)
                writer.write(prediction_rows(schema, task, part, predicted, calibration.threshold, seen))
                if members is not None:
                    alone = [task.of.predictions(one, calibration.temperature)[:, 0] for one in outputs]
                    members.write(member_rows(members.schema, part, alone))
                counts["empty_histories"] += empty
                done += len(part)
                console.step(done, len(part))
            if outside := counts["examples"] - done:
                counts |= {"examples": done, "outside_life": outside}
            if not done:
                raise InputError("--labels: all labels are before their subject's birth or after its death.")
        console.close()
        if outside:
            console.log(f"{outside:,} labels outside of their subject's life are left out.")
        if counts["unknown_subjects"]:
            console.log(
                f"{counts['unknown_subjects']:,} labels are of subjects that the data lacks: left out."
            )
        if records.labels is None:
            console.log("No labels were given: each subject was predicted at its last event.")
        if without:
            console.log(f"{without:,} subjects have no event to be predicted at: left out.")
        if counts["empty_histories"]:
            empty = f"{counts['empty_histories']:,} examples"
            console.log(f"{empty} have no event yet: predicted from the age alone.")
        console.log(f"Written to {config.output}: {counts['examples']:,} predictions ({task.kind}).")
    return counts


def check_output(output: Path | None, rows: int) -> None:
    """Refuse a file of predictions that cannot be written anew, and a batch without rows.

    Raises:
        InputError: it is either.
    """
    if output is None:
        raise InputError("--output is missing: give a Parquet file to write.")
    if output.exists():
        raise InputError(f"{output} is there already: give another --output, or remove it.")
    if rows < 1:
        raise InputError(f"rows is {rows}: give 1 or more.")


class Records(NamedTuple):
    """Histories to predict."""

    data: SequenceSet
    """In the vocabulary of the model."""
    delays: tuple[str, ...]
    splits: tuple[str, ...]
    """Whose subjects are predicted."""
    folder: Path | None
    """Of the prepared data; None where records were given and prepared for this alone."""
    labels: Path | None
    """Table of labels: the one that is given, or that of the model where it knows the data."""
    codes: JsonObject
    """What `labelled_data.check_codes` found."""


@contextmanager
def open_records(
    config: PredictConfig,
    vocabulary: Vocabulary,
    preparation: Preparation | None,
    model: ModelConfig,
    console: Console,
) -> Iterator[Records]:
    """Open the prepared data, or prepare the records that are given as those of the model were.

    Args:
        config: names the model and either of the two, or neither: then the model knows its data.
        vocabulary: of the model.
        preparation: rules of what it was trained on, where they are known.
        model: its settings.
        console: told what was found.

    Raises:
        InputError: both are given or none is known, they cannot be read, or the model knows too few codes.
    """
    assert config.model is not None and config.output is not None
    if config.data is not None and config.input is not None:
        raise InputError("--data and --input are both given: give prepared data, or records to prepare.")
    for name in ("source", "visit_column", "births", "table"):
        if config.input is None and getattr(config, name) != getattr(PredictConfig(), name):
            raise InputError(f"--{name} has no effect without --input, the records to prepare: leave it out.")
    with ExitStack() as stack:
        folder, labels = config.data, config.labels
        if config.data is None and config.input is None:
            folder, labels = known(config.model, "data"), labels or known(config.model, "labels")
        if config.input is not None:
            if config.output.exists():
                raise InputError(f"{config.output} is there already: give another --output, or remove it.")
            config.output.parent.mkdir(parents=True, exist_ok=True)
            purpose = f"predicting-{config.output.name}"
            folder = stack.enter_context(work_folder(config.output.parent, purpose)) / "prepared"
            prepare_input(config, folder, console)
        if folder is None:
            raise InputError("--data is missing: give the folder that prepare wrote, or records by --input.")
        own, delays = read_data(folder)
        split = config.split or ("held_out" if config.input is None else "all")
        splits = SPLITS if split == "all" else (split,)
        codes = check_codes(own, splits, vocabulary, preparation, config.max_unknown, config.model)
        announce_codes(console, codes)
        data, _ = in_vocabulary(own, vocabulary, model)
        for line in told_facts(data, splits):
            console.log(line)
        yield Records(data, delays, splits, None if config.input is not None else folder, labels, codes)


def prepare_input(config: PredictConfig, folder: Path, console: Console) -> None:
    """Prepare the records of ``config.input`` like the model's own into a new folder, and report on it."""
    from behrt_jax.records.prepare.manifest import (
        read_like,  # sources are slow to import, and others need none
    )
    from behrt_jax.records.prepare.pipeline import prepare
    from behrt_jax.workflows.prepare import SOURCES, open_source, report

    assert config.model is not None
    source = config.source or read_rules(config.model, "--model")[1].source
    if source not in SOURCES:
        raise InputError(
            f"--source is missing: the model was trained on {source} records, which does not tell the form "
            f"of those in --input: give one of {', '.join(SOURCES)}."
        )
    wanted = PrepareConfig(
        source=source,  # pyright: ignore[reportArgumentType]
        input=config.input,
        output=folder,
        like=config.model,
        visit_column=config.visit_column,
        births=config.births,
        table=config.table,
    )
    wanted, _ = read_like(wanted, "--model")
    report(console, prepare(open_source(wanted), wanted))


def known(model: Path, what: Literal["data", "labels"]) -> Path | None:
    """The prepared data of a run or an adapter, or the labels that it was fine-tuned on, where it knows."""
    if (model / TASK_FILE).is_file() and (path := read_task(model).get(what)):
        return Path(path)
    if is_portable(model) or not (model / CONFIG_FILE).is_file():
        return None
    found = stored_settings(model).get(what)
    if isinstance(found, dict):  # of pretraining
        found = found["path"] if found["source"] == "prepared" else None
    return None if found is None else Path(found)


def labels_to_predict(records: Records) -> tuple[Labels, int]:
    """The labels, else one of each subject at its last event; and how many subjects have no event."""
    if records.labels is not None:
        return read_labels(records.labels, without_values=True), 0
    data = records.data
    without = sum(len(data.subject_ids(name)) - len(data.splits[name]) for name in records.splits)
    return last_events(data, records.splits), without


def count_outside(records: Records, labels: Labels, chosen: dict[str, Labels]) -> dict[str, int]:
    """Counts of a file of predictions, as far as the labels tell them.

    Args:
        records: to predict.
        labels: all of them.
        chosen: those of each split.

    Raises:
        InputError: no label is left.
    """
    counts = {
        "examples": sum(len(part) for part in chosen.values()),
        "unknown_subjects": of_unknown_subjects(records.data, labels),
        "empty_histories": 0,
        "duplicates": labels.duplicates,
    }
    if not counts["examples"]:
        raise InputError(
            f"--labels: none of the {len(labels):,} labels is of a subject of {_named(records.splits)} "
            f"({counts['unknown_subjects']:,} are of subjects that the data lacks)."
        )
    return counts


class Finetuned(NamedTuple):
    """A model that is ready to predict."""

    task: Task
    setup: Setup
    members: list[Variables]
    """Variables of each model whose mean predicts, one where it is no ensemble; on the devices, whole on
    each, frozen leaves shared."""
    vocabulary: Vocabulary
    preparation: Preparation | None
    """Rules by which its data were prepared, where they are known."""
    model: ModelConfig
    max_length: int | None
    calibration: Calibration
    blend: tuple[CountModel, float] | None
    """What predictions are blended with, and its share."""
    trained: JsonObject
    """Regime, and counts of parameters, for the record of predictions."""


def open_finetuned(folder: Path, base: Path | None, mesh: Mesh) -> Finetuned:
    """Read a model.

    Args:
        folder: a run of finetune (a population predicts with its chosen members), an adapter in it, or an
            exported model.
        base: of an adapter: the pretraining run; the one that the adapter names where not given.
        mesh: the devices.

    Raises:
        InputError: neither a finished fine-tuning run nor an adapter nor the export of one, a run of several
            tasks, or an adapter of another base.
    """
    record = read_task(folder)
    if "tasks" in record:
        tasks = ", ".join(f"{k} ({name})" for k, name in enumerate(record["tasks"]))
        raise InputError(
            f"--model: {folder} has a model for each of several tasks: give {folder / MEMBERS_FOLDER / 'K'}, "
            f"where K is one of {tasks}."
        )
    is_adapter = (folder / ADAPTER_FILE).is_file()
    if "members" in record and not is_adapter:
        folders = [folder / MEMBERS_FOLDER / str(k) for k in record["members"]]
        setup, members, vocabulary = _from_adapters(folders, base, mesh)
    elif is_adapter:
        setup, members, vocabulary = _from_adapters([folder], base, mesh)
    elif is_portable(folder):
        setup, members, vocabulary = _from_export(open_portable(folder), record, mesh)
    else:
        vocabulary = Vocabulary.read(checked(folder, VOCABULARY_FILE))
        setup = _set_up(record, len(vocabulary) - record["new_codes"], mesh)
        members = [_restored(folder, setup, mesh)]
    freezing, blend = from_stored(FreezingConfig, record["freezing"]), record.get("blend")
    return Finetuned(
        Task.from_json(record["task"]),
        setup,
        members,
        vocabulary,
        read_preparation(folder),
        setup.predictor.model.config,
        record["max_length"],
        Calibration(**record["calibration"]),
        None if blend is None else (CountModel.from_json(blend["count_model"]), blend["share"]),
        {"regime": "+".join(freezing.groups) or freezing.regime, **record["parameters"]},
    )


def is_finetuned(folder: Path) -> bool:
    """Whether a folder is a run of finetune, an adapter of one, or an export: one with a task."""
    if is_portable(folder):
        return open_portable(folder).config.task is not None
    return (folder / TASK_FILE).is_file()


def read_task(folder: Path) -> JsonObject:
    """What task.json of a fine-tuned model says, or the export of one.

    Raises:
        InputError: the folder holds no fine-tuned model, or a damaged one.
    """
    if is_portable(folder):
        config = open_portable(folder).config
        if config.task is None:
            raise InputError(f"--model: {folder} is the export of a pretrained model: give a fine-tuned one.")
        return {**config.task, "model": config.model, "lora": config.lora, "new_codes": config.new_codes}
    if not (folder / TASK_FILE).is_file():
        raise InputError(
            f"--model: {folder} holds no fine-tuned model ({TASK_FILE} is not there): give a finished run of "
            "finetune.py, or the adapter in it."
        )
    if (folder / ADAPTER_FILE).is_file():
        adapter, record = read_config(folder), read_json(folder / TASK_FILE)
        # What PEFT saved there may have other adapters than the run that task.json is of.
        return {**record, "lora": adapter.lora} if adapter.base_fingerprint is None else record
    return read_document(folder, TASK_FILE)


def _set_up(record: JsonObject, vocabulary_size: int, mesh: Mesh) -> Setup:
    model, task = from_stored(ModelConfig, record["model"]), Task.from_json(record["task"])
    return set_up_task(
        BEHRTForTask(model, vocabulary_size, task.outputs, record["pooling"]),
        None if record["lora"] is None else from_stored(LoRAConfig, record["lora"]),
        from_stored(FreezingConfig, record["freezing"]),
        mesh,
        new_codes=record["new_codes"],
    )


def _from_adapters(
    folders: Sequence[Path], base: Path | None, mesh: Mesh
) -> tuple[Setup, list[Variables], Vocabulary]:
    """Adapters of equal shapes on one base."""
    record = read_task(folders[0])
    pretrained = open_pretrained(base or Path(record["base"]))
    setup = _set_up(record, len(pretrained.vocabulary), mesh)
    # Every leaf of a head comes with the adapter.
    heads = {name: head for name, head in setup.shapes["params"].items() if name.endswith("_head")}
    heads = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), heads)
    params = {"behrt": read_encoder(pretrained, mesh).params, **heads}
    members, new_codes = [], ()
    for folder in folders:
        found, lora, config = load_adapter(folder, params, pretrained.vocabulary.fingerprint())
        members.append(jax.device_put({"params": found, "lora": lora}, replicated(mesh)))
        new_codes = config.new_codes
    return setup, members, pretrained.vocabulary.extended(new_codes)


def _from_export(
    portable: Portable, record: JsonObject, mesh: Mesh
) -> tuple[Setup, list[Variables], Vocabulary]:
    params, adapters = read_weights(portable)
    if portable.lora is None:  # whatever trained, there are no adapters any more
        record = {**record, "freezing": asdict(FreezingConfig())}
    setup = _set_up(record, len(portable.vocabulary) - portable.config.new_codes, mesh)
    found = {"params": params, "lora": adapters}
    found = {name: with_layout_of(portable.model.scan_layers, part) for name, part in found.items()}
    return setup, [jax.device_put(found, replicated(mesh))], portable.vocabulary


def _restored(folder: Path, setup: Setup, mesh: Mesh) -> Variables:
    shapes = replicated_shapes(setup.shapes, mesh)
    with open_checkpoints(folder / CHECKPOINTS_FOLDER) as checkpoints:
        checkpoints.refuse_damaged()
        step = checkpoints.best_step()
        if step is None:
            raise InputError(f"--model: {folder} has no checkpoint with a validation: train it further.")
        found = checkpoints.restore(step, params=shapes["params"], lora=shapes["lora"])
    return {"params": found.params, "lora": found.lora}


class _Encoder(NamedTuple):
    model: ModelConfig
    vocabulary: Vocabulary
    preparation: Preparation | None
    params: Any
    pooling: Pooling
    max_length: int | None


def embed(config: PredictConfig, devices: Devices | None = None) -> JsonObject:
    """Write a Parquet file of vectors, hidden_size numbers for each subject and time.

    Its columns are those that linear probes of the field read: ``subject_id`` (int64), ``prediction_time``
    (timestamp), ``features`` (list of float32), and the value columns of the labels where these have any
    (``boolean_value`` of binary ones). With ``embedding_columns`` vector they are ``subject_id``, ``time``
    and ``vector`` (list of float32, of fixed size).

    Args:
        config: with ``embeddings``; checked by :func:`behrt_jax.workflows.predict.predict`.
        devices: to compute on; all where not given.

    Returns:
        Counts: ``vectors``, and ``unknown_subjects`` of the labels.

    Raises:
        InputError: something in the options, the model, the data or the labels is wrong.
    """
    assert config.model is not None and config.output is not None
    mesh = make_mesh(devices)
    with ExitStack() as stack:
        console = stack.enter_context(open_console())
        if reason := use_compilation_cache(config.compilation_cache):
            console.log(reason)
        encoder = _open(config, config.model, mesh)
        records = stack.enter_context(
            open_records(config, encoder.vocabulary, encoder.preparation, encoder.model, console)
        )
        data, unknown = records.data, 0
        check_days(encoder.model, {name: data.splits[name] for name in records.splits})
        if config.labels is None:
            labels = last_events(data, records.splits)
        else:
            labels = read_labels(config.labels, as_written=True, without_values=True)
            unknown = of_unknown_subjects(data, labels)
        wanted = of_splits(labels, data, records.splits)
        total = sum(len(part) for part in wanted.values())
        if not total:
            raise InputError(f"There is no subject of {_named(records.splits)} to embed.")
        schema = _embedding_schema(config, labels, encoder.model.hidden_size)
        console.start(total, 0, None)
        done = 0
        metadata = {"pooling": encoder.pooling, "codes": records.codes}
        with PredictionWriter(config.output, schema, metadata) as writer:
            for part, vectors in _vectors(config, encoder, data, wanted, records.delays, mesh):
                writer.write(_embedding_rows(schema, part, vectors))
                done += len(part)
                console.step(done, len(part))
            outside = total - done
            if not done:
                raise InputError("--labels: all labels are before their subject's birth or after its death.")
        console.close()
        if outside:
            console.log(f"{outside:,} labels outside of their subject's life are left out.")
        if unknown:
            console.log(f"{unknown:,} labels are of subjects that the data lacks: left out.")
        console.log(f"Written to {config.output}: {done:,} vectors of {encoder.model.hidden_size}.")
    return {"vectors": done, "unknown_subjects": unknown}


def _embedding_schema(config: PredictConfig, labels: Labels, size: int) -> pa.Schema:
    if config.embedding_columns == "vector":
        vectors = pa.list_(pa.float32(), size)
        return pa.schema([("subject_id", pa.int64()), ("time", pa.timestamp("us")), ("vector", vectors)])
    known = [] if labels.kind == "none" else [(name, VALUE_COLUMNS[name]) for name in labels.columns()]
    keys = [("subject_id", pa.int64()), ("prediction_time", pa.timestamp("us"))]
    return pa.schema([*keys, *known, ("features", pa.list_(pa.float32()))])


def _embedding_rows(schema: pa.Schema, labels: Labels, vectors: np.ndarray) -> pa.Table:
    """Vectors, float32 ``[labels, hidden_size]``, beside what they are of."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    times = pa.array(labels.times, pa.timestamp("us"))
    columns = {"subject_id": labels.subject_ids, "prediction_time": times, "features": lists,
               "time": times, "vector": lists, **labels.columns()}  # fmt: skip
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in schema], schema=schema)


def _open(config: PredictConfig, folder: Path, mesh: Mesh) -> _Encoder:
    if is_finetuned(folder):
        found = open_finetuned(folder, config.base, mesh)
        if len(found.members) > 1:
            raise InputError(f"--model: {folder} is an ensemble: give one of its members/.")
        variables, predictor = with_new_rows(found.members[0]), found.setup.predictor
        params = variables["params"]
        if predictor.lora is not None:
            params = lora.merge(params, variables["lora"], predictor.lora)
        pooling = config.pooling or predictor.model.pooling
        parts = {name: params[name] for name in ("behrt", "pooling_head") if name in params}
        opened = _Encoder(found.model, found.vocabulary, found.preparation, parts, pooling, found.max_length)
    else:
        pretrained = open_pretrained(folder)
        params = {"behrt": read_encoder(pretrained, mesh).params}
        known_codes = pretrained.vocabulary, pretrained.preparation
        opened = _Encoder(pretrained.model, *known_codes, params, config.pooling or "mean", None)
    if opened.pooling == "cls" and not opened.model.cls_token:
        raise InputError("pooling is cls, but the model reads no [CLS] token: give mean, max or last.")
    return opened


def last_events(data: SequenceSet, splits: Sequence[str]) -> Labels:
    """Labels of no value at the last event of each subject that has any."""
    parts = [data.splits[name] for name in splits]
    times = np.concatenate([part.times[part.offsets[1:] - 1] for part in parts])
    subjects = np.concatenate([part.subject_ids for part in parts])
    return Labels(subjects, times, np.full(len(times), None), "none")


def _named(splits: Sequence[str]) -> str:
    return " or ".join(f"the split {name}" for name in splits)


def _vectors(
    config: PredictConfig,
    encoder: _Encoder,
    data: SequenceSet,
    wanted: dict[str, Labels],
    delays: Sequence[str],
    mesh: Mesh,
) -> Iterator[tuple[Labels, np.ndarray]]:
    """Labels and vectors of a few thousand examples at a time."""
    network = PatientEmbedding(encoder.model, len(encoder.vocabulary), encoder.pooling)

    def embed_step(params: Any, batch: TaskBatch) -> jax.Array:
        return network.apply({"params": params}, batch.rows, batch.weights.shape[1])  # pyright: ignore[reportReturnType]

    step = kept(jax.jit(embed_step), {"network": repr(network)}, mesh)
    pieces = pieces_of(config, encoder.model, encoder.max_length, data, wanted, delays, mesh)
    for _, part, _, batches in pieces:
        yield part, score(step, encoder.params, batches, mesh)


def outputs_of(
    step: OutputStep,
    config: PredictConfig,
    finetuned: Finetuned,
    data: SequenceSet,
    chosen: dict[str, Labels],
    delays: Sequence[str],
    mesh: Mesh,
) -> Iterator[tuple[Labels, np.ndarray, int, np.ndarray | None]]:
    """Labels, outputs, empty histories and codes seen of a few thousand examples at a time."""
    model, task = finetuned.model, finetuned.task
    ids = finetuned.vocabulary.encode(task.classes) if task.of.tells_seen_codes else None
    for split, part, examples, batches in pieces_of(
        config, model, finetuned.max_length, data, chosen, delays, mesh
    ):
        outputs = np.stack([score(step, one, batches, mesh) for one in finetuned.members])
        if finetuned.blend is not None:
            counts, share = finetuned.blend
            beside = counts.outputs(count_codes(examples, len(finetuned.vocabulary)))
            outputs = blended(outputs, beside, share)
        seen = None
        if ids is not None:
            whole = find_examples(
                data, split, part, max_tokens=np.iinfo(np.int32).max, delays=delays, outside_life="keep"
            )
            seen = codes_seen(whole, ids, len(finetuned.vocabulary))
        yield part, outputs, int(examples.empty.sum()), seen


def of_splits(labels: Labels, data: SequenceSet, splits: Sequence[str]) -> dict[str, Labels]:
    """The labels of each split's subjects."""
    return {name: labels.take(np.isin(labels.subject_ids, data.subject_ids(name))) for name in splits}


def pieces_of(
    config: PredictConfig,
    model: ModelConfig,
    max_length: int | None,
    data: SequenceSet,
    wanted: dict[str, Labels],
    delays: Sequence[str],
    mesh: Mesh,
) -> Iterator[tuple[str, Labels, Examples, TaskBatches]]:
    """Split, labels, examples and batches of a few thousand examples at a time, in the order of the labels.

    Args:
        config: its ``rows`` and ``outside_life`` are read.
        model: that reads the histories.
        max_length: tokens of a row; the model's positions where not given.
        data: in the vocabulary of the model.
        wanted: labels of each split.
        delays: see `examples.find_examples`.
        mesh: the devices.
    """
    shape, segments = RowShape(max_length or model.positions, cls_token=model.cls_token), 1
    for split, labels in wanted.items():
        for start in range(0, len(labels), AT_ONCE):
            part = labels.take(np.arange(start, min(start + AT_ONCE, len(labels))))
            examples = examples_of(data, split, part, model, max_length, delays, config.outside_life)
            part = part.take(examples.rows)  # without those that are left out
            if not len(part):
                continue
            targets = np.zeros((len(examples), 1), np.float32)
            batches = task_batches(
                examples, targets, shape, batch_size=len(examples), seed=None, least_segments=segments
            )
            # A power of two, so that few subjects are quick and there are few programs.
            rows = min(config.rows, 2 ** (batches.rows_per_batch - 1).bit_length())
            batches = batches.of_rows(rows, mesh.size)
            segments = batches.segments  # one shape for all that follow
            yield split, part, examples, batches


def _metadata(config: PredictConfig, finetuned: Finetuned, records: Records) -> JsonObject:
    assert config.model is not None
    most = (finetuned.max_length or finetuned.model.positions) - finetuned.model.cls_token
    return {
        "kind": finetuned.task.kind,
        "classes": list(finetuned.task.classes),
        "edges_days": list(finetuned.task.edges_days),
        **metadata_of(config.model, records, most),
        "input": _absolute(config.input),
        "threshold": finetuned.calibration.threshold,
        "temperature": finetuned.calibration.temperature,
        "trained": finetuned.trained,
    }


def metadata_of(model: Path, records: Records, max_tokens: int) -> JsonObject:
    """What a file of predictions says of where they come from, `max_tokens` being the longest history."""
    return {
        "model": _absolute(model),
        "data": _absolute(records.folder),
        "labels": _absolute(records.labels),
        "split": "all" if records.splits == SPLITS else records.splits[0],
        "codes": records.codes,
        "max_tokens": max_tokens,
        "fact_tokens": records.data.splits["train"].facts is not None,
    }


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())

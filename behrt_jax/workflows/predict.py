"""Predictions of a fine-tuned model for the labels of a split, or vectors of subjects, in bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import CONFIG_FILE as ADAPTER_FILE
from behrt_jax.adapters.files import load_adapter, read_config
from behrt_jax.config import FreezingConfig, LoRAConfig, ModelConfig, PredictConfig, from_stored
from behrt_jax.data.batches import RowShape, TaskBatch, TaskBatches, task_batches
from behrt_jax.data.events import SPLITS
from behrt_jax.data.examples import Examples, find_examples, of_unknown_subjects
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.predictions import (
    PredictionWriter,
    codes_seen,
    member_rows,
    member_schema,
    members_path,
    prediction_rows,
    schema_of,
)
from behrt_jax.data.prepared import read_manifest, read_prepared
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import mean_predictions
from behrt_jax.evaluation.task_baselines import CountModel, count_codes
from behrt_jax.files import JsonObject, read_json
from behrt_jax.models.behrt import BEHRTForTask, PatientEmbedding, Pooling
from behrt_jax.run_folder import CHECKPOINTS_FOLDER, VOCABULARY_FILE, checked, read_document
from behrt_jax.tracking.console import open_console
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import Devices, make_mesh, replicated, replicated_shapes
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.training.runtime import use_compilation_cache
from behrt_jax.training.state import Setup, set_up_task
from behrt_jax.training.step import Variables, with_new_rows
from behrt_jax.training.validation import make_output_step, score
from behrt_jax.workflows.finetune_run import (
    MEMBERS_FOLDER,
    TASK_FILE,
    Calibration,
    blended,
)
from behrt_jax.workflows.labelled_data import examples_of, in_vocabulary, read_labelled

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
    if config.output is None:
        raise InputError("--output is missing: give a Parquet file to write.")
    if config.output.exists():
        raise InputError(f"{config.output} is there already: give another --output, or remove it.")
    if config.rows < 1:
        raise InputError(f"rows is {config.rows}: give 1 or more.")
    if config.embeddings:
        return embed(config, devices)
    mesh = make_mesh(devices)
    with open_console() as console:
        if reason := use_compilation_cache(config.compilation_cache):
            console.log(reason)
        finetuned = open_finetuned(config.model, config.base, mesh)
        data, labels, delays = read_labelled(config.data, config.labels, without_values=True)
        data, _ = in_vocabulary(data, finetuned.vocabulary)
        task, calibration = finetuned.task, finetuned.calibration
        if labels.kind != "none" and not task.fits(labels):
            raise InputError(
                f"--labels: the labels are {labels.kind} ones, but the model predicts a {task.kind} task."
            )
        splits = SPLITS if config.split == "all" else (config.split,)
        chosen = _of_splits(labels, data, splits)
        counts = {
            "examples": sum(len(part) for part in chosen.values()),
            "unknown_subjects": of_unknown_subjects(data, labels),
            "empty_histories": 0,
            "duplicates": labels.duplicates,
        }
        if not counts["examples"]:
            raise InputError(
                f"--labels: none of the {len(labels):,} labels is of a subject of the split {config.split} "
                f"({counts['unknown_subjects']:,} are of subjects that the data lacks)."
            )
        schema = schema_of(task, labels)
        metadata = _metadata(config, finetuned) | {"counts": counts}  # complete when the file is closed
        console.start(counts["examples"], 0, None)
        done = 0
        with ExitStack() as stack:
            writer = stack.enter_context(PredictionWriter(config.output, schema, metadata))
            members = None
            if len(finetuned.members) > 1 and task.of.thresholded:
                path, of_members = members_path(config.output), member_schema(len(finetuned.members))
                members = stack.enter_context(PredictionWriter(path, of_members, metadata))
            for part, outputs, empty, seen in _outputs(config, finetuned, data, chosen, delays, mesh):
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
        if counts["empty_histories"]:
            empty = f"{counts['empty_histories']:,} examples"
            console.log(f"{empty} have no event yet: predicted from the age alone.")
        console.log(f"Written to {config.output}: {counts['examples']:,} predictions ({task.kind}).")
    return counts


class Finetuned(NamedTuple):
    """A model that is ready to predict."""

    task: Task
    setup: Setup
    members: list[Variables]
    """Variables of each model whose mean predicts, one where it is no ensemble; on the devices, whole on
    each, frozen leaves shared."""
    vocabulary: Vocabulary
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
        folder: a run of finetune (a population predicts with its chosen members), or an adapter in it.
        base: of an adapter: the pretraining run; the one that the adapter names where not given.
        mesh: the devices.

    Raises:
        InputError: neither a finished fine-tuning run nor an adapter, a run of several tasks, or an adapter
            of another base.
    """
    record = _record(folder)
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
        setup.predictor.model.config,
        record["max_length"],
        Calibration(**record["calibration"]),
        None if blend is None else (CountModel.from_json(blend["count_model"]), blend["share"]),
        {"regime": "+".join(freezing.groups) or freezing.regime, **record["parameters"]},
    )


def _record(folder: Path) -> JsonObject:
    if not (folder / TASK_FILE).is_file():
        raise InputError(
            f"--model: {folder} holds no fine-tuned model ({TASK_FILE} is not there): give a finished run of "
            "finetune.py, or the adapter in it."
        )
    if (folder / ADAPTER_FILE).is_file():
        read_config(folder)  # which checks what lies beside it
        return read_json(folder / TASK_FILE)
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
    record = _record(folders[0])
    pretrained = open_pretrained(base or Path(record["base"]))
    setup = _set_up(record, len(pretrained.vocabulary), mesh)
    first = setup.init(jax.random.key(0))["params"]
    heads = {name: head for name, head in first.items() if name.endswith("_head")}
    params = {"behrt": read_encoder(pretrained, mesh).params, **heads}
    members, new_codes = [], ()
    for folder in folders:
        found, lora, config = load_adapter(folder, params, pretrained.vocabulary.fingerprint())
        members.append(jax.device_put({"params": found, "lora": lora}, replicated(mesh)))
        new_codes = config.new_codes
    return setup, members, pretrained.vocabulary.extended(new_codes)


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
    params: Any
    pooling: Pooling
    max_length: int | None


def embed(config: PredictConfig, devices: Devices | None = None) -> JsonObject:
    """Write a Parquet file of ``subject_id``, ``time`` and ``vector`` (float32, hidden_size numbers).

    Args:
        config: with ``embeddings``; checked by :func:`behrt_jax.workflows.predict.predict`.
        devices: to compute on; all where not given.

    Returns:
        Counts: ``vectors``, and ``unknown_subjects`` of the labels.

    Raises:
        InputError: something in the options, the model, the data or the labels is wrong.
    """
    assert config.model is not None and config.output is not None
    if config.data is None:
        raise InputError("--data is missing: give the folder that prepare wrote.")
    mesh = make_mesh(devices)
    with open_console() as console:
        if reason := use_compilation_cache(config.compilation_cache):
            console.log(reason)
        encoder = _open(config, config.model, mesh)
        data, _ = in_vocabulary(read_prepared(config.data), encoder.vocabulary)
        delays = tuple(read_manifest(config.data)["options"].get("delays", ()))
        splits = SPLITS if config.split == "all" else (config.split,)
        if config.labels is None:
            wanted = {name: _last_events(data, name) for name in splits}
            unknown = 0
        else:
            labels = read_labels(config.labels, as_written=True, without_values=True)
            wanted = _of_splits(labels, data, splits)
            unknown = of_unknown_subjects(data, labels)
        total = sum(len(part) for part in wanted.values())
        if not total:
            raise InputError(f"There is no subject of the split {config.split} to embed.")
        schema = pa.schema(
            [
                ("subject_id", pa.int64()),
                ("time", pa.timestamp("us")),
                ("vector", pa.list_(pa.float32(), encoder.model.hidden_size)),
            ]
        )
        console.start(total, 0, None)
        done = 0
        with PredictionWriter(config.output, schema, {"pooling": encoder.pooling}) as writer:
            for part, vectors in _vectors(config, encoder, data, wanted, delays, mesh):
                lists = pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.reshape(-1)), encoder.model.hidden_size
                )
                columns = [pa.array(part.subject_ids), pa.array(part.times, pa.timestamp("us")), lists]
                writer.write(pa.table(columns, schema=schema))
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


def _open(config: PredictConfig, folder: Path, mesh: Mesh) -> _Encoder:
    if (folder / TASK_FILE).is_file():
        found = open_finetuned(folder, config.base, mesh)
        if len(found.members) > 1:
            raise InputError(f"--model: {folder} is an ensemble: give one of its members/.")
        variables, predictor = with_new_rows(found.members[0]), found.setup.predictor
        params = variables["params"]
        if predictor.lora is not None:
            params = lora.merge(params, variables["lora"], predictor.lora)
        pooling = config.pooling or predictor.model.pooling
        parts = {name: params[name] for name in ("behrt", "pooling_head") if name in params}
        opened = _Encoder(found.model, found.vocabulary, parts, pooling, found.max_length)
    else:
        pretrained = open_pretrained(folder)
        params = {"behrt": read_encoder(pretrained, mesh).params}
        opened = _Encoder(pretrained.model, pretrained.vocabulary, params, config.pooling or "mean", None)
    if opened.pooling == "cls" and not opened.model.cls_token:
        raise InputError("pooling is cls, but the model reads no [CLS] token: give mean, max or last.")
    return opened


def _last_events(data: SequenceSet, split: str) -> Labels:
    part = data.splits[split]
    times = part.times[part.offsets[1:] - 1]
    return Labels(part.subject_ids, times, np.zeros(len(part), bool), "boolean")


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

    step = jax.jit(embed_step)
    for _, part, _, batches in _pieces(config, encoder.model, encoder.max_length, data, wanted, delays, mesh):
        yield part, score(step, encoder.params, batches, mesh)


def _outputs(
    config: PredictConfig,
    finetuned: Finetuned,
    data: SequenceSet,
    chosen: dict[str, Labels],
    delays: Sequence[str],
    mesh: Mesh,
) -> Iterator[tuple[Labels, np.ndarray, int, np.ndarray | None]]:
    """Labels, outputs, empty histories and codes seen of a few thousand examples at a time."""
    model, task = finetuned.model, finetuned.task
    output_step = jax.jit(make_output_step(finetuned.setup.predictor))
    ids = finetuned.vocabulary.encode(task.classes) if task.of.tells_seen_codes else None
    for split, part, examples, batches in _pieces(
        config, model, finetuned.max_length, data, chosen, delays, mesh
    ):
        outputs = np.stack([score(output_step, one, batches, mesh) for one in finetuned.members])
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


def _of_splits(labels: Labels, data: SequenceSet, splits: Sequence[str]) -> dict[str, Labels]:
    return {name: labels.take(np.isin(labels.subject_ids, data.subject_ids(name))) for name in splits}


def _pieces(
    config: PredictConfig,
    model: ModelConfig,
    max_length: int | None,
    data: SequenceSet,
    wanted: dict[str, Labels],
    delays: Sequence[str],
    mesh: Mesh,
) -> Iterator[tuple[str, Labels, Examples, TaskBatches]]:
    """Split, labels, examples and batches of a few thousand examples at a time."""
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
            ).of_rows(config.rows, mesh.size)
            segments = batches.segments  # one shape for all that follow
            yield split, part, examples, batches


def _metadata(config: PredictConfig, finetuned: Finetuned) -> JsonObject:
    def absolute(path: Path | None) -> str | None:
        return None if path is None else str(path.resolve())

    return {
        "kind": finetuned.task.kind,
        "classes": list(finetuned.task.classes),
        "edges_days": list(finetuned.task.edges_days),
        "model": absolute(config.model),
        "data": absolute(config.data),
        "labels": absolute(config.labels),
        "split": config.split,
        "threshold": finetuned.calibration.threshold,
        "temperature": finetuned.calibration.temperature,
        "max_tokens": (finetuned.max_length or finetuned.model.positions) - finetuned.model.cls_token,
        "trained": finetuned.trained,
    }

"""Predictions of a fine-tuned model for the labels of a split, or vectors of subjects, in bounded memory."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.config.commands import PredictConfig
from behrt_jax.config.model import ModelConfig
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.examples import find_examples, of_unknown_subjects
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
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import mean_predictions
from behrt_jax.evaluation.task_baselines import count_codes
from behrt_jax.files import JsonObject, absolute
from behrt_jax.models.behrt import PatientEmbedding, Pooling
from behrt_jax.tracking.console import open_console
from behrt_jax.training.devices import Devices, make_mesh
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.training.runtime import kept, use_compilation_cache
from behrt_jax.training.step import with_new_rows
from behrt_jax.training.validation import OutputStep, make_embedding_step, make_output_step, score
from behrt_jax.workflows.finetune_run import blended
from behrt_jax.workflows.finetuned import Finetuned, is_finetuned, open_finetuned
from behrt_jax.workflows.prediction_data import (
    Histories,
    Records,
    announce_counts,
    check_output,
    count_labels,
    labels_to_predict,
    last_events,
    metadata_of,
    named,
    open_records,
    pieces_of,
    shown,
)


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
        labels, without = labels_to_predict(records)
        task, calibration = finetuned.task, finetuned.calibration
        if labels.kind != "none" and not task.fits(labels):
            raise InputError(
                f"--labels: the labels are {labels.kind} ones, but the model predicts a {task.kind} task."
            )
        histories = records.at(labels)
        counts = count_labels(records, labels, histories)
        schema = schema_of(task, labels)
        metadata = _metadata(config, finetuned, records) | {"counts": counts}  # complete when it is closed
        with ExitStack() as files:
            writer = files.enter_context(PredictionWriter(config.output, schema, metadata))
            members = None
            if len(finetuned.members) > 1 and task.of.thresholded:
                path, of_members = members_path(config.output), member_schema(len(finetuned.members))
                members = files.enter_context(PredictionWriter(path, of_members, metadata))
            predictor = finetuned.setup.predictor
            step = kept(jax.jit(make_output_step(predictor)), {"predictor": repr(predictor)}, mesh)
            pieces = outputs_of(step, config, finetuned, histories, mesh)
            for part, outputs, empty, seen in shown(pieces, counts, console):
                predicted = mean_predictions(task.kind, outputs, calibration.temperature)
                writer.write(prediction_rows(schema, task, part, predicted, calibration.threshold, seen))
                if members is not None:
                    alone = [task.of.predictions(one, calibration.temperature)[:, 0] for one in outputs]
                    members.write(member_rows(members.schema, part, alone))
                counts["empty_histories"] += empty
        console.close()
        if records.labels is None:
            console.log("No labels were given: each subject was predicted at its last event.")
        announce_counts(
            console,
            {**counts, "without_events": without},
            without_events="subjects have no event to be predicted at: left out",
            empty_histories="examples have no event yet: predicted from the age alone",
        )
        console.log(f"Written to {config.output}: {counts['examples']:,} predictions ({task.kind}).")
    return counts


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
        if config.labels is None:
            labels = last_events(records.data, records.splits)
        else:
            labels = read_labels(config.labels, as_written=True, without_values=True)
        histories = records.at(labels)
        counts = {
            "examples": sum(len(part) for part in histories.labels.values()),
            "unknown_subjects": of_unknown_subjects(records.data, labels),
        }
        if not counts["examples"]:
            raise InputError(f"There is no subject of {named(records.splits)} to embed.")
        schema = _embedding_schema(config, labels, encoder.model.hidden_size)
        metadata = {"pooling": encoder.pooling, "codes": records.codes}
        with PredictionWriter(config.output, schema, metadata) as writer:
            for part, vectors in shown(_vectors(config, encoder, histories, mesh), counts, console):
                writer.write(_embedding_rows(schema, part, vectors))
        console.close()
        announce_counts(console, counts)
        size = encoder.model.hidden_size
        console.log(f"Written to {config.output}: {counts['examples']:,} vectors of {size}.")
    return {"vectors": counts["examples"], "unknown_subjects": counts["unknown_subjects"]}


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


def _vectors(
    config: PredictConfig, encoder: _Encoder, histories: Histories, mesh: Mesh
) -> Iterator[tuple[Labels, np.ndarray]]:
    """Labels and vectors of a few thousand examples at a time."""
    network = PatientEmbedding(encoder.model, len(encoder.vocabulary), encoder.pooling)
    step = kept(jax.jit(make_embedding_step(network)), {"network": repr(network)}, mesh)
    for _, part, _, batches in pieces_of(config, encoder.model, encoder.max_length, histories, mesh):
        yield part, score(step, encoder.params, batches, mesh)


def outputs_of(
    step: OutputStep, config: PredictConfig, finetuned: Finetuned, histories: Histories, mesh: Mesh
) -> Iterator[tuple[Labels, np.ndarray, int, np.ndarray | None]]:
    """Labels, outputs, empty histories and codes seen of a few thousand examples at a time."""
    model, task = finetuned.model, finetuned.task
    ids = finetuned.vocabulary.encode(task.classes) if task.of.tells_seen_codes else None
    for split, part, examples, batches in pieces_of(config, model, finetuned.max_length, histories, mesh):
        outputs = np.stack([score(step, one, batches, mesh) for one in finetuned.members])
        if finetuned.blend is not None:
            counts, share = finetuned.blend
            beside = counts.outputs(count_codes(examples, len(finetuned.vocabulary)))
            outputs = blended(outputs, beside, share)
        seen = None
        if ids is not None:
            whole = find_examples(
                histories.data,
                split,
                part,
                max_tokens=np.iinfo(np.int32).max,
                delays=histories.delays,
                outside_life="keep",
            )
            seen = codes_seen(whole, ids, len(finetuned.vocabulary))
        yield part, outputs, int(examples.empty.sum()), seen


def _metadata(config: PredictConfig, finetuned: Finetuned, records: Records) -> JsonObject:
    assert config.model is not None
    most = (finetuned.max_length or finetuned.model.positions) - finetuned.model.cls_token
    return {
        "kind": finetuned.task.kind,
        "classes": list(finetuned.task.classes),
        "edges_days": list(finetuned.task.edges_days),
        **metadata_of(config.model, records, most),
        "input": absolute(config.input),
        "threshold": finetuned.calibration.threshold,
        "temperature": finetuned.calibration.temperature,
        "trained": finetuned.trained,
    }

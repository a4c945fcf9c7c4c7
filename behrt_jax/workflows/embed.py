"""Vectors of subjects at prediction times, or at their last events, for use in other models."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.config import ModelConfig, PredictConfig
from behrt_jax.data.events import SPLITS
from behrt_jax.data.examples import of_unknown_subjects
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.predictions import PredictionWriter
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.store import read_manifest, read_prepared
from behrt_jax.data.task_batches import TaskBatch, task_batches
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import PatientEmbedding
from behrt_jax.models.pooling import Pooling
from behrt_jax.tracking.console import open_console
from behrt_jax.training.compilation import use_compilation_cache
from behrt_jax.training.mesh import make_mesh
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.training.task_scores import score
from behrt_jax.training.task_step import with_new_rows
from behrt_jax.workflows.finetune_results import TASK_FILE
from behrt_jax.workflows.finetuned import open_finetuned
from behrt_jax.workflows.labelled_data import examples_of, in_vocabulary

AT_ONCE = 8192
"""Examples that are held in memory together."""


class _Encoder(NamedTuple):
    model: ModelConfig
    vocabulary: Vocabulary
    params: Any
    pooling: Pooling
    max_length: int | None


def embed(config: PredictConfig, devices: Sequence[Any] | None = None) -> dict[str, Any]:
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
            wanted = {
                name: labels.take(np.isin(labels.subject_ids, data.subject_ids(name))) for name in splits
            }
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
        console.close()
        if unknown:
            console.log(f"{unknown:,} labels are of subjects that the data lacks: left out.")
        console.log(f"Written to {config.output}: {total:,} vectors of {encoder.model.hidden_size}.")
    return {"vectors": total, "unknown_subjects": unknown}


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
        opened = _Encoder(found.model, found.vocabulary, params["behrt"], pooling, found.max_length)
    else:
        pretrained = open_pretrained(folder)
        params = read_encoder(pretrained, mesh).params
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
        rows = batch.rows
        inputs = rows.codes, rows.ages, rows.visits, rows.positions, rows.segment_ids
        return network.apply({"params": {"behrt": params}}, *inputs, batch.weights.shape[1])  # pyright: ignore[reportReturnType]

    step, segments = jax.jit(embed_step), 1
    for split, labels in wanted.items():
        for start in range(0, len(labels), AT_ONCE):
            part = labels.take(np.arange(start, min(start + AT_ONCE, len(labels))))
            examples = examples_of(data, split, part, encoder.model, encoder.max_length, delays)
            batches = task_batches(
                examples,
                np.zeros((len(examples), 1), np.float32),
                row_length=encoder.max_length or encoder.model.positions,
                batch_size=len(examples),
                seed=None,
                cls_token=encoder.model.cls_token,
                least_segments=segments,
            ).of_rows(config.rows, mesh.size)
            segments = batches.segments
            yield part, score(step, encoder.params, batches, mesh)

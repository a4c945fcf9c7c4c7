"""Predictions of a fine-tuned model for the labels of a split, in bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from behrt_jax.config import PredictConfig
from behrt_jax.data.events import SPLITS
from behrt_jax.data.examples import find_examples, of_unknown_subjects
from behrt_jax.data.labels import Labels
from behrt_jax.data.prediction_rows import codes_seen, member_rows, member_schema, prediction_rows, schema_of
from behrt_jax.data.predictions import PredictionWriter, members_path
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.task_batches import task_batches
from behrt_jax.errors import InputError
from behrt_jax.evaluation.decisions import mean_predictions, predictions
from behrt_jax.tracking.console import open_console
from behrt_jax.training.compilation import use_compilation_cache
from behrt_jax.training.mesh import make_mesh
from behrt_jax.training.task_scores import score
from behrt_jax.training.task_step import make_output_step
from behrt_jax.workflows.finetuned import Finetuned, open_finetuned
from behrt_jax.workflows.labelled_data import examples_of, in_vocabulary, read_labelled

AT_ONCE = 8192
"""Examples that are held in memory together."""


def predict(config: PredictConfig, devices: Sequence[Any] | None = None) -> dict[str, Any]:
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
    if config.rows < 1:
        raise InputError(f"rows is {config.rows}: give 1 or more.")
    if config.embeddings:
        from behrt_jax.workflows.embed import embed

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
        chosen = {name: labels.take(np.isin(labels.subject_ids, data.subject_ids(name))) for name in splits}
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
            if len(finetuned.members) > 1 and task.kind == "binary":
                path, of_members = members_path(config.output), member_schema(len(finetuned.members))
                members = stack.enter_context(PredictionWriter(path, of_members, metadata))
            for part, outputs, empty, seen in _outputs(config, finetuned, data, chosen, delays, mesh):
                predicted = mean_predictions(task.kind, outputs, calibration.temperature)
                writer.write(prediction_rows(schema, task, part, predicted, calibration.threshold, seen))
                if members is not None:
                    alone = [predictions(task.kind, one, calibration.temperature)[:, 0] for one in outputs]
                    members.write(member_rows(members.schema, part, alone))
                counts["empty_histories"] += empty
                done += len(part)
                console.step(done, len(part))
        console.close()
        if counts["unknown_subjects"]:
            console.log(
                f"{counts['unknown_subjects']:,} labels are of subjects that the data lacks: left out."
            )
        if counts["empty_histories"]:
            empty = f"{counts['empty_histories']:,} examples"
            console.log(f"{empty} have no event yet: predicted from the age alone.")
        console.log(f"Written to {config.output}: {counts['examples']:,} predictions ({task.kind}).")
    return counts


def _outputs(
    config: PredictConfig,
    finetuned: Finetuned,
    data: SequenceSet,
    chosen: dict[str, Labels],
    delays: Sequence[str],
    mesh: Any,
) -> Iterator[tuple[Labels, np.ndarray, int, np.ndarray | None]]:
    """Labels, outputs, empty histories and codes seen of a few thousand examples at a time."""
    model, task = finetuned.model, finetuned.task
    output_step = jax.jit(make_output_step(finetuned.setup.predictor))
    length, segments = finetuned.max_length or model.positions, 1
    ids = finetuned.vocabulary.encode(task.classes) if task.kind == "multilabel" else None
    for split, labels in chosen.items():
        for start in range(0, len(labels), AT_ONCE):
            part = labels.take(np.arange(start, min(start + AT_ONCE, len(labels))))
            examples = examples_of(data, split, part, model, finetuned.max_length, delays)
            batches = task_batches(
                examples,
                np.zeros((len(examples), 1), np.float32),
                row_length=length,
                batch_size=len(examples),
                seed=None,
                cls_token=model.cls_token,
                least_segments=segments,
            ).of_rows(config.rows, mesh.size)
            segments = batches.segments  # one shape for all that follow
            outputs = np.stack([score(output_step, one, batches, mesh) for one in finetuned.members])
            seen = None
            if ids is not None:
                whole = find_examples(data, split, part, max_tokens=np.iinfo(np.int32).max, delays=delays)
                seen = codes_seen(whole, ids, len(finetuned.vocabulary))
            yield part, outputs, int(examples.empty.sum()), seen


def _metadata(config: PredictConfig, finetuned: Finetuned) -> dict[str, Any]:
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

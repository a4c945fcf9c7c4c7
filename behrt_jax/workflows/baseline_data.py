"""What baselines and groups need beside the predictions: histories, and labels of train and tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from behrt_jax.config import EvaluateConfig
from behrt_jax.data.events import SPLITS
from behrt_jax.data.examples import Examples, find_examples
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.predictions import PredictionFile
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.store import read_manifest, read_prepared, read_static
from behrt_jax.data.vocabulary import UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation.baseline import BaselineData, targets_of
from behrt_jax.evaluation.groups import age_groups, sex_groups
from behrt_jax.evaluation.histories import Histories, count_codes, join_histories

_WHOLE_HISTORY = 1 << 30
_MEND = "give --data (the folder that prepare wrote) and --labels (the label table with the train split)."


@dataclass(frozen=True, eq=False)
class Records:
    """The prepared data that the predictions were made of."""

    folder: Path
    data: SequenceSet
    delays: tuple[str, ...]
    max_tokens: int
    evaluated: Histories
    """Of the predictions' examples, in their order."""


def open_records(config: EvaluateConfig, file: PredictionFile) -> tuple[Records | None, str]:
    """The histories of the predictions' examples; else None and why there are none.

    Raises:
        InputError: ``config.data`` is given, but is no prepared data or not that of the predictions.
    """
    named = config.data or file.metadata.get("data")
    if named is None:
        return None, f"the predictions do not name their data: {_MEND}"
    folder = Path(named)
    if config.data is None and not folder.is_dir():
        return None, f"the data that the predictions name is not there ({folder}): {_MEND}"
    data = read_prepared(folder)
    delays = tuple(read_manifest(folder)["options"].get("delays", ()))
    max_tokens = file.metadata.get("max_tokens") or _WHOLE_HISTORY
    wanted = Labels(file.subject_ids, file.times, np.zeros(len(file), bool), "boolean")
    found = {name: _examples(data, name, wanted, max_tokens, delays) for name in _splits(file.metadata)}
    rows = np.concatenate([examples.rows for examples in found.values()])
    if len(rows) != len(file):
        missing = f"{len(file) - len(rows):,} of {len(file):,} examples are not in {folder}"
        if config.data is not None:
            raise InputError(f"--data: {missing}: give the data that was predicted.")
        return None, f"{missing}: {_MEND}"
    parts = [count_codes(examples, len(data.vocabulary)) for examples in found.values()]
    return Records(folder, data, delays, max_tokens, join_histories(parts, np.argsort(rows))), ""


def baseline_data(
    config: EvaluateConfig, file: PredictionFile, records: Records
) -> tuple[BaselineData | None, str, dict[str, Any]]:
    """What baselines are fitted on; else None and why there is nothing; and counts of examples.

    Raises:
        InputError: ``config.labels`` is given but cannot be read, or is of another kind.
    """
    named = config.labels or file.metadata.get("labels")
    if named is None:
        return None, f"the predictions do not name their labels: {_MEND}", {}
    path = Path(named)
    if config.labels is None and not path.exists():
        return None, f"the labels that the predictions name are not there ({path}): {_MEND}", {}
    labels = read_labels(path)
    parts, counts = {}, {}
    for place, split in enumerate(("train", "tuning")):
        examples = _examples(records.data, split, labels, records.max_tokens, records.delays)
        targets, rows = targets_of(file.kind, file.classes, labels, examples.rows)
        if len(rows) > config.max_train_examples:
            rng = np.random.default_rng([config.seed, place])
            chosen = np.sort(rng.permutation(len(rows))[: config.max_train_examples])
            targets, rows = targets[chosen], rows[chosen]
        parts[split] = count_codes(examples, len(records.data.vocabulary), rows), targets
        counts |= {split: len(rows), f"{split}_left_out": len(examples) - len(rows)}
    if not counts["train"]:
        return None, f"{path} has no label of the train split: {_MEND}", counts
    ids = records.data.vocabulary.encode(file.classes)
    data = BaselineData(
        kind=file.kind,
        classes=file.classes,
        edges_days=file.edges_days,
        class_ids=np.where(ids == UNK, -1, ids),
        train=parts["train"][0],
        train_targets=parts["train"][1],
        tuning=parts["tuning"][0],
        tuning_targets=parts["tuning"][1],
        evaluated=records.evaluated,
        boosting_codes=config.boosting_codes,
        seed=config.seed,
    )
    return data, "", counts


def find_groups(file: PredictionFile, records: Records) -> dict[str, Mapping[str, np.ndarray]]:
    """``age``, and ``sex`` where the data has it as a static fact."""
    groups: dict[str, Mapping[str, np.ndarray]] = {"age": age_groups(records.evaluated.ages)}
    facts = pa.concat_tables([read_static(records.folder, name) for name in _splits(file.metadata)])
    sex = sex_groups(file.subject_ids, facts["subject_id"].to_pylist(), facts["code"].to_pylist())
    return {"sex": sex, **groups} if sex else groups


def _splits(metadata: Mapping[str, Any]) -> Sequence[str]:
    split = metadata.get("split")
    return (split,) if split in SPLITS else SPLITS


def _examples(
    data: SequenceSet, split: str, labels: Labels, max_tokens: int, delays: Sequence[str]
) -> Examples:
    return find_examples(data, split, labels, max_tokens=max_tokens, delays=delays)

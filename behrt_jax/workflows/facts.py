"""What only the process that holds data and model can tell the doctor, as figures for config.json."""

from typing import Any

import numpy as np

from behrt_jax.config import ModelConfig, PretrainConfig
from behrt_jax.data.batches import TrainingBatches
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.vocabulary import SEP, SPECIAL_TOKENS, UNK
from behrt_jax.diagnosis.reach import unread_leaves
from behrt_jax.training.state import Setup
from behrt_jax.training.step import example_logits
from behrt_jax.training.telemetry import leaf_names

MOST_EVENTS = 20_000_000
"""Events looked at; of more, every n-th."""


def gather_facts(
    config: PretrainConfig, data: SequenceSet, setup: Setup, batches: TrainingBatches, total_steps: int
) -> dict[str, Any]:
    """Figures for `diagnosis.before`; no subject ids and no events.

    Returns:
        ``codes``: rows of the vocabulary that are codes; ``total_steps``, ``steps_per_epoch``,
        ``tokens_per_step`` (without padding), ``row_length``; ``validation_subjects``;
        ``unseen_share``: of validation events, those whose code the train split hardly or never has;
        ``cut_share``: of train tokens, those past the first row_length of their history;
        ``beyond_tables``: see :func:`beyond_tables`; ``unreached_adapters``: names of adapter leaves that
        the prediction does not depend on.
    """
    train, tuning = data.splits["train"], data.splits["tuning"]
    window = batches.row_length - batches.cls_token
    return {
        "codes": len(data.vocabulary) - len(SPECIAL_TOKENS),
        "total_steps": total_steps,
        "steps_per_epoch": batches.steps_per_epoch,
        "tokens_per_step": batches.tokens_per_epoch / batches.steps_per_epoch,
        "row_length": batches.row_length,
        "validation_subjects": len(tuning),
        "unseen_share": unseen_share(tuning.codes, data.vocabulary.counts),
        "cut_share": float(np.maximum(train.lengths - window, 0).sum() / max(len(train.codes), 1)),
        "beyond_tables": beyond_tables(train, config.model),
        "unreached_adapters": unreached_adapters(setup),
    }


def unseen_share(codes: np.ndarray, counts: np.ndarray) -> float:
    """Share of events, int32 `[events]`, that are [UNK] or whose train count, int64 `[vocabulary]`, is 0."""
    events = codes[codes != SEP]
    if not len(events):
        return 0.0
    unseen = (counts == 0) & (np.arange(len(counts)) >= len(SPECIAL_TOKENS))
    unseen[UNK] = True
    return float(unseen[events].mean())


def beyond_tables(sequences: Sequences, model: ModelConfig) -> dict[str, float]:
    """Shares of events that share the row at the end of a table: by ``ages`` above, ``before_birth``,
    ``visits`` and ``positions`` (where those count visits).
    """
    step = -(-len(sequences.codes) // MOST_EVENTS) or 1
    ages, visits = sequences.ages[::step], sequences.visits[::step]
    if not len(ages):
        return {}
    found = {
        "ages": np.count_nonzero(ages >= model.age_rows * model.age_bin_years),
        "before_birth": np.count_nonzero(ages < 0),
    }
    if model.visit_embedding == "ordinal":
        found["visits"] = np.count_nonzero(visits >= model.visit_rows)
    if model.position_of == "visit":
        found["positions"] = np.count_nonzero(visits >= model.positions)
    return {name: int(count) / len(ages) for name, count in found.items()}


def unreached_adapters(setup: Setup) -> list[str]:
    """Names of adapter leaves that the prediction does not depend on; nothing is computed."""
    if not setup.layers:
        return []
    unread = unread_leaves(lambda variables: example_logits(setup.predictor, variables), setup.shapes)
    return [
        name
        for name, alone in zip(leaf_names(setup.shapes), unread, strict=True)
        if alone and name.startswith("lora/")
    ]

"""In what the members of a population differ: seeds, learning rates, ranks, folds or tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from behrt_jax.config import FinetuneConfig, LoRAConfig
from behrt_jax.workflows.labelled_data import LabelledData

SEARCHES = ("learning_rate", "rank")
"""What varies where the best member predicts."""


@dataclass(frozen=True, eq=False)
class Variation:
    """What each member has of its own."""

    names: list[str]
    seeds: list[int]
    rates: list[float]
    """Factors on the learning rate."""
    adapters: Sequence[LoRAConfig | None]
    labelled: list[LabelledData]
    """Each member's own examples."""
    tuning: list[np.ndarray]
    """Which of the tuning examples of all are its own, bool ``[examples]``."""
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

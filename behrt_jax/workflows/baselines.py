"""Predictors without training, scored on the very codes that the validation step masks."""

from behrt_jax.config import PretrainConfig
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.evaluation.baselines import Unigram
from behrt_jax.evaluation.cooccurrence import Cooccurrence
from behrt_jax.evaluation.masked_codes import MaskedCodeResults, MaskedSplit
from behrt_jax.evaluation.oracle import oracle_of
from behrt_jax.training.objectives import FIRST_CODE


def predict_baselines(
    config: PretrainConfig, data: SequenceSet, masked: MaskedSplit
) -> dict[str, MaskedCodeResults]:
    """Results of ``unigram`` and ``co-occurrence``, and of the ``oracle`` where the optimum is known."""
    unigram = Unigram(data.vocabulary.counts, FIRST_CODE)
    cooccurrence = Cooccurrence(data.splits["train"], unigram, FIRST_CODE)
    found = {"unigram": unigram.predict(masked), "co-occurrence": cooccurrence.predict(masked)}
    oracle = oracle_of(config.data, data.vocabulary.codes)
    if oracle is not None:
        found["oracle"] = oracle.predict(masked, config.masking)
    return found

"""Whether something happens within a horizon: positive, negative, or not known."""

import numpy as np
import pyarrow as pa

from behrt_jax.config import MakeLabelsConfig
from behrt_jax.data.label_makers.prediction_times import Candidates, MadeLabels
from behrt_jax.data.label_makers.split_history import NEVER, SplitHistory, microseconds
from behrt_jax.data.visits import DAY


def label_within(
    candidates: Candidates,
    history: SplitHistory,
    config: MakeLabelsConfig,
    happens: np.ndarray,
    known_until: np.ndarray,
    death_ends: bool = True,
) -> MadeLabels:
    """Boolean labels: whether it happens after the gap and within the horizon that follows it.

    Left out and counted are candidates where it happens in the gap, and those without an answer: death comes
    first, or what happens is not known up to the end of the horizon.

    Args:
        candidates: all of whom can still have it.
        history: the split.
        config: ``horizon_days`` (given) and ``gap_days`` are read.
        happens: int64 ``[candidates]``, after the prediction time; `NEVER` where it does not.
        known_until: int64 ``[candidates]``.
        death_ends: whether a death within the horizon leaves the question open.
    """
    assert config.horizon_days is not None
    begin = candidates.times + microseconds(config.gap_days)
    end = begin + microseconds(config.horizon_days)
    candidates.leave_out("it happens in the gap", happens <= begin)
    positive = happens <= end
    room = known_until >= end
    if death_ends:
        deaths = history.deaths[candidates.subjects]
        died = ~positive & (deaths <= end)
        candidates.leave_out("death before the end of the horizon", died)
    if config.times != "last":
        candidates.leave_out("follow-up ends before the horizon does", ~positive & ~room)
    candidates.choose(history, config, room)
    chosen = positive[candidates.left]
    values = {"boolean_value": pa.array(chosen)}
    return candidates.labelled(history, values, positive=int(chosen.sum()))


def label_survival(
    candidates: Candidates,
    history: SplitHistory,
    config: MakeLabelsConfig,
    happens: np.ndarray,
    known_until: np.ndarray,
) -> MadeLabels:
    """Survival labels: days from the prediction time until it happens, or until it is not known any more.

    Arguments are those of `label_within`; without ``horizon_days`` all of the follow-up counts.
    """
    begin = candidates.times + microseconds(config.gap_days)
    end = np.full(len(begin), NEVER)
    if config.horizon_days is not None:
        end = begin + microseconds(config.horizon_days)
    candidates.leave_out("it happens in the gap", happens <= begin)
    candidates.leave_out("follow-up ends before the gap does", (happens == NEVER) & (known_until <= begin))
    candidates.choose(history, config, known_until >= end)
    seen = (happens <= end) & (happens < NEVER)
    until = np.minimum(np.where(happens < NEVER, happens, known_until), end)
    left = candidates.left
    values = {
        "boolean_value": pa.array(seen[left]),
        "float_value": pa.array(((until - candidates.times)[left] / DAY).astype(np.float32)),  # of the schema
    }
    events = int(seen[left].sum())
    return candidates.labelled(history, values, positive=events, censored=int(left.sum()) - events)

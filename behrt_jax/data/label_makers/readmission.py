"""Readmission: whether another visit begins within some days after the end of this one."""

import numpy as np

from behrt_jax.config import MakeLabelsConfig
from behrt_jax.data.delays import matching_codes
from behrt_jax.data.label_makers.horizon import label_survival, label_within
from behrt_jax.data.label_makers.prediction_times import Candidates, MadeLabels
from behrt_jax.data.label_makers.split_history import NEVER, SplitHistory, visits_of
from behrt_jax.data.visits import DAY


def label_readmission(history: SplitHistory, config: MakeLabelsConfig) -> MadeLabels:
    """Boolean labels, or survival labels, at the ends of visits.

    Visits are those of the prepared data, with ``config.codes`` only those that have such a code. A death on
    the day on which a visit ends, or before, leaves nobody to be readmitted; a later one that comes before a
    readmission and within the horizon is no answer.
    """
    chosen = matching_codes(history.vocabulary, config.codes, "--codes") if config.codes else None
    visits = visits_of(history.part, chosen)
    candidates = Candidates(visits.subjects, visits.ends)
    following = np.append(visits.starts, NEVER)[visits.following]
    deaths = history.deaths[visits.subjects]
    candidates.leave_out("another visit goes on", visits.others_go_on)
    candidates.leave_out("death in the visit, or on the day of its end", deaths // DAY <= visits.ends // DAY)
    candidates.leave_out_short(history, config.min_events)
    known_until = history.known_until[visits.subjects]
    label = label_survival if config.survival else label_within
    return label(candidates, history, config, following, known_until)

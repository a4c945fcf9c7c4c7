"""Death within a horizon."""

import numpy as np

from behrt_jax.config import MakeLabelsConfig
from behrt_jax.data.label_makers.horizon import label_survival, label_within
from behrt_jax.data.label_makers.prediction_times import Candidates, MadeLabels
from behrt_jax.data.label_makers.split_history import NEVER, SplitHistory, visits_of


def label_death(history: SplitHistory, config: MakeLabelsConfig) -> MadeLabels:
    """Boolean labels, or survival labels, at the ends of visits.

    Deaths are those of MEDS_DEATH, at their time in the source, which is often the day alone: a prediction
    later on that day is after death. Who has no death lives up to the end of follow-up.
    """
    visits = visits_of(history.part)
    candidates = Candidates(visits.subjects, visits.ends)
    happens = history.deaths[visits.subjects]
    candidates.leave_out("the subject has died", happens <= visits.ends)
    candidates.leave_out_short(history, config.min_events)
    known_until = np.where(happens < NEVER, NEVER, history.known_until[visits.subjects])
    if config.survival:
        return label_survival(candidates, history, config, happens, known_until)
    return label_within(candidates, history, config, happens, known_until, death_ends=False)

"""First occurrence of a set of codes within a horizon, for subjects who have had none of them so far."""

from behrt_jax.config import MakeLabelsConfig
from behrt_jax.data.delays import matching_codes
from behrt_jax.data.label_makers.horizon import label_survival, label_within
from behrt_jax.data.label_makers.prediction_times import Candidates, MadeLabels
from behrt_jax.data.label_makers.split_history import SplitHistory, visits_of


def label_first_occurrence(history: SplitHistory, config: MakeLabelsConfig) -> MadeLabels:
    """Boolean labels, or survival labels, at the ends of visits.

    [UNK], which may stand for any code, is none of the set. Follow-up ends with a subject's last event or
    death: death before the end of the horizon is no answer (a competing event), nor is silence.
    """
    visits = visits_of(history.part)
    first = history.first_times(matching_codes(history.vocabulary, config.codes, "--codes"))
    candidates = Candidates(visits.subjects, visits.ends)
    happens = first[visits.subjects]
    candidates.leave_out("it has happened already", happens <= visits.ends)
    candidates.leave_out("the subject has died", history.deaths[visits.subjects] <= visits.ends)
    candidates.leave_out_short(history, config.min_events)
    known_until = history.known_until[visits.subjects]
    label = label_survival if config.survival else label_within
    return label(candidates, history, config, happens, known_until)

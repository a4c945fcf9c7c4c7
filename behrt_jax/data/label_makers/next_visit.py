"""The codes of the next visit.

A task of the BEHRT paper (Li et al. 2020, doi 10.1038/s41598-020-62922-y).
"""

import numpy as np
import pyarrow as pa

from behrt_jax.config import MakeLabelsConfig
from behrt_jax.data.delays import matching_codes
from behrt_jax.data.label_makers.prediction_times import Candidates, MadeLabels
from behrt_jax.data.label_makers.split_history import SplitHistory, visit_numbers, visits_of
from behrt_jax.data.vocabulary import SPECIAL_TOKENS


def label_next_visit(history: SplitHistory, config: MakeLabelsConfig) -> MadeLabels:
    """Sets of codes, at the ends of visits: those of the first visit that begins later.

    They are codes of the vocabulary, or of ``config.codes``; [UNK] is none. A set may be empty.
    """
    part, visits = history.part, visits_of(history.part)
    wanted = np.arange(len(history.vocabulary)) >= len(SPECIAL_TOKENS)
    if config.codes:
        wanted = matching_codes(history.vocabulary, config.codes, "--codes")
    candidates = Candidates(visits.subjects, visits.ends)
    candidates.leave_out("no visit begins later", visits.following < 0)
    candidates.leave_out("another visit goes on", visits.others_go_on)
    candidates.leave_out_short(history, config.min_events)
    candidates.choose(history, config)

    # Codes of each visit, as pairs of visit and code, once each and ascending by visit.
    tokens = np.flatnonzero(wanted[part.codes])
    pairs = np.unique(visit_numbers(part)[tokens] * len(history.vocabulary) + part.codes[tokens])
    visit, code = np.divmod(pairs, len(history.vocabulary))
    asked = visits.following[candidates.left]
    starts, stops = np.searchsorted(visit, asked), np.searchsorted(visit, asked, side="right")
    names = np.array(history.vocabulary.codes, object)
    sets = [sorted(names[code[start:stop]]) for start, stop in zip(starts, stops, strict=True)]
    values = {"categorical_values": pa.array(sets, pa.list_(pa.string()))}
    empty = int(np.count_nonzero(starts == stops))
    return candidates.labelled(history, values, without_code=empty, codes=int((stops - starts).sum()))

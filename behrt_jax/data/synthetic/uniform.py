"""Codes drawn at random: what a model looks like when there is nothing to learn."""

import numpy as np

from behrt_jax.data.events import EventSet
from behrt_jax.data.synthetic.histories import check_options, draw_histories, to_event_set
from behrt_jax.errors import InputError


def generate_uniform(
    subjects: int, code_count: int, events_mean: float, events_spread: float, seed: int
) -> EventSet:
    """Generate histories whose codes are independent and equally likely.

    No code says anything about another, about age or about time: the best loss that masked-code
    prediction can reach is ln(``code_count``), that of a guess (6.908 for 1000 codes). A model that
    gets below it on subjects it has not seen points to a leak.

    Args:
        subjects: Number of subjects.
        code_count: Number of codes, ``DX//U0000`` and so on.
        events_mean: Mean number of events in a history, births aside.
        events_spread: Standard deviation of its logarithm; see
            :func:`~behrt_jax.data.synthetic.histories.history_lengths`.
        seed: Equal seeds give equal events.

    Raises:
        InputError: An option is out of its range.
    """
    check_options(subjects, events_mean, events_spread, seed)
    if code_count < 2:
        raise InputError(
            f"data.vocabulary_size leaves {code_count} codes to the uniform source: give 2 or more."
        )
    rng = np.random.default_rng(seed)
    histories = draw_histories(rng, subjects, events_mean, events_spread)
    codes = rng.integers(0, code_count, len(histories.event_times), dtype=np.int32)
    descriptions = {f"DX//U{number:04d}": f"Code {number}, drawn at random" for number in range(code_count)}
    return to_event_set("uniform", histories, codes, descriptions)

"""Generated records whose best possible prediction is known: drawn from a small model of illness.

A subject has conditions, each absent, early or late. Their joint stage changes from visit to visit, by
rates that depend on age and on the other conditions. The codes of a visit are noted one after another:
each has a topic (a condition's diagnosis or treatment, routine care, noise), which follows on from the
topic before it or starts afresh, and the topic with the stage, or the age, decides which codes are likely.
How many visits a subject has, when, and how many codes each has, says nothing about the conditions, so
that :mod:`behrt_jax.evaluation.oracle` can take them as given.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from behrt_jax.data.events import EventSet
from behrt_jax.errors import InputError
from behrt_jax.records.synthetic.histories import (
    VISIT_SIZES,
    YEAR_DAYS,
    GeneratedHistories,
    check_options,
    draw_births,
    history_lengths,
    lay_out,
    to_event_set,
)

LEAST_CODES = 60
"""Fewest codes that the model can work with."""
CONDITIONS = 4
STAGES = 3
"""Absent, early, late."""
AGE_BANDS = 22
BAND_YEARS = 5.0
"""As wide as the model's age bins by default, so that it sees all of the age that matters here."""

_STREAM = 6_116_468  # apart from the streams that draw subjects
_ONSET_AGES = (12.0, 38.0, 55.0, 68.0)  # years, half of those who ever have the condition have it
_ONSET_WIDTHS = (5.0, 8.0, 9.0, 7.0)
_PREVALENCES = (0.4, 0.5, 0.5, 0.6)  # at high age
_MOST_HAZARD = 0.45
_NOISE = (0.03, 0.12)  # share of fresh starts, at difficulty 0 and 1
_SHARED = (0.0, 0.5)  # of diagnoses, and of treatments: share that is common to all conditions
_FLAT = (0.0, 0.6)  # how far the late stage has the code frequencies of the early one
_ZIPF = 1.3


@dataclass(frozen=True, eq=False)
class LatentModel:
    """All probabilities, float64: K conditions, Z joint stages, B age bands, T topics, R rows, C codes."""

    states: np.ndarray
    """int64 ``[Z, K]``: the stage of each condition, 0 where it is absent."""
    initial: np.ndarray
    """``[B, Z]``: joint stage at the first visit."""
    transitions: np.ndarray
    """``[B, Z, Z]``: from one visit to the next, by the age band at the next."""
    starts: np.ndarray
    """``[Z, T]``: topic of the first code of a visit, and after each fresh start."""
    continues: np.ndarray
    """``[T]``: chance that the next topic follows from this one."""
    follows: np.ndarray
    """``[T, T]``: which topic follows then."""
    rows: np.ndarray
    """int64 ``[Z, T]``: the row of ``emissions`` that a topic draws its code from."""
    emissions: np.ndarray
    """``[B, R, C]``: frequencies of the codes in each row."""
    sizes: np.ndarray
    """``[S]``: chance that a visit has 1, 2 ... S codes."""
    daily_visit: float
    """Chance of a visit on each day after one."""
    band_years: float
    """Width of an age band; the last one is open."""
    codes: tuple[str, ...]
    """C names."""

    @property
    def bands(self) -> int:
        """Number of age bands."""
        return len(self.initial)

    def band_of_day(self, age_days: np.ndarray) -> np.ndarray:
        """Age band, int64, of whole days since birth; visits take place after noon and before six."""
        firsts = self.first_days(np.arange(1, self.bands))  # [B - 1]
        return np.searchsorted(firsts, age_days, side="right")

    def first_days(self, bands: np.ndarray) -> np.ndarray:
        """Days since birth on which age bands begin, as the ages of events in the afternoon show it."""
        return np.ceil(np.asarray(bands) * self.band_years * YEAR_DAYS - 0.5).astype(np.int64)


def latent_model(code_count: int, seed: int, difficulty: float = 0.5) -> LatentModel:
    """Draw the parameters of a model with 4 conditions in 3 stages, 81 joint ones.

    Args:
        code_count: number of codes.
        seed: equal seeds give equal parameters, whatever the number of subjects.
        difficulty: from 0, where each condition has codes of its own and its stages differ most, to 1,
            where conditions and stages share many codes and more codes are noise.

    Raises:
        InputError: ``difficulty`` is not from 0 to 1, or ``code_count`` is below :data:`LEAST_CODES`.
    """
    if not 0 <= difficulty <= 1:
        raise InputError(f"data.difficulty is {difficulty}: give a number from 0 to 1.")
    if code_count < LEAST_CODES:
        raise InputError(
            f"data.vocabulary_size leaves {code_count} codes to the latent source, which needs "
            f"{LEAST_CODES}: raise it by {LEAST_CODES - code_count} or more."
        )
    rng = np.random.default_rng([seed, _STREAM])
    states = np.array(list(product(range(STAGES), repeat=CONDITIONS)))  # [Z, K]
    initial, transitions = _course(rng, states)
    starts, continues, follows, rows = _topics(states, difficulty)
    emissions, codes = _emissions(rng, code_count, difficulty)
    return LatentModel(
        states=states,
        initial=initial,
        transitions=transitions,
        starts=starts,
        continues=continues,
        follows=follows,
        rows=rows,
        emissions=emissions,
        sizes=np.bincount(VISIT_SIZES)[1:] / len(VISIT_SIZES),
        daily_visit=1 / 90,
        band_years=BAND_YEARS,
        codes=codes,
    )


def code_texts(model: LatentModel) -> dict[str, str]:
    """Code -> text, for every code."""
    condition = ", from a latent condition"
    kinds = {"DX": ("Diagnosis", condition), "RX": ("Treatment", condition), "CARE": ("Routine care", "")}
    numbered = ((number, code, *kinds[code.split("//")[0]]) for number, code in enumerate(model.codes))
    return {code: f"{kind} {number}{origin}" for number, code, kind, origin in numbered}


def _between(ends: tuple[float, float], difficulty: float) -> float:
    return ends[0] + difficulty * (ends[1] - ends[0])


def _course(rng: np.random.Generator, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joint stage at the first visit ``[B, Z]`` and its transitions ``[B, Z, Z]``."""
    ages = BAND_YEARS * (np.arange(AGE_BANDS) + 0.5)  # [B]
    comorbidity = rng.normal(0.5, 0.25, (CONDITIONS, CONDITIONS))
    np.fill_diagonal(comorbidity, 0.0)
    worsening = rng.uniform(0.15, 0.3, CONDITIONS)
    remission = rng.uniform(0.05, 0.15, CONDITIONS)
    present = states > 0  # [Z, K]
    initial = np.ones((AGE_BANDS, len(states)))
    transitions = np.ones((AGE_BANDS, len(states), len(states)))
    for k in range(CONDITIONS):
        reached = 1 / (1 + np.exp((_ONSET_AGES[k] - ages) / _ONSET_WIDTHS[k]))  # [B]
        prevalence = _PREVALENCES[k] * reached
        late = 0.2 + 0.4 * reached
        stage = np.stack([1 - prevalence, prevalence * (1 - late), prevalence * late], axis=1)  # [B, 3]
        initial *= stage[:, states[:, k]]

        # Most onsets are around the typical age; comorbidity raises them at any age.
        rate = 0.01 + 0.3 * _PREVALENCES[k] * reached * (1 - reached)  # [B]
        hazard = np.minimum(rate[:, None] * np.exp(present @ comorbidity[k]), _MOST_HAZARD)  # [B, Z]
        step = np.zeros((AGE_BANDS, len(states), STAGES))
        absent, early, last = (states[:, k] == stage for stage in range(STAGES))
        step[:, absent, 0], step[:, absent, 1] = 1 - hazard[:, absent], hazard[:, absent]
        step[:, early, 1], step[:, early, 2] = 1 - worsening[k], worsening[k]
        step[:, last, 1], step[:, last, 2] = remission[k], 1 - remission[k]
        transitions *= step[:, :, states[:, k]]
    return initial, transitions


def _topics(states: np.ndarray, difficulty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Start, continue and follow probabilities of topics, and the rows they draw from.

    Topics are diagnosis and treatment of each condition in turn, then routine care and noise; rows are
    diagnosis early, diagnosis late, treatment early, treatment late of each, then the same two.
    """
    diagnoses = 2 * np.arange(CONDITIONS)
    treatments, routine, noise = diagnoses + 1, 2 * CONDITIONS, 2 * CONDITIONS + 1
    starts = np.zeros((len(states), noise + 1))
    starts[:, diagnoses] = np.array([0.0, 1.0, 1.3])[states]
    starts[:, treatments] = np.array([0.0, 0.2, 0.5])[states]
    starts[:, routine] = 0.7
    starts /= starts.sum(axis=1, keepdims=True)
    starts[:, noise] = _between(_NOISE, difficulty)
    starts[:, :noise] *= 1 - starts[:, noise:]

    continues = np.zeros(noise + 1)
    continues[diagnoses], continues[treatments] = 0.75, 0.35
    follows = np.eye(noise + 1)
    follows[diagnoses] = follows[treatments]

    rows = np.empty(starts.shape, np.int64)
    late = np.maximum(states - 1, 0)  # where a condition is absent, any row will do
    rows[:, diagnoses] = 4 * np.arange(CONDITIONS) + late
    rows[:, treatments] = 4 * np.arange(CONDITIONS) + 2 + late
    rows[:, routine], rows[:, noise] = 4 * CONDITIONS, 4 * CONDITIONS + 1
    return starts, continues, follows, rows


def _emissions(
    rng: np.random.Generator, code_count: int, difficulty: float
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Frequencies ``[B, R, C]`` and the codes' names."""
    care = code_count // 5
    diagnoses = (code_count - care + 1) // 2
    kinds = np.repeat(["DX", "RX", "CARE"], [diagnoses, code_count - care - diagnoses, care])
    codes = tuple(f"{kind}//L{number:04d}" for number, kind in enumerate(kinds))
    bands = np.zeros((AGE_BANDS, 4 * CONDITIONS + 2, code_count))
    share, flat = _between(_SHARED, difficulty), _between(_FLAT, difficulty)
    for part, kind in enumerate(("DX", "RX")):
        of_kind = rng.permutation(np.flatnonzero(kinds == kind))
        shared, own = np.split(of_kind, [round(share * len(of_kind))])
        for k, pool in enumerate(np.array_split(own, CONDITIONS)):
            stages = np.zeros((2, code_count))
            for stage in stages:
                stage[rng.permutation(pool)] = (1 - share) * _zipf(len(pool))
                stage[rng.permutation(shared)] = share * _zipf(len(shared))
            row = 4 * k + 2 * part
            bands[:, row] = stages[0]
            bands[:, row + 1] = flat * stages[0] + (1 - flat) * stages[1]
    # Each code of routine care has an age at which it is typical.
    pool = np.flatnonzero(kinds == "CARE")
    typical = rng.uniform(0, BAND_YEARS * AGE_BANDS, care)
    ages = BAND_YEARS * (np.arange(AGE_BANDS) + 0.5)
    near = 0.02 + np.exp(-0.5 * ((ages[:, None] - typical) / 12.0) ** 2)  # [B, care]
    weights = near * _zipf(care)[rng.permutation(care)]
    bands[:, -2, pool] = weights / weights.sum(axis=1, keepdims=True)
    bands[:, -1] = _zipf(code_count, 0.7)[rng.permutation(code_count)]
    return bands, codes


def _zipf(count: int, exponent: float = _ZIPF) -> np.ndarray:
    weights = 1 / (np.arange(count) + 1.0) ** exponent
    return weights / weights.sum()


# Histories drawn from the model.


def generate_latent(
    subjects: int,
    code_count: int,
    events_mean: float,
    events_spread: float,
    seed: int,
    difficulty: float = 0.5,
) -> EventSet:
    """Generate histories of codes that depend on latent conditions, on age and on the code before.

    A visit has 1 to 6 codes, 3 on average, which may come again; the next visit follows with a chance of
    1 in 90 on each day. Minutes within a visit ascend in the order in which the codes were drawn.

    Args:
        subjects: number of subjects.
        code_count: number of codes.
        events_mean: mean number of events in a history, births aside; as each has one visit at least, it
            cannot fall below 3.
        events_spread: standard deviation of its logarithm; see `histories.history_lengths`.
        seed: of subjects and of the model's parameters. Equal seeds give equal events.
        difficulty: see `latent_model`.

    Raises:
        InputError: an option is out of its range.
    """
    check_options(subjects, events_mean, events_spread, seed)
    model = latent_model(code_count, seed, difficulty)
    rng = np.random.default_rng(seed)
    histories = draw_latent_histories(rng, model, subjects, events_mean, events_spread)
    states = draw_states(rng, model, histories)
    codes = draw_codes(rng, model, histories, states)
    return to_event_set("latent", histories, codes, code_texts(model))


def draw_latent_histories(
    rng: np.random.Generator, model: LatentModel, subjects: int, mean: float, spread: float
) -> GeneratedHistories:
    """Draw subjects, visits and times; see :func:`generate_latent` for the arguments.

    Visits are never cut short, and their sizes are independent of all else. They begin after noon and end
    before six, so that all events of a visit are in the age band of its day.
    """
    sizes = np.arange(1, len(model.sizes) + 1)
    lengths = history_lengths(rng, subjects, mean, spread)
    subject_visits = np.maximum(np.rint(lengths / (model.sizes @ sizes)), 1).astype(np.int64)
    visit_subjects = np.repeat(np.arange(subjects), subject_visits)
    visit_events = rng.choice(sizes, len(visit_subjects), p=model.sizes)
    births = draw_births(rng, subjects)
    gaps = rng.geometric(model.daily_visit, len(visit_subjects))
    # Ages are float32 later on, at worst four minutes wrong: keep away from noon.
    return lay_out(rng, visit_subjects, visit_events, gaps, births, (12 * 60 + 10, 16 * 60))


def draw_states(rng: np.random.Generator, model: LatentModel, histories: GeneratedHistories) -> np.ndarray:
    """Draw the joint stage at each visit, int64 ``[visits]``."""
    bands = model.band_of_day(histories.visit_age_days)
    uniforms = rng.random(len(bands))
    initial, transitions = cumulative(model.initial), cumulative(model.transitions)
    states = np.empty(len(bands), np.int64)
    rows = histories.first_visits
    ends = np.append(rows[1:], len(bands))
    states[rows] = (uniforms[rows, None] >= initial[bands[rows]]).sum(axis=1)
    while True:
        chosen = rows + 1 < ends
        rows, ends = rows[chosen] + 1, ends[chosen]
        if not len(rows):
            return states
        states[rows] = (uniforms[rows, None] >= transitions[bands[rows], states[rows - 1]]).sum(axis=1)


def draw_codes(
    rng: np.random.Generator, model: LatentModel, histories: GeneratedHistories, states: np.ndarray
) -> np.ndarray:
    """Draw the code of each event, int32 ``[events]``, given the joint stage at each visit."""
    bands = model.band_of_day(histories.visit_age_days)
    starts, follows = cumulative(model.starts), cumulative(model.follows)
    visit_starts = np.cumsum(histories.visit_events) - histories.visit_events
    restart, which, draw = rng.random((3, len(histories.event_places)))
    rows = np.empty(len(draw), np.int64)  # which emissions each event draws from
    visits = np.arange(len(states))
    topics = np.empty(len(states), np.int64)
    for place in range(int(histories.visit_events.max())):
        visits = visits[histories.visit_events[visits] > place]
        events = visit_starts[visits] + place
        drawn = (which[events, None] >= starts[states[visits]]).sum(axis=1)
        if place:
            going_on = restart[events] < model.continues[topics[visits]]
            following = (which[events, None] >= follows[topics[visits]]).sum(axis=1)
            drawn = np.where(going_on, following, drawn)
        topics[visits] = drawn
        rows[events] = model.rows[states[visits], drawn]
    rows += np.repeat(bands, histories.visit_events) * model.emissions.shape[1]
    return _draw_by_row(draw, rows, cumulative(model.emissions.reshape(-1, model.emissions.shape[2])))


def _draw_by_row(uniforms: np.ndarray, rows: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
    """Draw one value for each uniform number from the distribution in its row, int32 ``[n]``."""
    order = np.argsort(rows, kind="stable")
    drawn = np.empty(len(rows), np.int32)
    used, begins = np.unique(rows[order], return_index=True)
    for row, places in zip(used, np.split(order, begins[1:]), strict=True):
        drawn[places] = np.searchsorted(cumulative[row], uniforms[places], side="right")
    return drawn


def cumulative(probabilities: np.ndarray) -> np.ndarray:
    """Cumulative sums over the last axis that end in 1 from the last possible value on."""
    sums = np.cumsum(probabilities, axis=-1)
    return np.where(sums >= sums[..., -1:], 1.0, sums)

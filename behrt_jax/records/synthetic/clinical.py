"""Generated records with something to learn: diseases, their treatment, their course, age and season.

A subject has conditions, drawn by age, sex and the conditions it already has. Each visit has one theme:
a condition that has begun, at the stage the subject has reached in it, or an occasion (acute, seasonal
or routine care). The codes of a visit come from its theme, apart from a share of unspecific codes. So a
masked code can be told from its neighbours, from earlier visits, from age and from the time of year.
"""

import numpy as np

from behrt_jax.data.events import DAY, DEATH_CODE, EventSet
from behrt_jax.errors import InputError
from behrt_jax.records.synthetic import conditions as medicine
from behrt_jax.records.synthetic.histories import (
    VISIT_SIZES,
    YEAR_DAYS,
    GeneratedHistories,
    check_options,
    draw_histories,
    to_event_set,
)

LEAST_CODES = len(medicine.named_codes()) + 8
"""Fewest codes that the generator can work with: the named ones and a few unspecific ones."""

_MOST_CONDITIONS = 6  # of one subject
_CONDITION_SHARE = 0.8  # of the visits of a subject who has a condition
_UNSPECIFIC_SHARE = 0.2  # of the events
_ORDERS = 512  # orders in which a theme's codes are noted, to draw from


def generate_clinical(
    subjects: int, code_count: int, events_mean: float, events_spread: float, seed: int
) -> EventSet:
    """Generate histories of diagnoses, treatments, procedures and laboratory tests.

    Beside its history a subject has a birth, a static ``SEX//F`` or ``SEX//M``, and at times a death
    after its last event; these are not among the declared codes nor in ``events_mean``. No code comes
    twice in a visit.

    Args:
        subjects: Number of subjects.
        code_count: Number of codes; those that the table of conditions does not name are unspecific,
            with frequencies that fall like 1 / rank (Zipf).
        events_mean: Mean number of events in a history.
        events_spread: Standard deviation of its logarithm; see `histories.history_lengths`.
        seed: Equal seeds give equal events.

    Raises:
        InputError: An option is out of its range, or ``code_count`` is below :data:`LEAST_CODES`.
    """
    check_options(subjects, events_mean, events_spread, seed)
    if code_count < LEAST_CODES:
        raise InputError(
            f"data.vocabulary_size leaves {code_count} codes to the clinical source, which needs "
            f"{LEAST_CODES}: raise it by {LEAST_CODES - code_count} or more."
        )
    rng = np.random.default_rng(seed)
    histories = draw_histories(rng, subjects, events_mean, events_spread)
    female = rng.random(subjects) < 0.5
    visit_themes = _draw_themes(rng, histories, female)
    codes = _draw_codes(rng, histories, visit_themes, code_count)
    never = np.full(subjects, np.datetime64("NaT", "us"))
    facts = {
        "SEX//F": (np.flatnonzero(female), never[female]),
        "SEX//M": (np.flatnonzero(~female), never[~female]),
        DEATH_CODE: _draw_deaths(rng, histories),
    }
    texts = medicine.named_codes() | medicine.unspecific_codes(code_count - len(medicine.named_codes()))
    return to_event_set("clinical", histories, codes, texts, facts)


def _draw_conditions(
    rng: np.random.Generator, female: np.ndarray, ages: np.ndarray, spans: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the conditions of each subject and when they began, earliest first.

    Half of them begin while the subject is observed, half in the years before. A subject keeps the
    first six of the table that it draws.

    ``female`` is bool ``[subjects]``; ``ages`` at the first visit and ``spans`` from the first visit to
    the last are years ``[subjects]``.

    Returns:
        Indices into the table, int64 ``[subjects, 6]``, and onsets in years from the first visit,
        float32 ``[subjects, 6]``: infinite where there is no condition.
    """
    subjects = len(ages)
    held = np.zeros(subjects, np.int64)
    conditions = np.zeros((subjects, _MOST_CONDITIONS), np.int64)
    onsets = np.full((subjects, _MOST_CONDITIONS), np.inf, np.float32)
    factors = {condition.name: np.ones(subjects, np.float32) for condition in medicine.CONDITIONS}
    for index, condition in enumerate(medicine.CONDITIONS):
        chance = condition.rate * np.exp(-0.5 * ((ages - condition.age) / condition.width) ** 2)
        chance *= factors.pop(condition.name)
        chance *= np.where(female, "F" in condition.sex, "M" in condition.sex)
        rows = np.flatnonzero(rng.random(subjects, np.float32) < chance)
        rows = rows[held[rows] < _MOST_CONDITIONS]
        before = np.minimum(rng.exponential(3.0, len(rows)), ages[rows])
        during = rng.random(len(rows)) * spans[rows]
        conditions[rows, held[rows]] = index
        onsets[rows, held[rows]] = np.where(rng.random(len(rows)) < 0.5, during, -before)
        held[rows] += 1
        for other, factor in condition.raises:
            factors[other][rows] *= factor
    order = np.argsort(onsets, axis=1)
    return np.take_along_axis(conditions, order, 1), np.take_along_axis(onsets, order, 1)


def _draw_themes(rng: np.random.Generator, histories: GeneratedHistories, female: np.ndarray) -> np.ndarray:
    """Draw the theme of each visit, int64 ``[visits]``: a row of :func:`~.conditions.themes`."""
    subjects = histories.visit_subjects
    visits = len(subjects)
    first_days = histories.visit_days[histories.first_visits]
    years = ((histories.visit_days - first_days[subjects]) / YEAR_DAYS).astype(np.float32)  # [visits]
    first_ages = ((first_days - histories.birth_days) / YEAR_DAYS).astype(np.float32)  # [subjects]
    spans = np.maximum.reduceat(years, histories.first_visits)
    conditions, onsets = _draw_conditions(rng, female, first_ages, spans)

    slots = np.arange(_MOST_CONDITIONS)
    begun = np.zeros(visits, np.int8)
    for slot in slots:
        begun += onsets[subjects, slot] <= years
    # The square root favours the conditions that began last; rounding could reach one too many.
    chosen = np.minimum((begun * np.sqrt(rng.random(visits, np.float32))).astype(np.int8), begun - 1)
    chosen[rng.random(visits, np.float32) >= _CONDITION_SHARE] = -1

    found = np.empty(visits, np.int64)
    for slot in slots:
        rows = np.flatnonzero(chosen == slot)
        owner = subjects[rows]
        # How many visits the subject has spent on the condition: one for each year it had it before.
        spent = np.arange(len(rows)) - np.searchsorted(owner, owner)
        steps = spent + np.maximum(-onsets[owner, slot], 0).astype(np.int64)
        stages = medicine.STAGE_OF_STEP[np.minimum(steps, len(medicine.STAGE_OF_STEP) - 1)]
        found[rows] = medicine.STAGES * conditions[owner, slot] + stages
    rows = np.flatnonzero(chosen < 0)
    owner = subjects[rows]
    occasions = _draw_occasions(
        rng, first_ages[owner] + years[rows], histories.visit_days[rows], female[owner]
    )
    found[rows] = medicine.STAGES * len(medicine.CONDITIONS) + occasions
    return found


def _draw_occasions(
    rng: np.random.Generator, ages: np.ndarray, days: np.ndarray, female: np.ndarray
) -> np.ndarray:
    """Draw an occasion for each visit, int64 ``[visits]``, by age in years, day since 1970 and sex."""
    months = days.view("datetime64[D]").astype("datetime64[M]").astype(np.int64) % 12
    weights = np.empty((2, 12, 120, len(medicine.OCCASIONS)), np.float32)  # sex, month, age, occasion
    for index, occasion in enumerate(medicine.OCCASIONS):
        away = np.arange(1, 13) - (occasion.month or 0)
        season = np.exp(2.5 * (np.cos(2 * np.pi * away / 12) - 1)) if occasion.month else np.ones(12)
        allowed = (np.arange(120) >= occasion.ages[0]) & (np.arange(120) < occasion.ages[1])
        sexes = np.array([sex in occasion.sex for sex in "FM"])
        weights[..., index] = occasion.weight * sexes[:, None, None] * season[:, None] * allowed
    cumulative = np.cumsum(weights, axis=-1)
    rows = cumulative[np.where(female, 0, 1), months, np.minimum(ages, 119).astype(np.int64)]  # [visits, O]
    drawn = rng.random(len(ages))[:, None] * rows[:, -1:]
    return (rows[:, :-1] <= drawn).sum(axis=1)


def _draw_codes(
    rng: np.random.Generator, histories: GeneratedHistories, visit_themes: np.ndarray, code_count: int
) -> np.ndarray:
    """Draw the code of each event, int32 ``[events]``, none twice in a visit."""
    orders = _draw_orders(rng)  # [themes, orders, places]
    rows = visit_themes * _ORDERS + rng.integers(0, _ORDERS, len(visit_themes))  # [visits]
    rows *= orders.shape[-1]
    codes = orders.reshape(-1)[np.repeat(rows, histories.visit_events) + histories.event_places]  # [events]
    unspecific = (codes < 0) | (rng.random(len(codes), np.float32) < _UNSPECIFIC_SHARE)
    redraw = np.flatnonzero(unspecific)
    while len(redraw):
        codes[redraw] = _draw_unspecific(rng, len(redraw), code_count)
        redraw = _repeated(codes, histories.event_places)
    return codes


def _draw_orders(rng: np.random.Generator) -> np.ndarray:
    """Orders in which the codes of each theme are noted, int32 ``[themes, orders, places]``.

    Weighted draws without replacement (Efraimidis and Spirakis 2006, doi 10.1016/j.ipl.2005.11.003) in
    their Gumbel form; -1 where a theme has no code left.
    """
    number = {code: index for index, code in enumerate(medicine.named_codes())}
    places = int(VISIT_SIZES.max())
    orders = np.full((len(medicine.themes()), _ORDERS, places), -1, np.int32)
    for index, theme in enumerate(medicine.themes()):
        codes = np.array([number[medicine.code_of(entry)] for entry in theme], np.int32)
        keys = np.log(list(theme.values())) + rng.gumbel(size=(_ORDERS, len(codes)))
        order = codes[np.argsort(-keys, axis=1)][:, :places]
        orders[index, :, : order.shape[1]] = order
    return orders


def _draw_unspecific(rng: np.random.Generator, events: int, code_count: int) -> np.ndarray:
    """Unspecific codes, int32 ``[events]``, of frequency about 1 / (rank + 10) (Zipf and Mandelbrot)."""
    named = len(medicine.named_codes())
    ranks = 10 * (((code_count - named) / 10 + 1) ** rng.random(events) - 1)
    return (named + ranks).astype(np.int32)


def _repeated(codes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Indices of events whose code came before in the same visit."""
    repeated = np.zeros(len(codes), bool)
    for back in range(1, int(VISIT_SIZES.max())):
        repeated[back:] |= (codes[back:] == codes[:-back]) & (places[back:] >= back)
    return np.flatnonzero(repeated)


def _draw_deaths(rng: np.random.Generator, histories: GeneratedHistories) -> tuple[np.ndarray, np.ndarray]:
    """Subjects who die in the months after their last visit (indices), and when (datetime64[us]).

    The chance rises with the age at the last visit.
    """
    last_visits = np.append(histories.first_visits[1:], len(histories.visit_days)) - 1
    last_days = histories.visit_days[last_visits]  # [subjects]
    ages = (last_days - histories.birth_days) / YEAR_DAYS
    rows = np.flatnonzero(rng.random(len(ages)) < 0.01 + 0.6 / (1 + np.exp((85 - ages) / 5)))
    days = last_days[rows] + 1 + rng.exponential(60, len(rows)).astype(np.int64)
    return rows, (days * DAY).view("datetime64[us]")

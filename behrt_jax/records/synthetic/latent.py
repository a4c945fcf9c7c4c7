"""Generated records whose best possible prediction is known: drawn from a small model of illness.

A subject has conditions, each absent, early or late. Their joint stage changes from visit to visit, by
rates that depend on age and on the other conditions. The codes of a visit are noted one after another:
each has a topic (a condition's diagnosis or treatment, routine care, noise), which follows on from the
topic before it or starts afresh, and the topic with the stage, or the age, decides which codes are likely.
How many visits a subject has, when, and how many codes each has, says nothing about the conditions, so
that :mod:`behrt_jax.evaluation.oracle` can take them as given.

By option, codes depend on covariates too: on the subject's sex, a static fact; on the calendar year, in which
treatments come and go; and on the days since the visit before, which are fewer the more ill a subject is, in
which stages change, and after which other routine care is due.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from behrt_jax.data.events import DAY, EventSet
from behrt_jax.data.splits import hash_shares
from behrt_jax.errors import InputError
from behrt_jax.records.synthetic.histories import (
    FIRST_DAY,
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

COVARIATES = ("sex", "year", "gaps")
SEXES = ("SEX//F", "SEX//M")
"""Codes of the static fact."""
_SEX_ODDS = (3.0, 0.33, 3.0, 0.33)  # of each condition in women over all, and in all over men
_SEX_TILT = 0.6  # standard deviation of the logarithm of a diagnosis' or routine code's frequency in women
_ERA_DAYS = 730
_ERAS = 9  # the last one is open
_TREATMENT_YEARS = 1.5  # how long a treatment is in use, as a standard deviation
_GAP_LIMITS = (30, 90, 240)  # days, of each class of gaps but the last
_GAP_MONTHS = (1, 2, 5, 12)  # how long the course goes on in each class
_LEAST_DAILY_VISIT = 1 / 180  # where no condition is present
_VISITS_OF_ILLNESS = 0.3  # what each step of a condition adds to the logarithm of that
_GAP_CARE = 0.1  # frequency of a routine code at a gap that it is not for, over that at one that it is for


@dataclass(frozen=True, eq=False)
class Covariates:
    """What codes depend on beside age: S sexes, E eras of the calendar, G classes of gaps; 1 where not.

    A setting is a sex, an era and a class of gaps, numbered in this order, the last one fastest.
    """

    seed: int
    """Decides, with a subject's id, about the sex."""
    sexes: int
    era_days: np.ndarray
    """int64 ``[E - 1]``: days since 1970 on which eras begin, the first one aside."""
    gap_limits: np.ndarray
    """int64 ``[G - 1]``: most days of a gap of each class, the last one aside."""
    slots: np.ndarray
    """int64 ``[settings, R]``: where the R rows that topics draw from are in ``LatentModel.emissions``."""
    daily_visits: np.ndarray | None
    """``[Z]``: chance of a visit on each day after one, by the stage at it; None where it is the same."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of :data:`COVARIATES` that codes depend on."""
        return tuple(name for name, size in zip(COVARIATES, self.shape, strict=True) if size > 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sexes, eras and classes of gaps."""
        return self.sexes, len(self.era_days) + 1, len(self.gap_limits) + 1

    def sex_of(self, subject_ids: np.ndarray) -> np.ndarray:
        """Index into :data:`SEXES`, int64, by a hash of the id; 0 where sex does not matter."""
        return (hash_shares(subject_ids, self.seed + _STREAM) * self.sexes).astype(np.int64)

    def era_of(self, days: np.ndarray) -> np.ndarray:
        """Era, int64, of days since 1970."""
        return np.searchsorted(self.era_days, days, side="right")

    def gap_of(self, days: np.ndarray) -> np.ndarray:
        """Class of gaps, int64, of days since the visit before."""
        return np.searchsorted(self.gap_limits, days, side="left")


class VisitIndex(NamedTuple):
    """Rows of a model that hold for some visits, int64 ``[visits]`` each."""

    begins: np.ndarray
    """Of ``LatentModel.initial``, where a history begins with the visit."""
    steps: np.ndarray
    """Of ``LatentModel.transitions``, to the visit from the one before."""
    settings: np.ndarray
    """Of ``LatentModel.slots``."""


@dataclass(frozen=True, eq=False)
class LatentModel:
    """All probabilities, float64: K conditions, Z joint stages, B age bands, T topics, R rows, C codes.

    With covariates, ``initial`` has one row of each sex and band, ``transitions`` one of each sex, class of
    gaps and band (the last one fastest), and ``emissions`` more than the R rows that ``rows`` points to.
    """

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
    covariates: Covariates | None = None

    @property
    def bands(self) -> int:
        """Number of age bands."""
        return len(self.emissions)

    @property
    def slots(self) -> np.ndarray:
        """Where the rows that topics draw from are found in ``emissions``: int64 ``[settings, R]``."""
        if self.covariates is None:
            return np.arange(self.emissions.shape[1])[None]
        return self.covariates.slots

    def index(
        self,
        bands: np.ndarray,
        sexes: np.ndarray | int = 0,
        days: np.ndarray | int = 0,
        gap_days: np.ndarray | int = 0,
    ) -> VisitIndex:
        """Where the probabilities of visits are found.

        Args:
            bands: age bands, int ``[visits]``.
            sexes: index into :data:`SEXES`, int ``[visits]``.
            days: since 1970, int ``[visits]``.
            gap_days: days since the visit before, int ``[visits]``; 0 of a first visit, which is like one
                after the longest of gaps.
        """
        if self.covariates is None:
            return VisitIndex(bands, bands, np.zeros_like(bands))
        gap_days = np.broadcast_to(gap_days, bands.shape)
        classes = self.covariates.shape[2]
        gaps = np.where(gap_days > 0, self.covariates.gap_of(gap_days), classes - 1)
        return self.index_of(bands, sexes, self.covariates.era_of(np.broadcast_to(days, bands.shape)), gaps)

    def index_of(
        self, bands: np.ndarray, sexes: np.ndarray | int, eras: np.ndarray | int, gaps: np.ndarray | int
    ) -> VisitIndex:
        """As :meth:`index`, by era and class of gaps; there are covariates."""
        assert self.covariates is not None
        _, eras_count, classes = self.covariates.shape
        zeros = np.zeros_like(bands)
        return VisitIndex(
            begins=sexes * self.bands + bands,
            steps=(sexes * classes + gaps) * self.bands + bands,
            settings=(sexes * eras_count + eras) * classes + gaps + zeros,
        )

    def band_of_day(self, age_days: np.ndarray) -> np.ndarray:
        """Age band, int64, of whole days since birth; visits take place after noon and before six."""
        firsts = self.first_days(np.arange(1, self.bands))  # [B - 1]
        return np.searchsorted(firsts, age_days, side="right")

    def first_days(self, bands: np.ndarray) -> np.ndarray:
        """Days since birth on which age bands begin, as the ages of events in the afternoon show it."""
        return np.ceil(np.asarray(bands) * self.band_years * YEAR_DAYS - 0.5).astype(np.int64)


def latent_model(
    code_count: int, seed: int, difficulty: float = 0.5, covariates: Sequence[str] = ()
) -> LatentModel:
    """Draw the parameters of a model with 4 conditions in 3 stages, 81 joint ones.

    Args:
        code_count: number of codes.
        seed: equal seeds give equal parameters, whatever the number of subjects.
        difficulty: from 0, where each condition has codes of its own and its stages differ most, to 1,
            where conditions and stages share many codes and more codes are noise.
        covariates: any of sex, year and gaps.

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
    initial, transitions = _course(rng, states, "sex" in covariates, "gaps" in covariates)
    starts, continues, follows, rows = _topics(states, difficulty)
    emissions, codes = _emissions(rng, code_count, difficulty)
    model = LatentModel(
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
    return _with_covariates(model, seed, covariates) if covariates else model


def code_texts(model: LatentModel) -> dict[str, str]:
    """Code -> text, for every code."""
    condition = ", from a latent condition"
    kinds = {"DX": ("Diagnosis", condition), "RX": ("Treatment", condition), "CARE": ("Routine care", "")}
    numbered = ((number, code, *kinds[code.split("//")[0]]) for number, code in enumerate(model.codes))
    return {code: f"{kind} {number}{origin}" for number, code, kind, origin in numbered}


def _between(ends: tuple[float, float], difficulty: float) -> float:
    return ends[0] + difficulty * (ends[1] - ends[0])


def _course(
    rng: np.random.Generator, states: np.ndarray, by_sex: bool, by_gap: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Joint stage at the first visit ``[(S) B, Z]`` and its transitions ``[(S G) B, Z, Z]``."""
    comorbidity = rng.normal(0.5, 0.25, (CONDITIONS, CONDITIONS))
    np.fill_diagonal(comorbidity, 0.0)
    worsening = rng.uniform(0.15, 0.3, CONDITIONS)
    remission = rng.uniform(0.05, 0.15, CONDITIONS)
    odds = np.array(_SEX_ODDS)
    # A visit is a quarter of a year after the one before, on average.
    part, months = (1 / 3, _GAP_MONTHS) if by_gap else (1.0, (1,))
    rates = comorbidity, worsening, remission
    courses = [
        _course_of(states, of_sex, rates, part) for of_sex in ((odds, 1 / odds) if by_sex else (odds**0,))
    ]
    steps = [np.linalg.matrix_power(step, count) for _, step in courses for count in months]
    return np.concatenate([initial for initial, _ in courses]), np.concatenate(steps)


def _course_of(
    states: np.ndarray, odds: np.ndarray, rates: tuple[np.ndarray, np.ndarray, np.ndarray], part: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of one sex: joint stage at the first visit ``[B, Z]`` and its transitions ``[B, Z, Z]``.

    Args:
        states: as the model's.
        odds: of each condition, over those of all, ``[K]``.
        rates: how conditions raise each other ``[K, K]``; chances of getting late, and early again ``[K]``.
        part: of a usual step, 1 for the whole of it.
    """

    def within_part(chance: np.ndarray) -> np.ndarray:
        return chance if part == 1 else 1 - (1 - chance) ** part

    ages = BAND_YEARS * (np.arange(AGE_BANDS) + 0.5)  # [B]
    comorbidity, worsening, remission = rates
    present = states > 0  # [Z, K]
    initial = np.ones((AGE_BANDS, len(states)))
    transitions = np.ones((AGE_BANDS, len(states), len(states)))
    for k in range(CONDITIONS):
        reached = 1 / (1 + np.exp((_ONSET_AGES[k] - ages) / _ONSET_WIDTHS[k]))  # [B]
        most = _PREVALENCES[k] * odds[k] / (1 + _PREVALENCES[k] * (odds[k] - 1))
        prevalence = most * reached
        late = 0.2 + 0.4 * reached
        stage = np.stack([1 - prevalence, prevalence * (1 - late), prevalence * late], axis=1)  # [B, 3]
        initial *= stage[:, states[:, k]]

        # Most onsets are around the typical age; comorbidity raises them at any age.
        rate = 0.01 + 0.3 * most * reached * (1 - reached)  # [B]
        hazard = np.minimum(rate[:, None] * np.exp(present @ comorbidity[k]), _MOST_HAZARD)  # [B, Z]
        hazard, worse, better = map(within_part, (hazard, worsening[k], remission[k]))
        step = np.zeros((AGE_BANDS, len(states), STAGES))
        absent, early, last = (states[:, k] == stage for stage in range(STAGES))
        step[:, absent, 0], step[:, absent, 1] = 1 - hazard[:, absent], hazard[:, absent]
        step[:, early, 1], step[:, early, 2] = 1 - worse, worse
        step[:, last, 1], step[:, last, 2] = better, 1 - better
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


def _with_covariates(model: LatentModel, seed: int, names: Sequence[str]) -> LatentModel:
    """The model with code frequencies that depend on covariates; its course does already."""
    rng = np.random.default_rng([seed, _STREAM, 1])
    kinds = np.array([code.split("//")[0] for code in model.codes])
    tilt = rng.normal(0.0, _SEX_TILT, len(kinds)) * (kinds != "RX")
    typical_era = rng.uniform(-1, _ERAS, len(kinds))
    typical_gap = rng.integers(0, len(_GAP_MONTHS), len(kinds))
    sexes = len(SEXES) if "sex" in names else 1
    eras = _ERAS if "year" in names else 1
    gaps = len(_GAP_MONTHS) if "gaps" in names else 1

    of_sex = np.exp(np.array([tilt, -tilt])) if sexes > 1 else np.ones((1, len(kinds)))
    away = (np.arange(eras)[:, None] - typical_era) * _ERA_DAYS / YEAR_DAYS / _TREATMENT_YEARS
    of_era = 0.01 + np.exp(-0.5 * away**2) if eras > 1 else np.ones((1, len(kinds)))
    meant = (np.arange(gaps)[:, None] == typical_gap) | (gaps == 1)
    of_gap = np.where(meant, 1.0, _GAP_CARE)

    everywhere = np.ones((1, len(kinds)))
    emissions: list[np.ndarray] = []
    slots = np.empty((sexes, eras, gaps, model.emissions.shape[1]), np.int64)
    for row in range(model.emissions.shape[1]):
        care, noise = row == 4 * CONDITIONS, row == 4 * CONDITIONS + 1
        treatment = not (care or noise) and row % 4 >= 2
        factors = (
            everywhere if treatment or noise else of_sex,
            of_era if treatment else everywhere,
            of_gap if care else everywhere,
        )
        counts = [len(values) for values in factors]
        slots[..., row] = len(emissions) + np.arange(np.prod(counts)).reshape(counts)
        for setting in product(*map(range, counts)):
            weights = model.emissions[:, row].copy()  # [B, C]
            for values, index in zip(factors, setting, strict=True):
                weights *= values[index]
            emissions.append(weights / weights.sum(axis=1, keepdims=True))

    illness = model.states.sum(axis=1)  # [Z]
    covariates = Covariates(
        seed=seed,
        sexes=sexes,
        era_days=FIRST_DAY + _ERA_DAYS * np.arange(1, eras),
        gap_limits=np.array(_GAP_LIMITS[: gaps - 1], np.int64),
        slots=slots.reshape(-1, slots.shape[-1]),
        daily_visits=_LEAST_DAILY_VISIT * np.exp(_VISITS_OF_ILLNESS * illness) if gaps > 1 else None,
    )
    return replace(model, emissions=np.stack(emissions, axis=1), covariates=covariates)


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
    covariates: Sequence[str] = (),
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
        covariates: likewise. With sex, each subject has a static fact of :data:`SEXES`; with gaps, visits
            follow the sooner the more ill a subject is.

    Raises:
        InputError: an option is out of its range.
    """
    check_options(subjects, events_mean, events_spread, seed)
    model = latent_model(code_count, seed, difficulty, covariates)
    rng = np.random.default_rng(seed)
    histories = draw_latent_histories(rng, model, subjects, events_mean, events_spread)
    histories, states = draw_course(rng, model, histories)
    codes = draw_codes(rng, model, histories, states)
    facts = None
    if model.covariates is not None and model.covariates.sexes > 1:
        sexes = model.covariates.sex_of(histories.subject_ids)
        never = np.full(subjects, np.datetime64("NaT", "us"))
        rows = [np.flatnonzero(sexes == sex) for sex in range(len(SEXES))]
        facts = {code: (of_sex, never[of_sex]) for code, of_sex in zip(SEXES, rows, strict=True)}
    return to_event_set("latent", histories, codes, code_texts(model), facts)


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


def draw_course(
    rng: np.random.Generator, model: LatentModel, histories: GeneratedHistories
) -> tuple[GeneratedHistories, np.ndarray]:
    """Draw the joint stage at each visit, and the days of visits where they depend on it.

    Returns:
        The histories, with other days in that case, and the stages, int64 ``[visits]``.
    """
    uniforms = rng.random(len(histories.visit_days))
    rates = None if model.covariates is None else model.covariates.daily_visits  # [Z]
    waits = None if rates is None else rng.standard_exponential(len(uniforms))
    days = histories.visit_days.copy()
    births = histories.birth_days[histories.visit_subjects]
    sexes = sexes_of_visits(model, histories)
    initial, transitions = cumulative(model.initial), cumulative(model.transitions)
    states = np.empty(len(days), np.int64)
    rows = histories.first_visits
    ends = np.append(rows[1:], len(days))
    begins = model.index(model.band_of_day(days[rows] - births[rows]), sexes[rows]).begins
    states[rows] = (uniforms[rows, None] >= initial[begins]).sum(axis=1)
    while True:
        chosen = rows + 1 < ends
        rows, ends = rows[chosen] + 1, ends[chosen]
        if not len(rows):
            break
        if rates is not None and waits is not None:  # geometric, as the whole part of an exponential one
            chance = rates[states[rows - 1]]
            days[rows] = days[rows - 1] + 1 + np.floor(waits[rows] / -np.log1p(-chance)).astype(np.int64)
        gaps = days[rows] - days[rows - 1]
        steps = model.index(model.band_of_day(days[rows] - births[rows]), sexes[rows], gap_days=gaps).steps
        states[rows] = (uniforms[rows, None] >= transitions[steps, states[rows - 1]]).sum(axis=1)
    if rates is not None:
        later = np.repeat((days - histories.visit_days) * DAY, histories.visit_events)
        histories = replace(histories, visit_days=days, event_times=histories.event_times + later)
    return histories, states


def sexes_of_visits(model: LatentModel, histories: GeneratedHistories) -> np.ndarray:
    """Index into :data:`SEXES` of each visit's subject, int64 ``[visits]``; 0 where sex does not matter."""
    if model.covariates is None:
        return np.zeros(len(histories.visit_days), np.int64)
    return model.covariates.sex_of(histories.subject_ids)[histories.visit_subjects]


def draw_codes(
    rng: np.random.Generator, model: LatentModel, histories: GeneratedHistories, states: np.ndarray
) -> np.ndarray:
    """Draw the code of each event, int32 ``[events]``, given the joint stage at each visit."""
    bands = model.band_of_day(histories.visit_age_days)
    gaps = np.diff(histories.visit_days, prepend=0)
    gaps[histories.first_visits] = 0
    settings = model.index(
        bands, sexes_of_visits(model, histories), histories.visit_days, gaps
    ).settings  # [visits]
    slots = model.slots
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
        rows[events] = slots[settings[visits], model.rows[states[visits], drawn]]
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

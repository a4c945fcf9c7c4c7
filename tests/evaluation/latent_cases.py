"""Tiny latent models, and their probabilities by enumeration of everything that can happen."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import numpy as np

from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.events import DAY
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import MASK, UNK
from behrt_jax.evaluation.masked_codes import MaskedSplit
from behrt_jax.records.synthetic.histories import FIRST_DAY, LAST_DAY, YEAR_DAYS
from behrt_jax.records.synthetic.latent import Covariates, LatentModel, VisitIndex

FIRST = 5


def tiny_model(seed: int, conditions: int = 2, stages: int = 2, codes: int = 4) -> LatentModel:
    """Random probabilities of 3 topics, 4 rows and 2 age bands of ten days."""
    rng = np.random.default_rng(seed)
    states = np.array(list(product(range(stages), repeat=conditions)))

    def draw(*shape: int) -> np.ndarray:
        return rng.dirichlet(np.full(shape[-1], 0.6), shape[:-1])

    transitions = draw(2, len(states), len(states))
    # A condition that is present stays so.
    possible = ((states[:, None] == 0) | (states[None] > 0)).all(axis=2)
    transitions = np.where(possible, transitions + 0.01, 0.0)
    starts = draw(len(states), 3)
    starts[0, 1] = 0.0
    return LatentModel(
        states=states,
        initial=draw(2, len(states)),
        transitions=transitions / transitions.sum(axis=2, keepdims=True),
        starts=starts / starts.sum(axis=1, keepdims=True),
        continues=rng.uniform(0, 0.9, 3),
        follows=draw(3, 3),
        rows=rng.integers(0, 4, (len(states), 3)),
        emissions=draw(2, 4, codes),
        sizes=draw(3),
        daily_visit=0.3,
        band_years=10 / YEAR_DAYS,
        codes=tuple(f"C{number}" for number in range(codes)),
    )


def with_covariates(model: LatentModel, seed: int) -> LatentModel:
    """The model of two sexes, two eras and two classes of gaps, up to three days and longer."""
    rng = np.random.default_rng(seed)
    bands, states = model.initial.shape

    def several(probabilities: np.ndarray, count: int) -> np.ndarray:
        """As many such ones as that, zeros where the first has some."""
        found = probabilities * rng.uniform(0.2, 1, (count, *probabilities.shape))
        found /= found.sum(axis=-1, keepdims=True)
        return found.reshape(-1, *probabilities.shape[1:])

    codes = model.emissions.shape[2]
    covariates = Covariates(
        seed=seed,
        sexes=2,
        era_days=np.array([FIRST_DAY + 1500]),
        gap_limits=np.array([3]),
        slots=np.array([rng.permutation(9)[:4] for _ in range(8)]),
        daily_visits=rng.uniform(0.1, 0.6, states),
    )
    return replace(
        model,
        initial=several(model.initial, 2),
        transitions=several(model.transitions, 4),
        emissions=rng.dirichlet(np.full(codes, 0.6), (bands, 9)),
        covariates=covariates,
    )


def make_sequences(histories: list[list[tuple[int, list[int]]]], first_day: int = 0) -> Sequences:
    """Sequences of histories given as (age in days, vocabulary ids) by visit, each first on some day."""
    flat = [
        (subject, visit, day, code)
        for subject, history in enumerate(histories)
        for visit, (day, codes) in enumerate(history)
        for code in codes
    ]
    subjects, visits, days, codes = np.array(flat).T
    counts = np.bincount(subjects, minlength=len(histories))
    return Sequences(
        subject_ids=np.arange(len(histories)),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        codes=codes.astype(np.int32),
        ages=((days + 0.6) / YEAR_DAYS).astype(np.float32),
        visits=visits.astype(np.int32),
        times=(first_day + days - np.array([history[0][0] for history in histories])[subjects]) * DAY,
    )


def split_of(sequences: Sequences, shown: list[int], targets: list[int]) -> MaskedSplit:
    """Each subject is one window."""
    windows = np.repeat(np.arange(len(sequences)), sequences.lengths)
    return MaskedSplit(sequences, np.array(shown, np.int32), windows, np.array(targets))


def topic_chance(model: LatentModel, state: int, topics: tuple[int, ...]) -> float:
    """Probability of the topics of a visit."""
    chance = model.starts[state, topics[0]]
    for last, topic in pairwise(topics):
        follow = model.continues[last] * model.follows[last, topic]
        chance *= follow + (1 - model.continues[last]) * model.starts[state, topic]
    return chance


def stage_paths(model: LatentModel, bands: list[int]):
    """Yield every course of joint stages over visits in these age bands, with its probability."""
    for path in product(range(len(model.states)), repeat=len(bands)):
        chance = model.initial[bands[0], path[0]]
        for place in range(1, len(bands)):
            chance *= model.transitions[bands[place], path[place - 1], path[place]]
        yield path, chance


def visit_chance(
    model: LatentModel, state: int, band: int, ways: list[dict[int, float]], setting: int = 0
) -> float:
    """Chance of a visit whose tokens each are seen in some way: code of the model -> weight of seeing it."""
    total = 0.0
    for topics in product(range(3), repeat=len(ways)):
        chance = topic_chance(model, state, topics)
        for topic, way in zip(topics, ways, strict=True):
            emission = model.emissions[band, model.slots[setting, model.rows[state, topic]]]
            chance *= sum(emission[code] * weight for code, weight in way.items())
        total += chance
    return total


def ways_of_seeing(
    shown: int, ids: list[int], masking: MaskingConfig, scored: bool | None
) -> dict[int, float]:
    """Chance of each code of the model to be shown as ``shown``, and to be scored or not.

    Args:
        shown: vocabulary id.
        ids: vocabulary id of each code of the model.
        masking: its probabilities.
        scored: whether the token is known to be scored; None where that is not known.
    """
    names = sum(code >= FIRST for code in ids)
    keep = 1 - masking.mask_share - masking.random_share
    found = {}
    for code, own in enumerate(ids):
        if own == UNK:
            found[code] = float(shown == UNK and not scored)
            continue
        if shown == MASK:
            changed = masking.mask_share
        else:
            changed = keep * (shown == own) + masking.random_share / names * (shown >= FIRST)
        left = (1 - masking.probability) * (shown == own)
        found[code] = masking.probability * changed + (0.0 if scored else left)
    return found


def brute_courses(
    model: LatentModel, days: np.ndarray, first_day: int, unknown: str | None
) -> list[tuple[float, VisitIndex, np.ndarray]]:
    """What an unknown covariate may have been: a chance, rows of the model, and the chance of the gap before
    each visit given the stage before it, ``[visits, Z]``. The subject's id is 0.
    """
    bands, gaps = np.minimum(days // 10, 1), np.diff(days, prepend=days[0])
    covariates = model.covariates
    if covariates is None:
        return [(1.0, model.index(bands), np.ones((len(days), len(model.states))))]
    assert covariates.daily_visits is not None
    rates = covariates.daily_visits
    waits = np.where(gaps[:, None] > 0, rates * (1 - rates) ** (gaps[:, None] - 1), 1.0)
    sex = int(covariates.sex_of(np.array([0]))[0])
    dates = first_day + days - days[0]
    if unknown is None:
        return [(1.0, model.index(bands, sex, dates, gaps), waits)]
    if unknown == "sex":
        return [(0.5, model.index(bands, other, dates, gaps), waits) for other in range(2)]
    if unknown == "year":
        elapsed = days - days[0]
        eras = Counter(
            tuple(covariates.era_of(first + elapsed).tolist()) for first in range(FIRST_DAY, LAST_DAY)
        )
        representatives = covariates.era_days[0] + np.array([-1, 0])
        return [
            (count / (LAST_DAY - FIRST_DAY), model.index(bands, sex, representatives[list(era)], gaps), waits)
            for era, count in eras.items()
        ]
    found = []
    many = np.arange(1, 500)
    geometric = rates * (1 - rates) ** (many[:, None] - 1)  # [days, Z]
    of_class = [geometric[many <= 3].sum(axis=0), geometric[many > 3].sum(axis=0)]
    for classes in product(range(2), repeat=len(days) - 1):
        chances = np.stack([np.ones(len(rates)), *(of_class[number] for number in classes)])
        gaps = np.array([0, *(np.array([1, 9])[list(classes)])])
        found.append((1.0, model.index(bands, sex, dates, gaps), chances))
    return found


def brute_posterior(
    model: LatentModel,
    history: list[tuple[int, list[int]]],
    ids: list[int],
    target: int,
    masking: MaskingConfig,
    first_day: int = 0,
    unknown: str | None = None,
) -> np.ndarray:
    """Posterior ``[codes of the model]`` of one token of a history whose codes are those shown."""
    days = np.array([day for day, _ in history])
    bands = np.minimum(days // 10, 1)
    posterior = np.zeros(len(ids))
    for chance, index, waits in brute_courses(model, days, first_day, unknown):
        for code in range(len(ids)):
            seen = _brute_visits(model, history, ids, target, masking, code, bands, index.settings)
            for path in product(range(len(model.states)), repeat=len(bands)):
                likely = chance * model.initial[index.begins[0], path[0]] * seen[0][path[0]]
                for at in range(1, len(bands)):
                    step = model.transitions[index.steps[at], path[at - 1], path[at]]
                    likely *= waits[at, path[at - 1]] * step * seen[at][path[at]]
                posterior[code] += likely
    return posterior / posterior.sum()


def _brute_visits(
    model: LatentModel,
    history: list[tuple[int, list[int]]],
    ids: list[int],
    target: int,
    masking: MaskingConfig,
    code: int,
    bands: np.ndarray,
    settings: np.ndarray,
) -> list[np.ndarray]:
    """Chance of what is shown of each visit with this code at the target, given the joint stage: ``[Z]``."""
    place, table = 0, []
    for band, setting, (_, codes) in zip(bands, settings, history, strict=True):
        # What may have been done to the visit: a chance, and how its codes are masked then.
        cases = [(1.0, masking)]
        asked = place <= target < place + len(codes)
        if masking.unit == "visit":
            share = masking.probability if any(id >= FIRST or id == MASK for id in codes) else 0.0
            cases = [(share, replace(masking, probability=1.0))]
            cases += [] if asked else [(1 - share, replace(masking, probability=0.0))]
        row = np.zeros(len(model.states))
        for chance, case in cases:
            ways = [ways_of_seeing(shown, ids, case, scored=None) for shown in codes]
            if asked:
                own = ways_of_seeing(codes[target - place], ids, case, scored=True)
                ways[target - place] = {code: own[code]}
            row += chance * np.array([visit_chance(model, z, band, ways, setting) for z in range(len(row))])
        table.append(row)
        place += len(codes)
    return table

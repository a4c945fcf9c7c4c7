"""Tiny latent models, and their probabilities by enumeration of everything that can happen."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np

from behrt_jax.config import MaskingConfig
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import MASK, UNK
from behrt_jax.evaluation.masked_codes import MaskedSplit
from behrt_jax.records.synthetic.histories import YEAR_DAYS
from behrt_jax.records.synthetic.latent import LatentModel

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


def make_sequences(histories: list[list[tuple[int, list[int]]]]) -> Sequences:
    """Sequences of histories given as (age in days, vocabulary ids) by visit."""
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
        times=np.arange(len(flat)),
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


def visit_chance(model: LatentModel, state: int, band: int, ways: list[dict[int, float]]) -> float:
    """Chance of a visit whose tokens each are seen in some way: code of the model -> weight of seeing it."""
    total = 0.0
    for topics in product(range(3), repeat=len(ways)):
        chance = topic_chance(model, state, topics)
        for topic, way in zip(topics, ways, strict=True):
            emission = model.emissions[band, model.rows[state, topic]]
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


def brute_posterior(
    model: LatentModel,
    history: list[tuple[int, list[int]]],
    ids: list[int],
    target: int,
    masking: MaskingConfig,
) -> np.ndarray:
    """Posterior ``[codes of the model]`` of one token of a history whose codes are those shown."""
    bands = [min(day // 10, 1) for day, _ in history]
    posterior = np.zeros(len(ids))
    for code in range(len(ids)):
        place = 0
        table = []
        for band, (_, codes) in zip(bands, history, strict=True):
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
                row += chance * np.array([visit_chance(model, z, band, ways) for z in range(len(row))])
            table.append(row)
            place += len(codes)
        for path, chance in stage_paths(model, bands):
            posterior[code] += chance * np.prod([table[at][state] for at, state in enumerate(path)])
    return posterior / posterior.sum()

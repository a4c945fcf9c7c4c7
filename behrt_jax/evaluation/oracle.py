"""The best possible prediction of masked codes of generated records, by exact inference.

Records of :mod:`behrt_jax.records.synthetic.latent` are a hidden Markov model over the visits (joint stage of
all conditions) with another one inside each visit (topics). Forward and backward messages over both
(Rabiner 1989, Proceedings of the IEEE 77(2), section III) give the probability of each code given
everything else that is shown; no predictor that sees the same tokens can have a lower expected loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from behrt_jax.config.data import DataConfig
from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.vocabulary import CLS, MASK, PAD, SEP, SPECIAL_TOKENS, UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation.masked_codes import MaskedCodeResults, MaskedSplit, losses_and_ranks, results_of
from behrt_jax.evaluation.visit_messages import (
    VisitRuns,
    by_row,
    find_visits,
    pass_over_visits,
    read_backward,
    read_forward,
)
from behrt_jax.records.load import generated_code_count
from behrt_jax.records.synthetic.histories import FIRST_DAY, LAST_DAY
from behrt_jax.records.synthetic.latent import COVARIATES, SEXES, LatentModel, VisitIndex, latent_model

_FIRST = len(SPECIAL_TOKENS)
_CHUNK = 4096  # tokens worked on at once


@dataclass(frozen=True, eq=False)
class Oracle:
    """A model whose parameters are known, for the codes of a vocabulary."""

    model: LatentModel
    emissions: np.ndarray
    """float64 ``[bands, rows, vocabulary]``: as the model's, by vocabulary id; [UNK] has the share of all
    codes without an id."""

    def predict(
        self, split: MaskedSplit, masking: MaskingConfig, unknown: str | None = None
    ) -> MaskedCodeResults:
        """Loss and rank of every masked code under the posterior given all that is shown.

        A code that is shown may be a random one in place of the true one: each, independently, with the
        chance that the masking gives to it; where whole visits are masked, each visit independently. (The
        masking draws a fixed share of each row. What that tells is left out: less than 0.006 nats at the
        default shares, nothing where ``mask_share`` is 1.)

        Args:
            split: whole histories, or their beginnings.
            masking: how the codes of ``split`` were masked.
            unknown: a covariate that is not known, see :func:`outside_without`.

        Raises:
            InputError: a window that begins in the middle of a history.
        """
        losses = np.empty(len(split.targets))
        ranks = np.empty(len(split.targets), np.int64)
        for where, posterior in self.posteriors(split, masking, unknown):
            losses[where], ranks[where] = losses_and_ranks(posterior, split.codes[where])
        return results_of(split, losses, ranks)

    def posteriors(
        self, split: MaskedSplit, masking: MaskingConfig, unknown: str | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places in ``split.targets``, and the probabilities of all codes, ``[n, vocabulary]``."""
        sequences = split.sequences
        seen = np.flatnonzero((split.windows >= 0) & ~np.isin(split.shown, (PAD, CLS, SEP)))
        seen = seen[np.argsort(split.windows[seen], kind="stable")]  # tokens, window by window
        subject_ids = np.repeat(sequences.subject_ids, sequences.lengths)
        windows = split.windows[seen]
        place = np.full(len(split.shown), -1)
        place[seen] = np.arange(len(seen))
        targets = place[split.targets]  # among the seen tokens
        order = np.argsort(targets, kind="stable")
        begins = np.flatnonzero(np.append(True, windows[1:] != windows[:-1]))
        if sequences.visits[seen[begins]].any():
            raise InputError(
                "The optimum is known for histories read from their beginning, but some windows begin later: "
                "raise data.max_length (and model.positions), or give data.window first."
            )
        ends = np.append(begins[1:], len(seen))
        start = 0
        while start < len(begins):
            stop = max(start + 1, int(np.searchsorted(ends, begins[start] + _CHUNK, side="right")))
            tokens = slice(begins[start], ends[stop - 1])
            where = order[np.searchsorted(targets, tokens.start, sorter=order) :]
            where = where[: np.searchsorted(targets[where], tokens.stop)]
            start = stop
            if not len(where):
                continue
            rows = seen[tokens]
            visits = find_visits(
                self.model,
                windows[tokens],
                sequences.visits[rows],
                sequences.ages[rows],
                sequences.times[rows],
                subject_ids[rows],
            )
            chunk = split.shown[rows], targets[where] - tokens.start
            yield where, self._of_chunk(visits, *chunk, masking, unknown)

    def _of_chunk(
        self,
        visits: VisitRuns,
        shown: np.ndarray,
        targets: np.ndarray,
        masking: MaskingConfig,
        unknown: str | None,
    ) -> np.ndarray:
        ways = [visits] if unknown is None else alternatives(self.model, visits, unknown)
        readings = [self._read(way, shown, targets, masking) for way in ways]
        if unknown is None:
            outside = pass_over_visits(self.model, visits, readings[0].of_visits)[0][None]
        else:
            outside = outside_without(self.model, visits, ways, readings, unknown)  # [A, V, Z]
        visit = visits.of_token[targets]
        posterior = np.zeros((len(targets), self.emissions.shape[2]))
        for way, reading, around in zip(ways, readings, outside, strict=True):
            rows = np.einsum("nz,nzr->nr", around[visit], reading.rows)  # [targets, R], but for a factor
            # With its own token, a visit is as likely as its messages say: that is the factor.
            alone = (rows * reading.likelihoods).sum(axis=1)
            whole = (around * reading.of_masked).sum(axis=1)[visit]
            possible = whole > 0
            rows[possible] *= (whole[possible] / alone[possible])[:, None]
            rows[~possible] = 0.0
            spread = np.zeros((len(rows), self.emissions.shape[1]))
            slots = self.model.slots[way.index.settings[visit]]
            np.put_along_axis(spread, slots, rows, axis=1)
            posterior += by_row(spread, visits.bands[visit], self.emissions)
        posterior[:, :_FIRST] = 0.0  # [UNK] is never chosen to be masked
        # What is shown instead of the code is a hint of its own, but for [MASK].
        hinted = np.flatnonzero(shown[targets] != MASK)
        keep_share = max(0.0, 1 - masking.mask_share - masking.random_share)
        seen = posterior[hinted, shown[targets[hinted]]] * keep_share
        posterior[hinted] *= masking.random_share / (posterior.shape[1] - _FIRST)
        posterior[hinted, shown[targets[hinted]]] += seen
        return posterior / posterior.sum(axis=1, keepdims=True)

    def _read(
        self, visits: VisitRuns, shown: np.ndarray, targets: np.ndarray, masking: MaskingConfig
    ) -> "Reading":
        likelihoods = self._likelihoods(visits, shown, masking)  # [tokens, R]
        arriving, of_masked, logarithms = read_forward(self.model, visits, likelihoods)
        joint = arriving[targets] * read_backward(self.model, visits, likelihoods)[targets]  # [n, Z, T]
        model = self.model
        rows = np.zeros((*joint.shape[:2], model.slots.shape[1]))
        for topic in range(joint.shape[2]):
            rows[:, np.arange(len(model.rows)), model.rows[:, topic]] += joint[:, :, topic]
        of_visits, of_logarithms = of_masked, logarithms
        if masking.unit == "visit":
            of_visits, of_logarithms = self._masked_or_not(visits, shown, masking, (of_masked, logarithms))
        of_masked = of_masked * np.exp(logarithms - of_logarithms)[:, None]
        return Reading(rows, likelihoods[targets], of_masked, of_visits, of_logarithms)

    def _likelihoods(self, visits: VisitRuns, shown: np.ndarray, masking: MaskingConfig) -> np.ndarray:
        """Probability of what is shown given the row of emissions, up to a factor by token: ``[tokens, R]``.

        Where visits are masked, it is that of the tokens of a masked one.
        """
        if masking.unit == "visit" and masking.mask_share < 1:
            masked, left = masking.mask_share, max(0.0, 1 - masking.mask_share - masking.random_share)
            random = masking.random_share
        else:  # of visits with [MASK] alone, all codes that are shown are as they were
            replaced = masking.probability * masking.random_share
            masked, random = 1.0, 0.0
            if replaced:
                random = replaced / (1 - masking.probability * masking.mask_share)
            left = 1 - random
        # Only codes in the vocabulary are masked.
        known = 1 - self._chances(visits, np.full(len(shown), UNK))  # [tokens, R]
        likelihoods = self._chances(visits, shown)  # [tokens, R]
        is_code, hidden = shown >= _FIRST, shown == MASK
        any_code = known / (self.emissions.shape[2] - _FIRST)
        likelihoods[is_code] = left * likelihoods[is_code] + random * any_code[is_code]
        likelihoods[hidden] = masked * known[hidden]
        return likelihoods

    def _chances(self, visits: VisitRuns, codes: np.ndarray) -> np.ndarray:
        """Frequency of a code ``[tokens]`` in each row that its topic may draw it from: ``[tokens, R]``."""
        slots = self.model.slots[visits.index.settings[visits.of_token]]  # [tokens, R]
        return self.emissions[visits.bands[visits.of_token][:, None], slots, codes[:, None]]

    def _masked_or_not(
        self,
        visits: VisitRuns,
        shown: np.ndarray,
        masking: MaskingConfig,
        of_masked: tuple[np.ndarray, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each visit given the joint stage, masked or not: ``[V, Z]``, up to a factor by visit, and
        the logarithm of that factor. ``of_masked`` is the same of masked visits.

        A visit with a [MASK] is masked. Another one is with the chance that all its codes are shown unchanged
        or at random, to one who does not know that they are to be predicted.
        """
        masked, logarithms = of_masked
        plain = self._chances(visits, shown)  # [tokens, R]
        plain[shown == MASK] = 1.0  # not used, but as a number
        _, of_plain, plain_logarithms = read_forward(self.model, visits, plain)
        open_ones = np.add.reduceat(shown == MASK, visits.starts) == 0  # [V]
        codes = np.add.reduceat(shown >= _FIRST, visits.starts) > 0  # without any there is nothing to mask
        chance = np.where(codes & (masking.mask_share < 1), masking.probability, 0.0)
        chance[~open_ones] = 1.0
        with np.errstate(divide="ignore"):
            ways = np.stack([np.log(chance) + logarithms, np.log1p(-chance) + plain_logarithms])  # [2, V]
        most = ways.max(axis=0)
        weights = np.exp(ways - most)
        return weights[0, :, None] * masked + weights[1, :, None] * of_plain, most


@dataclass(frozen=True, eq=False)
class Reading:
    """What the tokens of visits say, with one way of reading covariates."""

    rows: np.ndarray
    """``[targets, Z, R]``: the row that a target is drawn from together with the other tokens of its visit,
    given the joint stage, up to a factor by target."""
    likelihoods: np.ndarray
    """``[targets, R]``: what is shown of the target, given the row."""
    of_masked: np.ndarray
    """``[V, Z]``: the tokens of a visit, known to be masked, given the joint stage; up to the factor of
    ``of_visits``."""
    of_visits: np.ndarray
    """``[V, Z]``: likewise, where that is not known."""
    logarithms: np.ndarray
    """``[V]``: logarithm of their factor."""


# A reader who does not know a covariate.


def alternatives(model: LatentModel, visits: VisitRuns, unknown: str) -> list[VisitRuns]:
    """The visits with each value that a covariate can have: sex, year (each era) or gaps (each class)."""
    covariates = model.covariates
    assert covariates is not None
    # Of each visit what is known of it, as indices; the unknown one takes all its values.
    shape = covariates.shape
    known = list(np.unravel_index(visits.index.settings, shape))
    axis = COVARIATES.index(unknown)
    found = []
    for value in range(shape[axis]):
        values = [np.full(len(visits.bands), value) if place == axis else known[place] for place in range(3)]
        found.append(replace(visits, index=model.index_of(visits.bands, *values)))
    return found


def outside_without(
    model: LatentModel, visits: VisitRuns, ways: list[VisitRuns], readings: list[Reading], unknown: str
) -> np.ndarray:
    """Value of an unknown covariate and joint stage at each visit, given all other visits.

    Sex and year are averaged over exactly: each sex is as likely, and so is each day of the first visit in
    the years in which there are first visits, from which on the days between visits are known. Gaps are
    averaged over class by class, given the stage at the visit before. What the age bands and eras of two
    visits tell of the days between them is not used there: this reader is a little worse than the best one
    without gaps, so that the worth of gaps is a little less than the difference to the oracle.

    Args:
        model: the probabilities.
        visits: V of them.
        ways: of :func:`alternatives`.
        readings: of each of them.
        unknown: sex, year or gaps.

    Returns:
        float64 ``[A, V, Z]``, up to a factor by visit.
    """
    if unknown == "gaps":
        return _outside_without_gaps(model, visits, ways, readings)
    of, values, firsts, counts, chances = _courses(model, visits, unknown)
    begins, steps = (
        np.stack([getattr(way.index, name) for way in ways])[values, of] for name in ("begins", "steps")
    )
    index = VisitIndex(begins, steps, np.zeros_like(begins))
    courses = replace(visits, index=index, gap_days=visits.gap_days[of], firsts=firsts, counts=counts)
    likelihoods = np.stack([reading.of_visits for reading in readings])[values, of]
    logarithms = np.stack([reading.logarithms for reading in readings])[values, of]
    around, evidence = pass_over_visits(model, courses, likelihoods)
    total = np.log(chances) + np.add.reduceat(evidence + logarithms, firsts)
    weights = np.repeat(total, counts) - np.log((around * likelihoods).sum(axis=1)) - logarithms
    most = np.full(len(visits.bands), -np.inf)
    np.maximum.at(most, of, weights)
    found = np.zeros((len(ways), *readings[0].of_visits.shape))
    np.add.at(found, (values, of), np.exp(weights - most[of])[:, None] * around)
    # A factor by visit that is the same for all values: each reading has its own.
    own = np.stack([reading.logarithms for reading in readings])
    return found * np.exp(own - own.max(axis=0))[:, :, None]


class _Courses(NamedTuple):
    """The values that an unknown covariate can take in some histories: each history again for each course."""

    of: np.ndarray
    """int64 ``[places]``: visit at each place."""
    values: np.ndarray
    """int64 ``[places]``: value of the covariate there."""
    firsts: np.ndarray
    """int64 ``[courses]``: first place."""
    counts: np.ndarray
    """int64 ``[courses]``: number of places."""
    chances: np.ndarray
    """float64 ``[courses]``."""


def _courses(model: LatentModel, visits: VisitRuns, unknown: str) -> _Courses:
    covariates = model.covariates
    assert covariates is not None
    if unknown == "sex":
        count, sexes = len(visits.bands), np.arange(covariates.sexes)
        firsts = (visits.firsts + count * sexes[:, None]).reshape(-1)
        of = np.tile(np.arange(count), len(sexes))
        counts = np.tile(visits.counts, len(sexes))
        return _Courses(of, np.repeat(sexes, count), firsts, counts, np.full(len(firsts), 1 / len(sexes)))
    of, values, counts, chances = [], [], [], []
    for first, count in zip(visits.firsts, visits.counts, strict=True):
        places = np.arange(first, first + count)
        since = visits.days[places] - visits.days[first]
        # From which days of the first visit on some visit falls into another era.
        changes = (covariates.era_days[:, None] - since).reshape(-1)
        changes = changes[(changes > FIRST_DAY) & (changes < LAST_DAY)]
        begins = np.unique(np.append(changes, FIRST_DAY))
        values.append(covariates.era_of(begins[:, None] + since).reshape(-1))
        of.append(np.tile(places, len(begins)))
        counts.append(np.full(len(begins), count))
        chances.append(np.diff(np.append(begins, LAST_DAY)) / (LAST_DAY - FIRST_DAY))
    counts = np.concatenate(counts)
    firsts = np.cumsum(counts) - counts
    return _Courses(np.concatenate(of), np.concatenate(values), firsts, counts, np.concatenate(chances))


def _outside_without_gaps(
    model: LatentModel, visits: VisitRuns, ways: list[VisitRuns], readings: list[Reading]
) -> np.ndarray:
    covariates = model.covariates
    assert covariates is not None
    assert covariates.daily_visits is not None
    # Chance of each class of gaps, given the stage before: [Z, A].
    limits = np.append(0, covariates.gap_limits)
    longer = (1 - covariates.daily_visits[:, None]) ** limits
    classes = longer - np.append(longer[:, 1:], np.zeros((len(longer), 1)), axis=1)
    own = np.stack([reading.logarithms for reading in readings])  # [A, V]
    factors = np.exp(own - own.max(axis=0))[:, :, None]
    likelihoods = np.stack([reading.of_visits for reading in readings]) * factors  # [A, V, Z]
    before = np.zeros_like(likelihoods)
    for place in range(int(visits.counts.max())):
        rows = visits.firsts[visits.counts > place] + place
        if place == 0:  # known to be a first one
            before[-1, rows] = model.initial[visits.index.begins[rows]]
            continue
        known = (before[:, rows - 1] * likelihoods[:, rows - 1]).sum(axis=0)  # [n, Z]
        known /= known.sum(axis=1, keepdims=True)
        for number, way in enumerate(ways):
            arriving = known * classes[:, number]
            before[number, rows] = by_row(arriving, way.index.steps[rows], model.transitions)
    after = np.ones_like(likelihoods[0])
    for place in range(int(visits.counts.max()) - 2, -1, -1):
        rows = visits.firsts[visits.counts > place + 1] + place
        message = np.zeros((len(rows), after.shape[1]))
        for number, way in enumerate(ways):
            ahead = likelihoods[number, rows + 1] * after[rows + 1]
            back = by_row(ahead, way.index.steps[rows + 1], model.transitions.swapaxes(1, 2))
            message += classes[:, number] * back
        after[rows] = message / message.max(axis=1, keepdims=True)
    return before * after * factors


def make_oracle(model: LatentModel, codes: tuple[str, ...]) -> Oracle:
    """The oracle for records of a model, written in the codes of a vocabulary (special tokens included).

    Raises:
        InputError: a code of the vocabulary is none of the model's.
    """
    ids = {code: row for row, code in enumerate(codes)}
    strange = set(codes[_FIRST:]) - set(model.codes) - set(SEXES)  # static facts are no events
    if strange:
        raise InputError(
            f"The code {min(strange)} of the vocabulary is none of the latent model's: give the "
            "data.vocabulary_size that the records were generated with."
        )
    emissions = np.zeros((*model.emissions.shape[:2], len(codes)))  # none for static facts
    columns = np.array([ids.get(code, UNK) for code in model.codes])
    known = columns != UNK
    emissions[:, :, columns[known]] = model.emissions[:, :, known]
    emissions[:, :, UNK] = model.emissions[:, :, ~known].sum(axis=2)
    return Oracle(model, emissions)


def oracle_of(data: DataConfig, codes: tuple[str, ...]) -> Oracle | None:
    """That for what `records.load.load_sequences` gives with these options; None unless it is ``latent``."""
    if data.source != "latent":
        return None
    return make_oracle(
        latent_model(generated_code_count(data), data.seed, data.difficulty, data.covariates), codes
    )

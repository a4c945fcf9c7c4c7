"""The best possible prediction of masked codes of generated records, by exact inference.

Records of :mod:`behrt_jax.records.synthetic.latent` are a hidden Markov model over the visits (joint stage of
all conditions) with another one inside each visit (topics). Forward and backward messages over both
(Rabiner 1989, Proceedings of the IEEE 77(2), section III) give the probability of each code given
everything else that is shown; no predictor that sees the same tokens can have a lower expected loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from behrt_jax.config import DataConfig, MaskingConfig
from behrt_jax.data.vocabulary import CLS, MASK, PAD, SEP, SPECIAL_TOKENS, UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation.masked_codes import MaskedCodeResults, MaskedSplit, losses_and_ranks, results_of
from behrt_jax.records.load import generated_code_count
from behrt_jax.records.synthetic.histories import YEAR_DAYS
from behrt_jax.records.synthetic.latent import LatentModel, latent_model

_FIRST = len(SPECIAL_TOKENS)
_CHUNK = 4096  # tokens worked on at once

# Messages of a latent model within visits and between them, many visits at a time.


@dataclass(frozen=True, eq=False)
class VisitRuns:
    """The visits of some histories, in order; the tokens of each are a run."""

    of_token: np.ndarray
    """int64 ``[tokens]``: the visit of each token."""
    starts: np.ndarray
    """int64 ``[visits]``: first token."""
    sizes: np.ndarray
    """int64 ``[visits]``: number of tokens."""
    bands: np.ndarray
    """int64 ``[visits]``: age band."""
    days: np.ndarray
    """int64 ``[visits]``: whole days since birth."""
    firsts: np.ndarray
    """int64 ``[histories]``: first visit."""
    counts: np.ndarray
    """int64 ``[histories]``: number of visits."""


def find_visits(model: LatentModel, histories: np.ndarray, visits: np.ndarray, ages: np.ndarray) -> VisitRuns:
    """Group tokens by visit.

    Args:
        model: knows the age bands.
        histories: int ``[tokens]``, which history a token is of; equal ones stand together.
        visits: int ``[tokens]``, ordinal of the visit within its history, ascending.
        ages: years ``[tokens]``.
    """
    new_history = np.append(True, histories[1:] != histories[:-1])
    leads = new_history | np.append(True, visits[1:] != visits[:-1])
    starts = np.flatnonzero(leads)
    firsts = np.flatnonzero(new_history[starts])
    days = np.floor(ages[starts].astype(np.float64) * YEAR_DAYS).astype(np.int64)
    return VisitRuns(
        of_token=np.cumsum(leads) - 1,
        starts=starts,
        sizes=np.diff(np.append(starts, len(leads))),
        bands=model.band_of_day(days),
        days=days,
        firsts=firsts,
        counts=np.diff(np.append(firsts, len(starts))),
    )


def read_forward(
    model: LatentModel, visits: VisitRuns, likelihoods: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the codes of each visit in order.

    Args:
        model: the probabilities, with Z joint stages and T topics.
        visits: V of them.
        likelihoods: ``[tokens, R]``, of each token given the row of emissions.

    Returns:
        ``[tokens, Z, T]``: a token's topic together with the tokens before it in the visit, given the joint
        stage, up to a factor by token; ``[V, Z]``: all tokens of the visit given it, up to a factor by visit;
        and ``[V]``, the logarithm of that factor.
    """
    going_on, fresh = model.continues[:, None] * model.follows, 1 - model.continues  # [T, T], [T]
    arriving = np.empty((len(likelihoods), *model.starts.shape))
    totals = np.empty((len(visits.starts), len(model.starts)))
    logarithms = np.zeros(len(visits.starts))
    filtered = np.empty((0, *model.starts.shape))  # [n, Z, T], of the visits `chosen`
    chosen = np.arange(len(visits.starts))
    arriving[visits.starts] = model.starts
    for place in range(int(visits.sizes.max())):
        rows = visits.starts[chosen] + place
        if place:
            longer = visits.sizes[chosen] > place
            chosen, filtered, rows = chosen[longer], filtered[longer], rows[longer]
            arriving[rows] = filtered @ going_on + (filtered @ fresh)[:, :, None] * model.starts
        filtered = arriving[rows] * likelihoods[rows][:, model.rows]
        total = filtered.sum(axis=2)  # [n, Z]
        # One factor for all stages of a visit keeps the numbers from vanishing and cancels later.
        factor = total.max(axis=1, keepdims=True)
        totals[chosen] = total / factor
        logarithms[chosen] += np.log(factor[:, 0])
        filtered /= factor[:, :, None]
    return arriving, totals, logarithms


def read_backward(model: LatentModel, visits: VisitRuns, likelihoods: np.ndarray) -> np.ndarray:
    """Read the codes of each visit from its end; arguments as of :func:`read_forward`.

    Returns:
        ``[tokens, Z, T]``: the tokens after a token in the visit, given its topic and the joint stage, up
        to a factor by token.
    """
    going_on, fresh = model.continues[:, None] * model.follows, 1 - model.continues  # [T, T], [T]
    rests = np.ones((len(likelihoods), *model.starts.shape))
    for place in range(int(visits.sizes.max()) - 2, -1, -1):
        rows = visits.starts[visits.sizes > place + 1] + place
        ahead = likelihoods[rows + 1][:, model.rows] * rests[rows + 1]  # [n, Z, T]
        anew = (ahead * model.starts).sum(axis=2)  # [n, Z]
        rest = ahead @ going_on.T + anew[:, :, None] * fresh
        rests[rows] = rest / rest.max(axis=(1, 2), keepdims=True)
    return rests


def pass_over_visits(model: LatentModel, visits: VisitRuns, likelihoods: np.ndarray) -> np.ndarray:
    """Joint stage at each visit given all other visits of the history, ``[V, Z]``, up to a factor."""
    before = filter_visits(model, visits, likelihoods)
    after = np.ones_like(before)
    for place in range(int(visits.counts.max()) - 2, -1, -1):
        rows = visits.firsts[visits.counts > place + 1] + place
        ahead = likelihoods[rows + 1] * after[rows + 1]  # [n, Z]
        message = _by_band(ahead, visits.bands[rows + 1], model.transitions.swapaxes(1, 2))
        after[rows] = message / message.max(axis=1, keepdims=True)
    return before * after


def filter_visits(model: LatentModel, visits: VisitRuns, likelihoods: np.ndarray) -> np.ndarray:
    """Joint stage at each visit given the visits before it: float64 ``[V, Z]``, rows sum to 1."""
    before = np.empty_like(likelihoods)
    for place in range(int(visits.counts.max())):
        rows = visits.firsts[visits.counts > place] + place
        if place == 0:
            before[rows] = model.initial[visits.bands[rows]]
            continue
        known = before[rows - 1] * likelihoods[rows - 1]  # [n, Z]
        known /= known.sum(axis=1, keepdims=True)
        before[rows] = _by_band(known, visits.bands[rows], model.transitions)
    return before


def _by_band(values: np.ndarray, bands: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Each row of values ``[n, K]`` times the matrix of its band, of ``[bands, K, L]``: ``[n, L]``."""
    found = np.empty((len(values), matrices.shape[2]))
    for band in np.unique(bands):
        found[bands == band] = values[bands == band] @ matrices[band]
    return found


def rows_of_targets(
    model: LatentModel,
    visits: VisitRuns,
    outside: np.ndarray,
    messages: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray,
) -> np.ndarray:
    """Row of emissions that each target is drawn from, given every token but itself.

    Args:
        model: the probabilities.
        visits: V of them.
        outside: ``[V, Z]``, of :func:`pass_over_visits`.
        messages: ``[tokens, Z, T]`` each, of :func:`read_forward` and :func:`read_backward`.
        targets: int ``[n]``, tokens.

    Returns:
        float64 ``[n, R]``, rows sum to 1.
    """
    arriving, rests = messages
    joint = arriving[targets] * rests[targets]  # [n, Z, T]
    joint *= outside[visits.of_token[targets]][:, :, None]
    to_row = np.zeros((model.rows.size, model.emissions.shape[1]))
    to_row[np.arange(model.rows.size), model.rows.reshape(-1)] = 1.0
    rows = joint.reshape(len(targets), -1) @ to_row
    return rows / rows.sum(axis=1, keepdims=True)


# The oracle, made of these messages.


@dataclass(frozen=True, eq=False)
class Oracle:
    """A model whose parameters are known, for the codes of a vocabulary."""

    model: LatentModel
    emissions: np.ndarray
    """float64 ``[bands, rows, vocabulary]``: as the model's, by vocabulary id; [UNK] has the share of all
    codes without an id."""

    def predict(self, split: MaskedSplit, masking: MaskingConfig) -> MaskedCodeResults:
        """Loss and rank of every masked code under the posterior given all that is shown.

        A code that is shown may be a random one in place of the true one: each, independently, with the
        chance that the masking gives to it; where whole visits are masked, each visit independently. (The
        masking draws a fixed share of each row. What that tells is left out: less than 0.006 nats at the
        default shares, nothing where ``mask_share`` is 1.)

        Args:
            split: whole histories, or their beginnings.
            masking: how the codes of ``split`` were masked.

        Raises:
            InputError: a window that begins in the middle of a history.
        """
        losses = np.empty(len(split.targets))
        ranks = np.empty(len(split.targets), np.int64)
        for where, posterior in self.posteriors(split, masking):
            losses[where], ranks[where] = losses_and_ranks(posterior, split.codes[where])
        return results_of(split, losses, ranks)

    def posteriors(
        self, split: MaskedSplit, masking: MaskingConfig
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places in ``split.targets``, and the probabilities of all codes, ``[n, vocabulary]``."""
        sequences = split.sequences
        seen = np.flatnonzero((split.windows >= 0) & ~np.isin(split.shown, (PAD, CLS, SEP)))
        seen = seen[np.argsort(split.windows[seen], kind="stable")]  # tokens, window by window
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
            visits = find_visits(self.model, windows[tokens], sequences.visits[rows], sequences.ages[rows])
            yield where, self._of_chunk(visits, split.shown[rows], targets[where] - tokens.start, masking)

    def _of_chunk(
        self, visits: VisitRuns, shown: np.ndarray, targets: np.ndarray, masking: MaskingConfig
    ) -> np.ndarray:
        likelihoods = self._likelihoods(visits, shown, masking)  # [tokens, R]
        arriving, of_visits, _ = messages = read_forward(self.model, visits, likelihoods)
        if masking.unit == "visit":
            of_visits = self._masked_or_not(visits, shown, masking, messages)
        rests = read_backward(self.model, visits, likelihoods)
        outside = pass_over_visits(self.model, visits, of_visits)  # [visits, Z]
        rows = rows_of_targets(self.model, visits, outside, (arriving, rests), targets)  # [targets, R]
        posterior = _by_band(rows, visits.bands[visits.of_token[targets]], self.emissions)
        posterior[:, :_FIRST] = 0.0  # [UNK] is never chosen to be masked
        # What is shown instead of the code is a hint of its own, but for [MASK].
        hinted = np.flatnonzero(shown[targets] != MASK)
        keep_share = max(0.0, 1 - masking.mask_share - masking.random_share)
        seen = posterior[hinted, shown[targets[hinted]]] * keep_share
        posterior[hinted] *= masking.random_share / (posterior.shape[1] - _FIRST)
        posterior[hinted, shown[targets[hinted]]] += seen
        return posterior / posterior.sum(axis=1, keepdims=True)

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
        bands = visits.bands[visits.of_token]  # [tokens]
        known = (1 - self.emissions[:, :, UNK])[bands]  # [tokens, R]: only codes in the vocabulary are masked
        likelihoods = self.emissions[bands, :, shown]  # [tokens, R]
        is_code, hidden = shown >= _FIRST, shown == MASK
        any_code = known / (self.emissions.shape[2] - _FIRST)
        likelihoods[is_code] = left * likelihoods[is_code] + random * any_code[is_code]
        likelihoods[hidden] = masked * known[hidden]
        return likelihoods

    def _masked_or_not(
        self,
        visits: VisitRuns,
        shown: np.ndarray,
        masking: MaskingConfig,
        messages: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> np.ndarray:
        """Tokens of each visit given the joint stage, masked or not: ``[V, Z]``, up to a factor by visit.

        A visit with a [MASK] is masked. Another one is with the chance that all its codes are shown unchanged
        or at random, to one who does not know that they are to be predicted.
        """
        _, of_masked, logarithms = messages
        bands = visits.bands[visits.of_token]
        plain = self.emissions[bands, :, shown]  # [tokens, R]
        plain[shown == MASK] = 1.0  # not used, but as a number
        _, of_plain, plain_logarithms = read_forward(self.model, visits, plain)
        open_ones = np.add.reduceat(shown == MASK, visits.starts) == 0  # [V]
        codes = np.add.reduceat(shown >= _FIRST, visits.starts) > 0  # without any there is nothing to mask
        chance = np.where(codes & (masking.mask_share < 1), masking.probability, 0.0)
        with np.errstate(divide="ignore"):
            ways = np.stack([np.log(chance) + logarithms, np.log1p(-chance) + plain_logarithms])  # [2, V]
        weights = np.exp(ways - ways.max(axis=0))
        either = weights[0, :, None] * of_masked + weights[1, :, None] * of_plain
        return np.where(open_ones[:, None], either, of_masked)


def make_oracle(model: LatentModel, codes: tuple[str, ...]) -> Oracle:
    """The oracle for records of a model, written in the codes of a vocabulary (special tokens included).

    Raises:
        InputError: a code of the vocabulary is none of the model's.
    """
    ids = {code: row for row, code in enumerate(codes)}
    strange = set(codes[_FIRST:]) - set(model.codes)
    if strange:
        raise InputError(
            f"The code {min(strange)} of the vocabulary is none of the latent model's: give the "
            "data.vocabulary_size that the records were generated with."
        )
    emissions = np.zeros((*model.emissions.shape[:2], len(codes)))
    columns = np.array([ids.get(code, UNK) for code in model.codes])
    known = columns != UNK
    emissions[:, :, columns[known]] = model.emissions[:, :, known]
    emissions[:, :, UNK] = model.emissions[:, :, ~known].sum(axis=2)
    return Oracle(model, emissions)


def oracle_of(data: DataConfig, codes: tuple[str, ...]) -> Oracle | None:
    """That for what `records.load.load_sequences` gives with these options; None unless it is ``latent``."""
    if data.source != "latent":
        return None
    return make_oracle(latent_model(generated_code_count(data), data.seed, data.difficulty), codes)

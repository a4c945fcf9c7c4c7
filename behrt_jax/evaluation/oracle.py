"""The best possible prediction of masked codes of generated records, by exact inference.

Records of :mod:`behrt_jax.data.synthetic.latent` are a hidden Markov model over the visits (joint stage of
all conditions) with another one inside each visit (topics). Forward and backward messages over both
(Rabiner 1989, Proceedings of the IEEE 77(2), section III) give the probability of each code given
everything else that is shown; no predictor that sees the same tokens can have a lower expected loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from behrt_jax.config import DataConfig, MaskingConfig
from behrt_jax.data.load import generated_code_count
from behrt_jax.data.synthetic.latent_model import LatentModel, latent_model
from behrt_jax.data.vocabulary import CLS, MASK, PAD, SEP, SPECIAL_TOKENS, UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation.latent_visits import (
    Visits,
    find_visits,
    pass_over_visits,
    read_backward,
    read_forward,
    rows_of_targets,
)
from behrt_jax.evaluation.masked_codes import MaskedCodeResults, MaskedSplit, results_of

_FIRST = len(SPECIAL_TOKENS)
_CHUNK = 4096  # tokens worked on at once


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
        chance that the masking gives to it. (The masking draws a fixed share of each row. What that tells
        is left out: less than 0.006 nats at the default shares, nothing where ``mask_share`` is 1.)

        Args:
            split: whole histories, or their beginnings.
            masking: how the codes of ``split`` were masked.

        Raises:
            InputError: a window that begins in the middle of a history.
        """
        losses = np.empty(len(split.targets))
        ranks = np.empty(len(split.targets), np.int64)
        for where, posterior in self._posteriors(split, masking):
            truth = split.codes[where]
            own = posterior[np.arange(len(truth)), truth][:, None]  # [n, 1]
            ahead = (posterior > own) | (
                (posterior == own) & (np.arange(posterior.shape[1]) < truth[:, None])
            )
            with np.errstate(divide="ignore"):
                losses[where] = -np.log(own[:, 0])
            ranks[where] = ahead.sum(axis=1)
        return results_of(split, losses, ranks)

    def posterior(self, split: MaskedSplit, masking: MaskingConfig) -> np.ndarray:
        """Probability of every code at every target, float64 ``[targets, vocabulary]``; see `predict`."""
        found = np.empty((len(split.targets), self.emissions.shape[2]))
        for where, posterior in self._posteriors(split, masking):
            found[where] = posterior
        return found

    def _posteriors(
        self, split: MaskedSplit, masking: MaskingConfig
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places in ``split.targets`` and posteriors ``[n, vocabulary]``, chunk by chunk."""
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
        self, visits: Visits, shown: np.ndarray, targets: np.ndarray, masking: MaskingConfig
    ) -> np.ndarray:
        bands = visits.bands[visits.of_token]  # [tokens]
        likelihoods = self._likelihoods(bands, shown, masking)  # [tokens, R]
        arriving, of_visits = read_forward(self.model, visits, likelihoods)
        rests = read_backward(self.model, visits, likelihoods)
        outside = pass_over_visits(self.model, visits, of_visits)  # [visits, Z]
        rows = rows_of_targets(self.model, visits, outside, (arriving, rests), targets)  # [targets, R]
        posterior = np.empty((len(targets), self.emissions.shape[2]))
        for band in np.unique(bands[targets]):
            chosen = bands[targets] == band
            posterior[chosen] = rows[chosen] @ self.emissions[band]
        posterior[:, :_FIRST] = 0.0  # [UNK] is never chosen to be masked
        # What is shown instead of the code is a hint of its own, but for [MASK].
        hinted = np.flatnonzero(shown[targets] != MASK)
        keep_share = max(0.0, 1 - masking.mask_share - masking.random_share)
        seen = posterior[hinted, shown[targets[hinted]]] * keep_share
        posterior[hinted] *= masking.random_share / (posterior.shape[1] - _FIRST)
        posterior[hinted, shown[targets[hinted]]] += seen
        return posterior / posterior.sum(axis=1, keepdims=True)

    def _likelihoods(self, bands: np.ndarray, shown: np.ndarray, masking: MaskingConfig) -> np.ndarray:
        """Probability of what is shown given the row of emissions, ``[tokens, rows]``."""
        replaced = masking.probability * masking.random_share
        unmasked = 1 - masking.probability * masking.mask_share
        error = replaced / unmasked if replaced else 0.0
        known = 1 - self.emissions[:, :, UNK]  # [B, R]: only codes in the vocabulary are ever masked
        likelihoods = self.emissions[bands, :, shown]  # [tokens, R]
        is_code = shown >= _FIRST
        random = error * known[bands] / (self.emissions.shape[2] - _FIRST)
        likelihoods[is_code] = (1 - error) * likelihoods[is_code] + random[is_code]
        hidden = shown == MASK
        likelihoods[hidden] = known[bands[hidden]]
        return likelihoods


def make_oracle(model: LatentModel, codes: tuple[str, ...]) -> Oracle:
    """The oracle for sequences written in a vocabulary.

    Args:
        model: that the records were drawn from.
        codes: of the vocabulary, special tokens included.

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
    """The oracle for what `data.load.load_sequences` gives; None unless the source is ``latent``.

    Args:
        data: the options that the records were generated with.
        codes: of the vocabulary fitted on them, special tokens included.
    """
    if data.source != "latent":
        return None
    return make_oracle(latent_model(generated_code_count(data), data.seed, data.difficulty), codes)

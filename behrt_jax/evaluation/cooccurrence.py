"""A simple baseline with context: the codes that stand near a masked code, by counts alone."""

import numpy as np

from behrt_jax.data.sequences import Sequences
from behrt_jax.data.windows import ragged_indices
from behrt_jax.evaluation.baselines import Unigram
from behrt_jax.evaluation.masked_codes import MaskedCodeResults, MaskedSplit, results_of

REACH = 8
"""Places to either side of a masked code that count as near."""
_MOST_TOKENS = 1_000_000  # of the train split that are counted
_TUNING_PLACES = 5_000  # masked to choose the share
_CELLS = 4_000_000  # probabilities in memory at once
_SHARES = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])


class Cooccurrence:
    """P(code) = (1 - share) * unigram + share * mean over the codes w near it of P(code | w near).

    P(code | w near) is how often the code stands within :data:`REACH` places of w in the same history
    of the train split. The share is the one with the least loss on every second subject when counts
    come from the others; the final counts come from all.

    Args:
        train: the train split (of a large one, the first million tokens).
        unigram: its code frequencies.
        first_code: lower ids are special tokens, which are no context and get no probability.
    """

    def __init__(self, train: Sequences, unigram: Unigram, first_code: int):
        self.unigram = unigram.probabilities  # [V]
        self.first_code = first_code
        subjects = max(1, int(np.searchsorted(train.offsets, _MOST_TOKENS, side="right")) - 1)
        codes = train.codes[: train.offsets[subjects]]
        owner = np.repeat(np.arange(subjects), train.lengths[:subjects])  # [N]
        even = owner % 2 == 0
        self._count(codes[even], owner[even])
        self.share = self._best_share(codes, owner, np.flatnonzero(~even & (codes >= first_code)))
        self._count(codes, owner)

    def predict(self, split: MaskedSplit) -> MaskedCodeResults:
        """Loss and rank of every masked code, by the codes shown near it in its window."""
        losses = np.empty(len(split.targets))
        ranks = np.empty(len(split.targets), np.int64)
        for start in range(0, len(split.targets), self._at_once):
            part = slice(start, start + self._at_once)
            targets = split.targets[part]
            near = self._near(split.shown, split.windows, targets)
            context = self._mean_conditional(near)  # [chunk, V]
            has_context = context.sum(axis=1, keepdims=True) > 0
            share = np.where(has_context, self.share, 0.0)
            probabilities = (1 - share) * self.unigram + share * context
            codes = split.sequences.codes[targets]
            own = probabilities[np.arange(len(codes)), codes][:, None]
            earlier = np.arange(len(self.unigram)) < codes[:, None]
            ahead = (probabilities > own) | ((probabilities == own) & earlier)
            with np.errstate(divide="ignore"):
                losses[part] = -np.log(own[:, 0])
            ranks[part] = ahead.sum(axis=1)
        return results_of(split, losses, ranks)

    def _count(self, codes: np.ndarray, owner: np.ndarray) -> None:
        """Distinct pairs of near codes with their counts, as rows of a sparse matrix by the first."""
        size = len(self.unigram)
        is_code = codes >= self.first_code
        keys = []
        for step in range(1, REACH + 1):
            both = (owner[step:] == owner[:-step]) & is_code[step:] & is_code[:-step]
            first, second = codes[:-step][both].astype(np.int64), codes[step:][both].astype(np.int64)
            keys += [first * size + second, second * size + first]
        self.pairs, counts = _distinct(np.concatenate(keys), size * size)
        row, self.columns = np.divmod(self.pairs, size)
        self.offsets = np.searchsorted(row, np.arange(size + 1))  # [V + 1]
        totals = np.bincount(row, counts, size)
        self.weights = counts / totals[row]  # P(column | row near)

    def _near(self, shown: np.ndarray, owner: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Codes near each place, int32 ``[places, 2 * REACH]``; -1 where there is none."""
        steps = np.array([step for step in range(-REACH, REACH + 1) if step])
        around = places[:, None] + steps
        inside = (around >= 0) & (around < len(shown))
        around = np.clip(around, 0, len(shown) - 1)
        seen = inside & (owner[around] == owner[places][:, None]) & (shown[around] >= self.first_code)
        return np.where(seen, shown[around], -1)

    def _mean_conditional(self, near: np.ndarray) -> np.ndarray:
        """Mean of P(. | w near) over the codes w near each place, float64 ``[places, V]``."""
        size = len(self.unigram)
        place, context = self._known(near)
        lengths = self.offsets[context + 1] - self.offsets[context]
        entries = ragged_indices(self.offsets[context], lengths)
        cells = np.repeat(place, lengths) * size + self.columns[entries]
        sums = np.bincount(cells, self.weights[entries], len(near) * size).reshape(len(near), size)
        return sums / np.maximum(np.bincount(place, minlength=len(near)), 1)[:, None]

    def _conditional_of(self, near: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """What :meth:`_mean_conditional` says of one code for each place, float64 ``[places]``."""
        if not len(self.pairs):
            return np.zeros(len(near))
        place, context = self._known(near)
        wanted = context.astype(np.int64) * len(self.unigram) + codes[place]
        found = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        weights = np.where(self.pairs[found] == wanted, self.weights[found], 0.0)
        sums = np.bincount(place, weights, len(near))
        return sums / np.maximum(np.bincount(place, minlength=len(near)), 1)

    def _known(self, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place and code of each near code; one that no train code stands near says nothing."""
        place, slot = np.nonzero(near >= 0)
        context = near[place, slot]
        known = self.offsets[context + 1] > self.offsets[context]
        return place[known], context[known]

    def _best_share(self, codes: np.ndarray, owner: np.ndarray, places: np.ndarray) -> float:
        """The share with the least loss at some places; 0 where there are none."""
        places = places[:_TUNING_PLACES]
        if not len(places):
            return 0.0
        near = self._conditional_of(self._near(codes, owner, places), codes[places])
        unigram = self.unigram[codes[places]]
        losses = [-np.log((1 - share) * unigram + share * near).mean() for share in _SHARES]
        return float(_SHARES[int(np.argmin(losses))])

    @property
    def _at_once(self) -> int:
        return max(1, _CELLS // len(self.unigram))


def _distinct(keys: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """As ``np.unique`` with counts, for int64 keys from 0 up to `limit`."""
    if limit > _CELLS:
        return np.unique(keys, return_counts=True)
    counts = np.bincount(keys, minlength=limit)  # a table of all keys is quicker than sorting
    pairs = np.flatnonzero(counts)
    return pairs, counts[pairs]

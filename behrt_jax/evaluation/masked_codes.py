"""Masked codes of a split, one by one: how well a model and baselines that count codes predict them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from behrt_jax.data.sequences import Sequences
from behrt_jax.data.sorting import ragged_indices
from behrt_jax.files import JsonObject
from behrt_jax.models.losses import TOP, mean_metrics

REACH = 8
"""Places to either side of a masked code that count as near."""
_BANDS = ((1, 10), (11, 100), (101, 1_000), (1_001, 10_000), (10_001, None))
"""Ranks by frequency in the train split, both ends included."""
_MOST_TOKENS = 1_000_000  # of the train split that are counted
_TUNING_PLACES = 5_000  # masked to choose the share
_CELLS = 4_000_000  # probabilities in memory at once
_SHARES = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])


@dataclass(frozen=True, eq=False)
class MaskedSplit:
    """A split as the model sees it with codes masked."""

    sequences: Sequences
    shown: np.ndarray
    """int32 ``[tokens]``: what stands in place of each token of ``sequences``; [PAD] where a token is in
    no window and so not seen."""
    windows: np.ndarray
    """int64 ``[tokens]``: number of the window that the token is read in, -1 for none. Tokens of different
    windows do not see each other."""
    targets: np.ndarray
    """int64 ``[targets]``: which tokens are to be predicted, each once."""
    unasked: int = 0
    """Codes that are hidden with their visit, but not to be predicted: too many for the slots of a row."""

    @property
    def codes(self) -> np.ndarray:
        """The codes to predict, int32 ``[targets]``."""
        return self.sequences.codes[self.targets]

    @property
    def subjects(self) -> np.ndarray:
        """Index of each target's subject in ``sequences``, int64 ``[targets]``."""
        return np.searchsorted(self.sequences.offsets, self.targets, side="right") - 1


@dataclass(frozen=True, eq=False)
class MaskedCodeResults:
    """How well some predictor did on each masked code."""

    codes: np.ndarray
    """int32 ``[targets]``."""
    losses: np.ndarray
    """Minus the logarithm of the probability given to the code, nats, float ``[targets]``."""
    ranks: np.ndarray
    """Codes held more likely, int ``[targets]``; 0 is a hit."""
    subjects: np.ndarray
    """Index of the subject, int64 ``[targets]``."""
    guesses: np.ndarray | None = None
    """Of a model: the code held most likely, int32 ``[targets]``."""

    def metrics(self) -> JsonObject:
        """Figures of `losses.mean_metrics`, with the 95 % interval of the loss over subjects."""
        hits = {f"top{k}": float(np.count_nonzero(self.ranks < k)) for k in TOP}
        sums = {"loss": float(np.sum(self.losses, dtype=np.float64)), **hits, "targets": len(self.codes)}
        return {**mean_metrics(sums), "interval": list(mean_interval(self.losses, self.subjects))}


def mean_interval(values: np.ndarray, subjects: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean over masked codes whose subjects, not codes, are independent.

    The mean is a ratio of sums over subjects; its variance is that of the linearised ratio (Cochran 1977,
    Sampling Techniques, section 6.4). NaN for both ends with fewer than two subjects.

    Args:
        values: float ``[targets]``.
        subjects: index of the subject, ``[targets]``.
    """
    index = np.unique(subjects, return_inverse=True)[1]
    count = int(index.max(initial=-1)) + 1
    if count < 2:
        return float("nan"), float("nan")
    values = np.asarray(values, np.float64)
    mean = values.mean()
    deviations = np.bincount(index, values - mean)  # [subjects]
    error = np.sqrt(np.sum(deviations**2) * count / (count - 1)) / len(values)
    return float(mean - 1.96 * error), float(mean + 1.96 * error)


def frequency_bands(
    counts: np.ndarray, first_code: int, results: MaskedCodeResults, unigram: MaskedCodeResults
) -> list[JsonObject]:
    """Loss and accuracy by how frequent the code to predict is in the train split.

    Args:
        counts: train events of each vocabulary row, int64 ``[vocabulary]``.
        first_code: lower ids are special tokens.
        results: of the model.
        unigram: of the unigram baseline on the same masked codes.

    Returns:
        For each band that holds a code: ``band`` (ranks by frequency), ``codes``, ``targets``, ``loss``
        (nats), ``accuracy``, ``accuracy_top10``, ``unigram_loss``, ``unigram_accuracy``; figures are None
        where the band has no target.
    """
    codes = len(counts) - first_code
    rank = np.zeros(len(counts), np.int64)
    rank[first_code + np.argsort(-counts[first_code:], kind="stable")] = np.arange(1, codes + 1)
    rank[:first_code] = len(counts) + 1  # [UNK] as a target, where it is one, is in no band
    figures = {
        "loss": results.losses,
        "accuracy": results.ranks == 0,
        "accuracy_top10": results.ranks < 10,
        "unigram_loss": unigram.losses,
        "unigram_accuracy": unigram.ranks == 0,
    }
    bands = []
    for first, last in _BANDS:
        if first > codes:
            break
        last = codes if last is None else min(last, codes)
        of_band = (rank[results.codes] >= first) & (rank[results.codes] <= last)
        targets = int(np.count_nonzero(of_band))
        band = {"band": f"{first}-{last}", "codes": last - first + 1, "targets": targets}
        means = {name: float(values[of_band].mean()) if targets else None for name, values in figures.items()}
        bands.append({**band, **means})
    return bands


def results_of(
    split: MaskedSplit, losses: np.ndarray, ranks: np.ndarray, guesses: np.ndarray | None = None
) -> MaskedCodeResults:
    """Losses, ranks and guesses ``[targets]``, in the order of ``split.targets``, as results."""
    return MaskedCodeResults(split.codes, losses, ranks, split.subjects, guesses)


def losses_and_ranks(probabilities: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the codes ``[n]`` under probabilities ``[n, vocabulary]``, float64 and int64 ``[n]``; ties go to the
    lower id.
    """
    own = probabilities[np.arange(len(codes)), codes][:, None]  # [n, 1]
    earlier = np.arange(probabilities.shape[1]) < codes[:, None]
    ahead = (probabilities > own) | ((probabilities == own) & earlier)
    with np.errstate(divide="ignore"):
        return -np.log(own[:, 0]), ahead.sum(axis=1)


# A model beside the baselines: what its single masked codes say beside its mean loss.


def assess(
    counts: np.ndarray, first_code: int, baselines: Mapping[str, MaskedCodeResults], model: MaskedCodeResults
) -> JsonObject:
    """Compare a model with the baselines on the very same masked codes; ready for JSON.

    Args:
        counts: train events of each vocabulary row, int64 ``[vocabulary]``.
        first_code: lower ids are special tokens.
        baselines: ``unigram`` at least; ``oracle`` where the optimum is known.
        model: its results on those codes.

    Returns:
        ``interval``: 95 % interval of the model's loss over subjects; ``bands``: see
        :func:`frequency_bands`; ``gaps``: for each baseline the mean of model loss less baseline
        loss (nats) with its 95 % interval, paired code by code, as ``nats``, ``low``, ``high``; and with
        an oracle ``oracle_gap`` (the same) and ``share_of_attainable_gain``, see
        :func:`share_of_attainable_gain`.
    """
    gaps: dict[str, dict[str, float]] = {}
    for name, baseline in baselines.items():
        differences = np.asarray(model.losses, np.float64) - baseline.losses
        low, high = mean_interval(differences, model.subjects)
        gaps[name] = {"nats": float(differences.mean()), "low": low, "high": high}
    found: JsonObject = {
        "interval": list(mean_interval(model.losses, model.subjects)),
        "bands": frequency_bands(counts, first_code, model, baselines["unigram"]),
        "gaps": gaps,
    }
    if "oracle" in baselines:
        losses = [float(np.mean(r.losses)) for r in (model, baselines["unigram"], baselines["oracle"])]
        found["oracle_gap"] = gaps["oracle"]
        found["share_of_attainable_gain"] = share_of_attainable_gain(*losses)
    return found


def share_of_attainable_gain(loss: float, unigram: float, oracle: float) -> float | None:
    """``(unigram - loss) / (unigram - oracle)``: 0 for a model that knows frequencies alone, 1 for the best
    possible one; None where the oracle gains nothing over the unigram.
    """
    return (unigram - loss) / (unigram - oracle) if unigram > oracle else None


# Baselines: every masked code by its frequency in the train split, or by the codes that stand near it.


class Unigram:
    """Code frequencies of the train split as a predictor, each count raised by one.

    Args:
        counts: int64 `[vocabulary]`, how often each code occurs in the train split.
        first_code: id of the first code that can be a target; lower ids (special tokens) get no
            probability.
    """

    def __init__(self, counts: np.ndarray, first_code: int):
        smoothed = counts.astype(np.float64) + 1.0
        smoothed[:first_code] = 0.0
        self.probabilities = smoothed / smoothed.sum()  # [V]
        with np.errstate(divide="ignore"):
            self.losses = -np.log(self.probabilities)  # [V] nats
        self.ranks = np.empty(len(counts), np.int64)  # [V]
        self.ranks[np.argsort(self.losses, kind="stable")] = np.arange(len(counts))

    def predict(self, split: MaskedSplit) -> MaskedCodeResults:
        """Loss and rank of every masked code."""
        return results_of(split, self.losses[split.codes], self.ranks[split.codes])


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
        step = max(1, _CELLS // len(self.unigram))
        for start in range(0, len(split.targets), step):
            part = slice(start, start + step)
            targets = split.targets[part]
            context = self._mean_conditional(self._near(split.shown, split.windows, targets))  # [chunk, V]
            share = np.where(context.sum(axis=1, keepdims=True) > 0, self.share, 0.0)
            probabilities = (1 - share) * self.unigram + share * context
            losses[part], ranks[part] = losses_and_ranks(probabilities, split.sequences.codes[targets])
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


def _distinct(keys: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """As ``np.unique`` with counts, for int64 keys from 0 up to `limit`."""
    if limit > _CELLS:
        return np.unique(keys, return_counts=True)
    counts = np.bincount(keys, minlength=limit)  # a table of all keys is quicker than sorting
    pairs = np.flatnonzero(counts)
    return pairs, counts[pairs]

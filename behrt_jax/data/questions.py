"""Questions about the time after a visit: whether a code comes within a horizon, asked of the history so far.

Prediction times are ends of visits. A question is asked where follow-up (the subject's last event, or death)
reaches the end of its horizon, and nowhere else: were answers kept that are known before, only positive ones
could be. The idea of pretraining on such questions is EveryQuery's (arXiv 2603.07900).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from behrt_jax.config.training import QueriesConfig
from behrt_jax.data import packing
from behrt_jax.data.batches import Batch, Epoch, ExampleBatches, RowShape, rows_of_batch
from behrt_jax.data.events import DAY, SubjectTimes
from behrt_jax.data.examples import code_delays
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.sorting import find_ids, leads, place_in, ragged_indices, run_offsets, runs
from behrt_jax.data.splits import hash_words
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary, matching_codes
from behrt_jax.errors import InputError

FIRST_CODE = len(SPECIAL_TOKENS)
_ROOM = 2.0  # segments that a row has room for, over those of mean length
_TRIALS = 3  # epochs by which the rows of all are estimated
_PIECE_TOKENS = 1 << 22  # looked at together

# When may be asked.


@dataclass(frozen=True, eq=False)
class PredictionTimes:
    """Ends of visits, each with the history that is known then."""

    subjects: np.ndarray
    """Places in the split, int64 ``[n]``, ascending."""
    up_to: np.ndarray
    """One after the last token of the history, int64 ``[n]``."""
    times: np.ndarray
    """int64 ``[n]``, microseconds since 1970."""
    known_until: np.ndarray
    """End of follow-up, int64 ``[n]``."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Why -> ends of visits that cannot be asked about."""

    def __len__(self) -> int:
        return len(self.subjects)

    def take(self, chosen: np.ndarray) -> "PredictionTimes":
        """Some of them, by place or by a bool ``[n]``."""
        names = ("subjects", "up_to", "times", "known_until")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def drawn(self, per_subject: int, rng: np.random.Generator) -> "PredictionTimes":
        """Some of each subject, ``per_subject`` at most, drawn without replacement."""
        order = np.lexsort([rng.random(len(self)), self.subjects])
        firsts = np.flatnonzero(leads([self.subjects]))
        rank = np.arange(len(self)) - np.repeat(firsts, np.diff(np.append(firsts, len(self))))
        return self.take(np.sort(order[rank < per_subject]))

    def windows(self, sequences: Sequences, max_tokens: int) -> packing.Windows:
        """The most recent tokens of each history, beside its static facts where there are any."""
        facts = None if sequences.facts is None else sequences.facts.runs(self.subjects)
        room = packing.room_beside(facts, max_tokens)
        starts = np.maximum(sequences.offsets[self.subjects], self.up_to - room)
        return packing.Windows(starts, (self.up_to - starts).astype(np.int32), facts)


def prediction_times(
    data: SequenceSet, split: str, shortest_days: float, delays: Sequence[str] = ()
) -> PredictionTimes:
    """The ends of visits of a split after which follow-up lasts for the shortest horizon.

    An end at which some code of the history is not known yet (``delays``, see `examples.code_delays`), or
    another event has the same time, is none.

    Raises:
        InputError: there is none.
    """
    part = data.splits[split]
    tokens = np.arange(len(part.codes))
    subject = np.repeat(np.arange(len(part)), part.lengths)
    last_of_visit = np.zeros(int(part.visits_per_subject.sum()), np.int64)
    last_of_visit[part.numbered_visits()] = tokens  # the last one stays: others may interrupt a visit
    ends = np.zeros(len(tokens), bool)
    ends[last_of_visit] = True
    again = ends.copy()
    again[part.offsets[1:] - 1] = False
    again[:-1] &= part.times[1:] <= part.times[:-1]
    left_out = {"another event at the same time": int(again.sum())}
    ends &= ~again
    hidden = code_delays(data.vocabulary, delays)
    if hidden.delayed.any():
        known_at = hidden.known_at(part, np.arange(len(part)))
        # The latest so far, of each subject alone: ranks ascend from subject to subject.
        rank = np.unique(np.concatenate([known_at, part.times]), return_inverse=True)[1]
        known, now = rank[: len(tokens)], rank[len(tokens) :]
        latest = np.maximum.accumulate(subject * (rank.max(initial=0) + 1) + known)
        early = ends & (latest > subject * (rank.max(initial=0) + 1) + now)
        left_out["a code of the history is not known yet"] = int(early.sum())
        ends &= ~early
    until = known_until(part, data.deaths[split])
    short = ends & (until[subject] < part.times + int(shortest_days * DAY))
    left_out["follow-up ends before the shortest horizon does"] = int(short.sum())
    chosen = np.flatnonzero(ends & ~short)
    if not len(chosen):
        why = ", ".join(f"{reason}: {count:,}" for reason, count in left_out.items() if count)
        raise InputError(
            f"queries: no visit of the {split} split ends with anything to ask ({why or 'no visit'}): give "
            "a shorter horizon in queries.horizon_days, or data with a longer follow-up."
        )
    subjects = subject[chosen]
    found = {why: count for why, count in left_out.items() if count}
    return PredictionTimes(subjects, chosen + 1, part.times[chosen], until[subjects], found)


def known_until(part: Sequences, deaths: SubjectTimes) -> np.ndarray:
    """End of each subject's follow-up, its last event or its death: int64 ``[subjects]``."""
    until = part.times[part.offsets[1:] - 1]
    place = find_ids(deaths.subject_ids, part.subject_ids)
    died = place >= 0
    until[died] = np.maximum(until[died], deaths.times[place[died]])
    return until


# What is asked, and how often.


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The codes and groups of codes that are asked of, by id: those of the vocabulary, then the groups."""

    shares: np.ndarray
    """float64 ``[ids]``: how often each is asked of, 1 in all; 0 for special tokens and codes left out."""
    groups: np.ndarray
    """bool ``[groups, vocabulary]``: the codes of each group."""

    @property
    def codes(self) -> int:
        """Rows of the vocabulary."""
        return self.groups.shape[1]

    @cached_property
    def cumulative(self) -> np.ndarray:
        """Sums of the shares up to each id, float64 ``[ids]``, that end in 1 from the last id asked of on."""
        sums = np.cumsum(self.shares)
        return np.where(sums >= sums[-1], 1.0, sums)

    @classmethod
    def of(cls, vocabulary: Vocabulary, config: QueriesConfig) -> "Catalogue":
        """Shares by the frequency of codes in the train split.

        Raises:
            InputError: a pattern matches nothing, or there is no code to ask of; none of a group comes in the
                train split, as no static fact does.
        """
        asked = np.arange(len(vocabulary)) >= FIRST_CODE
        if config.codes:
            asked = matching_some(vocabulary, config.codes, "queries.codes")
        asked &= vocabulary.counts > 0
        if not asked.any():
            raise InputError("queries.codes: none of the codes that it matches occurs in the train split.")
        groups = [matching_some(vocabulary, (pattern,), "queries.groups") for pattern in config.groups]
        for pattern, members in zip(config.groups, groups, strict=True):
            if not vocabulary.counts[members].any():
                raise InputError(
                    f"queries.groups: no code that {pattern!r} matches occurs in the train split (static "
                    "facts never do): leave it out, or give a pattern of events."
                )
        counts = np.maximum(vocabulary.counts, 1).astype(np.float64)
        shares = np.where(asked, counts**config.frequency_power, 0.0)
        of_groups = config.group_share if groups else 0.0
        shares *= (1 - of_groups) / shares.sum()
        shares = np.append(shares, np.full(len(groups), of_groups / max(len(groups), 1)))
        return cls(shares, np.array(groups, bool).reshape(len(groups), len(vocabulary)))


def matching_some(vocabulary: Vocabulary, patterns: tuple[str, ...], option: str) -> np.ndarray:
    """The codes that one of the patterns matches, special tokens aside, bool ``[V]``; each must match one."""
    found = np.zeros(len(vocabulary), bool)
    for pattern in patterns:
        own = matching_codes(vocabulary, (pattern,), option)
        if not own.any():
            raise InputError(
                f"{option}: {pattern!r} matches no code of the vocabulary: codes look like "
                f"{', '.join(vocabulary.codes[FIRST_CODE : FIRST_CODE + 3])}."
            )
        found |= own
    return found


class Questions(NamedTuple):
    """Questions at prediction times; ``[..., questions]``."""

    codes: np.ndarray
    """Ids of a :class:`Catalogue`, int32."""
    horizons: np.ndarray
    """Days, float32."""
    answers: np.ndarray
    """1 where it comes within the horizon, else 0, float32."""
    weights: np.ndarray
    """Share of the question among all over the share with which it was drawn, float32: mean weighted losses
    are those of questions drawn by the catalogue alone. 0 where there is none."""


@dataclass(frozen=True, eq=False)
class Occurrences:
    """The tokens of each code and group, for counting them in stretches of a history."""

    keys: np.ndarray
    """``id * tokens + place``, int64, ascending."""
    tokens: int

    @classmethod
    def of(cls, codes: np.ndarray, groups: np.ndarray) -> "Occurrences":
        """Of codes int32 ``[tokens]`` and groups bool ``[groups, vocabulary]``."""
        places = [np.flatnonzero(codes >= FIRST_CODE)]
        ids = [codes[places[0]].astype(np.int64)]
        for number, members in enumerate(groups):
            places.append(np.flatnonzero(members[codes]))
            ids.append(np.full(len(places[-1]), groups.shape[1] + number))
        return cls(np.sort(np.concatenate(ids) * len(codes) + np.concatenate(places)), len(codes))

    def count(self, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Tokens of each id from ``starts`` up to, but not, ``stops``; all int64 of one shape."""
        first = ids.astype(np.int64) * self.tokens
        return np.searchsorted(self.keys, first + stops) - np.searchsorted(self.keys, first + starts)


def uniforms(seed: int, epoch: int, examples: np.ndarray, draws: int) -> np.ndarray:
    """Numbers from 0 to 1, float64 ``[examples, draws]``, a function of seed, epoch and example alone.

    By SplitMix64's finaliser, as `splits.hash_words`.
    """
    stream = hash_words(hash_words(np.array([seed], np.int64)).view(np.int64) ^ np.int64(epoch))
    own = hash_words(examples.astype(np.int64) ^ stream.view(np.int64))  # [n]
    words = hash_words(own.view(np.int64)[:, None] + np.arange(draws, dtype=np.int64))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, eq=False)
class QuestionSampler:
    """Draws questions at prediction times of a split, and looks up their answers."""

    sequences: Sequences
    catalogue: Catalogue
    occurrences: Occurrences
    asked: np.ndarray
    """Places of the tokens whose codes are asked of, int64, ascending."""
    asked_before: np.ndarray
    """How many of them there are before each token, int64 ``[tokens + 1]``."""
    horizons: np.ndarray
    """Days, float64 ``[horizons]``, ascending."""
    positive_share: float
    questions: int

    @classmethod
    def of(cls, sequences: Sequences, catalogue: Catalogue, config: QueriesConfig) -> "QuestionSampler":
        """Of a split, with the settings of a run."""
        asked = catalogue.shares[sequences.codes] > 0
        return cls(
            sequences,
            catalogue,
            Occurrences.of(sequences.codes, catalogue.groups),
            asked=np.flatnonzero(asked),
            asked_before=run_offsets(asked),
            horizons=np.unique(np.asarray(config.horizon_days, np.float64)),
            positive_share=config.positive_share,
            questions=config.questions,
        )

    def draw(self, times: PredictionTimes, uniform: np.ndarray) -> Questions:
        """Questions at some times, ``[n, questions]`` each.

        A horizon is drawn evenly of those that follow-up reaches. With `positive_share` the code is that of a
        token drawn from the stretch up to its end, otherwise (and where that has no code) one by the shares
        of the catalogue.

        Args:
            times: n of them, each known up to the shortest horizon.
            uniform: float64 ``[n, 4 * questions]``, see :func:`uniforms`.
        """
        of_horizon, of_kind, of_code, of_token = np.split(uniform, 4, axis=1)  # [n, Q]
        stops = self.stops(times)  # [n, H]
        reached = self.known(times).sum(axis=1)  # [n]
        chosen = (of_horizon * reached[:, None]).astype(np.int64)  # [n, Q]
        stop = np.take_along_axis(stops, chosen, axis=1)
        start = np.broadcast_to(times.up_to[:, None], stop.shape)

        ahead = self.asked_before[stop] - self.asked_before[start]  # [n, Q]
        positive = (of_kind < self.positive_share) & (ahead > 0)
        at = self.asked_before[start] + (of_token * ahead).astype(np.int64)
        codes = np.searchsorted(self.catalogue.cumulative, of_code, side="right")
        codes[positive] = self.sequences.codes[self.asked[at[positive]]]

        found = self.occurrences.count(codes, start, stop)  # [n, Q]
        share = self.catalogue.shares[codes]
        of_tokens = np.where(codes < self.catalogue.codes, found / np.maximum(ahead, 1), 0.0)
        drawn = (1 - self.positive_share) * share + self.positive_share * of_tokens
        drawn = np.where(ahead > 0, drawn, share)
        return Questions(
            codes.astype(np.int32),
            self.horizons[chosen].astype(np.float32),
            (found > 0).astype(np.float32),
            (share / drawn).astype(np.float32),
        )

    def stops(self, times: PredictionTimes) -> np.ndarray:
        """One after the last token within each horizon of each prediction time: int64 ``[n, horizons]``."""
        n, count = len(times), len(self.horizons)
        starts = np.repeat(times.up_to, count)
        stops = np.repeat(self.sequences.offsets[times.subjects + 1], count)
        ends = self._ends(times).reshape(-1)
        return place_in(self.sequences.times, starts, stops, ends, inclusive=True).reshape(n, count)

    def known(self, times: PredictionTimes) -> np.ndarray:
        """Which horizons follow-up reaches, at each prediction time: bool ``[n, horizons]``."""
        return times.known_until[:, None] >= self._ends(times)

    def _ends(self, times: PredictionTimes) -> np.ndarray:
        return times.times[:, None] + (self.horizons * DAY).astype(np.int64)[None]


def prevalences(sampler: QuestionSampler, times: PredictionTimes) -> np.ndarray:
    """How often each code or group comes within each horizon, float64 ``[ids, horizons]``.

    Of the prediction times that are followed up so long; with half a time with, and half a time without it
    added.
    """
    catalogue, codes = sampler.catalogue, sampler.sequences.codes
    stops, reached = sampler.stops(times), sampler.known(times)
    found = np.zeros((len(catalogue.shares), len(sampler.horizons)))
    for h in range(len(sampler.horizons)):
        known = np.flatnonzero(reached[:, h])
        lengths = stops[known, h] - times.up_to[known]
        for begin, end in runs(np.cumsum(lengths) // _PIECE_TOKENS):
            own = slice(begin, end)
            ahead = codes[ragged_indices(times.up_to[known[own]], lengths[own])]
            example = np.repeat(np.arange(end - begin), lengths[own])
            of_groups = [len(np.unique(example[members[ahead]])) for members in catalogue.groups]
            found[:, h] += np.append(_examples_with(example, ahead, catalogue.codes), of_groups)
    return (found + 0.5) / (reached.sum(axis=0) + 1.0)


def _examples_with(example: np.ndarray, codes: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """Examples in which each code occurs, int64 ``[vocabulary]``; example and code of each token given."""
    pairs = np.unique(example * vocabulary_size + codes)
    return np.bincount(pairs % vocabulary_size, minlength=vocabulary_size)


# Batches of histories up to prediction times, with questions at each.


class QuestionBatch(NamedTuple):
    """Packed rows, each segment of which is the history up to a prediction time."""

    rows: Batch
    examples: np.ndarray
    """Number of the prediction time of each segment, -1 for none, int32 ``[rows, segments]``."""
    questions: Questions
    """``[rows, segments, questions]``, of weight 0 where there is no segment."""

    @property
    def segment_ids(self) -> np.ndarray:
        """Of the rows, int32 ``[rows, length]``."""
        return self.rows.segment_ids


@dataclass(frozen=True, eq=False)
class QuestionEpoch(Epoch):
    """The rows of an epoch, and the prediction times whose histories are in them, by number."""

    times: PredictionTimes


@dataclass(frozen=True, eq=False, kw_only=True)
class QuestionBatches(ExampleBatches):
    """Batches of questions; made by :func:`question_batches`. Each epoch draws prediction times anew.

    How many rows their histories fill differs a little from epoch to epoch: of more than `rows`, some are
    left out of an epoch, at random, and of fewer, some are shown twice.
    """

    sampler: QuestionSampler
    times: PredictionTimes
    """All that may be drawn."""
    per_subject: int
    histories: int
    """Prediction times of an epoch."""
    tokens_per_epoch: int
    """Tokens of an epoch without padding, [CLS] and facts included; on average."""
    maskable_per_epoch: int
    """Codes of an epoch that can be masked, special tokens and facts left out; on average."""
    seed: int
    endless: bool = True
    """Other prediction times and questions in each epoch."""

    @property
    def examples(self) -> PredictionTimes:
        """The prediction times of the first epoch, by number."""
        return self._epoch(0).times

    @property
    def windows_per_step(self) -> float:
        """Histories of a batch, on average."""
        return self.histories / self.steps_per_epoch

    @property
    def fill(self) -> float:
        """Share of tokens that are not padding, in all batches of an epoch, empty rows included."""
        return self.tokens_per_epoch / (self.steps_per_epoch * self.batch_rows * self.row_length)

    def batch(self, step: int, places: np.ndarray | None = None) -> QuestionBatch:
        """Gather the batch of a step, or some of its rows, and draw their questions: see
        :meth:`RowBatches.batch`.
        """
        number, _ = self._find(step)
        examples = self.examples_of(step, places)  # [B, S]
        filled = examples >= 0
        drawn = self._questions(number, examples[filled], self._epoch(number).times)
        questions = Questions(*(_scattered(values, filled) for values in drawn))
        return QuestionBatch(self._gather(step, places), examples, questions)

    def all_questions(self) -> Questions:
        """The questions at each of `examples`, ``[n, questions]``."""
        return self._questions(0, np.arange(len(self.examples)), self.examples)

    def _questions(self, epoch: int, examples: np.ndarray, times: PredictionTimes) -> Questions:
        uniform = uniforms(self.seed, epoch, examples, 4 * self.sampler.questions)
        return self.sampler.draw(times.take(examples), uniform)

    def _find(self, step: int) -> tuple[int, int]:
        number, index = super()._find(step)
        return (number if self.endless else 0), index

    def _epoch(self, epoch: int) -> QuestionEpoch:
        found = super()._epoch(epoch)
        assert isinstance(found, QuestionEpoch)
        return found

    def _draw(self, epoch: int) -> QuestionEpoch:
        rng = np.random.default_rng((self.seed, epoch))
        asked = self.times.drawn(self.per_subject, rng)
        windows = asked.windows(self.sequences, self.row_length - self.cls_token)
        plan = _plan(windows, self.shape, self.segments, rng)
        return QuestionEpoch(windows, plan, np.arange(self.rows) % len(plan), asked)


def _scattered(values: np.ndarray, filled: np.ndarray) -> np.ndarray:
    found = np.zeros((*filled.shape, values.shape[1]), values.dtype)
    found[filled] = values
    return found


def _plan(
    windows: packing.Windows, shape: RowShape, segments: int, rng: np.random.Generator
) -> packing.RowPlan:
    """Rows of at most so many segments: short ones count as long as their share of a row."""
    if not shape.packed:
        return packing.one_per_row(len(windows), rng)
    lengths = np.maximum(windows.segment_lengths(shape.cls_token), -(-shape.row_length // segments))
    return packing.plan_rows(lengths, shape.row_length, rng)


def question_batches(
    data: SequenceSet,
    split: str,
    catalogue: Catalogue,
    config: QueriesConfig,
    shape: RowShape,
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    seed: int = 0,
    endless: bool = True,
) -> QuestionBatches:
    """Arrange batches of questions about the subjects of a split.

    Args:
        data: opened with the separators of the model.
        split: whose subjects.
        catalogue: what is asked of.
        config: times, questions and horizons.
        shape: of the rows.
        batch_size: histories a batch, on average.
        batch_tokens: tokens a batch (padding included), in place of ``batch_size``.
        seed: with the step, decides all of a batch.
        endless: draw prediction times anew in each epoch; otherwise all batches are those of the first.

    Raises:
        InputError: a prediction time is nowhere to be found.
    """
    sequences = data.splits[split]
    delays = data.preparation.delays if data.preparation else ()
    times = prediction_times(data, split, min(config.horizon_days), delays)
    room = shape.row_length - shape.cls_token
    mean = float(times.windows(sequences, room).segment_lengths(shape.cls_token).mean())
    segments = max(1, round(_ROOM * shape.row_length / mean)) if shape.packed else 1
    found, maskable = [], run_offsets(sequences.codes >= FIRST_CODE)
    for epoch in range(_TRIALS if endless else 1):
        rng = np.random.default_rng((seed, epoch))
        windows = times.drawn(config.times, rng).windows(sequences, room)
        tokens = int(windows.segment_lengths(shape.cls_token).sum(dtype=np.int64))
        rows = len(_plan(windows, shape, segments, rng))
        codes = int((maskable[windows.starts + windows.lengths] - maskable[windows.starts]).sum())
        found.append((rows, len(windows), tokens, codes))
    count, histories, tokens, codes = np.rint(np.mean(found, axis=0)).astype(int).tolist()
    if batch_tokens is None:
        rows_per_batch = rows_of_batch(count, histories, batch_size)
    else:
        rows_per_batch = min(count, max(1, round(batch_tokens / shape.row_length)))
    return QuestionBatches(
        sequences=sequences,
        shape=shape,
        rows=count,
        rows_per_batch=rows_per_batch,
        sampler=QuestionSampler.of(sequences, catalogue, config),
        times=times,
        per_subject=config.times,
        segments=segments,
        histories=histories,
        tokens_per_epoch=tokens,
        maskable_per_epoch=codes,
        seed=seed,
        endless=endless,
    )

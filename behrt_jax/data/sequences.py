"""Sequences of tokens, one per subject: what is stored, packed and trained on."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from behrt_jax.config.data import STATIC_CODES, DataConfig
from behrt_jax.data.event_rules import (
    CodeChoice,
    Preparation,
    Selected,
    matches,
    select_events,
    selects,
    told_without_effect,
)
from behrt_jax.data.events import DAY, SPLITS, YEAR, EventCounts, EventSet, SubjectTimes, event_columns
from behrt_jax.data.facts import CodedFacts, FactTable, StaticFacts, fact_rows, subject_facts
from behrt_jax.data.lives import LifeRules
from behrt_jax.data.sorting import leads, run_offsets
from behrt_jax.data.splits import check_disjoint, hash_splits, split_index, told_split
from behrt_jax.data.vocabulary import SEP, SPECIAL_TOKENS, UNK, Vocabulary, fit_vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject

MEDS_CODES = ("DIAGNOSIS//", "PROCEDURE//", "MEDICATION//")
"""Patterns for MEDS data where ``data.codes`` gives none."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """The tokens of many subjects, end to end."""

    subject_ids: np.ndarray
    """int64 ``[subjects]``, ascending."""
    offsets: np.ndarray
    """int64 ``[subjects + 1]``: subject i has the tokens from ``offsets[i]`` to ``offsets[i + 1]``."""
    codes: np.ndarray
    """int32 ``[tokens]``, vocabulary ids."""
    ages: np.ndarray
    """float32 ``[tokens]``, years of 365.25 days from birth to the event; NaN where no birth is known."""
    visits: np.ndarray
    """int32 ``[tokens]``, visit ordinal from 0 for each subject."""
    times: np.ndarray
    """int64 ``[tokens]``, microseconds since 1970, ascending within a subject."""
    facts: StaticFacts | None = None
    """Static facts of each subject, where a model is to read them."""

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each subject, int64 ``[subjects]``."""
        return np.diff(self.offsets)

    def births(self, subjects: np.ndarray) -> np.ndarray:
        """Births of some subjects, by the age at their first event: float64 ``[n]`` microseconds."""
        first = self.offsets[subjects]
        return self.times[first] - self.ages[first].astype(np.float64) * YEAR

    @property
    def visits_per_subject(self) -> np.ndarray:
        """Visits of each subject, who has an event at least: int64 ``[subjects]``."""
        if not len(self):
            return np.zeros(0, np.int64)
        # They are numbered from 0 without gaps, so the largest number tells how many there are.
        return np.maximum.reduceat(self.visits, self.offsets[:-1]).astype(np.int64) + 1

    def numbered_visits(self) -> np.ndarray:
        """The visit of each token, numbered through all subjects: int64 ``[tokens]``."""
        return np.repeat(run_offsets(self.visits_per_subject)[:-1], self.lengths) + self.visits

    def of_tokens(self, subject_ids: np.ndarray, offsets: np.ndarray, tokens: np.ndarray) -> "Sequences":
        """Some tokens, by place or by a bool ``[tokens]``, as the histories of subjects, without facts."""
        columns = (self.codes, self.ages, self.visits, self.times)
        codes, ages, visits, times = (column[tokens] for column in columns)
        return Sequences(subject_ids, offsets, codes, ages, visits, times)

    def fingerprint(self) -> str:
        """SHA-256 of the names, types, shapes and SHA-256 of all arrays of tokens."""
        arrays = {name: array for name, array in vars(self).items() if name != "facts"}
        with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
            prints = pool.map(_array_print, arrays.keys(), arrays.values())
            return hashlib.sha256("\n".join(prints).encode()).hexdigest()


def _array_print(name: str, array: np.ndarray) -> str:
    content = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return f"{name} {array.dtype.name} {array.shape} {hashlib.sha256(content.data).hexdigest()}"


@dataclass(frozen=True, eq=False)
class SequenceSet:
    """The sequences of a data set by split, with the vocabulary they are written in."""

    vocabulary: Vocabulary
    splits: dict[str, Sequences]
    """All three split names; held_out may be empty."""
    counts: EventCounts
    """Every event of the source: read, dropped and changed by rule."""
    fingerprint: str
    """SHA-256 of the vocabulary and of every split."""
    subjects_without_events: dict[str, int] = field(default_factory=dict)
    """Split -> its subjects that have no event left, and so no sequence."""
    births: Mapping[str, SubjectTimes] = field(default_factory=lambda: dict.fromkeys(SPLITS, SubjectTimes()))
    """Split -> births of those of them that have one, so that they can be predicted from their age; none
    where they were not read."""
    deaths: Mapping[str, SubjectTimes] = field(default_factory=lambda: dict.fromkeys(SPLITS, SubjectTimes()))
    """Split -> deaths of its subjects; none where they were not read."""
    notes: Sequence[str] = ()
    """To be told of how it was made: a split by hash, options without effect."""

    preparation: Preparation | None = None
    """The rules by which events became tokens, where they are known."""
    unknown_codes: Mapping[str, int] = field(default_factory=dict)
    """Code without a row in the vocabulary -> its events, most frequent first; where they are known."""
    static: FactTable | None = None
    """Static facts as recorded; None where they are not known."""
    facts_without_events: Mapping[str, StaticFacts] = field(default_factory=dict)
    """Split -> facts of the subjects of ``births``, after :meth:`with_facts`."""

    def with_facts(self) -> "SequenceSet":
        """The set for a model that reads static facts: their codes have rows, after those of events, and each
        subject has its own. The same set where it has them already.

        Raises:
            InputError: nothing is known of facts.
        """
        if self.splits["train"].facts is not None:
            return self
        if self.static is None:
            raise InputError(
                "model.fact_tokens: the data do not tell of static facts: read them with read_prepared, or "
                "turn it off."
            )
        coded = self.static.read()
        of_events = set(self.vocabulary.codes)
        new = [code for code in self.static.rows() if code not in of_events]
        vocabulary = self.vocabulary.extended(new)
        splits = {
            name: replace(part, facts=coded[name].encoded(part.subject_ids, vocabulary))
            for name, part in self.splits.items()
        }
        alone = {
            name: coded[name].encoded(born.subject_ids, vocabulary) for name, born in self.births.items()
        }
        counts = vocabulary.counts + _fact_counts(splits["train"], len(vocabulary))
        vocabulary = replace(vocabulary, counts=counts)
        return replace(
            self,
            vocabulary=vocabulary,
            splits=splits,
            fingerprint=_with_facts(self.fingerprint, vocabulary, splits),
            facts_without_events=alone,
        )

    @property
    def event_counts(self) -> np.ndarray:
        """Events of the train split by row of the vocabulary, static facts left out: int64 ``[V]``."""
        return self.vocabulary.counts - _fact_counts(self.splits["train"], len(self.vocabulary))

    def with_train_share(self, share: float, seed: int) -> "SequenceSet":
        """The set with a share of the train split's subjects, one at least, drawn by the seed.

        A smaller share is a part of a larger one. The rows of the vocabulary stay, with the counts of what is
        left; the events of the other subjects count as dropped.
        """
        train = self.splits["train"]
        chosen = np.random.default_rng(seed).permutation(len(train))[: max(1, round(share * len(train)))]
        part = _of_subjects(train, np.isin(np.arange(len(train)), chosen))
        counts = copy.deepcopy(self.counts)
        left_out = (train.codes != SEP).sum() - (part.codes != SEP).sum()
        counts.drop("subject beyond data.train_fraction", int(left_out))
        events = np.bincount(part.codes, minlength=len(self.vocabulary)).astype(np.int64)
        events[: len(SPECIAL_TOKENS)] *= np.arange(len(SPECIAL_TOKENS)) == UNK
        vocabulary = replace(self.vocabulary, counts=events + _fact_counts(part, len(events)))
        splits = {**self.splits, "train": part}
        fingerprint = _with_facts(set_fingerprint(vocabulary, splits), vocabulary, splits)
        return replace(self, vocabulary=vocabulary, splits=splits, counts=counts, fingerprint=fingerprint)

    def subject_ids(self, split: str) -> np.ndarray:
        """Subjects that can be predicted: with a sequence, then those with a birth alone; int64 ``[n]``."""
        return np.concatenate([self.splits[split].subject_ids, self.births[split].subject_ids])


def build_sequences(event_set: EventSet, data: DataConfig, sep_token: bool) -> SequenceSet:
    """Split, filter, fit the vocabulary on the train split, and encode.

    The result does not depend on the row order of the events. ``event_set`` stays as it is: its counts
    are copied before they are added to. Codes that are rare or do not occur in the train split become
    [UNK]. [CLS] is not added here.

    Args:
        event_set: events of any source; without splits of its own, subjects are split by hash.
        data: its ``codes``, ``exclude_codes``, ``duplicates``, ``vocabulary_size``, ``min_count``,
            ``source``, fractions and ``seed`` are read.
        sep_token: put a [SEP] after each run of events of one visit, with the last one's age, visit and
            time.

    Raises:
        InputError: a wrong pattern or fraction, nothing left to train or tune on, or no vocabulary.
    """
    event_set = replace(event_set, counts=copy.deepcopy(event_set.counts))
    counts = event_set.counts
    by_hash = data.tuning_fraction, data.held_out_fraction, data.seed
    splits = event_set.splits or hash_splits(event_set.events["subject_id"].unique().to_numpy(), *by_hash)
    check_disjoint(splits, f"The {event_set.source} source")
    patterns = data.codes or (MEDS_CODES if data.source == "meds" else ())
    duplicates = data.duplicates or ("keep" if data.source == "latent" else "drop")
    # Generated lives may be as long as their histories.
    life = LifeRules(implausible_ages="refuse" if data.source == "meds" else "keep")
    selected = select_events(event_set, patterns, data.exclude_codes, duplicates, life)
    split = split_index(selected.subject_ids, splits)  # [S]
    event_split = np.repeat(split, np.diff(selected.offsets))  # [N]
    counts.drop("subject in no split", int(np.count_nonzero(event_split < 0)))
    for name in ("train", "tuning"):
        if not (event_split == SPLITS.index(name)).any():
            raise InputError(
                f"No event is left in the {name} split: put subjects with selected codes into it, or "
                "select more codes with data.codes."
            )

    idle = CodeChoice(data.codes, data.exclude_codes).without_effect(selected.names)
    notes = [] if event_set.splits else [told_split(*by_hash)]
    min_count = data.min_count
    if min_count is None:
        min_count = 5 if event_set.declared_codes is None else 1
    train = SPLITS.index("train")
    vocabulary = _fit(selected, event_split == train, event_set, min_count, data.vocabulary_size)
    ids = vocabulary.encode(selected.names)[selected.codes]  # [N]
    unknown = (ids == UNK) & (event_split >= 0)
    counts.change("rare or unseen code -> [UNK]", int(np.count_nonzero(unknown)))
    ages = ages_in_years(selected)
    sequences = Sequences(selected.subject_ids, selected.offsets, ids, ages, selected.visits, selected.times)
    if sep_token:
        sequences = with_separators(sequences)
    by_split = {name: _of_subjects(sequences, split == index) for index, name in enumerate(SPLITS)}
    facts = _static_facts(event_set, selected, splits, (patterns, data.exclude_codes))
    in_train = facts["train"].counts(by_split["train"].subject_ids)
    return SequenceSet(
        vocabulary,
        by_split,
        counts,
        fingerprint=set_fingerprint(vocabulary, by_split),
        subjects_without_events={
            name: len(np.unique(splits.get(name, ()))) - len(by_split[name]) for name in SPLITS
        },
        preparation=Preparation(
            event_set.source,
            {
                "codes": list(patterns),
                "exclude_codes": list(data.exclude_codes),
                "static_codes": list(STATIC_CODES),
                "duplicates": duplicates,
                "delays": [],
                "visit_column": data.visit_column,
            },
        ),
        notes=[*notes, *told_without_effect(idle, "--data.")],
        static=FactTable(lambda: facts, lambda: fact_rows(in_train, min_count)),
    )


def _static_facts(
    event_set: EventSet,
    selected: Selected,
    splits: Mapping[str, np.ndarray],
    patterns: tuple[tuple[str, ...], tuple[str, ...]],
) -> dict[str, CodedFacts]:
    """Split -> static facts; ``patterns`` are those of the codes that are events, and those that are not."""
    code = event_set.events["code"].combine_chunks()
    static = matches(code.dictionary.to_pylist(), STATIC_CODES, "static_codes")
    events = event_columns(event_set.events.filter(pa.array(static[code.indices.to_numpy()])))
    found = subject_facts(
        events,
        matches(events.names, STATIC_CODES, "static_codes"),
        selected,
        lambda ids: split_index(ids, splits),
        selects(events.names, *patterns),
        event_set.counts,
    )
    return {name: known.static for name, known in found.items()}


def _fact_counts(part: Sequences, rows: int) -> np.ndarray:
    """Facts of a split's subjects by row of the vocabulary, int64 ``[rows]``."""
    if part.facts is None:
        return np.zeros(rows, np.int64)
    return np.bincount(part.facts.codes, minlength=rows).astype(np.int64)


def _with_facts(fingerprint: str, vocabulary: Vocabulary, splits: Mapping[str, Sequences]) -> str:
    """The fingerprint of a set with the facts of its splits; the same where they have none."""
    facts = [part.facts.fingerprint() for name in SPLITS if (part := splits[name]).facts is not None]
    if not facts:
        return fingerprint
    return hashlib.sha256("\n".join([fingerprint, vocabulary.fingerprint(), *facts]).encode()).hexdigest()


def set_fingerprint(vocabulary: Vocabulary, splits: Mapping[str, Sequences]) -> str:
    """SHA-256 of a vocabulary and the tokens of every split."""
    prints = [vocabulary.fingerprint(), *(splits[name].fingerprint() for name in SPLITS)]
    return hashlib.sha256("\n".join(prints).encode()).hexdigest()


def _fit(
    selected: Selected, train: np.ndarray, event_set: EventSet, min_count: int, most_rows: int | None
) -> Vocabulary:
    """Fit on the events where ``train``, bool ``[N]``, is true."""
    events = np.bincount(selected.codes[train], minlength=len(selected.names)).tolist()
    return fit_vocabulary(
        {code: count for code, count in zip(selected.names, events, strict=True) if count},
        min_count,
        most_rows,
        event_set.declared_codes,
        event_set.descriptions,
    )


def ages_in_years(selected: Selected) -> np.ndarray:
    """Years of 365.25 days from the subject's birth to each event, float32 ``[events]``; NaN if unknown."""
    births = np.repeat(selected.births, np.diff(selected.offsets))  # [N]
    ages = ((selected.times - births) / YEAR).astype(np.float32)
    ages[births == np.iinfo(np.int64).max] = np.nan
    return ages


def with_separators(sequences: Sequences) -> Sequences:
    """Put a [SEP] after each run of events of one visit, with the last one's age, visit and time.

    Every subject has an event at least.
    """
    visits = sequences.visits
    ends = np.ones(len(visits), dtype=bool)  # [N]
    ends[:-1] = leads([visits])[1:]
    ends[sequences.offsets[1:] - 1] = True
    places = run_offsets(1 + ends)  # [N + 1], of the events among the tokens
    source = np.repeat(np.arange(len(visits)), 1 + ends)  # [T]
    separated = sequences.of_tokens(sequences.subject_ids, places[sequences.offsets], source)
    separated.codes[places[1:][ends] - 1] = SEP
    return replace(separated, facts=sequences.facts)


def _of_subjects(sequences: Sequences, chosen: np.ndarray) -> Sequences:
    """The subjects where ``chosen``, bool ``[subjects]``, is true."""
    lengths = sequences.lengths
    offsets = run_offsets(lengths[chosen])
    part = sequences.of_tokens(sequences.subject_ids[chosen], offsets, np.repeat(chosen, lengths))
    facts = sequences.facts
    return part if facts is None else replace(part, facts=facts.of(np.flatnonzero(chosen)))


def describe(sequence_set: SequenceSet) -> JsonObject:
    """Summary for logs and manifests, ready for JSON: figures only, no subject ids and no events.

    Lengths are in tokens ([SEP] included), ages in years. ``events_read`` equals ``events_kept`` plus
    all of ``events_dropped``; ``events_kept`` equals the splits' events together.
    """
    ages = np.concatenate([part.ages for part in sequence_set.splits.values()])
    counts = sequence_set.counts
    return {
        "splits": {name: describe_split(part) for name, part in sequence_set.splits.items()},
        "subjects_without_events": dict(sequence_set.subjects_without_events),
        "vocabulary_rows": len(sequence_set.vocabulary),
        "events_read": counts.read,
        "events_kept": counts.kept,
        "events_dropped": dict(counts.dropped),
        "events_changed": dict(counts.changed),
        "ages": {"min": round(float(ages.min()), 2), "max": round(float(ages.max()), 2)},
        "fingerprint": sequence_set.fingerprint,
    }


def told_facts(data: SequenceSet, splits: Sequence[str]) -> list[str]:
    """A line on the static facts that a model reads of subjects of some splits; none where it reads none."""
    facts = [found for name in splits if (found := data.splits[name].facts) is not None]
    if not facts:
        return []
    subjects = sum(len(found.offsets) - 1 for found in facts)
    having = sum(int(np.count_nonzero(np.diff(found.offsets))) for found in facts)
    every = sum(len(found.codes) for found in facts)
    unknown = sum(int(np.count_nonzero(found.codes == UNK)) for found in facts)
    return [
        f"Static facts: {having:,} of {subjects:,} subjects have any; {unknown:,} of {every:,} facts have no "
        "row of the vocabulary ([UNK])."
    ]


def describe_split(part: Sequences) -> JsonObject:
    """Subjects, events, tokens, visits and percentiles of lengths, in tokens; ready for JSON."""
    points = {"p50": 50, "p90": 90, "p99": 99, "max": 100} if len(part) else {}
    lengths = {name: round(float(np.percentile(part.lengths, at)), 1) for name, at in points.items()}
    return {
        "subjects": len(part),
        "events": int(np.count_nonzero(part.codes != SEP)),
        "tokens": len(part.codes),
        "visits": int(part.visits_per_subject.sum()),
        "lengths": lengths,
    }


_FIRST_DAY, _LAST_DAY = (int(np.datetime64(day).astype(np.int64)) for day in ("0001-01-01", "9999-12-31"))
_CHUNK = 1 << 20


def events_by_day(splits: Mapping[str, Sequences]) -> tuple[np.ndarray, np.ndarray]:
    """Days on which there are events, since 1970 and ascending, and how many: int64 ``[days]`` each.

    Those before the year 1 or after 9999 count on the nearest day within.
    """
    found = np.zeros(_LAST_DAY - _FIRST_DAY + 1, np.int64)
    for part in splits.values():
        for start in range(0, len(part.times), _CHUNK):
            days = np.clip(part.times[start : start + _CHUNK] // DAY, _FIRST_DAY, _LAST_DAY) - _FIRST_DAY
            least = int(days.min())
            events = np.bincount(days - least)
            found[least : least + len(events)] += events
    days = np.flatnonzero(found)
    return days + _FIRST_DAY, found[days]


def span_of_times(splits: Mapping[str, Sequences]) -> dict[str, str]:
    """Day of the first, the median and the last event, such as 2019-07-08; nothing where there is none."""
    days, events = events_by_day(splits)
    if not len(days):
        return {}
    median = days[int(np.searchsorted(np.cumsum(events), events.sum() / 2))]
    return {"first": day_text(days[0]), "median": day_text(median), "last": day_text(days[-1])}


def day_text(day: np.int64 | int) -> str:
    """A day since 1970 as 2019-07-08."""
    return str(np.datetime64(int(day), "D"))


# From the ids of one vocabulary to those of another: data prepared by itself, read by a model.


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Ids of a data set as ids of a model."""

    ids: np.ndarray
    """int32 `[V of the data]`: the new id of each."""
    vocabulary: Vocabulary
    """The one of the new ids: the base's, with the new codes after it where it is extended."""
    new_codes: tuple[str, ...]
    """Codes of the data that the base has not: added (extended), or read as [UNK]. Most frequent first."""
    new_events: int
    """Events of them in the data's train split."""

    @property
    def identical(self) -> bool:
        """Every id stays as it is."""
        return np.array_equal(self.ids, np.arange(len(self.ids)))

    def apply(self, sequences: Sequences) -> Sequences:
        """The same histories in new ids; the very same object where all ids stay as they are.

        Only ``codes``, int32 `[tokens]`, and those of facts are new arrays.
        """
        if self.identical:
            return sequences
        facts = None if sequences.facts is None else self.apply_to_facts(sequences.facts)
        return replace(sequences, codes=self.ids[sequences.codes], facts=facts)

    def apply_to_facts(self, facts: StaticFacts) -> StaticFacts:
        """The same facts in new ids."""
        return replace(facts, codes=self.ids[facts.codes])

    def apply_to(self, splits: Mapping[str, Sequences]) -> dict[str, Sequences]:
        """:meth:`apply` for each split."""
        return {name: self.apply(part) for name, part in splits.items()}


def map_vocabulary(of_data: Vocabulary, of_base: Vocabulary, extend: bool) -> VocabularyMap:
    """Map the ids of the data set's vocabulary onto those of the base, that of the model.

    With ``extend``, codes that the base has not get ids of their own, after the base's; else they are [UNK].
    A code that no event of the train split has is [UNK] in any case: nothing would train it.
    """
    first = len(SPECIAL_TOKENS)
    ids = np.arange(len(of_data), dtype=np.int32)
    ids[first:] = of_base.encode(of_data.codes[first:])
    new = first + np.flatnonzero(ids[first:] == UNK)  # [n], rows of the data's vocabulary
    new = new[np.argsort(-of_data.counts[new], kind="stable")]
    codes = tuple(of_data.codes[row] for row in new)
    events = int(of_data.counts[new].sum())
    if not extend:
        return VocabularyMap(ids, of_base, codes, events)
    trained = new[of_data.counts[new] > 0]
    ids[trained] = np.arange(len(of_base), len(of_base) + len(trained))
    codes = codes[: len(trained)]
    texts = [of_data.descriptions[row] for row in trained]
    return VocabularyMap(ids, of_base.extended(codes, of_data.counts[trained], texts), codes, events)

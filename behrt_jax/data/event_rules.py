"""Rules by which events become tokens of visits: every one that leaves an event out is counted."""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import (
    BIRTH_CODE,
    DAY,
    DEATH_CODE,
    EventColumns,
    EventCounts,
    EventSet,
    SubjectTimes,
    event_columns,
)
from behrt_jax.data.lives import (
    DEFAULT_RULES,
    LONGEST_LIFE,
    NEVER,
    TOO_OLD,
    LifeRules,
    births_of,
    check_ages,
    deaths_of,
    too_old,
)
from behrt_jax.data.sorting import ascending, leads, sort_rows
from behrt_jax.data.splits import hash_words
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, from_stored

Duplicates = Literal["keep", "drop", "count"]

REPEATS = ("//x2", "//x3-5", "//x6+")
"""Suffixes by ``duplicates="count"`` of a code that occurs 2, 3 to 5, or 6 and more times in a visit."""


@dataclass(frozen=True, eq=False)
class Selected:
    """The events left, sorted by subject, time, visit and code, so whatever order they came in."""

    subject_ids: np.ndarray
    """int64 ``[subjects]``, ascending; only subjects with an event left."""
    births: np.ndarray
    """int64 ``[subjects]``, microseconds since 1970; the largest number where unknown."""
    offsets: np.ndarray
    """int64 ``[subjects + 1]``: subject i has the events from ``offsets[i]`` to ``offsets[i + 1]``."""
    codes: np.ndarray
    """int32 ``[events]``, places in ``names``."""
    times: np.ndarray
    """int64 ``[events]``, microseconds since 1970."""
    visits: np.ndarray
    """int32 ``[events]``, from 0 for each subject, in the order of the visits' first events."""
    names: tuple[str, ...]
    """The distinct codes of the whole data set, sorted; where duplicates are counted, followed by all of
    them with each suffix of `REPEATS` in turn."""
    without_events: SubjectTimes
    """Births of the subjects that have no event left, but a birth."""
    deaths: SubjectTimes
    """Of all subjects that have a death."""


def select_events(
    event_set: EventSet,
    codes: tuple[str, ...],
    exclude_codes: tuple[str, ...],
    duplicates: Duplicates,
    life: LifeRules = DEFAULT_RULES,
) -> Selected:
    """Apply the rules below in this order, and number each subject's visits.

    Each rule adds the events it drops to ``event_set.counts`` under its name:

    1. ``birth or death marker``: MEDS_BIRTH and MEDS_DEATH set the birth and the day of death, and are no
       tokens;
    2. ``code not selected``: no pattern of ``codes`` matches, or one of ``exclude_codes`` does;
    3. ``null time (static)``;
    4. ``no birth``: the subject's birth is not known, so the age is not either (see `LifeRules`);
    5. ``before birth``;
    6. ``age above 150 years`` (see `LifeRules`);
    7. ``after death``: on a later calendar day than the death. The same day is kept, since deaths are
       often known by the day alone and records of that day are signed after it;
    8. ``duplicate in visit``: the code came earlier in the same visit (unless duplicates are kept; where
       they are counted, the first event's code gets a suffix of ``REPEATS``, and is counted as changed).

    Of several births the earliest is taken that is no placeholder such as 1900-01-01 (changed: ``births
    differ``, in subjects); an only one is kept, and told. A death on a day before birth, or at an age that
    cannot be, such as one in the year 9999, is none. Of deaths on several days (changed: ``deaths differ``,
    in subjects) the first is taken; but with an event more than 60 days after it, on the last of these days
    or before, the last (changed too; https://github.com/OHDSI/Themis/issues/6).

    A visit is a visit id where the event has one, else a calendar day. Events are in the order of time,
    so one visit may be interrupted by another.

    Args:
        event_set: events in any row order; ``counts`` is filled.
        codes: regular expressions, matched at the start of a code; none selects all.
        exclude_codes: regular expressions likewise.
        duplicates: what the last rule does.
        life: what becomes of events without an age, or at one that cannot be.

    Raises:
        InputError: a pattern is no regular expression, ages cannot be, or no event is left.
    """
    columns = event_columns(event_set.events)
    wanted = selects(columns.names, codes, exclude_codes)
    selected = select_columns(columns, wanted, duplicates, event_set.counts, life)
    check_ages(event_set.counts, life)
    count_repeated(selected.codes, len(columns.names), event_set.counts)
    if not len(selected.codes):
        events = np.bincount(columns.codes, minlength=len(columns.names)).tolist()
        by_code = dict(zip(columns.names, events, strict=True))
        raise nothing_left(by_code | {BIRTH_CODE: 0, DEATH_CODE: 0}, event_set.counts)
    return selected


def select_columns(
    events: EventColumns,
    wanted: np.ndarray | None,
    duplicates: Duplicates,
    counts: EventCounts,
    life: LifeRules = DEFAULT_RULES,
) -> Selected:
    """Apply the rules of :func:`select_events` to columns; it may be that no event is left.

    ``wanted``, bool ``[names]``, are the codes selected; None for all.
    """
    subjects, births, deaths, kept = apply_rules(events, wanted, counts, life)
    subject, time, *ties, code = sort_rows(kept)
    visit = number_visits(subject, time, *ties)  # [K]
    if duplicates != "keep":
        first, repeated, times_seen = first_in_visit(visit, code)
        if duplicates == "count":
            suffix = (times_seen > 1).astype(np.int32) + (times_seen > 2) + (times_seen > 5)
            code = code.copy()
            code[repeated] += suffix * np.int32(len(events.names))
        if len(repeated):
            subject, time, code, visit = (column[first] for column in (subject, time, code, visit))
        counts.drop("duplicate in visit", len(first) - len(code))
    names = tuple(events.names)
    if duplicates == "count":
        names = _with_repeats(names)

    starts = np.flatnonzero(leads([subject]))  # [S]
    offsets = np.append(starts, len(subject))
    present = subject[starts]
    alone = births != NEVER
    alone[present] = False
    dead = deaths != NEVER
    # A subject's first event is of its first visit.
    visit -= np.repeat(visit[starts], np.diff(offsets))
    return Selected(
        subject_ids=subjects[present],
        births=births[present],
        offsets=offsets,
        codes=code,
        times=time,
        visits=visit,
        names=names,
        without_events=SubjectTimes(subjects[alone], births[alone]),
        deaths=SubjectTimes(subjects[dead], deaths[dead]),
    )


@functools.lru_cache(maxsize=2)  # the same for many partitions
def _with_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    return names + tuple(f"{name}{repeats}" for repeats in REPEATS for name in names)


def count_repeated(code: np.ndarray, names: int, counts: EventCounts) -> None:
    """Count the events whose code got a suffix of ``REPEATS``, being beyond the ``names`` without one."""
    counts.change("repeated in visit -> code with a count", int(np.count_nonzero(code >= names)))


def apply_rules(
    events: EventColumns,
    wanted: np.ndarray | None,
    counts: EventCounts,
    life: LifeRules,
    also: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Apply all rules but the one on duplicates, as `select_columns` does.

    Returns:
        The subjects' ids, ascending, births and deaths, int64 ``[subjects]`` each, with the largest number
        where there is none, and columns ``[kept]`` in the order in which events are sorted: place of the
        subject (int32), time, where there are any visit ids whether the event has one and which, code, and
        those of ``also``, more columns ``[events]``.
    """
    code, time = events.codes, events.times
    subjects, subject = rank_ids(events.subject_ids)
    born, died = events.of_code(BIRTH_CODE), events.of_code(DEATH_CODE)
    births = births_of(born, events, subject, len(subjects), counts)

    keep = ~(born | died)  # [N]
    counts.drop("birth or death marker", len(keep) - int(np.count_nonzero(keep)))

    def drop(rule: str, broken: np.ndarray) -> None:
        nonlocal keep
        broken &= keep
        counts.drop(rule, int(np.count_nonzero(broken)))
        keep ^= broken

    if wanted is not None and not wanted.all():
        drop("code not selected", ~wanted[code])
    if events.timed is not None:
        drop("null time (static)", ~events.timed)
    unborn = births == NEVER  # [S]
    starts = births
    if unborn.any():
        if life.without_birth == "drop":
            drop("no birth", unborn[subject])
        else:
            rows = np.flatnonzero(keep & unborn[subject])
            if life.without_birth == "first_event":
                np.minimum.at(births, subject[rows], time[rows])
            what = "age from the first event" if life.without_birth == "first_event" else "age unknown"
            counts.change(f"no birth, {what}", len(rows))
        starts = np.where(births == NEVER, -NEVER, births)
    drop("before birth", time < starts[subject])
    if len(time) and life.implausible_ages != "keep" and time.max() > births.min(initial=0) + LONGEST_LIFE:
        drop(TOO_OLD, too_old(time, births[subject]))
    deaths = deaths_of(died, events, subject, births, keep, counts, life)
    if (deaths != NEVER).any():
        ends = np.where(deaths == NEVER, NEVER, (deaths // DAY + 1) * DAY)
        drop("after death", time >= ends[subject])

    columns = [subject, time, code, *also]
    if events.visits is not None and events.named is not None:
        # The time decides the day, so that only visit ids tell events of one time apart.
        columns[2:2] = [events.named, np.where(events.named, events.visits, 0)]
    return subjects, births, deaths, [column[keep] for column in columns]


def rank_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids, ascending, and the place of each id ``[N]`` among them, int32 ``[N]``."""
    if not len(ids):
        return ids, np.empty(0, np.int32)
    if ascending(ids):
        first = leads([ids])
        return ids[first], np.cumsum(first, dtype=np.int32) - np.int32(1)
    least, most = int(ids.min()), int(ids.max())
    if most - least < max(4 * len(ids), 1 << 16):  # a table of all numbers in between is small enough
        shifted = ids - least
        seen = np.zeros(most - least + 1, bool)
        seen[shifted] = True
        place = np.cumsum(seen, dtype=np.int32) - np.int32(1)
        return np.flatnonzero(seen) + least, place[shifted]
    coded = pa.array(ids).dictionary_encode()
    distinct, rank = np.unique(coded.dictionary.to_numpy(), return_inverse=True)
    return distinct, rank.astype(np.int32)[coded.indices.to_numpy()]


# Visits of sorted events: their numbers, and the codes that come again within one.

_SHORT = 8  # events of a visit that are compared with each other one by one


def number_visits(
    subject: np.ndarray, time: np.ndarray, named: np.ndarray | None = None, visit: np.ndarray | None = None
) -> np.ndarray:
    """Number the visits of all subjects through, in the order of their first events.

    Args:
        subject: int32 ``[events]``, ascending.
        time: int64 ``[events]`` microseconds, ascending within a subject.
        named: bool ``[events]``, whether the event has a visit id; none has where not given.
        visit: int64 ``[events]``, that id. A visit without one is a calendar day.

    Returns:
        int32 ``[events]``.
    """
    if not len(subject):
        return np.empty(0, np.int32)
    day = time // DAY
    columns = (
        [subject, day] if named is None or visit is None else [subject, named, np.where(named, visit, day)]
    )
    starts = leads(columns)  # an event that continues the visit of the one before it does not lead
    run = np.cumsum(starts, dtype=np.int32) - np.int32(1)  # [events]
    if named is None or not named.any():
        return run
    # Other visits may interrupt one, so that it has several runs.
    runs = np.arange(run[-1] + 1, dtype=np.int32)
    *key, grouped = sort_rows([*(column[starts] for column in columns), runs])
    heads = leads(key)
    is_first = np.zeros(len(runs), bool)
    is_first[grouped[heads]] = True
    number = np.cumsum(is_first, dtype=np.int32) - np.int32(1)  # right where is_first
    of_run = np.empty(len(runs), np.int32)
    of_run[grouped] = number[grouped[heads]][np.cumsum(heads) - 1]
    return of_run[run]


def first_in_visit(visit: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first event of each code in each visit.

    Args:
        visit: int32 ``[events]``, as `number_visits` gives them.
        code: int32 ``[events]``.

    Returns:
        Whether an event is the first, bool ``[events]``; the places of those firsts whose code comes again,
        int32 ``[repeated]``; and how often that code is in the visit, int64 ``[repeated]``, 2 or more.
    """
    first = np.ones(len(code), bool)
    again = _may_come_again(visit, code)
    if not again.any():
        return first, np.empty(0, np.int32), np.empty(0, np.int64)
    # Only visits with such an event need sorting.
    suspect = np.zeros(int(visit.max()) + 1, bool)
    suspect[visit[again]] = True
    shared = np.flatnonzero(suspect[visit]).astype(np.int32)
    *key, place = sort_rows([visit[shared], code[shared], shared])
    heads = np.flatnonzero(leads(key))
    times = np.diff(np.append(heads, len(shared)))
    place = place[heads]
    first[shared] = False
    first[place] = True
    return first, place[times > 1], times[times > 1]


def _may_come_again(visit: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Tell which events may repeat a code of their visit; those of long or interrupted visits just may.

    Comparing each event with the few before it is many times faster than sorting.

    Returns:
        bool ``[events]``.
    """
    again = np.zeros(len(code), bool)
    for back in range(1, min(_SHORT, len(code))):
        same = visit[back:] == visit[:-back]
        if not same.any():
            break
        again[back:] |= same & (code[back:] == code[:-back])
    if len(code) > _SHORT:
        again[_SHORT:] |= visit[_SHORT:] == visit[:-_SHORT]
    if (visit[1:] < visit[:-1]).any():
        again = (np.bincount(visit) > 1)[visit]
    return again


# Codes chosen by patterns, and the error where nothing is left.


@dataclass(frozen=True)
class CodeChoice:
    """The codes that are read, and what for; its methods raise `InputError` where a pattern is wrong."""

    codes: tuple[str, ...] = ()
    """Patterns of those that become tokens; none: all."""
    exclude_codes: tuple[str, ...] = ()
    value_codes: tuple[str, ...] = ()
    """Tokens too, with the bin of their value."""
    static_codes: tuple[str, ...] = ()
    """Kept as facts about the subject where they have no time."""

    def tokens(self, names: Sequence[str]) -> np.ndarray:
        """Bool ``[names]``."""
        wanted = selects(names, self.codes, self.exclude_codes, options="")
        if not self.value_codes:
            return wanted
        valued = matches(names, self.value_codes, "value_codes")
        return wanted | (valued & selects(names, (), self.exclude_codes, options=""))

    def static(self, names: Sequence[str]) -> np.ndarray:
        """Bool ``[names]``."""
        return matches(names, self.static_codes, "static_codes")

    def read(self, names: Sequence[str]) -> np.ndarray:
        """Bool ``[names]``: one or the other."""
        return self.tokens(names) | self.static(names)

    def without_effect(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Option -> its patterns that match none of these codes, all of those there are."""
        idle = {
            option: [pattern for pattern in patterns if not matches(names, (pattern,), option).any()]
            for option, patterns in vars(self).items()
        }
        return {option: patterns for option, patterns in idle.items() if patterns}


def told_without_effect(idle: Mapping[str, Sequence[str]], options: str) -> list[str]:
    """A warning for each option of :meth:`CodeChoice.without_effect`; ``options`` goes before its name."""
    return [
        f"Warning: {options}{option} {' '.join(patterns)} matches no code of the data, so it has no effect."
        for option, patterns in idle.items()
    ]


def selects(
    names: Sequence[str], codes: tuple[str, ...], exclude_codes: tuple[str, ...], options: str = "data."
) -> np.ndarray:
    """Codes that the patterns select: bool ``[names]``.

    Raises:
        InputError: a pattern is no regular expression; ``options`` goes before the option's name.
    """
    wanted = matches(names, codes, f"{options}codes") if codes else np.ones(len(names), bool)
    return wanted & ~matches(names, exclude_codes, f"{options}exclude_codes")


def matches(names: Sequence[str], patterns: tuple[str, ...], option: str) -> np.ndarray:
    """Names at the start of which any pattern matches: bool ``[names]``.

    Raises:
        InputError: a pattern is no regular expression; ``option`` is named as the place to mend it.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise InputError(
                f"{option} has {pattern!r}, which is no regular expression ({error}): mend it, or put a "
                "backslash before the sign to take it literally."
            ) from error
    if not compiled:
        return np.zeros(len(names), dtype=bool)
    return np.array([any(pattern.match(name) for pattern in compiled) for name in names], dtype=bool)


def code_prefix(code: str) -> str:
    """The start of a code up to its first separator, with that: ``//``, else ``/`` or ``|``, else all."""
    found = re.match(r".*?//|.*?[/|]", code, re.DOTALL)
    return found[0] if found else code


BIRTHS_FROM = f"{BIRTH_CODE} events with a time"


def nothing_left(
    by_code: Mapping[str, int],
    counts: EventCounts,
    options: str | None = "data.",
    births_from: str = BIRTHS_FROM,
) -> InputError:
    """The error of a data set from which the rules leave nothing.

    ``by_code`` is code, or prefix of codes -> events read, markers of birth and death aside; ``options``
    goes before the names of the options, None where the rules are those of another data set. Where subjects
    lack a birth, it says where the source has them from.
    """
    by_prefix = Counter()
    for name, count in by_code.items():
        by_prefix[code_prefix(name)] += count
    prefixes = ", ".join(re.escape(prefix) for prefix, count in by_prefix.most_common(10) if count)
    rules = ", ".join(f"{rule}: {count}" for rule, count in counts.dropped.items())
    mend = f"choose {options}codes and {options}exclude_codes to fit the codes of the data set"
    if options is None:
        mend = "write the codes as in the data that the model was trained on"
    return InputError(
        f"No event is left after filtering ({rules}): {mend} (most frequent prefixes: {prefixes or 'none'}), "
        f"and see that subjects have a birth: {births_from}. Else prepare takes births from a table "
        "(--births FILE), or does without (--without_birth first_event or unknown)."
    )


# Numeric values as part of the code: a quantile bin, fitted on the train split.

SAMPLE = 4096
"""Most values of a code that its quantiles are taken of."""


class ValueSample:
    """A bounded sample of each code's values, the same in whatever order and pieces they are added."""

    def __init__(self, names: Sequence[str], valued: np.ndarray):
        """Begin with nothing; ``valued``, bool ``[names]``, are the codes to sample."""
        self.names = names
        self.valued = valued
        self.seen = np.zeros(len(names), np.int64)
        """Values added of each code, ``[names]``."""
        self._code = np.empty(0, np.int32)
        self._hash = np.empty(0, np.int64)
        self._value = np.empty(0, np.float32)

    def add(self, subject_ids: np.ndarray, times: np.ndarray, codes: np.ndarray, values: np.ndarray) -> None:
        """Add events: int64, int64, int32 places in ``names`` and float32, ``[events]`` each."""
        chosen = np.flatnonzero(self.valued[codes] & np.isfinite(values))
        code, value = codes[chosen], values[chosen] + np.float32(0)  # no negative zero
        self.seen += np.bincount(code, minlength=len(self.names))
        words = hash_words(subject_ids[chosen])
        for part in (times[chosen], code.astype(np.int64), value.view(np.int32).astype(np.int64)):
            words = hash_words((words ^ part.view(np.uint64)).view(np.int64))
        code = np.concatenate([self._code, code])
        hashed = np.concatenate([self._hash, (words >> np.uint64(1)).view(np.int64)])
        bits = np.concatenate([self._value, value]).view(np.int32)
        code, hashed, bits = sort_rows([code, hashed, bits])
        starts = np.searchsorted(code, np.arange(len(self.names)))
        kept = np.arange(len(code)) - starts[code] < SAMPLE
        self._code, self._hash, self._value = code[kept], hashed[kept], bits[kept].view(np.float32)

    def fit(self, bins: int, least: int) -> "ValueBins":
        """Cut the values of each code with at least ``least`` of them into bins of equal frequency."""
        fitted = np.flatnonzero(self.valued & (self.seen >= max(least, 1))).tolist()
        shares = np.arange(1, bins) / bins
        samples = (self._value[self._code == code] for code in fitted)
        edges = [np.quantile(sample, shares, method="inverted_cdf") for sample in samples]
        codes = tuple(self.names[code] for code in fitted)
        return ValueBins(codes, np.array(edges, np.float32).reshape(len(fitted), bins - 1))


@dataclass(frozen=True, eq=False)
class ValueBins:
    """Quantile bins of the codes that have any."""

    codes: tuple[str, ...]
    edges: np.ndarray
    """float32 ``[codes, bins - 1]``: bin Q1 ends with the first edge, which belongs to it, and so on. A
    value that makes up more than a bin's share closes several bins at once, and some stay empty."""

    def apply(self, events: EventColumns, values: np.ndarray) -> tuple[EventColumns, np.ndarray]:
        """Put the bin behind the code (``CODE//Q3``) where the event has a value and the code has bins.

        Of values float32 ``[events]``, NaN where null, come the events, with other ``names``, the same for
        whatever events; and which names are those of a bin, bool ``[names]``.
        """
        count = self.edges.shape[1] + 1
        binned = [[f"{code}//Q{place + 1}" for place in range(count)] for code in self.codes]
        names = sorted({*events.names, *(name for row in binned for name in row)})
        place = {name: index for index, name in enumerate(names)}
        own = np.array([place[name] for name in events.names], np.int32)
        of_bin = np.array([[place[name] for name in row] for row in binned], np.int32).reshape(-1, count)
        with_bins = {code: row for row, code in enumerate(self.codes)}  # row in edges of each code
        row = np.array([with_bins.get(name, -1) for name in events.names], np.int32)[events.codes]
        changed = (row >= 0) & np.isfinite(values)
        row, value = row[changed], values[changed]
        bins = np.zeros(len(row), np.int32)
        for edge in range(count - 1):
            bins += value > self.edges[row, edge]
        codes = own[events.codes]
        codes[changed] = of_bin[row, bins]
        is_bin = np.zeros(len(names), bool)
        is_bin[of_bin.ravel()] = True
        return replace(events, codes=codes, names=names), is_bin


# All rules together, kept with what was prepared or trained by them.


@dataclass(frozen=True, eq=False)
class Preparation:
    """Rules by which events became tokens, so that those of other subjects become the same.

    The vocabulary is kept beside them.
    """

    source: str
    """Kind of the source: meds, omop, synthea, table, or the name of a generator."""
    options: JsonObject
    """Options that decided what was prepared, as `manifest.json` has them."""
    value_edges: Mapping[str, Sequence[float]] | None = None
    """Code -> the values that end its quantile bins; None where no values were asked for."""

    @property
    def choice(self) -> CodeChoice:
        """The codes that are read, and what for."""
        names = ("codes", "exclude_codes", "value_codes", "static_codes")
        return CodeChoice(**{name: tuple(self.options.get(name) or ()) for name in names})

    @property
    def bins(self) -> ValueBins | None:
        """Bins of values, as they were fitted."""
        if self.value_edges is None:
            return None
        edges = np.array(list(self.value_edges.values()), np.float32)
        return ValueBins(tuple(self.value_edges), edges.reshape(-1, self.options["value_bins"] - 1))

    @property
    def life(self) -> LifeRules:
        """Treatment of ages that are unknown or cannot be."""
        return from_stored(LifeRules, self.options)

    @property
    def delays(self) -> tuple[str, ...]:
        """How long after their time events are known."""
        return tuple(self.options.get("delays") or ())

    def other_bins(self, other: "Preparation", codes: Sequence[str]) -> np.ndarray:
        """Codes that end in a bin of values whose edges are not those of the other: bool ``[codes]``."""
        ours, theirs = self.value_edges or {}, other.value_edges or {}
        changed = {code for code in {*ours, *theirs} if ours.get(code) != theirs.get(code)}
        counted = "|".join(map(re.escape, REPEATS))
        found = (re.fullmatch(rf"(.+)//Q\d+({counted})?", code) if changed else None for code in codes)
        return np.array([bin_of is not None and bin_of[1] in changed for bin_of in found], bool)

    def to_json(self) -> JsonObject:
        """The part of a manifest that says the same."""
        edges = {} if self.value_edges is None else {"value_edges": dict(self.value_edges)}
        return {"source": self.source, "options": dict(self.options), **edges}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], file: Path) -> "Preparation":
        """Of a manifest, or of what :meth:`to_json` gave; ``file`` is named where it is neither."""
        try:
            found = cls(values["source"], values["options"], values.get("value_edges"))
            choice, bins = found.choice, found.bins  # or they would fail later
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{file} does not tell how events became tokens: it is damaged.") from error
        choice.read([])
        assert bins is None or len(bins.codes) == len(bins.edges)
        return found

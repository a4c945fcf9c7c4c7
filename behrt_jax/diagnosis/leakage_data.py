"""Checks of prepared data: leakage between splits, times outside of a life, and codes dated too early.

They see the data as `data.prepared.read_prepared` gives them, without separators, beside their manifest;
:func:`check_data` has the list. Findings hold figures and codes, no subject ids.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from behrt_jax.data.event_rules import REPEATS, code_prefix
from behrt_jax.data.events import DAY, SPLITS, YEAR
from behrt_jax.data.lives import PLACEHOLDER_BIRTH
from behrt_jax.data.sequences import Sequences, SequenceSet, day_text, events_by_day, set_fingerprint
from behrt_jax.data.sorting import leads, place_in
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK, matching_codes
from behrt_jax.diagnosis.finding import SHIFTED_MEND, SHIFTED_WHY, Finding
from behrt_jax.files import JsonObject

FIRST_CODE = len(SPECIAL_TOKENS)


def check_data(data: SequenceSet, manifest: JsonObject, death_codes: tuple[str, ...]) -> Iterator[Finding]:
    """Every check of prepared data.

    Raises:
        InputError: one of the `death_codes` is no regular expression.
    """
    yield from check_splits(data)
    yield from check_vocabulary(data, manifest)
    yield from check_quantiles(data, manifest)
    yield from check_times(data)
    yield from check_calendar(data)
    yield from check_unknown_codes(data)
    yield from check_unknown_visits(data)
    yield from check_ages(data)
    yield from check_deaths(data, death_codes)
    yield from check_visit_ends(data)
    yield from check_repeats(data)


# Leakage between splits: subjects, vocabulary and quantiles.

_LEAST_PER_BIN = 20
"""Fewest events per quantile bin for which its share is judged."""
_UNIONS = (("train",), ("train", "tuning"), ("train", "held_out"), SPLITS)
"""Splits that quantiles may have been fitted on; the first is right."""


def check_splits(data: SequenceSet) -> Iterator[Finding]:
    """Files changed after they were prepared, and subjects in two splits or twice in one."""
    if set_fingerprint(data.vocabulary, data.splits) != data.fingerprint:
        yield Finding.error(
            "changed-since-prepared",
            "The sequences are not those whose fingerprint is in the manifest.",
            "Runs that name this fingerprint were trained on other data.",
            "Run prepare again, into a new folder.",
        )
    ids = {name: np.unique(part.subject_ids) for name, part in data.splits.items()}
    together = np.concatenate([ids[name] for name in SPLITS])
    shared = int(np.count_nonzero(np.unique(together, return_counts=True)[1] > 1))
    if shared:
        yield Finding.error(
            "subject-in-two-splits",
            f"{shared:,} of {len(np.unique(together)):,} subjects are in more than one split.",
            "A model is tested on subjects that it was trained on.",
            "Split by subject, not by visit or by file, and run prepare again.",
        )
    twice = sum(len(part) - len(ids[name]) for name, part in data.splits.items())
    if twice:
        yield Finding.error(
            "subject-twice-in-split",
            f"{twice:,} subjects come again in the same split, with a history of their own.",
            "Their events are counted several times, and each history lacks what the other knows.",
            "Join the records of a subject before preparing them.",
        )


def check_vocabulary(data: SequenceSet, manifest: JsonObject) -> Iterator[Finding]:
    """Recount the vocabulary in the train split; that of other subjects' data was chosen elsewhere."""
    vocabulary = data.vocabulary
    by_split = code_counts(data)
    train = by_split["train"]
    everywhere = np.sum(list(by_split.values()), axis=0)  # [V]
    codes = slice(FIRST_CODE, None)
    least = int(manifest.get("options", {}).get("min_count", 1))
    unseen = int(np.count_nonzero(train[codes] == 0))
    rare = int(np.count_nonzero(train[codes] < least)) - unseen
    wrong = int(np.count_nonzero(vocabulary.counts[FIRST_CODE - 3 :] != train[FIRST_CODE - 3 :]))
    beyond = wrong > 0 and np.array_equal(vocabulary.counts[codes], everywhere[codes])
    if (unseen or rare or beyond) and "like" not in manifest.get("options", {}):
        reasons = [
            *([f"{unseen:,} codes have a row but no event in the train split"] if unseen else []),
            *([f"{rare:,} have fewer than {least} events there, the least for a row"] if rare else []),
            *(["the counts kept with the codes are those of all splits together"] if beyond else []),
        ]
        yield Finding.error(
            "vocabulary-beyond-train",
            f"Of {len(vocabulary) - FIRST_CODE:,} codes: {'; '.join(reasons)}.",
            "The choice of codes knows the tuning and held_out subjects, so results on them are too good.",
            "Fit the vocabulary on the train split alone: run prepare again.",
        )
    elif wrong:
        yield Finding.error(
            "vocabulary-counts-wrong",
            f"The counts of {wrong:,} rows of the vocabulary are not those of the train split.",
            "The unigram baseline and the frequency bands are computed from them.",
            "Run prepare again, into a new folder.",
        )


def check_quantiles(data: SequenceSet, manifest: JsonObject) -> Iterator[Finding]:
    """Quantile bins that are of equal size with other splits added, rather than in the train split.

    Bins fitted on the train split divide its events evenly but for rounding, and the events of more splits
    only about so; bins fitted on more the other way round. The distance from an even division is
    Pearson's chi-square. Where values are tied, drawn (see `event_rules.SAMPLE`) or dropped as duplicates,
    no division is even, nothing can be told, and nothing is said.
    """
    edges: Mapping[str, list[float]] = manifest.get("value_edges", {})
    if not edges or "like" in manifest.get("options", {}):
        return
    by_split = code_counts(data)
    fitted_on = np.array([sum(by_split[name] for name in names) for names in _UNIONS])  # [unions, V]
    options = manifest.get("options", {})
    least = int(options.get("min_count", 1))
    place = {code: row for row, code in enumerate(data.vocabulary.codes)}
    distances, rounding, judged, few = np.zeros(len(_UNIONS)), 0.0, 0, 0
    for code, ends in edges.items():
        bins = len(ends) + 1
        rows = [
            [place[name] for name in (base, *(f"{base}{again}" for again in REPEATS)) if name in place]
            for base in (f"{code}//Q{number + 1}" for number in range(bins))
        ]
        sizes = np.stack([fitted_on[:, row].sum(axis=1) for row in rows], axis=1)  # [unions, bins]
        lost = sum(not row for row in rows)  # bins too rare for a row
        if options.get("duplicates") == "keep":
            few += int(sizes[0].sum() + lost * (least - 1) < bins * least)
        if lost or sizes[0].sum() < _LEAST_PER_BIN * bins:
            continue
        even = sizes.sum(axis=1, keepdims=True) / bins
        distances += ((sizes - even) ** 2 / even).sum(axis=1)
        rounding += bins / float(even.min())  # each bin off by one
        judged += 1
    best = int(np.argmin(distances))
    if few or (judged and distances[best] <= rounding < distances[0] and distances[0] > 4 * distances[best]):
        seen = (
            f"{few:,} codes have bins but too few events in the train split to fit any."
            if few
            else f"The bins of {judged:,} codes divide the events of {' and '.join(_UNIONS[best])} evenly "
            f"(chi-square {distances[best]:.2f}), but not those of train alone ({distances[0]:.2f})."
        )
        yield Finding.error(
            "quantiles-beyond-train",
            seen,
            "Values of tuning and held_out subjects decided what the codes mean.",
            "Fit the quantiles on the train split alone: run prepare again.",
        )


def code_counts(data: SequenceSet) -> dict[str, np.ndarray]:
    """Split -> events of each vocabulary row, int64 ``[V]``."""
    rows = len(data.vocabulary)
    return {name: np.bincount(part.codes, minlength=rows) for name, part in data.splits.items()}


# What preparing left of codes and visits.

_NOTED, _MOST_LOST = 0.1, 0.5
"""Shares of the events from which on what was lost is a warning, and an error."""


def check_unknown_codes(data: SequenceSet) -> Iterator[Finding]:
    """Events that are kept, but whose code is too rare for a row of the vocabulary: all read as [UNK]."""
    shares = {
        name: float(np.mean(part.codes == UNK)) for name, part in data.splits.items() if len(part.codes)
    }
    most = max(shares.values(), default=0.0)
    if most > _NOTED:
        listed = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
        yield Finding(
            "unknown-codes",
            "error" if most > _MOST_LOST else "warning",
            f"Of the events, [UNK] are {listed}.",
            "To a model all these codes are the same one: it can learn nothing from them, and their number "
            "makes it seem better at predicting codes than it is.",
            "Lower prepare's --min_count (or --vocabulary_size's limit), map codes to a coarser level, "
            "prepare more subjects; where train has few and another split many, the splits know different "
            "codes.",
        )


def check_unknown_visits(data: SequenceSet) -> Iterator[Finding]:
    """Events that name no visit, or one that the source does not have; counted when they were prepared."""
    lost = data.counts.changed.get("unknown visit", 0)
    share = lost / max(data.counts.read, 1)
    if share > _NOTED:
        yield Finding.warning(
            "unknown-visits",
            f"{lost:,} of {data.counts.read:,} events that were read name no visit, or one that is unknown.",
            "Their visit is the calendar day: visits fall apart, and what is known at the end of a visit "
            "(delays with =visit) is taken for known on the day.",
            "See that the table of visits is there, of the same export, and has the ids that the events "
            "name.",
        )


# Times: order, ages, life and death.

OLDEST = 120.0
"""Ages above, in years, are taken for mistakes."""
_MUCH = 0.01
"""Share of the events above which those outside of a life are a warning."""


_DAYS_OF_1970 = 100
"""Days around 1970-01-01 in which data lie whose times are of a larger unit than they are taken for."""
_NEARLY_ALL = 0.9
_LONE = 0.01
"""Share of the events at most that may be taken for mistakes of their times."""
_YEARS_APART = 20


def check_times(data: SequenceSet) -> Iterator[Finding]:
    """Data that lie in January 1970 as a whole, and a few events decades from all others."""
    days, events = events_by_day(data.splits)
    if not len(days):
        return
    total = int(events.sum())
    near = int(events[np.abs(days) <= _DAYS_OF_1970].sum())
    if near >= _NEARLY_ALL * total:
        yield Finding.error(
            "times-of-1970",
            f"{near / total:.1%} of the {total:,} events lie within {_DAYS_OF_1970} days of 1970-01-01.",
            "The numbers of the time column are of another unit than its type says, so that years of visits "
            "fall into a few days, and ages are wrong.",
            "Write the times again, as timestamps in the unit that the numbers have, and run prepare again.",
        )
    gaps = np.diff(days) > _YEARS_APART * 365
    before = np.cumsum(events)[:-1]  # events up to each gap
    few = [int(before[gaps & (before <= _LONE * total)].max(initial=0))]
    few.append(int((total - before)[gaps & (total - before <= _LONE * total)].max(initial=0)))
    if sum(few):
        yield Finding.warning(
            "times-far-apart",
            f"{sum(few):,} of {total:,} events lie more than {_YEARS_APART} years from all others (first "
            f"{day_text(days[0])}, last {day_text(days[-1])}).",
            "Such dates are often placeholders or slips of typing; they stretch histories and follow-up.",
            "Mend or leave out such events in the source, and run prepare again.",
        )


_LONGEST_ERA = 120.0
"""Years over which the events of a data set may spread, before its dates are taken for shifted."""
_PAST_TODAY = 0.01
"""Share of the events after today above which they are."""


def shifted_dates(data: SequenceSet) -> str:
    """What says that dates were shifted by subject, as MIMIC's are, in a sentence; empty where nothing does.

    Whoever prepared the data may have said so. Otherwise the events, but for the 0.5 % at either end, spread
    over more years than records are kept for, or many lie in the future.
    """
    if data.preparation is not None and data.preparation.options.get("shifted_dates"):
        return "The data were prepared with --shifted_dates."
    days, events = events_by_day(data.splits)
    if not len(days):
        return ""
    total = events.sum()
    first, last = days[np.searchsorted(np.cumsum(events), np.array([0.005, 0.995]) * total)]
    years = float(last - first) * DAY / YEAR
    future = int(events[days > np.datetime64("today").astype(np.int64)].sum())
    if years > _LONGEST_ERA:
        return f"The events spread over {years:.0f} years ({day_text(first)} to {day_text(last)})."
    if future > _PAST_TODAY * total:
        return f"{future:,} of {total:,} events lie in the future (the last on {day_text(days[-1])})."
    return ""


def check_calendar(data: SequenceSet) -> Iterator[Finding]:
    """Dates that were shifted by subject, so that the calendar says nothing."""
    if seen := shifted_dates(data):
        yield Finding.warning("shifted-dates", seen, SHIFTED_WHY, SHIFTED_MEND)


def check_ages(data: SequenceSet) -> Iterator[Finding]:
    """Order of the events, ages out of range, and ages that do not fit the times."""
    tokens = unordered = below = above = off = subjects = 0
    for part in data.splits.values():
        if not len(part):
            continue
        steps = np.diff(part.times)
        steps[part.offsets[1:-1] - 1] = 0  # from one subject to the next
        unordered += int(np.count_nonzero(steps < 0))
        below += int(np.count_nonzero(part.ages < 0))
        above += int(np.count_nonzero(part.ages > OLDEST))
        births = part.times - part.ages.astype(np.float64) * YEAR  # [T]
        starts = part.offsets[:-1]
        spread = np.maximum.reduceat(births, starts) - np.minimum.reduceat(births, starts)
        off += int(np.count_nonzero(spread > DAY))
        tokens += len(part.codes)
        subjects += len(part)
    if unordered:
        yield Finding.error(
            "events-out-of-order",
            f"{unordered:,} of {tokens:,} events come before the one listed ahead of them.",
            "What lies before a prediction time cannot be told, and positions mean nothing.",
            "Run prepare again, which sorts each history by time.",
        )
    if below:
        yield Finding.error(
            "events-before-birth",
            f"{below:,} of {tokens:,} events have a negative age.",
            "They belong to someone else, or the birth is wrong.",
            "Mend the births in the source, and run prepare again, which drops and counts such events.",
        )
    if above:
        yield Finding.warning(
            "age-implausible",
            f"{above:,} of {tokens:,} events have an age above {OLDEST:.0f} years.",
            "A placeholder for an unknown birth is likely, and the age embedding learns it.",
            "Mend the births in the source, or leave such subjects out.",
        )
    if placeholders := data.counts.changed.get(PLACEHOLDER_BIRTH):
        yield Finding.warning(
            "placeholder-births",
            f"{placeholders:,} subjects are born on a day such as 1900-01-01, and have no other birth.",
            "Such a day often stands for an unknown birth, and ages are then wrong by decades.",
            "Leave the births out where they are unknown, and see --births and --without_birth of prepare.",
        )
    if off:
        yield Finding.error(
            "ages-against-times",
            f"In {off:,} of {subjects:,} subjects, age and time of the events give births more than a day "
            "apart.",
            "Ages or times were computed wrongly, as when months are added to years.",
            "Compute the age as time minus birth: run prepare again.",
        )


def check_deaths(data: SequenceSet, death_codes: tuple[str, ...]) -> Iterator[Finding]:
    """Events after a code of death, and what preparing dropped because it lay outside of a life."""
    is_death = matching_codes(data.vocabulary, death_codes, "--death_codes")
    late = dead = 0
    for part in data.splits.values():
        if not len(part):
            continue
        never = np.iinfo(np.int64).max
        at = np.where(is_death[part.codes], part.times // DAY, never)
        first = np.minimum.reduceat(at, part.offsets[:-1])  # [S]
        late += int(np.count_nonzero(part.times // DAY > np.repeat(first, part.lengths)))
        dead += int(np.count_nonzero(first < never))
    named = ", ".join(code for code, death in zip(data.vocabulary.codes, is_death, strict=True) if death)
    if late:
        yield Finding.error(
            "events-after-death",
            f"{late:,} events lie on a later day than a code of death ({named}) of their subject.",
            "Records written after a death tell of it, and belong to no prediction.",
            "Write the death as MEDS_DEATH, so that prepare drops what follows it.",
        )
    elif dead:
        yield Finding.info(
            "death-among-codes",
            f"{named} says of {dead:,} subjects that they died, and is among the inputs.",
            "Where the label is about death, it is the outcome in disguise.",
            "Leave it out with exclude_codes for such labels.",
        )
    dropped = {rule: data.counts.dropped.get(rule, 0) for rule in ("before birth", "after death", "no birth")}
    lost = sum(dropped.values())
    if lost:
        share = lost / (lost + sum(len(part.codes) for part in data.splits.values()))
        rules = ", ".join(f"{rule}: {count:,}" for rule, count in dropped.items() if count)
        yield Finding(
            "events-outside-life",
            "warning" if share > _MUCH else "info",
            f"Preparing dropped {lost:,} events ({share:.1%}) that lay outside of a known life ({rules}).",
            "Many of them mean that births, deaths or clocks are wrong, also where nothing was dropped.",
            "Look at the births and deaths of the source.",
        )


# Visits: codes that are stamped at their end, and repeated codes.

_LEAST_VISITS = 20
_MOST = 0.9  # of the visits of a family, and of the other events of a visit


def check_visit_ends(data: SequenceSet) -> Iterator[Finding]:
    """Families of codes (by `event_rules.code_prefix`) that close their visits, as billing codes do.

    A family closes a visit if all its events have one time, by which most others of the visit are past.
    Only stays of a day and more count, so visits need ids: what is done last in a consultation is no sign.
    """
    families, family_of = np.unique(
        [code_prefix(code) for code in data.vocabulary.codes], return_inverse=True
    )
    visits = np.zeros(len(families), np.int64)  # stays in which it is among others
    closed = visits.copy()
    chance = np.zeros(len(families))  # logarithm, that a random order closes all of those
    for part in data.splits.values():
        if len(part):
            _add_visit_ends(part, family_of, visits, closed, chance)
    alarm = (visits >= _LEAST_VISITS) & (closed >= _MOST * visits)
    alarm &= chance < np.log(0.01 / len(families))
    # What is called a discharge belongs there.
    alarm &= np.array(["DISCHARGE" not in family.upper() for family in families.tolist()])
    alarm[family_of[:FIRST_CODE]] = False
    for row in np.flatnonzero(alarm):
        yield Finding.warning(
            "stamped-at-visit-end",
            f"{families[row]} codes come all at once at the end of {closed[row]:,} of {visits[row]:,} visits "
            "of a day or more.",
            "They look written at discharge: during the visit they are not known, though other sources date "
            "them at its beginning.",
            "Predict before or after the whole visit, and say with delays when they are known.",
        )


def _add_visit_ends(
    part: Sequences, family_of: np.ndarray, visits: np.ndarray, closed: np.ndarray, chance: np.ndarray
) -> None:
    """Add the visits of one split to the counts of each family, ``[families]``."""
    visit = part.numbered_visits()  # [T]
    order = np.lexsort([part.times, family_of[part.codes], visit])
    by_visit, family, time = visit[order], family_of[part.codes][order], part.times[order]
    first = np.flatnonzero(leads([by_visit, family]))  # of each family in each visit
    size = np.diff(first, append=len(order))
    at, family, begin, end = by_visit[first], family[first], time[first], time[first + size - 1]

    order = np.lexsort([part.times, visit])
    time, by_visit = part.times[order], visit[order]
    starts = np.searchsorted(by_visit, at)
    stops = np.searchsorted(by_visit, at, side="right")
    distinct = np.bincount(by_visit[leads([by_visit, time])])[at]  # times of the visit
    others = stops - starts - size
    past = place_in(time, starts, stops, end, inclusive=True) - starts - size
    span = time[stops - 1] - time[starts]
    counted = (others > 0) & (span >= DAY)
    closes = counted & (begin == end) & (past >= _MOST * others)
    visits += np.bincount(family[counted], minlength=len(visits))
    closed += np.bincount(family[closes], minlength=len(visits))
    likely = np.log(np.minimum(1 / distinct[closes] + 1 - _MOST, 1))
    chance += np.bincount(family[closes], likely, minlength=len(visits))


def check_repeats(data: SequenceSet) -> Iterator[Finding]:
    """Codes of a visit that the subject already had in an earlier one."""
    later = repeats = 0
    for part in data.splits.values():
        codes = part.codes >= FIRST_CODE
        subject = np.repeat(np.arange(len(part)), part.lengths)[codes]
        code, visit = part.codes[codes], part.visits[codes]
        order = np.lexsort([visit, code, subject])
        subject, code, visit = subject[order], code[order], visit[order]
        new = leads([subject, code])  # a code of a subject
        counted = leads([subject, code, visit]) & (visit > 0)
        later += int(np.count_nonzero(counted))
        repeats += int(np.count_nonzero(counted & ~new))
    if later:
        yield Finding.info(
            "repeated-codes",
            f"{repeats / later:.1%} of the {later:,} codes of visits after the first are repeats of the "
            "subject's earlier codes.",
            "Repeats are easy, and hide how well new codes are predicted.",
            "Report metrics of new and of repeated codes apart.",
        )

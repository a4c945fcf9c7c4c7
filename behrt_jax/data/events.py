"""Events in the shape of the Medical Event Data Standard: the one interchange between sources and sequences.

An events table is a :class:`pyarrow.Table` with the columns

- ``subject_id``: int64, never null;
- ``time``: timestamp in microseconds, null for static facts (sex, ...);
- ``code``: dictionary of strings with int32 indices, never null;
- ``numeric_value``: float32, null where there is none;
- ``visit_id``: int64, optional column; null where an event belongs to no visit.

Source: the MEDS schema 0.4, https://github.com/Medical-Event-Data-Standard/meds.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

BIRTH_CODE = "MEDS_BIRTH"
DEATH_CODE = "MEDS_DEATH"
SPLITS = ("train", "tuning", "held_out")
DAY = 86_400_000_000
"""Microseconds in a day."""
YEAR = 365.25 * DAY
"""Microseconds in a year."""

EVENT_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("us")),
        pa.field("code", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("numeric_value", pa.float32()),
    ]
)
VISIT_FIELD = pa.field("visit_id", pa.int64())


@dataclass
class EventCounts:
    """Events that came in, and those that each rule dropped or changed; filled along the way."""

    read: int = 0
    """Events read from the source."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rule -> events it dropped. ``read`` equals the events kept plus all of these."""
    changed: dict[str, int] = field(default_factory=dict)
    """Rule -> events kept but changed (a rare code that became [UNK], ...)."""

    def drop(self, rule: str, events: int) -> None:
        """Count events that a rule dropped; a rule that dropped none leaves no row."""
        if events:
            self.dropped[rule] = self.dropped.get(rule, 0) + int(events)

    def move(self, rule: str, other: str, events: int) -> None:
        """Count as dropped by another rule what one has counted."""
        if events:
            self.dropped[rule] -= events
            if not self.dropped[rule]:
                del self.dropped[rule]
            self.drop(other, events)

    def change(self, rule: str, events: int) -> None:
        """Count events that a rule changed but kept."""
        if events:
            self.changed[rule] = self.changed.get(rule, 0) + int(events)

    @property
    def kept(self) -> int:
        """Events left after every rule so far."""
        return self.read - sum(self.dropped.values())


@dataclass(frozen=True)
class EventSet:
    """All events of a data set with its split of the subjects."""

    source: str
    """Name of the source: clinical, uniform, meds."""
    events: pa.Table
    """Table as described in this module's docstring, in any row order."""
    splits: dict[str, np.ndarray]
    """Split name -> int64 subject ids, each subject in one split at most."""
    counts: EventCounts
    """``counts.read`` is set by the source, with what it had to drop itself (null codes, ...)."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """Code -> text, where the source has any."""
    declared_codes: tuple[str, ...] | None = None
    """Codes that the source can emit, where it is known beforehand (generators): they all get a row
    in the vocabulary, whether or not they occur."""


@dataclass(frozen=True, eq=False)
class SubjectTimes:
    """A time of each of some subjects, as of birth or death; by default of none."""

    subject_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 ``[subjects]``, ascending."""
    times: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 ``[subjects]``, microseconds since 1970."""

    def __len__(self) -> int:
        return len(self.subject_ids)

    def of(self, chosen: np.ndarray) -> "SubjectTimes":
        """Those of some of the subjects, bool ``[subjects]``."""
        return SubjectTimes(self.subject_ids[chosen], self.times[chosen])


# The same events as plain arrays, which the rules work on.


@dataclass(frozen=True, eq=False)
class EventColumns:
    """Events in any row order, as arrays ``[events]``."""

    subject_ids: np.ndarray
    """int64."""
    codes: np.ndarray
    """int32 places in ``names``."""
    times: np.ndarray
    """int64 microseconds since 1970, 0 where null."""
    names: Sequence[str]
    """Distinct codes, ascending, so that places sort as the codes do."""
    timed: np.ndarray | None = None
    """bool: the time is not null. None where all are so."""
    visits: np.ndarray | None = None
    """int64 visit ids, anything where there is none. None where no event has one."""
    named: np.ndarray | None = None
    """bool: the event has a visit id. Given with ``visits``."""

    def of_code(self, name: str) -> np.ndarray:
        """The events with a code: bool ``[events]``."""
        place = bisect.bisect_left(self.names, name)
        if place == len(self.names) or self.names[place] != name:
            return np.zeros(len(self.codes), bool)
        return self.codes == place


def event_columns(events: pa.Table) -> EventColumns:
    """The columns of an events table, with the codes' names sorted."""
    code = events["code"].combine_chunks()
    given = code.dictionary.to_pylist()
    names = sorted(set(given))
    place = {name: index for index, name in enumerate(names)}
    lookup = np.array([place[name] for name in given], np.int32)
    time = events["time"].cast(pa.int64())
    visits = named = None
    if "visit_id" in events.column_names and events["visit_id"].null_count < events.num_rows:
        named = events["visit_id"].is_valid().to_numpy()
        visits = events["visit_id"].fill_null(0).to_numpy()
    return EventColumns(
        subject_ids=events["subject_id"].to_numpy(),
        codes=lookup[code.indices.to_numpy()],
        times=time.fill_null(0).to_numpy(),
        names=names,
        timed=time.is_valid().to_numpy() if time.null_count else None,
        visits=visits,
        named=named,
    )

"""Events in the shape of the Medical Event Data Standard: the one interchange between sources and sequences.

An events table is a :class:`pyarrow.Table` with the columns

- ``subject_id``: int64, never null;
- ``time``: timestamp in microseconds, null for static facts (sex, ...);
- ``code``: dictionary of strings with int32 indices, never null;
- ``numeric_value``: float32, null where there is none;
- ``visit_id``: int64, optional column; null where an event belongs to no visit.

Source: the MEDS schema 0.4, https://github.com/Medical-Event-Data-Standard/meds.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

BIRTH_CODE = "MEDS_BIRTH"
DEATH_CODE = "MEDS_DEATH"
SPLITS = ("train", "tuning", "held_out")

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
    """What came in, and one row per rule that dropped or changed an event; filled along the way."""

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

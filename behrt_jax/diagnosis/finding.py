"""A finding: what was seen, why it matters and what to do."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeGuard, get_args

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""From grave to harmless. An error makes results wrong or useless; an info is no alarm."""
COLUMNS = ("severity", "id", "seen", "why", "mend")
"""Of the table of findings."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    id: str
    """Stable name of the check, such as ``frozen-at-random``."""
    severity: Severity
    seen: str
    """What was seen, with its figures; no subject ids and no events."""
    why: str
    """Why it matters."""
    mend: str
    """What to do."""
    when: str = ""
    """Part of the run that it is about: ``before``, ``during`` or ``after``; empty for data."""


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then infos; else in the order given."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def has_error(findings: Iterable[Finding]) -> bool:
    """Whether one of them is an error."""
    return any(finding.severity == "error" for finding in findings)


def table_rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Rows of :data:`COLUMNS`, errors first."""
    return [
        (finding.severity, finding.id, finding.seen, finding.why, finding.mend)
        for finding in by_severity(findings)
    ]


def to_json(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """As dicts, errors first, ready for JSON."""
    return [asdict(finding) for finding in by_severity(findings)]


def from_json(values: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Inverse of :func:`to_json`; keys of newer versions are left out."""
    names = {field.name for field in fields(Finding)}
    return [Finding(**{key: value for key, value in entry.items() if key in names}) for entry in values]


def one_line(finding: Finding) -> str:
    """For the console: severity, id and what was seen; with why and what to do, unless it is an info."""
    advice = "" if finding.severity == "info" else f" {finding.why} {finding.mend}"
    return f"{finding.severity.capitalize()} [{finding.id}]: {finding.seen}{advice}"


def summary_line(findings: Iterable[Finding]) -> str:
    """How many of each severity: ``1 error, 2 warnings, 0 infos``."""
    counts = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        counts[finding.severity] += 1
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a figure is known: a number, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)

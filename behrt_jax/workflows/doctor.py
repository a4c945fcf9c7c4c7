"""Examine a run folder, of a run finished or not."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from behrt_jax.config import DoctorConfig
from behrt_jax.data.labels import read_labels
from behrt_jax.data.prepared import read_manifest, read_prepared
from behrt_jax.diagnosis.doctor import RunRecord, examine, examine_before, examine_during, read_run
from behrt_jax.diagnosis.finding import (
    Finding,
    by_severity,
    has_error,
    one_line,
    summary_line,
    table_rows,
    to_json,
)
from behrt_jax.diagnosis.leakage import audit
from behrt_jax.errors import InputError
from behrt_jax.files import write_json
from behrt_jax.run_folder import read_metrics
from behrt_jax.tracking.console import Console, open_console


def examine_folder(config: DoctorConfig) -> list[Finding]:
    """Examine the run, or audit the prepared data, that ``config`` names; what was found, errors first.

    Raises:
        InputError: neither or both are named, labels without data, or what the two examinations raise.
    """
    if (config.run is None) == (config.data is None):
        raise InputError("Give either --run RUN or --data DIR.")
    if config.labels is not None and config.data is None:
        raise InputError("--labels are audited with the data that they belong to: add --data DIR.")
    return audit_data(config) if config.run is None else examine_run(config)


def examine_run(config: DoctorConfig) -> list[Finding]:
    """Make every check on the run in ``config.run``, show what was found, and write it to ``config.output``.

    Raises:
        InputError: no run is there, or one of its files is broken.
    """
    assert config.run is not None
    findings = examine(read_run(config.run))
    show(f"Run {config.run}", findings)
    if config.output is not None:
        write_findings(config.output, "run", config.run, findings)
    return findings


def show(subject: str, findings: Sequence[Finding]) -> None:
    """Show findings on the console, errors first."""
    with open_console() as console:
        if findings:
            rows = table_rows(findings)
            console.table(f"{subject}: findings", ("severity", "id", "seen"), [row[:3] for row in rows])
            console.table(
                "Why and what to do", ("id", "why", "what to do"), [row[1:2] + row[3:] for row in rows]
            )
        console.log(f"{subject}: {summary_line(findings)}.")


def write_findings(path: Path, kind: str, examined: Path, findings: Sequence[Finding]) -> None:
    """Write ``{kind: folder, "errors": bool, "findings": [...]}``, errors first; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {kind: examined, "errors": has_error(findings), "findings": to_json(findings)})


# The leakage audit of prepared data and labels, on the console and as JSON.


def audit_data(config: DoctorConfig) -> list[Finding]:
    """Audit the folder ``config.data``, with ``config.labels`` if given; show and write what was found.

    Returns:
        The findings, errors first.

    Raises:
        InputError: no folder of prepared data, labels that cannot be read, or a wrong option.
    """
    if config.data is None:
        raise InputError("--data is missing: give the folder that prepare wrote.")
    data, manifest = read_prepared(config.data), read_manifest(config.data)
    labels = None if config.labels is None else read_labels(config.labels, as_written=True)
    findings = by_severity(audit(data, manifest, labels, config))
    subjects = sum(len(part) for part in data.splits.values())
    about = "" if labels is None else f" and {len(labels):,} labels"
    show(f"{config.data}, {subjects:,} subjects{about}", findings)
    if config.output is not None:
        write_findings(config.output, "data", config.data, findings)
    return findings


# The doctor beside a running training: each finding is shown when it is found, once.

GROWTH = 1.1
"""The metrics are looked at again when there are this many times more: the cost stays linear."""


@dataclass
class Examination:
    """Findings of one run."""

    console: Console
    run: RunRecord
    metrics_path: Path
    _shown: set[str] = field(default_factory=set)
    _records: int = 0

    def before(self) -> None:
        """Make the checks that need no training."""
        self._show(examine_before(self.run))

    def during(self, lines: int) -> None:
        """Make the checks of the metrics so far, unless hardly any of the `lines` are new."""
        if lines >= GROWTH * self._records:
            self._records = lines
            self._show(examine_during(replace(self.run, metrics=read_metrics(self.metrics_path))))

    def after(self, summary: dict[str, Any]) -> list[dict[str, Any]]:
        """Make every check; all findings of the run, errors first, as JSON."""
        found = examine(replace(self.run, metrics=read_metrics(self.metrics_path), summary=summary))
        self._show(found)
        return to_json(found)

    def _show(self, findings: list[Finding]) -> None:
        for finding in findings:
            if finding.id not in self._shown:
                self._shown.add(finding.id)
                self.console.log(one_line(finding))

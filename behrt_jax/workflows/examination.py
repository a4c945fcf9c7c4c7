"""The doctor beside a running training: each finding is shown when it is found, once."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from behrt_jax.diagnosis.doctor import RunRecord, examine, examine_before, examine_during
from behrt_jax.diagnosis.finding import Finding, one_line, to_json
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.run_folder import read_metrics

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

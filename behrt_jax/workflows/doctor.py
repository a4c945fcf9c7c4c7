"""The doctor: all checks of a run folder, of a training that goes on, or of prepared data and labels.

A check stands with others of its kind in `behrt_jax.diagnosis`, where the list of its file names it; here
they are made together, shown and written. JAX is not needed.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax.config.commands import DoctorConfig
from behrt_jax.data.events import SPLITS
from behrt_jax.data.examples import parse_delay
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.prepared import read_deaths, read_facts, read_manifest, read_prepared
from behrt_jax.diagnosis import finding
from behrt_jax.diagnosis.after import check_after
from behrt_jax.diagnosis.before import check_before
from behrt_jax.diagnosis.during import check_during
from behrt_jax.diagnosis.finding import Facts, Finding, RunRecord, by_severity, read_run
from behrt_jax.diagnosis.finetuning import check_finetuned, check_labelled
from behrt_jax.diagnosis.leakage_codes import check_codes, check_facts
from behrt_jax.diagnosis.leakage_data import check_data
from behrt_jax.diagnosis.leakage_labels import NO_DEATHS, Deaths, check_labels, place_labels
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, write_json
from behrt_jax.run_folder import read_metrics
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.tracking.summary import Summary

# A run: examined in its folder, finished or not, and while it trains.


def examine_folder(config: DoctorConfig) -> list[Finding]:
    """Examine the run, or audit the prepared data, that ``config`` names; what was found, errors first.

    Raises:
        InputError: neither or both are named, labels without data, or what the two examinations raise.
    """
    if (config.run is None) == (config.data is None):
        raise InputError("Give either --run RUN or --data DIR.")
    if config.labels is not None and config.data is None:
        raise InputError("--labels are audited with the data that they belong to: add --data DIR.")
    if config.output is not None and config.output.is_dir():
        raise InputError(f"--output: {config.output} is a folder: give a file.")
    return audit_data(config) if config.run is None else examine_run(config)


def examine_run(config: DoctorConfig) -> list[Finding]:
    """Make every check on the run in ``config.run``, show what was found, and write it to ``config.output``.

    Raises:
        InputError: no run is there, or one of its files is broken.
    """
    assert config.run is not None
    findings = examine(read_run(config.run))
    return _told(config, findings, "run", config.run, f"Run {config.run}")


def examine(run: RunRecord) -> list[Finding]:
    """Every check before, during and after; errors first.

    Findings that the summary holds and that cannot be made again from the files are kept.
    """
    found = [*examine_before(run), *examine_during(run)]
    if run.summary:
        found += [replace(one, when="after") for one in (*check_after(run), *check_finetuned(run))]
    ids = {one.id for one in found}
    # Older folders lack the facts that the checks before training need.
    stored = finding.from_json(run.summary.get("findings") or []) if run.facts == Facts() else []
    return by_severity([*found, *(one for one in stored if one.id not in ids)])


def examine_before(run: RunRecord) -> list[Finding]:
    """The checks that need no training."""
    return [replace(one, when="before") for one in (*check_before(run), *check_labelled(run))]


def examine_during(run: RunRecord) -> list[Finding]:
    """The checks of the metrics so far."""
    return [replace(one, when="during") for one in check_during(run)]


GROWTH = 1.1
"""The metrics are looked at again when there are this many times more: the cost stays linear."""


@dataclass
class Examination:
    """The doctor beside a running training: each finding is shown when it is found, once."""

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

    def after(self, summary: Summary) -> list[JsonObject]:
        """Make every check; all findings of the run, errors first, as JSON."""
        found = examine(replace(self.run, metrics=read_metrics(self.metrics_path), summary=summary))
        self._show(found)
        return finding.to_json(found)

    def _show(self, findings: list[Finding]) -> None:
        for one in findings:
            if one.id not in self._shown:
                self._shown.add(one.id)
                self.console.log(finding.one_line(one))


# The leakage audit: what in prepared data and labels would make results too good, or wrong.


def audit_data(config: DoctorConfig) -> list[Finding]:
    """Audit the folder ``config.data``, with ``config.labels`` if given; show and write what was found.

    Returns:
        The findings, errors first.

    Raises:
        InputError: no folder of prepared data, labels that cannot be read, or a wrong option.
    """
    if config.data is None:
        raise InputError("--data is missing: give the folder that prepare wrote.")
    data, manifest = read_prepared(config.data, verify=True), read_manifest(config.data)
    labels = None if config.labels is None else read_labels(config.labels, as_written=True)
    _check_options(labels, config)
    found = list(check_data(data, manifest, config.death_codes))
    if labels is not None:
        deaths = _deaths(config.data)
        placed = place_labels(labels, data, deaths)
        found += check_labels(labels, data, placed, manifest, config, deaths)
        if labels.positive() is not None:
            delays = config.delays or tuple(manifest["options"].get("delays", ()))
            found += check_codes(placed, data.vocabulary, config, delays)
            found += check_facts(placed, read_facts(config.data), config)
    findings = by_severity(found)
    subjects = sum(len(part) for part in data.splits.values())
    about = "" if labels is None else f" and {len(labels):,} labels"
    return _told(config, findings, "data", config.data, f"{config.data}, {subjects:,} subjects{about}")


def _deaths(folder: Path) -> Deaths:
    """Deaths of all splits; none where an older version, which did not keep them, prepared the folder."""
    tables = [table for name in SPLITS if (table := read_deaths(folder, name)) is not None]
    if not tables:
        return NO_DEATHS
    joined = pa.concat_tables(tables)
    ids, first = np.unique(joined["subject_id"].to_numpy(), return_index=True)
    return Deaths(ids, joined["time"].cast(pa.int64()).to_numpy()[first])


def _check_options(labels: Labels | None, config: DoctorConfig) -> None:
    if config.horizon_days is not None and not 0 < config.horizon_days < 1e6:
        raise InputError(f"--horizon_days is {config.horizon_days:g}: give a number of days above 0.")
    for option in config.delays:
        parse_delay(option)
    if labels is None:
        for option in ("horizon_days", "outcome_codes", "delays"):
            if getattr(config, option):
                raise InputError(f"--{option} has no effect without labels: add --labels FILE.")


def _told(
    config: DoctorConfig, findings: list[Finding], kind: str, examined: Path, subject: str
) -> list[Finding]:
    """Show findings, and write ``{kind: folder, "errors": bool, "findings": [...]}`` where that is asked."""
    with open_console() as console:
        if findings:
            rows = finding.table_rows(findings)
            console.table(f"{subject}: findings", ("severity", "id", "seen"), [row[:3] for row in rows])
            advice = [row[1:2] + row[3:] for row in rows]
            console.table("Why and what to do", ("id", "why", "what to do"), advice)
        console.log(f"{subject}: {finding.summary_line(findings)}.")

    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        found = {"errors": finding.has_error(findings), "findings": finding.to_json(findings)}
        write_json(config.output, {kind: examined, **found})
    return findings

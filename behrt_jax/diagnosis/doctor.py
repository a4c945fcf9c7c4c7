"""All checks of a training run, on what its folder holds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from behrt_jax.diagnosis.after import check_after
from behrt_jax.diagnosis.before import check_before
from behrt_jax.diagnosis.during import check_during
from behrt_jax.diagnosis.finding import Finding, by_severity, from_json
from behrt_jax.errors import InputError
from behrt_jax.files import read_json
from behrt_jax.run_folder import CONFIG_FILE, METRICS_FILE, PARAMETERS_FILE, SUMMARY_FILE, read_metrics


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run; parts that are not there yet are empty, and not checked."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as nested dicts, ``settings`` in config.json."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The parameter report."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What only the running process could see, ``facts`` in config.json."""
    baselines: Mapping[str, Any] = field(default_factory=dict)
    """Name -> figures."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Records of metrics.jsonl."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Empty while the run goes on."""


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, of a run finished or not.

    Raises:
        InputError: no run is there, or one of its files is broken.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} holds no run ({CONFIG_FILE} is not there): give the --output of one.")
    config, parameters, summary = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in (CONFIG_FILE, PARAMETERS_FILE, SUMMARY_FILE)
    )
    return RunRecord(
        config.get("settings") or {},
        parameters,
        config.get("facts") or {},
        summary.get("baselines") or config.get("baselines") or {},
        read_metrics(folder / METRICS_FILE),
        summary,
    )


def examine(run: RunRecord) -> list[Finding]:
    """Every check before, during and after; errors first.

    Findings that the summary holds and that cannot be made again from the files are kept.
    """
    found = [*examine_before(run), *examine_during(run), *examine_after(run)]
    ids = {finding.id for finding in found}
    # Older folders lack the facts that the checks before training need.
    stored = [] if run.facts else from_json(run.summary.get("findings") or [])
    return by_severity([*found, *(finding for finding in stored if finding.id not in ids)])


def examine_before(run: RunRecord) -> list[Finding]:
    """The checks that need no training."""
    found = check_before(run.settings, run.parameters, run.facts, run.baselines)
    return _at("before", found)


def examine_during(run: RunRecord) -> list[Finding]:
    """The checks of the metrics so far."""
    stop_reason = run.summary.get("stop_reason") or ""
    return _at("during", check_during(run.settings, run.facts, run.baselines, run.metrics, stop_reason))


def examine_after(run: RunRecord) -> list[Finding]:
    """The checks of what came out; none while there is no summary."""
    return _at("after", check_after(run.settings, run.summary, run.metrics)) if run.summary else []


def _at(when: Literal["before", "during", "after"], findings: Iterable[Finding]) -> list[Finding]:
    return [replace(finding, when=when) for finding in findings]

"""Examine a run folder, of a run finished or not."""

from collections.abc import Sequence
from pathlib import Path

from behrt_jax.config import DoctorConfig
from behrt_jax.diagnosis.doctor import examine, read_run
from behrt_jax.diagnosis.finding import Finding, has_error, summary_line, table_rows, to_json
from behrt_jax.tracking.console import open_console
from behrt_jax.tracking.run_folder import write_json


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

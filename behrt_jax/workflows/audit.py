"""The leakage audit of prepared data and labels, on the console and as JSON."""

from behrt_jax.config import DoctorConfig
from behrt_jax.data.labels import read_labels
from behrt_jax.data.store import read_manifest, read_prepared
from behrt_jax.diagnosis.finding import Finding, by_severity
from behrt_jax.diagnosis.leakage import audit
from behrt_jax.errors import InputError
from behrt_jax.workflows.doctor import show, write_findings


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

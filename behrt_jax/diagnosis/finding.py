"""Findings of the doctor, and the record of a run that its checks are made on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args

from behrt_jax import run_folder
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, from_stored
from behrt_jax.tracking.summary import Baselines, Summary

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""From grave to harmless."""


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

    @classmethod
    def error(cls, id: str, seen: str, why: str, mend: str) -> Self:
        """What makes results wrong or useless."""
        return cls(id, "error", seen, why, mend)

    @classmethod
    def warning(cls, id: str, seen: str, why: str, mend: str) -> Self:
        """What makes them worse, or doubtful."""
        return cls(id, "warning", seen, why, mend)

    @classmethod
    def info(cls, id: str, seen: str, why: str, mend: str) -> Self:
        """No alarm."""
        return cls(id, "info", seen, why, mend)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then infos; else in the order given."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def has_error(findings: Iterable[Finding]) -> bool:
    """True where one of them is an error."""
    return any(finding.severity == "error" for finding in findings)


def table_rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Severity, id, what was seen, why and what to do, errors first."""
    return [(one.severity, one.id, one.seen, one.why, one.mend) for one in by_severity(findings)]


def to_json(findings: Iterable[Finding]) -> list[JsonObject]:
    """As dicts, errors first, ready for JSON."""
    return [asdict(finding) for finding in by_severity(findings)]


def from_json(values: Iterable[JsonObject]) -> list[Finding]:
    """Inverse of :func:`to_json`; keys of newer versions are left out."""
    return [from_stored(Finding, entry) for entry in values]


def one_line(finding: Finding) -> str:
    """For the console: severity, id and what was seen; with why and what to do, unless it is an info."""
    advice = "" if finding.severity == "info" else f" {finding.why} {finding.mend}"
    return f"{finding.severity.capitalize()} [{finding.id}]: {finding.seen}{advice}"


def summary_line(findings: Iterable[Finding]) -> str:
    """Counts by severity: ``1 error, 2 warnings, 0 infos``."""
    counts = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        counts[finding.severity] += 1
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())


# Of dates that were shifted by subject, found in prepared data and before a run alike.

SHIFTED_WHY = (
    "Dates look shifted by subject, as is done to hide who they are: the calendar time of an event means "
    "nothing, and only times between a subject's events do."
)
SHIFTED_MEND = (
    "Give the model --model.time gaps in place of time2vec; prepare --shifted_dates says so of data in which "
    "it cannot be seen."
)


@dataclass(frozen=True)
class Facts:
    """Figures that only the process with data and model at hand can see: ``facts`` in config.json.

    Those that are not known, as in a run of an older version, are None or empty.
    """

    codes: int | None = None
    """Rows of the vocabulary that are codes."""
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    tokens_per_step: float | None = None
    """Without padding."""
    row_length: int | None = None
    validation_subjects: int | None = None
    unseen_share: float | None = None
    """Of validation events, those whose code the train split hardly or never has."""
    cut_share: float | None = None
    """Of train tokens, those past the first `row_length` of their history."""
    beyond_tables: Mapping[str, float] = field(default_factory=dict)
    """Shares of events that share the row at the end of a table: by ``ages`` above, ``before_birth``,
    ``visits`` and ``positions`` (where those count visits)."""
    unreached_adapters: Sequence[str] = ()
    """Names of adapter leaves that the prediction does not depend on."""
    vectors: Mapping[str, Any] = field(default_factory=dict)
    """Coverage of `init.vectors`, see `weights.code_vectors.FirstRows`."""
    micro_batches: int | None = None
    """Parts of a batch that a step computes one after the other."""
    shifted_dates: str = ""
    """What says that dates were shifted by subject, in a sentence."""


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a run; parts that are not there yet are empty, and not checked."""

    settings: JsonObject = field(default_factory=dict)
    """The configuration as nested dicts, ``settings`` in config.json."""
    parameters: JsonObject = field(default_factory=dict)
    """The parameter report, parameters.json."""
    facts: Facts = field(default_factory=Facts)
    baselines: Baselines = field(default_factory=dict)
    metrics: run_folder.Records = ()
    summary: Summary = field(default_factory=Summary)
    """Empty while the run goes on."""
    data: JsonObject = field(default_factory=dict)
    """What is in the splits: ``data`` in config.json."""

    def setting(self, section: str, name: str) -> Any:
        """A setting of a section; None where it is not known."""
        found = self.settings.get(section)  # in a fine-tuning run, data and init are paths
        return found.get(name) if isinstance(found, Mapping) else None

    @property
    def finetunes(self) -> bool:
        """Whether this is a fine-tuning run."""
        return "task" in self.settings

    def option(self, name: str) -> str:
        """How to give a setting (of a pretraining run) where it has an effect in this run."""
        section, _, field_name = name.partition(".")
        if section == "data" and self.setting("data", "source") == "prepared":
            return f"prepare's --{field_name}"
        if self.finetunes and section in ("init", "model"):
            return "--init" if section == "init" else f"--{field_name}"
        if section == "model" and field_name != "dropout" and self.setting("init", "run"):
            return f"--{name} (and pretrain the run of --init.run with it)"
        return f"--{name}"

    def baseline(self, name: str, figure: str) -> Any:
        """A figure of a baseline; None where it is not known."""
        return (self.baselines.get(name) or {}).get(figure)

    @cached_property
    def trainings(self) -> list[JsonObject]:
        """Records of the train split."""
        return run_folder.of_split(self.metrics, "train")

    @cached_property
    def validations(self) -> list[JsonObject]:
        """Records of the tuning split."""
        return run_folder.of_split(self.metrics, "tuning")

    def warmup_steps(self, total: int) -> int:
        """Steps of the warm-up, of `total`."""
        return round((self.setting("optimizer", "warmup_fraction") or 0.0) * total)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, of a run finished or not.

    Raises:
        InputError: no run is there, or one of its files is broken.
    """
    if not (folder / run_folder.CONFIG_FILE).is_file():
        raise InputError(
            f"{folder} holds no run ({run_folder.CONFIG_FILE} is not there): give the --output of one."
        )
    config, parameters, summary = (
        run_folder.read_document(folder, name) if run_folder.checked(folder, name).is_file() else {}
        for name in (run_folder.CONFIG_FILE, run_folder.PARAMETERS_FILE, run_folder.SUMMARY_FILE)
    )
    if "format" in config:
        raise InputError(f"{folder} is an exported model, no run: give the run that it was exported from.")
    facts = {name: value for name, value in (config.get("facts") or {}).items() if value is not None}
    return RunRecord(
        config.get("settings") or {},
        parameters,
        from_stored(Facts, facts),
        summary.get("baselines") or config.get("baselines") or {},
        run_folder.read_metrics(folder / run_folder.METRICS_FILE),
        Summary(**summary),
        config.get("data") or {},
    )

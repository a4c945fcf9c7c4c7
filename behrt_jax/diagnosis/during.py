"""Checks during training, on the records of metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

from behrt_jax.diagnosis import loss_checks, step_checks
from behrt_jax.diagnosis.finding import Finding

Values = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]]


def check_during(
    settings: Values, facts: Values, baselines: Values, records: Records, stop_reason: str = ""
) -> list[Finding]:
    """Every check of a running or finished training; what is unknown is not checked.

    Args:
        settings: the configuration as nested dicts.
        facts: ``facts`` in config.json.
        baselines: name -> figures, as in summary.json.
        records: of metrics.jsonl, in order.
        stop_reason: of summary.json; empty while the run goes on.
    """
    trainings = [record for record in records if record.get("split") == "train"]
    validations = [record for record in records if record.get("split") == "tuning"]
    return [
        *loss_checks.diverged(trainings, stop_reason),
        *loss_checks.stuck(settings, facts, baselines, validations),
        *step_checks.zero_gradient(trainings),
        *step_checks.still_adapters(settings, facts, validations),
        *loss_checks.overfitting(settings, trainings, validations),
        *loss_checks.loss_spikes(trainings),
        *step_checks.untouched_rows(validations),
        *step_checks.recompilations(trainings),
        *step_checks.input_stalls(trainings),
    ]

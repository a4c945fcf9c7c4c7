"""Checks before training: what the settings, the parameters and the data already tell."""

from collections.abc import Mapping
from typing import Any

from behrt_jax.diagnosis import data_checks, parameter_checks, schedule_checks
from behrt_jax.diagnosis.finding import Finding

Values = Mapping[str, Any]


def check_before(settings: Values, parameters: Values, facts: Values, baselines: Values) -> list[Finding]:
    """Every check that can be made before the first step; what is unknown is not checked.

    Args:
        settings: the configuration as nested dicts, ``settings`` in config.json.
        parameters: the parameter report, parameters.json.
        facts: what only the running process could see, ``facts`` in config.json.
        baselines: name -> figures, as in summary.json.
    """
    return [
        *parameter_checks.frozen_at_random(settings, parameters),
        *parameter_checks.trainable_share(settings, parameters),
        *parameter_checks.adapters_reached(settings, parameters, facts),
        *data_checks.data_without_structure(settings, facts),
        *data_checks.validation_size(baselines, facts),
        *data_checks.unseen_codes(facts),
        *data_checks.beyond_tables(settings, facts),
        *data_checks.cut_histories(settings, facts),
        *schedule_checks.static_masks(settings),
        *schedule_checks.steps_for_schedule(settings, facts),
        *schedule_checks.learning_rate_for_batch(settings, parameters, facts),
    ]

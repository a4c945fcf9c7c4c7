"""The leakage audit: what in prepared data and labels would make results too good, or wrong."""

from collections.abc import Iterator, Mapping
from typing import Any

from behrt_jax.config import DoctorConfig
from behrt_jax.data.examples import parse_delay
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.diagnosis.leakage_codes import check_codes, place_labels
from behrt_jax.diagnosis.leakage_data import (
    check_ages,
    check_deaths,
    check_quantiles,
    check_repeats,
    check_splits,
    check_visit_ends,
    check_vocabulary,
)
from behrt_jax.diagnosis.leakage_labels import (
    check_classes,
    check_delays,
    check_follow_up,
    check_histories,
    check_outcome,
    check_rows,
    check_subjects,
)
from behrt_jax.errors import InputError


def audit(
    data: SequenceSet, manifest: Mapping[str, Any], labels: Labels | None, config: DoctorConfig
) -> list[Finding]:
    """Run every check on prepared data, and on their labels where there are any.

    Args:
        data: as `store.read_prepared` gives them, without separators.
        manifest: of the same folder.
        labels: of some of the subjects.
        config: its ``horizon_days``, ``outcome_codes``, ``delays`` and ``death_codes`` are read.

    Returns:
        What was found, in the order of the checks; figures and codes, no subject ids.

    Raises:
        InputError: an option that is wrong or has no effect.
    """
    _check_options(labels, config)
    return list(_findings(data, manifest, labels, config))


def _findings(
    data: SequenceSet, manifest: Mapping[str, Any], labels: Labels | None, config: DoctorConfig
) -> Iterator[Finding]:
    yield from check_splits(data, manifest)
    yield from check_vocabulary(data, manifest)
    yield from check_quantiles(data, manifest)
    yield from check_ages(data)
    yield from check_deaths(data, config.death_codes)
    yield from check_visit_ends(data)
    yield from check_repeats(data)
    if labels is None:
        return
    placed = place_labels(labels, data)
    binary = labels.positive() is not None
    yield from check_subjects(labels, data)
    yield from check_rows(placed)
    yield from check_histories(labels, data, placed)
    yield from check_classes(placed, binary)
    recorded = manifest.get("options", {}).get("delays", ())
    yield from check_delays(placed, data.vocabulary, config.delays or recorded, recorded)
    if binary:
        follow_up = labels.account.get("options", {}).get("follow_up")
        ends = {"subject": None, "data": "the last event of the data"}
        yield from check_follow_up(placed, config.horizon_days, ends.get(follow_up, follow_up))
        yield from check_codes(placed, data.vocabulary)
        yield from check_outcome(placed, data.vocabulary, config.outcome_codes, config.horizon_days)
    else:
        yield Finding(
            "labels-not-binary",
            "info",
            f"The labels are {labels.kind}, so follow-up and codes that tell the outcome were not checked.",
            "These checks need a yes or no.",
            "Audit each class against the rest, as a table with boolean_value.",
        )


def _check_options(labels: Labels | None, config: DoctorConfig) -> None:
    if config.horizon_days is not None and not 0 < config.horizon_days < 1e6:
        raise InputError(f"--horizon_days is {config.horizon_days:g}: give a number of days above 0.")
    for option in config.delays:
        parse_delay(option)
    if labels is None:
        for option in ("horizon_days", "outcome_codes", "delays"):
            if getattr(config, option):
                raise InputError(f"--{option} has no effect without labels: add --labels FILE.")

"""A label table made of prepared data, with an account of who got a label, who none, and why."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.config.data import MakeLabelsConfig
from behrt_jax.data.events import DAY, SPLITS
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.prepared import read_deaths, read_prepared
from behrt_jax.data.sequences import SequenceSet, day_text
from behrt_jax.data.sorting import find_ids
from behrt_jax.data.vocabulary import matching_codes
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, new_file
from behrt_jax.records import label_makers
from behrt_jax.tracking.console import open_console

MAKERS = {
    "next_visit": label_makers.label_next_visit,
    "first_occurrence": label_makers.label_first_occurrence,
    "readmission": label_makers.label_readmission,
    "death": label_makers.label_death,
}
MANY_LABELS = 100_000
"""Labels above which one of each subject is recommended."""
_DEFAULT_HORIZON = {"first_occurrence": 365.0, "readmission": 30.0, "death": 365.0}


def make_labels(config: MakeLabelsConfig) -> JsonObject:
    """Make the labels of ``config.task`` and write them to ``config.output``, whole or not at all.

    Returns:
        The account that the file's schema metadata has as JSON (key ``behrt_jax``): task, options,
        fingerprint of the data, and by split subjects, candidates, labels, positives, and all that was left
        out, by reason.

    Raises:
        InputError: an option is wrong, missing or without effect, the output is there already, the data
            cannot be read or do not know who died, or no label is left.
    """
    config = _checked(config)
    assert config.data is not None and config.output is not None and config.task is not None
    data = read_prepared(config.data)
    if config.codes and not matching_codes(data.vocabulary, config.codes, "--codes").any():
        raise InputError(
            f"--codes has {', '.join(config.codes)}: no code of the vocabulary matches; mend it."
        )
    index = None
    if isinstance(config.index, Path):
        index = read_labels(config.index, without_values=True)
    histories = {name: _history(data, name, config, index) for name in SPLITS}
    made = {name: MAKERS[config.task](history, config) for name, history in histories.items()}
    account = {
        "task": config.task,
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(config).items()
            if name not in ("task", "data", "output")
        },
        "data_fingerprint": data.fingerprint,
        "splits": {name: _counts(labels) for name, labels in made.items()},
    }
    if config.task != "next_visit":
        account["follow_up_ends"] = _ends_of(histories.values())
    if index is not None:
        known = [np.isin(index.subject_ids, part.subject_ids) for part in data.splits.values()]
        account["index_dates"] = {
            "given": len(index),
            "of subjects without events": len(index) - int(np.sum(known)),
        }
    with open_console() as console:
        for pattern in config.codes:
            if not matching_codes(data.vocabulary, (pattern,), "--codes").any():
                console.log(
                    f"Warning: --codes {pattern} matches no code of the vocabulary, so it has no effect."
                )
        rows = dict.fromkeys(key for counts in account["splits"].values() for key in counts)
        console.table(
            f"Labels of the task {config.task}",
            ("", *SPLITS),
            [(key, *(account["splits"][name].get(key, 0) for name in SPLITS)) for key in rows],
        )
        for key, what in (("follow_up_ends", "Follow-up of subjects ends"), ("index_dates", "Index dates")):
            if told := account.get(key):
                console.log(f"{what}: {', '.join(f'{name} {value}' for name, value in told.items())}.")
        total = sum(len(labels.times) for labels in made.values())
        if config.times == "all" and config.index is None and total > MANY_LABELS:
            console.log(
                f"{total:,} labels are many to train on and hardly tell more than one of each subject: "
                "--times random makes that."
            )
        if not total:
            raise InputError(
                "No label is left, for the reasons above: choose other codes, a shorter horizon or another "
                "follow_up."
            )
        _write(config, made, account)
        console.log(f"Written: {config.output}")
    return account


def _write(
    config: MakeLabelsConfig, made: Mapping[str, label_makers.MadeLabels], account: JsonObject
) -> None:
    parts = [
        pa.table(
            {
                "subject_id": pa.array(labels.subject_ids),
                "prediction_time": pa.array(labels.times).cast(pa.timestamp("us")),
                **labels.values,
            }
        )
        for labels in made.values()
    ]
    table = pa.concat_tables(parts).sort_by([("subject_id", "ascending"), ("prediction_time", "ascending")])
    table = table.replace_schema_metadata({"behrt_jax": json.dumps(account)})
    assert config.output is not None
    with new_file(config.output) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def _ends_of(histories: Iterable[label_makers.SplitHistory]) -> dict[str, str]:
    """Day on which the follow-up of the median subject and of the last one ends; nothing without subjects."""
    days = np.sort(np.concatenate([history.known_until for history in histories])) // DAY
    if not len(days):
        return {}
    return {"median": day_text(days[len(days) // 2]), "last": day_text(days[-1])}


def _history(
    data: SequenceSet, name: str, config: MakeLabelsConfig, index: Labels | None
) -> label_makers.SplitHistory:
    assert config.data is not None
    part = data.splits[name]
    deaths = np.full(len(part), label_makers.NEVER)
    table = read_deaths(config.data, name)
    if table is None and config.task != "next_visit":
        raise InputError(
            f"{config.data} was prepared by an older version, which did not keep deaths: run prepare again, "
            "with another output."
        )
    if table is not None:
        place = find_ids(part.subject_ids, table["subject_id"].to_numpy())
        deaths[place[place >= 0]] = table["time"].cast(pa.int64()).to_numpy()[place >= 0]
    until = None
    if config.follow_up == "data":
        until = max(int(other.times.max()) for other in data.splits.values() if len(other))
    elif config.follow_up != "subject":
        until = _end_of_day(config.follow_up or "")
    history = label_makers.SplitHistory.followed(part, data.vocabulary, deaths, until)
    return history if index is None else replace(history, index=index)


def _counts(labels: label_makers.MadeLabels) -> dict[str, int]:
    first = {key: n for key, n in labels.counts.items() if key == "candidates" or key.startswith("left out")}
    return {**first, "subjects": len(np.unique(labels.subject_ids)), **labels.counts}


def _checked(config: MakeLabelsConfig) -> MakeLabelsConfig:
    """The options with their defaults."""
    for name in ("task", "data", "output"):
        if getattr(config, name) is None:
            raise InputError(f"--{name} is missing: give it; --help tells what it is.")
    assert config.output is not None and config.task is not None
    if config.output.exists():
        raise InputError(f"--output: {config.output} is there already: give another file.")
    if config.output.suffix != ".parquet":
        raise InputError(f"--output is {config.output}: give a name that ends in .parquet.")
    if config.min_events < 1:
        raise InputError(f"--min_events is {config.min_events}: give 1 or more.")
    if isinstance(config.index, Path) and config.task in ("next_visit", "readmission"):
        raise InputError(f"--index has no effect on {config.task}, whose labels are at ends of visits.")
    if config.index is not None and config.times != "all":
        raise InputError(f"--times {config.times} does not go with --index: leave one of them out.")
    if config.task == "next_visit":
        for name in ("horizon_days", "gap_days", "survival", "follow_up", "index"):
            if getattr(config, name):
                raise InputError(f"--{name} has no effect on next_visit: leave it out.")
        return replace(config, follow_up="subject")
    if config.task == "first_occurrence" and not config.codes:
        raise InputError("--codes is missing: give the codes whose first occurrence is to be predicted.")
    if config.task == "death" and config.codes:
        raise InputError("--codes has no effect on death, which is MEDS_DEATH: leave it out.")
    if config.horizon_days is not None and not 0 < config.horizon_days < 1e6:
        raise InputError(f"--horizon_days is {config.horizon_days:g}: give a number of days above 0.")
    if not 0 <= config.gap_days < 1e6:
        raise InputError(f"--gap_days is {config.gap_days:g}: give a number of days, 0 or more.")
    if config.survival and config.times == "last" and config.horizon_days is None:
        raise InputError("--times last needs room for a horizon: add --horizon_days, or take --times random.")
    follow_up = config.follow_up or ("data" if config.task == "readmission" else "subject")
    if follow_up not in ("subject", "data"):
        _end_of_day(follow_up)
    horizon = config.horizon_days
    if horizon is None and not config.survival:
        horizon = _DEFAULT_HORIZON[config.task]
    return replace(config, follow_up=follow_up, horizon_days=horizon)


def _end_of_day(text: str) -> int:
    try:
        day = date.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"--follow_up is {text!r}: give subject, data, or a date such as 2020-12-31."
        ) from error
    return (day - date(1970, 1, 1)).days * DAY + DAY - 1

"""The command that makes label tables of prepared data."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from meds import LabelSchema

from behrt_jax.cli import main
from behrt_jax.data.events import DAY
from behrt_jax.data.examples import find_examples
from behrt_jax.data.labels import read_labels
from behrt_jax.data.prepared import read_deaths, read_manifest, read_prepared
from behrt_jax.data.sorting import ragged_indices
from behrt_jax.data.vocabulary import matching_codes
from behrt_jax.workflows import make_labels
from tests.diagnosis.audited import OUTCOME, prepare_clinical
from tests.records.prepare.test_pipeline import without_digests

TASKS = {
    "first_occurrence": ("--codes", OUTCOME),
    "readmission": (),
    "death": ("--horizon_days", "1000"),
    "next_visit": ("--codes", "DX//"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_clinical(tmp_path_factory.mktemp("clinical"), 2000)


def make(task, data, output, *options):
    status = main(["make-labels", "--task", task, "--data", str(data), "--output", str(output), *options])
    assert status == 0
    return pq.read_table(output)


def account_of(table):
    return json.loads(table.schema.metadata[b"behrt_jax"])


def doctor(data, labels, tmp, *options):
    """Findings by id, of the labels."""
    found = tmp / "findings.json"
    main(["doctor", "--data", str(data), "--labels", str(labels), "--output", str(found), *options])
    return {finding["id"]: finding for finding in json.loads(found.read_text())["findings"]}


def test_patterns_without_effect_are_told(data, tmp_path, capsys):
    make("first_occurrence", data, tmp_path / "l.parquet", "--codes", OUTCOME, "NONE//")
    told = capsys.readouterr().out
    assert "Warning: --codes NONE// matches no code of the vocabulary" in told
    assert told.count("Warning") == 1


@pytest.mark.parametrize(
    ("task", "survival"),
    [(task, s) for task in TASKS for s in (False, True) if not (s and task == "next_visit")],
)
def test_a_label_table_of_all_splits(task, survival, data, tmp_path):
    options = [*TASKS[task], *(["--survival"] if survival else [])]
    table = make(task, data, tmp_path / "labels" / "task.parquet", *options)
    if task == "next_visit":
        assert table.schema.names == ["subject_id", "prediction_time", "categorical_values"]
    else:
        LabelSchema.validate(table.replace_schema_metadata(None))
    keys = table.select(["subject_id", "prediction_time"])
    ascending = [("subject_id", "ascending"), ("prediction_time", "ascending")]
    assert keys.equals(keys.sort_by(ascending))
    labels = read_labels(tmp_path / "labels")
    kind = "codes" if task == "next_visit" else "survival" if survival else "boolean"
    assert (labels.kind, labels.duplicates, len(labels)) == (kind, 0, table.num_rows)
    account = account_of(table)
    assert account["data_fingerprint"] == read_manifest(data)["fingerprint"]
    prepared = read_prepared(data)
    for name, part in prepared.splits.items():
        own = np.isin(labels.subject_ids, part.subject_ids)
        counts = account["splits"][name]
        assert counts["labels"] == own.sum() > 0
        assert counts["subjects"] == len(np.unique(labels.subject_ids[own]))
        left_out = sum(count for key, count in counts.items() if key.startswith("left out"))
        assert counts["candidates"] == counts["labels"] + left_out
        if task != "next_visit":
            assert counts["positive"] == np.count_nonzero(table["boolean_value"].to_numpy()[own])
        # Each label is at the end of a visit, so that there is a history.
        examples = find_examples(prepared, name, labels, max_tokens=20)
        assert len(examples) == own.sum()
        assert not examples.empty.any()
        last = examples.windows.starts + examples.windows.lengths - 1
        np.testing.assert_array_equal(part.times[last], examples.times)
    assert sum(split["labels"] for split in account["splits"].values()) == len(labels)


@pytest.mark.parametrize("times", ["all", "last", "random"])
@pytest.mark.parametrize("task", TASKS)
def test_the_leakage_doctor_finds_no_error(task, times, data, tmp_path):
    make(task, data, tmp_path / "labels.parquet", *TASKS[task], "--times", times)
    more = ["--outcome_codes", OUTCOME, "--horizon_days", "365"] if task == "first_occurrence" else []
    found = doctor(data, tmp_path / "labels.parquet", tmp_path, *more)
    assert "labels-by-split" in found
    assert [finding for finding in found.values() if finding["severity"] == "error"] == []


def test_labels_that_do_not_state_their_follow_up_are_judged_by_what_is_seen(data, tmp_path):
    table = make("readmission", data, tmp_path / "labels.parquet")
    found = doctor(data, tmp_path / "labels.parquet", tmp_path)["negative-without-follow-up"]
    assert found["severity"] == "info"
    assert "by the labels, follow-up goes on to the last event of the data" in found["seen"]
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "labels.parquet")
    found = doctor(data, tmp_path / "labels.parquet", tmp_path)["negative-without-follow-up"]
    assert found["severity"] == "error"
    assert "by the labels" not in found["seen"]


def test_the_same_again_and_another_by_another_seed(data, tmp_path):
    options = ("--codes", OUTCOME, "--times", "random", "--seed")
    first = make("first_occurrence", data, tmp_path / "a.parquet", *options, "3")
    make("first_occurrence", data, tmp_path / "b.parquet", *options, "3")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    other = make("first_occurrence", data, tmp_path / "c.parquet", *options, "4")
    assert not first.equals(other)
    assert len(first["subject_id"].unique()) == first.num_rows


def test_a_follow_up_that_ends_on_a_date(data, tmp_path):
    part = read_prepared(data).splits["train"]
    day = int(np.median(part.times)) // DAY
    date = str(np.datetime64(day, "D"))
    table = make("readmission", data, tmp_path / "a.parquet", "--follow_up", date)
    negative = table.filter(pa.compute.invert(table["boolean_value"]))  # pyright: ignore
    times = negative["prediction_time"].cast(pa.int64()).to_numpy()
    assert times.max() + 30 * DAY < (day + 1) * DAY
    assert account_of(table)["options"]["follow_up"] == date


def test_the_options_are_told(capsys):
    with pytest.raises(SystemExit):
        main(["make-labels", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("next_visit", "first_occurrence", "readmission", "death", "--gap_days", "--min_events"):
        assert word in shown


MISTAKES = {
    "no task": (["--data", "{data}", "--output", "{tmp}/a.parquet"], "--task is missing"),
    "no data": (["--task", "death", "--output", "{tmp}/a.parquet"], "--data is missing"),
    "no output": (["--task", "death", "--data", "{data}"], "--output is missing"),
    "no prepared data": (["--data", "{tmp}/none"], "none is no prepared data set"),
    "no codes": (["--task", "first_occurrence"], "--codes is missing"),
    "codes of none": (["--task", "next_visit", "--codes", "ZZ//"], "no code of the vocabulary matches"),
    "wrong pattern": (["--task", "next_visit", "--codes", "X("], "no regular expression"),
    "codes of death": (["--codes", "DX//"], "--codes has no effect on death"),
    "gap of the next visit": (["--task", "next_visit", "--gap_days", "3"], "--gap_days has no effect"),
    "no horizon": (["--horizon_days", "0"], "--horizon_days is 0"),
    "negative gap": (["--gap_days", "-1"], "--gap_days is -1"),
    "no events": (["--min_events", "0"], "--min_events is 0"),
    "no date": (["--follow_up", "tomorrow"], "--follow_up is 'tomorrow'"),
    "last of survival": (["--survival", "--times", "last"], "--times last needs room"),
    "no parquet": (["--output", "{tmp}/a.csv"], "a name that ends in .parquet"),
    "output there": (["--output", "{data}"], "is there already"),
    "no label": (["--min_events", "90000"], "No label is left"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_error_and_nothing_written(mistake, data, tmp_path, capsys):
    options, expected = MISTAKES[mistake]
    arguments = [option.format(data=data, tmp=tmp_path) for option in options]
    if not mistake.startswith("no ") or mistake in ("no label",) or len(options) <= 2:
        given = {"--task": "death", "--data": str(data), "--output": str(tmp_path / "a.parquet")}
        arguments += [part for pair in given.items() if pair[0] not in arguments for part in pair]
    assert main(["make-labels", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(data, tmp_path, monkeypatch, capsys):
    def fail(table, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("behrt_jax.workflows.make_labels.pq.write_table", fail)
    arguments = ["--task", "readmission", "--data", str(data), "--output", str(tmp_path / "a.parquet")]
    assert main(["make-labels", *arguments]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no space left for {tmp_path / 'a.parquet'}" in line
    assert list(tmp_path.iterdir()) == []


def test_data_of_an_older_version_do_not_know_who_died(tmp_path, capsys):
    data = prepare_clinical(tmp_path, 300)
    for file in data.rglob("deaths.parquet"):
        file.unlink()
    without_digests(data, subject_facts={})
    make("next_visit", data, tmp_path / "next.parquet")
    capsys.readouterr()
    arguments = ["--task", "readmission", "--data", str(data), "--output", str(tmp_path / "a.parquet")]
    assert main(["make-labels", *arguments]) == 2
    assert "did not keep deaths: run prepare again" in capsys.readouterr().err


needs_real = pytest.mark.skipif("EHR_TEST_DATA" not in os.environ, reason="EHR_TEST_DATA is not set")


@needs_real
def test_synthea(tmp_path):
    source = Path(os.environ["EHR_TEST_DATA"]) / "synthea-csv-1462"
    data = tmp_path / "prepared"
    assert main(["prepare", "--source", "synthea", "--input", str(source), "--output", str(data)]) == 0
    bronchitis = "DX//10509002"
    table = make("first_occurrence", data, tmp_path / "first.parquet", "--codes", bronchitis)
    prepared = read_prepared(data)
    code = prepared.vocabulary.codes.index(bronchitis)
    had = {}
    for part in prepared.splits.values():
        subjects = np.repeat(part.subject_ids, part.lengths)[part.codes == code].tolist()
        for subject, time in zip(subjects, part.times[part.codes == code].tolist(), strict=True):
            had[subject] = min(time, had.get(subject, time))
    rows = zip(
        table["subject_id"].to_pylist(),
        table["prediction_time"].cast(pa.int64()).to_pylist(),
        table["boolean_value"].to_pylist(),
        strict=True,
    )
    for subject, time, label in rows:
        first = had.get(subject, 2**62)
        assert first > time
        assert label == (first <= time + 365 * DAY)
    assert 100 < table["boolean_value"].to_numpy().sum() < table.num_rows / 5
    found = doctor(data, tmp_path / "first.parquet", tmp_path, "--outcome_codes", bronchitis)
    assert [finding for finding in found.values() if finding["severity"] == "error"] == []

    table = make("readmission", data, tmp_path / "again.parquet")
    counts = [account_of(table)["splits"][name] for name in prepared.splits]
    visits = sum(split["visits"] for split in read_manifest(data)["splits"].values())
    assert sum(count["candidates"] for count in counts) == visits
    dead = [read_deaths(data, name) for name in prepared.splits]
    assert sum(table.num_rows for table in dead if table is not None) == 457
    assert sum(count["left out: death before the end of the horizon"] for count in counts) > 0


@needs_real
def test_mimic(tmp_path):
    source = Path(os.environ["EHR_TEST_DATA"]) / "mimic-iv-demo-meds"
    data = tmp_path / "prepared"
    options = ["--visit_column", "hadm_id", "--delays", "DIAGNOSIS//=visit"]
    assert main(["prepare", "--input", str(source), "--output", str(data), *options]) == 0
    task = doctor(data, source / "tasks", tmp_path)
    assert [finding for finding in task.values() if finding["severity"] == "error"] == []
    for name in ("death", "next_visit"):
        table = make(
            name, data, tmp_path / f"{name}.parquet", *(["--codes", "DIAGNOSIS//"] * (name != "death"))
        )
        found = doctor(data, tmp_path / f"{name}.parquet", tmp_path)
        assert [finding for finding in found.values() if finding["severity"] == "error"] == []
        assert table.num_rows > 100

    # What the delay hides from the examples is what the doctor counts.
    labels = read_labels(tmp_path / "death.parquet")
    prepared = read_prepared(data)
    diagnoses = matching_codes(prepared.vocabulary, ("DIAGNOSIS//",), "--codes")
    shown = []
    for delays in ((), read_manifest(data)["options"]["delays"]):
        count = 0
        for split in prepared.splits:
            examples = find_examples(prepared, split, labels, max_tokens=10_000, delays=delays)
            tokens = ragged_indices(examples.windows.starts, examples.windows.lengths)
            count += int(diagnoses[examples.sequences.codes[tokens]].sum())
        shown.append(count)
    seen = doctor(data, tmp_path / "death.parquet", tmp_path)["kept-until-known"]["seen"]
    assert shown[0] > shown[1] > 0
    assert seen.startswith(f"{shown[0] - shown[1]:,} of {shown[0]:,} events of DIAGNOSIS// ")


def test_index_dates_of_a_file(data, tmp_path, capsys):
    part = read_prepared(data).splits["train"]
    dates = pa.table(
        {
            "subject_id": pa.array([*part.subject_ids[:40].tolist(), -1]),
            "prediction_time": pa.array([int(part.times.max()) - 4000 * DAY] * 41, pa.timestamp("us")),
        }
    )
    pq.write_table(dates, tmp_path / "index.parquet")
    options = ["--index", str(tmp_path / "index.parquet"), "--horizon_days", "30"]
    table = make("first_occurrence", data, tmp_path / "labels.parquet", "--codes", OUTCOME, *options)
    account = account_of(table)
    assert account["index_dates"] == {"given": 41, "of subjects without events": 1}
    assert account["splits"]["train"]["candidates"] == 40
    assert set(table["prediction_time"].to_pylist()) == {dates["prediction_time"][0].as_py()}
    assert "Index dates: given 41, of subjects without events 1." in capsys.readouterr().out
    common = ["make-labels", "--data", str(data), "--output", str(tmp_path / "x.parquet"), *options[:2]]
    assert main([*common, "--task", "readmission"]) == 2
    assert main([*common, "--task", "death", "--times", "last"]) == 2
    error = capsys.readouterr().err
    assert "--index has no effect on readmission" in error
    assert "--times last does not go with --index" in error


def test_the_end_of_follow_up_is_told_and_many_labels_are_hinted_at(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_labels, "MANY_LABELS", 100)
    table = make(
        "first_occurrence", data, tmp_path / "a.parquet", "--codes", OUTCOME, "--follow_up", "2019-07-08"
    )
    out = capsys.readouterr().out
    assert "Follow-up of subjects ends: median 2019-07-08, last 2019-07-08." in out
    assert account_of(table)["follow_up_ends"] == {"median": "2019-07-08", "last": "2019-07-08"}
    assert f"{table.num_rows:,} labels are many" in out
    assert "--times random" in out
    make("death", data, tmp_path / "b.parquet", "--times", "random")
    assert "are many" not in capsys.readouterr().out

"""The audit as a workflow: what it returns, shows and writes, and a real data set."""

import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from behrt_jax.config import DoctorConfig
from behrt_jax.data.prepared import read_prepared
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.errors import InputError
from behrt_jax.workflows.doctor import audit_data
from tests.data.meds_folder import by_remainder, history_rows, write_meds
from tests.diagnosis.audited import (
    YEAR,
    Task,
    alarms,
    findings,
    first_occurrence,
    prepare,
    prepare_clinical,
)

REAL = os.environ.get("EHR_TEST_DATA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rows = history_rows(subjects=60)
    tmp = tmp_path_factory.mktemp("small")
    return prepare(write_meds(tmp / "meds", rows, splits=by_remainder(rows)), tmp / "prepared")


def test_findings_are_returned_shown_and_written(folder, tmp_path, capsys):
    train = read_prepared(folder).splits["train"]
    labels = Task(train.subject_ids, train.times[train.offsets[:-1]], np.ones(len(train), bool))
    file = labels.write(tmp_path / "labels.parquet")
    output = tmp_path / "deeper" / "findings.json"
    capsys.readouterr()
    found = audit_data(DoctorConfig(data=folder, labels=file, output=output))
    assert [finding.severity for finding in found] == ["error", "warning", "info", "info"]
    assert found[0].id == "labels-of-one-class"
    assert [Finding(**entry) for entry in json.loads(output.read_text())["findings"]] == found
    shown = capsys.readouterr().out
    assert f"{folder}, 60 subjects and {len(train)} labels: 1 error, 1 warning, 2 infos." in shown
    for finding in found:
        assert finding.id in shown
        assert finding.seen in shown
        assert finding.mend in shown


def test_nothing_is_written_without_an_output(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    audit_data(DoctorConfig(data=folder))
    assert list(tmp_path.iterdir()) == []
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_folder_is_needed():
    with pytest.raises(InputError, match="--data is missing"):
        audit_data(DoctorConfig())


def test_ten_thousand_clean_subjects_raise_no_alarm(tmp_path):
    folder = prepare_clinical(tmp_path, 10_000)
    labels = first_occurrence(read_prepared(folder), "DX//J10", YEAR)
    found = findings(folder, tmp_path, labels, "--outcome_codes", "DX//J10", "--delays", "DX//=visit")
    assert alarms(found) == {}


@pytest.mark.skipif(not REAL, reason="EHR_TEST_DATA is not set")
def test_the_mimic_demo(tmp_path):
    meds = Path(REAL or "") / "mimic-iv-demo-meds"
    options = ("--visit_column", "hadm_id", "--min_count", "2")
    folder = prepare(meds, tmp_path / "prepared", *options, "--codes", "DIAGNOSIS//", "MEDICATION//",
                     "PROCEDURE//", "HOSPITAL_")  # fmt: skip
    found = findings(folder, tmp_path, None, "--labels", str(meds / "tasks"))
    assert sorted(alarms(found)) == ["split-of-one-class", "stamped-at-visit-end"]
    assert "DIAGNOSIS codes come all at once" in found["stamped-at-visit-end"]["seen"]

    # Death in the month after the last discharge, predicted at the discharge: the discharge says it.
    events = pl.concat(
        pl.read_parquet(file, columns=["subject_id", "time", "code"])
        for file in sorted((meds / "data").rglob("*.parquet"))
    )
    discharge = events.filter(pl.col("code").str.starts_with("HOSPITAL_DISCHARGE")).group_by("subject_id")
    death = events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", death="time")
    rows = discharge.agg(pl.col("time").max()).join(death, on="subject_id", how="left")
    died = (pl.col("death") < pl.col("time") + pl.duration(days=30)).fill_null(value=False)
    rows = rows.select("subject_id", pl.col("time").cast(pl.Int64), died=died)
    labels = Task(*(rows[name].to_numpy() for name in rows.columns))
    found = alarms(findings(folder, tmp_path, labels))
    for name in ("outcome-code-in-input", "label-revealed-at-prediction-time"):
        assert "HOSPITAL_DISCHARGE//DIED" in found[name]

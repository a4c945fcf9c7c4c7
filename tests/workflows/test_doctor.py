"""Real faults in real runs, each found while it happens and again in the folder; none in a healthy run."""

import json
import os
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from behrt_jax.adapters import lora
from behrt_jax.cli import main
from behrt_jax.config.commands import DoctorConfig
from behrt_jax.config.data import DataConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig, TrainConfig
from behrt_jax.data.prepared import read_prepared
from behrt_jax.diagnosis.finding import Finding, read_run
from behrt_jax.errors import InputError
from behrt_jax.presets import PRETRAIN
from behrt_jax.training import feeding
from behrt_jax.training.devices import replicated
from behrt_jax.training.loop import DivergenceError
from behrt_jax.training.state import init_program
from behrt_jax.workflows import pretrain as module
from behrt_jax.workflows.doctor import audit_data, examine
from behrt_jax.workflows.pretrain import pretrain
from tests.commands import run_command
from tests.diagnosis.audited import (
    YEAR,
    Task,
    alarms,
    findings,
    first_occurrence,
    prepare,
    prepare_clinical,
)
from tests.diagnosis.runs import ids, only
from tests.models.rows import tiny_model
from tests.records.meds_folder import by_remainder, history_rows, write_meds
from tests.workflows.small_run import SMALL_RUN, changed

ONE = jax.devices()[:1]
TINY_LORA = changed(SMALL_RUN, "model", dropout=0.0)
HEALTHY = PretrainConfig(
    name="healthy",
    model=tiny_model(positions=48, dropout=0.0, embedding_size=32, hidden_size=32, layers=1),
    data=DataConfig(subjects=1200, vocabulary_size=171, tuning_fraction=0.25, held_out_fraction=0.02),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    train=TrainConfig(epochs=9, batch_size=32, log_every=10),
)


def stored(folder):
    return json.loads((folder / "summary.json").read_text())["findings"]


def by_id(folder):
    return {finding["id"]: finding for finding in stored(folder)}


def examined(folder):
    return examine(read_run(folder))


@pytest.mark.slow
def test_nothing_is_wrong_with_a_healthy_run(tmp_path, capsys):
    folder = pretrain(replace(HEALTHY, output=tmp_path / "run"), ONE).folder
    # So small a model, so short a time: counting pairs does better. That is so, and all there is to say.
    assert set(ids(examined(folder))) <= {"no-gain-over-co-occurrence"}
    assert by_id(folder).keys() == {finding.id for finding in examined(folder)}
    capsys.readouterr()
    output = tmp_path / "new" / "findings.json"
    assert main(["doctor", "--run", str(folder), "--output", str(output)]) == 0
    assert "0 errors" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert (written["errors"], written["findings"]) == (False, stored(folder))


@pytest.mark.slow
def test_frozen_at_random_is_told_before_training_and_everywhere_after(tmp_path, capsys):
    config = changed(replace(TINY_LORA, output=tmp_path / "run"), "freezing", regime="lora_only")
    folder = pretrain(changed(config, "train", max_steps=2), ONE).folder
    lines = capsys.readouterr().out.splitlines()
    told = [index for index, line in enumerate(lines) if line.startswith("Error [frozen-at-random]")]
    assert len(told) == 1
    assert told[0] < next(index for index, line in enumerate(lines) if line.startswith("step 1/"))
    finding = by_id(folder)["frozen-at-random"]
    assert (finding["when"], finding["severity"]) == ("before", "error")
    assert stored(folder)[0] == finding
    for name in ("SUMMARY.txt", "report.html"):
        assert "frozen-at-random" in (folder / name).read_text()
    assert main(["doctor", "--run", str(folder)]) == 1
    assert "frozen-at-random" in capsys.readouterr().out
    # A folder as older versions left it, without facts, still shows what was found then.
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"baselines": record["baselines"]}))
    for name in ("parameters.json", "files.json"):
        (folder / name).unlink()
    assert only(examined(folder), "frozen-at-random").when == "before"


def test_adapters_outside_the_graph(tmp_path, monkeypatch):
    """As in the PyTorch original: adapters that no forward pass applies."""

    @contextmanager
    def applying_nothing(*_, **__):
        yield

    monkeypatch.setattr(lora, "applying", applying_nothing)
    config = changed(replace(TINY_LORA, output=tmp_path / "run"), "train", max_steps=16, validate_every=16)
    found = by_id(pretrain(config, ONE).folder)
    assert "8 adapter matrices" in found["adapters-not-reached"]["seen"]
    assert found["adapters-not-reached"]["when"] == "before"
    assert "group lora was zero" in found["zero-gradient"]["seen"]
    assert found["zero-gradient"]["when"] == "during"
    assert "moved by less" in found["adapters-still"]["seen"]
    assert all(found[name]["severity"] == "error" for name in ("zero-gradient", "adapters-still"))


@pytest.mark.slow
def test_cut_histories_and_stalls(tmp_path, monkeypatch, capsys):
    """Codes that a window never shows, and slow batches."""
    original = feeding.put_rows

    def slow_rows(*arguments):
        time.sleep(0.1)
        return original(*arguments)

    monkeypatch.setattr(feeding, "put_rows", slow_rows)
    config = changed(replace(TINY_LORA, output=tmp_path / "run"), "data", window="first", max_length=2)
    found = by_id(pretrain(changed(config, "train", epochs=1), ONE).folder)
    assert "never read" in found["cut-histories"]["seen"]
    assert int(found["untouched-rows"]["seen"].split()[0]) > 5
    assert "waiting for batches" in found["input-stalls"]["seen"]
    out = capsys.readouterr().out
    assert all(out.count(f"[{name}]") == 1 for name in ("cut-histories", "untouched-rows", "input-stalls"))


def test_a_leaf_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    original = init_program

    def spoilt_program(setup, optimizer, mesh):
        def spoilt(key):
            state = original(setup, optimizer, mesh).__wrapped__(key)
            head = state.variables["params"]["mlm_head"]["dense"]
            head["kernel"] = head["kernel"].at[0, 0].set(jnp.nan)
            return state

        return jax.jit(spoilt, out_shardings=replicated(mesh))

    monkeypatch.setattr("behrt_jax.training.state.init_program", spoilt_program)
    with pytest.raises(DivergenceError, match="the parameters params/mlm_head/dense/kernel"):
        pretrain(replace(TINY_LORA, output=tmp_path / "run"), ONE)
    finding = by_id(tmp_path / "run")["diverged"]
    assert "step 1," in finding["seen"]
    assert "params/mlm_head/dense/kernel" in finding["seen"]
    assert main(["doctor", "--run", str(tmp_path / "run")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "small_lora"])
def test_no_alarm_before_a_shipped_configuration_trains(name, tmp_path, monkeypatch):
    check_before(PRETRAIN[name], tmp_path, monkeypatch)


# A modern_* configuration has the sizes of its namesake, whose checks would find the same; one with adapters
# is checked for all that its namesake without them is.
OTHERS = sorted(
    name
    for name in PRETRAIN.keys() - {"small_lora"}
    if f"{name}_lora" not in PRETRAIN and (name[:7] != "modern_" or name == "modern_small_lora")
)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_no_alarm_before_any_shipped_configuration_trains(name, tmp_path, monkeypatch):
    check_before(PRETRAIN[name], tmp_path, monkeypatch)


def check_before(config, folder, monkeypatch):
    """All that is done before training, at full size; a folder without a summary is examined as well."""

    class Reached(Exception):
        pass

    def stop(*_):
        raise Reached

    monkeypatch.setattr(module, "open_checkpoints", stop)
    # The step is neither compiled nor tried out: the checks do not look at it.
    monkeypatch.setattr(module, "on_device", lambda *_: True)
    monkeypatch.setattr(module, "choose_micro_batches", lambda *_: 1)
    with pytest.raises(Reached):
        pretrain(replace(config, output=folder / "run"), ONE)
    assert ids(examined(folder / "run")) == []
    facts = read_run(folder / "run").facts
    assert list(facts.unreached_adapters) == []
    assert facts.cut_share < 0.1


@pytest.mark.slow
def test_no_alarm_in_a_whole_run_of_a_shipped_configuration(tmp_path):
    # A third of its epochs: the loss is then 0.6 nats below that of counting pairs.
    options = ("--train.epochs", 10, "--output", tmp_path / "run")
    done = run_command("pretrain.py", "--config", "small_lora", *options)
    assert done.returncode == 0, done.stderr
    assert main(["doctor", "--run", str(tmp_path / "run")]) == 0
    assert ids(examined(tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --run RUN or --data DIR"),
        (["--run", "{tmp}", "--data", "{tmp}"], "either --run RUN or --data DIR"),
        (["--run", "{tmp}"], "holds no run"),
        (["--run", "{tmp}", "--labels", "{tmp}"], "add --data DIR"),
    ],
)
def test_one_clear_error_for_each_mistake(arguments, message, tmp_path, capsys):
    assert main(["doctor", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(part in text for part in ("--run", "--data", "--labels", "--output", "exit status is 1"))


# The audit as a workflow: what it returns, shows and writes, and a real data set.


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
    expected = ["shifted-dates", "split-of-one-class", "stamped-at-visit-end", "unknown-codes"]
    assert sorted(alarms(found)) == expected
    assert "10.6% of tuning" in found["unknown-codes"]["seen"]  # of 10 subjects: many codes are theirs alone
    assert "DIAGNOSIS// codes come all at once" in found["stamped-at-visit-end"]["seen"]

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

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.cli import main
from behrt_jax.data.events import DAY
from behrt_jax.data.prepared import read_deaths, read_manifest, read_prepared
from behrt_jax.files import digests_of, sealed, write_json
from tests.diagnosis.audited import OUTCOME, YEAR, Task, alarms, findings, planted, prepare, rewrite
from tests.records.meds_folder import HOUR, Row, born, write_meds
from tests.records.prepare.test_pipeline import without_digests

DEFINED = ("--horizon_days", "365", "--outcome_codes", OUTCOME)


@pytest.fixture(scope="session")
def data(prepared):
    return read_prepared(prepared)


def in_split(data, task, name):
    return np.isin(task.subjects, data.splits[name].subject_ids)


def outcome_times(data, task):
    """First time of the outcome code after the prediction time of each positive label, else that time."""
    code = data.vocabulary.codes.index(OUTCOME)
    times = task.times.copy()
    for part in data.splits.values():
        for row, subject in enumerate(part.subject_ids.tolist()):
            own = slice(part.offsets[row], part.offsets[row + 1])
            for label in np.flatnonzero((task.subjects == subject) & task.values):
                later = part.times[own][(part.codes[own] == code) & (part.times[own] > task.times[label])]
                times[label] = later.min()
    return times


def history_ends(data, subjects):
    first, last = {}, {}
    for part in data.splits.values():
        first |= dict(zip(part.subject_ids.tolist(), part.times[part.offsets[:-1]].tolist(), strict=True))
        last |= dict(zip(part.subject_ids.tolist(), part.times[part.offsets[1:] - 1].tolist(), strict=True))
    return [np.array([ends[subject] for subject in subjects.tolist()]) for ends in (first, last)]


def test_one_class(data, prepared, task, tmp_path):
    found = findings(prepared, tmp_path, task._replace(values=np.zeros(len(task.values), bool)))
    assert list(alarms(found)) == ["labels-of-one-class"]
    assert found["labels-of-one-class"]["severity"] == "error"


@pytest.mark.parametrize(("split", "severity"), [("train", "error"), ("tuning", "warning")])
def test_one_class_in_a_split(split, severity, data, prepared, task, tmp_path):
    values = task.values & ~in_split(data, task, split)
    found = findings(prepared, tmp_path, task._replace(values=values))
    assert found["split-of-one-class"]["severity"] == severity
    assert f"labels of {split} have the same value" in found["split-of-one-class"]["seen"]


def test_a_split_without_labels(data, prepared, task, tmp_path):
    own = in_split(data, task, "held_out")
    found = findings(prepared, tmp_path, Task(*(column[own] for column in task)))
    assert list(alarms(found)) == ["split-without-labels"]
    assert "No label is of a subject of train or tuning" in found["split-without-labels"]["seen"]
    assert f"held_out: {own.sum()} labels of {own.sum()} subjects" in found["labels-by-split"]["seen"]


def test_prevalence_that_differs(data, prepared, task, tmp_path):
    chosen = in_split(data, task, "tuning") & (np.arange(len(task.values)) % 2 == 0)
    found = findings(prepared, tmp_path, task._replace(values=task.values | chosen))
    assert list(alarms(found)) == ["prevalence-differs"]
    assert "of tuning" in found["prevalence-differs"]["seen"]


def test_several_labels_of_one_subject_are_not_independent(data, prepared, task, tmp_path):
    # One subject of tuning with two hundred positive labels does not make the prevalence another.
    one = np.flatnonzero(in_split(data, task, "tuning") & task.values)[0]
    more = [np.repeat(column[one], 200) for column in task]
    more[1] = more[1] + 1 + np.arange(200)
    found = findings(prepared, tmp_path, Task(*(np.append(a, b) for a, b in zip(task, more, strict=True))))
    assert alarms(found) == {}


@pytest.mark.parametrize(("count", "severity"), [(3, "warning"), (None, "error")])
def test_subjects_that_the_data_do_not_know(count, severity, prepared, task, tmp_path):
    subjects = task.subjects.copy()
    subjects[:count] = np.arange(len(subjects[:count]))
    found = findings(prepared, tmp_path, task._replace(subjects=subjects))
    assert found["label-subject-unknown"]["severity"] == severity
    assert "label-ids-damaged" not in found
    known = len(subjects[:count])
    assert found["label-subject-unknown"]["seen"].startswith(f"{known:,} of {len(subjects):,} subjects")


@pytest.mark.parametrize("kind", [np.float64, np.int32])
def test_ids_that_went_through_a_smaller_type(kind, prepared, task, tmp_path):
    subjects = task.subjects.astype(kind).astype(np.int64)
    found = findings(prepared, tmp_path, task._replace(subjects=subjects))
    assert found["label-ids-damaged"]["severity"] == "error"


def test_labels_that_come_twice(prepared, task, tmp_path):
    found = findings(prepared, tmp_path, Task(*(np.append(column, column[:4]) for column in task)))
    assert alarms(found) == {
        "label-duplicate": "4 labels repeat the subject, prediction time and value of another."
    }
    other = Task(*(np.append(column, column[:4]) for column in task))
    other.values[-4:] ^= True
    found = findings(prepared, tmp_path, other)
    assert found["label-contradictory"]["severity"] == "error"
    assert found["label-contradictory"]["seen"].startswith("4 labels")


def test_prediction_times_before_birth_and_before_any_event(data, prepared, task, tmp_path):
    times = task.times.copy()
    times[:5] -= 200 * YEAR
    times[5:7] = history_ends(data, task.subjects)[0][5:7] - 1
    found = findings(prepared, tmp_path, task._replace(times=times))
    assert found["label-before-birth"]["severity"] == "error"
    assert found["label-before-birth"]["seen"].startswith("5 of")
    assert found["label-without-history"]["seen"].startswith("2 of")


def test_subjects_without_events_are_known_and_their_histories_empty(prepared, task, tmp_path):
    ids = np.array([2**40, 2**41])
    times = np.array([-10 * DAY, 10 * DAY])
    folder = shutil.copytree(prepared, tmp_path / "prepared")
    more = Task(*map(np.append, task, (ids, times, np.array([True, False]))))
    assert findings(folder, tmp_path, more)["label-subject-unknown"]["seen"].startswith("2 of")
    births = pa.table({"subject_id": ids, "time": pa.array(np.zeros(2, np.int64), pa.timestamp("us"))})
    pq.write_table(births, folder / "train" / "births.parquet")
    without_digests(folder)
    found = findings(folder, tmp_path, more)
    assert "label-subject-unknown" not in found
    for name in ("label-before-birth", "label-without-history"):
        assert found[name]["seen"].startswith(f"1 of {len(more.times):,} labels")


@pytest.mark.parametrize(("share", "severity"), [(1.0, "error"), (0.02, "warning")])
def test_negatives_without_follow_up(share, severity, data, prepared, task, tmp_path):
    last = history_ends(data, task.subjects)[1]
    negative = np.flatnonzero(~task.values)
    chosen = negative[: int(share * len(negative))]
    times = task.times.copy()
    times[chosen] = last[chosen]
    found = findings(prepared, tmp_path, task._replace(times=times))
    assert found["negative-without-follow-up"]["severity"] == severity
    # Of those who died all is known.
    died = np.concatenate([read_deaths(prepared, name)["subject_id"].to_numpy() for name in data.splits])
    unfollowed = int((~np.isin(task.subjects[chosen], died)).sum())
    assert severity == "warning" or unfollowed < len(chosen)
    assert found["negative-without-follow-up"]["seen"].startswith(f"{unfollowed:,} of {len(negative):,}")


def test_labels_after_the_death(data, prepared, task, tmp_path):
    deaths = [read_deaths(prepared, name) for name in data.splits]
    died = {
        subject: time
        for table in deaths
        for subject, time in zip(
            table["subject_id"].to_pylist(), table["time"].cast(pa.int64()).to_pylist(), strict=True
        )
    }
    own = np.flatnonzero(np.isin(task.subjects, list(died)))[:5]
    times = task.times.copy()
    times[own] = [died[subject] // DAY * DAY + DAY - 1 for subject in task.subjects[own].tolist()]
    assert "label-after-death" not in findings(prepared, tmp_path, task._replace(times=times))
    times[own] += 1  # the next day
    found = findings(prepared, tmp_path, task._replace(times=times))["label-after-death"]
    assert found["severity"] == "error"
    assert found["seen"].startswith(f"5 of {len(times):,} labels")


def test_labels_after_a_code_of_death(tmp_path):
    rows = [born(subject) for subject in range(1, 41)]
    rows += [
        Row(subject, (100 + day) * DAY, f"DIAGNOSIS//{day}") for subject in range(1, 41) for day in (0, 1)
    ]
    rows += [Row(subject, 200 * DAY, "HOSPITAL_DISCHARGE//DIED") for subject in range(1, 11)]
    splits = {"train": [*range(1, 31)], "tuning": [*range(31, 36)], "held_out": [*range(36, 41)]}
    meds = write_meds(tmp_path / "meds", rows, splits=splits)
    folder = prepare(meds, tmp_path / "prepared", "--codes", ".", "--min_count", "1")
    subjects = np.arange(1, 41)
    labels = Task(subjects, np.full(40, 200 * DAY + HOUR), subjects % 2 == 0)
    assert "label-after-death" not in findings(folder, tmp_path, labels)
    late = labels._replace(times=labels.times + DAY)
    assert findings(folder, tmp_path, late)["label-after-death"]["seen"].startswith("10 of 40 labels")


def test_negatives_followed_for_less_than_the_horizon(data, prepared, task, tmp_path):
    last = history_ends(data, task.subjects)[1]
    times = np.where(task.values, task.times, last - 100 * DAY)
    early = task._replace(times=np.maximum(times, history_ends(data, task.subjects)[0]))
    assert "negative-without-follow-up" not in findings(prepared, tmp_path, early, "--horizon_days", "50")
    found = findings(prepared, tmp_path, early, "--horizon_days", "200")
    assert "200 days after the prediction time or later" in found["negative-without-follow-up"]["seen"]


def test_the_outcome_in_disguise(prepared, task, tmp_path):
    positive = dict(zip(task.subjects[task.values].tolist(), task.times[task.values].tolist(), strict=True))
    folder = rewrite(prepared, tmp_path / "spoilt", lambda data: planted(data, "RX//J05AH02", positive))
    at_once = findings(folder, tmp_path, task)["outcome-code-in-input"]
    assert at_once["severity"] == "error"  # revealed at the prediction time
    task = task._replace(times=task.times + 2 * DAY)
    found = findings(folder, tmp_path, task)
    assert f"RX//J05AH02 ({len(positive)} positive and 0 negative" in found["outcome-code-in-input"]["seen"]
    # It may be a legitimate sign, known beforehand: that is asked.
    assert found["outcome-code-in-input"]["severity"] == "warning"
    assert "?" in found["outcome-code-in-input"]["why"]
    # Where the user says that it is not known before the outcome, it is an error.
    for options in (("--outcome_codes", "RX//J05AH02"), ("--delays", "RX//J05AH02=0")):
        told = findings(folder, tmp_path, task, *options)["outcome-code-in-input"]
        assert told["severity"] == "error"
        assert "later: RX//J05AH02" in told["seen"]


def test_a_fact_that_is_the_outcome(prepared, task, tmp_path):
    assert "outcome-fact" not in findings(prepared, tmp_path, task)
    folder = rewrite(prepared, tmp_path / "spoilt", lambda data: data)
    splits = {name: part.subject_ids for name, part in read_prepared(folder).splits.items()}
    for name, ids in splits.items():
        died = np.isin(ids, task.subjects[task.values])
        facts = sorted([*((one, "SEX//F") for one in ids), *((one, "VITAL//dead") for one in ids[died])])
        table = pa.table({"subject_id": [one for one, _ in facts], "code": [code for _, code in facts]})
        pq.write_table(table, folder / name / "static.parquet")
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    write_json(folder / "manifest.json", sealed(manifest | {"files": digests_of(folder)}))
    found = findings(folder, tmp_path, task)["outcome-fact"]
    assert found["severity"] == "warning" and "SEX" not in found["seen"]
    assert f"VITAL//dead ({task.values.sum()} positive and 0 negative subjects" in found["seen"]
    told = findings(folder, tmp_path, task, "--outcome_codes", "VITAL//")["outcome-fact"]
    assert told["severity"] == "error"


def test_a_suspected_code_that_few_have_is_no_alarm(prepared, task, tmp_path):
    few = np.flatnonzero(task.values)[:12]
    positive = dict(zip(task.subjects[few].tolist(), task.times[few].tolist(), strict=True))
    folder = rewrite(prepared, tmp_path / "spoilt", lambda data: planted(data, "RX//J05AH02", positive))
    found = findings(folder, tmp_path, task)
    assert found["outcome-code-suspected"]["severity"] == "info"
    assert "RX//J05AH02 (12 positive and 0 negative" in found["outcome-code-suspected"]["seen"]
    assert "outcome-code-in-input" not in found


def test_a_label_made_from_the_event_at_the_prediction_time(data, prepared, task, tmp_path):
    times = outcome_times(data, task)
    found = findings(prepared, tmp_path, task._replace(times=times), *DEFINED)
    for name in ("label-revealed-at-prediction-time", "outcome-at-prediction-time"):
        assert found[name]["severity"] == "error"
    assert OUTCOME in found["label-revealed-at-prediction-time"]["seen"]
    # A microsecond earlier, the outcome is no input.
    found = findings(prepared, tmp_path, task._replace(times=times - 1), *DEFINED)
    assert "error" not in {finding["severity"] for finding in found.values()}
    assert OUTCOME in found["outcome-just-after-prediction"]["seen"]
    assert found["outcome-just-after-prediction"]["severity"] == "info"


def test_an_outcome_just_before_the_prediction_time(data, prepared, task, tmp_path):
    times = outcome_times(data, task) + HOUR
    found = findings(prepared, tmp_path, task._replace(times=times))
    assert OUTCOME in alarms(found)["label-revealed-just-before"]
    assert "label-revealed-at-prediction-time" not in found


def test_repeats_of_the_outcome(data, prepared, task, tmp_path):
    # Positive are those who have it in their history; half of the history lies after the prediction.
    code = data.vocabulary.codes.index(OUTCOME)
    rows = []
    for part in data.splits.values():
        for row in range(len(part)):
            own = slice(part.offsets[row], part.offsets[row + 1])
            when = part.times[own][part.codes[own] == code]
            if len(when) > 1:
                rows.append((int(part.subject_ids[row]), int(when[-1]) - 1, True))
    again = Task(*(np.array(list(column)) for column in zip(*rows, strict=True)))
    both = Task(*(np.append(a, b) for a, b in zip(task, again, strict=True)))
    assert again.values.sum() > task.values.sum() / 2
    found = findings(prepared, tmp_path, both, "--outcome_codes", OUTCOME)
    total = int(both.values.sum())
    assert f"In {len(rows)} of {total} positive labels" in found["outcome-repeated"]["seen"]
    assert found["outcome-repeated"]["severity"] == ("warning" if len(rows) > total / 2 else "info")
    alone = Task(*(np.append(a[~task.values], b) for a, b in zip(task, again, strict=True)))
    found = findings(prepared, tmp_path, alone, "--outcome_codes", OUTCOME)
    assert found["outcome-repeated"]["severity"] == "warning"


def test_an_outcome_that_is_no_code_of_the_data(prepared, task, tmp_path):
    found = findings(prepared, tmp_path, task, "--outcome_codes", "MEDS_DEATH")
    assert alarms(found) == {}
    assert "MEDS_DEATH" in found["outcome-not-among-codes"]["seen"]


def test_negatives_that_have_the_outcome(prepared, task, tmp_path):
    values = task.values.copy()
    chosen = np.flatnonzero(values)[:3]
    values[chosen] = False
    found = alarms(findings(prepared, tmp_path, task._replace(values=values), *DEFINED))
    assert found["negative-with-outcome"].startswith("3 of")


def test_codes_that_are_known_later(tmp_path):
    rows = []
    for subject in range(1, 41):
        rows.append(born(subject))
        rows += [Row(subject, (100 + day) * DAY, f"DIAGNOSIS//{day}", 1) for day in range(4)]
        rows.append(Row(subject, 103 * DAY + HOUR, "PROCEDURE//END", 1))
    splits = {"train": range(1, 31), "tuning": range(31, 36), "held_out": range(36, 41)}
    folder = prepare(
        write_meds(tmp_path / "meds", rows, splits={name: list(ids) for name, ids in splits.items()}),
        tmp_path / "prepared",
        "--visit_column",
        "hadm_id",
    )
    # Predicted on day 102, when the codes of the days 0 to 2 are in the input.
    subjects = np.arange(1, 41)
    labels = Task(subjects, np.full(40, 102 * DAY), subjects % 2 == 0)
    for delay, expected in {
        "DIAGNOSIS//=0": None,
        "DIAGNOSIS//=1": "40 of 120 events of DIAGNOSIS// in the inputs of 40 of 40 labels are only known",
        "DIAGNOSIS//=1.5": "80 of 120",
        "DIAGNOSIS//[12]=2": "80 of 80 events of DIAGNOSIS//[12]",
        "DIAGNOSIS//=visit": "120 of 120 events of DIAGNOSIS// in the inputs of 40 of 40 labels are only "
        "known at the end of the visit",
    }.items():
        found = findings(folder, tmp_path, labels, "--delays", delay)
        if expected is None:
            assert "not-yet-known" not in found
        else:
            assert found["not-yet-known"]["severity"] == "error"
            assert found["not-yet-known"]["seen"].startswith(expected)
    # With the delay in the manifest, predictions keep to it: it is checked without being asked for.
    known = ("--visit_column", "hadm_id", "--delays", "DIAGNOSIS//=1.5", "LAB//=9")
    delayed = prepare(tmp_path / "meds", tmp_path / "delayed", *known)
    found = findings(delayed, tmp_path, labels)
    assert "not-yet-known" not in found
    assert found["kept-until-known"]["severity"] == "info"
    assert found["kept-until-known"]["seen"].startswith("80 of 120")
    assert "not-yet-known" in findings(delayed, tmp_path, labels, "--delays", "DIAGNOSIS//=1")
    after = labels._replace(times=np.full(40, 103 * DAY + HOUR))
    assert "not-yet-known" not in findings(folder, tmp_path, after, "--delays", "DIAGNOSIS//=visit")


def test_labels_that_are_not_binary(data, prepared, task, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = task.write(tmp_path / "classes.parquet")
    table = pq.read_table(file).drop_columns(["boolean_value"])
    names = pa.array(np.where(task.values, "yes", "no").tolist())
    pq.write_table(table.append_column("categorical_value", names), file)
    found = findings(prepared, tmp_path, None, "--labels", str(file))
    assert alarms(found) == {}
    assert "categorical" in found["labels-not-binary"]["seen"]


def test_no_subject_id_is_shown_or_written(prepared, task, tmp_path, capsys):
    odd = task._replace(subjects=np.append(task.subjects[:-3], [11, 12, 13]))
    findings(prepared, tmp_path, odd, "--outcome_codes", OUTCOME)
    shown = capsys.readouterr().out + (tmp_path / "findings.json").read_text()
    assert "label-subject-unknown" in shown
    assert not [subject for subject in task.subjects.tolist() if str(subject) in shown]


MISTAKES = {
    "no such folder": (["--data", "{tmp}/none"], "none is no prepared data set"),
    "no such labels": (["--labels", "{tmp}/none"], "none does not exist"),
    "labels without values": (["--labels", "{tmp}/keys.parquet"], "has no value in any of its 1 rows"),
    "delay without days": (["--labels", "{labels}", "--delays", "DX//"], "--delays has 'DX//': write REGEX="),
    "negative delay": (["--labels", "{labels}", "--delays", "DX//=-1"], "--delays has 'DX//=-1'"),
    "delay of no code": (["--labels", "{labels}", "--delays", "ZZ=1"], "no code of the vocabulary matches"),
    "wrong pattern": (["--labels", "{labels}", "--delays", "X(=1"], "no regular expression"),
    "wrong horizon": (["--labels", "{labels}", "--horizon_days", "0"], "--horizon_days is 0"),
    "delay without labels": (["--delays", "DX//=1"], "--delays has no effect without labels"),
    "wrong death code": (["--death_codes", "X("], "--death_codes has 'X('"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_error(mistake, prepared, task, tmp_path, capsys):
    options, expected = MISTAKES[mistake]
    labels = task.write(tmp_path / "labels.parquet")
    keys = pq.read_table(labels).slice(0, 1).drop_columns("boolean_value")
    pq.write_table(keys, tmp_path / "keys.parquet")
    arguments = [option.format(tmp=tmp_path, labels=labels) for option in options]
    folder = [] if "--data" in arguments else ["--data", str(prepared)]
    assert main(["doctor", *folder, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]

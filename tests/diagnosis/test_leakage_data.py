import json
from dataclasses import replace

import numpy as np
import pytest

from behrt_jax.data import events
from behrt_jax.data.lives import PLACEHOLDER_BIRTH
from behrt_jax.data.prepared import read_manifest, read_prepared
from behrt_jax.data.vocabulary import UNK
from tests.diagnosis.audited import (
    OUTCOME,
    YEAR,
    alarms,
    copied,
    findings,
    first_occurrence,
    joined,
    prepare,
    recounted,
    rewrite,
    taken,
)
from tests.records.meds_folder import DAY, HOUR, Row, born, by_remainder, history_rows, write_meds
from tests.records.prepare.test_pipeline import without_digests


def two_splits(data):
    data.splits["tuning"] = joined(data.splits["tuning"], taken(data.splits["train"], np.arange(3)))
    return data


def twice(data):
    data.splits["tuning"] = joined(data.splits["tuning"], taken(data.splits["tuning"], np.arange(2)))
    return data


def counted_everywhere(data):
    counts = sum(np.bincount(part.codes, minlength=len(data.vocabulary)) for part in data.splits.values())
    return replace(data, vocabulary=replace(data.vocabulary, counts=np.asarray(counts, np.int64)))


def unseen(data):
    codes = data.splits["train"].codes
    codes[codes == 7] = UNK
    return recounted(data)


def rare(data):
    codes = data.splits["train"].codes
    codes[np.flatnonzero(codes == 7)[3:]] = UNK
    return recounted(data)


def miscounted(data):
    data.vocabulary.counts[9] += 1
    return data


def unordered(data):
    train = data.splits["train"]
    row = int(np.argmax(train.lengths))
    own = slice(train.offsets[row], train.offsets[row + 1])
    train.times[own] = train.times[own][::-1]
    train.ages[own] = train.ages[own][::-1]
    return data


def aged(years):
    def spoil(data):
        data.splits["held_out"].ages[:] += np.float32(years)
        return data

    return spoil


def in_seconds(data):
    for part in data.splits.values():
        part.times[:] //= 1_000_000
        part.ages[:] = (part.times + DAY) / events.YEAR
    return data


def far(data):
    part = data.splits["train"]
    ends = part.offsets[1:] - 1
    last = ends[np.argmin(part.ages[ends])]  # of a subject who is young enough
    part.ages[last] += np.float32(70)
    part.times[last] += round(70 * events.YEAR)
    return data


def shifted(years_of):
    """Each subject by so many years, as a whole."""

    def spoil(data):
        for part in data.splits.values():
            years = np.repeat(years_of(np.arange(len(part))), part.lengths)
            part.times[:] += (years * events.YEAR).astype(np.int64)
        return data

    return spoil


def months_as_years(data):
    train = data.splits["train"]
    months = (train.times // (30 * DAY)) % 12
    train.ages[:] = np.floor(train.ages) + months
    return data


def deaths(data):
    names = tuple("HOSPITAL_DISCHARGE//DIED" if code == OUTCOME else code for code in data.vocabulary.codes)
    return replace(data, vocabulary=replace(data.vocabulary, codes=names))


FAULTS = {
    "subject-in-two-splits": (two_splits, "error", "3 of 3,000 subjects"),
    "subject-twice-in-split": (twice, "error", "2 subjects"),
    "vocabulary-beyond-train": (counted_everywhere, "error", "those of all splits together"),
    "vocabulary-beyond-train/unseen": (unseen, "error", "1 codes have a row but no event in the train"),
    "vocabulary-beyond-train/rare": (rare, "error", "1 have fewer than 5 events there"),
    "vocabulary-counts-wrong": (miscounted, "error", "The counts of 1 rows"),
    "events-out-of-order": (unordered, "error", "events come before the one listed ahead"),
    "events-before-birth": (aged(-150), "error", "have a negative age"),
    "age-implausible": (aged(110), "warning", "above 120 years"),
    "times-of-1970": (in_seconds, "error", "within 100 days of 1970-01-01"),
    "times-far-apart": (far, "warning", "lie more than 20 years from all others"),
    "shifted-dates/spread": (shifted(lambda row: -70.0 * (row % 3)), "warning", "The events spread over 1"),
    "shifted-dates/future": (shifted(lambda row: 110.0 + row % 9), "warning", "events lie in the future"),
    "ages-against-times": (months_as_years, "error", "more than a day apart"),
    "events-after-death": (deaths, "error", "(HOSPITAL_DISCHARGE//DIED)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_caught(fault, prepared, tmp_path):
    spoil, severity, seen = FAULTS[fault]
    found = alarms(findings(rewrite(prepared, tmp_path / "spoilt", spoil), tmp_path))
    name = fault.partition("/")[0]
    assert list(found) == [name]
    assert seen in found[name]
    assert findings(tmp_path / "spoilt", tmp_path)[name]["severity"] == severity


def test_births_on_the_day_of_a_placeholder(prepared, tmp_path):
    counts = read_manifest(prepared)["events"] | {"changed": {PLACEHOLDER_BIRTH: 3}}
    found = findings(rewrite(prepared, tmp_path / "spoilt", lambda data: data, events=counts), tmp_path)
    assert alarms(found).keys() == {"placeholder-births"}
    assert found["placeholder-births"]["seen"].startswith("3 subjects are born on a day such as 1900-01-01")


def test_a_few_dates_in_the_future_are_no_sign_that_all_were_shifted(prepared, tmp_path):
    some = shifted(lambda row: np.where(row % 200 == 0, 110.0, 0.0))
    found = findings(rewrite(prepared, tmp_path / "few", some), tmp_path)
    assert alarms(found).keys() == {"times-far-apart"}


def test_dates_are_shifted_where_who_prepared_them_says_so(tmp_path):
    rows = history_rows(subjects=60)
    meds = write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    stated = prepare(meds, tmp_path / "stated", "--shifted_dates")
    like = prepare(meds, tmp_path / "like", "--like", str(stated))
    for folder in (stated, like):
        assert "--shifted_dates" in alarms(findings(folder, tmp_path))["shifted-dates"]
    assert "shifted-dates" not in findings(prepare(meds, tmp_path / "silent"), tmp_path)


def test_files_changed_after_preparing_by_an_older_version(prepared, tmp_path):
    folder = copied(prepared, tmp_path / "changed")
    without_digests(folder, fingerprint="0" * 64)
    assert list(alarms(findings(folder, tmp_path))) == ["changed-since-prepared"]


def test_clean_data_of_the_clinical_generator(prepared, task, tmp_path):
    assert alarms(findings(prepared, tmp_path)) == {}
    assert alarms(findings(prepared, tmp_path, task)) == {}
    options = ("--horizon_days", "365", "--outcome_codes", OUTCOME, "--delays", "DX//=0")
    found = findings(prepared, tmp_path, task, *options)
    assert alarms(found) == {}
    assert "In 0 of" in found["outcome-repeated"]["seen"]


@pytest.mark.parametrize("visit_column", [(), ("--visit_column", "hadm_id")])
def test_clean_data_of_a_small_meds_folder(visit_column, tmp_path):
    from behrt_jax.data.prepared import read_prepared

    rows = history_rows(subjects=500, days=6)
    meds = write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    folder = prepare(meds, tmp_path / "prepared", *visit_column)
    labels = first_occurrence(read_prepared(folder), "DIAGNOSIS//3", 3 * YEAR, place=0.2)
    assert alarms(findings(folder, tmp_path, labels)) == {}
    assert len(labels.values) > 100


def valued_rows(subjects=300, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for subject in range(1, subjects + 1):
        rows.append(born(subject))
        for day in sorted(rng.integers(1, 9000, 8).tolist()):
            rows.append(Row(subject, day * DAY, "LAB//K", value=float(rng.normal())))
            rows.append(Row(subject, day * DAY + HOUR, f"DIAGNOSIS//{rng.integers(5)}"))
    return rows


def test_quantiles_fitted_on_train_and_on_all_splits(tmp_path):
    rows = valued_rows()
    options = ("--value_codes", "LAB//", "--duplicates", "keep")
    fair = by_remainder(rows)
    meds = write_meds(tmp_path / "meds", rows, splits=fair)
    found = findings(prepare(meds, tmp_path / "fair", *options), tmp_path)
    assert alarms(found) == {}
    assert "quantiles-not-recounted" not in found

    # Others are prepared with what was fitted there.
    some = [row for row in rows if row.subject in fair["held_out"]]
    like = prepare(write_meds(tmp_path / "meds1", some), tmp_path / "like", "--like", str(tmp_path / "fair"))
    assert not {"vocabulary-beyond-train", "quantiles-beyond-train"}.intersection(findings(like, tmp_path))

    # Prepared as if all were of the train split, and only then split.
    everyone = {"train": [*fair["train"], *fair["held_out"]], "tuning": fair["tuning"][:1]}
    meds = write_meds(tmp_path / "meds2", rows, splits=everyone | {"held_out": []})
    leaky = prepare(meds, tmp_path / "leaky", *options)

    def split_late(data):
        train = data.splits["train"]
        out = np.isin(train.subject_ids, fair["held_out"])
        data.splits["held_out"] = taken(train, np.flatnonzero(out))
        data.splits["train"] = taken(train, np.flatnonzero(~out))
        data.splits["tuning"] = taken(data.splits["tuning"], np.arange(1))
        return recounted(data)

    found = alarms(findings(rewrite(leaky, tmp_path / "late", split_late), tmp_path))
    assert list(found) == ["quantiles-beyond-train"]
    assert "divide the events of train and held_out evenly" in found["quantiles-beyond-train"]


def test_bins_without_events_to_fit_them(tmp_path):
    rows = valued_rows()
    options = ("--value_codes", "LAB//", "--duplicates", "keep")
    folder = prepare(write_meds(tmp_path / "meds", rows, splits=by_remainder(rows)), tmp_path / "p", *options)

    def elsewhere(data):
        train = data.splits["train"]
        bins = [row for row, code in enumerate(data.vocabulary.codes) if code.startswith("LAB//K//Q")]
        lab = np.flatnonzero(np.isin(train.codes, bins))
        train.codes[lab[10:]] = UNK
        return recounted(data)

    found = alarms(findings(rewrite(folder, tmp_path / "few", elsewhere), tmp_path))
    assert "too few events in the train split" in found["quantiles-beyond-train"]


def test_where_quantiles_were_fitted_cannot_always_be_told(tmp_path):
    rows = [
        row if row.value is None else row._replace(value=float(round(row.value))) for row in valued_rows()
    ]
    meds = write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    found = findings(prepare(meds, tmp_path / "ties", "--value_codes", "LAB//"), tmp_path)
    assert not [name for name in found if name.startswith("quantiles")]
    assert alarms(found) == {}


@pytest.mark.parametrize(("least", "severity"), [(75, "warning"), (89, "error")])
def test_events_that_are_read_as_unknown(least, severity, tmp_path):
    rows = history_rows(subjects=60)
    meds = write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    assert "unknown-codes" not in findings(prepare(meds, tmp_path / "all", "--min_count", "1"), tmp_path)
    folder = prepare(meds, tmp_path / "prepared", "--min_count", str(least))
    found = findings(folder, tmp_path)["unknown-codes"]
    train = read_prepared(folder).splits["train"]
    assert found["severity"] == severity
    assert f"{np.mean(train.codes == UNK):.1%} of train" in found["seen"]


def test_events_that_name_unknown_visits(prepared, tmp_path):
    events = json.loads((prepared / "manifest.json").read_text())["events"]
    for share, told in ((0.05, False), (0.975, True)):
        lost = int(share * events["read"])
        changed = events | {"changed": {"unknown visit": lost}}
        folder = rewrite(prepared, tmp_path / f"{share}", lambda data: data, events=changed)
        found = findings(folder, tmp_path)
        assert ("unknown-visits" in found) == told
    assert found["unknown-visits"]["seen"].startswith(f"{lost:,} of {events['read']:,} events")


def test_events_dropped_after_death(tmp_path):
    rows = history_rows(subjects=60)
    rows += [Row(subject, 2000 * DAY, "MEDS_DEATH") for subject in range(1, 40)]
    meds = write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    found = findings(prepare(meds, tmp_path / "prepared"), tmp_path)["events-outside-life"]
    assert found["severity"] == "warning"
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    assert f"after death: {manifest['events']['dropped']['after death']})" in found["seen"]


def test_a_death_among_the_codes_is_told(tmp_path):
    rows = history_rows(subjects=60)
    rows += [Row(subject, 6000 * DAY, "DIAGNOSIS//DIED") for subject in range(1, 40)]
    meds = write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    found = findings(prepare(meds, tmp_path / "prepared"), tmp_path)
    assert "DIAGNOSIS//DIED says of 39 subjects" in found["death-among-codes"]["seen"]
    assert alarms(found) == {}


@pytest.mark.parametrize(("at_end", "expected"), [(True, ["stamped-at-visit-end"]), (False, [])])
def test_codes_stamped_at_discharge(at_end, expected, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for subject in range(1, 61):
        rows.append(born(subject))
        for visit in range(2):
            start = (100 + 400 * visit) * DAY
            hours = [1, *np.sort(rng.integers(2, 100, 12)).tolist()]
            rows += [Row(subject, start + h * HOUR, f"PROCEDURE//{rng.integers(5)}", visit) for h in hours]
            stamp = start + (100 if at_end else int(rng.integers(0, 100))) * HOUR
            rows += [
                Row(subject, stamp, f"DIAGNOSIS//{code}", visit) for code in rng.permutation(6)[:3].tolist()
            ]
    meds = write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    found = alarms(findings(prepare(meds, tmp_path / "p", "--visit_column", "hadm_id"), tmp_path))
    assert list(found) == expected
    if at_end:
        assert "DIAGNOSIS// codes come all at once at the end of 120 of 120 visits" in found[expected[0]]


def test_the_share_of_repeats(tmp_path):
    rows = []
    for subject in range(1, 21):
        rows.append(born(subject))
        # Of the codes of the later visits (A, B | A), two of three come again.
        rows += [Row(subject, day * DAY, f"DIAGNOSIS//{code}") for day, code in enumerate("A", 1)]
        rows += [Row(subject, 5 * DAY + at, f"DIAGNOSIS//{code}") for at, code in enumerate("AB")]
        rows.append(Row(subject, 9 * DAY, "DIAGNOSIS//A"))
    meds = write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    found = findings(prepare(meds, tmp_path / "prepared", "--min_count", "1"), tmp_path)
    assert found["repeated-codes"]["seen"].startswith("66.7% of the 60 codes")

"""The preparation command: from records to a prepared data set that pretraining reads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from behrt_jax.cli import main
from behrt_jax.config.data import DataConfig
from behrt_jax.data.events import DAY
from behrt_jax.data.prepared import read_prepared, rule_files
from behrt_jax.data.sequences import describe
from behrt_jax.records import meds_export
from behrt_jax.records.load import load_events, load_sequences
from behrt_jax.records.sources.meds import read_meds
from behrt_jax.workflows.pretrain import pretrain
from tests.records import omop_folder as omop
from tests.records.meds_check import check_meds
from tests.records.meds_folder import by_remainder, history_rows, tokens, tokens_of, write_meds
from tests.records.synthea_folder import write_synthea
from tests.workflows.small_run import SMALL_RUN, changed


@pytest.fixture(scope="module")
def meds(tmp_path_factory):
    rows = history_rows(subjects=60, days=6)
    return write_meds(tmp_path_factory.mktemp("source") / "meds", rows, splits=by_remainder(rows))


def run(meds, output, *options):
    return main(["prepare", "--source", "meds", "--input", str(meds), "--output", str(output), *options])


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_accounts_for_every_event(meds, tmp_path, capsys):
    assert run(meds, tmp_path / "prepared") == 0
    out = capsys.readouterr().out
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    events = manifest["events"]
    kept = sum(split["events"] for split in manifest["splits"].values())
    assert events["read"] == read_meds(meds).events.num_rows
    assert events["read"] == kept + sum(events["dropped"].values())
    for part in ("birth or death marker", "duplicate in visit", "DIAGNOSIS//", "packed", "manifest.json"):
        assert part in out


@pytest.mark.slow
def test_pretraining_reads_it_as_it_reads_the_source(meds, tmp_path):
    assert run(meds, tmp_path / "prepared") == 0
    config = changed(replace(SMALL_RUN, output=tmp_path / "a"), "train", epochs=1)
    data = replace(config.data, subjects=5000, vocabulary_size=None)
    first = pretrain(replace(config, data=replace(data, source="meds", path=meds)))
    config = replace(config, output=tmp_path / "b")
    second = pretrain(replace(config, data=replace(data, source="prepared", path=tmp_path / "prepared")))
    assert first.summary["data"]["fingerprint"] == second.summary["data"]["fingerprint"]
    assert first.summary["best"]["loss"] == second.summary["best"]["loss"]


def test_preparing_again_changes_nothing_and_other_options_are_refused(meds, tmp_path, capsys):
    assert run(meds, tmp_path / "prepared") == 0
    before = content(tmp_path / "prepared")
    assert run(meds, tmp_path / "prepared") == 0
    assert "Up to date" in capsys.readouterr().out
    assert run(meds, tmp_path / "again") == 0
    assert content(tmp_path / "again") == before
    capsys.readouterr()
    assert run(meds, tmp_path / "prepared", "--min_count", "2") == 2
    assert "another --output" in capsys.readouterr().err
    assert content(tmp_path / "prepared") == before


def test_shards_and_a_merge_equal_one_run(meds, tmp_path):
    assert run(meds, tmp_path / "whole") == 0
    for shard in ("1/3", "0/3", "2/3"):
        assert run(meds, tmp_path / "parts", "--shard", shard) == 0
        assert not (tmp_path / "parts" / "manifest.json").exists()
    assert run(meds, tmp_path / "parts", "--merge") == 0
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def test_a_missing_shard_is_told(meds, tmp_path, capsys):
    assert run(meds, tmp_path / "parts", "--shard", "0/2") == 0
    capsys.readouterr()
    assert run(meds, tmp_path / "parts", "--merge") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("option", ["--dry_run", "--dry-run"])
def test_a_dry_run_leaves_nothing(meds, tmp_path, capsys, option):
    assert run(meds, tmp_path / "prepared", option) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_export_to_meds_keeps_every_event(meds, tmp_path):
    assert run(meds, tmp_path / "prepared", "--to-meds", str(tmp_path / "exported")) == 0
    check_meds(tmp_path / "exported")
    source, exported = read_meds(meds), read_meds(tmp_path / "exported")
    assert exported.events.num_rows == source.events.num_rows
    for name, ids in source.splits.items():
        np.testing.assert_array_equal(np.sort(exported.splits[name]), np.sort(ids))
    # What is prepared from the export is what is prepared from the source.
    assert run(tmp_path / "exported", tmp_path / "twice") == 0
    first, second = read_prepared(tmp_path / "prepared"), read_prepared(tmp_path / "twice")
    assert first.fingerprint == second.fingerprint
    assert describe(first)["splits"] == describe(second)["splits"]


def test_folders_may_be_relative(meds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input").symlink_to(meds)
    assert run(Path("input"), Path("prepared"), "--to_meds", "exported") == 0
    written = capsys.readouterr().out
    assert f"Written: {tmp_path / 'prepared'}: " in written
    assert f"Written as MEDS: {tmp_path / 'exported'}: data/" in written
    check_meds(tmp_path / "exported")


def test_a_table_of_events(tmp_path, capsys):
    rng = np.random.default_rng(0)
    count = 4000
    days = rng.integers(0, 3000, count)
    table = pa.table(
        {
            "patient": pa.array(rng.integers(0, 80, count)),
            "when": pa.array((days * 86_400_000_000).astype("datetime64[us]")),
            "icd": pa.array([f"I{code}" for code in rng.integers(0, 30, count)]),
            "born": pa.array(np.full(count, "1960-01-01", "datetime64[D]")),
        }
    )
    pq.write_table(table, tmp_path / "events.parquet")
    file = tmp_path / "events.parquet"
    arguments = ["--source", "table", "--input", str(file), "--table.subject", "patient",
                 "--table.time", "when", "--table.birth", "born"]  # fmt: skip
    output = tmp_path / "prepared"
    assert main(["prepare", *arguments, "--table.code", "icd9", "--output", str(output)]) == 2
    assert "icd9" in capsys.readouterr().err
    assert main(["prepare", *arguments, "--table.code", "icd", "--output", str(output)]) == 0
    prepared = read_prepared(output)
    assert sum(len(part) for part in prepared.splits.values()) == 80
    assert len(prepared.vocabulary) == 35
    assert prepared.splits["train"].ages.min() >= 10 - 0.01


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory):
    """A data set without splits, whose codes have values."""
    rows = history_rows(subjects=12, days=6)
    return write_meds(tmp_path_factory.mktemp("unsplit") / "meds", rows)


def test_a_split_by_hash_is_told_and_can_be_exact(unsplit, tmp_path, capsys):
    options = ("--seed", "1", "--tuning_fraction", "0.25", "--held_out_fraction", "0.01")
    assert run(unsplit, tmp_path / "about", *options) == 0
    told = capsys.readouterr().out
    assert "dealt out by a hash of their ids (about 25% tuning, 1% held_out, seed 1)" in told
    assert "Warning: the held_out split has no subject" in told
    exact = (*options, "--splits.exact")
    assert run(unsplit, tmp_path / "exact", *exact) == 0
    told = capsys.readouterr().out
    assert "(exactly 25% tuning, 1% held_out, seed 1)" in told
    assert "Warning" not in told
    sizes = {name: len(part) for name, part in read_prepared(tmp_path / "exact").splits.items()}
    assert sizes == {"train": 8, "tuning": 3, "held_out": 1}
    for shard in ("0/2", "1/2"):
        assert run(unsplit, tmp_path / "parts", *exact, "--shard", shard) == 0
    assert run(unsplit, tmp_path / "parts", *exact, "--merge") == 0
    assert content(tmp_path / "parts") == content(tmp_path / "exact")
    # Subjects that ascend are read and encoded at once, but for this.
    ascending = write_meds(tmp_path / "ascending", history_rows(subjects=12, days=6), layout="deep")
    assert run(ascending, tmp_path / "again", *exact) == 0
    found = read_prepared(tmp_path / "again")
    assert found.fingerprint == read_prepared(tmp_path / "exact").fingerprint


def test_own_splits_are_not_drawn(meds, tmp_path, capsys):
    assert run(meds, tmp_path / "prepared", "--seed", "3", "--splits.exact") == 0
    told = capsys.readouterr().out
    assert "hash" not in told
    for option in ("seed", "splits.exact"):
        assert f"Warning: the source has splits of its own, so --{option} has no effect" in told
    assert told.count("Warning") == 2


def test_patterns_without_effect_are_told(unsplit, tmp_path, capsys):
    options = ["--codes", "DIAGNOSIS//", "DIAGNOSES//", "--exclude_codes", "DIAGNOSIS//9",
               "--value_codes", "LAB//", "--static_codes", "SEX//", "--splits.exact"]  # fmt: skip
    assert run(unsplit, tmp_path / "whole", *options) == 0
    told = capsys.readouterr().out
    for pattern in (
        "codes DIAGNOSES//",
        "exclude_codes DIAGNOSIS//9",
        "value_codes LAB//",
        "static_codes SEX//",
    ):
        assert f"Warning: --{pattern} matches no code of the data" in told
    assert told.count("Warning") == 4
    assert run(unsplit, tmp_path / "whole", *options) == 0
    assert capsys.readouterr().out.count("Warning") == 4  # left as it was, and told again
    for shard in ("0/2", "1/2"):
        assert run(unsplit, tmp_path / "parts", *options, "--shard", shard) == 0
    assert run(unsplit, tmp_path / "parts", *options, "--merge") == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_codes_without_values_are_told(unsplit, tmp_path, capsys):
    options = ["--value_codes", "DIAGNOSIS//", "--min_count", "1", "--splits.exact"]
    assert run(unsplit, tmp_path / "values", *options) == 0
    assert "Warning" not in capsys.readouterr().out
    bare = shutil.copytree(unsplit, tmp_path / "bare")
    for shard in (bare / "data").glob("*.parquet"):
        pq.write_table(pq.read_table(shard).drop_columns(["numeric_value"]), shard)
    assert run(bare, tmp_path / "none", *options) == 0
    assert "Warning: --value_codes DIAGNOSIS// makes no bins" in capsys.readouterr().out


MISTAKES = {
    "option of OMOP": (
        ["--input", "{meds}", "--output", "{tmp}/out", "--omop.skip", "death"],
        "--source omop",
    ),
    "option of tables": (
        ["--input", "{meds}", "--output", "{tmp}/out", "--table.code", "x"],
        "--source table",
    ),
    "no input": (["--output", "{tmp}/out"], "--input is missing"),
    "no output": (["--input", "{meds}"], "--output is missing"),
    "input that is not there": (["--input", "{tmp}/nowhere", "--output", "{tmp}/out"], "does not exist"),
    "not of that source": (["--source", "omop", "--input", "{meds}", "--output", "{tmp}/out"], "person"),
    "not an export": (["--source", "synthea", "--input", "{meds}", "--output", "{tmp}/out"], "patients"),
    "wrong shard": (["--input", "{meds}", "--output", "{tmp}/out", "--shard", "3/3"], "shard"),
    "nothing selected": (["--input", "{meds}", "--output", "{tmp}/out", "--codes", "NOTHING"], "DIAGNOSIS"),
    "wrong pattern": (["--input", "{meds}", "--output", "{tmp}/out", "--codes", "X("], "X("),
    "fractions": (["--input", "{meds}/data", "--output", "{tmp}/out", "--source", "table"], "data"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_error_and_nothing_left_behind(mistake, meds, tmp_path, capsys):
    arguments, expected = MISTAKES[mistake]
    arguments = [argument.format(meds=meds, tmp=tmp_path) for argument in arguments]
    assert main(["prepare", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_shard_cut_short_leaves_the_older_output_and_no_half_new_one(meds, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(meds, broken)
    shard = sorted((broken / "data").rglob("*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:-20])
    assert run(broken, tmp_path / "prepared") == 2
    assert shard.name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_training_options_on_prepared_data(meds, tmp_path):
    from behrt_jax.errors import InputError

    assert run(meds, tmp_path / "prepared") == 0
    data = replace(SMALL_RUN.data, source="prepared", path=tmp_path / "prepared", subjects=5000)
    with pytest.raises(InputError, match=r"data\.vocabulary_size has no effect on prepared data"):
        pretrain(replace(SMALL_RUN, data=data, output=tmp_path / "run"))


def test_the_span_of_times_is_told(meds, tmp_path, capsys):
    assert run(meds, tmp_path / "prepared") == 0
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    parts = read_prepared(tmp_path / "prepared").splits.values()
    days = (
        np.sort(np.concatenate([part.times for part in parts]))
        .astype("datetime64[us]")
        .astype("datetime64[D]")
    )
    first, median, last = str(days[0]), str(days[(len(days) - 1) // 2]), str(days[-1])
    assert manifest["times"] == {"first": first, "median": median, "last": last}
    out = capsys.readouterr().out
    assert f"Events from {first} to {last}, median {median}." in out
    assert "another unit" not in out


@pytest.mark.parametrize("factor", [1000, 1_000_000])
def test_times_of_another_unit_are_told(meds, tmp_path, capsys, factor):
    shutil.copytree(meds, tmp_path / "meds")
    for file in (tmp_path / "meds" / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        later = pc.add(table["time"].cast(pa.int64()), 40 * 365 * DAY)
        pq.write_table(table.set_column(1, "time", pc.divide(later, factor).cast(pa.timestamp("us"))), file)
    assert run(tmp_path / "meds", tmp_path / "prepared") == 0
    assert "1970, so that the numbers of the time column are most likely of another unit" in " ".join(
        capsys.readouterr().out.split()
    )


def unborn(meds, folder):
    shutil.copytree(meds, folder)
    ids = set()
    for file in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        ids.update(table["subject_id"].to_pylist())
        pq.write_table(table.filter(pc.not_equal(table["code"], "MEDS_BIRTH")), file)
    return sorted(ids)


def test_subjects_without_births(meds, tmp_path, capsys):
    assert run(meds, tmp_path / "whole") == 0
    ids = unborn(meds, tmp_path / "meds")
    assert run(tmp_path / "meds", tmp_path / "none") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "MEDS_BIRTH" in error and "--birth_codes" in error and "--births FILE" in error
    births = pa.table({"subject_id": ids[:-1], "birth": pa.array([0] * (len(ids) - 1), pa.timestamp("us"))})
    pq.write_table(births, tmp_path / "births.parquet")
    assert run(tmp_path / "meds", tmp_path / "births", "--births", str(tmp_path / "births.parquet")) == 0
    assert "of subjects without a birth: --births FILE" in " ".join(capsys.readouterr().out.split())
    whole, found = read_prepared(tmp_path / "whole"), read_prepared(tmp_path / "births")
    for name, part in found.splits.items():
        own = np.isin(whole.splits[name].subject_ids, ids[:-1])
        assert part.subject_ids.tolist() == whole.splits[name].subject_ids[own].tolist()
        assert np.allclose(part.births(np.arange(len(part))), 0, atol=60 * 60 * 1e6)
    for choice in ("first_event", "unknown"):
        assert run(tmp_path / "meds", tmp_path / choice, "--without_birth", choice) == 0
        for name, part in read_prepared(tmp_path / choice).splits.items():
            assert len(part.codes) == len(whole.splits[name].codes)
            assert np.isnan(part.ages).all() if choice == "unknown" else part.ages.min() == 0
    assert run(tmp_path / "meds", tmp_path / "unknown") == 2  # other options


def test_ages_that_cannot_be_are_refused_or_dropped(meds, tmp_path, capsys):
    shutil.copytree(meds, tmp_path / "meds")
    file = next((tmp_path / "meds" / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    subject = int(np.asarray(table["subject_id"])[0])
    row = {"subject_id": subject, "time": np.datetime64("9000-01-01", "us").item(), "code": "DIAGNOSIS//1"}
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([row], table.schema)]), file)
    assert run(tmp_path / "meds", tmp_path / "refused") == 2
    assert "1 events are at an age above 150 years" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "refused").exists()
    for choice in ("drop", "keep"):
        assert run(tmp_path / "meds", tmp_path / choice, "--implausible_ages", choice) == 0
        manifest = json.loads((tmp_path / choice / "manifest.json").read_text())
        assert manifest["options"]["implausible_ages"] == choice
        assert manifest["events"]["dropped"].get("age above 150 years") == (1 if choice == "drop" else None)


# Other subjects, prepared like a data set that is there, from every kind of source.


def as_meds(folder, rows):
    return ["--source", "meds", "--input", str(write_meds(folder, rows)), "--visit_column", "hadm_id"]


def as_table(folder, rows):
    folder.mkdir()
    columns = {
        "person": [row.subject for row in rows],
        "time": pa.array([row.time for row in rows], pa.timestamp("us")),
        "code": [row.code for row in rows],
        "stay": pa.array([row.visit for row in rows], pa.int64()),
    }
    pq.write_table(pa.table(columns), folder / "events.parquet")
    names = ["--table.subject", "person", "--table.visit", "stay"]
    return ["--source", "table", "--input", str(folder / "events.parquet"), *names]


def as_omop(folder, rows):
    born = [row for row in rows if row.code == "MEDS_BIRTH"]
    tables = {
        "person": [omop.person(row.subject, year_of_birth=1950 + row.subject % 9) for row in born],
        "condition_occurrence": [
            omop.condition(row.subject, 100 + int(row.code[-1]), day(row), visit_occurrence_id=row.subject)
            for row in rows
            if row.visit is not None
        ],
        "visit_occurrence": [omop.visit(row.subject, row.subject) for row in born],
        "concept": [omop.concept(100 + code, f"C{code}") for code in range(8)],
        "concept_ancestor": [
            {"ancestor_concept_id": 100, "descendant_concept_id": 101, "min_levels_of_separation": 1}
        ],
    }
    return ["--source", "omop", "--input", str(omop.write_omop(folder, tables)), "--ancestors"]


def as_synthea(folder, rows):
    born = {row.subject: f"{row.subject:08}-0000-0000-0000-000000000000" for row in rows}
    tables = {
        "patients": [{"ID": name, "BIRTHDATE": "1950-01-02"} for name in born.values()],
        "conditions": [
            {"PATIENT": born[row.subject], "START": day(row), "CODE": row.code[-1], "DESCRIPTION": "Text"}
            for row in rows
            if row.visit is not None
        ],
        "encounters": [],
    }
    return ["--source", "synthea", "--input", str(write_synthea(folder, tables))]


def day(row):
    return str(np.datetime64(row.time, "us").astype("datetime64[D]"))


def prepared(output, *options):
    assert main(["prepare", "--output", str(output), *options]) == 0
    return tokens(output)


@pytest.mark.parametrize("form", [as_meds, as_table, as_omop, as_synthea])
def test_other_subjects_are_prepared_like_a_data_set(tmp_path, form, capsys):
    rows = history_rows(subjects=60, days=6)
    all_options = form(tmp_path / "all", rows)
    trained = prepared(tmp_path / "first", *all_options, "--min_count", "3", "--duplicates", "count")
    some = [row for row in rows if row.subject in (5, 6, 17)]
    # Columns and ancestors are taken over from the same kind of source.
    given = form(tmp_path / "some", some)[:4]
    found = prepared(tmp_path / "new", *given, "--like", str(tmp_path / "first"))
    assert len(found) == 3 and found == {subject: trained[subject] for subject in found}
    assert "Preparing like" in capsys.readouterr().out
    strangers = [row._replace(code=f"X//{row.code}") if row.visit is not None else row for row in some]
    if form in (as_meds, as_table):  # these select by the patterns of the other
        assert main(["prepare", *form(tmp_path / "x", strangers)[:4], "--output", str(tmp_path / "p"),
                     "--like", str(tmp_path / "first")]) == (2 if form is as_meds else 0)  # fmt: skip
        assert ("No event is left" if form is as_meds else "X//DIAGNOSIS//") in "".join(capsys.readouterr())


def test_another_form_of_the_source_gives_the_same_tokens(tmp_path):
    rows = history_rows(subjects=60, days=6)
    trained = prepared(tmp_path / "first", *as_meds(tmp_path / "meds", rows), "--min_count", "3")
    some = [row for row in rows if row.subject in (5, 6, 17)]
    like = "--like", str(tmp_path / "first")
    found = prepared(tmp_path / "new", *as_table(tmp_path / "table", some), *like)
    assert found == {subject: trained[subject] for subject in (5, 6, 17)}
    # Splits of their own, of which any may be empty.
    one = write_meds(tmp_path / "one", some, splits={"tuning": [5, 6], "held_out": [17]})
    assert prepared(tmp_path / "split", "--input", str(one), *like) == found
    assert len(read_prepared(tmp_path / "split").splits["train"]) == 0


def test_shards_like_a_data_set_equal_one_run(tmp_path):
    rows = history_rows(subjects=60, days=6)
    prepared(tmp_path / "first", *as_meds(tmp_path / "meds", rows), "--min_count", "3")
    some = [row for row in rows if row.subject % 4 == 1]
    given = [*as_meds(tmp_path / "some", some), "--like", str(tmp_path / "first")]
    whole = prepared(tmp_path / "whole", *given)
    for shard in ("1/2", "0/2"):
        assert main(["prepare", "--output", str(tmp_path / "parts"), *given, "--shard", shard]) == 0
    assert prepared(tmp_path / "parts", *given, "--merge") == whole and len(whole) == 15


def test_like_a_run_on_generated_records(tmp_path):
    config = DataConfig(subjects=80, vocabulary_size=250)
    data, events = load_sequences(config, sep_token=False), load_events(config)
    (tmp_path / "run").mkdir()
    for name, content in rule_files(data.vocabulary, data.preparation).items():
        (tmp_path / "run" / name).write_bytes(content)
    chosen = data.splits["train"].subject_ids[:3]
    table = events.events.filter(pa.array(np.isin(events.events["subject_id"].to_numpy(), chosen)))
    meds_export.write_meds([table], tmp_path / "meds", splits={}, descriptions={}, dataset_name="new")
    found = prepared(
        tmp_path / "new", "--input", str(tmp_path / "meds"),
        "--like", str(tmp_path / "run"),
    )  # fmt: skip
    assert found == {subject: one for subject, one in tokens_of(data).items() if subject in chosen}
    assert len(found) == 3

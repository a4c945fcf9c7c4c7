import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.errors import InputError
from behrt_jax.records.sources.meds import read_meds
from experiments.benchmark import main
from experiments.benchmarks import prepare as benchmark_events
from experiments.benchmarks import prepare as module
from experiments.benchmarks.prepare import STAGES, PrepareBenchmark, as_table, benchmark_prepare, write_events

EVENTS, SUBJECTS, CODES = 20_000, 300, 50


def rows_of(folder: Path) -> list[tuple]:
    shards = [pq.ParquetFile(shard).read() for shard in sorted((folder / "data").glob("*.parquet"))]
    table = pa.concat_tables(shards)
    columns = [table["subject_id"], table["time"].cast(pa.int64()), table["code"]]
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The same events sorted and shuffled, in shards of about 4,096."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_events, "CHUNK_ROWS", 4096)
        for order in ("sorted", "shuffled"):
            write_events(folder / order, EVENTS, SUBJECTS, CODES, order)
    return folder


def test_the_made_up_events(tables):
    rows = rows_of(tables / "sorted")
    assert len(rows) == EVENTS
    assert rows == sorted(rows, key=lambda row: row[:2])
    assert {row[0] for row in rows} == set(range(SUBJECTS))
    frequencies = Counter(row[2] for row in rows)
    assert frequencies["MEDS_BIRTH"] == SUBJECTS
    assert len(frequencies) == CODES + 1
    assert frequencies["MEDICATION//000001"] > 3 * frequencies["DIAGNOSIS//000009"]
    assert {code.split("//")[0] for code in frequencies} == {
        "MEDS_BIRTH",
        "DIAGNOSIS",
        "MEDICATION",
        "PROCEDURE",
    }
    lengths = np.bincount([row[0] for row in rows])
    assert lengths.min() >= 2
    assert lengths.max() > 4 * np.median(lengths)
    births = {subject: time for subject, time, code in rows if code == "MEDS_BIRTH"}
    years = [(time - births[subject]) / (365.25 * 86_400_000_000) for subject, time, _ in rows]
    assert min(years) == 0.0
    assert 20 < max(years) < 90


def test_sorted_shards_hold_whole_subjects(tables):
    shards = sorted((tables / "sorted" / "data").glob("*.parquet"))
    subjects = [set(pq.ParquetFile(shard).read()["subject_id"].to_pylist()) for shard in shards]
    assert len(shards) >= 4
    assert sum(len(part) for part in subjects) == SUBJECTS


def test_the_shuffled_table_has_the_same_rows_in_no_order(tables):
    shuffled, ordered = rows_of(tables / "shuffled"), rows_of(tables / "sorted")
    assert sorted(shuffled) == sorted(ordered)
    subjects = np.array([row[0] for row in shuffled], dtype=float)
    assert abs(np.corrcoef(subjects[1:], subjects[:-1])[0, 1]) < 0.05
    assert abs(np.corrcoef(subjects, np.arange(EVENTS))[0, 1]) < 0.05
    assert (np.diff(subjects) == 0).mean() < 0.05


def test_the_tables_are_meds_and_the_same_each_time(tables, tmp_path):
    assert read_meds(tables / "sorted").counts.read == EVENTS
    write_events(tmp_path / "again", EVENTS, SUBJECTS, CODES, "shuffled")
    assert rows_of(tmp_path / "again") == rows_of(tables / "shuffled")


@pytest.mark.parametrize("events", [2, 3, 1023, 1024, 1025])
def test_a_shuffle_is_a_permutation(events):
    places = np.concatenate(list(benchmark_events._shuffled_places(events)))
    assert np.array_equal(np.sort(places), np.arange(events))


def test_every_stage_gives_all_figures(tmp_path, capsys):
    pytest.importorskip("polars")
    config = PrepareBenchmark(
        events=EVENTS,
        subjects=SUBJECTS,
        codes=CODES,
        order="shuffled",
        directory=tmp_path / "tables",
        output=tmp_path / "new" / "figures.json",
    )
    report = benchmark_prepare(config)
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == report
    assert report["settings"] == {"events": EVENTS, "subjects": SUBJECTS, "codes": CODES, "workers": 1}
    runs = report["runs"]
    assert [(run["order"], run["stage"]) for run in runs] == [("shuffled", stage) for stage in STAGES]
    for run in runs:
        assert run["events"] == EVENTS
        assert run["seconds"] > 0
        assert run["events_per_second"] == pytest.approx(EVENTS / run["seconds"])
        assert 20 < run["peak_mib"] < 2000
    assert report["machine"]["cores"] >= 1
    polars = runs[STAGES.index("polars")]
    for run in runs:
        assert run["speed_by_polars"] == pytest.approx(polars["seconds"] / run["seconds"])
    prepared = [run for run in runs if run["stage"] == "prepare"]
    assert all({"read and encode", "write", "finish"} == run["parts"].keys() for run in prepared)
    assert all(0 < sum(run["parts"].values()) <= run["seconds"] + 0.5 for run in prepared)
    assert {run["subjects"] for run in runs if run["stage"] in ("polars", "prepare")} == {SUBJECTS}
    assert capsys.readouterr().out.splitlines() == as_table(report).splitlines()
    assert [folder.name for folder in (tmp_path / "tables").iterdir()] == ["shuffled-20000-300-50"]


def test_without_polars_its_stage_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    config = PrepareBenchmark(2000, 30, 20, "sorted", tmp_path, stages=("parquet", "polars"))
    read, polars = benchmark_prepare(config)["runs"]
    assert polars["skipped"] == "polars is not installed"
    assert (read["events"], read["speed_by_polars"]) == (2000, None)
    assert "skipped: polars is not installed" in as_table({"runs": [read, polars]})


def test_a_stage_that_fails_is_named(tmp_path):
    config = PrepareBenchmark(2000, 30, 20, "sorted", tmp_path, stages=("source",))
    (tmp_path / "sorted-2000-30-20" / "data").mkdir(parents=True)
    with pytest.raises(InputError, match=r"stage source failed on sorted events: .*holds no \.parquet file"):
        benchmark_prepare(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "benchmark.py prepare"),
        (["speed"], "benchmark.py prepare"),
        (["prepare", "--events", "10", "--subjects", "6"], "two events for each subject"),
        (["prepare", "--codes", "0"], "at least one code"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    size = ["--events", "2000", "--subjects", "30", "--codes", "20"]
    file = tmp_path / "out.json"
    assert main(["prepare", *size, "--stages", "parquet", "--output", str(file)]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert [(run["order"], run["events"]) for run in runs] == [("sorted", 2000), ("shuffled", 2000)]
    assert "events/s" in capsys.readouterr().out


# The benchmark of attention.


def test_figures_of_both_forms(tmp_path, capsys):
    file = tmp_path / "out.json"
    size = ["--lengths", "256", "--heads", "4", "--size", "8", "--batch", "8", "--rounds", "1"]
    assert main(["attention", *size, "--subject_events", "5", "--output", str(file)]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert [(run["length"], run["form"]) for run in runs] == [(256, "dense"), (256, "chunked")]
    assert all(run["milliseconds"] > 0 for run in runs)
    dense, chunked = runs
    weights_mib = 8 * 4 * 256**2 * 4 / 2**20
    assert dense["temporary_mib"] > weights_mib
    assert dense["speed_by_dense"] == 1.0
    assert chunked["temporary_mib"] < dense["temporary_mib"]
    assert "temporary MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--lengths", "0"], "--lengths is (0,)"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--subject_events", "0"], "--subject_events is 0"),
    ],
)
def test_benchmark_attention_wrong_arguments(capsys, arguments, message):
    assert main(["attention", *arguments]) == 2
    assert message in capsys.readouterr().err


TINY = "--model.embedding-size 8 --model.hidden-size 8 --model.layers 1 --model.heads 2 --model.positions 10"
SIZES = "--vocabularies 40 30000 --tokens 640 --repeats 1 --model.head-chunk 2000"


@pytest.mark.slow
def test_the_command_measures_each_vocabulary_with_all_logits_and_in_parts(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["vocabulary", *TINY.split(), *SIZES.split(), "--output", str(file)]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert [(run["vocabulary"], run["head"], run["chunk"]) for run in runs] == [
        (40, "whole", 40),
        (40, "parts", 20),
        (30000, "whole", 30000),
        (30000, "parts", 2000),
    ]
    for run in runs:
        assert run["step_ms"] > 0 and run["head_ms"] > 0 and run["table_ms"] > 0
        assert run["head_share"] == pytest.approx(run["head_ms"] / run["step_ms"])
    assert [run["chosen"] for run in runs] == [True, False, False, True]
    # 64 rows with two masked codes: 128 x 30,000 logits are 14.6 MiB.
    assert runs[2]["temporary_mib"] > 14.6
    assert runs[3]["temporary_mib"] < 0.6 * runs[2]["temporary_mib"]
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--vocabularies", "5"], "sizes above 5"), (["--tokens", "49"], "at least one row, 50 tokens")],
)
def test_wrong_sizes(capsys, options, message):
    assert main(["vocabulary", *options]) == 2
    assert message in capsys.readouterr().err

"""Run folders are never overwritten, and their files are whole after an interruption."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from behrt_jax import files
from behrt_jax.errors import InputError
from behrt_jax.files import json_text, read_json, sealed, write_json, write_text
from behrt_jax.run_folder import (
    append_metrics,
    checked,
    open_run_folder,
    prepare_run_folder,
    read_config,
    read_document,
    read_metrics,
    record_metrics,
    truncate_metrics,
    write_files,
)

shared_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)


def make_run(folder: Path) -> Path:
    folder.mkdir()
    write_json(folder / "config.json", {"name": "small"})
    return folder


def test_a_new_folder_is_made_with_its_parents_and_comes_back_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = prepare_run_folder(Path("runs/../runs/first"), resume=False)
    assert folder == tmp_path / "runs" / "first"
    assert folder.is_dir()


def test_an_empty_folder_is_taken(tmp_path):
    assert prepare_run_folder(tmp_path, resume=False) == tmp_path.resolve()


@pytest.mark.parametrize("sign", ["config.json", "metrics.jsonl", "checkpoints/"])
def test_a_folder_with_a_run_is_refused_without_resume(tmp_path, sign):
    (tmp_path / sign).mkdir() if sign.endswith("/") else (tmp_path / sign).write_text("{}")
    with pytest.raises(InputError, match=r"--resume .*--output") as caught:
        prepare_run_folder(tmp_path, resume=False)
    assert str(tmp_path.resolve()) in str(caught.value)


def test_a_folder_of_other_files_is_refused_and_resume_is_not_offered(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="other files") as caught:
        prepare_run_folder(tmp_path, resume=False)
    assert "--resume" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    for path in (tmp_path / "out", tmp_path / "out" / "run"):
        with pytest.raises(InputError, match="cannot make the run folder"):
            prepare_run_folder(path, resume=False)


def test_resume_finds_the_run(tmp_path):
    folder = make_run(tmp_path / "run")
    assert prepare_run_folder(folder, resume=True) == folder.resolve()


def test_resume_without_a_run_is_refused_and_makes_nothing(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="no run to go on with"):
            prepare_run_folder(folder, resume=True)
    assert not (tmp_path / "none").exists()


def names_in(folder):
    return {path.name for path in folder.rglob("*")}


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_died_before_its_config_stood_starts_afresh(tmp_path, resume):
    for name in ("vocabulary.parquet", "parameters.json", ".config.json.31430.tmp", ".lock"):
        (tmp_path / name).touch()
    with open_run_folder(tmp_path, resume) as folder:
        assert names_in(folder) == {".lock"}
        (folder / "config.json").touch()
    assert names_in(tmp_path) == {"config.json"}


def test_what_is_not_of_a_run_alone_is_never_removed(tmp_path):
    for name in ("vocabulary.parquet", ".thesis.tex.12.tmp", "thesis.tex"):
        (tmp_path / name).touch()
    for resume, message in ((False, "other files"), (True, "no run to go on with")):
        with pytest.raises(InputError, match=message), open_run_folder(tmp_path, resume):
            pass
    assert names_in(tmp_path) == {"vocabulary.parquet", ".thesis.tex.12.tmp", "thesis.tex"}


def test_temporary_files_of_a_run_that_died_are_removed_when_it_goes_on(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "plots").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir()
    for name in (".report.html.31430.tmp", "plots/.loss.png.7.tmp", "checkpoints/.x.7.tmp"):
        (tmp_path / "run" / name).touch()
    prepare_run_folder(tmp_path / "run", resume=True)
    assert names_in(tmp_path / "run") == {"config.json", "plots", "checkpoints", ".x.7.tmp"}


def test_one_process_trains_in_a_folder(tmp_path):
    folder = tmp_path / "run"
    with open_run_folder(folder, resume=False):
        (folder / "config.json").touch()
        for resume in (False, True):
            with (
                pytest.raises(InputError, match="another process works there"),
                open_run_folder(folder, resume),
            ):
                pass
    with open_run_folder(folder, resume=True):
        pass


def test_a_folder_of_a_run_that_never_began_is_removed(tmp_path):
    with pytest.raises(KeyError), open_run_folder(tmp_path / "new", resume=False):
        raise KeyError
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyError), open_run_folder(tmp_path / "mine", resume=False):
        raise KeyError
    assert names_in(tmp_path) == {"mine"}


@pytest.mark.parametrize("text", ["{}", "[]", '{"settings": {}, "data": 1}'])
def test_a_config_that_no_run_wrote_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json is not as a run writes it"):
        read_config(tmp_path)


@dataclass(frozen=True)
class Settings:
    path: Path
    targets: tuple[str, ...]


def test_json_takes_numpy_paths_tuples_and_dataclasses_and_keeps_order(tmp_path):
    value = {
        "z": np.float32(0.5),
        "count": np.int64(2**40),
        "yes": np.bool_(True),
        "true": True,
        3: (1, np.uint8(2)),
        "grid": np.array([[1.5, math.nan]], np.float32),
        "settings": Settings(Path("a/b"), ("query", "out")),
    }
    write_json(tmp_path / "x.json", value)
    read = read_json(tmp_path / "x.json")
    assert read == {
        "z": 0.5,
        "count": 2**40,
        "yes": True,
        "true": True,
        "3": [1, 2],
        "grid": [[1.5, None]],
        "settings": {"path": "a/b", "targets": ["query", "out"]},
    }
    assert list(read) == ["z", "count", "yes", "true", "3", "grid", "settings"]
    assert read["yes"] is True
    assert read["true"] is True


def test_bfloat16_is_written_as_a_number(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    write_json(tmp_path / "x.json", [ml_dtypes.bfloat16(0.5), np.ones(2, ml_dtypes.bfloat16)])
    assert read_json(tmp_path / "x.json") == [0.5, [1.0, 1.0]]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_a_number_that_is_not_finite_becomes_null(tmp_path, number):
    write_json(tmp_path / "x.json", {"loss": [number]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": [None]}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    with pytest.raises(TypeError, match="object"):
        write_json(path, {"steps": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of a page \ud800")  # fails after the file was opened
    assert read_json(path) == {"steps": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_reading_json_that_is_missing_or_broken_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is not valid JSON"):
        read_json(tmp_path / "config.json")


records = st.lists(
    st.fixed_dictionaries(
        {
            "step": st.integers(0, 100),
            "split": st.text(),
            "loss": st.floats(allow_nan=False, allow_infinity=False),
        }
    ),
    max_size=8,
)


@shared_folder
@given(records=records)
def test_metrics_come_back_as_written_one_line_each(tmp_path, records):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    (tmp_path / "files.json").unlink(missing_ok=True)
    assert read_metrics(path) == []
    for number, record in enumerate(records, start=1):
        append_metrics(path, record)
        content = path.read_bytes()
        assert content.count(b"\n") == number
        assert content.endswith(b"\n")
    assert read_metrics(path) == records


@shared_folder
@given(records=records.filter(bool), data=st.data())
def test_a_torn_last_line_is_left_out_and_all_others_are_kept(tmp_path, records, data):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    (tmp_path / "files.json").unlink(missing_ok=True)
    for record in records:
        append_metrics(path, record)
    content = path.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    torn = data.draw(st.integers(1, last))
    path.write_bytes(content[: len(content) - torn])
    # Without its newline alone the record is still whole.
    assert read_metrics(path) == (records if torn == 1 else records[:-1])
    # After a resume the next record stands on a line of its own.
    truncate_metrics(path, 100)
    append_metrics(path, {"step": 101})
    assert read_metrics(path)[-1] == {"step": 101}


@pytest.mark.parametrize("bad", ['{"step": 1', "[1]", '{"loss": 1}', "", '{"step": "1"}'])
def test_a_broken_line_elsewhere_is_an_error_that_names_it(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{bad}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2,"):
        read_metrics(path)


@shared_folder
@given(records=records, step=st.integers(-1, 101))
def test_truncating_drops_and_counts_what_is_past_the_step(tmp_path, records, step):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    (tmp_path / "files.json").unlink(missing_ok=True)
    for record in records:
        append_metrics(path, record)
    dropped = truncate_metrics(path, step)
    left = read_metrics(path)
    assert left == [record for record in records if record["step"] <= step]
    assert dropped == len(records) - len(left)


def test_truncating_a_missing_file_does_nothing(tmp_path):
    assert truncate_metrics(tmp_path / "metrics.jsonl", 5) == 0
    assert not list(tmp_path.iterdir())


def test_metrics_that_are_not_finite_are_null(tmp_path):
    append_metrics(tmp_path / "m.jsonl", {"step": np.int32(3), "loss": np.float32("nan")})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 3, "loss": null}\n'


def started(folder, **more):
    """A run folder in which these documents were written beside its config.json."""
    values = {**more, "config": {"recorded": True, "settings": {}}}
    write_files(folder, {f"{name}.json": json_text(value).encode() for name, value in values.items()})
    return folder


def test_recorded_files_are_read_as_they_were_written(tmp_path):
    started(tmp_path, summary={"loss": 1.5})
    assert read_document(tmp_path, "summary.json") == {"loss": 1.5}
    write_files(tmp_path, {"summary.json": b'{"loss": 1.25}'})
    assert read_document(tmp_path, "summary.json") == {"loss": 1.25}
    assert checked(tmp_path, "task.json") == tmp_path / "task.json"  # was never written, and is not there


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run: (run / "summary.json").write_text('{"loss": 1.6}\n'),
            "summary.json is damaged, its",
        ),
        (lambda run: (run / "summary.json").write_text("{}"), "summary.json is damaged, it has 2 bytes"),
        (lambda run: (run / "summary.json").unlink(), "summary.json is missing"),
        (lambda run: (run / "files.json").unlink(), "files.json is missing"),
        (lambda run: (run / "files.json").write_text('{"files": {}}'), "files.json is damaged"),
        (lambda run: (run / "files.json").write_text("[]"), "files.json is damaged"),
        (lambda run: write_json(run / "files.json", sealed({"step": 1})), "files.json is damaged"),
    ],
)
def test_a_file_that_is_not_what_the_run_wrote(tmp_path, spoil, message):
    spoil(started(tmp_path, summary={"loss": 1.5}))
    with pytest.raises(InputError, match=message):
        read_document(tmp_path, "summary.json")


def test_a_file_that_the_run_has_not_written(tmp_path):
    (started(tmp_path) / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"summary\.json is not of this run"):
        read_document(tmp_path, "summary.json")


@pytest.mark.parametrize("fails", range(4))
def test_a_run_killed_while_it_writes_can_be_read(tmp_path, monkeypatch, fails):
    started(tmp_path, summary={"loss": 1.5})
    writes = []
    whole = files.written_whole

    def killed(path):
        writes.append(path)
        if len(writes) > fails:
            raise KeyboardInterrupt
        return whole(path)

    monkeypatch.setattr(files, "written_whole", killed)
    with pytest.raises(KeyboardInterrupt):  # four writes: the record, the two, the record
        write_files(tmp_path, {"summary.json": b'{"loss": 1}', "task.json": b'{"kind": 2}'})
    monkeypatch.undo()
    assert read_document(tmp_path, "summary.json") == {"loss": 1.5 if fails < 2 else 1}
    assert checked(tmp_path, "task.json").exists() == (fails == 3)
    write_files(tmp_path, {"summary.json": b"{}"})
    assert read_document(tmp_path, "summary.json") == {}


def test_a_run_of_an_older_version_is_read_and_recorded_when_it_goes_on(tmp_path, caplog):
    for name in ("config.json", "summary.json"):
        (tmp_path / name).write_text('{"loss": 1.5}')
    with caplog.at_level("WARNING"):
        assert read_document(tmp_path, "config.json") == read_document(tmp_path, "summary.json")
    assert len(caplog.records) == 1 and "without digests of its files" in caplog.text
    write_files(tmp_path, {"config.json": b"{}"})
    assert read_document(tmp_path, "summary.json") == {"loss": 1.5}
    (tmp_path / "summary.json").unlink()
    with pytest.raises(InputError, match=r"summary\.json is missing"):
        checked(tmp_path, "summary.json")


def test_metrics_are_those_that_were_recorded_and_may_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record_metrics(tmp_path)  # there are none
    assert read_metrics(path) == []
    append_metrics(path, {"step": 1, "loss": 2.5})
    record_metrics(tmp_path)
    append_metrics(path, {"step": 2})
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    whole = path.read_bytes()
    for content in (whole.replace(b"2.5", b"2.4"), whole[:10], None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InputError, match=r"metrics\.jsonl is missing or damaged"):
            read_metrics(path)
    path.write_bytes(whole)
    assert truncate_metrics(path, 1) == 1
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]

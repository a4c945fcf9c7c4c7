"""Several runs on one page: which is ahead, what differs, and when that cannot be said."""

import pytest

from behrt_jax.config.commands import ReportConfig
from behrt_jax.errors import InputError
from behrt_jax.files import write_json
from behrt_jax.run_folder import append_metrics
from behrt_jax.tracking.comparison import (
    differences,
    figure_table,
    headline,
    read_runs,
    setting_table,
    warnings,
)
from behrt_jax.workflows.report import report
from tests.tracking.test_report import Page, fill


def make(folder, losses, rank=8, fingerprint="ab", task=None, interval=(4.0, 4.2)):
    folder.mkdir(parents=True)
    settings = {
        "name": folder.name,
        "output": str(folder),
        "lora": {"rank": rank},
        "masking": {"probability": 0.15},
        "train": {"seed": 0},
        **({"task": {"pooling": "mean"}} if task else {}),
    }
    config = {"settings": settings, "versions": {"jax": "0.10.2"}, "data": {"fingerprint": fingerprint}}
    write_json(folder / "config.json", config)
    records = [
        {"step": 10 * k, "epoch": float(k), "split": "tuning", "loss": loss, "accuracy": 0.1}
        for k, loss in enumerate(losses, 1)
    ]
    for record in records:
        append_metrics(folder / "metrics.jsonl", record)
    best = min(records, key=lambda record: record["loss"])
    summary = {
        "best": best,
        "gain_over_unigram": 5.7 - best["loss"],
        "wall_seconds": 63.0,
        "interval": list(interval),
        "parameters": {"trainable": 271976},
        **({"task": task} if task else {}),
    }
    write_json(folder / "summary.json", summary)
    return folder


def test_the_page_says_who_is_ahead_and_what_differs(tmp_path):
    pytest.importorskip("matplotlib")
    folders = make(tmp_path / "a", [5.0, 4.5]), make(tmp_path / "b", [5.1, 4.2], rank=16)
    output = report(ReportConfig(runs=folders, output=tmp_path / "out.html"))
    text = output.read_text()
    page = Page(text)
    assert "b has the least validation loss, 4.2000 nats, 0.3000 below that of a, the next." in page.text
    assert "moves a loss by up to 0.100 nats" in page.text
    assert page.headings == ["Curves", "Figures", "Settings that differ"]
    assert len(page.links) == 1 and page.links[0].startswith("data:image/png")
    assert "lora.rank" in page.text and "masking.probability" not in page.text
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "out.html"}
    assert {path.name for path in folders[0].iterdir()} == {"config.json", "metrics.jsonl", "summary.json"}


def test_figures_are_in_order_of_the_loss_and_settings_by_run(tmp_path):
    runs = read_runs([make(tmp_path / "a", [4.5]), make(tmp_path / "b", [4.2], rank=16)])
    columns, rows = figure_table(runs)
    assert columns == [
        "run",
        "loss (nats)",
        "top-1 accuracy",
        "below the baseline",
        "best step",
        "trained",
        "time",
    ]
    assert rows == [
        ["b", "4.200", "10.0%", "1.5000", 10, 271976, "1 min 03 s"],
        ["a", "4.500", "10.0%", "1.2000", 10, 271976, "1 min 03 s"],
    ]
    assert differences(runs) == {"lora.rank": ["8", "16"]}
    assert setting_table(runs, differences(runs)) == (["setting", "a", "b"], [["lora.rank", "8", "16"]])


def test_many_runs_are_listed_by_value(tmp_path):
    runs = read_runs([make(tmp_path / f"r{k}", [4.0 + k], rank=4 if k < 4 else 8) for k in range(6)])
    columns, rows = setting_table(runs, differences(runs))
    assert columns == ["setting", "value", "runs"]
    assert rows == [["lora.rank", "4", "r0, r1, r2, r3"], ["lora.rank", "8", "r4, r5"]]


def test_what_cannot_be_compared_is_said(tmp_path):
    a, b = make(tmp_path / "a", [4.5]), make(tmp_path / "b", [4.2], fingerprint="cd")
    assert "different data" in warnings(read_runs([a, b]))[0]
    assert differences(read_runs([a, b])) == {"data fingerprint": ["ab", "cd"]}
    c = make(tmp_path / "c", [0.6], task="binary")
    assert "cannot be compared" in headline(read_runs([a, c]))
    d = make(tmp_path / "d", [4.5])
    assert headline(read_runs([a, d])).endswith("4.5000 nats, and so has d.")
    assert not any("different data" in said for said in warnings(read_runs([a, d])))
    write_json(d / "summary.json", {})
    (d / "metrics.jsonl").write_text("")
    assert "nothing to compare yet" in headline(read_runs([a, d]))


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = read_runs([make(tmp_path / "x" / "run", [4.5]), make(tmp_path / "y" / "run", [4.2])])
    assert [run.name for run in runs] == ["x/run", "y/run"]


def test_a_single_run_is_reported_again_and_with_an_output_left_as_it_is(tmp_path):
    pytest.importorskip("matplotlib")
    folder = fill(tmp_path / "run", ("config", "parameters", "summary", "metrics"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert report(ReportConfig(runs=(folder,), output=tmp_path / "there.html")) == tmp_path / "there.html"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert report(ReportConfig(runs=(folder,))) == folder / "report.html"
    assert (folder / "report.html").read_text() == (tmp_path / "there.html").read_text()
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "accuracy.png"}


def test_wrong_input_is_one_clear_error(tmp_path):
    run = make(tmp_path / "a", [4.5])
    (tmp_path / "empty").mkdir()
    for runs, output, said in (
        ((), None, "no run is named"),
        ((tmp_path / "none",), None, "holds no run"),
        ((run, tmp_path / "empty"), None, "empty holds no run"),
        ((run, run), None, "named twice"),
        ((run,), run / "summary.json", "ends with .html"),
    ):
        with pytest.raises(InputError, match=said):
            report(ReportConfig(runs=runs, output=output))
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "summary.json"}

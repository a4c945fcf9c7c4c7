"""The report is one page that needs nothing else, whatever the run folder holds or lacks."""

import base64
import re
from html.parser import HTMLParser
from itertools import combinations

import pytest

from behrt_jax.errors import InputError
from behrt_jax.files import write_json
from behrt_jax.run_folder import append_metrics
from behrt_jax.tracking.report import write_report

BAND = {
    "band": "1-10",
    "codes": 10,
    "targets": 157,
    "loss": 3.6,
    "accuracy": 0.22,
    "accuracy_top10": 0.69,
    "unigram_loss": 4.1,
    "unigram_accuracy": 0.13,
}
PNG = b"\x89PNG\r\n\x1a\nnot really"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def fill(folder, parts=("config", "parameters", "summary", "metrics", "plots")):
    folder.mkdir(exist_ok=True)
    if "config" in parts:
        config = {
            "settings": {
                "name": "small_lora",
                "model": {"layers": 2, "ffn_size": None},
                "lora": {"targets": ["query", "out"]},
                "optimizer": {"learning_rate": 0.0012345678},
            },
            "versions": {"jax": "0.10.2"},
            "devices": [],
            "command": ["behrt-jax", "pretrain", "--output", "runs/a b"],
        }
        write_json(folder / "config.json", config)
    if "parameters" in parts:
        report = {
            "total": 668776,
            "trainable": 271976,
            "frozen": 396800,
            "trainable_percent": 40.668,
            "lora_percent": 2.45,
            "lora": {"total": 16384, "trainable": 16384},
            "base": {"total": 396800, "trainable": 0},
            "regime": "lora",
            "adapters": [{"name": "layer_0/query", "in": 128, "out": 64, "rank": 8}],
        }
        write_json(folder / "parameters.json", report)
    if "summary" in parts:
        record = {"step": 40, "epoch": 1.0, "loss": 5.0, "accuracy": 0.1}
        summary = {
            "best": record,
            "last": record,
            "epochs": 1.0,
            "steps": 40,
            "stop_reason": "all epochs done",
            "wall_seconds": 151.3,
            "baselines": {"unigram": {"loss": 5.5}},
            "gain_over_unigram": 0.5,
            "findings": [
                {
                    "severity": "error",
                    "id": "uniform-data",
                    "when": "before",
                    "seen": "codes <at> random",
                    "why": "because",
                    "mend": "mend it",
                }
            ],
            "bands": [BAND],
            "confusions": [
                {
                    "code": "DX//J10",
                    "description": "Influenza",
                    "masked": 19,
                    "subjects": 12,
                    "found": 0.25,
                    "instead_code": "RX//N02",
                    "instead_description": None,
                    "instead_share": 0.5,
                }
            ],
            "neighbours": [
                {
                    "code": "DX//J10",
                    "description": "Influenza",
                    "events": 956,
                    "near": [{"code": "RX//N02", "description": None, "cosine": 0.777}],
                }
            ],
            "adapter_norms": [{"name": "layer_0/query", "norm": 2.4691, "share": 0.219}],
            "data": {
                "splits": {
                    name: {
                        "subjects": 4048,
                        "events": 60529,
                        "tokens": 60529,
                        "visits": 22923,
                        "lengths": {"p50": 10.0, "p90": 32.0, "p99": 79.1, "max": 188.0},
                    }
                    for name in ("train", "tuning", "held_out")
                },
                "events_read": 75012,
                "events_kept": 74284,
                "events_dropped": {"birth or death marker": 728},
                "events_changed": {},
                "vocabulary_rows": 1000,
            },
        }
        write_json(folder / "summary.json", summary)
    if "metrics" in parts:
        append_metrics(folder / "metrics.jsonl", {"step": 20, "epoch": 0.5, "split": "train", "loss": 6.0})
        append_metrics(
            folder / "metrics.jsonl",
            {"step": 40, "epoch": 1.0, "split": "tuning", "loss": 5.0, "accuracy": 0.1},
        )
    if "plots" in parts:
        (folder / "plots").mkdir()
        for name in ("accuracy", "loss"):
            (folder / "plots" / f"{name}.png").write_bytes(PNG + name.encode())
    return folder


def read(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_report_holds_outcome_parameters_curves_history_and_settings(tmp_path):
    page = Page(read(fill(tmp_path)))
    for part in (
        "small_lora",
        "below the unigram baseline by 0.500 nats",
        "1.0 epochs, 40 steps, 2 min 31 s. Stopped: all epochs done.",
        "the doctor found 1 error and no warnings",
        "Influenza [DX//J10]",
        "RX//N02 (0.78)",
        "21.9%",
        "dropped: birth or death marker",
        "behrt-jax pretrain --output 'runs/a b'",
        "codes <at> random",
        "uniform-data",
        "mend it",
        "best (step 40)",
        "75,012",
        "668,776",
        "271,976",
        "40.7 %",
        "regime: lora",
        "layer_0/query",
        "1 adapters",
        "1 validations",
        "lora.targets",
        "query out",
        "not set",
        "0.0012345678",
        "versions.jax",
    ):
        assert part in page.text, part
    assert "splits.train" not in page.text  # a table of splits, and not a list of counts


def test_the_verdict_comes_first_and_what_is_long_is_folded_away_at_the_end(tmp_path):
    text = read(fill(tmp_path))
    page = Page(text)
    assert page.headings == [
        "Curves",
        "Findings of the doctor",
        "Accuracy by frequency of the code",
        "What is taken for what",
        "Neighbours of frequent codes",
        "Size of the adapters",
        "Parameters",
        "Data",
        "Kept and left out",
        "Course",
        "Settings and environment",
        "To repeat it",
    ]
    order = [
        text.index(mark)
        for mark in ('class="verdict bad"', 'class="tiles"', "<figure>", "<article", "<h2>Par")
    ]
    assert order == sorted(order)
    settings = text[text.index("Settings and environment") : text.index("To repeat it")]
    assert settings.index("<details>") < settings.index("lora.targets") < settings.index("</details>")


def test_each_cell_of_a_table_knows_its_column_for_narrow_screens(tmp_path):
    text = read(fill(tmp_path))
    row = re.search(r"<tr><td[^>]*>train</td>(.*?)</tr>", text)
    assert row is not None
    assert re.findall(r'data-label="([^"]*)"', row[1]) == [
        "subjects", "events", "visits", "median length", "90 % length", "99 % length", "longest",
    ]  # fmt: skip
    assert re.findall(r">([^<]*)</td>", row[1]) == ["4,048", "60,529", "22,923", "10", "32", "79.1", "188"]


def test_a_fine_tuning_run_has_the_same_page_of_its_own_figures(tmp_path):
    write_json(tmp_path / "config.json", {"settings": {"name": "lora", "task": {"pooling": "mean"}}})
    best = {"step": 30, "epoch": 5.0, "loss": 0.41936, "auroc": 0.871}
    summary = {
        "task": "binary",
        "best": best,
        "last": best,
        "epochs": 5.0,
        "steps": 30,
        "stop_reason": "finished",
        "baselines": {"base rate": {"loss": 0.6758}, "count model": {"loss": 0.383, "auroc": 0.9}},
        "gaps": {"count model": {"nats": 0.036, "low": -0.02, "high": 0.09}},
        "calibration": {"temperature": 0.568, "threshold": None},
        "data": {
            "labels": 300,
            "duplicate_labels": 0,
            "train": {"examples": 184, "positive": 102},
            "tuning": {"examples": 56, "positive": 34},
        },
        "findings": [],
    }
    write_json(tmp_path / "summary.json", summary)
    text = read(tmp_path)
    page = Page(text)
    for part in (
        "Fine-tuning run with the configuration lora",
        "its validation loss, 0.4194 (AUROC 0.871), is below that of the base rate, 0.6758",
        "not told apart from that of a model on counts of codes (0.383)",
        "the doctor found no errors and no warnings",
        "temperature 0.568",
        "positive labels",
        "count model",
    ):
        assert part in page.text, part
    assert 'class="verdict good"' in text
    assert "nats" not in page.text  # not every loss of a task is in them
    assert "duplicate_labels" not in page.text  # there are none


def test_a_population_has_a_row_for_each_member(tmp_path):
    members = [
        {"member": "seed 0", "best_step": 30, "loss": 0.41, "base_rate_loss": 0.67, "auroc": 0.87},
        {"member": "seed 1", "best_step": None},
    ]
    summary = {"task": "binary", "members": members, "predicting_members": [0], "wall_seconds": 3.0}
    write_json(tmp_path / "summary.json", summary)
    page = Page(read(tmp_path))
    assert "1 of 2 members have learnt more than the base rate, seed 0 has the least" in page.text
    assert "Predicts: seed 0." in page.text
    assert "seed 1" in page.text


def test_pictures_are_embedded_loss_first(tmp_path):
    page = Page(read(fill(tmp_path)))
    pictures = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in page.links]
    assert pictures == [PNG + b"loss", PNG + b"accuracy"]


def test_the_report_loads_nothing(tmp_path):
    text = read(fill(tmp_path))
    page = Page(text)
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "a"} & set(page.tags)


@pytest.mark.parametrize("missing", ["config", "parameters", "summary", "metrics", "plots"])
def test_each_file_can_be_missing(tmp_path, missing):
    parts = {"config", "parameters", "summary", "metrics", "plots"} - {missing}
    page = Page(read(fill(tmp_path, parts)))
    assert ("no summary" in page.text) == (missing == "summary")
    assert ("No pictures" in page.text) == (missing == "plots")
    assert ("configuration is missing" in page.text) == (missing == "config")
    assert ("1 adapters" in page.text) == (missing != "parameters")
    assert ("1 validations" in page.text) == (missing != "metrics")


def test_any_single_or_pair_of_files_gives_a_page(tmp_path):
    names = ("config", "parameters", "summary", "metrics", "plots")
    for number, parts in enumerate([(), *((name,) for name in names), *combinations(names, 2)]):
        Page(read(fill(tmp_path / str(number), parts)))


def test_an_interrupted_run_tells_how_far_it_got(tmp_path):
    folder = fill(tmp_path, ("config", "metrics"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "epo')
    page = Page(read(folder))
    assert "got to step 40" in page.text
    assert "Best validation loss so far: 5.000 nats at step 40" in page.text


def test_everything_is_escaped(tmp_path):
    nasty = "<script>alert(1)</script>&\"'<u"
    folder = fill(tmp_path, ("plots",))
    write_json(
        folder / "config.json",
        {"settings": {"name": nasty}, nasty: nasty, "list": [nasty], "command": [nasty]},
    )
    write_json(folder / "parameters.json", {"regime": nasty, "adapters": [{"name": nasty, "in": nasty}]})
    summary = {
        "stop_reason": nasty,
        "findings": [{"id": nasty, "seen": nasty}],
        "data": {nasty: nasty},
        "confusions": [
            {"code": nasty, "description": nasty, "masked": 1, "found": 0.0}
            | {"instead_code": nasty, "instead_description": None, "instead_share": 1.0}
        ],
        "neighbours": [{"code": nasty, "events": 1, "near": [{"code": nasty, "cosine": 1.0}]}],
        "adapter_norms": [{"name": nasty, "norm": 1.0, "share": None}],
    }
    write_json(folder / "summary.json", summary)
    page = Page(read(folder))
    assert "script" not in page.tags
    assert "u" not in page.tags
    assert page.text.count(nasty) == 13 + 6


def test_figures_that_are_null_leave_empty_cells(tmp_path):
    folder = fill(tmp_path, ("config",))
    write_json(folder / "summary.json", {"best": None, "last": None, "epochs": None, "wall_seconds": None})
    append_metrics(
        folder / "metrics.jsonl", {"step": 1, "epoch": None, "split": "tuning", "loss": float("nan")}
    )
    page = Page(read(folder))
    assert "no validation loss to compare" in page.text
    assert "nan" not in page.text.lower()
    assert "None" not in page.text


def test_a_long_history_is_thinned_and_keeps_its_last_row(tmp_path):
    folder = fill(tmp_path, ())
    lines = [f'{{"step": {i}, "epoch": {i}.0, "split": "tuning", "loss": 5.0}}\n' for i in range(1, 252)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    page = Page(read(folder))
    assert "251 validations, one in 3 shown" in page.text
    assert "251.00" in page.text
    assert page.tags.count("tr") == 1 + 84


def test_a_missing_folder_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match=r"summary.json holds no JSON object"):
        write_report(tmp_path)

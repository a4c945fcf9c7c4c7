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

PNG = b"\x89PNG\r\n\x1a\nnot really"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
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
            "data": {"events": {"read": 75012}},
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
        "1.0 epochs, 40 steps, 2 min 31 s, stopped: all epochs done",
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
    assert ("adapters" in page.text) == (missing != "parameters")
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
    nasty = "<script>alert(1)</script>&\"'<b"
    folder = fill(tmp_path, ("plots",))
    write_json(folder / "config.json", {"settings": {"name": nasty}, nasty: nasty, "list": [nasty]})
    write_json(folder / "parameters.json", {"regime": nasty, "adapters": [{"name": nasty, "in": nasty}]})
    summary = {"stop_reason": nasty, "findings": [{"id": nasty, "seen": nasty}], "data": {nasty: nasty}}
    write_json(folder / "summary.json", summary)
    page = Page(read(folder))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.text.count(nasty) == 13


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

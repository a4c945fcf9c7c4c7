"""Trackers are told what metrics.jsonl holds, go on in one record, and are missed before any training."""

import importlib.util
import math
import struct
import sys

import pytest

from behrt_jax.config.training import TrackingConfig
from behrt_jax.errors import InputError
from behrt_jax.tracking import trackers
from behrt_jax.tracking.trackers import check_trackers, figures, open_trackers


def line(step, loss, split="train"):
    return {"step": step, "split": split, "epoch": step / 10, "loss": loss, "learning_rate": {"lora": 1e-3}}


def test_figures_are_named_by_split_and_what_is_no_number_is_left_out():
    record = {
        **line(3, 2.5, "tuning"),
        "auroc": None,
        "perplexity": math.nan,
        "without_gradient": ["params/x"],
        "adapters": {"a": {"layer": "layer_0/query", "movement": 0.5}},
        "members": [{"loss": 1.0, "auroc": None}, {"loss": 2.0}],
    }
    assert figures(record) == {
        "tuning/epoch": 0.3,
        "tuning/loss": 2.5,
        "tuning/learning_rate/lora": 1e-3,
        "tuning/adapters/a/movement": 0.5,
        "tuning/members/0/loss": 1.0,
        "tuning/members/1/loss": 2.0,
    }


@pytest.mark.parametrize(("option", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_package_that_is_not_there_is_told_with_what_to_install(option, package, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == package else find_spec(name))
    asked = TrackingConfig(**{option: True})
    with pytest.raises(InputError, match=rf"--tracking.{option} takes {package}.*'behrt-jax\[tracking\]'"):
        check_trackers(asked)
    with pytest.raises(InputError, match=package), open_trackers(asked, tmp_path, {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_trackers_nothing_is_imported_or_written(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_trackers(TrackingConfig(), tmp_path, {}) as send:
        send(line(1, 2.0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_event_files_hold_what_was_sent_and_a_resumed_run_writes_its_steps_anew(tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for losses in ({1: 5.0, 2: 4.0, 3: 9.0}, {3: 3.0, 4: 2.0}):
        with open_trackers(TrackingConfig(tensorboard=True), tmp_path, {}) as send:
            for step, loss in losses.items():
                send(line(step, loss))
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["train/epoch", "train/learning_rate/lora", "train/loss"]
    # What the first process wrote of step 3 is gone.
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        (1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0),
    ]  # fmt: skip


def messages_of(path):
    """Messages of an offline record: after 7 bytes, a log in blocks of 32 KiB as LevelDB writes it."""
    content, block, place, message = path.read_bytes(), 1 << 15, 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # no room for another header
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def stored(run):
    """Metrics by step, and everything else as text, of an offline run of Weights & Biases."""
    from wandb.proto import wandb_internal_pb2 as messages

    (path,) = run.glob("*.wandb")
    history, rest = {}, ""
    for message in messages_of(path):
        record = messages.Record()
        record.ParseFromString(message)
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            history[int(items["_step"])] = items
        else:
            rest += str(record)
    return history, rest


@pytest.mark.slow
def test_an_offline_record_of_weights_and_biases_holds_metrics_and_settings(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_API_KEY": "f" * 40}.items():
        monkeypatch.setenv(name, value)
    settings = {"name": "small", "lora": {"rank": 8}}
    folder = tmp_path / "run"
    folder.mkdir()
    for losses in ({1: 5.0, 2: 4.0}, {3: 3.0}):
        with open_trackers(TrackingConfig(wandb=True, project="mine"), folder, settings) as send:
            for step, loss in losses.items():
                send(line(step, loss))
    wandb.teardown()  # the end of a run is only announced to its service, which writes the file then
    first, second = sorted(folder.glob("wandb/offline-run-*"))
    own = (folder / "wandb" / "run_id.txt").read_text()
    assert first.name.endswith(f"-{own}") and second.name.endswith(f"-{own}")  # one record
    (history, rest), (later, _) = stored(first), stored(second)
    assert {step: float(items["train/loss"]) for step, items in history.items()} == {1: 5.0, 2: 4.0}
    assert {step: float(items["train/loss"]) for step, items in later.items()} == {3: 3.0}
    assert 'project: "mine"' in rest and '"rank"' in rest.replace("\\", "")
    assert "f" * 40 not in rest
    assert "requirements" not in rest and "sys.argv" not in rest

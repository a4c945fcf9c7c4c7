"""Pretraining as a whole: what a run leaves behind, resuming, and both ways of dividing the work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import load_adapter
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import InitConfig, TrackingConfig
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.stacked_layers import count_stacked_layers, stack_layers, unstack_layers
from behrt_jax.tracking import trackers
from behrt_jax.tracking.console import Console
from behrt_jax.tracking.summary import headline
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.loop import DivergenceError
from behrt_jax.training.pretrained import check_source, start_from
from behrt_jax.training.state import abstract_state, init_state, optimizer_for, set_up
from behrt_jax.workflows.pretrain import pretrain
from tests.commands import run_command
from tests.records.meds_folder import by_remainder, history_rows, write_meds
from tests.workflows.small_run import SMALL_RUN, changed

ONE = jax.devices()[:1]


def records(folder, split=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


def read(folder, name):
    return json.loads((folder / name).read_text())


def final_trees(folder):
    """Latest checkpoint of a run as flat numpy arrays."""
    config, vocabulary = SMALL_RUN, Vocabulary.read(folder / "vocabulary.parquet")
    setup = set_up(config, len(vocabulary))
    state = abstract_state(setup.shapes, optimizer_for(config.optimizer, setup, 10), make_mesh(ONE))
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
        trees = checkpoints.restore(
            step, params=state.variables["params"], lora=state.variables["lora"], opt_state=state.opt_state
        )
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(tuple(trees))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end, on one device."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return pretrain(replace(SMALL_RUN, output=folder), ONE)


def test_a_run_leaves_the_whole_folder(finished):
    folder = finished.folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "parameters.json", "metrics.jsonl", "summary.json", "SUMMARY.txt", "checkpoints",
        "adapter", "vocabulary.parquet", "preparation.json", "plots", "report.html",
        "files.json",
    }  # fmt: skip
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "accuracy.png"}
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "vocabulary.parquet",
        "preparation.json",
        "adapter_model.safetensors",
        "behrt_jax.json",
    }
    config = read(folder, "config.json")
    assert config["settings"]["lora"]["rank"] == 2
    assert config["versions"]["jax"] == jax.__version__
    assert len(config["data"]["fingerprint"]) == 64
    assert len(Vocabulary.read(folder / "vocabulary.parquet")) == 200
    parameters = read(folder, "parameters.json")
    assert parameters["base"]["trainable"] == 0 < parameters["lora"]["trainable"]
    assert len(parameters["adapters"]) == 4
    assert set(parameters["adapters"][0]) == {"name", "in", "out", "rank"}
    assert finished.exit_status == 0


def test_few_programs_are_made_before_the_first_step(finished):
    programs = read(finished.folder, "summary.json")["startup_programs"]
    # Each further one, however small, is traced, lowered and compiled while the user waits.
    assert programs.keys() == {"keys", "mask", "init", "train_step"}
    assert all(parts.keys() == {"trace", "lower", "compile"} for parts in programs.values())


def test_it_learns_more_than_the_unigram_baseline_and_says_so(finished):
    summary = read(finished.folder, "summary.json")
    validation = records(finished.folder, "tuning")
    assert summary["best"]["loss"] == min(line["loss"] for line in validation)
    assert summary["best"]["loss"] < summary["baselines"]["unigram"]["loss"] - 0.1
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert summary["gain_over_unigram"] > 0.1
    text = " ".join((finished.folder / "SUMMARY.txt").read_text().split())
    assert "below the unigram baseline" in text
    assert headline(summary) in text
    for line in validation:
        assert line["accuracy"] <= line["accuracy_top5"] <= line["accuracy_top10"]
        assert line["perplexity"] == pytest.approx(np.exp(line["loss"]))


def test_the_summary_tells_neighbours_and_how_large_the_adapters_are(finished):
    summary = read(finished.folder, "summary.json")
    vocabulary = Vocabulary.read(finished.folder / "vocabulary.parquet")
    counts = dict(zip(vocabulary.codes, vocabulary.counts.tolist(), strict=True))
    near = summary["neighbours"]
    assert near and summary["confusions"] == []  # no code is masked in ten of so few subjects
    assert [one["events"] for one in near] == sorted(counts.values(), reverse=True)[: len(near)]
    norms = summary["adapter_norms"]
    adapters = read(finished.folder, "parameters.json")["adapters"]
    assert [one["name"] for one in norms] == [one["name"] for one in adapters]
    assert all(one["norm"] > 0 and one["share"] > 0 for one in norms)
    page = (finished.folder / "report.html").read_text()
    assert f"({near[0]['near'][0]['cosine']:.2f})" in page and norms[0]["name"] in page


def test_no_subject_id_is_written_anywhere(finished):
    from behrt_jax.records.load import load_events

    ids = {str(i) for i in load_events(SMALL_RUN.data).events["subject_id"].unique().to_pylist()}
    long_ids = {i for i in ids if len(i) > 6}
    assert long_ids
    for name in (
        "config.json",
        "summary.json",
        "metrics.jsonl",
        "SUMMARY.txt",
        "report.html",
        "parameters.json",
    ):
        text = (finished.folder / name).read_text()
        assert not any(i in text for i in long_ids), name


def test_the_adapter_alone_on_its_base_gives_the_best_model(finished):
    folder = finished.folder
    vocabulary = Vocabulary.read(folder / "vocabulary.parquet")
    setup = set_up(SMALL_RUN, len(vocabulary))
    mesh = make_mesh(ONE)
    optimizer = optimizer_for(SMALL_RUN.optimizer, setup, 10)
    init_key = jax.random.split(jax.random.key(SMALL_RUN.train.seed), 3)[0]
    base = init_state(setup, optimizer, init_key, mesh).variables
    params, lora, _ = load_adapter(folder / "adapter", base["params"], vocabulary.fingerprint())
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        best = checkpoints.restore(checkpoints.best_step(), params=base["params"], lora=base["lora"])
    for ours, theirs in zip(
        jax.tree.leaves((params, lora)), jax.tree.leaves((best.params, best.lora)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and of a stretch of metrics, then resumed."""
    from behrt_jax.tracking.console import Console

    config = replace(SMALL_RUN, output=tmp_path / "parts")
    original = Console.step

    def stop_at_step_5(self, step, tokens, loss):
        original(self, step, tokens, loss)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Console, "step", stop_at_step_5)
    first = pretrain(config, ONE)
    assert first.exit_status == 128 + signal.SIGTERM
    assert read(config.output, "summary.json")["stop_reason"] == "interrupted by SIGTERM"
    assert final_trees(config.output)[0] == 5
    monkeypatch.setattr(Console, "step", original)
    second = pretrain(replace(config, resume=True), ONE)
    assert second.exit_status == 0
    whole, parts = final_trees(finished.folder), final_trees(config.output)
    assert whole[0] == parts[0]
    for ours, theirs in zip(whole[1], parts[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rates = {"steps_per_second", "tokens_per_second", "data_share", "device_share"}
    lines = [
        [{k: v for k, v in line.items() if k not in rates} for line in records(folder)]
        for folder in (finished.folder, config.output)
    ]
    assert lines[0] == lines[1]


def test_resume_refuses_other_settings_and_other_data(finished):
    resumed = replace(SMALL_RUN, output=finished.folder, resume=True)
    with pytest.raises(InputError, match=r"lora\.rank is 4, but the run in .* was made with 2"):
        pretrain(changed(resumed, "lora", rank=4), ONE)
    with pytest.raises(InputError, match=r"data\.seed is 9"):
        pretrain(changed(resumed, "data", seed=9), ONE)


def test_resume_refuses_a_run_whose_metrics_or_checkpoints_are_gone(finished, tmp_path):
    for version, gone, message in (
        ("this", "metrics.jsonl", r"metrics\.jsonl is missing or damaged"),
        ("this", "checkpoints", r"has no checkpoint that is whole, but \d+ validations"),
        ("this", "config.json", r"config\.json is damaged"),
        ("older", "metrics.jsonl", r"metrics\.jsonl is gone, but there is a checkpoint of step"),
        ("older", "config.json", r"config\.json is not as a run writes it"),
    ):
        folder = tmp_path / version / gone
        shutil.copytree(finished.folder, folder)
        if version == "older":  # without digests
            (folder / "files.json").unlink()
            config = {**read(folder, "config.json"), "recorded": False}
            (folder / "config.json").write_text(json.dumps(config))
        if gone == "config.json":
            (folder / gone).write_text("{}")
        else:
            (folder / gone).rename(folder.with_name(f"{gone}.away"))
        with pytest.raises(InputError, match=message):
            pretrain(replace(SMALL_RUN, output=folder, resume=True), ONE)


@pytest.mark.slow
def test_eight_devices_train_as_one(finished, tmp_path):
    config = changed(replace(SMALL_RUN, output=tmp_path / "eight"), "train", max_steps=8)
    pretrain(config, jax.devices())
    ours, theirs = (
        [line["loss"] for line in records(folder, "train")][:4] for folder in (finished.folder, config.output)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_uniform_data_has_nothing_to_learn_and_says_so(tmp_path, capsys):
    config = changed(replace(SMALL_RUN, output=tmp_path / "uniform"), "data", source="uniform")
    summary = pretrain(changed(config, "train", epochs=2), ONE).summary
    assert "nothing to learn" in capsys.readouterr().out
    assert summary["best"]["loss"] > np.log(195) - 0.1
    assert "uniform-data" in {found["id"] for found in summary["findings"]}


@pytest.mark.slow
def test_known_mistakes_are_allowed_with_a_warning(tmp_path, capsys):
    config = changed(replace(SMALL_RUN, output=tmp_path / "frozen"), "freezing", regime="lora_only")
    config = changed(config, "train", epochs=1)
    summary = pretrain(config, ONE).summary
    assert "cannot" in capsys.readouterr().out
    # Embeddings and head at random values: no better than guessing among all codes.
    assert abs(summary["best"]["loss"] - np.log(200)) < 0.3


@pytest.mark.slow
def test_cls_and_sep_tokens_and_the_papers_embeddings(tmp_path):
    model = replace(
        SMALL_RUN.model, embedding_size=16, cls_token=True, sep_token=True, visit_embedding="alternating",
        position_embedding="sinusoidal", position_of="visit", age_bin_years=1 / 12, age_rows=1321,
    )  # fmt: skip
    config = replace(SMALL_RUN, model=model, lora=None, output=tmp_path / "paper")
    config = changed(changed(config, "freezing", regime="full"), "train", epochs=8)
    summary = pretrain(config, ONE).summary
    assert summary["gain_over_unigram"] > 0
    assert not (config.output / "adapter").exists()


def test_divergence_keeps_the_last_good_checkpoint(tmp_path):
    config = replace(SMALL_RUN, output=tmp_path / "wild")
    config = changed(config, "optimizer", learning_rate=1e30, warmup_fraction=0.0, schedule="constant")
    with pytest.raises(DivergenceError, match="at step"):
        pretrain(changed(config, "train", validate_every=1, log_every=1), ONE)
    assert read(config.output, "summary.json")["stop_reason"].startswith("diverged")


@pytest.mark.slow
def test_meds_data_of_a_folder(tmp_path):
    rows = history_rows(subjects=60, days=6)
    write_meds(tmp_path / "meds", rows, splits=by_remainder(rows))
    data = replace(SMALL_RUN.data, source="meds", path=tmp_path / "meds", vocabulary_size=None)
    config = replace(SMALL_RUN, output=tmp_path / "run", data=data)
    summary = pretrain(changed(config, "train", epochs=2), ONE).summary
    assert summary["data"]["events_read"] == len(rows)
    assert summary["data"]["events_dropped"]["birth or death marker"] == 60
    assert summary["data"]["events_kept"] == len(rows) - sum(summary["data"]["events_dropped"].values())
    assert summary["data"]["splits"]["tuning"]["subjects"] == 6


@pytest.mark.skipif("EHR_TEST_DATA" not in os.environ, reason="needs the MIMIC-IV demo in MEDS")
@pytest.mark.slow
def test_mimic_demo_learns_more_than_the_unigram_baseline(tmp_path):
    path, run = Path(os.environ["EHR_TEST_DATA"]) / "mimic-iv-demo-meds", tmp_path / "mimic"
    # The commonest codes are learnt in a few epochs: the loss falls twice as far as is asked for below.
    options = ("--data.source", "meds", "--data.path", path, "--output", run, "--data.vocabulary_size", 200,
               "--train.epochs", 10, "--train.batch_size", 32)  # fmt: skip
    done = run_command("pretrain.py", "--config", "small_lora", *options)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"]["events_read"] == 916_166
    assert [summary["data"]["splits"][name]["subjects"] for name in ("train", "tuning")] == [80, 10]
    assert summary["gain_over_unigram"] > 0.2


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = replace(SMALL_RUN, output=tmp_path / "run", tracking=TrackingConfig(wandb=True))
    with pytest.raises(InputError, match=r"--tracking.wandb takes wandb, which is not installed"):
        pretrain(config, ONE)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_trackers_get_the_lines_of_metrics_and_a_resumed_run_goes_on(tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(SMALL_RUN, output=tmp_path / "run", tracking=TrackingConfig(tensorboard=True))
    pretrain(changed(config, "train", epochs=1), ONE)
    folder = pretrain(replace(changed(config, "train", epochs=2), resume=True), ONE).folder
    assert len(list((folder / "tensorboard").iterdir())) == 2
    read_back = accumulator.EventAccumulator(str(folder / "tensorboard"))
    read_back.Reload()
    lines = records(folder, "tuning")
    found = read_back.Scalars("tuning/loss")
    assert [event.step for event in found] == [line["step"] for line in lines]
    assert [event.value for event in found] == pytest.approx([line["loss"] for line in lines], rel=1e-6)


@pytest.mark.slow
def test_a_run_is_reported_again_where_jax_is_not_installed(finished, tmp_path):
    code = """
        import sys
        sys.modules["jax"] = None
        from behrt_jax.cli import main
        sys.exit(main(sys.argv[1:]))
    """
    command = ["report", str(finished.folder), "--output", str(tmp_path / "again.html")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *command], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.html").read_text() == (finished.folder / "report.html").read_text()


# Pretraining with stacked layers from end to end, and runs of one layout that start from the other.


TWO_LAYERS = changed(SMALL_RUN, "model", layers=2)
SHORT = changed(changed(TWO_LAYERS, "data", subjects=300), "train", epochs=4, validate_every=None)
STACKED = changed(SHORT, "model", scan_layers=True, rematerialise=True)
VOCABULARY = 200


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """A finished run with stacked layers and adapters."""
    return pretrain(replace(STACKED, output=tmp_path_factory.mktemp("runs") / "stacked"), ONE).folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A finished run layer by layer, with adapters."""
    return pretrain(replace(SHORT, output=tmp_path_factory.mktemp("runs") / "apart"), ONE).folder


def fresh(config):
    setup = set_up(config, VOCABULARY)
    init_key = jax.random.split(jax.random.key(config.train.seed), 3)[0]
    return init_state(setup, optimizer_for(config.optimizer, setup, 10), init_key, make_mesh(ONE))


def stored(folder, config, best=True):
    state = fresh(config)
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.best_step() if best else checkpoints.latest_step()
        trees = {"params": state.variables["params"], "lora": state.variables["lora"]}
        return step, checkpoints.restore(step, **trees, opt_state=state.opt_state)


@pytest.mark.slow
def test_a_run_names_each_layer_and_learns(stacked):
    parameters = json.loads((stacked / "parameters.json").read_text())
    names = [layer["name"] for layer in parameters["adapters"]]
    assert len(names) == 8
    assert "behrt/encoder/layer_1/attention/query" in names
    summary = json.loads((stacked / "summary.json").read_text())
    lines = [json.loads(line) for line in (stacked / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["split"] == "tuning"]
    assert validations[-1]["loss"] < validations[0]["loss"]
    assert "behrt/encoder/layer_" in validations[-1]["adapters"]["b"]["layer"]
    found = {finding["id"] for finding in summary["findings"]}
    assert not found & {"adapters-not-reached", "adapters-still", "zero-gradient", "recompilations"}


@pytest.mark.slow
def test_the_adapter_alone_on_its_base_gives_the_best_model_in_either_layout(stacked):
    base = fresh(STACKED).variables["params"]
    fingerprint = Vocabulary.read(stacked / "vocabulary.parquet").fingerprint()
    _, best = stored(stacked, STACKED)
    params, adapters, _ = load_adapter(stacked / "adapter", base, fingerprint)
    chex.assert_trees_all_equal((params, adapters), (best.params, best.lora))
    params, adapters, _ = load_adapter(stacked / "adapter", unstack_layers(base), fingerprint)
    chex.assert_trees_all_equal((params, adapters), tuple(map(unstack_layers, (best.params, best.lora))))


@pytest.mark.slow
def test_pretrain_stacked_resumed_equals_uninterrupted_bit_for_bit(stacked, tmp_path, monkeypatch):
    config = replace(STACKED, output=tmp_path / "parts")
    original = Console.step

    def stop_at_step_5(self, step, tokens, loss):
        original(self, step, tokens, loss)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Console, "step", stop_at_step_5)
    assert pretrain(config, ONE).exit_status == 128 + signal.SIGTERM
    monkeypatch.setattr(Console, "step", original)
    assert pretrain(replace(config, resume=True), ONE).exit_status == 0
    (step, parts), (last, whole) = (stored(run, STACKED, best=False) for run in (config.output, stacked))
    assert step == last
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("from_stacked", [False, True], ids=["from apart", "from stacked"])
def test_a_run_starts_from_one_of_the_other_layout(stacked, apart, from_stacked, adapted):
    source, theirs, ours = (stacked, STACKED, SHORT) if from_stacked else (apart, SHORT, STACKED)
    if not adapted:
        ours = replace(ours, lora=None, freezing=FreezingConfig("full"))
    init = InitConfig(source)
    check_source(init, ours.model)
    state = fresh(ours)
    started, step = start_from(init, state)
    best_step, best = stored(source, theirs)
    assert step == best_step
    merged = lora.merge(best.params, best.lora, theirs.lora)
    expected = unstack_layers(merged) if from_stacked else stack_layers(merged)
    chex.assert_trees_all_close(started.variables["params"], expected, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_equal(started.variables["lora"], fresh(ours).variables["lora"])
    assert (count_stacked_layers(started.variables["params"]) > 0) is not from_stacked
    for new, old in zip(jax.tree.leaves(started), jax.tree.leaves(state), strict=True):
        assert new.sharding == old.sharding


@pytest.mark.slow
def test_a_start_from_the_other_layout_repeats_its_best_loss(apart, tmp_path):
    config = replace(
        changed(changed(STACKED, "train", max_steps=1), "optimizer", learning_rate=1e-12),
        output=tmp_path / "warm",
        init=InitConfig(apart),
    )
    best = json.loads((apart / "summary.json").read_text())["best"]["loss"]
    assert pretrain(config, ONE).summary["best"]["loss"] == pytest.approx(best, rel=1e-5)


def test_adapters_on_single_layers_are_refused_before_any_data_is_read(tmp_path):
    config = replace(STACKED, lora=LoRAConfig(targets=("behrt/encoder/layer_0/*",)), output=tmp_path / "x")
    with pytest.raises(Exception, match=r"lora\.targets: layers are stacked .model\.scan_layers."):
        pretrain(config, ONE)
    assert not (tmp_path / "x").exists()

"""Pretraining with stacked layers from end to end, and runs of one layout that start from the other."""

import json
import signal
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import load_adapter
from behrt_jax.config import FreezingConfig, InitConfig, LoRAConfig
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.models.stacked_layers import count_stacked_layers, stack_layers, unstack_layers
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import check_source, start_from
from behrt_jax.training.state import init_state, optimizer_for, set_up
from behrt_jax.workflows import announce
from behrt_jax.workflows.pretrain import pretrain
from tests.workflows.small_run import SMALL_RUN, changed

ONE = jax.devices()[:1]
SHORT = changed(changed(SMALL_RUN, "data", subjects=300), "train", epochs=4)
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
    return init_state(config, setup, optimizer_for(config, setup, 10), init_key, make_mesh(ONE))


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
def test_resumed_equals_uninterrupted_bit_for_bit(stacked, tmp_path, monkeypatch):
    config = replace(STACKED, output=tmp_path / "parts")
    original = announce.LoopReporter.step

    def stop_at_step_5(self, step, tokens, loss):
        original(self, step, tokens, loss)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(announce.LoopReporter, "step", stop_at_step_5)
    assert pretrain(config, ONE).exit_status == 128 + signal.SIGTERM
    monkeypatch.setattr(announce.LoopReporter, "step", original)
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

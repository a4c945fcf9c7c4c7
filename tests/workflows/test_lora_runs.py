"""Runs with adapters of ranks by pattern, a faster b, or another start: saved, resumed, predicted with."""

import json
import signal
from dataclasses import replace
from functools import cache

import chex
import jax
import numpy as np
import pytest

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import load_adapter, read_config
from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import (
    InitConfig,
    OptimizerConfig,
    PopulationConfig,
    PretrainConfig,
    TrainConfig,
)
from behrt_jax.errors import InputError
from behrt_jax.files import from_stored
from behrt_jax.run_folder import read_metrics
from behrt_jax.tracking.console import Console
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.finetuned import open_finetuned
from behrt_jax.workflows.pretrain import pretrain
from tests.models.rows import tiny_model
from tests.workflows.finetune_case import ONE, changed

PATTERNS = LoRAConfig(
    rank=3,
    alpha=5.0,
    targets=("query", "value", "intermediate", "output"),
    exclude=("behrt/encoder/layer_0/output",),
    rank_pattern=("query=2", "intermediate=10"),  # twice 10 is more than the layer's width
    alpha_pattern=("value=2",),
)


@pytest.fixture(scope="module")
def runs(case, tmp_path_factory):
    """Folder of the run of each init, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("lora runs")

    @cache
    def run(init):
        return finetune(replace(config_of(case, init), output=folder / init), ONE).folder

    return run


def config_of(case, init, **optimizer):
    config = changed(case.config(), "optimizer", lora_plus=4.0, **optimizer)
    return replace(config, lora=replace(PATTERNS, init=init))


def variables_of(folder):
    return open_finetuned(folder, None, make_mesh(ONE)).members[0]


def probabilities(case, model, output):
    return case.predicted(output, model=model)["predicted_boolean_probability"].to_numpy()


@pytest.mark.slow
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_adapter_on_the_base_predicts_what_the_run_predicts(case, runs, tmp_path, init):
    run = runs(init)
    table = json.loads((run / "parameters.json").read_text())
    ranks = {layer["name"].removeprefix("behrt/encoder/"): layer["rank"] for layer in table["adapters"]}
    one_layer = {"attention/query": 2, "attention/value": 3, "intermediate": 10, "output": 3}
    expected = {f"layer_{layer}/{name}": rank for layer in range(2) for name, rank in one_layer.items()}
    del expected["layer_0/output"]
    assert ranks == expected
    for leaf, trains in (("a", True), ("b", True), ("a0", False)):
        moved = variables_of(run)["lora"]["behrt"]["encoder"]["layer_1"]["output"]
        if init != "pissa" and not trains:
            assert leaf not in moved
            continue
        assert np.abs(moved[leaf]).max() > 0.0
    ours = probabilities(case, run / "adapter", tmp_path / "adapter.parquet")
    theirs = probabilities(case, run, tmp_path / "run.parquet")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert theirs.std() > 1e-3


@pytest.mark.slow
def test_the_base_of_a_pissa_run_stays_and_its_adapter_is_an_ordinary_one(case, runs):
    run, base = runs("pissa"), read_encoder(open_pretrained(case.base), make_mesh(ONE)).params
    variables = variables_of(run)
    chex.assert_trees_all_equal(variables["params"]["behrt"], base)
    saved = read_config(run / "adapter")
    config = from_stored(LoRAConfig, saved.lora)
    assert config.init == "default" and config.rank == 16
    assert "behrt/encoder/layer_1/attention/query=4" in config.rank_pattern
    params, adapters, _ = load_adapter(run / "adapter", variables["params"])
    merged = lora.merge(variables["params"], variables["lora"], replace(PATTERNS, init="pissa"))
    chex.assert_trees_all_close(lora.merge(params, adapters, config), merged, rtol=1e-5, atol=1e-6)
    query = base["encoder"]["layer_1"]["attention"]["query"]["kernel"]
    begun = variables["lora"]["behrt"]["encoder"]["layer_1"]["attention"]["query"]
    u, s, v = np.linalg.svd(query)
    np.testing.assert_allclose(5.0 / 2 * begun["a0"] @ begun["b0"], u[:, :2] * s[:2] @ v[:2], atol=2e-5)
    changed_by = jax.tree.map(lambda x, y: np.abs(x - y).max(), merged["behrt"], base)
    assert changed_by["encoder"]["layer_1"]["attention"]["query"]["kernel"] > 1e-3
    assert not changed_by["encoder"]["layer_0"]["output"]["kernel"]


@pytest.mark.slow
def test_before_the_first_step_the_model_is_its_base_whatever_the_init(case, tmp_path):
    """A step at next to no rate."""
    found = []
    for init in ("default", "orthogonal", "pissa"):
        config = changed(config_of(case, init, learning_rate=1e-12), "train", epochs=1, max_steps=1)
        run = finetune(replace(config, output=tmp_path / init), ONE).folder
        found.append(probabilities(case, run, tmp_path / f"{init}.parquet"))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


@pytest.mark.slow
def test_a_pissa_run_that_is_resumed_is_the_uninterrupted_one(case, runs, tmp_path, monkeypatch):
    whole, config = runs("pissa"), replace(config_of(case, "pissa"), output=tmp_path / "parts")
    original = Console.step

    def stop(self, step, tokens, loss):
        original(self, step, tokens, loss)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Console, "step", stop)
    assert finetune(config, ONE).exit_status == 128 + signal.SIGTERM
    monkeypatch.setattr(Console, "step", original)
    finetune(replace(config, resume=True), ONE)
    chex.assert_trees_all_equal(variables_of(config.output), variables_of(whole))
    tensors = sorted(path.name for path in (whole / "adapter").glob("*.safetensors"))
    assert tensors
    for name in tensors:
        assert (whole / "adapter" / name).read_bytes() == (config.output / "adapter" / name).read_bytes()
    movements = [
        [line["adapters"] for line in read_metrics(folder / "metrics.jsonl") if "adapters" in line]
        for folder in (whole, config.output)
    ]
    assert movements[0] == movements[1]
    assert min(side["movement"] for side in movements[0][-1].values()) > 1e-3
    with pytest.raises(InputError, match=r"lora\.init is default, but the run in .* was made with pissa"):
        finetune(replace(config_of(case, "default"), output=config.output, resume=True), ONE)


@pytest.mark.slow
def test_a_member_of_a_population_is_the_run_that_it_would_be_alone(case, runs, tmp_path):
    config = replace(config_of(case, "pissa"), population=PopulationConfig(size=2), output=tmp_path / "run")
    finetune(config, ONE)
    member = tmp_path / "run" / "members" / "0"
    ours = probabilities(case, member, tmp_path / "one.parquet")
    theirs = probabilities(case, runs("pissa"), tmp_path / "single.parquet")
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


@pytest.mark.slow
def test_members_of_several_ranks_keep_the_ranks_of_their_pattern(case, tmp_path):
    population = PopulationConfig(size=2, vary="rank", values=(1, 4))
    finetune(replace(config_of(case, "default"), population=population, output=tmp_path / "run"), ONE)
    for number, rank in enumerate((1, 4)):
        tensors = read_config(tmp_path / "run" / "members" / str(number)).tensors
        layer = "lora/behrt/encoder/layer_1"
        assert tensors[f"{layer}/attention/query/a"] == [16, 2]
        assert tensors[f"{layer}/intermediate/b"] == [10, 64]
        assert tensors[f"{layer}/output/a"] == [64, rank]


@pytest.mark.slow
def test_pretraining_goes_on_from_a_run_with_pissa_and_others_start_from_it(case, tmp_path):
    best = json.loads((case.base / "summary.json").read_text())["best"]["loss"]
    config = PretrainConfig(
        model=tiny_model(),
        data=DataConfig(source="prepared", path=case.data),
        lora=replace(PATTERNS, init="pissa"),
        freezing=FreezingConfig("lora_pretrained"),
        optimizer=OptimizerConfig(learning_rate=1e-12),
        train=TrainConfig(max_steps=1, batch_size=32),
        init=InitConfig(case.base),
        output=tmp_path / "start",
    )
    assert pretrain(config, ONE).summary["best"]["loss"] == pytest.approx(best, rel=1e-5)

    longer = replace(
        config,
        output=tmp_path / "longer",
        optimizer=OptimizerConfig(learning_rate=1e-2, lora_plus=2.0),
        train=replace(config.train, max_steps=8),
    )
    pretrain(longer, ONE)
    base, own = (
        read_encoder(open_pretrained(run), make_mesh(ONE)).params for run in (case.base, longer.output)
    )
    layer, theirs = (tree["encoder"]["layer_1"] for tree in (own, base))
    assert np.abs(layer["attention"]["query"]["kernel"] - theirs["attention"]["query"]["kernel"]).max() > 1e-3
    chex.assert_trees_all_equal(layer["attention"]["key"], theirs["attention"]["key"])
    saved = read_config(longer.output / "adapter")
    assert from_stored(LoRAConfig, saved.lora).init == "default"


def test_wrong_settings_are_told_before_anything_is_written(case, tmp_path):
    config = replace(config_of(case, "pissa"), output=tmp_path / "x")
    wrong = [
        (changed(config, "optimizer", lora_plus=0.0), "optimizer.lora_plus is 0.0"),
        (
            replace(config, lora=None, freezing=FreezingConfig("full")),
            "lora_plus is of adapters, but the model",
        ),
        (replace(config, population=PopulationConfig(size=2, vary="rank")), "lora.init pissa takes what"),
        (
            changed(config, "lora", exclude=("key",)),
            r"lora\.exclude: 'key' matches no layer among the targets",
        ),
    ]
    for one, message in wrong:
        with pytest.raises(InputError, match=message):
            finetune(one, ONE)
    assert not (tmp_path / "x").exists()

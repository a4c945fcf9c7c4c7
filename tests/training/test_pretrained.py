"""Starting from the parameters of a finished run."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from behrt_jax.adapters import lora
from behrt_jax.config.model import FreezingConfig
from behrt_jax.config.training import InitConfig, PretrainConfig
from behrt_jax.data.tasks import BINARY
from behrt_jax.errors import InputError
from behrt_jax.models.stacked_layers import unstack_layers
from behrt_jax.run_folder import read_metrics
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import check_readable, check_source, open_pretrained, start_from
from behrt_jax.training.state import init_state, optimizer_for, set_up
from behrt_jax.weights.portable import write_model
from behrt_jax.workflows import pretrain as workflow
from behrt_jax.workflows.pretrain import pretrain
from tests.workflows.small_run import SMALL_RUN, changed

ONE = jax.devices()[:1]
# So many epochs that the best validation is not the first.
SHORT = changed(
    changed(changed(SMALL_RUN, "model", layers=1), "data", subjects=60, vocabulary_size=40, source="uniform"),
    "train",
    epochs=7,
    validate_every=4,
)
FULL = replace(SHORT, lora=None, freezing=FreezingConfig("full"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A finished run without adapters."""
    return pretrain(replace(FULL, output=tmp_path_factory.mktemp("runs") / "full"), ONE).folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A finished run with adapters."""
    return pretrain(replace(SHORT, output=tmp_path_factory.mktemp("runs") / "adapted"), ONE).folder


def fresh(config: PretrainConfig):
    setup = set_up(config, vocabulary_size=40)
    return init_state(setup, optimizer_for(config.optimizer, setup, 10), jax.random.key(9), make_mesh(ONE))


def leaves(tree):
    """Flat copies: a restored array may be donated later."""
    return {path: np.array(leaf) for path, leaf in flatten_dict(tree).items()}


def stored(folder, config, step="best"):
    """Parameters and adapters of a checkpoint."""
    variables = fresh(config).variables
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        number = checkpoints.best_step() if step == "best" else checkpoints.latest_step()
        found = checkpoints.restore(number, params=variables["params"], lora=variables["lora"])
    return number, found


@pytest.mark.slow
@pytest.mark.parametrize("groups", [("embedding",), ("head", "base"), ("embedding", "head", "base")])
def test_only_the_named_groups_are_taken(full, groups):
    state = fresh(FULL)
    before, theirs = leaves(state.variables["params"]), leaves(stored(full, FULL)[1].params)
    started, step = start_from(InitConfig(full, groups), state)
    assert step == stored(full, FULL)[0]
    for path, leaf in leaves(started.variables["params"]).items():
        group = "embedding" if "embeddings" in path else "head" if path[0] == "mlm_head" else "base"
        np.testing.assert_array_equal(leaf, theirs[path] if group in groups else before[path])
    kernels = [path for path in before if path[-1] == "kernel"]
    assert kernels and all((before[path] != theirs[path]).any() for path in kernels)


@pytest.mark.slow
def test_without_a_best_checkpoint_the_last_is_read(full, tmp_path):
    """Checkpoints without a validation are never the best."""
    folder = tmp_path / "unvalidated"
    shutil.copytree(full, folder, ignore=shutil.ignore_patterns("checkpoints"))
    state = fresh(FULL)
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(7, state.variables["params"], {}, state.opt_state, {}, {}, None)
    started, step = start_from(InitConfig(folder), fresh(changed(FULL, "train", seed=3)))
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, started.variables["params"], state.variables["params"])


@pytest.mark.slow
def test_adapters_of_the_source_are_merged_and_the_new_ones_stay_fresh(adapted):
    _, theirs = stored(adapted, SHORT)
    merged = lora.merge(theirs.params, theirs.lora, SHORT.lora)
    state = fresh(SHORT)
    own = leaves(state.variables["lora"])
    started, _ = start_from(InitConfig(adapted), state)
    jax.tree.map(np.testing.assert_array_equal, started.variables["params"], merged)
    for path, leaf in leaves(started.variables["lora"]).items():
        np.testing.assert_array_equal(leaf, own[path])
    query = ("behrt", "encoder", "layer_0", "attention", "query", "kernel")
    assert (flatten_dict(merged)[query] != flatten_dict(theirs.params)[query]).any()


def test_a_run_starts_where_its_source_ended(full, tmp_path):
    """With a learning rate of almost nothing the first validation repeats the source's best."""
    config = changed(changed(FULL, "train", max_steps=1), "optimizer", learning_rate=1e-12)
    best = json.loads((full / "summary.json").read_text())["best"]["loss"]
    first = next(line for line in read_metrics(full / "metrics.jsonl") if line["split"] == "tuning")
    assert first["loss"] > best + 0.01
    warm = pretrain(replace(config, output=tmp_path / "warm", init=InitConfig(full)), ONE)
    assert warm.summary["best"]["loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.slow
def test_frozen_embeddings_stay_those_of_the_source(full, tmp_path):
    config = replace(
        SHORT,
        freezing=FreezingConfig(groups=("lora", "head")),
        init=InitConfig(full, ("embedding",)),
        output=tmp_path / "frozen",
    )
    pretrain(config, ONE)
    theirs = leaves(stored(full, FULL)[1].params["behrt"]["embeddings"])
    ours = leaves(stored(tmp_path / "frozen", config, "latest")[1].params["behrt"]["embeddings"])
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf)


@pytest.mark.slow
def test_resuming_does_not_read_the_source_again(full, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(full, source)
    config = replace(changed(FULL, "train", epochs=1), init=InitConfig(source), output=tmp_path / "run")
    pretrain(config, ONE)
    shutil.rmtree(source)
    longer = replace(changed(config, "train", epochs=2), resume=True)
    assert pretrain(longer, ONE).summary["epochs"] == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 32}, "model.hidden_size is 32, but 16"),
        ({"positions": 40}, "model.positions is 40, but 32"),
        ({"visit_embedding": "alternating"}, "model.visit_embedding is alternating, but ordinal"),
    ],
)
def test_another_model_is_named_before_any_data_is_read(full, tmp_path, monkeypatch, model, message):
    def no_data(*_):
        raise AssertionError("data was read first")

    monkeypatch.setattr(workflow, "load_sequences", no_data)
    with pytest.raises(InputError, match=message):
        pretrain(replace(changed(FULL, "model", **model), init=InitConfig(full), output=tmp_path / "x"), ONE)
    assert not (tmp_path / "x").exists()


def test_settings_that_leave_parameters_alone_may_differ(full):
    other = replace(FULL.model, dropout=0.3, attention_dropout=0.0, compute_dtype="bfloat16")
    check_source(InitConfig(full), other)


@pytest.mark.parametrize(
    ("data", "message"),
    [({"vocabulary_size": 41}, "41 rows here, 40 there"), ({"seed": 5}, "the codes of row 5 differ")],
)
def test_another_vocabulary_is_an_error_before_training(full, tmp_path, monkeypatch, data, message):
    def no_training(*arguments):
        raise AssertionError("arrays were made first")

    monkeypatch.setattr("behrt_jax.training.state.init_program", no_training)
    with pytest.raises(InputError, match=message):
        pretrain(replace(changed(FULL, "data", **data), init=InitConfig(full), output=tmp_path / "x"), ONE)


@pytest.mark.parametrize("missing", ["config.json", "summary.json"])
def test_only_a_finished_run_can_be_started_from(full, tmp_path, missing):
    folder = tmp_path / "source"
    shutil.copytree(full, folder, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(InputError, match="has no checkpoint to start from"):
        start_from(InitConfig(folder), fresh(FULL))
    (folder / missing).unlink()
    with pytest.raises(InputError, match=f"no finished run .{missing} is"):
        check_source(InitConfig(folder), FULL.model)
    with pytest.raises(InputError, match=r"init\.groups is empty"):
        check_source(InitConfig(full, ()), FULL.model)


def test_an_exported_model_starts_a_run_as_its_run_does(full, tmp_path):
    source, params = open_pretrained(full), stored(full, FULL)[1].params
    folder = tmp_path / "exported"
    write_model(folder, source.model, source.vocabulary, source.preparation, params, step=5)
    assert open_pretrained(folder).vocabulary.codes == source.vocabulary.codes
    for model in (FULL.model, replace(FULL.model, ffn_size=4 * FULL.model.hidden_size)):
        check_source(InitConfig(folder), model)
    with pytest.raises(InputError, match=r"model\.ffn_size is 8, but 64 in the run .*exported"):
        check_source(InitConfig(folder), replace(FULL.model, ffn_size=8))
    for config in (FULL, changed(FULL, "model", scan_layers=True)):
        ours, theirs = (start_from(InitConfig(place), fresh(config)) for place in (folder, full))
        assert ours[1] == 5
        jax.tree.map(np.testing.assert_array_equal, ours[0].variables, theirs[0].variables)
        read = unstack_layers(ours[0].variables["params"])
        jax.tree.map(np.testing.assert_array_equal, read, unstack_layers(params))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        check_readable(open_pretrained(folder))
    task = {"task": BINARY.to_json(), "pooling": "mean"}
    own = {"behrt": params["behrt"], "task_head": {"dense": {"kernel": np.ones((16, 1)), "bias": np.ones(1)}}}
    write_model(tmp_path / "task", source.model, source.vocabulary, None, own, task=task)
    with pytest.raises(InputError, match=r"init\.run: .*task is an export of a fine-tuned model"):
        check_source(InitConfig(tmp_path / "task"), FULL.model)

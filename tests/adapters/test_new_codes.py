"""Embedding rows for codes that the base does not know."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import AdapterConfig, load_adapter, save_adapter
from behrt_jax.adapters.lora import label, path_names
from behrt_jax.adapters.new_codes import new_rows, with_new_codes
from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import OptimizerConfig
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.files import sealed
from behrt_jax.models.behrt import BEHRTForTask, example_batch
from behrt_jax.training.freezing import REGIMES, optimizer_labels, stop_frozen, trainable
from behrt_jax.training.optimizer import make_optimizer
from tests.models.rows import VOCABULARY, random_batch, tiny_model

NEW = ("NEW//1", "NEW//2", "NEW//3")
CONFIG = LoRAConfig(rank=2)


def params_of_table(table):
    return {"behrt": {"embeddings": {"code": {"embedding": table}}}}


def test_a_new_code_starts_at_the_mean_of_its_nearest_relatives():
    codes = [*SPECIAL_TOKENS, "DX//ICD10//E11.0", "DX//ICD10//E11.9", "DX//ICD10//E10.9", "DX//ICD9//E11.65"]
    codes += ["ATC//A10BA02", "aspirin"]
    table = np.random.default_rng(0).normal(size=(len(codes), 4)).astype(np.float32)
    new = [
        "DX//ICD10//E11.65",
        "DX//ICD10//E109",
        "DX//ICD10//Z99",
        "aspirin 100",
        "DX//ICD10//E1",
        "ATC//A10",
    ]
    found = new_rows(params_of_table(jnp.asarray(table)), codes, new)
    np.testing.assert_array_equal(found.relatives, [2, 1, 0, 1, 0, 1])
    expected = [table[5:7].mean(0), table[7], table[5:].mean(0), table[10], table[5:].mean(0), table[9]]
    np.testing.assert_allclose(found.rows, expected, rtol=1e-6)
    assert found.rows.dtype == np.float32
    assert new_rows(params_of_table(table), codes, []).rows.shape == (0, 4)


def test_codes_that_are_there_already_and_other_vocabularies_are_refused():
    codes = [*SPECIAL_TOKENS, "A", "B"]
    params = params_of_table(np.ones((7, 4), np.float32))
    for new in (["C", "A"], ["C", "C"], ["[UNK]"]):
        with pytest.raises(InputError, match=r"new code (A|C|\[UNK\]) is in the vocabulary already"):
            new_rows(params, codes, new)
    with pytest.raises(InputError, match="8 codes, but the base 7 embedding rows"):
        new_rows(params, [*codes, "C"], ["D"])


@pytest.fixture(scope="module")
def extended():
    """Model of the larger vocabulary, and variables with a row for each new code."""
    config = tiny_model(dropout=0.0)
    plain = BEHRTForTask(config, VOCABULARY, 1)
    init = jax.jit(partial(plain.init, segments=3))
    params = jax.device_get(init(jax.random.key(0), example_batch(config))["params"])
    names = [*SPECIAL_TOKENS, *(f"code {number}" for number in range(VOCABULARY - len(SPECIAL_TOKENS)))]
    rows = new_rows(params, names, NEW).rows
    variables = {"params": {**params, "new_codes": {"rows": rows}}}
    variables["lora"] = jax.device_get(
        jax.jit(lora.init, static_argnums=2)(jax.random.key(1), params, CONFIG)
    )
    return BEHRTForTask(config, VOCABULARY + len(NEW), 1), plain, variables


def batch_with(new_ids):
    """A batch in which some events have the ids of new codes."""
    batch = random_batch(0)
    codes = batch.codes.copy()
    codes[0, : len(new_ids)] = new_ids
    return batch._replace(codes=codes)


@partial(jax.jit, static_argnames="model")
def outputs(model, variables, batch):
    with lora.applying(CONFIG):
        variables = {**variables, "params": with_new_codes(variables["params"])}
        return model.apply(variables, batch, segments=3)


def test_known_codes_are_read_as_by_the_base(extended):
    model, plain, variables = extended
    params = {name: tree for name, tree in variables["params"].items() if name != "new_codes"}
    assert with_new_codes(params) == params
    ours = outputs(model, variables, random_batch(0))
    theirs = outputs(plain, {**variables, "params": params}, random_batch(0))
    np.testing.assert_array_equal(ours, theirs)
    rows = np.random.default_rng(3).normal(size=(len(NEW), 12)).astype(np.float32)
    moved = {**variables["params"], "new_codes": {"rows": rows}}
    batch = batch_with([VOCABULARY + 1])
    before, after = (
        np.asarray(outputs(model, {**variables, "params": tree}, batch))
        for tree in (variables["params"], moved)
    )
    assert abs(before - after)[0, 0].max() > 1e-3


def test_new_rows_train_and_the_base_table_does_not(extended):
    """Two steps of AdamW: rows of codes that occur move; the table has no gradient and stays."""
    model, _, variables = extended
    mask = trainable(variables, REGIMES["lora_pretrained"])
    assert (
        mask["params"]["new_codes"]["rows"] and not mask["params"]["behrt"]["embeddings"]["code"]["embedding"]
    )
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    optimizer = make_optimizer(config, 10, optimizer_labels(variables, mask))
    batch = batch_with([VOCABULARY, VOCABULARY + 2])

    def loss(variables):
        return jnp.square(outputs(model, stop_frozen(variables, mask), batch) - 1.0).sum()

    @jax.jit
    def step(variables, opt_state):
        gradient = jax.grad(loss)(variables)
        updates, opt_state = optimizer.update(gradient, opt_state, variables)
        return optax.apply_updates(variables, updates), opt_state, gradient

    state, opt_state, gradient = step(variables, jax.jit(optimizer.init)(variables))
    state, _, gradient = jax.device_get(step(state, opt_state))
    rows = np.abs(gradient["params"]["new_codes"]["rows"]).max(axis=1)
    assert (rows > 0).tolist() == [True, False, True]
    assert not np.asarray(gradient["params"]["behrt"]["embeddings"]["code"]["embedding"]).any()
    flat = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool((a != b).any()), variables, state)
    )
    moved = {"/".join(path_names(path)) for path, changed in flat if changed}
    trains = jax.tree_util.tree_leaves_with_path(mask)
    assert moved == {"/".join(path_names(path)) for path, flag in trains if flag}


def save(folder, variables, **changes):
    """As a run with adapters on a pretrained base saves them."""

    def trains(path, _):
        return label(("params", *path_names(path))) in ("lora", "head")

    trained = jax.tree_util.tree_map_with_path(trains, variables["params"])
    config = {"lora": vars(CONFIG), "model": {}, "vocabulary_fingerprint": "v", "new_codes": NEW}
    adapter = AdapterConfig(**{**config, **changes})
    return save_adapter(folder, variables["params"], variables["lora"], trained, adapter)


def test_new_codes_and_task_head_come_back_with_their_names_on_the_plain_base(extended, tmp_path):
    model, _, variables = extended
    head = {"dense": {"kernel": np.full((16, 1), 0.5, np.float32), "bias": np.ones(1, np.float32)}}
    variables = {**variables, "params": {**variables["params"], "task_head": head}}
    save(tmp_path / "adapter", variables)
    base = {"behrt": variables["params"]["behrt"], "task_head": jax.tree.map(np.zeros_like, head)}
    params, adapters, config = load_adapter(tmp_path / "adapter", base, "v")
    assert list(config.new_codes) == list(NEW)
    assert list(config.groups) == ["head", "lora"]
    batch = batch_with([VOCABULARY, VOCABULARY + 1, VOCABULARY + 2])
    trees = ({"params": params, "lora": adapters}, variables)
    found, expected = (outputs(model, tree, batch) for tree in trees)
    np.testing.assert_array_equal(found, expected)
    # The fingerprint is that of the base without them.
    save(tmp_path / "plain", {**variables, "params": {k: v for k, v in variables["params"].items()
                                                      if k != "new_codes"}}, new_codes=())  # fmt: skip
    other = json.loads((tmp_path / "plain" / "behrt_jax.json").read_text())
    assert other["base_fingerprint"] == config.base_fingerprint and other["new_codes"] == []


def test_new_codes_on_another_base_or_vocabulary_are_refused(extended, tmp_path):
    _, _, variables = extended
    save(tmp_path / "adapter", variables)
    behrt, head = variables["params"]["behrt"], variables["params"]["task_head"]
    with pytest.raises(InputError, match="another vocabulary"):
        load_adapter(tmp_path / "adapter", {"behrt": behrt, "task_head": head}, "w")
    other = jax.tree.map(lambda leaf: leaf, behrt)
    table = other["embeddings"]["code"]["embedding"].copy()
    table[7, 0] += 1.0
    other["embeddings"]["code"]["embedding"] = table
    with pytest.raises(InputError, match="frozen parameters differ"):
        load_adapter(tmp_path / "adapter", {"behrt": other, "task_head": head})
    other_head = {"dense": {"kernel": np.zeros((16, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    with pytest.raises(InputError, match=r"task_head/dense/bias has shape \[1\] where \[2\]"):
        load_adapter(tmp_path / "adapter", {"behrt": behrt, "task_head": other_head})


def test_rows_and_names_of_new_codes_must_match(extended, tmp_path):
    _, _, variables = extended
    with pytest.raises(ValueError, match="3 trained rows of new codes, but 2 new_codes"):
        save(tmp_path / "adapter", variables, new_codes=NEW[:2])
    save(tmp_path / "adapter", variables)
    file = tmp_path / "adapter" / "behrt_jax.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(sealed({**config, "new_codes": list(NEW[:2])})))
    base = {name: tree for name, tree in variables["params"].items() if name != "new_codes"}
    with pytest.raises(InputError, match=r"new_codes/rows has shape \[3, 12\] where \[2, 12\]"):
        load_adapter(tmp_path / "adapter", base)

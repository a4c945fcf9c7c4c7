"""Exported folders: what is written comes back, and what is not whole is named."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import fingerprint_tree
from behrt_jax.config.model import LoRAConfig
from behrt_jax.data.tasks import BINARY
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask, example_batch
from behrt_jax.models.stacked_layers import stack_layers
from behrt_jax.weights import portable
from behrt_jax.weights.portable import Beside, is_portable, open_portable, read_weights, write_model
from tests.models.rows import MODERN, tiny_model

CODES = tuple(f"CODE//{index}" for index in range(7))
VOCABULARY = Vocabulary((*SPECIAL_TOKENS, *CODES), np.arange(12), (None,) * 12)
MODEL = tiny_model(positions=8)
ADAPTERS = LoRAConfig(rank=2, targets=("query", "output"))
TASK = {"task": BINARY.to_json(), "pooling": "attention", "max_length": 8}


@pytest.fixture(scope="module")
def params():
    network = BEHRTForMLM(MODEL, len(VOCABULARY))
    return jax.jit(network.init)(jax.random.key(0), example_batch(MODEL))["params"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("exported") / "model"
    write_model(path, MODEL, VOCABULARY, None, params, step=3, data_fingerprint="d1", card="# Card\n")
    return path


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_model_comes_back_bit_for_bit_with_all_that_it_needs(folder, params):
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "vocabulary.parquet", "files.json", "README.md",
    }  # fmt: skip
    assert is_portable(folder) and [path.name for path in folder.parent.iterdir()] == ["model"]
    found = open_portable(folder)
    assert found.vocabulary.codes == VOCABULARY.codes and found.preparation is None
    assert found.config.step == 3 and found.config.architecture == "BEHRTForMLM"
    assert found.model == replace(MODEL, ffn_size=4 * MODEL.hidden_size, attention_dropout=MODEL.dropout)
    read, adapters = read_weights(found)
    assert adapters == {}
    assert_equal(read, params)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == "1" and metadata["data_fingerprint"] == "d1"
    assert metadata["parameters_fingerprint"] == fingerprint_tree(params)
    assert metadata["vocabulary_fingerprint"] == VOCABULARY.fingerprint()


def test_stacked_layers_are_written_one_by_one(tmp_path, params):
    write_model(tmp_path / "m", replace(MODEL, scan_layers=True), VOCABULARY, None, stack_layers(params))
    read, _ = read_weights(open_portable(tmp_path / "m"))
    assert_equal(read, params)


def test_a_model_of_today_comes_back_bit_for_bit(tmp_path):
    model = tiny_model(layers=1, **MODERN)
    network = BEHRTForMLM(model, len(VOCABULARY))
    params = jax.jit(network.init)(jax.random.key(0), example_batch(model))["params"]
    write_model(tmp_path / "m", model, VOCABULARY, None, params)
    found = open_portable(tmp_path / "m")
    assert found.model == model.resolved() and found.model.ffn_size == 48
    read, _ = read_weights(found)
    assert_equal(read, params)


def test_adapters_beside_come_back_with_the_rows_of_new_codes(tmp_path, params):
    extended = VOCABULARY.extended(["NEW//1", "NEW//2"])
    params = {**params, "new_codes": {"rows": np.ones((2, MODEL.embedding_size), np.float32)}}
    adapters = jax.tree.map(lambda leaf: leaf + 1, lora.init(jax.random.key(1), params, ADAPTERS))
    trained = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "behrt", params)
    write_model(tmp_path / "m", MODEL, extended, None, params, beside=Beside(ADAPTERS, adapters, trained))
    assert not any("new_codes" in name for name in load_file(tmp_path / "m" / "model.safetensors"))
    found = open_portable(tmp_path / "m")
    assert found.vocabulary.codes[-2:] == ("NEW//1", "NEW//2") and found.config.new_codes == 2
    assert found.lora == replace(ADAPTERS, alpha=4.0)
    read = read_weights(found)
    assert_equal(read, (params, adapters))
    with pytest.raises(InputError, match="2 rows of new codes beside their table"):
        write_model(tmp_path / "n", MODEL, extended, None, params)
    assert not (tmp_path / "n").exists()


def test_pissa_adapters_beside_are_ordinary_ones_with_alphas_written_out(tmp_path, params):
    config = replace(ADAPTERS, init="pissa", rank_pattern=("query=3",))
    adapters = jax.device_get(lora.init(jax.random.key(1), params, config))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if path[-1].key in ("a", "b") else leaf, adapters
    )
    frozen = jax.tree.map(lambda _: False, params)
    write_model(tmp_path / "m", MODEL, VOCABULARY, None, params, beside=Beside(config, moved, frozen))
    found = open_portable(tmp_path / "m")
    assert found.lora is not None and found.lora.init == "default" and found.lora.alpha is not None
    read, theirs = read_weights(found)
    merged = lora.merge(read, theirs, found.lora)
    jax.tree.map(
        lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5),
        merged,
        lora.merge(params, moved, config),
    )


def test_a_fine_tuned_model_has_the_parameters_of_its_task(tmp_path, params):
    network = BEHRTForTask(MODEL, len(VOCABULARY), 1, "attention")
    init = jax.jit(network.init, static_argnames="segments")
    own = init(jax.random.key(0), example_batch(MODEL), segments=1)["params"]
    write_model(tmp_path / "m", MODEL, VOCABULARY, None, own, task=TASK)
    assert_equal(read_weights(open_portable(tmp_path / "m"))[0], own)
    with pytest.raises(
        InputError, match=r"has no tensor pooling_head/query, task_head/dense/bias, task_head"
    ):
        write_model(tmp_path / "n", MODEL, VOCABULARY, None, params, task=TASK)


def test_what_does_not_fit_the_model_is_named_and_not_written(tmp_path, params):
    head = params["mlm_head"]
    cases = {
        "no tensor mlm_head/decoder/bias, mlm_head/decoder/kernel": {
            **params, "mlm_head": {name: part for name, part in head.items() if name != "decoder"},
        },
        "its model does not know: other_head/bias": {**params, "other_head": {"bias": np.zeros(2)}},
        r"tensor mlm_head/decoder/bias has shape \[3\] where \[12\]": {
            **params, "mlm_head": {**head, "decoder": {**head["decoder"], "bias": np.zeros(3)}},
        },
    }  # fmt: skip
    for message, wrong in cases.items():
        with pytest.raises(InputError, match=message):
            write_model(tmp_path / "m", MODEL, VOCABULARY, None, wrong)
    with pytest.raises(InputError, match=r"code/embedding has shape \[12, 12\] where \[13, 12\]"):
        write_model(tmp_path / "m", MODEL, VOCABULARY.extended(["X"]), None, params)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        write_model(tmp_path / "mine", MODEL, VOCABULARY, None, params)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocabulary.parquet", "files.json"])
def test_a_damaged_or_missing_file_is_named(folder, tmp_path, name):
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in folder.iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    content = bytearray((spoilt / name).read_bytes())
    content[len(content) // 2] ^= 1
    (spoilt / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is"):
        read_weights(open_portable(spoilt))
    (spoilt / name).unlink()
    assert is_portable(spoilt)
    with pytest.raises(InputError, match=name):
        read_weights(open_portable(spoilt))


def test_tensors_of_another_folder_or_type_are_refused(folder, tmp_path, monkeypatch):
    """Without the records of files, as after an edit by hand."""
    monkeypatch.setattr(portable, "checked", lambda folder, name: folder / name)
    monkeypatch.setattr(portable, "read_preparation", lambda folder: None)
    own = load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "numpy") as file:
        metadata = file.metadata()
    for name in ("config.json", "vocabulary.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())

    def refused(message, tensors, metadata=metadata):
        save_file(tensors, tmp_path / "model.safetensors", metadata)
        with pytest.raises(InputError, match=message):
            read_weights(open_portable(tmp_path))

    bias = "mlm_head/decoder/bias"
    rest = {name: values for name, values in own.items() if name != bias}
    refused(f"has no tensor {bias}", rest)
    refused("does not know: more", {**own, "more": own[bias]})
    refused(rf"tensor {bias} has shape \[5\] where \[12\]", {**rest, bias: own[bias][:5]})
    refused(f"tensor {bias} is float16, not float32", {**rest, bias: own[bias].astype(np.float16)})
    refused("parameters_fingerprint is of another", own, {**metadata, "parameters_fingerprint": "of another"})
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_weights(open_portable(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 9}))
    with pytest.raises(InputError, match="has format_version 9; this version of behrt_jax reads 1"):
        open_portable(tmp_path)

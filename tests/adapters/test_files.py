import hashlib
import json
import struct
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import behrt_jax
from behrt_jax.adapters.files import (
    AdapterConfig,
    fingerprint_tree,
    load_adapter,
    read_config,
    save_adapter,
    serialised,
)
from behrt_jax.errors import InputError
from behrt_jax.files import digest_of, sealed

WIDTH, RANK = 8, 2
QUERY = "behrt/encoder/layer_0/attention/query"
PEFT_QUERY = "base_model.model.behrt.encoder.layers.0.self_attn.q_proj"


def make_params(seed=0, codes=5):
    random = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    attention = {"query": {"kernel": array(WIDTH, WIDTH), "bias": array(WIDTH)}}
    return {
        "behrt": {
            "embeddings": {"code": {"embedding": array(codes, WIDTH)}},
            "encoder": {"layer_0": {"attention": attention}, "norm": {"scale": array(WIDTH)}},
        },
        "mlm_head": {"dense": {"kernel": array(WIDTH, codes), "bias": array(codes)}},
    }


def make_lora(seed=1, rank=RANK):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(WIDTH, rank)), random.normal(size=(rank, WIDTH))
    query = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return {"behrt": {"encoder": {"layer_0": {"attention": {"query": query}}}}}


def train_groups(params, *modules):
    """Marks the leaves below any of these modules."""

    def trains(path, _):
        return any(key.key in modules for key in path)

    return jax.tree_util.tree_map_with_path(trains, params)


def save(folder, params, lora, trained=None, beside=None, **overrides):
    config = {
        "lora": {"rank": RANK, "alpha": 4.0, "targets": ("query",)},
        "model": {"hidden_size": WIDTH},
        "vocabulary_fingerprint": "vocabulary-1",
    }
    trained = train_groups(params, "embeddings", "mlm_head") if trained is None else trained
    return save_adapter(folder, params, lora, trained, AdapterConfig(**{**config, **overrides}), beside)


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def other_head(params):
    """The same base under another head and other embeddings, as in a fresh model."""
    fresh = make_params(seed=99)
    behrt = {**params["behrt"], "embeddings": fresh["behrt"]["embeddings"]}
    return {**params, "behrt": behrt, "mlm_head": fresh["mlm_head"]}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "adapter"


def test_an_adapter_comes_back_bit_for_bit(folder):
    params, lora = make_params(), make_lora()
    files = save(folder, params, lora)
    names = ["adapter_config.json", "adapter_model.safetensors", "behrt_jax.json"]
    assert files == [folder / name for name in names]
    assert sorted(folder.iterdir()) == sorted(files)
    given_params = other_head(params)
    before = fingerprint_tree(given_params)
    found_params, found_lora, config = load_adapter(folder, given_params, "vocabulary-1")
    assert_identical(found_params, params)
    assert_identical(found_lora, lora)
    assert fingerprint_tree(given_params) == before  # the given tree is left alone
    assert config.lora == {"rank": RANK, "alpha": 4.0, "targets": ["query"]}
    assert config.model == {"hidden_size": WIDTH}
    assert list(config.groups) == ["embedding", "head", "lora"]
    assert config.behrt_jax_version == behrt_jax.__version__


@given(st.data())
def test_any_choice_of_trained_leaves_comes_back(data):
    params = make_params(codes=data.draw(st.integers(1, 4)))
    lora = make_lora(rank=data.draw(st.integers(1, 4))) if data.draw(st.booleans()) else {}
    special = [np.float32(x) for x in (-0.0, np.inf, np.nan, 1e-45)]
    params["mlm_head"]["dense"]["bias"] = (
        params["mlm_head"]["dense"]["bias"].at[0].set(data.draw(st.sampled_from(special)))
    )
    trained = jax.tree.map(lambda _: data.draw(st.booleans()), params)
    fresh = make_params(seed=7, codes=params["mlm_head"]["dense"]["bias"].shape[0])
    given_params = jax.tree.map(lambda mark, new, old: new if mark else old, trained, fresh, params)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        save(folder, params, lora, trained)
        found_params, found_lora, _ = load_adapter(folder, given_params)
    assert_identical(found_params, params)
    assert_identical(found_lora, lora)


def test_a_file_of_tensors_is_the_same_bytes_whatever_the_order_of_its_metadata(tmp_path):
    tensors = {"Ä/b": np.arange(3, dtype=np.float32), "a": np.ones((2, 2), np.float32)}
    metadata = {name: f'value of "{name}"' for name in "zyxwvu"}
    files = {serialised(tensors, dict(sorted(metadata.items(), reverse=turned))) for turned in [0, 1] * 4}
    (data,) = files
    (tmp_path / "x.safetensors").write_bytes(data)
    found = load_file(tmp_path / "x.safetensors")
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values)
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.metadata() == metadata


def test_no_frozen_leaf_is_written(folder):
    params, lora = make_params(), make_lora()
    params["behrt"]["encoder"]["ffn"] = {"kernel": jnp.ones((512, 512))}
    save(folder, params, lora)
    assert load_file(folder / "adapter_model.safetensors").keys() == {
        f"{PEFT_QUERY}.lora_A.weight",
        f"{PEFT_QUERY}.lora_B.weight",
        "base_model.model.behrt.embeddings.code_embedding.weight",
        "base_model.model.mlm_head.0.bias",
        "base_model.model.mlm_head.0.weight",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000


def test_a_given_base_fingerprint_is_written_as_it_is(folder):
    params = make_params()
    base = {"behrt": {"encoder": params["behrt"]["encoder"]}}
    save(folder, params, make_lora(), base_fingerprint=fingerprint_tree(base))
    load_adapter(folder, params)
    save(folder, params, make_lora(), base_fingerprint="of another base")
    with pytest.raises(InputError, match="frozen parameters differ"):
        load_adapter(folder, params)


def test_another_base_is_refused(folder):
    params = make_params()
    save(folder, params, make_lora())
    scale = params["behrt"]["encoder"]["norm"]["scale"]
    params["behrt"]["encoder"]["norm"]["scale"] = scale.at[3].set(jnp.nextafter(scale[3], jnp.inf))
    with pytest.raises(InputError, match="frozen parameters differ"):
        load_adapter(folder, params)


def test_another_vocabulary_is_refused(folder):
    save(folder, make_params(), make_lora())
    with pytest.raises(InputError, match="another vocabulary"):
        load_adapter(folder, make_params(), "vocabulary-2")


def test_another_shape_is_refused_by_name(folder):
    save(folder, make_params(), make_lora())
    message = r"params/behrt/embeddings/code/embedding has shape \[5, 8\] where \[6, 8\] is expected"
    with pytest.raises(InputError, match=message):
        load_adapter(folder, make_params(codes=6))


def test_a_tensor_without_a_place_in_the_model_is_refused_by_name(folder):
    params = make_params()
    save(folder, params, make_lora())
    headless = {"behrt": params["behrt"]}
    with pytest.raises(InputError, match="params/mlm_head/dense/bias has no place"):
        load_adapter(folder, headless)
    params["behrt"]["encoder"]["layer_0"]["attention"]["q"] = params["behrt"]["encoder"]["layer_0"][
        "attention"
    ].pop("query")
    with pytest.raises(InputError, match=f"lora/{QUERY}/a has no kernel in this model"):
        load_adapter(folder, params)


def test_a_missing_or_unknown_tensor_is_refused_by_name(folder):
    params = make_params()
    save(folder, params, make_lora())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "extra.bias": np.ones(3, np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="tensor params/extra/bias is not in its table"):
        load_adapter(folder, params)
    del tensors[f"{PEFT_QUERY}.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"tensor lora/{QUERY}/b is missing"):
        load_adapter(folder, params)


@given(st.data())
def test_a_damaged_tensor_file_is_refused(data):
    params = make_params()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        save(folder, params, make_lora())
        path = folder / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        middle = len(content) // 2  # the header lies before it, tensors after
        position = data.draw(st.integers(0, middle) | st.integers(middle, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] ^= data.draw(st.integers(1, 255))
        else:
            del content[position:]
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"adapter_model\.safetensors|adapter: tensor"):
            load_adapter(folder, params)


def test_a_damaged_or_foreign_configuration_is_refused(folder):
    params = make_params()
    save(folder, params, make_lora())
    path = folder / "behrt_jax.json"
    whole = path.read_text()
    for content, message in [
        (whole[:100], "not JSON"),
        ("[]", "format_version None"),
        (whole.replace('"base_fingerprint"', '"base_"'), "no entry base_fingerprint"),
        (whole.replace('"format_version": 2', '"format_version": 3'), "format_version 3"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_adapter(folder, params)
    path.unlink()
    with pytest.raises(InputError, match=r"behrt_jax\.json is missing"):
        load_adapter(folder, params)
    path.write_text(whole)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        load_adapter(folder, params)


@given(st.data())
def test_a_configuration_with_a_flipped_byte_is_refused_or_the_same(data):
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        save(folder, make_params(), make_lora(), beside={"task.json": b'{"threshold": 0.5}'})
        names = ["behrt_jax.json", "adapter_config.json", "task.json"]
        path = folder / data.draw(st.sampled_from(names))
        whole = read_config(folder)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.sampled_from([1, 2, 4, 32, 128]))
        path.write_bytes(content)
        try:
            assert read_config(folder) == whole and path.name == "behrt_jax.json"
        except InputError as error:
            assert path.name in str(error)


def test_a_missing_file_beside_the_tensors_is_refused(folder):
    files = save(folder, make_params(), make_lora(), beside={"task.json": b"{}"})
    names = ["adapter_config.json", "adapter_model.safetensors", "behrt_jax.json", "task.json"]
    assert [file.name for file in files] == names
    save(folder, make_params(), make_lora(), beside={"task.json": b"{ }"})
    (folder / "task.json").unlink()
    with pytest.raises(InputError, match=r"task\.json is missing"):
        load_adapter(folder, make_params())


def save_as_version_1(folder, digests):
    """Write the adapter of `make_lora` with its head and table in the form of before PEFT's."""
    params, lora = make_params(), make_lora()
    query = lora["behrt"]["encoder"]["layer_0"]["attention"]["query"]
    tensors = {f"lora/{QUERY}/{side}": np.asarray(query[side]) for side in "ab"}
    table = params["behrt"]["embeddings"]["code"]["embedding"]
    tensors["params/behrt/embeddings/code/embedding"] = np.asarray(table)
    for name, leaf in params["mlm_head"]["dense"].items():
        tensors[f"params/mlm_head/dense/{name}"] = np.asarray(leaf)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter.safetensors")
    config = {
        "format_version": 1,
        "lora": {"rank": RANK, "alpha": 4.0},
        "vocabulary_fingerprint": "vocabulary-1",
        "base_fingerprint": fingerprint_tree({"behrt": {"encoder": params["behrt"]["encoder"]}}),
        "tensors_sha256": hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest(),
        "tensors": {key: list(values.shape) for key, values in tensors.items()},
    }
    if digests:
        (folder / "task.json").write_bytes(b"{}")
        config = sealed({**config, "files": {"task.json": digest_of(b"{}")}})
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("digests", [True, False])
def test_an_adapter_of_format_version_1_is_read(folder, digests):
    save_as_version_1(folder, digests)
    params, lora, config = load_adapter(folder, other_head(make_params()), "vocabulary-1")
    assert_identical(params, make_params())
    assert_identical(lora, make_lora())
    assert config.format_version == 1
    assert config.lora == {"rank": RANK, "alpha": 4.0}
    with pytest.raises(InputError, match="another vocabulary"):
        load_adapter(folder, make_params(), "vocabulary-2")
    with pytest.raises(InputError, match="frozen parameters differ"):
        load_adapter(folder, make_params(seed=3))
    content = bytearray((folder / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="its digest differs"):
        load_adapter(folder, make_params())


def test_saving_replaces_an_adapter_of_format_version_1(folder):
    save_as_version_1(folder, digests=False)
    save(folder, make_params(), make_lora(seed=5))
    assert not (folder / "adapter.safetensors").exists()
    _, lora, _ = load_adapter(folder, make_params())
    assert_identical(lora, make_lora(seed=5))


def test_a_configuration_without_digests_is_read(folder):
    save(folder, make_params(), make_lora())
    path = folder / "behrt_jax.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({name: stored[name] for name in stored if name not in ("files", "sha256")}))
    _, lora, _ = load_adapter(folder, make_params())
    chex.assert_trees_all_equal(lora, make_lora())


def test_a_missing_tensor_file_is_refused(folder):
    save(folder, make_params(), make_lora())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(folder, make_params())


def test_saving_again_replaces_the_whole_folder(folder):
    params = make_params()
    save(folder, params, make_lora(rank=4))
    save(folder, params, make_lora(seed=5))
    _, lora, _ = load_adapter(folder, params)
    assert_identical(lora, make_lora(seed=5))
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]  # nothing left beside it


@pytest.mark.parametrize("operation", ["write_bytes", "rename"])
def test_a_failed_save_leaves_the_older_adapter_whole(folder, monkeypatch, operation):
    params = make_params()
    save(folder, params, make_lora())
    allowed = getattr(Path, operation)

    def fail_on_the_new(path, argument):
        if ".new-" in str(path):
            raise OSError("disk full")
        return allowed(path, argument)

    monkeypatch.setattr(Path, operation, fail_on_the_new)
    with pytest.raises(OSError, match="disk full"):
        save(folder, params, make_lora(seed=5))
    monkeypatch.undo()
    _, lora, _ = load_adapter(folder, params)
    assert_identical(lora, make_lora())
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_folder_with_other_files_is_never_replaced(folder):
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        save(folder, make_params(), make_lora())
    assert (folder / "notes.txt").read_text() == "mine"


def test_marks_must_cover_the_parameters(folder):
    params = make_params()
    with pytest.raises(ValueError, match="every leaf"):
        save(folder, params, make_lora(), trained={"mlm_head": {"dense": {"kernel": True}}})


def test_a_tensor_of_no_parameter_group_is_refused(folder):
    params = {"decoder": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="params/decoder/kernel must belong to one parameter group"):
        save(folder, params, {}, trained={"decoder": {"kernel": True}})
    assert not folder.parent.exists()


def test_without_safetensors_the_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        save(folder, make_params(), make_lora())
    assert not folder.parent.exists()


def test_loaded_leaves_keep_dtype_and_sharding(folder):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(make_params(), everywhere)
    params["mlm_head"]["dense"]["kernel"] = params["mlm_head"]["dense"]["kernel"].astype(jnp.bfloat16)
    save(folder, params, make_lora())
    found, _, _ = load_adapter(folder, params)
    assert_identical(found, params)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(found))


def test_the_fingerprint_names_values_paths_shapes_and_dtypes():
    tree = {"a": {"x": jnp.arange(6.0)}, "b": jnp.ones(2)}
    same = {"b": np.ones(2, np.float32), "a": {"x": np.arange(6, dtype=np.float32)}}
    assert fingerprint_tree(tree) == fingerprint_tree(same)
    others = [
        {"a": {"x": jnp.arange(6.0).at[2].set(2.5)}, "b": jnp.ones(2)},
        {"a": {"y": jnp.arange(6.0)}, "b": jnp.ones(2)},
        {"a": {"x": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(2)},
        {"a": {"x": jnp.arange(6.0)}, "b": jnp.ones(2, jnp.int32)},
        {"a": {"x": jnp.arange(6.0)}},
        {},
    ]
    assert len({fingerprint_tree(other) for other in [tree, *others]}) == 1 + len(others)


def test_the_fingerprint_is_the_same_in_every_version():
    tree = {"norm": {"scale": np.arange(3, dtype=np.float32)}, "count": np.int32(7)}
    stream = b"count\nint32[]\n\x07\0\0\0" + b"norm/scale\nfloat32[3]\n" + struct.pack("<3f", 0, 1, 2)
    assert fingerprint_tree(tree) == hashlib.sha256(stream).hexdigest()

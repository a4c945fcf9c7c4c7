"""Parameters in the layout of PyTorch, without PyTorch."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from behrt_jax.adapters.targets import scale
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.models.stacked_layers import stack_layers
from behrt_jax.weights.torch_behrt import from_state_dict, read_state_dict, to_state_dict
from tests.experiments.reference_cases import uniform
from tests.models.rows import tiny_model

CODES = 11
MODEL = tiny_model(embedding_size=6, hidden_size=8, ffn_size=12, heads=2, age_rows=7, visit_rows=9)
LAYER = "behrt.encoder.layers.0"


def drawn(model=MODEL):
    """Parameters, each its own."""
    network = BEHRTForMLM(model, CODES)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), example_batch(model))["params"])
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: uniform(jax.tree_util.keystr(path), leaf.shape).astype(np.float32), shapes
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_names_and_shapes_are_those_of_the_layout():
    tensors = to_state_dict(MODEL, drawn())
    layers = {
        f"behrt.encoder.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.in_proj_weight": (24, 8),
            "self_attn.in_proj_bias": (24,),
            "self_attn.out_proj.weight": (8, 8),
            "self_attn.out_proj.bias": (8,),
            "linear1.weight": (12, 8),
            "linear1.bias": (12,),
            "linear2.weight": (8, 12),
            "linear2.bias": (8,),
            **{f"{norm}.{leaf}": (8,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")},
        }.items()
    }
    assert {name: values.shape for name, values in tensors.items()} == {
        "behrt.embeddings.code_embedding.weight": (CODES, 6),
        "behrt.embeddings.age_embedding.embedding.weight": (7, 6),
        "behrt.embeddings.visit_embedding.embedding.weight": (9, 6),
        "behrt.embeddings.position_embedding.embedding.weight": (MODEL.positions, 6),
        "behrt.embeddings.layer_norm.weight": (6,),
        "behrt.embeddings.layer_norm.bias": (6,),
        "behrt.embedding_projection.weight": (8, 6),
        "behrt.embedding_projection.bias": (8,),
        **layers,
        "behrt.layer_norm.weight": (8,),
        "behrt.layer_norm.bias": (8,),
        "mlm_head.0.weight": (8, 8),
        "mlm_head.0.bias": (8,),
        "mlm_head.2.weight": (8,),
        "mlm_head.2.bias": (8,),
        "mlm_head.3.weight": (CODES, 8),
        "mlm_head.3.bias": (CODES,),
    }
    query = drawn()["behrt"]["encoder"]["layer_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(tensors["behrt.encoder.layers.1.self_attn.in_proj_weight"][:8], query.T)
    value = drawn()["behrt"]["encoder"]["layer_1"]["attention"]["value"]["bias"]
    np.testing.assert_array_equal(tensors["behrt.encoder.layers.1.self_attn.in_proj_bias"][16:], value)


@pytest.mark.parametrize("width", [6, 8])
def test_out_and_in_again_gives_the_same_parameters_and_the_model_that_shapes_tell(width):
    model = tiny_model(embedding_size=width, hidden_size=8, ffn_size=12, heads=2, age_rows=7, visit_rows=9)
    params = drawn(model)
    stacked = to_state_dict(model, stack_layers(params))
    found = from_state_dict(stacked, heads=2)
    assert_same(found.params, params)
    assert found.vocabulary_size == CODES
    for name in ("embedding_size", "hidden_size", "layers", "heads", "ffn_size", "positions", "age_rows"):
        assert getattr(found.model, name) == getattr(model, name), name
    assert found.model.visit_rows == 9
    assert (found.lora, found.adapters, found.left_out) == ({}, None, ())


def separate(tensors):
    """The same with linear layers for query, key and value, below a wrapper."""
    apart = {}
    for name, values in tensors.items():
        prefix, _, kind = name.partition("in_proj_")
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), np.split(values, 3), strict=True)) if kind else {}
        apart |= {f"module.{prefix}{part}.{kind}": piece for part, piece in parts.items()}
        if not kind:
            apart[f"module.{name}"] = values
    return apart


def test_separate_projections_below_a_wrapper_are_read():
    assert_same(from_state_dict(separate(to_state_dict(MODEL, drawn())), heads=2).params, drawn())


def adapted(tensors, module, rank, form):
    """`tensors` with an adapter on a layer, and its a [in, rank] and b [rank, out]."""
    outputs, inputs = tensors[f"{module}.weight"].shape
    a = uniform(f"{module} a", (inputs, rank)).astype(np.float32)
    b = uniform(f"{module} b", (rank, outputs)).astype(np.float32)
    names = {"ours": ("lora_A", "lora_B"), "peft": ("lora_A.default.weight", "lora_B.default.weight")}[form]
    base = {"ours": "original_layer", "peft": "base_layer"}[form]
    moved = {
        name.replace(f"{module}.", f"{module}.{base}.") if name.startswith(f"{module}.") else name: values
        for name, values in tensors.items()
    }
    sides = (a, b) if form == "ours" else (a.T, b.T)
    return {**moved, **{f"{module}.{name}": side for name, side in zip(names, sides, strict=True)}}, a, b


@pytest.mark.parametrize("form", ["ours", "peft"])
def test_adapters_are_read_whichever_way_round_they_are(form):
    tensors = to_state_dict(MODEL, drawn())
    tensors, a1, b1 = adapted(tensors, f"{LAYER}.linear1", 2, form)
    tensors, a2, b2 = adapted(tensors, f"{LAYER}.linear2", 3, form)
    found = from_state_dict(tensors, heads=2, alpha=6.0)
    assert_same(found.params, drawn())
    layer = found.lora["behrt"]["encoder"]["layer_0"]
    assert isinstance(found.adapters, LoRAConfig)
    for name, a, b, rank in (("intermediate", a1, b1, 2), ("output", a2, b2, 3)):
        scaled = scale(found.adapters, ("behrt", "encoder", "layer_0", name))
        product = scaled * layer[name]["a"] @ layer[name]["b"]
        np.testing.assert_allclose(product, 6.0 / rank * a @ b, rtol=1e-6)
    assert set(found.adapters.targets) == {
        f"behrt/encoder/layer_0/{name}" for name in ("intermediate", "output")
    }


def test_adapters_on_the_output_projection_that_attention_never_calls_are_left_out():
    tensors = to_state_dict(MODEL, drawn())
    module = f"{LAYER}.self_attn.out_proj"
    found = from_state_dict(adapted(tensors, module, 2, "ours")[0], heads=2)
    assert found.left_out == (module,)
    assert (found.lora, found.adapters) == ({}, None)
    assert_same(found.params, drawn())
    called, a, _ = adapted(separate(tensors), f"module.{module}", 2, "peft")
    found = from_state_dict(called, heads=2, alpha=2.0)
    assert found.left_out == ()
    np.testing.assert_array_equal(found.lora["behrt"]["encoder"]["layer_0"]["attention"]["out"]["a"], a)


LINEAR = f"{LAYER}.linear1"


def without(tensors, name):
    return {other: values for other, values in tensors.items() if other != name}


def renamed_and_longer(tensors):
    changes = {"extra.weight": tensors["mlm_head.2.bias"], "mlm_head.3.bias": np.zeros(CODES + 1)}
    return without({**tensors, **changes}, "mlm_head.2.bias")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            renamed_and_longer,
            ["missing: mlm_head.2.bias", "unknown: extra.weight", r"mlm_head.3.bias is \[12\] where \[11\]"],
        ),
        (
            lambda t: without(t, f"{LAYER}.self_attn.in_proj_bias"),
            [f"missing: {LAYER}.self_attn.in_proj_bias"],
        ),
        (lambda t: without(t, "behrt.layer_norm.weight"), ["behrt.layer_norm.weight must be there"]),
        (
            lambda t: {**t, "behrt.embeddings.code_embedding.lora_A": np.zeros((2, 6))},
            ["unknown: behrt.embeddings.code_embedding.lora_A"],
        ),
        (lambda t: without(adapted(t, LINEAR, 2, "ours")[0], f"{LINEAR}.lora_B"), ["must have both lora_A"]),
        (
            lambda t: {**t, f"{LINEAR}.lora_A": np.zeros((2, 7)), f"{LINEAR}.lora_B": np.zeros((2, 12))},
            ["no adapter of a layer from 8 to 12"],
        ),
        (lambda t: adapted(t, "mlm_head.0", 8, "ours")[0], ["square"]),
        (lambda t: adapted(t, LINEAR, 2, "ours")[0], ["give --alpha"]),
        (lambda t: {**t, f"{LINEAR}.base_layer.weight": t[f"{LINEAR}.weight"]}, ["unknown: .*base_layer"]),
    ],
)
def test_what_does_not_fit_is_named(change, messages):
    tensors = change(to_state_dict(MODEL, drawn()))
    for message in messages:
        with pytest.raises(InputError, match=message):
            from_state_dict(tensors, heads=2)


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="--heads is 3"):
        from_state_dict(to_state_dict(MODEL, drawn()), heads=3)


@pytest.mark.parametrize(
    "setting",
    [
        {"position_of": "visit"},
        {"position_embedding": "sinusoidal"},
        {"position_embedding": "rope"},
        {"visit_embedding": "alternating"},
        {"time": "gaps"},
        {"ffn": "swiglu"},
        {"norm": "rms"},
        {"bias": False},
        {"tied_decoder": True},
    ],
)
def test_settings_that_the_layout_does_not_have_are_refused(setting):
    with pytest.raises(InputError, match=f"model.{next(iter(setting))}"):
        to_state_dict(tiny_model(**setting), {})


def test_a_safetensors_file_is_read_in_any_precision(tmp_path):
    half = {name: values.astype(np.float16) for name, values in to_state_dict(MODEL, drawn()).items()}
    save_file(half, tmp_path / "half.safetensors")
    read = read_state_dict(tmp_path / "half.safetensors")
    assert {values.dtype for values in read.values()} == {np.dtype(np.float32)}
    assert_same(read, {name: values.astype(np.float32) for name, values in half.items()})


@pytest.mark.parametrize(("content", "message"), [(None, "is not there"), (b"x" * 20, "no safetensors file")])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_state_dict(path)

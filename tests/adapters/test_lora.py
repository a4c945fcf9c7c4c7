"""LoRA as a tree transform."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import AdapterConfig, load_adapter, save_adapter
from behrt_jax.adapters.lora import activation_product, merged_kernel, merged_product, resolve_product
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.models.stacked_layers import stack_layers, unstack_layers
from tests.models.rows import MODERN, VOCABULARY, random_batch, tiny_model

MODEL = BEHRTForMLM(tiny_model(), VOCABULARY)
ALL_LINEARS = ("query", "key", "value", "out", "intermediate", "output")

# One program each in place of one for every leaf; merging is one of itself.
init, unmerge = (jax.jit(f, static_argnums=2) for f in (lora.init, lora.unmerge))
merge = lora.merge


@pytest.fixture(scope="module")
def params():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0), example_batch(MODEL.config))["params"])


def trained(params, config, seed=1):
    """Adapters as after some training: b is no longer zero."""
    fresh = jax.device_get(init(jax.random.key(seed), params, config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), fresh)


@partial(jax.jit, static_argnames=("config", "product"))
def adapted_logits(params, adapters, config, batch, product="activations"):
    with lora.applying(config, product):
        return MODEL.apply({"params": params, "lora": adapters}, batch)


@jax.jit
def base_logits(params, batch):
    return MODEL.apply({"params": params}, batch)


@pytest.mark.parametrize("targets", [("out",), ("query", "key", "value", "out"), ALL_LINEARS])
def test_shapes_and_first_values(params, targets):
    config = LoRAConfig(rank=3, targets=targets)
    adapters = jax.device_get(init(jax.random.key(0), params, config))
    kernels = flatten_dict(params)
    flat = flatten_dict(adapters)
    assert {path[-2] for path in flat} == set(targets)
    for path, leaf in flat.items():
        inputs, outputs = kernels[(*path[:-1], "kernel")].shape
        chex.assert_shape(leaf, (inputs, 3) if path[-1] == "a" else (3, outputs))
        if path[-1] == "b":
            np.testing.assert_array_equal(leaf, 0.0)
        else:
            assert 0.5 * inputs**-0.5 < np.abs(leaf).max() <= inputs**-0.5


@pytest.mark.parametrize("product", ["activations", "extended", "merged"])
def test_fresh_adapters_leave_the_output_identical(params, product):
    config = LoRAConfig(rank=4, targets=ALL_LINEARS)
    batch = random_batch(0)
    base = base_logits(params, batch)
    adapters = init(jax.random.key(0), params, config)
    np.testing.assert_array_equal(adapted_logits(params, adapters, config, batch, product), base)


def deltas(adapters, config):
    """What adapters of `a` and `b` alone add to each kernel, in numpy."""
    pairs = lora.leaves_by_path(adapters)
    return {
        path: lora.scale(config, path) * np.asarray(pairs[(*path, "a")]) @ np.asarray(pairs[(*path, "b")])
        for path in lora.layer_paths(adapters)
    }


PISSA = LoRAConfig(rank=5, alpha=6.0, targets=ALL_LINEARS, init="pissa", rank_pattern=("query=16",))
ORTHOGONAL = LoRAConfig(rank=5, targets=ALL_LINEARS, init="orthogonal", rank_pattern=("key=1", "out=4"))


@pytest.mark.parametrize("product", ["activations", "extended", "merged"])
@pytest.mark.parametrize("config", [PISSA, ORTHOGONAL], ids=["pissa", "orthogonal"])
def test_adapters_that_begin_away_from_zero_leave_the_output_as_it_is(params, config, product):
    batch, adapters = random_batch(0), init(jax.random.key(0), params, config)
    adapted = adapted_logits(params, adapters, config, batch, product)
    np.testing.assert_allclose(adapted, base_logits(params, batch), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(merge(params, adapters, config), params, atol=1e-6)
    moved = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.1 if path[-1].key == "b" else x, adapters)
    assert np.abs(adapted_logits(params, moved, config, batch, product) - adapted).max() > 0.01


def test_orthogonal_adapters_have_both_sides_in_parts_of_the_rank_at_right_angles(params):
    adapters = lora.leaves_by_path(jax.device_get(init(jax.random.key(0), params, ORTHOGONAL)))
    for path in lora.layer_paths(lora.unflatten_dict(adapters)):
        a, b = adapters[(*path, "a")], adapters[(*path, "b")]
        np.testing.assert_allclose(a @ b, 0.0, atol=1e-6)
        rank = a.shape[1]
        assert np.linalg.matrix_rank(a) == (rank + 1) // 2 and np.linalg.matrix_rank(b) == rank // 2
        assert 0.02 < np.abs(a).max() < 1.0 and (rank == 1 or 0.02 < np.abs(b).max() < 1.0)


def test_pissa_begins_with_the_largest_singular_values_of_the_kernel(params):
    adapters, kernels = jax.device_get(init(jax.random.key(0), params, PISSA)), lora.leaves_by_path(params)
    for path, delta in deltas(adapters, PISSA).items():
        u, s, v = np.linalg.svd(kernels[(*path, "kernel")].astype(np.float64), full_matrices=False)
        rank = 16 if path[-1] == "query" else 5
        np.testing.assert_allclose(delta, u[:, :rank] * s[:rank] @ v[:rank], atol=2e-5)
    for path, leaf in lora.leaves_by_path(adapters).items():
        if path[-1] in ("a", "b"):
            first = lora.leaves_by_path(adapters)[(*path[:-1], f"{path[-1]}0")]
            np.testing.assert_array_equal(first, leaf)


@pytest.mark.parametrize("product", ["activations", "extended", "merged"])
def test_pissa_trains_as_adapters_on_the_residual_base(params, product):
    """The definition: the frozen kernel is what the adapter leaves of it, `W - scale * a @ b`."""
    adapters, batch = jax.device_get(init(jax.random.key(0), params, PISSA)), random_batch(2)
    kernels = lora.leaves_by_path(params)
    for path, delta in deltas(adapters, PISSA).items():
        kernels[(*path, "kernel")] = kernels[(*path, "kernel")] - delta
    residual = lora.unflatten_dict(kernels)
    rng = np.random.default_rng(0)
    flat = {
        path: leaf
        if path[-1] in ("a0", "b0")
        else leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in lora.leaves_by_path(adapters).items()
    }
    moved = lora.unflatten_dict(flat)
    plain = lora.unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1] in ("a", "b")})
    loss, gradient = loss_and_gradient(moved, params, batch, PISSA, product)
    expected, expected_gradient = loss_and_gradient(plain, residual, batch, PISSA, "activations")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    gradients, theirs = lora.leaves_by_path(gradient), lora.leaves_by_path(expected_gradient)
    for path, leaf in gradients.items():
        wanted = theirs.get(path, 0.0)  # nothing of what they began with
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=1e-6)
    assert max(np.abs(leaf).max() for leaf in theirs.values()) > 5e-4


@pytest.mark.parametrize("config", [PISSA, ORTHOGONAL], ids=["pissa", "orthogonal"])
def test_adapters_of_stacked_layers_begin_as_those_of_layers_one_by_one(stacked, config):
    ours = unstack_layers(jax.device_get(init(jax.random.key(1), stacked, config)))
    theirs = jax.device_get(init(jax.random.key(1), unstack_layers(stacked), config))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stabilised", [False, True])
def test_merged_parameters_give_the_adapted_output(params, stabilised):
    config = LoRAConfig(rank=4, alpha=6.0, targets=ALL_LINEARS, rank_stabilised=stabilised)
    adapters, batch = trained(params, config), random_batch(1)
    adapted = np.asarray(adapted_logits(params, adapters, config, batch))
    merged = merge(params, adapters, config)
    from_merged, base = (np.asarray(base_logits(tree, batch)) for tree in (merged, params))
    real = batch.segment_ids > 0
    assert np.abs(adapted - base)[real].max() > 1e-2
    np.testing.assert_allclose(from_merged[real], adapted[real], atol=1e-5, rtol=1e-5)


def test_merging_is_one_program_whatever_the_shapes_of_the_layers(params):
    config = LoRAConfig(rank=4, targets=ALL_LINEARS)
    merging = partial(lora.merge, config=config)
    assert len(jax.make_jaxpr(merging)(params, trained(params, config)).eqns) == 1


def test_unmerge_undoes_merge_and_touches_no_other_leaf(params):
    config = LoRAConfig(rank=4, targets=("out",))
    adapters = trained(params, config)
    merged = jax.device_get(merge(params, adapters, config))
    chex.assert_trees_all_close(unmerge(merged, adapters, config), params, atol=1e-6)
    before = flatten_dict(params)
    changed = {path for path, leaf in flatten_dict(merged).items() if not np.array_equal(leaf, before[path])}
    assert changed == {(*path[:-1], "kernel") for path in flatten_dict(adapters)}


@partial(jax.jit, static_argnames=("config", "product"))
def loss_and_gradient(adapters, params, batch, config, product):
    def loss(adapters):
        with lora.applying(config, product):
            return (MODEL.apply({"params": params, "lora": adapters}, batch) ** 2).mean()

    return jax.value_and_grad(loss)(adapters)


@pytest.mark.parametrize("product", ["extended", "merged"])
def test_all_products_have_equal_outputs_and_gradients(params, product):
    config = LoRAConfig(rank=4, targets=ALL_LINEARS)
    adapters, batch = trained(params, config), random_batch(2)
    ours, expected = (
        loss_and_gradient(adapters, params, batch, config, form) for form in (product, "activations")
    )
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("product", ["activations", "extended"])
def test_adapters_compute_in_the_precision_of_their_layer(product):
    """The input of most layers is a LayerNorm's, in float32: no product of a bfloat16 model may be."""
    model = BEHRTForMLM(replace(MODEL.config, compute_dtype="bfloat16"), VOCABULARY)
    config, batch = LoRAConfig(rank=7, targets=ALL_LINEARS), random_batch(0)

    def loss(adapters, params):
        with lora.applying(config, product):
            return model.apply({"params": params, "lora": adapters}, batch).mean()

    params = jax.eval_shape(lambda key: model.init(key, batch)["params"], jax.random.key(0))
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config))
    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters, params).jaxpr
    operands = [x.aval for p in dot_generals(jaxpr) for x in p.invars if 7 in x.aval.shape]
    assert {x.dtype for x in operands} == {jnp.dtype("bfloat16")}


def dot_generals(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from dot_generals(inner)


@pytest.mark.slow
def test_kernels_merged_beforehand_give_the_same_outputs_and_gradients(params):
    config = LoRAConfig(rank=4, targets=ALL_LINEARS)
    adapters, batch = trained(params, config), random_batch(2)

    def loss(adapters, merged):
        variables = {"params": params, "lora": adapters, **merged}
        with lora.applying(config, "merged"):
            return (MODEL.apply(variables, batch) ** 2).mean()

    beforehand = {"merged": lora.merged_kernels(params, adapters, config)}
    gradient, loss = jax.jit(jax.grad(loss)), jax.jit(loss)
    chex.assert_trees_all_close(gradient(adapters, beforehand), gradient(adapters, {}), rtol=1e-6)
    doubled = jax.tree.map(lambda kernel: 2 * kernel, beforehand)  # they are what is used
    assert abs(loss(adapters, doubled) / loss(adapters, beforehand) - 1) > 1e-2


# Each new shape compiles anew.
@settings(max_examples=6)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    st.floats(0.1, 4.0),
    st.integers(0, 99),
)
def test_products_agree_with_the_definition(sizes, scale, seed):
    rows, inputs, outputs, rank = sizes
    rng = np.random.default_rng(seed)
    shapes = [(rows, 2, inputs), (inputs, outputs), (inputs, rank), (rank, outputs)]
    x, kernel, a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    def plain(x, a, b):
        return jnp.sin(x @ kernel + scale * (x @ a @ b)).sum()

    def merged(x, a, b):
        return jnp.sin(merged_product(x, merged_kernel(kernel, a, b, scale), a, b, scale)).sum()

    @jax.jit
    def both(*operands):
        return [jax.value_and_grad(form, (0, 1, 2))(*operands) for form in (merged, plain)]

    (ours, our_gradients), (theirs, their_gradients) = both(x, a, b)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(our_gradients, their_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


def test_adapter_dropout_falls_on_the_adapter_alone(params):
    config = LoRAConfig(rank=4, dropout=0.5)
    batch, key = random_batch(3), jax.random.key(9)
    adapters = trained(params, config)
    fresh = init(jax.random.key(0), params, config)
    still = tiny_model(dropout=0.0)
    model = BEHRTForMLM(still, VOCABULARY)

    @jax.jit
    def logits(adapters):
        with lora.applying(config, deterministic=False):
            return model.apply(
                {"params": params, "lora": adapters}, batch, deterministic=False, rngs={"dropout": key}
            )

    base = jax.jit(lambda: model.apply({"params": params}, batch))()
    np.testing.assert_allclose(logits(fresh), base, atol=1e-6)
    assert np.abs(logits(adapters) - adapted_logits(params, adapters, config, batch)).max() > 1e-3
    np.testing.assert_allclose(
        activation_product(jnp.ones((3, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)), 0.5), 1.0
    )


def test_an_adapter_does_not_depend_on_which_others_there_are(params):
    alone = flatten_dict(init(jax.random.key(0), params, LoRAConfig(rank=2, targets=("out",))))
    among = flatten_dict(init(jax.random.key(0), params, LoRAConfig(rank=2, targets=ALL_LINEARS)))
    for path, leaf in alone.items():
        np.testing.assert_array_equal(leaf, among[path])
    firsts = [leaf for path, leaf in among.items() if path[-1] == "a" and leaf.shape == (16, 2)]
    assert not np.allclose(firsts[0], firsts[1])


def test_targets_by_path_pattern(params):
    layers = lora.adapted_layers(params, LoRAConfig(targets=("behrt/encoder/layer_0/*", "mlm_head/dense")))
    names = {layer.name for layer in layers}
    assert "mlm_head/dense" in names
    assert "behrt/encoder/layer_0/intermediate" in names
    assert "behrt/encoder/layer_0/attention/query" in names
    assert not any("layer_1" in name for name in names)


def test_a_target_that_matches_nothing_lists_what_could_match(params):
    with pytest.raises(InputError, match=r"'qery' matches no.*key, out, output, projection, query, value"):
        lora.adapted_layers(params, LoRAConfig(targets=("query", "qery")))


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"rank": 0}, "lora.rank"), ({"dropout": 1.0}, "lora.dropout"), ({"alpha": 0.0}, "lora.alpha"),
     ({"targets": ()}, "lora.targets")],
)  # fmt: skip
def test_settings_out_of_range_are_named(params, changes, option):
    with pytest.raises(InputError, match=option):
        lora.init(jax.random.key(0), params, LoRAConfig(**changes))


def test_scale():
    assert lora.scale(LoRAConfig(rank=16)) == 2.0
    assert lora.scale(LoRAConfig(rank=16, alpha=8.0)) == 0.5
    assert lora.scale(LoRAConfig(rank=16, alpha=8.0, rank_stabilised=True)) == 2.0


def test_product_is_merged_only_where_that_is_right():
    assert resolve_product(LoRAConfig(), "float32", True) == "merged"
    assert resolve_product(LoRAConfig(), "bfloat16", True) == "extended"
    for config, dtype, frozen in [
        (LoRAConfig(dropout=0.1), "float32", True),
        (LoRAConfig(dropout=0.1), "bfloat16", True),
        (LoRAConfig(), "float32", False),
        (LoRAConfig(), "bfloat16", False),
    ]:
        assert resolve_product(config, dtype, frozen) == "activations"
    for product in ("merged", "extended"):
        with pytest.raises(InputError, match=f"{product}: not possible while adapted kernels are trained"):
            resolve_product(LoRAConfig(product=product), "float32", False)
    with pytest.raises(InputError, match="compute_dtype is bfloat16"):
        resolve_product(LoRAConfig(product="merged"), "bfloat16", True)


def test_adapters_work_under_a_scan_over_layers():
    """Modules never name LoRA, also where the layers' parameters are stacked."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(4, name="out")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(Layer, variable_axes={True: 0}, split_rngs={True: True}, length=3)
            return scanned(name="layers")(x, None)[0]

    x = np.ones((2, 4), np.float32)
    params = jax.device_get(jax.jit(Stack().init)(jax.random.key(0), x)["params"])
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=size).astype(np.float32) for size in ((3, 4, 2), (3, 2, 4)))
    config = LoRAConfig(rank=2)
    with lora.applying(config):
        adapted = jax.jit(Stack().apply)({"params": params, "lora": {"layers": {"out": {"a": a, "b": b}}}}, x)
    expected = x
    for layer in range(3):
        dense = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"]["out"])
        kernel = dense["kernel"] + 2.0 * a[layer] @ b[layer]
        expected = expected + expected @ kernel + dense["bias"][None, :]
    np.testing.assert_allclose(adapted, expected, rtol=1e-5)


# Adapters of one rank brought to another, with the same product.


RNG = np.random.default_rng(0)


@pytest.mark.parametrize("layers", [(), (2,)])
def test_adapters_of_a_larger_rank_have_the_same_product_and_are_cut_back(layers):
    a, b = RNG.normal(size=(*layers, 4, 2)), RNG.normal(size=(*layers, 2, 5))
    tree = {"encoder": {"query": {"a": a.astype(np.float32), "b": b.astype(np.float32)}}}
    padded = lora.pad(tree, LoRAConfig(rank=3))
    longer = padded["encoder"]["query"]
    assert longer["a"].shape == (*layers, 4, 3) and longer["b"].shape == (*layers, 3, 5)
    np.testing.assert_allclose(longer["a"] @ longer["b"], a @ b, rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, lora.cut(padded, LoRAConfig(rank=2)), tree)
    twice = lora.scaled(padded, 2.0)["encoder"]["query"]
    np.testing.assert_allclose(twice["a"] @ twice["b"], 2 * a @ b, rtol=1e-4, atol=1e-6)


# Adapters on stacked layers: the same as on layers one by one.


CONFIG = LoRAConfig(rank=3, targets=("query", "intermediate", "mlm_head/dense"))


@pytest.fixture(scope="module")
def stacked():
    model = BEHRTForMLM(tiny_model(layers=3, scan_layers=True), VOCABULARY)
    return jax.device_get(jax.jit(model.init)(jax.random.key(0), example_batch(model.config))["params"])


def test_fresh_adapters_are_those_of_layers_one_by_one(stacked):
    ours = jax.device_get(init(jax.random.key(1), stacked, CONFIG))
    chex.assert_shape(ours["behrt"]["encoder"]["layers"]["intermediate"]["a"], (3, 16, 3))
    chex.assert_shape(ours["behrt"]["encoder"]["layers"]["intermediate"]["b"], (3, 3, 64))
    theirs = init(jax.random.key(1), unstack_layers(stacked), CONFIG)
    chex.assert_trees_all_equal(unstack_layers(ours), theirs)
    a = ours["behrt"]["encoder"]["layers"]["attention"]["query"]["a"]
    assert np.abs(a[0] - a[1]).max() > 0.01


def test_merging_is_that_of_layers_one_by_one_and_can_be_undone(stacked):
    adapters = trained(stacked, CONFIG)
    merged = jax.device_get(merge(stacked, adapters, CONFIG))
    theirs = merge(unstack_layers(stacked), unstack_layers(adapters), CONFIG)
    chex.assert_trees_all_close(unstack_layers(merged), theirs, rtol=1e-6, atol=1e-7)
    kernel = ("behrt", "encoder", "layers", "attention", "query", "kernel")
    before, after = (flatten(tree)[kernel] for tree in (stacked, merged))
    assert np.abs(after - before).max(axis=(1, 2)).min() > 0.01
    chex.assert_trees_all_close(unmerge(merged, adapters, CONFIG), stacked, atol=1e-6)


def flatten(tree):
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_layers_are_named_as_if_they_were_apart(stacked):
    config = LoRAConfig(targets=("out", "behrt/encoder/layer_*/attention/query"))
    ours, theirs = (lora.adapted_layers(tree, config) for tree in (stacked, unstack_layers(stacked)))
    assert {layer.name for layer in ours} == {layer.name for layer in theirs}
    assert len(ours) == len(theirs) == 6
    assert {(layer.inputs, layer.outputs) for layer in ours} == {(16, 16)}


def test_single_layers_of_a_stack_cannot_be_adapted(stacked):
    with pytest.raises(InputError, match=r"layer_1/\S+ is not among the targets.*layer_\*.*scan_layers off"):
        lora.adapted_layers(stacked, LoRAConfig(targets=("behrt/encoder/layer_0/*",)))
    each = tuple(f"behrt/encoder/layer_{layer}/*" for layer in range(3))
    assert len(lora.adapted_layers(stacked, LoRAConfig(targets=each))) == 3 * 6


@pytest.mark.parametrize("saved_stacked", [True, False])
@pytest.mark.parametrize("loaded_stacked", [True, False])
def test_an_adapter_file_fits_its_base_in_either_layout(stacked, tmp_path, saved_stacked, loaded_stacked):
    def layout(tree, wanted):
        return tree if wanted else unstack_layers(tree)

    adapters = trained(stacked, CONFIG)
    params = layout(stacked, saved_stacked)

    def trains(path, _):  # some of what is stacked trains, some does not
        return any(key.key in ("mlm_head", "ffn_norm") for key in path)

    save_adapter(
        tmp_path / "adapter",
        params,
        layout(adapters, saved_stacked),
        jax.tree_util.tree_map_with_path(trains, params),
        AdapterConfig(lora={"rank": 3}, model={}, vocabulary_fingerprint="v"),
    )
    other = jax.tree_util.tree_map_with_path(lambda p, x: x + 1.0 if trains(p, x) else x, stacked)
    found_params, found_lora, config = load_adapter(tmp_path / "adapter", layout(other, loaded_stacked))
    chex.assert_trees_all_equal(found_params, layout(stacked, loaded_stacked))
    chex.assert_trees_all_equal(found_lora, layout(adapters, loaded_stacked))
    assert "lora/behrt/encoder/layer_2/attention/query/a" in config.tensors

    changed = jax.tree.map(lambda x: x, other)
    kernel = changed["behrt"]["encoder"]["layers"]["output"]["kernel"].copy()
    kernel[2, 0, 0] += 1.0
    changed["behrt"]["encoder"]["layers"]["output"]["kernel"] = kernel
    with pytest.raises(InputError, match="frozen parameters differ"):
        load_adapter(tmp_path / "adapter", layout(changed, loaded_stacked))


@pytest.mark.parametrize(("layer", "missing"), [(0, 1), (1, 0)])
def test_an_adapter_on_some_layers_does_not_fit_a_stack(stacked, tmp_path, layer, missing):
    params = unstack_layers(stacked)
    config = LoRAConfig(rank=3, targets=(f"behrt/encoder/layer_{layer}/attention/query",))
    adapters = init(jax.random.key(1), params, config)
    save_adapter(
        tmp_path / "adapter",
        params,
        adapters,
        jax.tree.map(lambda _: False, params),
        AdapterConfig(lora={"rank": 3}, model={}, vocabulary_fingerprint="v"),
    )
    with pytest.raises(InputError, match=f"query/a cannot be stacked: layer_{missing} has no"):
        load_adapter(tmp_path / "adapter", stack_layers(params))


# Layers of today: gates, no biases, a decoder that is the code table.

OF_TODAY = BEHRTForMLM(tiny_model(layers=1, **MODERN), VOCABULARY)
GATED = LoRAConfig(rank=3, targets=(*ALL_LINEARS, "gate", "dense"))


@pytest.fixture(scope="module")
def of_today():
    return jax.device_get(jax.jit(OF_TODAY.init)(jax.random.key(0), example_batch(OF_TODAY.config))["params"])


@pytest.mark.parametrize("how", ["activations", "extended", "merged", "into the base"])
def test_gates_and_layers_without_biases_are_adapted_alike_by_every_product(of_today, how):
    adapters, batch = trained(of_today, GATED), random_batch(4)
    names = {path[-2] for path in flatten_dict(adapters)}
    assert names == {*ALL_LINEARS, "gate", "dense"}
    real = batch.segment_ids > 0

    @partial(jax.jit, static_argnames="product")
    def logits(params, adapters, product="activations"):
        with lora.applying(GATED, product):
            return OF_TODAY.apply({"params": params, "lora": adapters}, batch)

    expected = np.asarray(logits(of_today, adapters))[real]
    if how == "into the base":
        found = logits(merge(of_today, adapters, GATED), {})
    elif how == "activations":  # which reads the gate's adapter
        without = jax.tree.map(lambda x: x, adapters)
        del without["behrt"]["encoder"]["layer_0"]["gate"]
        assert np.abs(np.asarray(logits(of_today, without))[real] - expected).max() > 1e-3
        return
    else:
        found = logits(of_today, adapters, product=how)
    np.testing.assert_allclose(np.asarray(found)[real], expected, atol=1e-5)


def test_a_gate_begins_with_its_largest_singular_values(of_today):
    config = LoRAConfig(rank=3, targets=("gate",), init="pissa")
    adapters = init(jax.random.key(0), of_today, config)["behrt"]["encoder"]["layer_0"]["gate"]
    kernel = of_today["behrt"]["encoder"]["layer_0"]["gate"]["kernel"]
    found = np.linalg.svd(lora.scale(config) * np.asarray(adapters["a"] @ adapters["b"]))[1]
    np.testing.assert_allclose(found[:3], np.linalg.svd(kernel)[1][:3], rtol=1e-4)


def test_a_tied_decoder_has_no_layer_to_adapt(of_today):
    with pytest.raises(InputError, match=r"'decoder' matches no Dense layer.*gate, intermediate"):
        lora.adapted_layers(of_today, LoRAConfig(targets=("decoder",)))


def test_an_adapter_with_gates_and_embeddings_of_times_comes_back_from_its_file(of_today, tmp_path):
    adapters = trained(of_today, GATED)

    def trains(path, _):
        return "embeddings" in lora.path_names(path) or "mlm_head" in lora.path_names(path)

    marks = jax.tree_util.tree_map_with_path(trains, of_today)
    settings = AdapterConfig(lora={"rank": 3}, model={}, vocabulary_fingerprint="v")
    save_adapter(tmp_path / "adapter", of_today, adapters, marks, settings)
    other = jax.tree.map(lambda mark, leaf: leaf + 1.0 if mark else leaf, marks, of_today)
    found, found_lora, config = load_adapter(tmp_path / "adapter", other)
    chex.assert_trees_all_equal(found, of_today)
    chex.assert_trees_all_equal(found_lora, adapters)
    assert "params/behrt/embeddings/calendar/scale" in config.tensors

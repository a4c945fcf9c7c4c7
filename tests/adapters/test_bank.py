"""A bank of adapters: in one pass, what each adapter says alone."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.adapters import bank, lora
from behrt_jax.adapters.files import AdapterConfig, save_adapter
from behrt_jax.adapters.lora import label, path_names
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForTask, example_batch
from behrt_jax.models.stacked_layers import unstack_layers
from tests.models.rows import VOCABULARY, random_batch, tiny_model

SEGMENTS = 3
MEMBERS: tuple[tuple[LoRAConfig | None, int], ...] = (
    (LoRAConfig(rank=2, targets=("query", "value")), 1),
    (
        LoRAConfig(
            rank=5,
            alpha=3.0,
            targets=("intermediate", "output", "projection"),
            rank_pattern=("output=2",),
            alpha_pattern=("projection=1",),
        ),
        4,
    ),
    (None, 2),  # a head alone
    (LoRAConfig(rank=3, targets=("query", "out", "task_head/dense"), rank_stabilised=True), 3),
)
"""Adapters and outputs."""

init_adapters = jax.jit(lora.init, static_argnums=2)


def moved(tree, seed):
    """Numbers of some size everywhere, also where there were zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + rng.normal(0, 0.3, x.shape)).astype(np.float32), tree)


def save(folder, params, adapters, config, trained_groups=("head",), **changes):
    """The adapter folder of a run that trained these groups of the params, and the adapters."""

    def trains(path, _):
        return label(("params", *path_names(path))) in trained_groups

    written = {
        "lora": None if config is None else {**vars(config), "unknown_setting": 1},
        "model": {},
        "vocabulary_fingerprint": "v",
    }
    trained = jax.tree_util.tree_map_with_path(trains, params)
    save_adapter(folder, params, adapters, trained, AdapterConfig(**{**written, **changes}))


@pytest.fixture(scope="module", params=["layers apart", "stacked"])
def case(request, tmp_path_factory):
    """Model configuration, base, folders, and each member's own variables."""
    config = tiny_model(layers=2, scan_layers=request.param == "stacked")
    root = tmp_path_factory.mktemp("bank")
    behrt, members = None, []
    for number, (adapter, outputs) in enumerate(MEMBERS):
        model = BEHRTForTask(config, VOCABULARY, outputs)
        init = partial(model.init, segments=SEGMENTS)
        shapes = jax.eval_shape(init, jax.random.key(0), example_batch(config))["params"]
        params = moved(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), 50 + number)
        behrt = params["behrt"] if behrt is None else behrt
        params["behrt"] = behrt
        own = {} if adapter is None else moved(init_adapters(jax.random.key(9), params, adapter), number)
        members.append((model, params, own, adapter))
        save(root / str(number), params, own, adapter)
    return config, {"behrt": behrt}, [root / str(number) for number in range(len(MEMBERS))], members


@partial(jax.jit, static_argnames=("model", "adapter"))
def alone(params, own, batch, model, adapter):
    """`[batch, segments, outputs]` of one adapter, by `lora.applying`."""
    with nullcontext() if adapter is None else lora.applying(adapter):
        return model.apply({"params": params, "lora": own}, batch, segments=SEGMENTS)


def assert_each_as_alone(found, numbers, members, batch):
    expected = [
        np.asarray(alone(params, own, batch, model, adapter)) for model, params, own, adapter in members
    ]
    for row in range(found.shape[0]):
        for segment in range(SEGMENTS):
            own = expected[numbers[row, segment]][row, segment]
            np.testing.assert_allclose(found[row, segment, : len(own)], own, rtol=1e-5, atol=1e-5)
            assert not found[row, segment, len(own) :].any()
    # The adapters do say different things.
    assert np.abs(expected[0][..., 0] - expected[3][..., 0]).max() > 0.05


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_rows_that_mix_adapters_are_answered_as_by_each_alone(case, seed):
    config, base, folders, members = case
    batch = random_batch(seed, segments=SEGMENTS)
    numbers = np.random.default_rng(seed).integers(0, len(MEMBERS), (4, SEGMENTS)).astype(np.int32)
    numbers[0] = [0, 3, 1]
    found = predict(bank.load(folders, base, "v"), config, batch, numbers)
    assert found.shape == (4, SEGMENTS, 4)
    assert_each_as_alone(np.asarray(found), numbers, members, batch)


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_rows_of_one_adapter_each_are_answered_as_by_each_alone(case, seed):
    config, base, folders, members = case
    batch = random_batch(seed, segments=SEGMENTS)
    numbers = np.random.default_rng(seed).permutation(len(MEMBERS)).astype(np.int32)
    loaded = bank.load(folders, base)
    found = np.asarray(predict(loaded, config, batch, numbers))
    spread = np.repeat(numbers[:, None], SEGMENTS, axis=1)
    assert_each_as_alone(found, spread, members, batch)
    np.testing.assert_allclose(found, predict(loaded, config, batch, spread), rtol=1e-5, atol=1e-5)


@partial(jax.jit, static_argnames=("config",))
def apply(loaded, inputs, numbers, config):
    model = BEHRTForTask(config, VOCABULARY, outputs=1)
    return bank.predict(loaded, model, inputs, numbers, SEGMENTS)


def predict(loaded, config, batch, numbers):
    return apply(loaded, batch, numbers, config)


def test_the_base_is_shared_and_the_bank_has_one_adapter_after_the_other(case):
    _, base, folders, _ = case
    loaded = bank.load(folders, base)
    assert loaded.behrt is base["behrt"]
    assert len(loaded) == 4 and loaded.outputs == (1, 4, 2, 3)
    assert loaded.kernel.shape == (16, 10) and loaded.bias.shape == (10,)
    encoder = unstack_layers(loaded.adapters)["encoder"]
    query = encoder["layer_1"]["attention"]["query"]
    assert query["a"].shape == (16, 5) and query["b"].shape == (5, 16)
    np.testing.assert_array_equal(query["owner"], [0, 0, 3, 3, 3])
    np.testing.assert_array_equal(query["slots"], [[0, 1, 5], [5, 5, 5], [5, 5, 5], [2, 3, 4]])
    assert loaded.adapters["embeddings"]["projection"]["a"].shape == (12, 5)


def test_gathered_adapters_cost_the_same_however_many_there_are(tmp_path):
    """And joined ones cost more with each."""
    config = tiny_model()
    model = BEHRTForTask(config, VOCABULARY, 1)
    params = jax.jit(partial(model.init, segments=1))(jax.random.key(0), example_batch(config))["params"]
    adapter = LoRAConfig(rank=4)
    own = init_adapters(jax.random.key(1), params, adapter)
    save(tmp_path / "adapter", params, own, adapter)
    batch = random_batch(0, segments=SEGMENTS)

    def flops(adapters, shape):
        loaded = bank.load([tmp_path / "adapter"] * adapters, params)
        lowered = apply.lower(loaded, batch, jnp.zeros(shape, jnp.int32), config)
        return lowered.compile().cost_analysis()["flops"]

    joined = [flops(adapters, (4, SEGMENTS)) for adapters in (4, 8, 16)]
    gathered = [flops(adapters, (4,)) for adapters in (4, 16)]
    ranks = 4 * 2 * 4  # more ranks, on 4 layers of 2 blocks
    tokens, width = batch.codes.size, config.hidden_size
    least = 4 * ranks // 8 * tokens * 2 * 2 * width
    assert joined[1] - joined[0] >= 0.9 * least * 2 / 2
    assert joined[2] - joined[1] == pytest.approx(2 * (joined[1] - joined[0]), rel=0.05)
    assert gathered[-1] - gathered[0] < 0.02 * gathered[0]
    assert gathered[-1] < joined[-1]


def test_an_adapter_on_another_base_or_vocabulary_is_refused(case):
    _, base, folders, _ = case
    other = moved(base, 7)
    with pytest.raises(InputError, match="0: the frozen parameters differ"):
        bank.load(folders, other)
    with pytest.raises(InputError, match="another vocabulary"):
        bank.load(folders, base, "w")
    with pytest.raises(InputError, match="one adapter folder at least"):
        bank.load([], base)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (("head", "embedding"), "cannot share a base.*params/behrt/embeddings/.*lora_pretrained"),
        (("head", "base"), "cannot share a base.*params/behrt/encoder/"),
        ((), "no trained task head"),
    ],
)
def test_an_adapter_that_changed_the_base_or_has_no_head_is_refused(case, tmp_path, groups, message):
    _, base, folders, members = case
    _, params, own, adapter = members[0]
    save(tmp_path / "adapter", params, own, adapter, groups)
    with pytest.raises(InputError, match=message):
        bank.load([folders[1], tmp_path / "adapter"], base)


def test_an_adapter_with_codes_of_its_own_is_refused(case, tmp_path):
    _, base, _, members = case
    _, params, own, adapter = members[0]
    extended = {**params, "new_codes": {"rows": jnp.ones((2, 12))}}
    save(tmp_path / "adapter", extended, own, adapter, ("head", "lora"), new_codes=("A", "B"))
    with pytest.raises(InputError, match=r"params/new_codes/rows.*extend_vocabulary"):
        bank.load([tmp_path / "adapter"], base)

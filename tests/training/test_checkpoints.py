import json
import logging
import shutil
import threading
from logging.handlers import BufferingHandler

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from behrt_jax.errors import InputError
from behrt_jax.training.checkpoints import open_checkpoints

CURSOR = {"step": 3, "totals": {"loss": 1.5}, "best_step": None}
CONFIG = {"name": "small_lora", "lora": {"rank": 2}, "output": None}


def arrays(shapes):
    """A tree of shapes -> a tree of distinct values, without compiling anything."""
    leaves, structure = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)
    return structure.unflatten([jnp.asarray(10 * random.random(leaf.shape), leaf.dtype) for leaf in leaves])


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def params_shapes(depth=2, width=8):
    layer = {"query": {"kernel": floats(width, width), "bias": floats(width)}}
    layers = {f"layer_{i}": layer for i in range(depth)}
    return {"behrt": {"encoder": layers}, "mlm_head": {"kernel": floats(width, 16)}}


def lora_shapes(rank=2, width=8):
    query = {"a": floats(width, rank), "b": floats(rank, width)}
    return {"behrt": {"encoder": {"layer_0": {"query": query}}}}


def optimizer_shapes(params, lora):
    """As in training: frozen leaves are MaskedNode, stateless transforms EmptyState."""
    adamw = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    )
    labels = {
        "params": {
            "behrt": jax.tree.map(lambda _: "frozen", params["behrt"]),
            "mlm_head": jax.tree.map(lambda _: "head", params["mlm_head"]),
        },
        "lora": jax.tree.map(lambda _: "lora", lora),
    }
    optimizer = optax.multi_transform({"lora": adamw, "head": adamw, "frozen": optax.set_to_zero()}, labels)
    return jax.eval_shape(optimizer.init, {"params": params, "lora": lora})


@pytest.fixture(scope="module")
def trees():
    params, lora = params_shapes(), lora_shapes()
    return tuple(arrays(shapes) for shapes in (params, lora, optimizer_shapes(params, lora)))


@pytest.fixture(scope="module")
def small_trees():
    return arrays({"kernel": floats(2, 2)}), {}, ()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def save(checkpoints, step, trees, loss=None, cursor=CURSOR):
    metrics = None if loss is None else {"loss": loss, "accuracy": 0.5}
    checkpoints.save(step, *trees, cursor=cursor, config=CONFIG, metrics=metrics)


def steps_on_disk(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_everything_comes_back_after_reopening(folder, trees):
    with open_checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.best_step() is None
        save(checkpoints, 3, trees, loss=2.0)
    params, lora, opt_state = trees
    with open_checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == checkpoints.best_step() == 3
        assert checkpoints.read_cursor(3) == CURSOR
        assert checkpoints.read_config(3) == CONFIG
        restored = checkpoints.restore(3, params=params, lora=lora, opt_state=opt_state)
    assert_identical(restored.params, params)
    assert_identical(restored.lora, lora)
    assert_identical(restored.opt_state, opt_state)


def test_a_model_without_adapters_and_an_optimizer_without_arrays(folder, trees):
    stateless = optax.sgd(0.1).init(trees[0])
    assert not jax.tree.leaves(stateless)
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, (trees[0], {}, stateless))
        restored = checkpoints.restore(1, params=trees[0], lora={}, opt_state=stateless)
    assert restored.lora == {}
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(stateless)
    assert_identical(restored.params, trees[0])


def test_the_latest_and_the_best_are_kept(folder, small_trees):
    with open_checkpoints(folder) as checkpoints:
        kept = []
        for step, loss in [(10, 3.0), (20, 2.0), (30, 2.0), (40, 2.5), (50, float("nan")), (60, 1.0)]:
            save(checkpoints, step, small_trees, loss=loss)
            checkpoints.wait()
            kept.append((steps_on_disk(folder), checkpoints.latest_step(), checkpoints.best_step()))
    assert kept == [
        ([10], 10, 10),
        ([20], 20, 20),
        ([20, 30], 30, 20),  # the earlier of equals
        ([20, 40], 40, 20),
        ([20, 50], 50, 20),
        ([60], 60, 60),
    ]


def test_without_keep_best_only_the_latest_is_kept(folder, small_trees):
    with open_checkpoints(folder, keep_best=False) as checkpoints:
        save(checkpoints, 10, small_trees, loss=1.0)
        save(checkpoints, 20, small_trees, loss=2.0)
    assert steps_on_disk(folder) == [20]


def test_a_checkpoint_without_metrics_is_never_the_best_and_goes_with_the_next(folder, small_trees):
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 5, small_trees)
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, None)
        save(checkpoints, 10, small_trees, loss=1.0)
        save(checkpoints, 15, small_trees)
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (15, 10)
    with open_checkpoints(folder) as checkpoints:  # the best is known after a restart too
        assert checkpoints.best_step() == 10
        save(checkpoints, 20, small_trees, loss=1.5)
    assert steps_on_disk(folder) == [10, 20]


def test_what_a_process_left_that_died_in_a_save_is_removed(folder, small_trees):
    """It had written the new checkpoint and not yet removed the one before."""
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 10, small_trees, loss=1.0)
        save(checkpoints, 20, small_trees, loss=3.0)
    shutil.copytree(folder / "20", folder / "40")
    shutil.copytree(folder / "20", folder / "50")
    (folder / "60.orbax-checkpoint-tmp").mkdir()
    with open_checkpoints(folder) as checkpoints:
        checkpoints.remove_older()
    assert sorted(path.name for path in folder.iterdir()) == ["10", "50"]


def test_a_full_disk_is_told_before_a_save_and_leaves_what_is_there(folder, small_trees, monkeypatch):
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 10, small_trees, loss=1.0)
        checkpoints.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 2**20))
        with pytest.raises(OSError, match="a checkpoint takes up to"):
            save(checkpoints, 20, small_trees, loss=0.5)
        assert checkpoints.latest_step() == 10
    assert steps_on_disk(folder) == [10]


@pytest.mark.parametrize("name", ["a/../b", "a[b]*?", "back\\slash", "line\n{c} $d %20:~#"])
def test_any_path_will_do(tmp_path, small_trees, name):
    (tmp_path / "a").mkdir()
    with open_checkpoints(tmp_path / name / "checkpoints") as checkpoints:
        save(checkpoints, 10, small_trees, loss=1.0)
    with open_checkpoints(tmp_path / name / "checkpoints") as checkpoints:
        assert checkpoints.best_step() == 10
        assert checkpoints.restore(10, params=small_trees[0]).params["kernel"].shape == (2, 2)
    assert steps_on_disk(tmp_path / name / "checkpoints") == [10]


def test_saving_a_step_again(folder, small_trees):
    changed = {"step": 3, "note": "second"}
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 3, small_trees, loss=1.0)
        save(checkpoints, 3, small_trees, cursor=changed)
        save(checkpoints, 3, small_trees, loss=9.0, cursor=changed)
        assert checkpoints.read_cursor(3) == CURSOR
        assert checkpoints.best_step() == 3
        save(checkpoints, 4, small_trees)
        save(checkpoints, 4, small_trees, loss=0.5, cursor=changed)  # now with metrics: replaced
        assert checkpoints.read_cursor(4) == changed
        assert checkpoints.best_step() == 4
    assert steps_on_disk(folder) == [4]


def test_arrays_may_be_donated_as_soon_as_save_returns(folder):
    devices = NamedSharding(
        jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
    )
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for step, sharding in enumerate([one, devices]):
        make = jax.jit(
            lambda: {f"w{i}": jnp.full((256, 1024), i, jnp.float32) for i in range(6)}, out_shardings=sharding
        )
        spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: -1 - leaf * 0, tree), donate_argnums=0)
        params = make()
        with open_checkpoints(folder) as checkpoints:
            save(checkpoints, step, (params, {}, ()))
            for _ in range(5):
                params = spoil(params)
            jax.block_until_ready(params)
            restored = checkpoints.restore(step, params=params)
        assert_identical(restored.params, make())


def test_the_cursor_may_change_as_soon_as_save_returns(folder, trees):
    cursor = {"totals": {"loss": 1.0}}
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, trees, cursor=cursor)
        cursor["totals"]["loss"] = 2.0
        assert checkpoints.read_cursor(1) == {"totals": {"loss": 1.0}}


def test_a_cursor_unfit_for_json_fails_at_once(folder, trees):
    with open_checkpoints(folder) as checkpoints:
        with pytest.raises(TypeError, match="JSON"):
            save(checkpoints, 1, trees, cursor={"step": jnp.ones(())})
        save(checkpoints, 1, trees)
        assert checkpoints.latest_step() == 1


def test_restore_onto_another_mesh(folder, trees):
    params, lora, opt_state = jax.device_put(trees, jax.devices()[0])
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, (params, lora, opt_state))
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def spread(leaf):
        spec = PartitionSpec("fsdp") if leaf.ndim > 1 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    template = jax.tree.map(spread, opt_state)
    with open_checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(1, params=jax.tree.map(spread, params), opt_state=template)
    assert_identical(restored.params, params)
    assert_identical(restored.opt_state, opt_state)
    kernel = restored.params["mlm_head"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.shape == (4, 16)


def test_a_template_without_sharding_goes_to_the_first_device(folder, trees):
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trees[0])
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, jax.device_put(trees, jax.devices()[3]))
        restored = checkpoints.restore(1, params=template)
    assert_identical(restored.params, trees[0])
    assert restored.params["mlm_head"]["kernel"].devices() == {jax.devices()[0]}


def test_items_restore_alone(folder, trees):
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, trees)
    # With the other trees gone, reading any of their bytes would fail.
    shutil.rmtree(folder / "1" / "opt_state")
    shutil.rmtree(folder / "1" / "lora")
    with open_checkpoints(folder) as checkpoints:
        assert checkpoints.read_cursor(1) == CURSOR
        restored = checkpoints.restore(1, params=trees[0])
    assert_identical(restored.params, trees[0])
    assert restored.opt_state is None and restored.lora is None


def empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


def without_contents(step_folder):
    shutil.rmtree(step_folder / "contents")


def cut_cursor(step_folder):
    (step_folder / "cursor" / "metadata").write_text('{"step": ')


def without_opt_state(step_folder):
    shutil.rmtree(step_folder / "opt_state")


def largest_file(step_folder):
    return max((step_folder / "params").rglob("d/*"), key=lambda path: path.stat().st_size)


def without_array_data(step_folder):
    largest_file(step_folder).unlink()


def cut_array_data(step_folder):
    path = largest_file(step_folder)
    path.write_bytes(path.read_bytes()[:5000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flipped_array_data(step_folder):
    flip(largest_file(step_folder))


def flipped_cursor(step_folder):
    path = step_folder / "cursor" / "metadata"
    path.write_text(path.read_text().replace("1.5", "1.6"))


def flipped_digests(step_folder):
    flip(step_folder / "files.json")


def read_all(checkpoints, step, trees):
    checkpoints.read_cursor(step)
    checkpoints.restore(step, params=trees[0], lora=trees[1], opt_state=trees[2])


TEARS = [empty, without_contents, cut_cursor, without_opt_state, without_array_data, cut_array_data]


@pytest.mark.parametrize(
    ("tear", "version"),
    [
        *((tear, version) for tear in TEARS for version in ("this", "older")),
        *((tear, "this") for tear in (flipped_array_data, flipped_cursor, flipped_digests)),
    ],
)
def test_a_torn_checkpoint_does_not_count(folder, trees, tear, version, caplog):
    # Arrays large enough to get a data file of their own.
    wide = arrays({"kernel": floats(64, 64)})
    trees = (wide, {}, arrays({"mu": floats(64, 64)}))
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 40, trees, loss=1.0)
    if version == "older":
        (folder / "40" / "files.json").unlink()
    shutil.copytree(folder / "40", folder / "20")  # the whole one before it
    tear(folder / "40")
    before = sorted(folder.rglob("*"))
    with open_checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 20
        assert checkpoints.best_step() == 20
        assert [record.message for record in caplog.records if "40 is damaged" in record.message]
        with pytest.raises(InputError, match="40 is damaged"):
            read_all(checkpoints, 40, trees)
        with pytest.raises(InputError, match="40 is damaged: bring it back"):
            checkpoints.refuse_damaged()
        assert sorted(folder.rglob("*")) == before  # reading changes nothing
        save(checkpoints, 30, trees, loss=3.0)
    assert steps_on_disk(folder) == [20, 30]
    with open_checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 30


def test_a_torn_step_can_be_saved_anew(folder, trees):
    (folder / "40").mkdir(parents=True)
    (folder / "50.orbax-checkpoint-tmp" / "params").mkdir(parents=True)  # a killed run leaves these
    with open_checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() is None
        save(checkpoints, 40, trees, loss=1.0)
    assert steps_on_disk(folder) == [40]
    with open_checkpoints(folder) as checkpoints:
        assert_identical(checkpoints.restore(40, params=trees[0]).params, trees[0])


def test_another_model_is_refused_by_name(folder, trees):
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, trees)
        cases = [
            (
                {"params": params_shapes(depth=1)},
                r"params/behrt/encoder/layer_1/query/bias is float32\[8\] there and absent",
            ),
            (
                {"params": params_shapes(depth=3)},
                r"params/behrt/encoder/layer_2/query/bias is absent there and float32\[8\]",
            ),
            (
                {"params": params_shapes(width=4)},
                r"layer_0/query/bias is float32\[8\] there and float32\[4\] here",
            ),
            (
                {"lora": lora_shapes(rank=4)},
                r"lora/.*/query/a is float32\[8, 2\] there and float32\[8, 4\] here",
            ),
            ({"lora": {}}, r"lora/.*/query/a is float32\[8, 2\] there and absent here"),
            (
                {"opt_state": jax.eval_shape(optax.adam(1e-3).init, trees[0])},
                r"opt_state/0/count is absent there",
            ),
            (
                {
                    "params": jax.tree.map(
                        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), trees[0]
                    )
                },
                r"and bfloat16\[8\] here",
            ),
        ]
        for templates, message in cases:
            with pytest.raises(InputError, match=message):
                checkpoints.restore(1, **templates)
        with pytest.raises(InputError, match=r"no checkpoint of step 7; it has \[1\]"):
            checkpoints.read_cursor(7)


def test_orbax_is_quiet_and_others_are_not(folder, trees):
    absl = logging.getLogger("absl")
    handler = BufferingHandler(capacity=10_000)
    records = handler.buffer
    level = absl.level
    absl.setLevel(logging.INFO)
    absl.addHandler(handler)
    try:
        with open_checkpoints(folder) as checkpoints:
            save(checkpoints, 1, trees)
            absl.info("another library")
        assert [record.getMessage() for record in records] == ["another library"]
        ocp.CheckpointManager(folder).close()
        assert len(records) > 1  # the quiet ends with the context
    finally:
        absl.removeHandler(handler)
        absl.setLevel(level)


def test_a_failed_write_is_raised_at_once(folder, trees):
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, trees)
        checkpoints.wait()
        threads = set(threading.enumerate())
        folder.rename(folder.with_name("gone"))
        folder.write_text("a file in the way")
        with pytest.raises(NotADirectoryError):
            save(checkpoints, 2, trees)
            checkpoints.wait()
        # None is left waiting for the folder; asyncio keeps idle workers.
        started = set(threading.enumerate()) - threads
        assert not [thread for thread in started if not thread.name.startswith("asyncio")]


def test_nothing_is_pickled(folder, trees):
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, trees, loss=1.0)
    assert json.loads((folder / "1" / "contents" / "metadata").read_text())["metrics"]["loss"] == 1.0
    assert not [path for path in folder.rglob("*") if path.is_file() and path.read_bytes()[:2] == b"\x80\x04"]

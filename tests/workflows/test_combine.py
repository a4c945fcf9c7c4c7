"""Folders of adapters, combined into the folder of one."""

import json
from dataclasses import replace

import chex
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from behrt_jax.adapters import bank, lora
from behrt_jax.adapters.files import AdapterConfig, load_adapter, read_config, save_adapter
from behrt_jax.adapters.lora import label, path_names
from behrt_jax.cli import main
from behrt_jax.config.commands import CombineConfig
from behrt_jax.config.model import LoRAConfig
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import from_stored
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.workflows.combine import combine_adapters
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.run import settings
from tests.models.rows import tiny_model
from tests.workflows.finetune_case import ONE, changed

MODEL = tiny_model()
CODES = (*SPECIAL_TOKENS, *(f"ICD//{number}" for number in range(10)))
VOCABULARY = Vocabulary(CODES, np.arange(len(CODES)), ("",) * len(CODES))
CONFIGS = {
    "a": LoRAConfig(rank=2, targets=("query", "out")),
    "b": LoRAConfig(rank=2, targets=("query", "output"), alpha=3.0),
    "other rank": LoRAConfig(rank=3, targets=("query", "out")),
}


@pytest.fixture(scope="module")
def base():
    model = BEHRTForMLM(MODEL, len(VOCABULARY))
    return jax.device_get(jax.jit(model.init)(jax.random.key(0), example_batch(MODEL))["params"])


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Adapters of pretraining runs, with a trained head."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, config) in enumerate(CONFIGS.items()):
        write(folder / name, base, config, number)
    return folder


def write(folder, base, config, seed, vocabulary=VOCABULARY, groups=("head",)):
    rng = np.random.default_rng(seed)

    def moved(leaf):
        return leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)

    trained = jax.tree_util.tree_map_with_path(
        lambda path, _: label(("params", *path_names(path))) in groups, base
    )
    params = jax.tree.map(lambda leaf, trains: moved(leaf) if trains else leaf, base, trained)
    adapters = jax.tree.map(moved, jax.device_get(lora.init(jax.random.key(seed), base, config)))
    own = AdapterConfig(
        lora=settings(config), model=settings(MODEL), vocabulary_fingerprint=vocabulary.fingerprint()
    )
    beside = {"vocabulary.parquet": vocabulary.to_bytes()}
    save_adapter(folder, params, adapters, trained, own, beside)


def combined(folder, names, output, **options):
    return combine_adapters(
        CombineConfig(adapters=tuple(folder / name for name in names), output=output, **options)
    )


def kernels(folder, base):
    """Merged kernels, and the whole parameters, of an adapter on the base."""
    params, adapters, config = load_adapter(folder, base, VOCABULARY.fingerprint())
    merged = lora.merge(params, adapters, from_stored(LoRAConfig, config.lora))
    return {path: np.asarray(leaf) for path, leaf in lora.leaves_by_path(merged).items()}


def test_the_exact_weighted_sum_by_svd_and_the_mean_of_the_head(folder, base, tmp_path, capsys):
    weights = (0.7, 0.5)
    found = kernels(combined(folder, "ab", tmp_path / "out", weights=weights, rank=4), base)
    one, other = (kernels(folder / name, base) for name in "ab")
    adapted = 0
    for path, leaf in lora.leaves_by_path(base).items():
        if path[0] == "mlm_head":
            expected = (0.7 * one[path] + 0.5 * other[path]) / 1.2
        else:
            expected = leaf + 0.7 * (one[path] - leaf) + 0.5 * (other[path] - leaf)
            adapted += np.abs(expected - leaf).max() > 0.01
        np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-5)
    assert adapted == 6  # query, out and output of two layers
    assert "2 adapters combined by svd, 6 layers of rank 4 or less" in capsys.readouterr().out
    config = read_config(tmp_path / "out")
    assert config.base_fingerprint == read_config(folder / "a").base_fingerprint
    assert (tmp_path / "out" / "vocabulary.parquet").read_bytes() == VOCABULARY.to_bytes()


def test_the_nearest_adapter_of_a_smaller_rank_is_further_from_the_sum(folder, base, tmp_path):
    exact = kernels(combined(folder, "ab", tmp_path / "exact", rank=4), base)
    near = kernels(combined(folder, "ab", tmp_path / "near", rank=1), base)
    path = ("behrt", "encoder", "layer_0", "attention", "query", "kernel")
    u, s, v = np.linalg.svd(exact[path] - lora.leaves_by_path(base)[path])
    delta = near[path] - lora.leaves_by_path(base)[path]
    np.testing.assert_allclose(delta, s[0] * np.outer(u[:, 0], v[0]), atol=1e-4)
    assert s[1] > 0.05


def test_linear_needs_one_rank_and_keeps_it(folder, base, tmp_path):
    found = combined(folder, "ab", tmp_path / "out", method="linear", weights=(1.0, 0.5))
    config = from_stored(LoRAConfig, read_config(found).lora)
    assert config.rank == 2 and not config.rank_pattern
    out = ("behrt", "encoder", "layer_0", "attention", "out", "kernel")  # which one of them adapts
    np.testing.assert_allclose(
        kernels(found, base)[out], kernels(folder / "a", base)[out], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match=r"--method linear: the adapters of \S+out have ranks \[2, 3\]"):
        combined(folder, ("a", "other rank"), tmp_path / "x", method="linear")


def test_what_does_not_go_together_is_refused_and_nothing_is_written(folder, base, tmp_path):
    elsewhere = jax.tree.map(lambda leaf: leaf + 1.0, base)
    write(folder / "other base", elsewhere, CONFIGS["a"], 0)
    other = replace(VOCABULARY, codes=(*VOCABULARY.codes[:-1], "ICD//other"))
    write(folder / "other vocabulary", base, CONFIGS["a"], 0, other)
    write(folder / "embeddings too", base, CONFIGS["a"], 0, groups=("head", "embedding"))
    wrong = [
        (("a", "other base"), {}, "are adapters of different bases"),
        (("a", "other vocabulary"), {}, "are adapters of different vocabularies"),
        (("a", "embeddings too"), {}, "have not trained the same parameters"),
        (("a", "nothing"), {}, "nothing.adapter_config.json is missing"),
        (("a", "b"), {"weights": (1.0,)}, "--weights has 1 numbers for 2 adapters"),
        (("a", "b"), {"weights": (1.0, 0.0)}, "give finite numbers other than 0"),
        (("a", "b"), {"weights": (1.0, -1.0)}, "--weights add up to 0"),
        (("a", "b"), {"method": "linear", "rank": 2}, "--rank is of --method svd"),
        (("a", "b"), {"rank": 0}, "--rank is 0"),
        ((), {}, "--adapters and --output are needed"),
    ]
    for names, options, message in wrong:
        with pytest.raises(InputError, match=message):
            combined(folder, names, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="--output"):
        combined(folder, ("a", "b"), folder / "a")


@pytest.mark.slow
def test_runs_of_one_task_are_combined_and_predict(case, tmp_path, capsys):
    runs = [case.run()]
    for seed in (1, 2):
        config = replace(changed(case.config(), "train", seed=seed), output=tmp_path / str(seed))
        runs.append(finetune(config, ONE).folder)
    output = tmp_path / "combined"
    arguments = ["combine-adapters", *map(str, runs), "--weights", "0.5", "0.25", "0.25", "--rank", "6"]
    assert main([*arguments, "--output", str(output)]) == 0
    capsys.readouterr()
    table = case.predicted(tmp_path / "p.parquet", model=output)
    probability = table["predicted_boolean_probability"].to_numpy()
    assert table["predicted_boolean_value"].to_pylist() == (probability >= 0.5).tolist()

    base = {"behrt": read_encoder(open_pretrained(case.base), make_mesh(ONE)).params}
    fingerprint = open_pretrained(case.base).vocabulary.fingerprint()
    head = {"dense": {"kernel": np.zeros((16, 1), np.float32), "bias": np.zeros(1, np.float32)}}
    merged = []
    for folder in (*(run / "adapter" for run in runs), output):
        params, adapters, config = load_adapter(folder, {**base, "task_head": head}, fingerprint)
        merged.append(jax.device_get(lora.merge(params, adapters, from_stored(LoRAConfig, config.lora))))
    expected = jax.tree.map(lambda x, y, z: 0.5 * x + 0.25 * y + 0.25 * z, *merged[:3])
    chex.assert_trees_all_close(merged[3], expected, rtol=1e-4, atol=1e-5)

    record = json.loads((output / "task.json").read_text())
    parts = json.loads((runs[0] / "task.json").read_text())
    assert record["calibration"] == {"temperature": 1.0, "threshold": 0.5, "loss": None}
    assert record["parameters"]["total"] == parts["parameters"]["total"] + 2 * (
        sum(np.prod(shape) for key, shape in read_config(runs[0] / "adapter").tensors.items()
            if key.startswith("lora/"))
    )  # fmt: skip
    assert len(bank.load([output, runs[0] / "adapter"], base, fingerprint)) == 2

    pq.write_table(table, tmp_path / "again.parquet")
    other = finetune(replace(case.config("regression"), output=tmp_path / "other"), ONE).folder
    with pytest.raises(InputError, match="are of different tasks"):
        combine_adapters(CombineConfig(adapters=(runs[0], other), output=tmp_path / "x"))

"""The benchmarks of training: what is compared with what, figures from seconds, and real contests."""

import importlib.util
import json
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from timeit import timeit
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.presets import PRETRAIN
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.state import assemble_pretraining
from experiments.benchmarks import ablation as benchmark_ablation
from experiments.benchmarks import ours as benchmark_ours
from experiments.benchmarks import train as benchmark_train
from experiments.benchmarks.ablation import ABLATIONS, LORA_ONLY, AblationBenchmark
from experiments.benchmarks.operations import matrix_flops
from experiments.benchmarks.train import ALL_LINEARS, TrainBenchmark, as_table, figures, tasks_of
from tests.models.rows import random_batch, tiny_model
from tests.workflows.small_run import SMALL_RUN, changed

CONFIGURATIONS = {"tiny": replace(SMALL_RUN, model=tiny_model())}
TINY = TrainBenchmark(sizes=("tiny",), regimes=("lora",), patients=24, rank=2, vocabulary_size=200, rounds=2)


class Fake:
    """A contender that has taken its turns."""

    def __init__(self, name, seconds, patients, tokens, flops=None):
        self.name, self.seconds, self.peak_bytes = name, seconds, 100 * patients
        self.facts = {
            "patients_per_step": patients, "patients_in_flight": patients, "tokens_per_step": tokens,
            "flops": flops, "row_length": 24, "compile_seconds": 1.0, "micro_batches": 1, "fill": 0.5,
        }  # fmt: skip


def test_padded_rows_have_the_shapes_of_pytorch_and_without_it_ours_run_alone():
    config = replace(
        TINY, torch_patients=(8, 16), baselines=("eager-float32", "compiled-bfloat16"), torch_lora=("lora",)
    )
    tasks = tasks_of(config, CONFIGURATIONS["tiny"], "tiny", "lora", with_torch=True)
    assert list(tasks) == [
        "ours packed", "ours padded", "torch lora eager float32 8", "torch lora eager float32 16",
        "torch lora compiled bfloat16 8", "torch lora compiled bfloat16 16",
    ]  # fmt: skip
    assert tasks["ours padded"]["patients"] == tasks["torch lora eager float32 8"]["patients"] == 8
    assert tasks["ours packed"]["patients"] == 24
    assert tasks["torch lora compiled bfloat16 8"]["compiled"]
    assert all(json.loads(json.dumps(task)) for task in tasks.values())
    alone = tasks_of(config, CONFIGURATIONS["tiny"], "tiny", "lora", with_torch=False)
    assert list(alone) == ["ours packed", "ours padded"]


def test_options_of_the_model_are_those_of_the_configuration_where_not_given():
    def models(**options):
        tasks = tasks_of(replace(TINY, **options), CONFIGURATIONS["tiny"], "tiny", "lora", with_torch=True)
        assert all(task["model"] == tasks["ours packed"]["model"] for task in tasks.values())
        return tasks["ours packed"]["model"]

    usual = asdict(CONFIGURATIONS["tiny"].model)
    assert models() == usual
    changes = {"attention": "dense", "attention_dropout": 0.0, "rematerialise": True, "scan_layers": True}
    assert models(**changes, precision="bfloat16") == {**usual, **changes, "compute_dtype": "bfloat16"}


def test_ratios_are_of_patients_a_second_round_by_round():
    ours = Fake("ours packed", [1.0, 2.0, 1.0], 100, 1500, flops=5e9)
    theirs = Fake("torch eager float32 10", [2.0, 1.0, 2.0], 10, 150)
    result = figures("tiny", "lora", ours, [ours, theirs], ceiling=1e10)
    # By round: 100 / 1 against 10 / 2, 100 / 2 against 10 / 1, 100 / 1 against 10 / 2.
    assert result["ratios"]["torch eager float32 10"] == (12.5, 20.0, 20.0)
    assert result["step_seconds"] == 1.0 and result["tokens_per_second"] == 1500
    assert result["mfu"] == 0.5 and result["peak_bytes_per_patient"] == 100
    other = figures("tiny", "lora", theirs, [ours, theirs], ceiling=1e10)
    assert other["mfu"] is None and other["tokens_per_second"] == 75
    assert "ours packed / torch eager float32 10: 20.00 x" in as_table([result, other])


def test_wrong_options_are_refused_before_anything_starts():
    with pytest.raises(InputError, match="--sizes: 'huge' is unknown, choose from tiny"):
        benchmark_train.benchmark_train(replace(TINY, sizes=("huge",)), CONFIGURATIONS)
    with pytest.raises(InputError, match="--layouts: full rows are of other patients"):
        benchmark_train.benchmark_train(replace(TINY, layouts=("packed", "full")), CONFIGURATIONS)
    with pytest.raises(InputError, match="--steps_per_turn is 0"):
        benchmark_train.benchmark_train(replace(TINY, steps_per_turn=0), CONFIGURATIONS)
    with pytest.raises(InputError, match="--size: 'huge' is unknown"):
        benchmark_ablation.benchmark_ablation(AblationBenchmark(size="huge"), CONFIGURATIONS)
    with pytest.raises(InputError, match="--without: 'sleep' is unknown"):
        benchmark_ablation.benchmark_ablation(AblationBenchmark("tiny", without=("sleep",)), CONFIGURATIONS)


@pytest.mark.slow
def test_a_contest_from_end_to_end(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = {"output": tmp_path, "build_together": True, "steps_per_turn": 2}
    report = benchmark_train.benchmark_train(replace(TINY, **options), CONFIGURATIONS)
    said = capsys.readouterr().out
    assert "PyTorch is not installed" in said and "train.png" in said
    packed, padded = report["results"]
    assert report["machine"]["device"] == packed["device"]
    assert packed["fill"] > 0.9 > padded["fill"]
    assert packed["flops"] > 0 and len(packed["all_seconds"]) == 2
    assert json.loads((tmp_path / "train.json").read_text())["results"][0]["contender"] == "ours packed"
    assert (tmp_path / "train.png").stat().st_size > 5000


@contextmanager
def contest_here(tasks, rounds):
    """A contest in this process, with what a contender is told in JSON."""
    contenders = []
    for name, task in tasks.items():
        turn, facts = benchmark_ours.jax_contender(json.loads(json.dumps(task)))
        seconds = [timeit(partial(turn, number), number=1) for number in range(rounds)]
        contenders.append(SimpleNamespace(name=name, facts=facts, seconds=seconds, peak_bytes=1))
    yield contenders


@pytest.mark.slow
def test_each_optimisation_can_be_undone(tmp_path, monkeypatch):
    patients = benchmark_ours.load_patients({"layout": "packed", "patients": 24, **asdict(TINY)})
    monkeypatch.setattr(benchmark_ours, "load_patients", lambda _: patients)
    monkeypatch.setattr(benchmark_ours, "matrix_flops", lambda *_: 1.0)
    monkeypatch.setattr(benchmark_ablation, "contest", contest_here)
    config = AblationBenchmark("tiny", "lora", patients=24, rank=2, vocabulary_size=200, at_once=6, rounds=1)
    one_layer = {"tiny": changed(CONFIGURATIONS["tiny"], "model", layers=1)}
    report = benchmark_ablation.benchmark_ablation(
        replace(config, output=tmp_path / "ablation.json"), one_layer
    )
    assert report["results"].keys() == ABLATIONS.keys() and set(LORA_ONLY) < ABLATIONS.keys()
    written = json.loads((tmp_path / "ablation.json").read_text())["results"]
    assert all(result["step_seconds"] > 0 for result in written.values())


# FLOPs of matrix products, beside counts by hand and the compiler's own.


SIZES = st.integers(1, 9)
X, W = jax.ShapeDtypeStruct((6, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
ONE = 2 * 6 * 5 * 5
"""FLOPs of X @ W."""


@given(SIZES, SIZES, SIZES, SIZES)
def test_batched_products(b, m, k, n):
    left, right = np.zeros((b, m, k), np.float32), np.zeros((n, b, k), np.float32)
    assert matrix_flops(lambda x, y: jnp.einsum("bmk,nbk->nmb", x, y), left, right) == 2 * b * m * k * n


def test_what_is_nested_counts_as_often_as_it_runs():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w), None), x, length=7)[0]

    def chosen(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def looped(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)

    assert matrix_flops(scanned, X, W) == 7 * ONE
    assert matrix_flops(chosen, X, W) == 2 * ONE
    with pytest.raises(ValueError, match="while loop"):
        matrix_flops(looped, X, W)
    assert matrix_flops(lambda x, w: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, 0), X, W) == 0


def test_a_gradient_needs_no_product_for_what_is_not_asked_for():
    def layers(x, w, v):
        return jnp.sin(jnp.sin(x @ w) @ v).sum()

    both, last = jax.grad(layers, argnums=(1, 2)), jax.grad(layers, argnums=2)
    assert matrix_flops(layers, X, W, W) == 2 * ONE
    assert matrix_flops(jax.grad(layers, argnums=(0, 1, 2)), X, W, W) == 6 * ONE
    assert matrix_flops(both, X, W, W) == 5 * ONE
    assert matrix_flops(last, X, W, W) == 3 * ONE


def test_recomputation_and_rules_of_our_own_count():
    def layers(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    assert matrix_flops(jax.grad(layers), X, W) == 4 * ONE
    # The second product is not needed again, the first is.
    assert matrix_flops(jax.grad(jax.checkpoint(layers)), X, W) >= 5 * ONE

    @jax.custom_vjp
    def ruled(x, w):
        return x @ w

    ruled.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w @ w @ w, None))
    assert matrix_flops(ruled, X, W) == ONE
    assert matrix_flops(jax.grad(lambda x, w: ruled(x, w).sum()), X, W) == 4 * ONE


def step_of(config: PretrainConfig, vocabulary: int):
    """Train step and abstract state."""
    assembly = assemble_pretraining(config, vocabulary, make_mesh(jax.devices()[:1]), total_steps=10)
    return assembly.step(), assembly.state_shapes


def test_a_train_step_beside_the_compilers_count():
    # On a CPU, without loops, the compiler counts every product, and elementwise work too.
    model = replace(PRETRAIN["small"].model, layers=1)
    step, state = step_of(PretrainConfig(model=model), 1000)
    batch = random_batch(0, rows=16, length=50)
    counted = jax.jit(step).lower(state, batch).compile().cost_analysis()
    assert 1.0 < counted["flops"] / matrix_flops(step, state, batch) < 1.08


def test_train_steps_beside_each_other():
    def flops(lora: LoRAConfig | None = None, **changes) -> float:
        model = replace(PRETRAIN["small"].model, **changes)
        freezing = FreezingConfig("lora" if lora else "full")
        step, state = step_of(PretrainConfig(model=model, lora=lora, freezing=freezing), 1000)
        return matrix_flops(step, state, random_batch(0, rows=16, length=50))

    full, adapters = flops(), LoRAConfig(rank=16, targets=ALL_LINEARS)
    merged = flops(replace(adapters, product="merged"))
    activations = flops(replace(adapters, product="activations"))
    # Of the three products of a frozen layer two are left: with all layers frozen, two thirds would be.
    assert 2 / 3 * full < merged < activations < full
    assert flops(scan_layers=True) == full
    assert flops(rematerialise=True) > 1.1 * full

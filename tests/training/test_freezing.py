"""Labels, regimes and the parameter table."""

from dataclasses import replace

import jax
import pytest
from jax.tree_util import tree_leaves_with_path

from behrt_jax.adapters.lora import GROUPS, label, labels, path_names
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.presets import BASE, LARGE, LONG, MEDIUM, PAPER, SMALL, XL
from behrt_jax.training.freezing import (
    FROZEN,
    REGIMES,
    adapted_kernels_frozen,
    count_parameters,
    optimizer_labels,
    regime,
    report_rows,
    trainable,
)
from behrt_jax.training.state import set_up
from tests.models.rows import MODERN

ATTENTION = ("query", "key", "value", "out")
OUT = LoRAConfig(16, targets=("out",))


def report(model, adapters, freezing):
    setup = set_up(PretrainConfig(model=model, lora=adapters, freezing=freezing), vocabulary_size=1000)
    return count_parameters(setup.shapes, setup.mask)


@pytest.mark.parametrize(
    ("model", "adapters", "freezing", "total", "trainable", "percent"),
    [
        (LARGE, None, FreezingConfig("full"), 20_268_008, 20_268_008, 100.0),
        (LARGE, OUT, FreezingConfig("lora"), 20_366_312, 1_450_984, 7.1),
        (LARGE, OUT, FreezingConfig("lora_pretrained"), 20_366_312, 874_984, 4.3),
        (LARGE, OUT, FreezingConfig("all_but_adapted"), 20_366_312, 18_790_376, 92.3),
        # What pissa begins with is kept, and never trains.
        (LARGE, replace(OUT, init="pissa"), FreezingConfig("full"), 20_464_616, 20_366_312, 99.5),
        (LARGE, replace(OUT, init="pissa"), FreezingConfig("lora"), 20_464_616, 1_450_984, 7.1),
        (LARGE, LoRAConfig(16, targets=ATTENTION), FreezingConfig("lora"), 20_661_224, 1_745_896, 8.5),
        (SMALL, LoRAConfig(8, targets=ATTENTION), FreezingConfig("lora"), 668_776, 271_976, 40.7),
        (SMALL, None, FreezingConfig("full"), 652_392, 652_392, 100.0),
        (MEDIUM, None, FreezingConfig("full"), 3_725_288, 3_725_288, 100.0),
        (BASE, None, FreezingConfig("full"), 87_989_992, 87_989_992, 100.0),
        (LONG, None, FreezingConfig("full"), 5_219_816, 5_219_816, 100.0),
        (XL, None, FreezingConfig("full"), 307_009_512, 307_009_512, 100.0),
        (XL, LoRAConfig(16), FreezingConfig("lora"), 310_155_240, 7_843_816, 2.5),
        (replace(XL, scan_layers=False), LoRAConfig(16), FreezingConfig("lora"), 310_155_240, 7_843_816, 2.5),
    ],
)  # fmt: skip
def test_parameter_table(model, adapters, freezing, total, trainable, percent):
    counted = report(model, adapters, freezing)
    assert (counted["total"], counted["trainable"]) == (total, trainable)
    assert round(counted["trainable_percent"], 1) == percent
    assert counted["frozen"] == total - trainable
    assert sum(counted[group]["total"] for group in GROUPS) == total
    assert sum(counted[group]["trainable"] for group in GROUPS) == trainable


def test_groups_of_the_small_model():
    counted = report(SMALL, LoRAConfig(8), FreezingConfig("lora"))
    assert counted["embedding"] == {"total": 109_824, "trainable": 109_824, "trainable_percent": 100.0}
    assert counted["head"] == {"total": 145_768, "trainable": 145_768, "trainable_percent": 100.0}
    assert counted["lora"]["trainable"] == counted["lora"]["total"] == 16_384
    assert counted["base"]["trainable"] == 0
    assert round(counted["lora_percent"], 2) == round(100 * 16_384 / 668_776, 2)


def test_printed_table_ends_with_the_sum():
    rows = report_rows(report(LARGE, OUT, FreezingConfig("lora")))
    assert rows[0] == ("lora", "98,304", "98,304", "100.0 %")
    assert rows[-1] == ("all", "20,366,312", "1,450,984", "7.1 %")


@pytest.mark.parametrize(
    "model", [SMALL, PAPER, replace(SMALL, **MODERN)], ids=["small", "paper", "of today"]
)
def test_every_leaf_has_one_label_that_fits_its_place(model):
    setup = set_up(PretrainConfig(model=model, lora=LoRAConfig(8)), vocabulary_size=50)
    for path, group in tree_leaves_with_path(labels(setup.shapes)):
        names = path_names(path)
        expected = (
            "lora" if names[0] == "lora"
            else "embedding" if names[2] == "embeddings"
            else "head" if names[1] == "mlm_head"
            else "base"
        )  # fmt: skip
        assert group == expected, names


@pytest.mark.parametrize(
    "path",
    [("params", "decoder", "kernel"), ("params", "encoder", "task_head", "kernel"), ("batch_stats", "x")],
)
def test_a_leaf_outside_the_groups_or_in_two_is_an_error(path):
    with pytest.raises(ValueError, match="one parameter group"):
        label(path)


@pytest.mark.parametrize("name", REGIMES)
def test_optimizer_labels_follow_the_mask(name):
    setup = set_up(
        PretrainConfig(model=SMALL, lora=LoRAConfig(2, targets=("out",)), freezing=FreezingConfig(name)), 50
    )
    wanted = optimizer_labels(setup.shapes, setup.mask)
    for (path, group), chosen, trains in zip(
        tree_leaves_with_path(labels(setup.shapes)),
        jax.tree.leaves(wanted),
        jax.tree.leaves(setup.mask),
        strict=True,
    ):
        names = path_names(path)
        adapted = name == "all_but_adapted" and names[-2] == "out"
        assert trains == (group in REGIMES[name].groups and not (adapted and names[0] == "params"))
        assert chosen == (group if trains else FROZEN)
    assert adapted_kernels_frozen(setup.shapes, setup.mask) == (name != "full")


def test_an_explicit_set_of_groups_takes_the_place_of_the_regime():
    assert regime(FreezingConfig("full", groups=("head",))).groups == {"head"}


def test_a_regime_that_trains_nothing_is_an_error():
    setup = set_up(PretrainConfig(model=SMALL), 50)
    with pytest.raises(InputError, match="nothing would train"):
        trainable(setup.shapes, REGIMES["lora_only"])

"""What is written here PEFT loads onto the PyTorch reference, and what PEFT trained there is read."""

import json
import logging
from dataclasses import asdict

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import AdapterConfig, load_adapter, save_adapter
from behrt_jax.adapters.lora import label, path_names
from behrt_jax.config.commands import ExportConfig
from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig, TrainConfig
from behrt_jax.errors import InputError
from behrt_jax.weights.torch_behrt import from_state_dict
from behrt_jax.workflows.export import export
from behrt_jax.workflows.loaded import load
from behrt_jax.workflows.pretrain import pretrain
from experiments.benchmarks.torch_model import TorchBEHRTForMLM, load_params, separate_projections
from tests.experiments.reference_cases import uniform
from tests.models.rows import VOCABULARY, tiny_model
from tests.weights.torch_case import MODEL, assert_agree, drawn_params, inputs, ours, reference, theirs

pytestmark = pytest.mark.slow

ALL = LoRAConfig(
    rank=3, alpha=5.0, targets=("query", "key", "value", "out", "intermediate", "output", "dense")
)
SOME = LoRAConfig(rank=2, targets=("behrt/encoder/layer_1/*", "projection"))
STABLE = LoRAConfig(rank=4, alpha=3.0, rank_stabilised=True, targets=("intermediate", "output"))
PATTERNS = LoRAConfig(
    rank=2,
    alpha=3.0,
    targets=("query", "intermediate", "output"),
    exclude=("behrt/encoder/layer_1/attention/query",),
    rank_pattern=("output=4",),
    alpha_pattern=("behrt/encoder/layer_0/*=7",),
)


@pytest.fixture(scope="module")
def peft():
    """PEFT, imported where a test runs: it takes seconds, and every process collects this file."""
    return pytest.importorskip("peft")


def drawn_lora(params, config):
    """Adapters that are not zero."""
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (0.4 * uniform(jax.tree_util.keystr(path), leaf.shape)).astype(np.float32), shapes
    )


def marks(params, groups):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: label(("params", *path_names(path))) in groups, params
    )


def on_base(params):
    """The PyTorch reference with the parameters and a linear layer for each of ours."""
    module = reference()
    load_params(module, params)
    separate_projections(module)
    return module


def mixed(params, trained, others):
    """`params` where they are trained, else `others`."""
    return jax.tree.map(lambda mark, one, other: one if mark else other, trained, params, others)


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (ALL, ("embedding",)),
        (SOME, ("head",)),
        (STABLE, ("embedding", "head")),
        (PATTERNS, ("head",)),
        (SOME, ("embedding", "head", "base")),
        (None, ("head",)),
        (None, ("embedding", "head", "base")),
    ],
)
def test_peft_loads_what_is_written_and_computes_the_same(peft, tmp_path, config, groups):
    params = drawn_params()
    adapters = {} if config is None else drawn_lora(params, config)
    trained = marks(params, groups)
    settings = AdapterConfig(lora=config and asdict(config), vocabulary_fingerprint="v")
    save_adapter(tmp_path / "adapter", params, adapters, trained, settings)
    module = on_base(mixed(drawn_params("other"), trained, params))
    before = theirs(module)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path / "adapter")
    expected = ours(params, adapters, config)
    assert np.abs(before - expected).max() > 0.1
    assert_agree(theirs(loaded), expected)
    if config is not None:
        assert_agree(theirs(loaded.merge_and_unload()), expected)


def test_the_configuration_has_every_value_resolved(tmp_path):
    params = drawn_params()
    config = LoRAConfig(rank=2, targets=("intermediate", "behrt/encoder/layer_0/output"))
    settings = AdapterConfig(lora=asdict(config), vocabulary_fingerprint="v", base="runs/base")
    folder = tmp_path / "adapter"
    save_adapter(folder, params, drawn_lora(params, config), marks(params, ("embedding", "head")), settings)
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "runs/base",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "target_modules": ["behrt.encoder.layers.0.linear2", "linear1"],
        "modules_to_save": ["behrt.embedding_projection", "behrt.embeddings", "mlm_head"],
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def test_an_export_with_its_adapter_beside_is_the_run_in_peft(peft, tmp_path):
    config = PretrainConfig(
        model=tiny_model(dropout=0.0),
        lora=LoRAConfig(rank=2, targets=("query", "intermediate", "output")),
        freezing=FreezingConfig("lora"),
        data=DataConfig(source="uniform", subjects=100, vocabulary_size=VOCABULARY),
        optimizer=OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_fraction=0.0),
        train=TrainConfig(max_steps=3, batch_size=32),
        output=tmp_path / "run",
    )
    devices, folder = jax.devices()[:1], tmp_path / "exported"
    pretrain(config, devices)
    export(ExportConfig(run=config.output, output=folder, adapters="beside", format="torch"), devices)
    module = TorchBEHRTForMLM(config.model, VOCABULARY)
    module.load_state_dict(load_file(folder / "model_torch.safetensors"))
    separate_projections(module)
    before = theirs(module)
    model = peft.PeftModel.from_pretrained(module, folder / "adapter")
    expected = ours(load(config.output, devices=devices).params, model=config.model)
    assert np.abs(before - expected).max() > 0.01
    assert_agree(theirs(model), expected)
    model.save_pretrained(folder / "saved")
    back = load(folder / "saved", base=folder, devices=devices)
    assert_agree(ours(back.params, model=config.model), expected)


SETTINGS = {
    "plain": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["linear1", "linear2"],
        "modules_to_save": ["mlm_head"],
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "out_proj", "linear1", "mlm_head.3"],
        "rank_pattern": {r"layers\.1\.linear1": 5},
        "alpha_pattern": {"linear1": 7, "mlm_head.3": 1.5},
        "use_rslora": True,
    },
}


def train(model):
    """A few steps that move all that trains."""
    torch.manual_seed(5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        logits = model(*inputs())
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs()[0].flatten()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_peft_trained_is_read(peft, tmp_path, caplog, name):
    params = drawn_params()
    torch.manual_seed(1)
    model = train(peft.get_peft_model(on_base(params), peft.LoraConfig(**SETTINGS[name])))
    model.save_pretrained(tmp_path / "adapter")
    assert np.abs(theirs(model) - ours(params)).max() > 0.05
    with caplog.at_level(logging.WARNING):
        found, adapters, config = load_adapter(tmp_path / "adapter", params, "any vocabulary")
    assert "was saved by PEFT" in caplog.text
    assert config.lora["rank"] == SETTINGS[name]["r"] and config.lora["alpha"] == SETTINGS[name]["lora_alpha"]
    assert_agree(ours(found, adapters, LoRAConfig(**config.lora)), theirs(model))


def test_a_state_dict_with_adapters_of_peft_is_read_as_a_whole_model(peft):
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["linear1", "linear2", "v_proj"]}
    torch.manual_seed(1)
    model = train(peft.get_peft_model(on_base(drawn_params()), peft.LoraConfig(**config)))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    found = from_state_dict(tensors, heads=MODEL.heads, alpha=5.0)
    assert_agree(ours(found.params, found.lora, found.adapters), theirs(model))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"bias": "all"}])
def test_adapters_of_other_kinds_are_refused(peft, tmp_path, changes):
    config = peft.LoraConfig(r=2, target_modules=["linear1"], **changes)
    peft.get_peft_model(on_base(drawn_params()), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=next(iter(changes))):
        load_adapter(tmp_path / "adapter", drawn_params())

"""The JAX model and the PyTorch reference compute the same from the same weights, in float32."""

import numpy as np
import pytest

pytest.importorskip("torch")

from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from experiments.benchmarks.torch_model import TorchBEHRTForMLM, load_params
from tests.experiments.reference_cases import (
    ALL_LINEARS,
    MODERN,
    SIZES,
    TOLERANCE,
    VOCABULARY,
    is_key_bias,
    ours,
    weights,
)
from tests.experiments.torch_results import torch_results
from tests.models.rows import tiny_model

pytestmark = pytest.mark.slow

SMALL = SIZES["small"]


def relative(first, second):
    """Distance of two arrays over the size of the second, in the 2-norm."""
    return np.linalg.norm(np.subtract(first, second)) / np.linalg.norm(second)


def assert_agree(own, reference, rotary=False):
    """Logits, loss and every gradient that the reference has; `rotary` positions give a key's bias one."""
    assert relative(own.logits, reference.logits) < TOLERANCE
    assert relative(own.loss, reference.loss) < TOLERANCE
    typical = np.median([np.linalg.norm(leaf) for leaf in reference.gradients.values()])
    for path, leaf in reference.gradients.items():
        if is_key_bias(path) and not rotary:  # no gradient but rounding
            error = max(np.linalg.norm(leaf), np.linalg.norm(own.gradients[path])) / typical
        else:
            error = relative(own.gradients[path], leaf)
        assert error < TOLERANCE, ("/".join(path), error)


@pytest.mark.parametrize("name", [*SIZES, *MODERN])
def test_logits_loss_and_every_gradient_agree(name):
    config = {**SIZES, **MODERN}[name]
    variables = weights(config)
    own, reference = ours(config, variables), torch_results(config, variables)
    assert np.abs(own.logits - reference.logits).max() < 1e-5
    assert own.gradients.keys() == reference.gradients.keys()
    assert_agree(own, reference, config.position_embedding.startswith("rope"))


def test_frozen_encoder_has_no_gradient_and_the_rest_the_same():
    variables = weights(SMALL)
    reference = torch_results(SMALL, variables, regime="frozen")
    own = ours(SMALL, variables)
    assert own.gradients.keys() - reference.gradients.keys() == {
        path for path in own.gradients if "encoder" in path
    }
    assert_agree(own, reference)


@pytest.mark.parametrize("product", ["activations", "merged"])
@pytest.mark.parametrize("targets", [ALL_LINEARS, ("query", "output")])
def test_adapted_models_agree(product, targets):
    lora = LoRAConfig(rank=4, alpha=6.0, targets=targets)
    variables = weights(SMALL, lora)
    reference = torch_results(SMALL, variables, lora)
    adapters = {path for path in reference.gradients if path[0] == "lora"}
    assert len(adapters) == 2 * len(targets) * SMALL.layers
    for path in adapters:
        assert np.abs(reference.gradients[path]).max() > 0, path
    assert not any("encoder" in path for path in reference.gradients.keys() - adapters)
    own = ours(SMALL, variables, lora, product)
    assert adapters == {path for path in own.gradients if path[0] == "lora"}
    assert_agree(own, reference)


def test_adapters_change_nothing_at_first():
    variables = weights(SMALL)
    bare = torch_results(SMALL, variables, regime="frozen")
    fresh = torch_results(SMALL, variables, LoRAConfig(rank=4, targets=ALL_LINEARS))
    assert relative(fresh.logits, bare.logits) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "regime", "lora", "message"),
    [
        ({"position_of": "visit"}, "full", None, "model.position_of"),
        ({"position_embedding": "sinusoidal"}, "full", None, "model.position_embedding"),
        ({}, "half", None, "regime is 'half'"),
        ({}, "lora", None, "give lora"),
        ({}, "full", LoRAConfig(), "give lora"),
        ({}, "lora", LoRAConfig(targets=("projection",)), "lora.targets"),
        ({}, "lora", LoRAConfig(dropout=0.1), "lora.dropout"),
        ({}, "lora", LoRAConfig(rank=0), "lora.rank"),
        ({"ffn": "swiglu"}, "lora", LoRAConfig(), "adapts layers with"),
    ],
)
def test_what_the_reference_does_not_have_is_an_error(changes, regime, lora, message):
    with pytest.raises(InputError, match=message):
        TorchBEHRTForMLM(tiny_model(**changes), VOCABULARY, regime, lora)


def test_a_tree_of_another_model_does_not_load():
    module = TorchBEHRTForMLM(SMALL, VOCABULARY)
    params = weights(SMALL)["params"]
    with pytest.raises(ValueError, match="layer_1"):
        load_params(TorchBEHRTForMLM(tiny_model(layers=1), VOCABULARY), params)
    params["mlm_head"]["decoder"]["bias"] = np.zeros(VOCABULARY - 1, np.float32)
    with pytest.raises(ValueError, match="mlm_head/decoder/bias"):
        load_params(module, params)

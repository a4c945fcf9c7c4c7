"""A tiny model, its parameters and a batch, for the JAX model and the PyTorch reference alike."""

from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from behrt_jax.adapters.lora import applying
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from experiments.benchmarks.torch_model import TorchBEHRTForMLM
from tests.experiments.reference_cases import uniform
from tests.models.rows import VOCABULARY, random_batch, tiny_model

MODEL = tiny_model(ffn_size=40, heads=4, age_rows=15, visit_rows=6, dropout=0.0)
BATCH = random_batch(0, segments=1)
REAL = BATCH.segment_ids > 0
TOLERANCE = 1e-5
"""Of logits, whose size is about 1."""


def drawn_params(seed: str = "") -> Any:
    """Parameters of the size of trained ones, none of them zero, float32 numpy."""
    network = BEHRTForMLM(MODEL, VOCABULARY)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), example_batch(MODEL))["params"])

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        size = {"'scale'": 0.2, "'bias'": 0.1}.get(name.split("[")[-1].rstrip("]"), 0.4)
        values = size * uniform(name + seed, leaf.shape) + ("'scale'" in name)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def ours(
    params: Any, lora: Any = None, config: LoRAConfig | None = None, model: ModelConfig = MODEL
) -> np.ndarray:
    """Logits of the JAX model at real positions, float32 `[events, VOCABULARY]`."""
    network = BEHRTForMLM(model, VOCABULARY)

    def logits(variables: Any) -> jax.Array:
        with applying(config or LoRAConfig()):
            return network.apply(variables, BATCH)  # pyright: ignore[reportReturnType]

    return np.asarray(jax.jit(logits)({"params": params, "lora": lora or {}}))[REAL]


def inputs() -> tuple[torch.Tensor, ...]:
    """The batch as the reference takes it."""
    codes, visits = (torch.from_numpy(values).long() for values in (BATCH.codes, BATCH.visits))
    return codes, torch.from_numpy(BATCH.ages), visits, torch.from_numpy(~REAL)


def theirs(module: torch.nn.Module) -> np.ndarray:
    """Logits of a module like the reference at real positions."""
    with torch.no_grad():
        return module.eval()(*inputs()).numpy()[REAL]


def reference(seed: int = 0) -> TorchBEHRTForMLM:
    """A fresh one, no bias of which is zero."""
    torch.manual_seed(seed)
    module = TorchBEHRTForMLM(MODEL, VOCABULARY)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def assert_agree(one: np.ndarray, other: np.ndarray) -> None:
    """Within the tolerance, of logits that are not all alike."""
    assert np.std(other, axis=0).mean() > 0.05
    assert np.abs(one - other).max() < TOLERANCE

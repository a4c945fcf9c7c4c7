"""The PyTorch reference on the cases of `reference_cases`."""

from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from behrt_jax.config.model import LoRAConfig, ModelConfig
from experiments.benchmarks.torch_model import Regime, TorchBEHRTForMLM, gradients_as_params, load_params
from experiments.benchmarks.torch_training import IGNORED
from tests.experiments.reference_cases import VOCABULARY, Results, padded_case


def torch_results(
    config: ModelConfig,
    variables: dict[str, Any],
    lora: LoRAConfig | None = None,
    regime: Regime | None = None,
    double: bool = False,
) -> Results:
    """Logits at the masked columns, loss and gradients; float64 if `double`."""
    case = padded_case(config)
    regime = regime or ("full" if lora is None else "lora")
    module = TorchBEHRTForMLM(config, VOCABULARY, regime, lora).to(torch.float64 if double else torch.float32)
    load_params(module, variables["params"], variables.get("lora"))
    labels = np.full(case.shown.shape, IGNORED)
    np.put_along_axis(labels, case.columns, case.targets, axis=1)
    logits = module(
        torch.from_numpy(case.shown).long(),
        torch.from_numpy(case.ages),
        torch.from_numpy(case.visits).long(),
        torch.from_numpy(case.segment_ids == 0),
        torch.from_numpy(case.days).long(),
    )
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten(), ignore_index=IGNORED)
    loss.backward()
    gradients = {collection: gradients_as_params(module, collection) for collection in ("params", "lora")}
    at_columns = np.take_along_axis(logits.detach().numpy(), case.columns[:, :, None], axis=1)
    return Results(at_columns, loss.item(), flatten_dict(gradients))  # pyright: ignore[reportArgumentType]

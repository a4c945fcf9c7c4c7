"""What each optimisation of the train step is worth: the step with one of them undone at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from behrt_jax.config import PretrainConfig

Settings = Callable[[PretrainConfig, str], tuple[PretrainConfig, str]]


@dataclass(frozen=True)
class Ablation:
    """One optimisation undone."""

    what: str
    """What is done instead, for a person."""
    settings: Settings = lambda config, layout: (config, layout)
    """Configuration and layout of rows, changed."""
    patches: Callable[[], dict[str, Any]] = dict
    """Dotted names in this package -> what is put in their place."""
    micro_batches: int | None = None
    donate: bool = True

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The patches in force."""
        patches = [mock.patch(f"behrt_jax.{name}", value) for name, value in self.patches().items()]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _threefry(key: jax.Array, x: jax.Array, rate: float, rows: jax.Array | None = None) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


class _FlaxNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(1e-5, dtype=jnp.float32, name="flax")(x)


def _erfc_gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=False)


def _head_everywhere() -> dict[str, Any]:
    from behrt_jax.models.behrt import BEHRTForMLM

    class Everywhere(BEHRTForMLM):
        """Logits at every column, of which the targets are taken afterwards."""

        def __call__(self, *inputs: Any, **options: Any) -> jax.Array:
            *others, targets = inputs if len(inputs) == 6 else (*inputs, None)
            logits = super().__call__(*others, **options)
            if targets is None:
                return logits
            return jnp.take_along_axis(logits, targets[:, :, None], axis=1)

    return {"training.state.BEHRTForMLM": Everywhere}


def _with_activations(config: PretrainConfig, layout: str) -> tuple[PretrainConfig, str]:
    if config.lora is None:
        return config, layout
    return replace(config, lora=replace(config.lora, product="activations")), layout


def _all_trains(config: PretrainConfig, layout: str) -> tuple[PretrainConfig, str]:
    config, layout = _with_activations(config, layout)
    return replace(config, freezing=replace(config.freezing, regime="full")), layout


def _norms() -> dict[str, Any]:
    return {f"models.{module}.LayerNorm": _FlaxNorm for module in ("encoder", "embeddings", "heads")}


def _gelus() -> dict[str, Any]:
    return {f"models.{module}.gelu": _erfc_gelu for module in ("encoder", "heads")}


def _plain_merging() -> dict[str, Any]:
    return {
        "training.step.Predictor.merged": lambda self, variables: {},
        "adapters.lora.merged_kernel": lambda kernel, a, b, scale: kernel + scale * (a @ b),
        "adapters.lora.merged_product": lambda x, merged, a, b, scale: x @ merged,
    }


no_change = Ablation("nothing")

ABLATIONS: dict[str, Ablation] = {
    "packing": Ablation("one subject a row, padded", lambda config, layout: (config, "padded")),
    "masked_head": Ablation("MLM head at every position", patches=_head_everywhere),
    "hashed_dropout": Ablation(
        "dropout bits of threefry", patches=lambda: {"models.dropout.dropout": _threefry}
    ),
    "frozen_gradients": Ablation("gradients and updates of the base too", _all_trains),
    "merged_product": Ablation("adapters on activations", _with_activations),
    "low_rank_backward": Ablation("merged weights, differentiated as they are", patches=_plain_merging),
    "micro_batches": Ablation("the whole batch at once", micro_batches=1),
    "donation": Ablation("a new state beside the old one", donate=False),
    "layer_norm": Ablation("flax.linen.LayerNorm", patches=_norms),
    "gelu": Ablation("jax.nn.gelu, by erfc", patches=_gelus),
}
"""By name of the optimisation that is undone."""
LORA_ONLY = ("frozen_gradients", "merged_product", "low_rank_backward")

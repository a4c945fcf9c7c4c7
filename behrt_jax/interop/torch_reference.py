"""BEHRT in plain PyTorch: what the JAX model must equal, and what it is timed against.

The settings of the reference models: learned positions of events, a row per visit. Rows are padded, one
subject each, and the head runs at every position, as is usual in PyTorch.
"""

from typing import Any, Literal

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from behrt_jax.adapters.lora import scale
from behrt_jax.config import LoRAConfig, ModelConfig
from behrt_jax.errors import InputError
from behrt_jax.interop.torch_lora import ATTENTION_LINEARS, FFN_LINEARS, adapt

Regime = Literal["full", "frozen", "lora"]


class TorchBEHRTForMLM(nn.Module):
    """The counterpart of :class:`behrt_jax.models.behrt.BEHRTForMLM`, of parts from ``torch.nn``.

    Two of its parts are set apart from their defaults: the encoder layer's dropout between the two
    feed-forward products is left out, since the JAX model has none there, and embedding tables and the
    decoder start at a standard deviation of 0.02.

    Args:
        config: its sizes and dropout rates are read; `compute_dtype` is not, since in PyTorch autocast
            decides.
        vocabulary_size: rows of the code table, special tokens included.
        regime: `full` trains everything. `frozen` freezes the encoder; embeddings and head train. `lora`
            freezes the encoder and puts adapters beside its linears; adapters, embeddings and head train.
        lora: adapters of regime `lora`: `rank`, `alpha`, `rank_stabilised` and `targets` (of query key
            value out intermediate output) are read.

    Raises:
        InputError: an embedding setting or an adapter setting that the reference does not have.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_size: int,
        regime: Regime = "full",
        lora: LoRAConfig | None = None,
    ) -> None:
        super().__init__()
        _check(config, regime, lora)
        size, hidden = config.embedding_size, config.hidden_size
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.code = nn.Embedding(vocabulary_size, size)
        self.age = nn.Embedding(config.age_rows, size)
        self.visit = nn.Embedding(config.visit_rows, size)
        self.position = nn.Embedding(config.positions, size)
        self.embedding_norm = nn.LayerNorm(size)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(size, hidden) if size != hidden else nn.Identity()
        layer: Any = nn.TransformerEncoderLayer(
            hidden,
            config.heads,
            config.ffn_size or 4 * hidden,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        layer.dropout = nn.Identity()
        if config.attention_dropout is not None:
            layer.self_attn.dropout = config.attention_dropout
        self.encoder = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(hidden), enable_nested_tensor=False
        )
        decoder = nn.Linear(hidden, vocabulary_size)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden), decoder)
        for table in (self.code, self.age, self.visit, self.position, decoder):
            nn.init.normal_(table.weight, std=0.02)
        if regime != "full":
            self.encoder.requires_grad_(False)
        if lora is not None:
            for layer in self.encoder.layers:
                adapt(layer, lora.rank, scale(lora), lora.targets)

    def forward(
        self,
        codes: torch.Tensor,
        ages: torch.Tensor,
        visits: torch.Tensor,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits over the vocabulary at every position.

        Args:
            codes: vocabulary ids, int64 `[batch, length]`.
            ages: years at the event, float32 `[batch, length]`.
            visits: ordinal of the visit from 0, int64 `[batch, length]`.
            padding: bool `[batch, length]`, True at padding; none where every position holds an event. A
                row needs one event at least.

        Returns:
            `[batch, length, vocabulary]`; at padding, numbers without meaning.
        """
        config = self.config
        bins = (ages / config.age_bin_years).floor().long().clamp(0, config.age_rows - 1)
        x = self.code(codes) + self.age(bins) + self.visit(visits.clamp(0, config.visit_rows - 1))
        x = x + self.position.weight[: codes.shape[1]]  # [B, L, E]
        x = self.projection(self.embedding_dropout(self.embedding_norm(x)))  # [B, L, D]
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def _check(config: ModelConfig, regime: str, lora: LoRAConfig | None) -> None:
    supported = {"position_embedding": "learned", "position_of": "event", "visit_embedding": "ordinal"}
    for name, value in supported.items():
        if getattr(config, name) != value:
            raise InputError(
                f"model.{name} is {getattr(config, name)!r}: the PyTorch reference has {value!r} alone."
            )
    if regime not in ("full", "frozen", "lora"):
        raise InputError(f"regime is {regime!r}: choose one of full, frozen, lora.")
    if (regime == "lora") != (lora is not None):
        raise InputError(
            f"regime is {regime!r} and lora is {lora}: give lora with regime 'lora', and only then."
        )
    if lora is not None:
        _check_adapters(lora)


def _check_adapters(lora: LoRAConfig) -> None:
    names = (*ATTENTION_LINEARS, *FFN_LINEARS)
    if not lora.targets or not set(lora.targets) <= set(names):
        raise InputError(f"lora.targets is {lora.targets}: the PyTorch reference adapts {' '.join(names)}.")
    if lora.rank < 1:
        raise InputError(f"lora.rank is {lora.rank}: an adapter needs a rank of 1 or more.")
    if lora.dropout:
        raise InputError(f"lora.dropout is {lora.dropout}: the PyTorch reference has none, give 0.")

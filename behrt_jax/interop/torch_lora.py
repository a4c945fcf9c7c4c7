"""LoRA (Hu et al. 2021, arXiv 2106.09685) in PyTorch, on the layers of ``nn.TransformerEncoder``."""

from collections.abc import Collection
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

ATTENTION_LINEARS = ("query", "key", "value", "out")
FFN_LINEARS = ("intermediate", "output")


class LoRALinear(nn.Module):
    """A frozen ``nn.Linear`` with a low-rank product beside it: ``linear(x) + scale * x @ a @ b``."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a = nn.Parameter(torch.empty(inputs, rank).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.b = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` `[..., inputs]` to `[..., outputs]`."""
        y = self.linear(x)
        through = x.reshape(-1, x.shape[-1]) @ self.a  # [N, R]
        # One call adds the scaled product while it is made: no pass over [N, outputs] of its own.
        return torch.addmm(y.view(-1, y.shape[-1]), through, self.b, alpha=self.scale).view(y.shape)


class AdaptedSelfAttention(nn.Module):
    """Stands in for the ``nn.MultiheadAttention`` of an encoder layer, whose packed projection has no room
    for adapters: four linears and ``scaled_dot_product_attention``.

    ``batch_first`` and ``in_proj_bias`` are there for the layer, which reads them before it decides for or
    against its inference kernel; without a packed bias it decides against.
    """

    batch_first = True
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(
        self, hidden: int, heads: int, dropout: float, rank: int, scale: float, targets: Collection[str]
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.linears = nn.ModuleDict(
            {name: _linear(name, hidden, hidden, rank, scale, targets) for name in ATTENTION_LINEARS}
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """Attend from and to `query` `[batch, length, hidden]`, which `key` and `value` equal.

        Args:
            query: as above.
            key: as above.
            value: as above.
            attn_mask: none; an encoder over padded rows has no other mask than the next.
            key_padding_mask: float `[batch, length]`, -inf at padding, 0 elsewhere.
            need_weights: False; no weights are returned.
            is_causal: False.

        Returns:
            `[batch, length, hidden]`, and None in place of weights.
        """
        batch, length, hidden = query.shape

        def project(name: str) -> torch.Tensor:
            return self.linears[name](query).view(batch, length, self.heads, -1).transpose(1, 2)

        mask = None
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, None, :].expand(-1, self.heads, length, -1)  # [B, N, L, L]
        mixed = F.scaled_dot_product_attention(
            project("query"),
            project("key"),
            project("value"),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )  # [B, N, L, K]
        return self.linears["out"](mixed.transpose(1, 2).reshape(batch, length, hidden)), None


def adapt(layer: Any, rank: int, scale: float, targets: Collection[str]) -> None:
    """Put adapters on the linears of `layer` that `targets` names; its other parameters are frozen.

    Args:
        layer: a fresh ``nn.TransformerEncoderLayer``, changed in place; the weights of its attention are
            not carried over.
        rank: inner width of the adapters.
        scale: factor on their product.
        targets: of `ATTENTION_LINEARS` and `FFN_LINEARS`.
    """
    layer.requires_grad_(False)
    attention = layer.self_attn
    layer.self_attn = AdaptedSelfAttention(
        attention.embed_dim, attention.num_heads, attention.dropout, rank, scale, targets
    )
    inner = layer.linear1.out_features
    layer.linear1 = _linear("intermediate", attention.embed_dim, inner, rank, scale, targets)
    layer.linear2 = _linear("output", inner, attention.embed_dim, rank, scale, targets)


def _linear(
    name: str, inputs: int, outputs: int, rank: int, scale: float, targets: Collection[str]
) -> nn.Module:
    if name in targets:
        return LoRALinear(inputs, outputs, rank, scale)
    return nn.Linear(inputs, outputs).requires_grad_(False)

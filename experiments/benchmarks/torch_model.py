"""BEHRT in plain PyTorch: what the JAX model must equal, and what it is timed against.

Rows are padded, one subject each, and the head runs at every position, as is usual in PyTorch. With the
settings of the reference models (learned positions of events, a row per visit, layers with biases) it is
made of parts from ``torch.nn``, and its ``state_dict`` is in the layout that `weights.torch_behrt` reads and
writes.
Rotary positions, times, gated layers and RMSNorm, which ``nn.TransformerEncoderLayer`` does not have, are
:class:`ModernLayer`'s and :class:`Times`'; there is then no fixed table of positions.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict, unflatten_dict
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from behrt_jax.adapters.targets import scale
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.errors import InputError

# LoRA (Hu et al. 2021, arXiv 2106.09685) in PyTorch, on the layers of ``nn.TransformerEncoder``.

ATTENTION_LINEARS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
"""Our layer -> its name in an attention module with a linear layer of its own for each."""
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


class SeparateSelfAttention(nn.Module):
    """Stands in for the ``nn.MultiheadAttention`` of an encoder layer, whose packed projection has no room
    for adapters: four linears and ``scaled_dot_product_attention``.

    ``batch_first`` and ``in_proj_bias`` are there for the layer, which reads them before it decides for or
    against its inference kernel; without a packed bias it decides against.
    """

    batch_first = True
    in_proj_bias = None
    _qkv_same_embed_dim = True
    out_proj: nn.Module

    def __init__(self, heads: int, dropout: float, linears: Mapping[str, nn.Module]) -> None:
        """Take the `linears` `[hidden, hidden]`, by the names that they get."""
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.angles: torch.Tensor | None = None
        for name, linear in linears.items():
            self.add_module(name, linear)

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
            x = getattr(self, name)(query).view(batch, length, self.heads, -1)
            return (x if self.angles is None or name == "v_proj" else turned(x, self.angles)).transpose(1, 2)

        mask = None
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, None, :].expand(-1, self.heads, length, -1)  # [B, N, L, L]
        mixed = F.scaled_dot_product_attention(
            project("q_proj"),
            project("k_proj"),
            project("v_proj"),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )  # [B, N, L, K]
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, hidden)), None


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions: component i of each head, with component ``size / 2 + i`` as its imaginary part,
    turned by `angles` `[batch, length, size / 2]`; `x` is `[batch, length, heads, size]`.
    """
    real, imaginary = x.chunk(2, dim=-1)
    pairs = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


class ModernLayer(nn.Module):
    """A pre-norm layer with rotary positions, RMSNorm, gates or no biases, as the configuration says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.inner_size
        self.norm1, self.norm2 = norm_of(config, hidden), norm_of(config, hidden)
        linears = {name: nn.Linear(hidden, hidden, config.bias) for name in ATTENTION_LINEARS.values()}
        dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.self_attn = SeparateSelfAttention(config.heads, dropout, linears)
        self.linear1 = nn.Linear(hidden, inner, config.bias)
        self.gate_proj = None if config.ffn == "gelu" else nn.Linear(hidden, inner, config.bias)
        self.linear2 = nn.Linear(inner, hidden, config.bias)
        self.activation = F.silu if config.ffn == "swiglu" else F.gelu
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, src: torch.Tensor, src_mask: None = None, src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """As of ``nn.TransformerEncoderLayer``."""
        y = self.norm1(src)
        x = src + self.dropout(self.self_attn(y, y, y, key_padding_mask=src_key_padding_mask)[0])
        y = self.norm2(x)
        wide = self.linear1(y)
        gate = self.gate_proj
        wide = self.activation(wide) if gate is None else self.activation(gate(y)) * wide
        return x + self.dropout(self.linear2(wide))


def norm_of(config: ModelConfig, size: int) -> nn.Module:
    """LayerNorm or RMSNorm."""
    return nn.RMSNorm(size, eps=1e-5) if config.norm == "rms" else nn.LayerNorm(size, bias=config.bias)


class Times(nn.Module):
    """Time2Vec (Kazemi et al. 2019, arXiv 1907.05321): one linear function, then sines."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.linspace(1.0, 100.0, size))
        self.phase = nn.Parameter(2 * torch.pi * torch.rand(size))
        self.scale = nn.Parameter(torch.full((size,), 0.02 * 2**0.5))

    def forward(self, days: torch.Tensor) -> torch.Tensor:
        """`[batch, length, size]` of `days` `[batch, length]`, in the dtype of the parameters."""
        angle = (days.to(self.frequency.dtype) / 36525.0)[..., None] * self.frequency + self.phase
        return self.scale * torch.cat([angle[..., :1], angle[..., 1:].sin()], dim=-1)


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
    hidden, inner = attention.embed_dim, layer.linear1.out_features
    linears = {
        theirs: _linear(ours, hidden, hidden, rank, scale, targets)
        for ours, theirs in ATTENTION_LINEARS.items()
    }
    layer.self_attn = SeparateSelfAttention(attention.num_heads, attention.dropout, linears)
    layer.linear1 = _linear("intermediate", hidden, inner, rank, scale, targets)
    layer.linear2 = _linear("output", inner, hidden, rank, scale, targets)


def _linear(
    name: str, inputs: int, outputs: int, rank: int, scale: float, targets: Collection[str]
) -> nn.Module:
    if name in targets:
        return LoRALinear(inputs, outputs, rank, scale)
    return nn.Linear(inputs, outputs).requires_grad_(False)


def separate_projections(module: "TorchBEHRTForMLM") -> None:
    """Put a linear layer of its own in place of each part of the packed projections, with the same weights.

    Then every layer that our adapters may be on has an ``nn.Linear`` with its name, as PEFT needs it.
    """
    for layer in module.behrt.encoder.layers:
        attention: Any = layer.self_attn
        packed = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        linears = {"out_proj": attention.out_proj}
        for name, (weight, bias) in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
            linears[name] = nn.Linear(attention.embed_dim, attention.embed_dim)
            linears[name].weight.data.copy_(weight.detach())
            linears[name].bias.data.copy_(bias.detach())
        layer.self_attn = SeparateSelfAttention(attention.num_heads, attention.dropout, linears)


OF_TORCH_NN = {"position_embedding": "learned", "ffn": "gelu", "norm": "layer", "bias": True}
"""Settings with which a layer is ``nn.TransformerEncoderLayer``."""


class Table(nn.Module):
    """A table of ages, visits or positions."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, size)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of int64 `index`; an index past the end has the last one."""
        return self.embedding(index.clamp(0, self.embedding.num_embeddings - 1))


class Embeddings(nn.Module):
    """Sum of the embeddings of an event, normalised, dropout."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        size = config.embedding_size
        self.age_bin_years = config.age_bin_years
        self.code_embedding = nn.Embedding(vocabulary_size, size)
        self.age_embedding = Table(config.age_rows, size)
        self.alternates = config.visit_embedding == "alternating"
        rows = 2 if self.alternates else config.visit_rows
        self.visit_embedding = None if config.visit_embedding == "none" else Table(rows, size)
        learned = config.position_embedding == "learned"
        self.position_embedding = Table(config.positions, size) if learned else None
        self.gap_embedding = None if config.time == "none" else Times(size)
        self.calendar_embedding = Times(size) if config.time == "time2vec" else None
        self.layer_norm = norm_of(config, size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, codes: torch.Tensor, ages: torch.Tensor, visits: torch.Tensor, days: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[batch, length, embedding]`; arguments as of :class:`TorchBEHRTForMLM`."""
        bins = (ages / self.age_bin_years).floor().long()
        x = self.code_embedding(codes) + self.age_embedding(bins)
        if self.visit_embedding is not None:
            x = x + self.visit_embedding(visits % 2 if self.alternates else visits)
        if self.position_embedding is not None:
            x = x + self.position_embedding.embedding.weight[: codes.shape[1]]  # [B, L, E]
        if self.gap_embedding is not None and days is not None:
            x = x + self.gap_embedding(gaps_between(days, visits))
        if self.calendar_embedding is not None and days is not None:
            x = x + self.calendar_embedding(days - 10957)
        return self.dropout(self.layer_norm(x))


def gaps_between(days: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
    """Days from the last event of the visit before to the first of this one, 0 in the first visit."""
    gaps = torch.zeros_like(days)
    for column in range(1, days.shape[1]):
        same = visits[:, column] == visits[:, column - 1]
        gaps[:, column] = torch.where(same, gaps[:, column - 1], days[:, column] - days[:, column - 1])
    return gaps


class TorchBEHRT(nn.Module):
    """Embeddings, their projection, encoder, norm."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        size, hidden = config.embedding_size, config.hidden_size
        self.embeddings = Embeddings(config, vocabulary_size)
        project = size != hidden
        self.embedding_projection = nn.Linear(size, hidden, config.bias) if project else nn.Identity()
        self.rotary, self.of_visits = config.position_embedding, config.position_of == "visit"
        self.frequencies = config.rope_base ** (
            -np.arange(0, hidden // config.heads, 2) * config.heads / hidden
        )
        self.encoder = nn.TransformerEncoder(_layer_of(config), config.layers, enable_nested_tensor=False)
        self.layer_norm = norm_of(config, hidden)

    def forward(
        self,
        codes: torch.Tensor,
        ages: torch.Tensor,
        visits: torch.Tensor,
        padding: torch.Tensor | None,
        days: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[batch, length, hidden]`; arguments as of :class:`TorchBEHRTForMLM`."""
        x = self.embedding_projection(self.embeddings(codes, ages, visits, days))  # [B, L, D]
        if self.rotary.startswith("rope"):
            places = (
                visits if self.of_visits else torch.arange(codes.shape[1], device=x.device).expand_as(codes)
            )
            if self.rotary == "rope_time":
                assert days is not None
                places = days - days[:, :1]
            angles = places[..., None] * torch.from_numpy(self.frequencies).to(x.device)  # float64
            layers: Any = self.encoder.layers
            for layer in layers:
                layer.self_attn.angles = torch.remainder(angles, 2 * torch.pi).to(x.dtype)
        return self.layer_norm(self.encoder(x, src_key_padding_mask=padding))


def _layer_of(config: ModelConfig) -> Any:
    if any(getattr(config, name) != value for name, value in OF_TORCH_NN.items()):
        return ModernLayer(config)
    layer: Any = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.heads,
        config.inner_size,
        config.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    layer.dropout = nn.Identity()
    if config.attention_dropout is not None:
        layer.self_attn.dropout = config.attention_dropout
    return layer


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
        self.vocabulary_size, hidden = vocabulary_size, config.hidden_size
        self.behrt = TorchBEHRT(config, vocabulary_size)
        features = config.embedding_size if config.tied_decoder else hidden
        dense, decoder = nn.Linear(hidden, features, config.bias), nn.Linear(features, vocabulary_size)
        self.mlm_head = nn.Sequential(dense, nn.GELU(), norm_of(config, features), decoder)
        of = self.behrt.embeddings
        if config.tied_decoder:
            decoder.weight = of.code_embedding.weight
        tables = [table for table in of.children() if isinstance(table, Table)]
        for table in (of.code_embedding, *(table.embedding for table in tables), decoder):
            nn.init.normal_(table.weight, std=0.02)
        if regime != "full":
            self.behrt.encoder.requires_grad_(False)
            self.behrt.layer_norm.requires_grad_(False)
        if lora is not None:
            for layer in self.behrt.encoder.layers:
                adapt(layer, lora.rank, scale(lora), lora.targets)

    def forward(
        self,
        codes: torch.Tensor,
        ages: torch.Tensor,
        visits: torch.Tensor,
        padding: torch.Tensor | None = None,
        days: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits over the vocabulary at every position.

        Args:
            codes: vocabulary ids, int64 `[batch, length]`.
            ages: years at the event, float32 `[batch, length]`.
            visits: ordinal of the visit from 0, int64 `[batch, length]`.
            padding: bool `[batch, length]`, True at padding; none where every position holds an event. A
                row needs one event at least.
            days: of the event since 1970, int64 `[batch, length]`; where the model reads them.

        Returns:
            `[batch, length, vocabulary]`; at padding, numbers without meaning.
        """
        return self.mlm_head(self.behrt(codes, ages, visits, padding, days))


def _check(config: ModelConfig, regime: str, lora: LoRAConfig | None) -> None:
    learned = config.position_embedding == "learned"
    if config.position_embedding == "sinusoidal" or (learned and config.position_of == "visit"):
        name = "position_of" if learned else "position_embedding"
        raise InputError(
            f"model.{name} is {getattr(config, name)!r}: of tables, the PyTorch reference has a learned one "
            "of events alone."
        )
    if regime not in ("full", "frozen", "lora"):
        raise InputError(f"regime is {regime!r}: choose one of full, frozen, lora.")
    if (regime == "lora") != (lora is not None):
        raise InputError(
            f"regime is {regime!r} and lora is {lora}: give lora with regime 'lora', and only then."
        )
    if lora is not None:
        if any(getattr(config, name) != value for name, value in OF_TORCH_NN.items()):
            raise InputError(f"lora: the PyTorch reference adapts layers with {OF_TORCH_NN} alone.")
        _check_adapters(lora)


def _check_adapters(lora: LoRAConfig) -> None:
    names = (*ATTENTION_LINEARS, *FFN_LINEARS)
    if not lora.targets or not set(lora.targets) <= set(names):
        raise InputError(f"lora.targets is {lora.targets}: the PyTorch reference adapts {' '.join(names)}.")
    if lora.rank < 1:
        raise InputError(f"lora.rank is {lora.rank}: an adapter needs a rank of 1 or more.")
    if lora.dropout:
        raise InputError(f"lora.dropout is {lora.dropout}: the PyTorch reference has none, give 0.")
    if lora.exclude or lora.rank_pattern or lora.alpha_pattern or lora.init != "default":
        raise InputError(
            "lora: the PyTorch reference has the same adapters in all layers, and b zero at first."
        )


# Parameters and gradients of the PyTorch reference under the names and shapes of the JAX model.

Path = tuple[str, ...]


class _Place(NamedTuple):
    """Where a leaf of our tree lies in a parameter of the reference."""

    parameter: nn.Parameter
    transposed: bool = False
    rows: slice = slice(None)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The leaf within `tensor`, the parameter or its gradient."""
        part = tensor.detach()[self.rows]
        return part.T if self.transposed else part


def load_params(
    module: TorchBEHRTForMLM, params: Mapping[str, Any], lora: Mapping[str, Any] | None = None
) -> None:
    """Copy the parameters of a :class:`behrt_jax.models.behrt.BEHRTForMLM` into the reference.

    Args:
        module: written to, in its own dtype and on its own device.
        params: the `params` collection, leaves that numpy can read.
        lora: the `lora` collection, where the module has adapters; they stay as they are where not given.

    Raises:
        ValueError: the leaves are not those of the module, or not of their shapes.
    """
    given = _flatten({"params": params} if lora is None else {"params": params, "lora": lora})
    collections = ("params",) if lora is None else ("params", "lora")
    places = {path: place for path, place in _places(module) if path[0] in collections}
    if given.keys() != places.keys():
        names = ", ".join(sorted("/".join(path) for path in given.keys() ^ places.keys()))
        raise ValueError(f"the tree and the PyTorch reference do not both have: {names}")
    for path, place in places.items():
        leaf, target = np.array(given[path]), place.view(place.parameter)
        if leaf.shape != tuple(target.shape):
            raise ValueError(
                f"{'/'.join(path)} is {leaf.shape}, in the PyTorch reference {tuple(target.shape)}"
            )
        target.copy_(torch.from_numpy(leaf))


def gradients_as_params(module: TorchBEHRTForMLM, collection: str = "params") -> dict[str, Any]:
    """Gradients of the last backward pass as a tree of numpy arrays.

    Args:
        module: the reference after ``loss.backward()``.
        collection: `params` or `lora`.

    Returns:
        A tree with the names and shapes of the JAX model's; parameters without a gradient are left out.
    """
    return unflatten_dict(
        {
            path[1:]: place.view(place.parameter.grad).cpu().numpy().copy()
            for path, place in _places(module)
            if path[0] == collection and place.parameter.grad is not None
        }
    )


def _places(module: TorchBEHRTForMLM) -> Iterator[tuple[Path, _Place]]:
    """Every leaf of our tree, its path with the collection in front."""
    path, behrt = ("params", "behrt", "embeddings"), module.behrt
    of: Any = behrt.embeddings
    yield (*path, "code", "embedding"), _Place(of.code_embedding.weight)
    for name in ("age", "visit", "position"):
        if (table := getattr(of, f"{name}_embedding")) is not None:
            yield (*path, name, "embedding"), _Place(table.embedding.weight)
    for name in ("gap", "calendar"):
        times: Any = getattr(of, f"{name}_embedding")
        if times is not None:
            for leaf in ("frequency", "phase", "scale"):
                yield (*path, name, leaf), _Place(getattr(times, leaf))
    yield from _norm((*path, "norm"), of.layer_norm)
    if isinstance(behrt.embedding_projection, nn.Linear):
        yield from _torch_parameters_linear((*path, "projection"), behrt.embedding_projection)
    for index, layer in enumerate(behrt.encoder.layers):
        yield from _layer(("params", "behrt", "encoder", f"layer_{index}"), layer)
    yield from _norm(("params", "behrt", "encoder", "norm"), behrt.layer_norm)
    head: Any = module.mlm_head
    dense, _, norm, decoder = head
    yield from _torch_parameters_linear(("params", "mlm_head", "dense"), dense)
    yield from _norm(("params", "mlm_head", "norm"), norm)
    if decoder.weight is of.code_embedding.weight:
        yield ("params", "mlm_head", "decoder", "bias"), _Place(decoder.bias)
    else:
        yield from _torch_parameters_linear(("params", "mlm_head", "decoder"), decoder)


def _layer(path: Path, layer: Any) -> Iterator[tuple[Path, _Place]]:
    yield from _norm((*path, "attention_norm"), layer.norm1)
    attention, at = layer.self_attn, (*path, "attention")
    if isinstance(attention, nn.MultiheadAttention):
        for number, name in enumerate(("query", "key", "value")):
            rows = slice(number * attention.embed_dim, (number + 1) * attention.embed_dim)
            yield (*at, name, "kernel"), _Place(attention.in_proj_weight, True, rows)
            yield (*at, name, "bias"), _Place(attention.in_proj_bias, rows=rows)
        yield from _torch_parameters_linear((*at, "out"), attention.out_proj)
    else:
        for ours, theirs in ATTENTION_LINEARS.items():
            yield from _torch_parameters_linear((*at, ours), getattr(attention, theirs))
    yield from _norm((*path, "ffn_norm"), layer.norm2)
    yield from _torch_parameters_linear((*path, "intermediate"), layer.linear1)
    yield from _torch_parameters_linear((*path, "output"), layer.linear2)
    if (gate := getattr(layer, "gate_proj", None)) is not None:
        yield from _torch_parameters_linear((*path, "gate"), gate)


def _torch_parameters_linear(path: Path, linear: Any) -> Iterator[tuple[Path, _Place]]:
    if isinstance(linear, LoRALinear):
        yield ("lora", *path[1:], "a"), _Place(linear.a)
        yield ("lora", *path[1:], "b"), _Place(linear.b)
        linear = linear.linear
    yield (*path, "kernel"), _Place(linear.weight, True)
    if linear.bias is not None:
        yield (*path, "bias"), _Place(linear.bias)


def _norm(path: Path, norm: Any) -> Iterator[tuple[Path, _Place]]:
    yield (*path, "scale"), _Place(norm.weight)
    if getattr(norm, "bias", None) is not None:
        yield (*path, "bias"), _Place(norm.bias)


def _flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    return flatten_dict(tree)  # pyright: ignore[reportReturnType, reportArgumentType]

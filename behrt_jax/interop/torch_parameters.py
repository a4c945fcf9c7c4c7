"""Parameters and gradients of the PyTorch reference under the names and shapes of the JAX model."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict, unflatten_dict
from torch import nn  # pyright: ignore[reportMissingImports]

from behrt_jax.interop.torch_lora import ATTENTION_LINEARS, LoRALinear
from behrt_jax.interop.torch_reference import TorchBEHRTForMLM

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
    embeddings = ("params", "behrt", "embeddings")
    for name in ("code", "age", "visit", "position"):
        yield (*embeddings, name, "embedding"), _Place(getattr(module, name).weight)
    yield from _norm((*embeddings, "norm"), module.embedding_norm)
    if isinstance(module.projection, nn.Linear):
        yield from _linear((*embeddings, "projection"), module.projection)
    for index, layer in enumerate(module.encoder.layers):
        yield from _layer(("params", "behrt", "encoder", f"layer_{index}"), layer)
    yield from _norm(("params", "behrt", "encoder", "norm"), module.encoder.norm)
    dense, _, norm, decoder = module.head
    yield from _linear(("params", "mlm_head", "dense"), dense)
    yield from _norm(("params", "mlm_head", "norm"), norm)
    yield from _linear(("params", "mlm_head", "decoder"), decoder)


def _layer(path: Path, layer: Any) -> Iterator[tuple[Path, _Place]]:
    yield from _norm((*path, "attention_norm"), layer.norm1)
    attention, at = layer.self_attn, (*path, "attention")
    if isinstance(attention, nn.MultiheadAttention):
        for number, name in enumerate(("query", "key", "value")):
            rows = slice(number * attention.embed_dim, (number + 1) * attention.embed_dim)
            yield (*at, name, "kernel"), _Place(attention.in_proj_weight, True, rows)
            yield (*at, name, "bias"), _Place(attention.in_proj_bias, rows=rows)
        yield from _linear((*at, "out"), attention.out_proj)
    else:
        for name in ATTENTION_LINEARS:
            yield from _linear((*at, name), attention.linears[name])
    yield from _norm((*path, "ffn_norm"), layer.norm2)
    yield from _linear((*path, "intermediate"), layer.linear1)
    yield from _linear((*path, "output"), layer.linear2)


def _linear(path: Path, linear: Any) -> Iterator[tuple[Path, _Place]]:
    if isinstance(linear, LoRALinear):
        yield ("lora", *path[1:], "a"), _Place(linear.a)
        yield ("lora", *path[1:], "b"), _Place(linear.b)
        linear = linear.linear
    yield (*path, "kernel"), _Place(linear.weight, True)
    yield (*path, "bias"), _Place(linear.bias)


def _norm(path: Path, norm: Any) -> Iterator[tuple[Path, _Place]]:
    yield (*path, "scale"), _Place(norm.weight)
    yield (*path, "bias"), _Place(norm.bias)


def _flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    return flatten_dict(tree)  # pyright: ignore[reportReturnType, reportArgumentType]

"""BEHRT in PyTorch: its ``state_dict`` to our parameters, and back.

The layout is that of an ``nn.TransformerEncoder`` (``norm_first=True``, exact GELU) between embeddings and
head::

    behrt.embeddings.code_embedding.weight      [codes, embedding]
    behrt.embeddings.{age,visit,position}_embedding.embedding.weight
    behrt.embeddings.layer_norm.{weight,bias}
    behrt.embedding_projection.{weight,bias}    where the encoder is wider than the embeddings
    behrt.encoder.layers.N.self_attn.{in_proj_weight,in_proj_bias}    query, key and value in one
    behrt.encoder.layers.N.{self_attn.out_proj,linear1,linear2,norm1,norm2}.{weight,bias}
    behrt.layer_norm.{weight,bias}
    mlm_head.{0,2,3}.{weight,bias}              linear, (GELU,) LayerNorm, linear

Linear layers ``q_proj``, ``k_proj`` and ``v_proj`` in place of the packed projection are read too.
`models.torch_names` says which parameter of ours each is.
"""

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from behrt_jax.adapters.files import import_safetensors, tensors_of
from behrt_jax.adapters.lora import leaves_by_path
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.errors import InputError
from behrt_jax.models.stacked_layers import Tree, unstack_layers
from behrt_jax.models.torch_names import TRANSPOSED, path_of, torch_name
from behrt_jax.weights.portable import expected_shapes

SUFFIX = ".safetensors"
HELD_UNDER = ("model_state_dict", "state_dict")
"""Entries of a checkpoint that may hold the parameters."""
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""Put before every name by data parallelism, ``torch.compile`` and PEFT."""
SEPARATE = ("q_proj", "k_proj", "v_proj")
ORDINARY = {
    "position_embedding": "learned", "position_of": "event", "visit_embedding": "ordinal", "time": "none",
    "ffn": "gelu", "norm": "layer", "bias": True, "tied_decoder": False,
}  # fmt: skip
"""The settings that this layout is for: those of parts from ``torch.nn``."""

_ADAPTER = re.compile(r"(.+?)(?:\.lora)?\.lora_([AB])(?:\.default)?(?:\.weight)?")
_BASE = re.compile(r"(.+)\.(?:original_layer|base_layer)\.(.+)")
_TABLE = "behrt.embeddings.{}_embedding.embedding.weight"


def to_state_dict(model: ModelConfig, params: Tree) -> dict[str, np.ndarray]:
    """Parameters of a `BEHRTForMLM` in the layout of PyTorch, float32.

    Args:
        model: its settings.
        params: stacked or not, without adapters (merge them before).

    Raises:
        InputError: a setting that the layout does not have.
    """
    for name, value in ORDINARY.items():
        if (given := getattr(model, name)) != value:
            raise InputError(f"model.{name} is {given!r}: the PyTorch layout is for {value!r} alone.")
    named = {}
    for path, leaf in leaves_by_path(unstack_layers(params)).items():
        values = np.asarray(leaf, np.float32)
        named[torch_name(path)] = np.ascontiguousarray(values.T if path[-1] in TRANSPOSED else values)
    for prefix, kind, names in list(_projections(named)):
        named[f"{prefix}in_proj_{kind}"] = np.concatenate([named.pop(name) for name in names])
    return named


def _projections(names: Iterable[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Of each attention layer with separate projections: prefix, weight or bias, names of the three."""
    for name in names:
        if match := re.fullmatch(rf"(.+\.self_attn\.){SEPARATE[0]}\.(weight|bias)", name):
            yield match[1], match[2], [f"{match[1]}{part}.{match[2]}" for part in SEPARATE]


class TorchWeights(NamedTuple):
    """What a checkpoint of PyTorch holds, as ours."""

    model: ModelConfig
    vocabulary_size: int
    params: Tree
    """Of a `BEHRTForMLM`, float32 numpy arrays, layer by layer."""
    lora: Tree
    """Adapters ``a`` [in, rank] and ``b`` [rank, out]; empty where there are none."""
    adapters: LoRAConfig | None
    left_out: tuple[str, ...]
    """Layers whose adapters were never part of what the model computed."""


def from_state_dict(
    tensors: Mapping[str, np.ndarray],
    heads: int,
    alpha: float | None = None,
    age_bin_years: float = 5.0,
    where: str = "the checkpoint",
) -> TorchWeights:
    """Read parameters, and adapters where there are any, from the layout of PyTorch.

    Sizes follow from shapes. An adapter on ``self_attn.out_proj`` beside a packed projection is left out:
    ``nn.MultiheadAttention`` takes that layer's weight and never calls it, so that the adapter did not train.

    Args:
        tensors: float32, by name.
        heads: attention heads, which no shape tells.
        alpha: the adapters' product is scaled by alpha / rank.
        age_bin_years: width of a bin of the age table.
        where: what messages call the checkpoint.

    Raises:
        InputError: tensors are missing, surplus or of other shapes (all are named), the heads do not divide
            the width, or there are adapters and no alpha.
    """
    plain, sides = _without_adapters(tensors)
    model, vocabulary_size = _sizes(plain, heads, age_bin_years, where)
    shapes = expected_shapes(model, vocabulary_size)
    expected = {
        torch_name(path): shape[::-1] if path[-1] in TRANSPOSED else shape
        for path, shape in ((tuple(key.split("/")), shape) for key, shape in shapes.items())
    }
    separate = any(f".self_attn.{part}." in name for name in plain for part in SEPARATE)
    packed = {} if separate else {f"{at}in_proj_{kind}": names for at, kind, names in _projections(expected)}
    for name, parts in packed.items():
        shape = expected[parts[0]]
        expected[name] = (3 * shape[0], *shape[1:])
        for part in parts:
            del expected[part]
    linear = {name.removesuffix(".weight") for name in expected if path_of(name)[-1] == "kernel"}
    surplus = [f"{module}.lora_A" for module in sides if module not in linear]
    _check({name: values.shape for name, values in plain.items()}, expected, surplus, where)
    for name, parts in packed.items():
        plain |= zip(parts, np.split(plain.pop(name), 3), strict=True)
    left_out = () if separate else tuple(name for name in sides if name.endswith(".self_attn.out_proj"))
    found = {
        module: _oriented(pair, plain[f"{module}.weight"].shape, f"{where}: {module}")
        for module, pair in sides.items()
        if module not in left_out
    }
    params = {path_of(name): values for name, values in plain.items()}
    params = {path: values.T if path[-1] in TRANSPOSED else values for path, values in params.items()}
    lora, adapters = _adapters(found, alpha, where)
    return TorchWeights(model, vocabulary_size, unflatten_dict(params), lora, adapters, left_out)


def _without_adapters(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Parameters by name, as if no layer had an adapter, and layer -> its ``A`` and ``B``."""
    named = dict(tensors)
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in named):
            named = {name.removeprefix(wrapper): values for name, values in named.items()}
    plain, sides = {}, {}
    for name, values in named.items():
        if match := _ADAPTER.fullmatch(name):
            sides.setdefault(match[1], {})[match[2]] = values
        else:
            match = _BASE.fullmatch(name)
            bare = f"{match[1]}.{match[2]}" if match else name
            plain[name if bare in plain else bare] = values  # where both are there, one is surplus
    return plain, sides


def _sizes(
    tensors: Mapping[str, np.ndarray], heads: int, age_bin_years: float, where: str
) -> tuple[ModelConfig, int]:
    """The model that the shapes tell, and the rows of its vocabulary."""
    code, norm = "behrt.embeddings.code_embedding.weight", "behrt.layer_norm.weight"
    inner = "behrt.encoder.layers.0.linear1.weight"
    tables = [_TABLE.format(name) for name in ("age", "visit", "position")]
    ranks = {code: 2, norm: 1, inner: 2, **dict.fromkeys(tables, 2)}
    if wrong := [name for name, rank in ranks.items() if name not in tensors or tensors[name].ndim != rank]:
        raise InputError(
            f"{where} does not hold BEHRT in the layout that is read: {', '.join(wrong)} must be there, "
            "tables and weights with two axes. Rename its tensors."
        )
    (rows, size), (hidden,) = tensors[code].shape, tensors[norm].shape
    if heads < 1 or hidden % heads:
        raise InputError(
            f"--heads is {heads}: {where} has a width of {hidden}, give a number that divides it."
        )
    ages, visits, positions = (len(tensors[name]) for name in tables)
    found = (re.match(r"behrt\.encoder\.layers\.(\d+)\.", name) for name in tensors)
    model = ModelConfig(
        embedding_size=size,
        hidden_size=hidden,
        layers=1 + max(int(match[1]) for match in found if match),
        heads=heads,
        ffn_size=len(tensors[inner]),
        positions=positions,
        age_bin_years=age_bin_years,
        age_rows=ages,
        visit_rows=visits,
    )
    return model, rows


def _check(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    surplus: Sequence[str],
    where: str,
) -> None:
    """Raise InputError, which names every tensor that is missing, surplus or of another shape."""
    shapes = (
        f"{name} is {list(found[name])} where {list(shape)} fits the others"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    )
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": [*sorted(found.keys() - expected.keys()), *surplus],
        "of another shape": list(shapes),
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise InputError(f"{where} is not the BEHRT that its tables tell. Tensors {told}.")


def _oriented(
    pair: Mapping[str, np.ndarray], shape: tuple[int, ...], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """``a`` [in, rank] and ``b`` [rank, out], whichever way round both are.

    Args:
        pair: ``A`` and ``B``, as ``x @ A.T @ B.T`` (PEFT) or ``x @ A @ B`` takes them.
        shape: of the layer's weight, [out, in].
        where: what messages call the layer.
    """
    outputs, inputs = shape
    if pair.keys() != {"A", "B"} or any(side.ndim != 2 for side in pair.values()):
        raise InputError(f"{where} must have both lora_A and lora_B, with two axes each.")
    a, b = pair["A"], pair["B"]
    fits = {
        "transposed": a.shape[1] == inputs and b.shape == (outputs, a.shape[0]),
        "as it is": a.shape[0] == inputs and b.shape == (a.shape[1], outputs),
    }
    if all(fits.values()):
        raise InputError(f"{where}: lora_A and lora_B are square, so nothing tells which way round they are.")
    if not any(fits.values()):
        raise InputError(
            f"{where}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, which is no adapter of a layer "
            f"from {inputs} to {outputs}."
        )
    return (a.T, b.T) if fits["transposed"] else (a, b)


def _adapters(
    found: Mapping[str, tuple[np.ndarray, np.ndarray]], alpha: float | None, where: str
) -> tuple[Tree, LoRAConfig | None]:
    """Our tree of adapters, and its settings."""
    if not found:
        return {}, None
    if alpha is None:
        raise InputError(
            f"{where} has adapters on {len(found)} layers, and does not tell their scale: give --alpha, "
            "where their product is scaled by alpha / rank."
        )
    leaves, ranks = {}, {}
    for module, (a, b) in found.items():
        layer = path_of(f"{module}.weight")[:-1]
        leaves |= {(*layer, "a"): a, (*layer, "b"): b}
        ranks["/".join(layer)] = a.shape[1]
    rank = max(ranks.values())
    pattern = tuple(f"{layer}={own}" for layer, own in ranks.items() if own != rank)
    return unflatten_dict(leaves), LoRAConfig(
        rank=rank, alpha=alpha, targets=tuple(ranks), rank_pattern=pattern
    )


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint, by name, as float32.

    A file that ends in ``.safetensors`` is read without PyTorch; any other one by ``torch.load`` with
    ``weights_only``, which runs nothing of it. There the parameters may be an entry ``model_state_dict``.

    Raises:
        InputError: the file cannot be read or holds anything else, or the package that reads it is missing.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there: give the file of a checkpoint.")
    if path.suffix == SUFFIX:
        import_safetensors()
        try:
            return tensors_of(path.read_bytes())
        except Exception as error:  # the reader's own error type, and others on garbage
            raise InputError(
                f"{path} is no safetensors file of floating-point tensors: save it again."
            ) from error
    return _read_pickled(path)


def _read_pickled(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path} takes PyTorch to read: pip install 'behrt-jax[interop]', or save the state_dict with "
            "safetensors.torch.save_file."
        ) from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint of tensors alone ({type(error).__name__}): save "
            "model.state_dict() with torch.save, and nothing else. Other objects are not loaded, since that "
            "would run what they say."
        ) from error
    for name in HELD_UNDER:
        held = held[name] if isinstance(held, dict) and isinstance(held.get(name), dict) else held
    if not isinstance(held, dict) or not held:
        raise InputError(f"{path} holds no state_dict: save model.state_dict() with torch.save.")
    if others := [str(name) for name, value in held.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(
            f"{path}: {', '.join(others[:5])} is no tensor, nor is there an entry {HELD_UNDER[0]}: save "
            "model.state_dict() with torch.save."
        )
    return {name: value.detach().float().numpy() for name, value in held.items()}

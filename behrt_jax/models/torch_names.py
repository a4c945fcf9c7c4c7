"""Names of parameters in PyTorch, and the way to them from the paths of our own.

A module has the name that BEHRT of parts from ``torch.nn`` (an ``nn.TransformerEncoder``) gives it, with one
difference: query, key and value are linear layers of their own (``q_proj``, ``k_proj``, ``v_proj``), so that
each can have an adapter; `weights.torch_behrt` packs them into the ``in_proj_weight`` of
``nn.MultiheadAttention``. A matrix ``kernel`` `[in, out]` of ours is a ``weight`` `[out, in]` there. Adapters
are named as PEFT names them: ``lora_A.weight`` `[rank, in]` and ``lora_B.weight`` `[out, rank]`.

What ``torch.nn`` has no part for (the gate of a gated feed-forward layer, embeddings of times) has names of
the same kind, under which adapters are written and read.
"""

import re
from collections.abc import Iterator, Sequence

from behrt_jax.models.stacked_layers import Path

MODULES = {
    "behrt/embeddings/code": "behrt.embeddings.code_embedding",
    "behrt/embeddings/age": "behrt.embeddings.age_embedding.embedding",
    "behrt/embeddings/visit": "behrt.embeddings.visit_embedding.embedding",
    "behrt/embeddings/position": "behrt.embeddings.position_embedding.embedding",
    "behrt/embeddings/gap": "behrt.embeddings.gap_embedding",
    "behrt/embeddings/calendar": "behrt.embeddings.calendar_embedding",
    "behrt/embeddings/norm": "behrt.embeddings.layer_norm",
    "behrt/embeddings/projection": "behrt.embedding_projection",
    "behrt/encoder/layer_#/attention_norm": "behrt.encoder.layers.#.norm1",
    "behrt/encoder/layer_#/attention/query": "behrt.encoder.layers.#.self_attn.q_proj",
    "behrt/encoder/layer_#/attention/key": "behrt.encoder.layers.#.self_attn.k_proj",
    "behrt/encoder/layer_#/attention/value": "behrt.encoder.layers.#.self_attn.v_proj",
    "behrt/encoder/layer_#/attention/out": "behrt.encoder.layers.#.self_attn.out_proj",
    "behrt/encoder/layer_#/ffn_norm": "behrt.encoder.layers.#.norm2",
    "behrt/encoder/layer_#/intermediate": "behrt.encoder.layers.#.linear1",
    "behrt/encoder/layer_#/gate": "behrt.encoder.layers.#.gate_proj",
    "behrt/encoder/layer_#/output": "behrt.encoder.layers.#.linear2",
    "behrt/encoder/norm": "behrt.layer_norm",
    "mlm_head/dense": "mlm_head.0",
    "mlm_head/norm": "mlm_head.2",
    "mlm_head/decoder": "mlm_head.3",
    "task_head/dense": "task_head",
}
"""Module of ours -> module in PyTorch; ``#`` stands for the number of a layer."""
PARAMETERS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "a": "lora_A.weight",
    "b": "lora_B.weight",
}
"""Leaf of ours -> parameter in PyTorch."""
OF_TIMES = ("frequency", "phase", "scale")
"""Leaves of Time2Vec, which have their own names in PyTorch too."""
TRANSPOSED = ("kernel", "a", "b")
"""Leaves that PyTorch has the other way round."""

_OURS = {theirs: ours for ours, theirs in MODULES.items()}


def torch_module(path: Sequence[str]) -> str:
    """Name in PyTorch of our module at `path`, layer by layer; without a counterpart, its own with dots."""
    name, numbers = _numbered("/".join(path), r"(?<=/layer_)\d+")
    return _with(numbers, MODULES[name]) if name in MODULES else ".".join(path)


def torch_name(path: Path) -> str:
    """Name in PyTorch of our leaf at `path`, of ``params`` or of ``lora``."""
    own = path[-1] in OF_TIMES and not path[-2].endswith("norm")
    return f"{torch_module(path[:-1])}.{path[-1] if own else PARAMETERS.get(path[-1], path[-1])}"


def path_of(name: str) -> Path:
    """Path of ours to the parameter that PyTorch calls `name`: the way back from :func:`torch_name`.

    A module without a counterpart keeps its name, and its ``weight`` counts as that of a linear layer.
    """
    adapter = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
    module, _, leaf = (adapter[1], "", adapter[2].lower()) if adapter else name.rpartition(".")
    known, numbers = _numbered(module, r"(?<=\.layers\.)\d+")
    ours = _with(numbers, _OURS[known]) if known in _OURS else module.replace(".", "/")
    path = tuple(ours.split("/"))
    if leaf == "weight":
        leaf = "scale" if path[-1].endswith("norm") else "embedding" if _is_table(path) else "kernel"
    return (*path, leaf)


def _is_table(path: Path) -> bool:
    return path[:-1] == ("behrt", "embeddings") and path[-1] != "projection"


def _numbered(name: str, number: str) -> tuple[str, Iterator[str]]:
    """`name` with ``#`` in place of numbers, and those."""
    return re.sub(number, "#", name), iter(re.findall(number, name))


def _with(numbers: Iterator[str], name: str) -> str:
    return re.sub("#", lambda _: next(numbers), name)

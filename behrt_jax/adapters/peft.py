"""Adapters in the form of PEFT (https://github.com/huggingface/peft): its configuration and names of tensors.

PEFT puts ``base_model.model.`` before the name of a module (`models.torch_names`), saves ``lora_A`` and
``lora_B`` of each adapted layer, and, under their plain names, the parameters of whole modules that were
trained beside them (``modules_to_save``). A parameter that was trained in a module with an adapter has
``base_layer`` before its name, which PEFT loads too.

What is written here loads onto BEHRT in PyTorch with ``PeftModel.from_pretrained``; what PEFT saved there is
read.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from behrt_jax.adapters.targets import scale
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject
from behrt_jax.models.stacked_layers import Path
from behrt_jax.models.torch_names import TRANSPOSED, path_of, torch_module, torch_name

PREFIX = "base_model.model."
NO_TARGET = "dummy-target-modules"
"""In place of names of layers, tells PEFT that none has an adapter."""
UNKNOWN_TO_US = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "trainable_token_indices",
    "megatron_config",
)
"""Settings of PEFT that change what is computed, and that adapters here do not have."""


def peft_config(
    tensors: Mapping[str, np.ndarray], frozen: Iterable[str], settings: LoRAConfig | None, base: str | None
) -> JsonObject:
    """Content of ``adapter_config.json``.

    Args:
        tensors: all that is written, by ``lora/...`` and ``params/...``, as of :func:`as_peft`.
        frozen: paths of all other parameters, without ``params/``, layer by layer.
        settings: of the adapters, where there are any.
        base: path of the run that the base is of.

    Raises:
        ValueError: there are adapters, but no settings of them.
    """
    ranks = {_split(key)[1:-1]: values.shape[1] for key, values in tensors.items() if _is_a(key)}
    if ranks and settings is None:
        raise ValueError("adapters need their settings: give lora")
    settings = settings or LoRAConfig(rank=1, alpha=1.0)
    common = _alpha(settings, (), settings.rank)
    alphas = {path: _alpha(settings, path, rank) for path, rank in ranks.items()}
    trained = [_split(key)[1:] for key in tensors if key.startswith("params/")]
    others = [tuple(path.split("/")) for path in frozen]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": common,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilised,
        "fan_in_fan_out": False,
        "bias": "none",
        "target_modules": _targets(ranks, [*trained, *others]) or NO_TARGET,
        "modules_to_save": _whole_modules(trained, [*others, *((*path, "a") for path in ranks)]) or None,
        "rank_pattern": {torch_module(path): r for path, r in ranks.items() if r != settings.rank},
        "alpha_pattern": {torch_module(path): alpha for path, alpha in alphas.items() if alpha != common},
    }


def _alpha(settings: LoRAConfig, path: Path, rank: int) -> float:
    """The alpha at which PEFT scales a product of this rank as we do that at `path`; whole if it can be."""
    alpha = scale(settings, path) * (rank**0.5 if settings.rank_stabilised else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def _targets(adapted: Iterable[Path], leaves: Iterable[Path]) -> list[str]:
    """Names that match the adapted layers and no other one: their last part where that is enough."""
    names = {torch_module(path) for path in adapted}
    others = {torch_module(path[:-1]) for path in leaves if path[-1] == "kernel"} - names
    last = {name: name.rpartition(".")[2] for name in names}
    ambiguous = {name.rpartition(".")[2] for name in others}
    return sorted({name if last[name].isdigit() or last[name] in ambiguous else last[name] for name in names})


def _whole_modules(trained: Iterable[Path], others: Iterable[Path]) -> list[str]:
    """The largest modules that have nothing but trained parameters."""
    mixed = {name for path in others for name in _above(path)}
    found = (next((name for name in _above(path) if name not in mixed), None) for path in trained)
    return sorted({name for name in found if name is not None and name != "new_codes"})


def _above(path: Path) -> list[str]:
    """Names of the modules that hold a leaf, the outermost first."""
    parts = torch_module(path[:-1]).split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def as_peft(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under PEFT's names and in its orientation.

    Args:
        tensors: by path, ``lora/...`` with ``a`` `[in, rank]` and ``b`` `[rank, out]`, and ``params/...``.
    """
    adapted = {_split(key)[1:-1] for key in tensors if _is_a(key)}
    return {peft_name(key, adapted): turned(key, values) for key, values in tensors.items()}


def peft_name(key: str, adapted: Iterable[Path]) -> str:
    """PEFT's name of the tensor that is `key` here; `adapted` are the paths of layers with adapters."""
    collection, *path = key.split("/")
    name = torch_name(tuple(path))
    if collection == "params" and tuple(path[:-1]) in adapted:
        module, _, leaf = name.rpartition(".")
        name = f"{module}.base_layer.{leaf}"
    return PREFIX + name


def key_of(name: str) -> str:
    """``lora/...`` or ``params/...``: the way back from :func:`peft_name`."""
    path = path_of(name.removeprefix(PREFIX).replace(".base_layer.", "."))
    return "/".join(("lora" if ".lora_" in name else "params", *path))


def turned(key: str, values: np.ndarray) -> np.ndarray:
    """A tensor in PyTorch's orientation, or back from it."""
    return np.ascontiguousarray(values.T if key.rpartition("/")[2] in TRANSPOSED else values)


def settings_of(config: JsonObject, ranks: Mapping[Path, int], where: object) -> LoRAConfig:
    """Settings of adapters that PEFT has saved.

    Args:
        config: content of its ``adapter_config.json``.
        ranks: of the adapters, by path of the layer.
        where: what messages call the file.

    Raises:
        InputError: it is no LoRA, has settings that change what is computed and that are not to be had here,
            or lacks one.
    """
    wrong = [name for name in UNKNOWN_TO_US if config.get(name)]
    if config.get("peft_type") != "LORA":
        wrong.append(f"peft_type {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        wrong.append(f"bias {config['bias']!r}")
    if wrong:
        raise InputError(
            f"{where}: an adapter of PEFT with {', '.join(wrong)} cannot be read; train one of plain LoRA."
        )
    names = {path: "/".join(path) for path in ranks}
    try:
        rank, common = int(config["r"]), float(config["lora_alpha"])
        alphas = {path: _alpha_there(config, path) for path in ranks}
        return LoRAConfig(
            rank=rank,
            alpha=common,
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=tuple(names.values()),
            rank_pattern=tuple(f"{names[path]}={own}" for path, own in ranks.items() if own != rank),
            alpha_pattern=tuple(f"{names[path]}={own}" for path, own in alphas.items() if own != common),
            rank_stabilised=bool(config.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise InputError(f"{where}: r, lora_alpha and alpha_pattern are damaged; save it again.") from error


def _alpha_there(config: JsonObject, path: Path) -> float:
    """Alpha of the layer at `path`: of the first pattern that matches the end of its name, or that of all."""
    patterns, module = config.get("alpha_pattern") or {}, torch_module(path)
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return float(next(matching, config["lora_alpha"]))


def _split(key: str) -> Path:
    return tuple(key.split("/"))


def _is_a(key: str) -> bool:
    return key.startswith("lora/") and key.endswith("/a")
